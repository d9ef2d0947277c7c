"""What a policy sees of attention: new queries, and probabilities, a tile at a time, wherever the keys lie."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from kvtrain.kernels.attention_scores import AttentionTile
from kvtrain.kernels.dispatch import at_least_float32
from kvtrain.kernels.rope import apply_rotary


class NewQueries(NamedTuple):
    """Queries of new tokens, behind each other in their rows.

    Attributes:
        rotated: ``(B, H, n, D)``.
        angles: Cosines and sines ``(B, n, D)`` by which they were rotated.
        positions: ``(B, n)`` in their rows, -1 for padding.
        scaling: What a product of a query and a key is multiplied with.
    """

    rotated: Tensor
    angles: tuple[Tensor, Tensor]
    positions: Tensor
    scaling: float

    def before_rotation(self) -> Tensor:
        """``(B, H, n, D)`` in at least float32; some hosts' angles scale, too, which is undone likewise."""
        cos, sin = self.angles
        squared = (cos.square() + sin.square()).unsqueeze(1)
        return apply_rotary(at_least_float32(self.rotated), cos, -sin) / squared


class Observation:
    """Probabilities of new queries over some slots, and these slots' fields.

    N blocks of S slots, each block of one key-value head; c of the queries; G of them share a key-value head.

    Args:
        tile: The probabilities.
        fields: What is kept beside the slots, by name.
        num_visible: ``(B, H_kv, n)`` slots and new tokens that each query attends.
    """

    def __init__(self, tile: AttentionTile, fields: Mapping[str, Tensor], num_visible: Tensor) -> None:
        self._tile, self._fields, self._num_visible = tile, fields, num_visible

    @property
    def weights(self) -> Tensor:
        """``(N, G, c, S)``, 0 where a query does not see a slot."""
        return self._tile.weights

    @property
    def positions(self) -> Tensor:
        """Of the queries in their row, ``(N, c)``; -1 for padding."""
        return self._tile.positions

    @property
    def num_visible(self) -> Tensor:
        """How many keys each query attends, in these blocks and in all others, ``(N, c)``."""
        return self._num_visible.flatten(0, 1)[self._tile.owner][:, self._tile.queries]

    def column_sums(self) -> Tensor:
        """What all queries give to each slot, ``(N, S)``."""
        return self._tile.column_sums()

    def add(self, field: str, values: Tensor) -> None:
        """Add ``values (N, S)`` to a field."""
        self._tile.add(self._fields[field], values.to(self._fields[field].dtype))

    def put(self, field: str, values: Tensor, where: Tensor | None = None) -> None:
        """Write ``values (N, S)`` into a field, everywhere or ``where`` broadcasts to ``(N, S)``."""
        self._tile.put(self._fields[field], values, where)

    def maximum(self, field: str, values: Tensor) -> None:
        """Let a field have the larger one of what it has and ``values (N, S)``."""
        self._tile.maximum(self._fields[field], values)
