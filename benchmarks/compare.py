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
"""

import argparse
import functools
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from arms import FIXED, HEADS, PAGE, head_worth, learnt_worth
from cell_tables import SHARES, details, summary
from cells import AS_IT_IS, UNTRAINED, Bench, Cell, Figures, Task, slug, untrained_cells
from transformers import AutoConfig
from turns import machine

from kvtrain.assets import resolve
from kvtrain.data.retrieval import RetrievalTask
from kvtrain.evaluation.comparison import compare

ROOT = Path(__file__).resolve().parent.parent
RUNS, RESULTS = ROOT / "runs" / "compare", ROOT / "benchmarks" / "results" / "compare"
STEPS, BATCH, LENGTH = 800, 2, 1024  # of every training
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
    return {"method.compression": {2: 2.08, 4: 4.4, 8: 9.8}[ratio], "method.page_size": PAGE}


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


def config(cell: Cell, base: str, run: Path) -> dict[str, Any]:
    """What ``kvtrain fit`` reads: the arm's recipe on the base, its data and the schedule of all."""
    recipe = TRAINED[cell.arm]
    content = read_recipe(recipe.name)
    heads = AutoConfig.from_pretrained(resolve(base)).num_key_value_heads
    init = content["model"]["init_args"]
    init |= {"base": base, "seed": cell.seed}
    for name, value in recipe.changes(cell.ratio, heads).items():
        place, _, last = name.rpartition(".")
        (init[place] if place else init)[last] = value
    init["phases"] = stretched(init["phases"])
    content["trainer"] |= {"default_root_dir": str(run), "max_steps": STEPS, "val_check_interval": STEPS // 2}
    content["seed_everything"], content["data"] = cell.seed, data(base, cell.seed + 1)
    return content


def data(base: str, seed: int) -> dict[str, Any]:
    """Half text and half retrieval, as ``kvtrain:recall`` has learnt from, in rows long enough to leave something."""
    content: dict[str, Any] = read_recipe("recall")["data"]
    own = {"tokenizer": base, "shortest": LENGTH // 4, "growth_batches": 0, "batch_size": BATCH, "seed": seed}
    return {**content, "init_args": {**content["init_args"], **own}}


def stretched(phases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Phases over all steps."""
    factor = STEPS / sum(phase["steps"] for phase in phases)
    lengths = ("steps", "warmup_steps", "decay_steps")
    return [{k: round(v * factor) if k in lengths else v for k, v in phase.items()} for phase in phases]


def read_recipe(name: str) -> dict[str, Any]:
    """A recipe of the packaged models."""
    content: dict[str, Any] = yaml.safe_load((ROOT / "recipes" / "tiny" / f"{name}.yaml").read_text())
    return content


def train(cell: Cell, base: str) -> Path:
    """The run of a cell, trained to its end; one that was stopped goes on."""
    run = RUNS / slug(base) / f"{slug(cell.arm)}-{cell.ratio}-{cell.seed}"
    run.mkdir(parents=True, exist_ok=True)
    settings = run / "asked.yaml"
    settings.write_text(yaml.safe_dump(config(cell, base, run)))
    begun = ("--ckpt_path", "last") if any((run / "checkpoints").glob("*")) else ()
    kvtrain("fit", "--config", str(settings), *begun)
    return run


def kvtrain(*arguments: str) -> None:
    """Run a command; its output goes to the terminal.

    Raises:
        SystemExit: It failed.
    """
    if subprocess.run([sys.executable, str(ROOT / "kvtrain_cli.py"), *arguments], cwd=ROOT, check=False).returncode:
        raise SystemExit(f"kvtrain {arguments[0]} failed")


# --- measuring


def measure(cell: Cell, bench: Bench) -> None:
    """Train and measure one cell, and keep its rows."""
    if cell.arm not in TRAINED:
        bench.keep(cell, bench.untrained(cell, _worth(cell.arm, bench.base)), tokens=0)
        return
    if cell.arm == GATES:
        gates = train(Cell(GATES, AS_IT_IS, cell.seed), bench.base)
        rows = [{**row, "trained": True} for row in bench.untrained(cell, learnt_worth(gates))]
    else:
        run = train(cell, bench.base)
        exported = run / "exported"
        if not exported.exists():
            kvtrain("export", str(run), str(exported))
        rows = [row for task in bench.tasks for row in bench.measure(task, str(exported))]
        rows = [named(row, cell, bench.base) for row in rows]
    bench.keep(cell, rows, tokens=STEPS * BATCH * LENGTH)


def named(row: Figures, cell: Cell, base: str) -> Figures:
    """A row of a trained arm: by its base in place of a folder, and beside the base's cache where heads are fewer."""
    cut = {"GQA": cell.ratio, "DMC on GQA": cell.ratio // 2}.get(cell.arm, 1)
    shares = {name: row[name] / cut for name in SHARES}
    own = {"method": f"GQA, 1/{cut} of the heads", "trained": True} if cell.arm == "GQA" else {}
    return {**row, **shares, **own, "model": f"{base}, {cell.arm}"}


@functools.cache
def _worth(arm: str, base: str) -> torch.Tensor | None:
    return head_worth(arm, base, LENGTH, TASK) if arm in HEADS else None


def main() -> None:
    """Fill in what is missing, then print the table and draw the chart."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="kvtrain:recall", help="folder or name of the base (kvtrain:recall)")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help=f"these alone: trained, untrained, {', '.join(ARMS)}")
    parser.add_argument("--ratios", type=int, nargs="+", default=RATIOS, choices=RATIOS, help="of the bytes (all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="of trainings (1)")
    parser.add_argument("--print", action="store_true", help="measure nothing")
    asked = parser.parse_args()
    bench = Bench(asked.base, RESULTS / slug(asked.base), TASKS)
    wanted = arms_of(asked.arms or ["trained", "untrained"])
    cells = [*trained_cells(asked.ratios, asked.seeds), *untrained_cells(asked.ratios)]
    for cell in cells if not asked.print else ():
        if cell.arm in wanted and cell not in bench.done():
            measure(cell, bench)
    show(bench)


def show(bench: Bench) -> None:
    """Print the tables, and draw the chart."""
    rows, arms = bench.rows(), ["control", *FIXED, *(arm for arm in ARMS if arm not in ("control", *FIXED))]
    if not rows:
        raise SystemExit(f"{bench.base}: nothing measured yet")
    print(f"{machine()}; {bench.base}\n\n{details(rows, arms)}\n\nIn short:\n\n{summary(rows, arms)}\n")
    files = [f"{'plain model' if arm == 'Full' else arm}={bench.file(arm)}" for arm in arms if bench.file(arm).exists()]
    for path in compare(files, RUNS / slug(bench.base) / "comparison"):
        print(path)


def arms_of(names: list[str]) -> set[str]:
    """Arms by name, or by group.

    Raises:
        SystemExit: There is none of a name.
    """
    groups = {"trained": set(TRAINED), "untrained": set(UNTRAINED)} | {arm: {arm} for arm in ARMS}
    unknown = [name for name in names if name not in groups]
    if unknown:
        raise SystemExit(f"no arm {unknown[0]!r}; there are {', '.join(groups)}")
    return set().union(*(groups[name] for name in names))


if __name__ == "__main__":
    main()
