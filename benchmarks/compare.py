"""Every method at the same bytes, on one base: quality of continuations, and names found, over what caches hold.

A prompt is read in full and cut when it ends, and what follows is decoded, all in bfloat16. Trained arms learn from the
same base for the same tokens, half of them text and half of them keyed retrieval, by the recipes of ``recipes/tiny``;
the control is the plain model after as many. Methods that need no training are brought to a half, a quarter and an
eighth of the bytes that a full cache takes in the mean while it answers. Runs go to ``runs/compare``, where a stopped
one goes on; cells that the results hold already are left alone.

    make compare                                        # all: hours on two cores
    python benchmarks/compare.py --arms untrained       # those that need no training: less than an hour
    python benchmarks/compare.py --arms DMC DMS --ratios 4
    python benchmarks/compare.py --print                # the table of what there is, and the chart
    python benchmarks/compare.py --scale 150 --steps 4000 --batch-size 16   # on a GPU, from a larger base of its own
"""

import argparse
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from arms import FIXED, HEADS, PAGE, head_worth, learnt_worth
from cell_tables import SHARES, details, summary
from cells import AS_IT_IS, UNTRAINED, Bench, Cell, Figures, Task, arms_of, slug, untrained_cells
from scaled_base import SHAPES, scaled_base
from training import DMS_COMPRESSION, ROOT, config, export, read_recipe, train
from transformers import AutoConfig
from turns import machine

from kvtrain.assets import resolve
from kvtrain.data.retrieval import RetrievalTask
from kvtrain.evaluation.comparison import compare

RUNS, RESULTS = ROOT / "runs" / "compare", ROOT / "benchmarks" / "results" / "compare"
STEPS, BATCH, LENGTH = 800, 2, 1024  # of every training, where nothing else is asked for
RATIOS = (2, 4, 8)
TASK = RetrievalTask()
TASKS = (Task("continuation", 45, 4), Task("retrieval", 48, 2, {"ask": "after", "retrieval": TASK}))
GATES = "Duo"  # whose heads are chosen by gates that one training learns for all ratios


@dataclass(frozen=True)
class Recipe:
    """How an arm is trained.

    Attributes:
        name: In ``recipes/tiny``; its phases are stretched to ``STEPS``.
        changes: Settings of the module by dotted names, for a ratio and so many key-value heads of the base.
    """

    name: str
    changes: Callable[[int, int], Mapping[str, Any]] = lambda ratio, heads: {}


def _dmc(ratio: int, heads: int) -> dict[str, Any]:
    """A little more than the ratio, for what slots carry besides keys and values; harder pulls for deeper cuts."""
    compression, weight = {2: (2.08, 1.0), 4: (4.3, 1.5), 8: (8.9, 4.0)}[ratio]
    return {"method.compression": compression, "compression_weight": weight, "method.page_size": PAGE}


def _dms(ratio: int, heads: int) -> dict[str, Any]:
    """What leaves a window and a part of the older tokens; see ``DMS.expected_slots``."""
    return {"method.compression": DMS_COMPRESSION[ratio], "method.page_size": PAGE}


def _dms_all(ratio: int, heads: int) -> dict[str, Any]:
    """Weights learn as DMC's, and decisions as fast as where adapters alone do."""
    phases = [
        {"name": "retrofit", "steps": 240, "learning_rate": 8.0e-4, "warmup_steps": 16},
        {"name": "finetune", "steps": 560, "learning_rate": 8.0e-4, "final_learning_rate": 0.0, "warmup_steps": 16},
    ]
    own = {"method.trainable": "all", "method.decision_scale": 40.0, "weight_decay": 0.1, "phases": phases}
    return {**_dms(ratio, heads), **own}


