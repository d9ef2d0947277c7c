"""Fixed-length rows over token shards: every row full, no document ever seen from another.

A row is a run of ``sequence_length`` tokens of one shard. Inside it positions restart and document ids
change at every document start, so that nothing attends or merges across; the last row of a shard is
padded. Padding has document id 0 and no target.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvtrain.data.shards import TokenShards

Batch = dict[str, Tensor]
IGNORE_INDEX = -100


class PackedRows:
    """Random access to the rows of a shard folder.

    Args:
        shards: Open shard folder.
        sequence_length: Tokens in a row, at least 2.

    Raises:
        ValueError: ``sequence_length`` is below 2.
    """

    def __init__(self, shards: TokenShards, sequence_length: int) -> None:
        if sequence_length < 2:
            raise ValueError(f"sequence_length must be at least 2, not {sequence_length}")
        self.shards, self.sequence_length = shards, sequence_length
        rows = [-(-tokens.size // sequence_length) for tokens in shards.tokens]
        self._first_rows = np.cumsum([0, *rows])
        self.num_targets = np.concatenate([self._count_targets(shard) for shard in range(len(rows))])

    def __len__(self) -> int:
        return int(self._first_rows[-1])

    @property
    def fingerprint(self) -> str:
        """A name for what the rows hold."""
        return self.shards.manifest.fingerprint

    def _count_targets(self, shard: int) -> npt.NDArray[np.int64]:
        """Targets of each row: its tokens less the first of every document piece in it."""
        length = self.sequence_length
        size, starts = self.shards.tokens[shard].size, np.asarray(self.shards.starts[shard])
        num_rows = -(-size // length)
        tokens = np.full(num_rows, length)
        tokens[-1] = size - (num_rows - 1) * length
        inner = starts[starts % length != 0]
        return tokens - 1 - np.bincount(inner // length, minlength=num_rows)

    def batch(self, rows: npt.NDArray[np.int64]) -> Batch:
        """Read rows, possibly none.

        Args:
            rows: Row numbers ``(B,)``.

        Returns:
            ``input_ids``, ``position_ids``, ``document_ids`` and ``labels``, each ``(B, T)``, and ``row_ids (B,)``.
        """
        columns = np.empty((4, len(rows), self.sequence_length), dtype=np.int64)
        for place, row in enumerate(rows):
            columns[:, place] = self._row(int(row))
        names = ("input_ids", "position_ids", "document_ids", "labels")
        batch = dict(zip(names, torch.from_numpy(columns), strict=True))
        batch["row_ids"] = torch.from_numpy(np.asarray(rows, dtype=np.int64))
        return batch

    def padding(self) -> Batch:
        """A batch of one row of padding, for a rank whose share of the last batch is empty."""
        batch = self.batch(np.zeros(1, dtype=np.int64))
        batch["document_ids"].zero_()
        batch["labels"].fill_(IGNORE_INDEX)
        return batch

    def _row(self, row: int) -> tuple[npt.NDArray[np.int64], ...]:
        shard = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        length = self.sequence_length
        begin = (row - int(self._first_rows[shard])) * length
        piece = np.asarray(self.shards.tokens[shard][begin : begin + length], dtype=np.int64)
        starts = self.shards.starts[shard]
        inside = np.asarray(starts[np.searchsorted(starts, begin + 1) : np.searchsorted(starts, begin + len(piece))])
        is_start = np.zeros(length, dtype=bool)
        is_start[0] = True
        is_start[inside - begin] = True
        index = np.arange(length)
        positions = index - np.maximum.accumulate(np.where(is_start, index, 0))
        documents = np.cumsum(is_start)
        ids = np.zeros(length, dtype=np.int64)
        ids[: len(piece)] = piece
        labels = np.where(is_start, IGNORE_INDEX, ids)
        padding = index >= len(piece)
        positions[padding], documents[padding], labels[padding] = 0, 0, IGNORE_INDEX
        return ids, positions, documents, labels
