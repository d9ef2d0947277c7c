"""Arms of benchmarks at equal bytes: methods by one size, brought to a share of what Full takes."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import kvtrain
from kvtrain.data.haystack import HaystackTask
from kvtrain.data.packing import IGNORE_INDEX
from kvtrain.data.tokenizer import load_tokenizer
from kvtrain.models.duo.gates import HEAD_GATES, choose_full_heads
from kvtrain.models.duo.scores import free_signal, razor_gates, razor_scores
from kvtrain.models.method import Method

SINK, WINDOW, PAGE = 4, 32, 8
_CLOSE, _TOLERANCE, _TRIES = 0.02, 0.1, 6  # of the share of bytes that is aimed at
_SAMPLES = 8  # from which heads are judged

Sized = Callable[[int], Method]  # a method by its size in tokens


def _snapkv(slots: int, **settings: Any) -> Method:
    return kvtrain.SnapKV(budget=slots, recent=WINDOW, every=32, page_size=PAGE, **settings)


SIZED: dict[str, Sized] = {
    "StreamingLLM": lambda n: kvtrain.StreamingLLM(budget=n, sink=SINK, recent=n - SINK, page_size=PAGE),
    "H2O": lambda n: kvtrain.H2O(budget=n, recent=n // 2, page_size=PAGE),
    "TOVA": lambda n: kvtrain.TOVA(budget=n, page_size=PAGE),
    "SnapKV": _snapkv,
    "PyramidKV": functools.partial(_snapkv, per_layer="pyramid"),
    "Ada-KV": functools.partial(_snapkv, per_head="adaptive"),
    "ExpectedAttention": lambda n: kvtrain.ExpectedAttention(budget=n, recent=WINDOW, every=32, page_size=PAGE),
    "CORM": lambda n: kvtrain.CORM(window=n, recent=n, page_size=PAGE),
    "D2O": lambda n: kvtrain.D2O(budget=n, recent=n // 2, page_size=PAGE),
    "MiKV, 4 bits": lambda n: kvtrain.MiKV(budget=n, recent=n // 2, page_size=PAGE),
    "random eviction": lambda n: kvtrain.RandomEviction(budget=n, recent=WINDOW, page_size=PAGE),
}
FIXED: dict[str, Method] = {
    "Full": kvtrain.Full(),
    "8 bits": kvtrain.Full(kv_bits=8),
    "4 bits": kvtrain.Full(kv_bits=4),
    "GEAR, 2 bits": kvtrain.GEAR(page_size=PAGE),
    "KIVI, 2 bits": kvtrain.KIVI(page_size=PAGE),
    "KIVI, 4 bits": kvtrain.KIVI(bits=4, page_size=PAGE),
}
HEADS = ("Duo, free signal", "RazorAttention")  # choices of full heads


def fit(
    sized: Sized, share_of: Callable[[Method], float], share: float, length: int, answering: float = 1.0
) -> Method | None:
    """The method whose size takes a share of Full's bytes in the mean; None where none comes within a tenth.

    Args:
        sized: Makes it.
        share_of: Measures what share it takes.
        share: Aimed at.
        length: Tokens of a row, which is the largest size.
        answering: Share of them that a row has in the mean while it answers: the first size is one for so many.
    """
    size, seen = round(share * length * answering), dict[int, float]()
    for _ in range(_TRIES):
        size = max(SINK + WINDOW, min(size, length))
        if size in seen:
            break
        seen[size] = share_of(sized(size))
        if abs(seen[size] / share - 1) <= _CLOSE:
            break
        first, *others = sorted(seen, key=lambda n: abs(seen[n] - share))
        if others and seen[others[0]] != seen[first]:
            slope = (others[0] - first) / (seen[others[0]] - seen[first])
            size = round(first + slope * (share - seen[first]))
        else:
            size = round(first * share / seen[first])
    best = min(seen, key=lambda n: abs(seen[n] - share))
    return sized(best) if abs(seen[best] / share - 1) <= _TOLERANCE else None


def streaming(worth: torch.Tensor, share: float, length: int) -> Sized:
    """As many full heads as leave the others the least window within a share of the bytes, by its latest tokens.

    Args:
        worth: What every key-value head is worth, ``(layers, H_kv)``.
        share: Of Full's bytes.
        length: Tokens of a row.
    """
    least = (SINK + WINDOW) / length
    num_full = int((share - least) / (1 - least) * worth.numel())
    full_heads = choose_full_heads(worth, 1 - num_full / worth.numel())
    return lambda n: kvtrain.Duo(sink=SINK, recent=max(1, n - SINK), full_heads=full_heads, page_size=PAGE)


def head_worth(
    arm: str,
    base: str,
    length: int,
    task: HaystackTask | None = None,
    vocabulary: torch.Tensor | None = None,
) -> torch.Tensor:
    """What every key-value head of a base is worth by one of ``HEADS``, ``(layers, H_kv)``.

    Args:
        arm: Which.
        base: Folder or name.
        length: Tokens of the rows that the free signal reads.
        task: Whose answers it judges by; None: by all of a text.
        vocabulary: Words that RazorAttention repeats; None draws from all.
    """
    model = open_gates(base)
    if arm == "RazorAttention":
        return razor_gates(razor_scores(model, vocabulary=vocabulary))
    if task is not None:
        return answers_signal(model, base, task, length)
    ids = torch.tensor(_code_ids(base)[: _SAMPLES * length]).view(_SAMPLES, length)
    return free_signal(model, ids, torch.ones_like(ids, dtype=torch.bool))


def open_gates(base: str) -> Any:
    """A base with a gate on every head, all open."""
    duo = kvtrain.Duo(sink=SINK, recent=WINDOW)
    return kvtrain.retrofit(kvtrain.load(base, dtype=torch.float32), duo).eval()


def answers_signal(model: Any, tokenizer: str, task: HaystackTask, length: int) -> torch.Tensor:
    """What every head would lose on the answers of a few samples, from one pass.

    Args:
        model: With open gates.
        tokenizer: Its name.
        task: Of the samples.
        length: Their tokens.
    """
    writer, rng = task.writer(load_tokenizer(tokenizer)), np.random.default_rng(1)
    book = np.asarray(_code_ids(tokenizer))
    samples = [writer.sample(rng, np.roll(book, 500 * number), length) for number in range(_SAMPLES)]
    ids = torch.tensor(np.stack([sample.input_ids for sample in samples]))
    labels = torch.tensor(np.stack([sample.labels for sample in samples]))
    return free_signal(model, ids, labels.roll(-1, 1) != IGNORE_INDEX)  # tokens that predict an answer's


def learnt_worth(run: Path) -> torch.Tensor:
    """What every key-value head is worth by the gates that a run has learnt, ``(layers, H_kv)``."""
    rows = HEAD_GATES.read(run)
    last = [row for row in rows if row["step"] == rows[-1]["step"]]
    return torch.tensor([row["gate"] for row in last]).view(1 + int(max(row["layer"] for row in last)), -1)


def _code_ids(tokenizer: str) -> list[int]:
    """Some code that no evaluation reads."""
    text = "\n".join(path.read_text() for path in sorted(Path(json.__file__).parent.glob("*.py")))
    ids: list[int] = load_tokenizer(tokenizer)(text)["input_ids"]
    return ids
