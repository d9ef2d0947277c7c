"""Hidden states of stacks that run their layers by a plan of their own, where transformers' hooks would miscount."""

from collections import UserDict
from collections.abc import Sequence

from torch import Tensor

Selection = bool | int | Sequence[int]


class RecordedStates(UserDict[int, Tensor]):
    """What enters each layer, ``(B, T, hidden)`` by the layer's number. No plain ``dict``, of which FSDP2 makes copies.

    Args:
        selection: As ``output_hidden_states``: all of them, or numbers; negative ones count from the end.
        known: Numbers of those that have a single value, the last norm's output (``depth``) besides.
        depth: Layers.

    Raises:
        ValueError: A state was asked for by number that has no single value.
    """

    def __init__(self, selection: Selection, known: Sequence[int], depth: int) -> None:
        super().__init__()
        self.depth = depth
        numbers = [selection] if type(selection) is int else selection
        if isinstance(numbers, Sequence):
            self.wanted = {number % (depth + 1) for number in numbers if -depth - 1 <= number <= depth}
            if unknown := sorted(self.wanted - {*known, depth}):
                raise ValueError(
                    f"hidden state {unknown[0]} lies between layers that iterate, and has no single value; ask for "
                    f"some of {', '.join(map(str, (*known, depth)))}"
                )
        else:
            self.wanted = {*known, depth}

    def tuple_with(self, last: Tensor) -> tuple[Tensor | None, ...]:
        """All states in order, None for those that are not wanted or have no single value; ``last`` is the last one."""
        states = [*(self.get(number) for number in range(self.depth)), last]
        return tuple(state if number in self.wanted else None for number, state in enumerate(states))
