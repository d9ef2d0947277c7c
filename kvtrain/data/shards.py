"""Token shards on disk: memory-mapped ids and where each document starts.

A folder holds ``tokens-00000.npy`` (unsigned ids), ``starts-00000.npy`` (int64 offsets of document
starts in that shard; a very long document goes on in the next one without a start) and, written last,
``manifest.json``. A folder without a manifest is unfinished. Folders of chats also have ``targets-00000.npy`` (which
tokens are learned) and ``keys-00000.npy`` (a number of the chat behind every document).
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
    sha256: str = ""  # of tokens and document starts; folders of version 0.1 have none

    @property
    def fingerprint(self) -> str:
        """A name for what the folder holds, wherever it lies and whenever it was written."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


class ShardWriter:
    """Collects documents and writes a shard whenever enough tokens have come together.

    Args:
        folder: Where the files go.
        vocab_size: Ids must be below it; it also chooses 16 or 32 bits a token.
        shard_tokens: Tokens after which a shard is closed, at the end of a document or of a piece of one.
    """

    def __init__(self, folder: Path, vocab_size: int, shard_tokens: int = 1 << 26) -> None:
        self.folder, self.vocab_size, self.shard_tokens = folder, vocab_size, shard_tokens
        self.dtype = np.uint16 if vocab_size <= 1 << 16 else np.uint32
        self.sizes: list[int] = []
        self.num_documents = self.num_bytes = 0
        self._pieces: list[TokenArray] = []
        self._starts: list[int] = []
        self._targets: list[npt.NDArray[np.bool_]] = []
        self._keys: list[int] = []
        self._pending = 0
        self._content = hashlib.sha256()

    def add(
        self,
        ids: list[int],
        num_bytes: int,
        source: str,
        *,
        starts: bool = True,
        targets: npt.NDArray[np.bool_] | None = None,
        key: int = 0,
    ) -> None:
        """Append a document, or a piece of a long one.

        Args:
            ids: Token ids.
            num_bytes: Bytes of text behind them.
            source: Where the text came from, for messages.
            starts: Whether a document starts here; if not, the last one goes on.
            targets: Which tokens of a chat are learned ``(T,)``; all documents of a folder have them, or none.
            key: The chat's number, of 64 bits, beside ``targets``.

        Raises:
            ValueError: An id lies outside the vocabulary.
        """
        piece = np.asarray(ids, dtype=np.int64)
        if not piece.size:
            return
        wrong = int(piece.min()) if piece.min() < 0 else int(piece.max())
        if not 0 <= wrong < self.vocab_size:
            raise ValueError(
                f"{source}: token id {wrong} lies outside the vocabulary of {self.vocab_size}; "
                "the tokenizer does not belong to this model"
            )
        if starts:
            self._starts.append(self._pending)
            self.num_documents += 1
        if targets is not None:
            assert starts and targets.shape == piece.shape
            self._targets.append(targets)
            self._keys.append(key)
        self._pieces.append(piece.astype(self.dtype))
        self._pending += piece.size
        self.num_bytes += num_bytes
        if self._pending >= self.shard_tokens:
            self._close_shard()

    def _close_shard(self) -> None:
        number = len(self.sizes)
        arrays = {"tokens": np.concatenate(self._pieces), "starts": np.asarray(self._starts, dtype=np.int64)}
        if self._targets:
            arrays |= {"targets": np.concatenate(self._targets), "keys": np.asarray(self._keys, dtype=np.uint64)}
        for kind, array in arrays.items():
            np.save(self.folder / f"{kind}-{number:05d}.npy", array)
            self._content.update(array.tobytes())
        self.sizes.append(self._pending)
        self._pieces, self._starts, self._targets, self._keys, self._pending = [], [], [], [], 0

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
            self.vocab_size,
            sum(self.sizes),
            self.num_documents,
            self.num_bytes,
            self.sizes,
            tokenizer_sha256,
            sha256=self._content.hexdigest(),
        )
        (self.folder / MANIFEST).write_text(json.dumps(asdict(manifest), indent=1) + "\n")
        return manifest


