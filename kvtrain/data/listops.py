"""ListOps (Nangia & Bowman 2018; Long Range Arena, Tay et al. 2020): nested lists of digits whose value is the class.

``[MAX 4 3 [MIN 2 3 ] 1 0 [MED 1 5 8 9 2 ] ]`` is 5. Expressions are drawn as Long Range Arena's generator draws them:
an argument is an expression of its own with probability 0.25 and a digit otherwise, and what is too short or too long
is drawn again. The vocabulary is fixed, so there is no tokenizer and no file.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from kvtrain.data.loader import EndlessLoader
from kvtrain.data.module import DataModule
from kvtrain.data.packing import IGNORE_INDEX, Batch
from kvtrain.data.resume import Identity
from kvtrain.errors import require_at_least, require_seed


def _median(values: Sequence[int]) -> int:
    """Integer part of the median."""
    ordered, half = sorted(values), len(values) // 2
    return (ordered[half] + ordered[~half]) // 2


def _sum_modulo(values: Sequence[int]) -> int:
    return sum(values) % 10


_OPERATORS: dict[str, Callable[[Sequence[int]], int]] = {
    "[MIN": min,
    "[MAX": max,
    "[MED": _median,
    "[SM": _sum_modulo,
}
_PADDING, _CLOSE = "<pad>", "]"
VOCABULARY = [_PADDING, *map(str, range(10)), *_OPERATORS, _CLOSE]
NUM_CLASSES = 10
_IDS = {token: number for number, token in enumerate(VOCABULARY)}
_OPENERS = [_IDS[name] for name in _OPERATORS]
_DIGITS = [_IDS[str(digit)] for digit in range(10)]
_FUNCTIONS = list(_OPERATORS.values())

_OPERATOR_SHARE = 0.25  # of the arguments
_TRIES = 1000
_MULTIPLE = 16  # batches are padded to one
_TRAINING, _HELD_OUT = 0, 1  # streams

Node = tuple[int, int, int]  # arguments (0: a digit), operator, digit


def encode(text: str) -> list[int]:
    """Ids of an expression, as a trained model reads it.

    Args:
        text: Such as ``"[MAX 4 [MIN 2 3 ] 1 ]"``. ``MEDIAN`` is understood as ``MED``, and the parentheses of Long
            Range Arena's files are left out.

    Raises:
        ValueError: A word is not in the vocabulary.
    """
    spaced = text.replace("MEDIAN", "MED").replace("[", " [").replace("]", " ] ")
    words = spaced.translate(str.maketrans("()", "  ")).split()
    for word in words:
        if word not in _IDS:
            raise ValueError(f"{word!r} is not ListOps; write it with {' '.join(VOCABULARY[1:])}")
    return [_IDS[word] for word in words]


def decode(ids: Iterable[int]) -> str:
    """Text of ids, padding left out.

    Raises:
        ValueError: An id lies outside the vocabulary.
    """
    words = []
    for number in map(int, ids):
        if not 0 <= number < len(VOCABULARY):
            raise ValueError(f"id {number} is not ListOps; ids are from 0 to {len(VOCABULARY) - 1}")
        words.append(VOCABULARY[number])
    return " ".join(word for word in words if word != _PADDING)


def evaluate(ids: Iterable[int]) -> int:
    """Value of an expression, found from its tokens alone.

    Args:
        ids: As from ``encode``; padding is passed over.

    Raises:
        ValueError: It is not exactly one complete expression.
    """
    operators: list[str] = []
    values: list[list[int]] = [[]]
    for word in decode(ids).split():
        if word in _OPERATORS:
            operators.append(word)
            values.append([])
        elif word == _CLOSE:
            if not operators or not values[-1]:
                raise ValueError("a list is closed that was not opened, or is empty; give one complete expression")
            arguments = values.pop()
            values[-1].append(_OPERATORS[operators.pop()](arguments))
        else:
            values[-1].append(int(word))
    if operators or len(values[0]) != 1:
        raise ValueError(
            f"{len(operators)} lists are left open beside {len(values[0])} closed values; give one complete expression"
        )
    return values[0][0]


@dataclass(frozen=True)
class ListOpsTask:
    """Which expressions are drawn; the defaults are Long Range Arena's.

    Args:
        max_depth: Levels of the tree, at least 2; the lowest holds digits alone.
        max_arguments: Arguments of a list at most, at least 2; their number is uniform from 2.
        shortest: Tokens of the shortest expressions, brackets included; at least 4.
        longest: Tokens of the longest.

    Raises:
        ValueError: A value is out of range, or such lengths are hardly ever drawn.
    """

    max_depth: int = 10
    max_arguments: int = 10
    shortest: int = 500
    longest: int = 2000

    def __post_init__(self) -> None:
        for name, least in (("max_depth", 2), ("max_arguments", 2), ("shortest", 4), ("longest", self.shortest)):
            if getattr(self, name) < least:
                remark = " (shortest)" if name == "longest" else ""
                raise ValueError(f"{name} must be at least {least}{remark}, not {getattr(self, name)}")
        nodes = self._nodes(np.random.default_rng(0))
        if all(self._draw(nodes) is None for _ in range(_TRIES)):
            raise ValueError(
                f"of {_TRIES} expressions with max_depth {self.max_depth} and max_arguments {self.max_arguments} none "
                f"has from {self.shortest} to {self.longest} tokens; widen the range, or change depth or arguments"
            )

    def sample(self, rng: np.random.Generator) -> tuple[list[int], int]:
        """Draw an expression.

        Args:
            rng: Decides everything.

        Returns:
            Its ids and its value.
        """
        nodes = self._nodes(rng)
        while (drawn := self._draw(nodes)) is None:
            pass
        return drawn

    def _nodes(self, rng: np.random.Generator) -> Iterator[Node]:
        """Endless independent arguments; a tree takes them in the order of its text."""
        while True:
            sizes = rng.integers(2, self.max_arguments + 1, size=self.longest)
            sizes[rng.random(self.longest) >= _OPERATOR_SHARE] = 0
            operators = rng.integers(len(_OPERATORS), size=self.longest)
            digits = rng.integers(10, size=self.longest)
            yield from zip(sizes.tolist(), operators.tolist(), digits.tolist(), strict=True)

    def _draw(self, nodes: Iterator[Node]) -> tuple[list[int], int] | None:
        """Ids and value of the next tree, which begins at the next list; None where its length is out of range."""
        size, operator, _ = next(node for node in nodes if node[0])
        ids, length = [_OPENERS[operator]], size + 2
        stack: list[tuple[int, int, list[int]]] = [(size, operator, [])]
        while length <= self.longest:
            size, operator, value = next(nodes)
            if size and len(stack) < self.max_depth - 1:
                length += size + 1  # a list in the place of an argument
                ids.append(_OPENERS[operator])
                stack.append((size, operator, []))
                continue
            ids.append(_DIGITS[value])
            while stack:
                size, operator, values = stack[-1]
                values.append(value)
                if len(values) < size:
                    break
                value = _FUNCTIONS[operator](values)
                ids.append(_IDS[_CLOSE])
                stack.pop()
            else:
                return (ids, value) if length >= self.shortest else None
        return None


class ListOpsDataModule(DataModule):
    """ListOps expressions without end for training, and held-out ones.

    A sample depends on the seed, the batch's number and its row alone; the held-out samples are the same for every
    seed, and drawn from a stream that no seed trains on.

    Args:
        max_depth: Levels of the tree, at least 2; the lowest holds digits alone.
        max_arguments: Arguments of a list at most.
        shortest: Tokens of the shortest expressions, brackets included.
        longest: Tokens of the longest.
        batch_size: Rows per batch and device.
        validation_rows: Held-out expressions.
        seed: Of the training samples.
        strict_resume: Refuse to resume with other expressions than the checkpoint's; ``false`` goes on, with a warning.

    Attributes:
        sequence_length: ``longest``.
        vocabulary: Tokens, in the order of their ids.
        num_classes: Values that an expression can have.
        tokenizer_name: None: ``encode`` and ``decode`` take a tokenizer's place.

    Raises:
        ValueError: A value is out of range.
    """

    tokenizer_name = None
    vocabulary = VOCABULARY
    num_classes = NUM_CLASSES

    def __init__(
        self,
        max_depth: int = 10,
        max_arguments: int = 10,
        shortest: int = 500,
        longest: int = 2000,
        batch_size: int = 32,
        validation_rows: int = 512,
        seed: int = 0,
        strict_resume: bool = True,
    ) -> None:
        super().__init__()
        require_at_least(1, "batch_size", batch_size)
        require_at_least(1, "validation_rows", validation_rows)
        require_seed("data.seed", seed)
        self.task = ListOpsTask(max_depth, max_arguments, shortest, longest)
        self.sequence_length, self.batch_size = longest, batch_size
        self.validation_rows, self.seed, self.strict_resume = validation_rows, seed, strict_resume

    @property
    def length_multiple(self) -> int:
        """See ``DataModule``; batches are as long as their longest row."""
        return _MULTIPLE

    def highest_id(self) -> int | None:
        """See ``DataModule``."""
        return len(VOCABULARY) - 1

    def train_dataloader(self) -> "ListOpsLoader":
        """Batches without end, with ``num_items``."""
        return ListOpsLoader(self.task, self.batch_size, seed=self.seed, **self.training_shard)

    def val_dataloader(self) -> "ListOpsLoader":
        """The same held-out samples every time."""
        return ListOpsLoader(self.task, self.batch_size, validation_rows=self.validation_rows, **self.validation_shard)


class ListOpsLoader(EndlessLoader):
    """Expressions with their values.

    A batch holds ``input_ids`` ``(B, T)``, padded on the right to a multiple of 16, ``document_ids`` of the same shape,
    1 and 0 for padding, ``labels`` and ``row_ids`` ``(B,)``, and in training ``num_items``, the labels of the whole
    optimizer window over all ranks.

    Args:
        task: Which expressions are drawn.
        batch_size: Rows per batch and rank.
        seed: Of the training samples.
        **place: See ``EndlessLoader``.
    """

    def __init__(self, task: ListOpsTask, batch_size: int, *, seed: int = 0, **place: Any) -> None:
        super().__init__(batch_size, **place)
        self.task, self.seed = task, seed

    def identity(self) -> Identity:
        """See ``EndlessLoader``."""
        return {**asdict(self.task), "seed": self.seed}

    def training_batch(self, number: int) -> Batch:
        """See ``EndlessLoader``."""
        first = self.rank * self.batch_size
        rows = range(first, first + self.batch_size)
        samples = [self.task.sample(_generator(self.seed, _TRAINING, number, row)) for row in rows]
        # No two rows of a run may share an id, and ids must not depend on the ranks.
        batch = _collate(samples, first_row=(number << 32) + first)
        batch["num_items"] = torch.tensor(self.batch_size * self.window * self.world_size)
        return batch

    def validation_batch(self, rows: range, first_row: int) -> Batch:
        """See ``EndlessLoader``."""
        samples = [self.task.sample(_generator(0, _HELD_OUT, row)) for row in rows]
        return _collate(samples or [([_DIGITS[0]], IGNORE_INDEX)], first_row=first_row)


def _generator(seed: int, *place: int) -> np.random.Generator:
    """A generator of its own for every place: unlike a longer seed, a key does not run into those it begins with."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=place))


def _collate(samples: Sequence[tuple[list[int], int]], first_row: int) -> Batch:
    """Samples of any lengths, padded on the right."""
    longest = max(len(ids) for ids, _ in samples)
    input_ids = np.zeros((len(samples), -(-longest // _MULTIPLE) * _MULTIPLE), dtype=np.int64)
    for row, (ids, _) in enumerate(samples):
        input_ids[row, : len(ids)] = ids
    return {
        "input_ids": torch.from_numpy(input_ids),
        "document_ids": torch.from_numpy((input_ids != _IDS[_PADDING]).astype(np.int64)),
        "labels": torch.tensor([value for _, value in samples]),
        "row_ids": torch.arange(first_row, first_row + len(samples)),
    }
