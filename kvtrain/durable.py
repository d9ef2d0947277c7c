"""Files that are there whole or not at all, whatever ends the process or the power, and their hashes."""

import hashlib
import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from kvtrain.errors import reason

_HASHED_AT_ONCE = 8  # files of a sharded checkpoint
_CHUNK = 1 << 22  # bytes


def temporary_name(path: Path) -> Path:
    """Where a file or folder is written before it gets its name; ``remove_leftovers`` knows these."""
    return path.with_name(f".{path.name}.new")


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process was writing into a folder."""
    for path in folder.glob(".*.new"):
        remove(path)


@contextmanager
def replacing(path: Path, *, synced: bool = True) -> Iterator[Path]:
    """Write a file anew: a reader finds the old one or the new one, and a failure leaves nothing behind.

    Args:
        path: The file.
        synced: Wait for the disk; without it the file outlives the process and perhaps not the power.

    Yields:
        Where to write it.

    Raises:
        OSError: It cannot be written; the error names ``path``.
    """
    temporary = temporary_name(path)
    try:
        with naming(path):
            yield temporary
            publish(temporary, path, synced=synced)
    except BaseException:
        remove(temporary)
        raise


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let errors of the system that come out of a write without a name, such as a full disk, tell where.

    Raises:
        OSError: As it was raised, with ``path`` for its file.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def unwrapped() -> Iterator[None]:
    """Let what ended ``torch.save`` early come out as it was.

    torch's writer closes its archive even then, fails at that, and raises what it failed with.
    """
    try:
        yield
    except BaseException as error:
        first = reason(error)
        if first is error:
            raise
        raise first from None


@contextmanager
def writing(path: Path) -> Iterator[IO[bytes]]:
    """A new file for ``torch.save``, which loses the system's error where it opens the file by itself.

    Raises:
        OSError: It cannot be written; the error names ``path``.
    """
    with naming(path), unwrapped(), path.open("wb") as file:
        yield file


def write_text(path: Path, text: str) -> None:
    """Write a text file anew.

    Raises:
        OSError: It cannot be written.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def publish(temporary: Path, final: Path, *, synced: bool = True) -> None:
    """Give a completely written file or folder its name, in one step; replaces what was there."""
    if synced and not temporary.is_symlink():
        for written in [*temporary.rglob("*"), temporary]:  # there is nothing below a file
            sync(written)
    if final.is_dir() and not final.is_symlink():
        shutil.rmtree(final)
    os.replace(temporary, final)
    if synced:
        sync(final.parent)


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, on disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def remove(path: Path) -> None:
    """Remove a file, link or folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def files_in(path: Path) -> list[Path]:
    """The files of a folder at any depth, or the file itself."""
    return sorted(inner for inner in path.rglob("*") if inner.is_file()) if path.is_dir() else [path]


def sha256(files: list[Path]) -> list[str]:
    """Hashes of files, several at a time; an interruption does not wait for the rest of them."""
    stop = threading.Event()
    with ThreadPoolExecutor(_HASHED_AT_ONCE) as pool:
        try:
            return list(pool.map(lambda file: _sha256(file, stop), files))
        finally:
            stop.set()


def _sha256(file: Path, stop: threading.Event) -> str:
    digest, buffer = hashlib.sha256(), bytearray(_CHUNK)
    with file.open("rb", buffering=0) as stream:
        while not stop.is_set() and (count := stream.readinto(buffer)):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()
