"""What policies that need no training cost at equal bytes: perplexity of continuations, and passkeys asked afterwards.

A prompt is read in full and cut when it ends, then answers are decoded and scored, all in bfloat16: ``kvtrain:tiny``
goes on for 256 tokens behind 768, ``kvtrain:copy`` reads a book of some 900 tokens and is then asked for four passkeys.
Every arm is brought to a half, a quarter and an eighth of the bytes that ``Full`` takes in the mean while it answers:
its size is set by what a few rows are seen to take. Arms that have no size are measured as they are, and what cannot be
made as small is named below the table. Cells that the results file holds already are left alone, so a stopped
benchmark goes on.

    python benchmarks/policies.py           # a quarter of the bytes, 8 windows and 32 passkeys: minutes on two cores
    python benchmarks/policies.py --full    # all three, 45 windows and 192 passkeys, with speeds: an hour or more
    python benchmarks/policies.py --full --print    # what there is
    python benchmarks/policies.py --full --kvpress  # only kvpress' presses, where that is installed; see pressed.py

Presses cut prompts to a half, a quarter and an eighth of their tokens, and what is decoded stays: their bytes are those
that their caches hold.
"""

import argparse
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from arms import FIXED, HEADS, SIZED, fit, head_worth, streaming
from pressed import PRESSES, PressedModel
from turns import cpu_seconds, decoding, machine, median_seconds

import kvtrain
from kvtrain.data.passkey import PasskeyTask, PasskeyWriter
from kvtrain.data.tokenizer import load_tokenizer
from kvtrain.evaluation.continuation import continuation
from kvtrain.evaluation.recall import recall
from kvtrain.evaluation.windows import full_windows
from kvtrain.inference.load import open_model
from kvtrain.models.method import Method

RESULTS = Path(__file__).resolve().parent / "results"
LENGTH, PROMPT, ROWS = 1024, 768, 8
TASK = PasskeyTask(passkeys=4, words=8)
AS_IT_IS = 0  # the ratio of arms without a size
ARMS = (*FIXED, *SIZED, *HEADS, *PRESSES)
_FITTED = 4  # rows on which a size is tried: what some policies keep depends on the text

Figures = dict[str, Any]


class Cell(NamedTuple):
    """One measurement: which arm, at which part of the bytes, on which task."""

    arm: str
    ratio: int
    task: str


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        name: Of the results file.
        ratios: Full's bytes over those aimed at.
        windows: Of text that are gone on with.
        samples: With four passkeys each.
        speeds: Whether time is taken, too.
    """

    name: str
    ratios: tuple[int, ...]
    windows: int
    samples: int
    speeds: bool


SMALL, WHOLE = Size("policies_small", (4,), 8, 8, False), Size("policies", (2, 4, 8), 45, 48, True)


# --- arms


@functools.cache
def worth(arm: str, base: str) -> torch.Tensor:
    """What every key-value head of a base is worth, ``(layers, H_kv)``: the copy model shows it on passkeys alone."""
    if base != "kvtrain:copy":
        return head_worth(arm, base, LENGTH)
    words = torch.from_numpy(PasskeyWriter(load_tokenizer(base), TASK).vocabulary)
    return head_worth(arm, base, LENGTH, TASK, words)


# --- tasks


def go_on(model: Any, tokenizer: Any, limit: int) -> Figures:
    """Perplexity of the ends of windows."""
    result = continuation(model, full_windows(tokenizer, "heldout", LENGTH, limit), PROMPT)
    return {"score": result.perplexity, "scored": result.tokens, **asdict(result.answering)}


def find(model: Any, tokenizer: Any, limit: int) -> Figures:
    """Share of the passkeys that are found."""
    result = recall(model, tokenizer, "heldout", TASK, sequence_length=LENGTH, limit=limit, ask="after")
    assert result.answering is not None
    return {"score": result.accuracy, "scored": result.answers, **asdict(result.answering)}


TASKS: dict[str, tuple[str, Callable[[Any, Any, int], Figures]]] = {
    "continuation": ("kvtrain:tiny", go_on),
    "passkeys": ("kvtrain:copy", find),
}


def measure(method: Method, task: str, limit: int) -> Figures:
    """Figures of a method on a task."""
    base, run = TASKS[task]
    return run(*open_model(base, method=method, dtype=torch.bfloat16), limit)


def method_of(cell: Cell) -> Method | None:
    """The method of a cell; None where it cannot be made as small."""
    if cell.arm in FIXED:
        return FIXED[cell.arm]
    share = 1 / cell.ratio
    is_heads = cell.arm in HEADS
    sized = streaming(worth(cell.arm, TASKS[cell.task][0]), share, LENGTH) if is_heads else SIZED[cell.arm]
    return fit(sized, lambda method: measure(method, cell.task, _FITTED)["kv_share_mean"], share, LENGTH)


def pressed(cell: Cell, limit: int) -> Figures:
    """Figures of a press at a share of the prompt's tokens."""
    base, run = TASKS[cell.task]
    model = PressedModel(base, cell.arm, 1 - 1 / cell.ratio)
    figures = run(model, load_tokenizer(base), limit)
    return {"method": repr(model.press), "masked": model.masks, **figures}


