"""Token shards on disk: memory-mapped ids and where each document starts.

A folder holds ``tokens-00000.npy`` (unsigned ids), ``starts-00000.npy`` (int64 offsets of document
starts in that shard) and, written last, ``manifest.json``. A folder without a manifest is unfinished.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

MANIFEST = "manifest.json"
FORMAT_VERSION = 1

TokenArray = npt.NDArray[Any]


@dataclass(frozen=True)
class Manifest:
    """What a shard folder holds."""

    vocab_size: int
    num_tokens: int
    num_documents: int
    num_bytes: int
    shards: list[int]
    tokenizer_sha256: str
    version: int = FORMAT_VERSION


class ShardWriter:
    """Collects documents and writes a shard whenever enough tokens have come together.

    Args:
        folder: Where the files go.
        vocab_size: Ids must be below it; it also chooses 16 or 32 bits a token.
        shard_tokens: Tokens after which a shard is closed (at the end of a document).
    """

    def __init__(self, folder: Path, vocab_size: int, shard_tokens: int = 1 << 26) -> None:
        self.folder, self.vocab_size, self.shard_tokens = folder, vocab_size, shard_tokens
        self.dtype = np.uint16 if vocab_size <= 1 << 16 else np.uint32
        self.sizes: list[int] = []
        self.num_documents = self.num_bytes = 0
        self._documents: list[TokenArray] = []
        self._pending = 0

    def add(self, ids: list[int], num_bytes: int, source: str) -> None:
        """Append one document.

        Raises:
            ValueError: An id lies outside the vocabulary.
        """
        document = np.asarray(ids, dtype=np.int64)
        if document.size and (document.max() >= self.vocab_size or document.min() < 0):
            wrong = int(document.max()) if document.max() >= self.vocab_size else int(document.min())
            raise ValueError(
                f"{source}: token id {wrong} lies outside the vocabulary of {self.vocab_size}; "
                "the tokenizer does not belong to this model"
            )
        if not document.size:
            return
        self._documents.append(document.astype(self.dtype))
        self._pending += document.size
        self.num_documents += 1
        self.num_bytes += num_bytes
        if self._pending >= self.shard_tokens:
            self._close_shard()

    def _close_shard(self) -> None:
        number = len(self.sizes)
        lengths = [document.size for document in self._documents]
        starts = np.cumsum([0, *lengths[:-1]], dtype=np.int64)
        np.save(self.folder / f"tokens-{number:05d}.npy", np.concatenate(self._documents))
        np.save(self.folder / f"starts-{number:05d}.npy", starts)
        self.sizes.append(self._pending)
        self._documents, self._pending = [], 0

    def finish(self, tokenizer_sha256: str) -> Manifest:
        """Close the last shard and write the manifest.

        Raises:
            ValueError: There was no text at all.
        """
        if self._pending:
            self._close_shard()
        if not self.sizes:
            raise ValueError("the corpus is empty: no document holds any text")
        manifest = Manifest(
            self.vocab_size, sum(self.sizes), self.num_documents, self.num_bytes, self.sizes, tokenizer_sha256
        )
        (self.folder / MANIFEST).write_text(json.dumps(asdict(manifest), indent=1) + "\n")
        return manifest


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Give a temporary folder that becomes ``target`` on success and vanishes on any failure.

    Raises:
        ValueError: ``target`` exists, or the disk is full.
    """
    if target.exists():
        raise ValueError(f"{target} exists already; remove it or choose another output folder")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise ValueError(f"{target}: cannot be created ({error.strerror})") from error
    try:
        yield temporary
        os.chmod(temporary, 0o755)
        temporary.rename(target)
    except OSError as error:
        raise ValueError(f"{target}: writing failed ({error.strerror}); nothing was kept") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class TokenShards:
    """A shard folder, opened for reading.

    Args:
        folder: What ``kvtrain prepare`` wrote.

    Raises:
        ValueError: The folder is unfinished, damaged or of another format version.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            fields = json.loads((folder / MANIFEST).read_text())
            self.manifest = Manifest(**fields)
        except FileNotFoundError as error:
            raise ValueError(f"{folder}: no {MANIFEST}; write the folder with `kvtrain prepare`") from error
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(f"{folder}/{MANIFEST}: damaged ({error}); prepare the corpus again") from error
        if self.manifest.version != FORMAT_VERSION:
            raise ValueError(f"{folder}: format {self.manifest.version}, this kvtrain reads {FORMAT_VERSION}")
        self.tokens = [self._open("tokens", number) for number in range(len(self.manifest.shards))]
        self.starts = [self._open("starts", number) for number in range(len(self.manifest.shards))]
        for number, (tokens, size) in enumerate(zip(self.tokens, self.manifest.shards, strict=True)):
            if tokens.size != size:
                raise ValueError(f"{folder}: shard {number} has {tokens.size} tokens, not {size}; prepare again")

    def _open(self, kind: str, number: int) -> TokenArray:
        path = self.folder / f"{kind}-{number:05d}.npy"
        try:
            array: TokenArray = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: missing or damaged; prepare the corpus again") from error
        return array
