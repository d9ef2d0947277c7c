"""Tokenise a corpus into shards, once, with a progress bar."""

import hashlib
import itertools
import json
import logging
import platform
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from kvtrain.assets import HELDOUT
from kvtrain.data.corpus import HELDOUT_NAME, PASSKEY, STDLIB, Document, corpus_files, read_corpus, stdlib_files
from kvtrain.data.hub import HUB_PREFIX
from kvtrain.data.shards import FORMAT_VERSION, MANIFEST, Manifest, ShardWriter, new_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger("kvtrain")

_BATCH_DOCUMENTS = 256
_BATCH_CHARACTERS = 1 << 20


class _Piece(NamedTuple):
    """A run of a document's text, short enough to be tokenised in one go."""

    text: str
    source: str
    starts: bool  # the document starts here
    ends: bool


def prepare_corpus(
    corpora: list[str],
    tokenizer: "PreTrainedTokenizerFast",
    output: Path,
    *,
    vocab_size: int | None = None,
    text_column: str = "text",
    split: str = "train",
    shard_tokens: int = 1 << 26,
) -> Manifest:
    """Tokenise every document of the corpora into ``output``; nothing is left there on failure.

    A document becomes ``[bos] ids [eos]``, with those special tokens that the tokenizer has.
    Memory holds one document's text, the tokens of about a million characters, and one shard.

    Args:
        corpora: See ``read_corpus``.
        tokenizer: Fast tokenizer.
        output: New folder.
        vocab_size: Vocabulary of the model, if it differs from the tokenizer's.
        text_column: Field that holds the text.
        split: Split of Hub datasets.
        shard_tokens: Tokens per shard.

    Returns:
        What was written.

    Raises:
        ValueError: Bad input, with file and row, an existing output, or a full disk.
    """
    with new_folder(output) as folder, token_progress("documents") as progress:
        writer = ShardWriter(folder, vocab_size or len(tokenizer), shard_tokens)
        documents = itertools.chain.from_iterable(
            read_corpus(corpus, text_column=text_column, split=split) for corpus in corpora
        )
        task = progress.add_task("", total=None, tokens=0, rate=0.0)
        for ids, piece in _tokenise(documents, tokenizer):
            writer.add(ids, len(piece.text.encode()), piece.source, starts=piece.starts)
            advance(progress, task, int(piece.ends), len(ids))
        return writer.finish(tokenizer_digest(tokenizer))


def prepare_once(
    corpora: list[str], tokenizer: "PreTrainedTokenizerFast", folder: Path, *, text_column: str = "text"
) -> None:
    """Make sure that ``folder`` holds the tokenised corpora, however many processes want it at once.

    Args:
        corpora: See ``read_corpus``.
        tokenizer: Fast tokenizer.
        folder: Where the shards are, or will be.
        text_column: Field that holds the text.

    Raises:
        ValueError: As ``prepare_corpus``, or the folder's parent cannot be written.
    """
    write_once(folder, lambda: prepare_corpus(corpora, tokenizer, folder, text_column=text_column))


def write_once(folder: Path, write: Callable[[], object]) -> None:
    """Have a folder of shards written by one of the processes that want it at once, if it is not there.

    Args:
        folder: Where the shards are, or will be.
        write: Writes it.

    Raises:
        ValueError: As ``write``, or the folder's parent cannot be written.
    """
    from filelock import FileLock

    if (folder / MANIFEST).is_file():
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if not (folder / MANIFEST).is_file():
                write()
    except (OSError, ValueError) as error:
        if (folder / MANIFEST).is_file():  # where locks do not reach, another machine was faster
            logger.info("%s was finished by another process", folder)
        elif isinstance(error, OSError):
            raise ValueError(f"{folder}: cannot be created ({error.strerror or error})") from error
        else:
            raise


def token_progress(things: str) -> Progress:
    """A bar of what has been tokenised so far.

    Args:
        things: What is counted, such as ``"documents"``.
    """
    console = Console(stderr=True)
    return Progress(
        SpinnerColumn(),
        TextColumn("tokenising"),
        MofNCompleteColumn(),
        TextColumn(things + ", {task.fields[tokens]:,} tokens, {task.fields[rate]:,.0f} tokens/s"),
        TimeElapsedColumn(),
        transient=True,
        console=console,
        disable=not console.is_terminal,
    )


