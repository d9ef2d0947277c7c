"""Checkpoints in torch's distributed form (DCP), a folder to which every rank has written its part.

``.metadata`` says where the parts of each tensor lie. It is a pickle, which is read here by an unpickler that knows the
few plain classes it is made of and refuses everything else.
"""

import pickle
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_loader import load

from kvtrain.errors import first_line, reason

INDEX = ".metadata"
REST = "meta.pt"  # what is no tensor, as Lightning calls the file
WEIGHTS = "state_dict."  # how names of a training module's weights begin

_PATHS = frozenset({"Path", "PosixPath", "PurePosixPath", "PurePath", "WindowsPath"})
_DESCRIPTIONS = {
    "torch.distributed.checkpoint.metadata": frozenset(
        {
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        }
    ),
    "torch.distributed.checkpoint.filesystem": frozenset({"_StorageInfo"}),
    "torch.serialization": frozenset({"_get_layout"}),
    "pathlib": _PATHS,
    "pathlib._local": _PATHS,
}


class _DescriptionUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_plain = module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype))
        if is_plain or name in _DESCRIPTIONS.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")


class ShardedReader(FileSystemReader):
    """Reads tensors of a sharded checkpoint, whole or in part, and runs no code that it might hold.

    Args:
        folder: The checkpoint.

    Raises:
        ValueError: It is damaged, as far as the sizes of its files tell, or holds a pickle of something else.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.folder, self._metadata = folder, _read_index(folder)
        _require_whole(folder, self._metadata)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What is where; read once."""
        if self._metadata.storage_meta is None:
            self._metadata.storage_meta = StorageMeta()
        self._metadata.storage_meta.load_id = self.load_id
        return self._metadata

    def tensors(self) -> dict[str, TensorStorageMetadata]:
        """Every tensor by name: its size, its type."""
        described = self._metadata.state_dict_metadata.items()
        return {name: tensor for name, tensor in described if isinstance(tensor, TensorStorageMetadata)}

    def read_into(self, targets: dict[str, Tensor]) -> None:
        """Fill tensors, sharded or whole; every rank reads for itself.

        Raises:
            ValueError: A shard is damaged.
            OSError: A file cannot be had.
        """
        unwarned = warnings.catch_warnings(action="ignore", category=UserWarning)  # that others are not asked is meant
        with unwarned, plain_errors(self.folder, ValueError):
            load(dict(targets), storage_reader=self, no_dist=True)

    def read(self, name: str) -> Tensor:
        """One whole tensor; beside it one rank's part of it is in memory, where there are several.

        Raises:
            ValueError: A shard is damaged.
            OSError: A file cannot be had.
        """
        described = self.tensors()[name]
        if len(described.chunks) == 1:
            return self._read_part(name, described.chunks[0])
        whole = torch.empty(described.size, dtype=described.properties.dtype)
        for chunk in described.chunks:
            place = tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))
            whole[place] = self._read_part(name, chunk)
        return whole

    def _read_part(self, name: str, chunk: ChunkStorageMetadata) -> Tensor:
        """What one rank has written; torch's own reader would hold it twice."""
        stored = self._metadata.storage_data[MetadataIndex(name, chunk.offsets)]
        path = self.folder / stored.relative_path
        with path.open("rb") as file:
            try:
                part: Tensor = torch.load(self._slice_file(file, stored), map_location="cpu", weights_only=True)
                return part.view(chunk.sizes)
            except OSError:
                raise
            except Exception as error:  # pickle and zip readers raise a dozen unrelated types
                raise ValueError(f"{path}: {name} is damaged ({_first_sentence(error)})") from error

    def rest(self) -> dict[str, Any]:
        """What is no tensor.

        Raises:
            ValueError: It cannot be read.
        """
        try:
            content: dict[str, Any] = torch.load(self.folder / REST, map_location="cpu", weights_only=True)
        except Exception as error:  # pickle and zip readers raise a dozen unrelated types
            raise ValueError(f"{self.folder / REST}: not readable ({first_line(error)})") from error
        return content


@contextmanager
def plain_errors(folder: Path, otherwise: type[Exception]) -> Iterator[None]:
    """Raise what the first rank that failed has failed with; torch's error around it is no ``Exception``.

    Args:
        folder: The checkpoint that is written or read.
        otherwise: What to raise in place of an error that is none of the system's.

    Raises:
        KeyboardInterrupt: Somebody wants the process to end; also SystemExit.
        OSError: A file cannot be had or written; the error names it, or the folder.
        Exception: Of the kind that was asked for.
    """
    try:
        yield
    except CheckpointException as error:
        failure, _ = error.failures[min(error.failures)]
        first = reason(failure)
        if isinstance(first, OSError) and first.errno is not None:
            raise OSError(first.errno, first.strerror, first.filename or str(folder)) from error
        if isinstance(first, KeyboardInterrupt | SystemExit):
            raise first from error
        raise otherwise(f"{folder}: {_first_sentence(failure)}") from error


def _first_sentence(error: BaseException) -> str:
    """Of an error of torch's, whose next ones advise to run what is in a file."""
    return re.split(r"(?<=\w)\. ", first_line(error))[0]


def is_sharded(path: Path) -> bool:
    """Whether a checkpoint is in this form."""
    return (path / INDEX).is_file()


def _read_index(folder: Path) -> Metadata:
    try:
        with (folder / INDEX).open("rb") as file:
            metadata: Any = _DescriptionUnpickler(file).load()
        return Metadata(metadata.state_dict_metadata, None, metadata.storage_data, metadata.storage_meta)
    except Exception as error:  # pickle raises a dozen unrelated types
        raise ValueError(f"{folder / INDEX}: not the index of a sharded checkpoint ({first_line(error)})") from error


def _require_whole(folder: Path, metadata: Metadata) -> None:
    """Make sure that files are there and as long as the index says, which costs nothing.

    Raises:
        ValueError: One is not.
    """
    lengths: dict[str, int] = {}
    for part in metadata.storage_data.values():
        lengths[part.relative_path] = max(lengths.get(part.relative_path, 0), part.offset + part.length)
    for name, length in lengths.items():
        file = folder / name
        found = file.stat().st_size if file.is_file() else 0
        if found < length:
            raise ValueError(f"{file}: damaged, {found} bytes of {length} are there")
