"""Context parallelism: ranks hold parts of the same rows, and attend to whole ones.

Every rank of a group holds a run of each row's tokens, and what looks at tokens one by one, norms, projections,
feed-forward parts and losses, needs no more. Around attention ranks trade: each gives up its tokens for all heads but
its own, and gets all tokens for those. So what happens between tokens, windows, documents, pooling, happens within a
rank, on whole rows. This file is what layers know of it; ``ulysses.py`` does it.
"""

from torch import Tensor


class ContextParallel:
    """What one process that has whole rows must do: nothing. Those that share rows override all of it.

    Shapes are those of N ranks, T tokens a row and H heads, of queries, keys or values.

    Attributes:
        size: N, ranks that share rows.
    """

    size = 1

    def own_tokens(self, whole: Tensor) -> Tensor:
        """This rank's part ``(B, T / N, ...)`` of what all ranks have whole, ``(B, T, ...)``.

        Raises:
            ValueError: The ranks do not divide the tokens.
        """
        return whole

    def own_heads(self, num_heads: int) -> slice:
        """Which of so many heads this rank attends."""
        return slice(num_heads)

    def to_heads(self, *tokens: Tensor) -> tuple[Tensor, ...]:
        """From own tokens of all heads, ``(B, H, T / N, D)``, to all tokens of own heads, ``(B, H / N, T, D)``."""
        return tokens

    def to_tokens(self, heads: Tensor) -> Tensor:
        """Back from ``(B, H / N, T, D)`` to ``(B, H, T / N, D)``."""
        return heads

    def all_heads(self, own: Tensor) -> Tensor:
        """What all ranks have of their own heads, ``(B, H / N, ...)``, together, ``(B, H, ...)``."""
        return own


WHOLE_ROWS = ContextParallel()
