"""How a checkpoint that is one file reaches the disk and comes back."""

import hashlib
import os
from pathlib import Path
from typing import IO, Any

import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO

from kvtrain import stop_signals
from kvtrain.durable import naming, remove, unwrapped

_CHUNK = 1 << 22  # bytes between two looks at whether somebody wants the process to end
_UNSYNCED = 1 << 28  # bytes; a disk is never left with more than it takes in a second or so


class StreamedCheckpointIO(CheckpointIO):
    """Writes a checkpoint straight into its file, without a second copy in memory or in the temporary folder.

    Lightning's own builds the file in memory, writes it to the system's temporary folder and moves it; where that is
    full or another disk, so does its error, and an interruption may get lost on the way. Here a tensor goes from where
    it is to the file, a piece at a time; a save that is interrupted or fails leaves no file.

    Attributes:
        written: SHA-256 of the file that was written last, by its path.
    """

    def __init__(self) -> None:
        self.written: dict[Path, str] = {}

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint, and have it on disk.

        Raises:
            ValueError: Options are given, and there are none.
            OSError: It cannot be written; the error names the file.
        """
        if storage_options is not None:
            raise ValueError(f"checkpoints are files and take no storage options, such as {storage_options!r}")
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with naming(path), unwrapped(), path.open("wb", buffering=0) as file:
                stream = _Stream(file)
                torch.save(checkpoint, stream)  # type: ignore[arg-type]
                stream.sync()
        except BaseException:
            remove(path)
            raise
        self.written = {path: stream.digest.hexdigest()}

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Open a checkpoint; tensors stay in the file until they are copied to where they belong.

        Raises:
            ValueError: It is asked to run what a file says.
        """
        if weights_only is False:
            raise ValueError(f"{path}: checkpoints are read with weights_only=True, so that no code in them is run")
        checkpoint: dict[str, Any] = torch.load(path, map_location=map_location, weights_only=True, mmap=True)
        return checkpoint

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint, if it is there."""
        remove(Path(path))


class _Stream:
    """What ``torch.save`` writes to: an unbuffered file, its hash, and pieces so small that signals are heard."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest = file, hashlib.sha256()
        self._unsynced = 0

    def write(self, data: bytes | memoryview) -> int:
        """Write all of it."""
        rest = whole = memoryview(data).cast("B")
        while rest:
            if listener := stop_signals.current():
                listener.require_running()
            piece = rest[: self.file.write(rest[:_CHUNK])]
            self.digest.update(piece)
            self._unsynced += len(piece)
            if self._unsynced >= _UNSYNCED:
                self.sync()
            rest = rest[len(piece) :]
        return len(whole)

    def sync(self) -> None:
        """Wait for the disk."""
        os.fsync(self.file.fileno())
        self._unsynced = 0

    def flush(self) -> None:
        """Nothing is held back."""
