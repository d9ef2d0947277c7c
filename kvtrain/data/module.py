"""The Lightning data module: corpora to packed batches."""

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from kvtrain.data.loader import PackedLoader
from kvtrain.data.packing import PackedRows
from kvtrain.data.prepare import corpus_fingerprint, prepare_once, tokenizer_digest
from kvtrain.data.shards import MANIFEST, TokenShards
from kvtrain.data.tokenizer import load_tokenizer
from kvtrain.errors import require_at_least, require_seed


def default_cache() -> Path:
    """Where tokenised corpora are kept: ``$KVTRAIN_CACHE`` or ``~/.cache/kvtrain``."""
    return Path(os.environ.get("KVTRAIN_CACHE", "~/.cache/kvtrain")).expanduser()


def check_rows(batch_size: int, validation_rows: int | None, sequence_length: int, seed: int) -> None:
    """Refuse numbers of which no packed rows can be made.

    Raises:
        ValueError: One is out of range.
    """
    require_at_least(1, "batch_size", batch_size)
    require_at_least(1, "validation_rows", validation_rows)
    require_at_least(2, "sequence_length", sequence_length)
    require_seed("data.seed", seed)


class DataModule(pl.LightningDataModule):
    """What every source of batches has.

    Attributes:
        batch_size: Rows per batch and device.
        sequence_length: Tokens of the longest row.
        tokenizer_name: Of the tokenizer that an export takes along; None where there is none.
        strict_resume: Whether a run refuses to go on with other data than it was trained on.
    """

    batch_size: int
    sequence_length: int
    tokenizer_name: str | None
    strict_resume: bool

    @property
    def chat_template(self) -> str | None:
        """What an export's tokenizer writes chats by; None leaves the tokenizer's own."""
        return None

    @property
    def stop_token_id(self) -> int | None:
        """The token that ends what is learned, and that an export ends at too; None where no text has one."""
        return None

    @property
    def length_multiple(self) -> int:
        """A number that divides every row's tokens: all of them, unless rows differ."""
        return self.sequence_length

    def highest_id(self) -> int | None:
        """The highest token id that rows may hold, as far as can be said without reading them; None: not at all."""
        return None

    def setup(self, stage: str) -> None:
        """Complain about the rows before a model is built for them.

        Raises:
            ValueError: They do not fill a step, or an epoch ends before its first validation.
        """
        if stage == "fit":
            self._check_interval(len(self.train_dataloader()))
        self.val_dataloader()

    def _check_interval(self, batches: int) -> None:
        trainer = self.trainer
        assert trainer is not None
        every, within_epochs = trainer.val_check_interval, trainer.check_val_every_n_epoch is not None
        if within_epochs and trainer.limit_val_batches and isinstance(every, int) and every > batches:
            raise ValueError(
                f"trainer.val_check_interval is {every} and an epoch has {batches} batches; lower it, or set "
                "trainer.check_val_every_n_epoch to null to count over epochs"
            )

    @property
    def training_shard(self) -> dict[str, Any]:
        """What a training loader must know: its window, this rank, how many there are, and what a resume may change."""
        trainer = self.trainer
        assert trainer is not None
        window = trainer.accumulate_grad_batches
        return {"window": window, "strict_resume": self.strict_resume, **self.validation_shard}

    @property
    def validation_shard(self) -> dict[str, Any]:
        """What a loader of held-out rows must know; without a trainer there is one rank."""
        return data_place(self.trainer)


def data_place(trainer: pl.Trainer | None) -> dict[str, Any]:
    """Whose rows a rank reads, as ``rank`` among ``world_size``: strategies say which ranks read the same."""
    if trainer is None:
        return {"rank": 0, "world_size": 1}
    place = trainer.distributed_sampler_kwargs or {"rank": trainer.global_rank, "num_replicas": trainer.world_size}
    return {"rank": place["rank"], "world_size": place["num_replicas"]}


def _as_list(name: str, corpora: str | list[str]) -> list[str]:
    corpora = [corpora] if isinstance(corpora, str) else corpora
    if not all(corpora) or not corpora:
        raise ValueError(f"{name} is empty; name a corpus")
    return corpora


