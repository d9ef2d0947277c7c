"""Render and tokenise chats into shards with their loss masks, once."""

import hashlib
import itertools
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvtrain.data.chat.corpus import chat_files, read_chats
from kvtrain.data.chat.examples import EXAMPLES, example_chats
from kvtrain.data.chat.picture import SAMPLES_PAGE, write_page
from kvtrain.data.chat.rendering import ChatRenderer, RenderingCounts
from kvtrain.data.hub import HUB_PREFIX
from kvtrain.data.prepare import advance, file_traces, token_progress, tokenizer_digest
from kvtrain.data.shards import FORMAT_VERSION, Manifest, ShardWriter, TokenShards, new_folder

RECORD = "chats.json"
_RENDERING_VERSION = 1  # of how chats become tokens and masks


@dataclass(frozen=True)
class ChatRecord:
    """How a folder of chats was made.

    Attributes:
        template: The chat template, or several by name.
        arguments: What it was given besides.
        learned: Tokens in the loss.
        counts: What became of the chats.
    """

    template: str | dict[str, str]
    arguments: dict[str, Any]
    learned: int
    counts: RenderingCounts

    @classmethod
    def read(cls, folder: Path) -> "ChatRecord":
        """The record of a folder.

        Raises:
            ValueError: It is not there, or damaged.
        """
        try:
            fields = json.loads((folder / RECORD).read_bytes())
            return cls(**{**fields, "counts": RenderingCounts(**fields["counts"])})
        except OSError as error:
            raise ValueError(f"{folder}: no {RECORD}; write the folder with `kvtrain prepare --chats`") from error
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{folder / RECORD}: damaged; prepare the chats again") from error

    def summary(self, manifest: Manifest) -> str:
        """What was made, and what about it one should know, in a line."""
        counts = self.counts
        remarks = [
            f"{counts.chats:,} chats, {counts.answers:,} answers, {manifest.num_tokens:,} tokens, "
            f"{self.learned:,} of them learned"
        ]
        if counts.split:
            remarks.append(
                f"{counts.split:,} chats became several texts ({counts.texts:,} in all), since the template writes "
                "earlier answers otherwise once a chat goes on"
            )
        if counts.straddling:
            remarks.append(f"{counts.straddling:,} answers begin within a token of the prompt, which is not learned")
        if counts.endless:
            remarks.append(f"{counts.endless:,} answers end without a stop token")
        return "; ".join(remarks)


def prepare_chats(
    corpora: list[str],
    renderer: ChatRenderer,
    output: Path,
    *,
    messages_column: str | None = None,
    split: str = "train",
    shard_tokens: int = 1 << 26,
) -> Manifest:
    """Tokenise every chat of the corpora into ``output``, with a page of samples; nothing is left there on failure.

    Args:
        corpora: See ``read_chats``.
        renderer: Tokenizer and chat template.
        output: New folder.
        messages_column: See ``read_chats``.
        split: Split of Hub datasets.
        shard_tokens: Tokens per shard.

    Returns:
        What was written.

    Raises:
        ValueError: Bad input, with file and row, an existing output, or a full disk.
    """
    with new_folder(output) as folder, token_progress("chats") as progress:
        writer = ShardWriter(folder, len(renderer.tokenizer), shard_tokens)
        task = progress.add_task("", total=None, tokens=0, rate=0.0)
        chats = itertools.chain.from_iterable(
            read_chats(corpus, messages_column=messages_column, split=split) for corpus in corpora
        )
        learned = 0
        for chat in chats:
            texts = list(renderer.encode(chat))
            for text in texts:
                writer.add(text.ids, text.num_bytes, chat.source, targets=text.targets, key=chat.key)
                learned += int(text.targets.sum())
            advance(progress, task, 1, sum(len(text.ids) for text in texts))
        if not renderer.counts.chats:
            raise ValueError(f"{', '.join(corpora)}: no chats; write one a line")
        manifest = writer.finish(tokenizer_digest(renderer.tokenizer))
        record = ChatRecord(renderer.chat_template, renderer.arguments, learned, renderer.counts)
        (folder / RECORD).write_text(json.dumps(asdict(record), indent=1) + "\n")
        write_page(folder / SAMPLES_PAGE, TokenShards(folder), renderer.tokenizer)
    return manifest


def chats_fingerprint(corpora: list[str], renderer: ChatRenderer, messages_column: str | None, split: str) -> str:
    """A name for some tokenised chats: it changes when a file, the tokenizer or the template does.

    Raises:
        ValueError: A corpus on disk is not there.
    """
    parts: list[object] = [FORMAT_VERSION, _RENDERING_VERSION, tokenizer_digest(renderer.tokenizer)]
    parts += [renderer.chat_template, renderer.arguments, messages_column, split]
    for corpus in corpora:
        parts += [corpus, *_traces(corpus)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _traces(corpus: str) -> list[object]:
    if corpus.startswith(HUB_PREFIX):
        return []
    return [chat.key for chat in example_chats()] if corpus == EXAMPLES else file_traces(chat_files(corpus))
