"""Masked language modelling over packed rows: some tokens are hidden, and are to be named where they stand.

As BERT and RoBERTa do it: 15 % of the tokens are targets, drawn anew every epoch; of these 80 % become the mask token,
10 % a random one, and 10 % stay. First tokens of documents and of rows, special tokens and padding are no targets.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kvtrain.data.loader import PackedLoader
from kvtrain.data.module import PackedDataModule
from kvtrain.data.packing import IGNORE_INDEX, Batch, PackedRows
from kvtrain.data.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_TRAINING, _HELD_OUT = 0, 1  # streams
_UNKNOWN = -1
_READ = 64  # rows at once


@dataclass(frozen=True)
class Masking:
    """What becomes of a row's tokens.

    Args:
        mask_token_id: What hides a target.
        special_ids: Ids that are never targets and never put in the place of one.
        vocab_size: Random tokens are below it.
        mask_probability: Share of a row's ordinary tokens that are targets: the nearest whole number, at least one.
        mask_share: Share of the targets that are hidden.
        random_share: Share of the targets that another token replaces; the rest stays as it is.
    """

    mask_token_id: int
    special_ids: frozenset[int]
    vocab_size: int
    mask_probability: float = 0.15
    mask_share: float = 0.8
    random_share: float = 0.1

    @cached_property
    def _special(self) -> npt.NDArray[np.int64]:
        return np.asarray(sorted({*self.special_ids, self.mask_token_id}), dtype=np.int64)

    @cached_property
    def _ordinary(self) -> npt.NDArray[np.int64]:
        return np.setdiff1d(np.arange(self.vocab_size), self._special)

    def maskable(self, batch: Batch) -> npt.NDArray[np.bool_]:
        """Which tokens of an unmasked batch may be targets, ``(B, T)``."""
        special = np.isin(batch["input_ids"].numpy(), self._special)
        unasked: npt.NDArray[np.bool_] = batch["labels"].numpy() == IGNORE_INDEX
        return ~(special | unasked)

    def num_targets(self, maskable: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Targets of rows with so many maskable tokens: nothing is drawn, so that other rows' are known unread."""
        share: npt.NDArray[np.int64] = np.rint(self.mask_probability * maskable).astype(np.int64)
        return np.clip(share, np.minimum(maskable, 1), maskable)

    def apply(self, batch: Batch, seed: int, place: tuple[int, ...]) -> None:
        """Mask a batch in place; its labels become the original ids at the targets, unshifted.

        Args:
            batch: As ``PackedRows`` gives it.
            seed: Of the masks.
            place: With the row's id, what a row's mask depends on beside the seed.
        """
        maskable, labels = self.maskable(batch), batch["labels"].numpy()
        labels.fill(IGNORE_INDEX)
        for row, ids, row_labels, allowed in zip(
            batch["row_ids"].tolist(), batch["input_ids"].numpy(), labels, maskable, strict=True
        ):
            rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(*place, row)))
            candidates = np.flatnonzero(allowed)
            targets = rng.choice(candidates, int(self.num_targets(np.asarray(candidates.size))), replace=False)
            row_labels[targets] = ids[targets]
            ids[targets] = self._replaced(ids[targets], rng)

    def _replaced(self, ids: npt.NDArray[np.int64], rng: np.random.Generator) -> npt.NDArray[np.int64]:
        """What stands in the place of targets."""
        fate = rng.random(ids.size)
        strangers = rng.choice(self._ordinary, ids.size)
        seen = np.where(fate < self.mask_share + self.random_share, strangers, ids)
        return np.where(fate < self.mask_share, self.mask_token_id, seen)