@torch.no_grad()
def speeds(method: Method) -> Figures:
    """CPU time of reading prompts and of a decoding step behind them, over Full's."""
    models = {name: open_model("kvtrain:tiny", method=one)[0] for name, one in (("", method), ("Full", kvtrain.Full()))}
    ids, caches = torch.randint(2, 4096, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0)), dict[str, Any]()

    def read(name: str) -> None:
        caches[name] = models[name].make_cache()
        models[name].get_decoder()(ids, past_key_values=caches[name], prefill=True)
        caches[name].end_prompt()

    prefill = median_seconds({name: functools.partial(read, name) for name in models}, 1, 3, cpu_seconds)
    steps = {name: decoding(models[name], caches[name], ROWS) for name in models}
    decode = median_seconds(steps, 4, 32, cpu_seconds)
    return {"prefill_ratio": prefill[""] / prefill["Full"], "decode_ratio": decode[""] / decode["Full"]}


# --- results


def cells(size: Size) -> Iterator[Cell]:
    """All cells of a size."""
    for arm in ARMS:
        for ratio in (AS_IT_IS,) if arm in FIXED else size.ratios:
            for task in TASKS:
                yield Cell(arm, ratio, task)


def run(cell: Cell, size: Size) -> Figures:
    """One cell; without a method where it cannot be made as small."""
    limit = size.windows if cell.task == "continuation" else size.samples
    if cell.arm in PRESSES:
        return {**cell._asdict(), **pressed(cell, limit)}
    method = method_of(cell)
    if method is None:
        return {**cell._asdict(), "method": None}
    figures = measure(method, cell.task, limit)
    times = speeds(method) if size.speeds and cell.task == "continuation" else {}
    return {**cell._asdict(), "method": repr(method), **figures, **times}


def summary(results: list[Figures]) -> str:
    """A row an arm: what each task comes to at every part of the bytes, and a line for arms without a size."""
    found = {Cell(*(result[name] for name in Cell._fields)): result for result in results if result["method"]}
    ratios = sorted({cell.ratio for cell in found} - {AS_IT_IS})
    titles = [f"{title} at 1/{ratio}" for title in ("perplexity", "found") for ratio in ratios]
    lines = [f"| {' | '.join(('policy', *titles))} |", "|---" * (len(titles) + 1) + "|"]
    rest = []
    for arm in dict.fromkeys(cell.arm for cell in found):
        own = [AS_IT_IS] if arm in FIXED else ratios
        scores = [[_shown(found.get(Cell(arm, one, task), {}), "score", "{:.2f}") for one in own] for task in TASKS]
        if arm in FIXED:
            share = _shown(found.get(Cell(arm, AS_IT_IS, "passkeys"), {}), "kv_share_mean", "{:.0%}")
            rest.append(f"{arm} ({share} of the bytes): {scores[0][0]} and {scores[1][0]}")
        else:
            lines.append(f"| {' | '.join((arm, *scores[0], *scores[1]))} |")
    return "\n".join([*lines, "", "; ".join(rest)])


def table(results: list[Figures]) -> str:
    """A row an arm and ratio, both tasks beside each other."""
    head = ("policy", "bytes aimed at", "perplexity", "passkeys found", "bytes, mean", "end", "peak")
    lines = [f"| {' | '.join((*head, 'prefill', 'decode'))} |", "|---" * (len(head) + 2) + "|"]
    by_cell = {Cell(*(result[name] for name in Cell._fields)): result for result in results if result["method"]}
    for arm, ratio in dict.fromkeys(cell[:2] for cell in by_cell):
        both = [by_cell.get(Cell(arm, ratio, task), {}) for task in TASKS]
        shares = [
            " / ".join(_shown(one, name, "{:.1%}") for one in both)
            for name in ("kv_share_mean", "kv_share_end", "kv_share_peak")
        ]
        shares[0] += ", masked, nothing freed" if any(one.get("masked") for one in both) else ""
        times = [_shown(both[0], name, "{:.2f}x") for name in ("prefill_ratio", "decode_ratio")]
        scores = [_shown(both[0], "score", "{:.2f}"), _shown(both[1], "score", "{:.3f}")]
        lines.append(f"| {' | '.join([arm, f'1/{ratio}' if ratio else '-', *scores, *shares, *times])} |")
    absent = [f"{r['arm']} at 1/{r['ratio']} ({r['task']})" for r in results if not r["method"]]
    lines += [f"\nNot within a tenth of the bytes at any size: {', '.join(absent)}."] if absent else []
    return "\n".join(lines)


def _shown(figures: Mapping[str, Any], name: str, form: str) -> str:
    return form.format(figures[name]) if figures.get(name) is not None else "-"


def main() -> None:
    """Fill in what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="all ratios, windows and passkeys, and speeds")
    parser.add_argument("--print", action="store_true", help="measure nothing")
    parser.add_argument("--arms", nargs="+", choices=ARMS, metavar="ARM", help="these alone")
    parser.add_argument("--kvpress", action="store_true", help="kvpress' presses alone: it patches the whole process")
    asked = parser.parse_args()
    arms = asked.arms or [arm for arm in ARMS if (arm in PRESSES) == asked.kvpress]
    size = WHOLE if asked.full else SMALL
    path = RESULTS / f"{size.name}.jsonl"
    results = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {Cell(*(result[name] for name in Cell._fields)) for result in results}
    for cell in cells(size) if not asked.print else ():
        if cell.arm in arms and cell not in done:
            results.append(run(cell, size))
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write(json.dumps(results[-1]) + "\n")
    results.sort(key=lambda result: (ARMS.index(result["arm"]), result["ratio"]))
    print(f"{machine()}; bytes of continuations / of passkeys, as shares of Full's\n\n{table(results)}")
    print(f"\nIn short:\n\n{summary(results)}")


if __name__ == "__main__":
    main()