def _gqa(ratio: int, heads: int) -> dict[str, Any]:
    return {"num_key_value_heads": heads // ratio}


def _dmc_gqa(ratio: int, heads: int) -> dict[str, Any]:
    """Two tokens a slot, and fewer heads for the rest."""
    return {**_dmc(2, heads), **_gqa(ratio // 2, heads)}


TRAINED = {
    "control": Recipe("dmc_control", lambda ratio, heads: {"distill": False}),  # its own teacher would teach it nothing
    "DMC": Recipe("dmc4", _dmc),
    "DMS": Recipe("dms", _dms_all),
    "DMS, adapters alone": Recipe("dms", _dms),
    "GQA": Recipe("gqa", _gqa),
    "DMC on GQA": Recipe("dmc_gqa", _dmc_gqa),
    GATES: Recipe("duo"),
}
ARMS = (*TRAINED, *UNTRAINED)
GROUPS = {"trained": TRAINED, "untrained": UNTRAINED}


def trained_cells(ratios: Iterable[int], seeds: Iterable[int]) -> list[Cell]:
    """Arms that train, at every ratio and from every seed; the control has no ratio, and half the bytes are no two."""
    ratios = list(ratios)
    found = []
    for seed in seeds:
        found.append(Cell("control", AS_IT_IS, seed))
        others = [arm for arm in TRAINED if arm != "control"]
        found += [Cell(arm, ratio, seed) for ratio in ratios for arm in others if (arm, ratio) != ("DMC on GQA", 2)]
    return found


# --- training


@dataclass(frozen=True)
class Schedule:
    """What every training has, from which base.

    Attributes:
        base: Folder or name.
        name: What results call it.
        runs: Where runs go.
        steps: Of all phases together.
        batch_size: Rows of a step.
    """

    base: str
    name: str
    runs: Path
    steps: int
    batch_size: int

    @property
    def tokens(self) -> int:
        """That a model is trained on."""
        return self.steps * self.batch_size * LENGTH

    def trained(self, cell: Cell) -> Path:
        """The run of a cell, trained to its end."""
        run = self.runs / f"{slug(cell.arm)}-{cell.ratio}-{cell.seed}"
        recipe = TRAINED[cell.arm]
        heads = AutoConfig.from_pretrained(resolve(self.base)).num_key_value_heads
        others = {"data": self.data(cell.seed + 1), "changes": recipe.changes(cell.ratio, heads)}
        return train(run, config(recipe.name, run, base=self.base, steps=self.steps, seed=cell.seed, **others))

    def data(self, seed: int) -> dict[str, Any]:
        """Half text and half retrieval, as ``kvtrain:recall`` learnt from, in rows long enough to leave something."""
        content: dict[str, Any] = read_recipe("recall")["data"]
        rows = {"shortest": LENGTH // 4, "growth_batches": 0, "batch_size": self.batch_size}
        return {**content, "init_args": {**content["init_args"], **rows, "tokenizer": self.base, "seed": seed}}


# --- measuring


def measure(cell: Cell, bench: Bench, schedule: Schedule) -> None:
    """Train and measure one cell, and keep its rows."""
    tokens, model = (schedule.tokens, f"{schedule.name}, {cell.arm}") if cell.arm in TRAINED else (0, schedule.name)
    if cell.arm == GATES:
        gates = schedule.trained(Cell(GATES, AS_IT_IS, cell.seed))
        rows = [{**row, "trained": True} for row in bench.untrained(cell, learnt_worth(gates))]
    elif cell.arm in TRAINED:
        exported = export(schedule.trained(cell))
        rows = [beside_base(row, cell) for task in bench.tasks for row in bench.measure(task, str(exported))]
    else:
        rows = bench.untrained(cell, _worth(cell.arm, bench.base))
    bench.keep(cell, [{**row, "model": model} for row in rows], tokens)


def beside_base(row: Figures, cell: Cell) -> Figures:
    """A row of a trained arm, its bytes beside the base's cache where heads are fewer."""
    cut = {"GQA": cell.ratio, "DMC on GQA": cell.ratio // 2}.get(cell.arm, 1)
    shares = {name: row[name] / cut for name in SHARES}
    own = {"method": f"GQA, 1/{cut} of the heads", "trained": True} if cell.arm == "GQA" else {}
    return {**row, **shares, **own}


@functools.cache
def _worth(arm: str, base: str) -> torch.Tensor | None:
    return head_worth(arm, base, LENGTH, TASK) if arm in HEADS else None


def main() -> None:
    """Fill in what is missing, then print the table and draw the chart."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    base = parser.add_mutually_exclusive_group()
    base.add_argument("--base", default="kvtrain:recall", help="folder or name of the base (kvtrain:recall)")
    base.add_argument("--scale", type=int, choices=SHAPES, help="a base of so many million parameters, trained first")
    parser.add_argument("--text", nargs="+", default=[], metavar="FILE", help="that it learns from, too")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of every training of an arm ({STEPS})")
    parser.add_argument("--batch-size", type=int, default=BATCH, help=f"rows of {LENGTH:,} tokens of a step ({BATCH})")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help=f"these alone: trained, untrained, {', '.join(ARMS)}")
    parser.add_argument("--ratios", type=int, nargs="+", default=RATIOS, choices=RATIOS, help="of the bytes (all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="of trainings (1)")
    parser.add_argument("--print", action="store_true", help="measure nothing")
    asked = parser.parse_args()
    schedule = schedule_of(asked)
    bench = Bench(schedule.base, RESULTS / schedule.runs.name, TASKS)
    wanted = arms_of(asked.arms or GROUPS, GROUPS)
    cells = [*trained_cells(asked.ratios, asked.seeds), *untrained_cells(asked.ratios)]
    for cell in cells if not asked.print else ():
        if cell.arm in wanted and cell not in bench.done():
            measure(cell, bench, schedule)
    show(bench, schedule)


def schedule_of(asked: argparse.Namespace) -> Schedule:
    """What is asked for; runs and results of another schedule than the usual one have a folder of their own."""
    name = f"base-{asked.scale}m" if asked.scale else asked.base
    usual = (asked.steps, asked.batch_size) == (STEPS, BATCH)
    runs = RUNS / (slug(name) if usual else f"{slug(name)}-{asked.steps}x{asked.batch_size}")
    trains = asked.scale and not asked.print
    base = str(scaled_base(asked.scale, RUNS, asked.text)) if trains else name
    return Schedule(base, name, runs, asked.steps, asked.batch_size)


def show(bench: Bench, schedule: Schedule) -> None:
    """Print the tables, and draw the chart."""
    rows, arms = bench.rows(), ["control", *FIXED, *(arm for arm in ARMS if arm not in ("control", *FIXED))]
    if not rows:
        raise SystemExit(f"{schedule.name}: nothing measured yet")
    print(f"{machine()}; {schedule.name}\n\n{details(rows, arms)}\n\nIn short:\n\n{summary(rows, arms)}\n")
    for path in compare(bench.charted(arms), schedule.runs / "comparison"):
        print(path)


if __name__ == "__main__":
    main()