def require_new(target: Path) -> None:
    """Make sure that an output folder is not there yet.

    Raises:
        ValueError: It is.
    """
    if target.exists():
        raise ValueError(f"{target} exists already; remove it or choose another output folder")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Give a temporary folder that becomes ``target`` on success and vanishes on any failure.

    Raises:
        ValueError: ``target`` exists, or the disk is full.
    """
    require_new(target)
    missing = [parent for parent in target.parents if not parent.exists()]
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
        reason = error.strerror or str(error)  # NumPy reports a short write without an error number
        raise ValueError(f"{target}: writing failed ({reason}); nothing was kept") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in missing if not target.exists() else ():
            _remove_empty(parent)


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):  # somebody else has put something there
        folder.rmdir()


class TokenShards:
    """A shard folder, opened for reading.

    Args:
        folder: What ``kvtrain prepare`` wrote.

    Attributes:
        targets: Which tokens of each shard are learned; none in a folder of text.
        keys: Number of the chat behind each document of each shard; likewise.

    Raises:
        ValueError: The folder is unfinished, damaged or of another format version.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.manifest = _parse_manifest(folder, (folder / MANIFEST).read_bytes())
        except OSError as error:
            raise ValueError(f"{folder}: no {MANIFEST}; write the folder with `kvtrain prepare`") from error
        self.tokens = [self._open("tokens", number) for number in range(len(self.manifest.shards))]
        self.starts = [self._open("starts", number) for number in range(len(self.manifest.shards))]
        chats = (folder / "targets-00000.npy").exists()
        self.targets = [self._open("targets", number) for number in range(len(self.manifest.shards))] if chats else []
        self.keys = [self._open("keys", number) for number in range(len(self.manifest.shards))] if chats else []
        for number, size in enumerate(self.manifest.shards):
            self._check(number, size)
            if chats:
                self._check_chats(number)

    def _open(self, kind: str, number: int) -> TokenArray:
        path = self.folder / f"{kind}-{number:05d}.npy"
        try:
            array: TokenArray = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, EOFError, ValueError) as error:
            raise ValueError(f"{path}: missing or damaged; prepare the corpus again") from error
        return array

    def _check(self, number: int, size: int) -> None:
        """Sizes and document starts; ids are not read, that would take as long as the file is large."""
        tokens, starts = self.tokens[number], self.starts[number]
        if tokens.shape != (size,) or tokens.dtype not in (np.uint16, np.uint32):
            raise ValueError(f"{self.folder}: shard {number} has {tokens.size} tokens, not {size}; prepare it again")
        ordered = starts.ndim == 1 and starts.dtype == np.int64 and bool((np.diff(starts) > 0).all())
        if not ordered or (starts.size and not (starts[0] >= 0 and starts[-1] < size)):
            raise ValueError(f"{self.folder}: shard {number} has damaged document starts; prepare it again")

    def _check_chats(self, number: int) -> None:
        targets, keys = self.targets[number], self.keys[number]
        as_tokens = targets.shape == self.tokens[number].shape and targets.dtype == np.bool_
        if not as_tokens or keys.shape != self.starts[number].shape or keys.dtype != np.uint64:
            raise ValueError(f"{self.folder}: shard {number} has a damaged loss mask; prepare it again")


def _parse_manifest(folder: Path, data: bytes) -> Manifest:
    try:
        fields = json.loads(data)
        version = fields.get("version")
        if version != FORMAT_VERSION:
            raise ValueError(f"{folder}: format {version}, this kvtrain reads {FORMAT_VERSION}; prepare it again")
        manifest = Manifest(**fields)
        if not manifest.shards or sum(manifest.shards) != manifest.num_tokens or min(manifest.shards) < 1:
            raise TypeError("the shards do not add up")
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder}/{MANIFEST}: damaged ({error}); prepare the corpus again") from error
    return manifest
