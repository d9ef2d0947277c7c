"""Which tokens belong together, and what kernels derive from that: once an object, whatever the number of layers."""

import functools
import itertools

from torch import Tensor

from kvtrain.kernels.memo import Memo


class Documents(Memo):
    """Document ids of queries and keys: a query sees keys of its own document alone.

    Make one for a forward pass and hand it to all layers. What kernels derive from the ids is made for the first layer
    that asks, and found there by the others, by the backward pass, and by what activation checkpointing computes again.

    Args:
        queries: ``(B, T_q)`` integer ids.
        keys: ``(B, T_k)``; None where queries and keys are the same tokens, which some kernels need to know.
    """

    def __init__(self, queries: Tensor, keys: Tensor | None = None) -> None:
        self.queries = queries
        self.keys = queries if keys is None else keys

    @classmethod
    def of(cls, ids: Tensor | None) -> "Documents | None":
        """Those of tokens with these ids ``(B, T)``; None, where every row is one document, stays None."""
        return None if ids is None else cls(ids)

    @property
    def same_tokens(self) -> bool:
        """Whether queries and keys are the same tokens."""
        return self.keys is self.queries

    def part(self, first_query: int, num_keys: int) -> "Documents":
        """Documents of the queries from one on and of the first keys; the same object each time."""
        name = ("part", first_query, num_keys)
        return self.keep(name, lambda: Documents(self.queries[:, first_query:], self.keys[:, :num_keys]))

    @functools.cached_property
    def runs(self) -> list[list[slice]] | None:
        """Tokens of each document, row by row, where queries and keys are the same tokens.

        None where a document that was left comes again: then no slice of a row holds it alone. On tensors without
        values no border is found, and every row is one document.
        """
        ids = self.queries
        borders = (ids[:, 1:] != ids[:, :-1]).nonzero()  # (n, 2): a row, and the last token before a border
        edges: list[list[int]] = [[0] for _ in ids]
        if len(borders):
            rows, lasts = borders.unbind(1)
            entered = list(zip(rows.tolist(), ids[rows, lasts + 1].tolist(), strict=True))
            entered += enumerate(ids[:, 0].tolist())
            if len(set(entered)) < len(entered):
                return None
            for row, last in borders.tolist():
                edges[row].append(last + 1)
        return [[slice(*run) for run in itertools.pairwise([*starts, ids.shape[1]])] for starts in edges]