class PackedDataModule(DataModule):
    """Packed rows for training and validation.

    Args:
        tokenizer: Folder, Hub id or ``kvtrain:tiny``; None, with prepared folders alone, trusts that they fit.
        corpus: Training text: a corpus or a list of them (``kvtrain.data.corpus``), or one folder that
            ``kvtrain prepare`` wrote.
        validation_corpus: Held-out text, likewise.
        sequence_length: Tokens in a row.
        batch_size: Rows per batch and device.
        validation_rows: Rows of the held-out text that validation reads; None reads all.
        text_column: Field that holds the text of jsonl, parquet and Hub rows.
        seed: Of the shuffle.
        cache_dir: Where tokenised corpora are kept; None is ``$KVTRAIN_CACHE`` or ``~/.cache/kvtrain``.
        strict_resume: Refuse to resume where corpus, number of rows, sequence length or seed are not the checkpoint's;
            ``false`` goes on at the same place in the new order, with a warning.

    Raises:
        ValueError: A size is not positive, there is no corpus or it cannot be read, or a prepared folder belongs to
            another tokenizer.
    """

    def __init__(
        self,
        tokenizer: str | None = "kvtrain:tiny",
        corpus: str | list[str] = "stdlib",
        validation_corpus: str | list[str] = "heldout",
        sequence_length: int = 1024,
        batch_size: int = 8,
        validation_rows: int | None = None,
        text_column: str = "text",
        seed: int = 0,
        cache_dir: str | None = None,
        strict_resume: bool = True,
    ) -> None:
        super().__init__()
        check_rows(batch_size, validation_rows, sequence_length, seed)
        self.tokenizer_name = tokenizer
        self.corpora = _as_list("corpus", corpus)
        self.validation_corpora = _as_list("validation_corpus", validation_corpus)
        self.sequence_length, self.batch_size, self.seed = sequence_length, batch_size, seed
        self.validation_rows, self.text_column, self.strict_resume = validation_rows, text_column, strict_resume
        self.cache_dir = Path(cache_dir) if cache_dir else default_cache()
        self._rows: dict[str, PackedRows] = {}

    def highest_id(self) -> int | None:
        """See ``DataModule``; ids that were added to a tokenizer may never be used, and are left out."""
        return load_tokenizer(self.tokenizer_name).vocab_size - 1 if self.tokenizer_name else None

    def prepare_data(self) -> None:
        """Tokenise what is not tokenised yet; Lightning calls it once a node."""
        for corpora in (self.corpora, self.validation_corpora):
            self._shard_folder(corpora)

    def train_dataloader(self) -> PackedLoader:
        """Shuffled batches with ``num_items``."""
        return PackedLoader(self.rows(self.corpora), self.batch_size, seed=self.seed, **self.training_shard)

    def val_dataloader(self) -> PackedLoader:
        """Held-out rows in order."""
        rows = self.rows(self.validation_corpora)
        return PackedLoader(rows, self.batch_size, seed=None, limit=self.validation_rows, **self.validation_shard)

    def rows(self, corpora: list[str]) -> PackedRows:
        """Packed rows of some corpora, tokenised first if need be."""
        key = "\n".join(corpora)
        if key not in self._rows:
            shards = TokenShards(self._shard_folder(corpora))
            if shards.targets:
                raise ValueError(
                    f"{shards.folder}: a folder of chats; train on it with data.class_path: ChatDataModule"
                )
            self._check_tokenizer(shards)
            self._rows[key] = PackedRows(shards, self.sequence_length)
        return self._rows[key]

    def _shard_folder(self, corpora: list[str]) -> Path:
        if len(corpora) == 1 and (Path(corpora[0]) / MANIFEST).is_file():
            return Path(corpora[0])
        if self.tokenizer_name is None:
            raise ValueError(f"{', '.join(corpora)}: text needs a tokenizer; set one, or give a prepared folder")
        tokenizer = load_tokenizer(self.tokenizer_name)
        folder = self.cache_dir / corpus_fingerprint(corpora, tokenizer, self.text_column, "train")
        prepare_once(corpora, tokenizer, folder, text_column=self.text_column)
        return folder

    def _check_tokenizer(self, shards: TokenShards) -> None:
        """Tokens of another vocabulary are numbers without meaning; refuse them where both sides are known."""
        written_by = shards.manifest.tokenizer_sha256
        if self.tokenizer_name is None or not written_by:
            return
        if written_by != tokenizer_digest(load_tokenizer(self.tokenizer_name)):
            raise ValueError(
                f"{shards.folder}: written with another tokenizer than {self.tokenizer_name!r}; "
                "name the one that prepared it, or prepare the corpus again"
            )