def advance(progress: Progress, task: TaskID, things: int, tokens: int) -> None:
    """Move a ``token_progress`` on."""
    total = progress.tasks[task].fields["tokens"] + tokens
    rate = total / max(progress.tasks[task].elapsed or 0.0, 1e-6)
    progress.update(task, advance=things, tokens=total, rate=rate)


def _tokenise(
    documents: Iterable[Document], tokenizer: "PreTrainedTokenizerFast"
) -> Iterator[tuple[list[int], _Piece]]:
    """Ids of every piece with the special tokens around each document; documents without ids vanish."""
    prefix = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
    suffix = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    pieces = (piece for document in documents for piece in _pieces(document))
    for batch in _batches(pieces):
        texts = [piece.text for piece in batch]
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        for ids, piece in zip(encoded["input_ids"], batch, strict=True):
            if ids or not (piece.starts and piece.ends):
                yield [*(prefix if piece.starts else []), *ids, *(suffix if piece.ends else [])], piece


def _batches(pieces: Iterator[_Piece]) -> Iterator[list[_Piece]]:
    """Pieces for one call of the tokenizer, bounded in number and in characters."""
    batch: list[_Piece] = []
    characters = 0
    for piece in pieces:
        if batch and (len(batch) == _BATCH_DOCUMENTS or characters + len(piece.text) > _BATCH_CHARACTERS):
            yield batch
            batch, characters = [], 0
        batch.append(piece)
        characters += len(piece.text)
    if batch:
        yield batch


def _pieces(document: Document) -> Iterator[_Piece]:
    """A document in pieces of at most ``_BATCH_CHARACTERS``, cut where tokenizers cut as well."""
    text, begin = document.text, 0
    while len(text) - begin > _BATCH_CHARACTERS:
        end = _cut(text, begin, begin + _BATCH_CHARACTERS)
        yield _Piece(text[begin:end], document.source, begin == 0, False)
        begin = end
    yield _Piece(text[begin:], document.source, begin == 0, True)


def _cut(text: str, begin: int, limit: int) -> int:
    """Last place up to ``limit`` where a line starts with something visible, else a space, else the limit."""
    place = text.rfind("\n", begin, limit)
    while place >= 0:
        if not text[place + 1].isspace():
            return place + 1
        place = text.rfind("\n", begin, place)
    space = text.rfind(" ", begin + 1, limit)
    return space if space >= 0 else limit


def tokenizer_digest(tokenizer: "PreTrainedTokenizerFast") -> str:
    """SHA-256 of everything that decides a document's ids: the tokenizer and the special tokens around it."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    for setting in ("truncation", "padding"):  # left behind by the last call, and not used here
        rules.pop(setting, None)
    rules["kvtrain"] = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()


def corpus_fingerprint(corpora: list[str], tokenizer: "PreTrainedTokenizerFast", text_column: str, split: str) -> str:
    """A name for one tokenised corpus: it changes when a file, the tokenizer or the Python does.

    Files are known by place, size and time, the standard library by version and sizes; no text is read.

    Raises:
        ValueError: A corpus on disk is not there.
    """
    parts: list[object] = [FORMAT_VERSION, tokenizer_digest(tokenizer), text_column, split]
    for corpus in corpora:
        parts += [corpus, *_traces(corpus)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _traces(corpus: str) -> list[object]:
    if corpus.startswith(HUB_PREFIX) or corpus == PASSKEY:
        return []
    if corpus == STDLIB:
        sizes = [(name, path.stat().st_size) for path, name in stdlib_files(heldout=False)]
        return [platform.python_version(), *sizes]
    return file_traces([HELDOUT] if corpus == HELDOUT_NAME else corpus_files(corpus))


def file_traces(paths: list[Path]) -> list[object]:
    """Place, size and time of files, by which a change is known without reading them."""
    states = [(path, path.stat()) for path in paths]
    return [(str(path.resolve()), state.st_size, state.st_mtime_ns) for path, state in states]