class MaskedDataModule(PackedDataModule):
    """Packed rows with masked tokens.

    A row's mask depends on the seed, the epoch and the row alone; that of a held-out row never changes.

    Args:
        tokenizer: Folder, Hub id or ``kvtrain:tiny``.
        corpus: Training text, as for ``PackedDataModule``.
        validation_corpus: Held-out text, likewise.
        mask_token_id: What hides a target; None takes the tokenizer's mask token. ``kvtrain:tiny`` has none: take 1
            there, its padding token, which packed rows never hold.
        mask_probability: Share of the tokens that are targets.
        mask_share: Share of the targets that the mask token replaces.
        random_share: Share of the targets that a random token replaces; the rest stays as it is.
        **packed: See ``PackedDataModule``.

    Raises:
        ValueError: A value is out of range.
    """

    def __init__(
        self,
        tokenizer: str = "kvtrain:tiny",
        corpus: str | list[str] = "stdlib",
        validation_corpus: str | list[str] = "heldout",
        mask_token_id: int | None = None,
        mask_probability: float = 0.15,
        mask_share: float = 0.8,
        random_share: float = 0.1,
        **packed: Any,
    ) -> None:
        super().__init__(tokenizer, corpus, validation_corpus, **packed)
        if not 0.0 < mask_probability <= 1.0:
            raise ValueError(f"mask_probability must be above 0 and at most 1, not {mask_probability}")
        if min(mask_share, random_share) < 0.0 or mask_share + random_share > 1.0:
            raise ValueError(
                "mask_share and random_share are shares of the targets and together at most 1, "
                f"not {mask_share} and {random_share}"
            )
        if mask_token_id is not None and mask_token_id < 0:
            raise ValueError(f"mask_token_id must not be negative, not {mask_token_id}")
        self.mask_token_id, self.mask_probability = mask_token_id, mask_probability
        self.mask_share, self.random_share = mask_share, random_share

    @cached_property
    def masking(self) -> Masking:
        """The masks' settings with the tokenizer's part in them.

        Raises:
            ValueError: There is no tokenizer, it has no mask token and none is set, or the one set begins or ends
                documents.
        """
        if self.tokenizer_name is None:
            raise ValueError("masking must know the special tokens; set tokenizer, also with prepared folders")
        tokenizer = load_tokenizer(self.tokenizer_name)
        added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        return Masking(
            mask_token_id=_mask_token(self.mask_token_id, tokenizer, self.tokenizer_name),
            special_ids=frozenset({*added, *tokenizer.all_special_ids}),
            vocab_size=len(tokenizer),
            mask_probability=self.mask_probability,
            mask_share=self.mask_share,
            random_share=self.random_share,
        )

    def highest_id(self) -> int | None:
        """See ``DataModule``; the mask token is one of the ids."""
        return max(super().highest_id() or 0, self.masking.mask_token_id)

    def prepare_data(self) -> None:
        """Complain about the mask token before anything is tokenised."""
        _ = self.masking
        super().prepare_data()

    def train_dataloader(self) -> "MaskedLoader":
        """Shuffled batches with ``num_items``."""
        rows = self.rows(self.corpora)
        return MaskedLoader(rows, self.batch_size, masking=self.masking, seed=self.seed, **self.training_shard)

    def val_dataloader(self) -> "MaskedLoader":
        """Held-out rows in order, with the same masks every time."""
        return MaskedLoader(
            self.rows(self.validation_corpora),
            self.batch_size,
            masking=self.masking,
            seed=None,
            limit=self.validation_rows,
            **self.validation_shard,
        )


class MaskedLoader(PackedLoader):
    """``PackedLoader``'s batches, masked; ``num_items`` counts masked targets.

    Args:
        rows: Rows to serve.
        batch_size: Rows per batch and rank.
        masking: What becomes of their tokens.
        **place: See ``PackedLoader``.

    Raises:
        ValueError: The rows do not fill one optimizer window.
    """

    def __init__(self, rows: PackedRows, batch_size: int, *, masking: Masking, **place: Any) -> None:
        super().__init__(rows, batch_size, **place)
        self.masking = masking
        self._maskable = np.full(len(rows), _UNKNOWN, dtype=np.int32)

    def _batch(self, order: npt.NDArray[np.int64], step: int) -> Batch:
        batch = super()._batch(order, step)
        if self.seed is None:
            self.masking.apply(batch, 0, (_HELD_OUT,))
        else:
            self.masking.apply(batch, self.seed, (_TRAINING, self.epoch))
        return batch

    def _num_targets(self, rows: npt.NDArray[np.int64]) -> int:
        """Targets of rows: the same in every epoch, so that each row is read for it once."""
        unread = rows[self._maskable[rows] == _UNKNOWN]
        for start in range(0, len(unread), _READ):
            part = unread[start : start + _READ]
            self._maskable[part] = self.masking.maskable(self.rows.batch(part)).sum(1)
        return int(self.masking.num_targets(self._maskable[rows].astype(np.int64)).sum())


def _mask_token(given: int | None, tokenizer: "PreTrainedTokenizerFast", name: str) -> int:
    """The mask token's id."""
    mask = tokenizer.mask_token_id if given is None else given
    ends = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    if mask is None:
        pad, size = tokenizer.pad_token_id, len(tokenizer)
        spare = f"{pad} ({tokenizer.pad_token}, which packed rows never hold)"
        fresh = f"{size} with a model of vocab_size {size + 1}"
        raise ValueError(
            f"{name!r} has no mask token; set mask_token_id to an id that no text has: "
            f"{fresh if pad is None or pad in ends else spare}"
        )
    if mask in ends:
        raise ValueError(f"mask_token_id {mask} begins or ends documents; take an id that no text has")
    return int(mask)
