"""Text in: documents from files, folders, Hub datasets, or the standard library of this Python."""

import hashlib
import sysconfig
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from kvtrain.assets import HELDOUT
from kvtrain.data.hub import HUB_PREFIX, hub_rows
from kvtrain.data.passkey import passkey_texts
from kvtrain.data.rows import jsonl_rows, missing_column, parquet_rows, require_encodable
from kvtrain.data.shards import MANIFEST
from kvtrain.errors import first_line

STDLIB = "stdlib"
HELDOUT_NAME = "heldout"
PASSKEY = "passkey"

# Tests repeat themselves, character tables are no text, and build records differ from machine to machine.
_STDLIB_SKIPPED = {"test", "tests", "idle_test", "site-packages", "encodings", "__pycache__", "ensurepip"}
_STDLIB_HELDOUT_SHARE = 16


class Document(NamedTuple):
    """One text, and where it came from, for messages."""

    text: str
    source: str


def read_corpus(corpus: str, *, text_column: str = "text", split: str = "train") -> Iterator[Document]:
    """Yield the documents of one corpus in a fixed order.

    Args:
        corpus: A ``.txt``, ``.jsonl`` or ``.parquet`` file, a folder of them (searched recursively, in
            name order), ``hf:org/name`` or ``hf:org/name:config`` for a Hub dataset (``...@validation`` for
            a split), ``stdlib`` for the source of the running interpreter's standard library less its held-out modules,
            ``heldout`` for the text that the package holds out, or ``passkey`` for the passkey task without a
            haystack, to train tokenizers with.
        text_column: Field that holds the text, for everything but ``.txt``.
        split: Split of a Hub dataset whose name has none.

    Raises:
        ValueError: The corpus is unknown, or a file cannot be read; the message names file and row.
    """
    if corpus == STDLIB:
        yield from stdlib_documents(heldout=False)
    elif corpus == HELDOUT_NAME:
        yield from _read_file(HELDOUT, text_column)
    elif corpus == PASSKEY:
        yield from (Document(text, f"passkey {number}") for number, text in enumerate(passkey_texts(), 1))
    elif corpus.startswith(HUB_PREFIX):
        yield from _read_hub(corpus.removeprefix(HUB_PREFIX), text_column, split)
    else:
        for path in corpus_files(corpus):
            yield from _read_file(path, text_column)


def require_corpus(corpus: str) -> None:
    """Make sure that a corpus is there, as far as can be said without reading it.

    Raises:
        ValueError: It lies on disk and is not there, or is of no known kind.
    """
    if corpus not in (STDLIB, HELDOUT_NAME, PASSKEY) and not corpus.startswith(HUB_PREFIX):
        corpus_files(corpus)


def corpus_files(corpus: str, kinds: Collection[str] | None = None) -> list[Path]:
    """Files of a corpus that lies on disk, in name order.

    Args:
        corpus: Path of a file or folder.
        kinds: Extensions that count; None takes those of text.

    Raises:
        ValueError: Nothing there, or nothing of a known kind.
    """
    root, kinds = Path(corpus), _READERS if kinds is None else kinds
    if root.is_dir():
        if (root / MANIFEST).is_file():
            raise ValueError(f"{corpus}: a folder of tokens, not of text; give it as the only corpus")
        files = sorted(path for path in root.rglob("*") if path.suffix.lower() in kinds and not path.is_dir())
        if not files:
            raise ValueError(f"{corpus}: the folder holds no {', '.join(kinds)} file")
        return files
    if not root.is_file():
        raise ValueError(
            f"{corpus}: no such file or folder; a corpus is a path, '{HUB_PREFIX}org/name', "
            f"'{STDLIB}', '{HELDOUT_NAME}' or '{PASSKEY}'"
        )
    if root.suffix.lower() not in kinds:
        kind = f"{root.suffix!r} files" if root.suffix else "a file without an extension"
        raise ValueError(f"{corpus}: cannot read {kind}; convert to {', '.join(kinds)}")
    return [root]


def stdlib_documents(*, heldout: bool) -> Iterator[Document]:
    """Source files of the running interpreter's standard library, one document each.

    The split is by a hash of the top-level module's name, so that it is the same for every Python.
    """
    for path, name in stdlib_files(heldout=heldout):
        text = path.read_bytes().decode("utf-8", errors="replace").strip()
        if text:
            yield Document(text, f"stdlib/{name}")


def stdlib_files(*, heldout: bool) -> list[tuple[Path, str]]:
    """Files behind ``stdlib_documents`` and their names inside the library, in order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        skipped = _STDLIB_SKIPPED & set(relative.parts) or relative.name.startswith("_sysconfigdata")
        if not skipped and is_heldout_module(relative.parts[0]) == heldout:
            files.append((path, relative.as_posix()))
    return files


def is_heldout_module(name: str) -> bool:
    """Whether a top-level module (``json`` or ``ast.py``) belongs to the held-out split."""
    digest = hashlib.sha256(name.removesuffix(".py").encode()).digest()
    return digest[0] % _STDLIB_HELDOUT_SHARE == 0


def _read_txt(path: Path, text_column: str) -> Iterator[Document]:
    data = path.read_bytes()
    try:
        yield Document(data.decode("utf-8"), str(path))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path} line {line}: not UTF-8 text (byte {error.start}); convert it first") from error


def _read_jsonl(path: Path, text_column: str) -> Iterator[Document]:
    for row, source in jsonl_rows(path):
        yield _document(row, text_column, source)


def _read_parquet(path: Path, text_column: str) -> Iterator[Document]:
    for row, source in parquet_rows(path, text_column):
        yield _document(row, text_column, source)


def _read_hub(name: str, text_column: str, split: str) -> Iterator[Document]:
    for number, row in enumerate(hub_rows(name, split), 1):
        yield _document(row, text_column, f"{HUB_PREFIX}{name} row {number}")


def _document(row: object, text_column: str, source: str) -> Document:
    if not isinstance(row, dict):
        raise ValueError(f"{source}: expected an object with a {text_column!r} field")
    if text_column not in row:
        raise ValueError(missing_column(source, text_column, list(row)))
    text = row[text_column]
    if not isinstance(text, str):
        raise ValueError(f"{source}: field {text_column!r} holds {type(text).__name__}, not text")
    require_encodable(text, f"{source}: field {text_column!r}")
    return Document(text, source)


def _read_file(path: Path, text_column: str) -> Iterator[Document]:
    try:
        yield from _READERS[path.suffix.lower()](path, text_column)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or first_line(error)})") from error


_READERS: dict[str, Callable[[Path, str], Iterator[Document]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
