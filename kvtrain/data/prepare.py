"""Tokenise a corpus into shards, once, with a progress bar."""

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from kvtrain.data.corpus import HUB_PREFIX, Document, corpus_files, read_corpus
from kvtrain.data.shards import Manifest, ShardWriter, new_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_BATCH_DOCUMENTS = 256
_NAMED_CORPORA = ("stdlib", "heldout")


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

    Args:
        corpora: See ``read_corpus``.
        tokenizer: Fast tokenizer.
        output: New folder.
        vocab_size: Vocabulary of the model, if it differs from the tokenizer's.
        text_column: Field that holds the text.
        split: Split of Hub datasets.
        shard_tokens: Tokens per shard.

    Raises:
        ValueError: Bad input, with file and row, an existing output, or a full disk.
    """
    with new_folder(output) as folder:
        writer = ShardWriter(folder, vocab_size or len(tokenizer), shard_tokens)
        documents = itertools.chain.from_iterable(
            read_corpus(corpus, text_column=text_column, split=split) for corpus in corpora
        )
        with Progress(
            SpinnerColumn(),
            TextColumn("tokenising"),
            MofNCompleteColumn(),
            TextColumn("documents, {task.fields[tokens]:,} tokens"),
            TimeElapsedColumn(),
            transient=True,
        ) as progress:
            task = progress.add_task("", total=None, tokens=0)
            tokens = 0
            for ids, document in _tokenise(documents, tokenizer):
                writer.add(ids, len(document.text.encode()), document.source)
                tokens += len(ids)
                progress.update(task, advance=1, tokens=tokens)
        return writer.finish(tokenizer_digest(tokenizer))


def _tokenise(
    documents: Iterable[Document], tokenizer: "PreTrainedTokenizerFast"
) -> Iterator[tuple[list[int], Document]]:
    prefix = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
    suffix = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    remaining = iter(documents)
    while batch := list(itertools.islice(remaining, _BATCH_DOCUMENTS)):
        texts = [document.text for document in batch]
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        for ids, document in zip(encoded["input_ids"], batch, strict=True):
            if ids:
                yield [*prefix, *ids, *suffix], document


def tokenizer_digest(tokenizer: "PreTrainedTokenizerFast") -> str:
    """SHA-256 of everything that decides a tokenizer's ids."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def corpus_fingerprint(
    corpora: list[str], tokenizer: "PreTrainedTokenizerFast", text_column: str, split: str
) -> str:
    """A name for one tokenised corpus: it changes when a file, the tokenizer or the Python does."""
    digest = hashlib.sha256(f"{tokenizer_digest(tokenizer)} {text_column} {split}".encode())
    for corpus in corpora:
        digest.update(corpus.encode())
        if corpus in _NAMED_CORPORA:
            for document in read_corpus(corpus):
                digest.update(document.text.encode())
        elif not corpus.startswith(HUB_PREFIX):
            for path in corpus_files(corpus):
                status = path.stat()
                digest.update(f"{path.resolve()} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]
