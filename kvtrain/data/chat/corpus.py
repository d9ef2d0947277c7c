"""Chats of files, folders and Hub data sets, in a fixed order."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvtrain.data.chat.examples import EXAMPLES, example_chats
from kvtrain.data.chat.formats import Chat, parse_chat
from kvtrain.data.corpus import corpus_files
from kvtrain.data.hub import HUB_PREFIX, hub_rows
from kvtrain.data.rows import Row, jsonl_rows, parquet_rows, parse_json
from kvtrain.errors import first_line

_IN_FOLDERS = (".jsonl", ".parquet")  # what else ends in .json there is mostly about the data


def read_chats(corpus: str, *, messages_column: str | None = None, split: str = "train") -> Iterator[Chat]:
    """Yield the chats of one corpus.

    Args:
        corpus: A ``.jsonl``, ``.json`` (a list) or ``.parquet`` file, a folder of ``.jsonl`` and ``.parquet`` files,
            ``hf:org/name`` as for text, or ``examples`` for the chats that the package makes.
        messages_column: Field that holds the messages; None looks for ``messages``, ``conversations``, or ``prompt``
            with ``completion``.
        split: Split of a Hub dataset whose name has none.

    Raises:
        ValueError: There is no such corpus, or a row is no chat; the message names file and row.
    """
    if corpus == EXAMPLES:
        yield from example_chats()
        return
    for row, source in _rows(corpus, split):
        yield parse_chat(row, source, messages_column)


def chat_files(corpus: str) -> list[Path]:
    """Files of a corpus of chats that lies on disk, in name order.

    Raises:
        ValueError: Nothing there, or nothing of a known kind.
    """
    return corpus_files(corpus, _IN_FOLDERS if Path(corpus).is_dir() else (*_IN_FOLDERS, ".json"))


def require_chats(corpus: str) -> None:
    """Make sure that a corpus is there, as far as can be said without reading it.

    Raises:
        ValueError: It lies on disk and is not there, or is of no known kind.
    """
    if corpus != EXAMPLES and not corpus.startswith(HUB_PREFIX):
        chat_files(corpus)


def _rows(corpus: str, split: str) -> Iterator[Row]:
    if corpus.startswith(HUB_PREFIX):
        for number, row in enumerate(hub_rows(corpus.removeprefix(HUB_PREFIX), split), 1):
            yield _without_nulls(row), f"{corpus} row {number}"
        return
    for path in chat_files(corpus):
        try:
            yield from _file_rows(path)
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror or first_line(error)})") from error


def _file_rows(path: Path) -> Iterator[Row]:
    if path.suffix.lower() == ".jsonl":
        yield from jsonl_rows(path)
    elif path.suffix.lower() == ".parquet":
        for row, source in parquet_rows(path):
            yield _without_nulls(row), source
    else:
        rows = parse_json(path.read_bytes(), str(path))
        if not isinstance(rows, list):
            raise ValueError(
                f"{path}: holds one {type(rows).__name__}, not a list of chats; write a chat a line as .jsonl"
            )
        for number, row in enumerate(rows, 1):
            yield row, f"{path} item {number}"


def _without_nulls(value: Any) -> Any:
    """Without the fields that a table adds where rows differ in shape."""
    if isinstance(value, dict):
        return {name: _without_nulls(part) for name, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value
