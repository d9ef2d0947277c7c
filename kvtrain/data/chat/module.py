"""The Lightning data module of chats: rows of whole chats, with the loss on the assistant's tokens."""

import logging
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

from kvtrain.data.chat.packing import ChatRows, Selection, TooLong
from kvtrain.data.chat.picture import SAMPLES_PAGE
from kvtrain.data.chat.prepare import ChatRecord, chats_fingerprint, prepare_chats
from kvtrain.data.chat.rendering import ChatRenderer, RenderingCounts
from kvtrain.data.chat.template import read_template
from kvtrain.data.loader import PackedLoader
from kvtrain.data.module import DataModule, check_rows, default_cache
from kvtrain.data.prepare import tokenizer_digest, write_once
from kvtrain.data.shards import MANIFEST, TokenShards
from kvtrain.data.tokenizer import load_tokenizer
from kvtrain.errors import UsageError

logger = logging.getLogger("kvtrain")


class ChatDataModule(DataModule):
    """Packed rows of chats; only what the assistant says is learned, its stop tokens included.

    Rows hold whole chats, which do not see each other. How turns are found, and what becomes of templates that rewrite
    earlier turns, ``kvtrain.data.chat.rendering`` says.

    Args:
        tokenizer: Folder, Hub id or ``kvtrain:tiny``.
        chats: A file, folder or Hub dataset of chats or a list of them (``kvtrain.data.chat.corpus``), ``examples``, or
            one folder that ``kvtrain prepare --chats`` wrote.
        validation_chats: Held-out chats, likewise; None holds a share of ``chats`` out.
        validation_share: Share of the chats that is held out where ``validation_chats`` is None. Which ones depends on
            what is said alone, so that no chat is on both sides, in whatever order they come.
        chat_template: Template, or its file; None takes the tokenizer's own. Exports take it along.
        template_arguments: What the template is given besides, such as ``{enable_thinking: false}``.
        messages_column: Field that holds the messages; None looks for ``messages``, ``conversations``, or ``prompt``
            with ``completion``.
        sequence_length: Tokens in a row.
        batch_size: Rows per batch and device.
        too_long: What becomes of a chat longer than a row: ``cut`` learns its first tokens, and leaves it out where no
            answer begins in them; ``drop`` leaves it out.
        validation_rows: Rows of the held-out chats that validation reads; None reads all.
        seed: Of the shuffle.
        cache_dir: Where tokenised chats are kept; None is ``$KVTRAIN_CACHE`` or ``~/.cache/kvtrain``.
        strict_resume: Refuse to resume where the chats, rows, sequence length or seed are not the checkpoint's.

    Raises:
        ValueError: A value is out of range, or there is no such template.
    """

    tokenizer_name: str

    def __init__(
        self,
        tokenizer: str,
        chats: str | list[str],
        validation_chats: str | list[str] | None = None,
        validation_share: float = 0.05,
        chat_template: str | None = None,
        template_arguments: dict[str, Any] | None = None,
        messages_column: str | None = None,
        sequence_length: int = 1024,
        batch_size: int = 8,
        too_long: TooLong = "cut",
        validation_rows: int | None = None,
        seed: int = 0,
        cache_dir: str | None = None,
        strict_resume: bool = True,
    ) -> None:
        super().__init__()
        check_rows(batch_size, validation_rows, sequence_length, seed)
        if not 0.0 < validation_share < 1.0:
            raise ValueError(f"validation_share is a share, above 0 and below 1, not {validation_share}")
        if too_long not in get_args(TooLong):
            raise ValueError(f"too_long must be {' or '.join(get_args(TooLong))}, not {too_long!r}")
        self.tokenizer_name, self.chats = tokenizer, _corpora("chats", chats)
        self.validation_chats = None if validation_chats is None else _corpora("validation_chats", validation_chats)
        self.validation_share, self.messages_column = validation_share, messages_column
        self.template = read_template(chat_template) if chat_template else None
        self.template_arguments = dict(template_arguments or {})
        self.sequence_length, self.batch_size, self.seed = sequence_length, batch_size, seed
        self.too_long, self.validation_rows, self.strict_resume = too_long, validation_rows, strict_resume
        self.cache_dir = Path(cache_dir) if cache_dir else default_cache()
        self._rows: dict[str, ChatRows] = {}

    @cached_property
    def renderer(self) -> ChatRenderer:
        """Tokenizer and template."""
        return ChatRenderer(load_tokenizer(self.tokenizer_name), self.template, self.template_arguments)

    @property
    def chat_template(self) -> str | None:
        """See ``DataModule``."""
        return self.template

    @cached_property
    def stop_token_id(self) -> int | None:
        """See ``DataModule``; it ends an answer."""
        return self.renderer.stop_token_id()

    def highest_id(self) -> int | None:
        """See ``DataModule``; tokens that were added to a tokenizer for its template are used."""
        tokenizer, template = self.renderer.tokenizer, str(self.renderer.chat_template)
        added = (number for number, token in tokenizer.added_tokens_decoder.items() if token.content in template)
        return max(tokenizer.vocab_size - 1, *added, 0)

    def prepare_data(self) -> None:
        """Tokenise what is not tokenised yet; Lightning calls it once a node."""
        for corpora in (self.chats, self.validation_chats):
            if corpora is not None:
                self._shard_folder(corpora)

    def train_dataloader(self) -> PackedLoader:
        """Shuffled batches with ``num_items``."""
        selection = Selection() if self.validation_chats else Selection("training", self.validation_share)
        return PackedLoader(self.rows(self.chats, selection), self.batch_size, seed=self.seed, **self.training_shard)

    def val_dataloader(self) -> PackedLoader:
        """Held-out rows in order."""
        if self.validation_chats:
            rows = self.rows(self.validation_chats, Selection())
        else:
            rows = self.rows(self.chats, Selection("held out", self.validation_share))
        return PackedLoader(rows, self.batch_size, seed=None, limit=self.validation_rows, **self.validation_shard)

    def rows(self, corpora: list[str], selection: Selection) -> ChatRows:
        """Packed rows of some chats, tokenised first if need be; what did not fit is said once."""
        key = "\n".join([*corpora, selection.part])
        if key not in self._rows:
            shards = TokenShards(self._shard_folder(corpora))
            rows = self._rows[key] = ChatRows(shards, self.sequence_length, self.too_long, selection)
            if rows.fit.cut or rows.fit.dropped:
                logger.warning(
                    "%s: of %d texts %d are longer than %d tokens and cut, %d are left out (too_long: %s)",
                    f"{', '.join(corpora)} ({selection.part})",
                    rows.fit.texts,
                    rows.fit.cut,
                    self.sequence_length,
                    rows.fit.dropped,
                    self.too_long,
                )
        return self._rows[key]

    def _shard_folder(self, corpora: list[str]) -> Path:
        if len(corpora) == 1 and (Path(corpora[0]) / MANIFEST).is_file():
            self._check_folder(Path(corpora[0]))
            return Path(corpora[0])
        name = chats_fingerprint(corpora, self.renderer, self.messages_column, "train")
        folder = self.cache_dir / f"chats-{name}"
        write_once(folder, lambda: self._prepare(corpora, folder))
        return folder

    def _prepare(self, corpora: list[str], folder: Path) -> None:
        self.renderer.counts = RenderingCounts()
        manifest = prepare_chats(corpora, self.renderer, folder, messages_column=self.messages_column)
        summary = ChatRecord.read(folder).summary(manifest)
        logger.info("%s: %s; three of them are shown in %s", ", ".join(corpora), summary, folder / SAMPLES_PAGE)

    def _check_folder(self, folder: Path) -> None:
        """Refuse chats that were written with another tokenizer or another template."""
        record, renderer = ChatRecord.read(folder), self.renderer
        if TokenShards(folder).manifest.tokenizer_sha256 != tokenizer_digest(renderer.tokenizer):
            raise ValueError(
                f"{folder}: written with another tokenizer than {self.tokenizer_name!r}; "
                "name the one that prepared it, or prepare the chats again"
            )
        if (record.template, record.arguments) != (renderer.chat_template, renderer.arguments):
            raise ValueError(
                f"{folder}: written with another chat template; give what it was prepared with as chat_template and "
                "template_arguments, or prepare the chats again"
            )


def _corpora(name: str, given: str | list[str]) -> list[str]:
    corpora = [given] if isinstance(given, str) else given
    if not corpora or not all(corpora):
        raise UsageError(f"{name} is empty; name a file, a folder, hf:org/name, or examples")
    return corpora
