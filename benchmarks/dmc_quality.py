"""What learned merging costs in perplexity, beside what it must beat, over seeds and rates, on the packaged model.

Five arms after the same tokens: DMC, the method off (control), random merging at the same rate, grouped-query
attention at the same rate, and both, where DMC merges two tokens a slot and fewer heads do the rest. Each cell trains
by the schedule of its rate, exports, and is measured through its serving cache on all held-out text. Cells that the
results file holds already are left alone, so a stopped benchmark goes on.

    python benchmarks/dmc_quality.py --seeds 1 2 3     # hours on two cores
    python benchmarks/dmc_quality.py                   # print what there is
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "dmc_quality.jsonl"
ARMS = ("control", "dmc", "random", "gqa", "dmc_gqa")
RECIPES = {"control": "dmc_control", "random": "dmc_random", "gqa": "gqa", "dmc_gqa": "dmc_gqa"}
# DMC's recipe for each rate, by whose phases and batches the other arms train, too, and what a rate that has no recipe
# of its own changes there.
SCHEDULES = {2: "dmc", 4: "dmc4", 8: "dmc4"}
CHANGES = {8: {"method.compression": 8.1, "compression_weight": 4.0}}
HEADS = 8  # key-value heads of the packaged model
MERGED = 2  # tokens a slot where fewer heads do the rest


class Cell(NamedTuple):
    """One training: which arm, at which rate, from which seed."""

    arm: str
    rate: int
    seed: int


def cells(arms: Iterable[str], rates: Iterable[int], seeds: Iterable[int]) -> Iterator[Cell]:
    """All cells, seed by seed; rates of one schedule share their control, and two tokens a slot leave heads alone."""
    for seed in seeds:
        for rate in rates:
            for arm in arms:
                is_copy = arm == "control" and rate != control_rate(rate)
                if not is_copy and (arm, rate) != ("dmc_gqa", MERGED):
                    yield Cell(arm, rate, seed)


def control_rate(rate: int) -> int:
    """The rate by whose schedule the control was trained that this rate is judged by."""
    return min(other for other in SCHEDULES if SCHEDULES[other] == SCHEDULES[rate])


def fewer_heads(arm: str, rate: int) -> int:
    """How many of the base's key-value heads become one."""
    return {"gqa": rate, "dmc_gqa": rate // MERGED}.get(arm, 1)


def recipe(name: str) -> dict[str, Any]:
    """A recipe of the packaged model."""
    content: dict[str, Any] = yaml.safe_load((ROOT / "recipes" / "tiny" / f"{name}.yaml").read_text())
    return content


def overrides(cell: Cell) -> list[str]:
    """The command line that turns the arm's recipe into the cell."""
    schedule = recipe(SCHEDULES[cell.rate])
    phases = schedule["model"]["init_args"]["phases"]
    if cell.arm == "gqa":  # at its own learning rate, the better of two that were tried at half the bytes
        own = recipe("gqa")["model"]["init_args"]["phases"][0]["learning_rate"]
        phases = [{**phase, "learning_rate": own} for phase in phases]
    options: dict[str, Any] = {
        "seed_everything": cell.seed,
        "trainer.max_steps": schedule["trainer"]["max_steps"],
        "trainer.val_check_interval": schedule["trainer"]["max_steps"],
        "data.init_args.batch_size": schedule["data"]["batch_size"],
        "model.init_args.phases": json.dumps(phases),
        "model.init_args.seed": cell.seed,
        "data.init_args.seed": cell.seed + 1,
    }
    if cell.arm == "dmc":
        options |= {f"model.init_args.{name}": value for name, value in CHANGES.get(cell.rate, {}).items()}
    elif cell.arm == "random":
        options["model.init_args.method.compression"] = cell.rate
    elif cell.arm in ("gqa", "dmc_gqa"):
        options["model.init_args.num_key_value_heads"] = HEADS // fewer_heads(cell.arm, cell.rate)
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def kvtrain(*arguments: str) -> None:
    """Run a command; its output goes to the terminal.

    Raises:
        SystemExit: It failed.
    """
    if subprocess.run([sys.executable, str(ROOT / "kvtrain_cli.py"), *arguments], cwd=ROOT, check=False).returncode:
        raise SystemExit(f"kvtrain {arguments[0]} failed")


def measure(cell: Cell, work: Path) -> dict[str, Any]:
    """Train, export and evaluate one cell."""
    run, exported, figures = work / "run", work / "exported", work / "eval.json"
    kvtrain(
        "fit",
        "--config",
        f"recipes/tiny/{RECIPES.get(cell.arm, SCHEDULES[cell.rate])}.yaml",
        "--trainer.default_root_dir",
        str(run),
        *overrides(cell),
    )
    kvtrain("export", str(run), str(exported))
    kvtrain("eval", str(exported), "--tasks", "perplexity", "--json", str(figures))
    result = json.loads(figures.read_text())[0]
    keys = ("perplexity", "compression", "kv_bytes_per_1024", "tokens")
    return {**cell._asdict(), **{key: result[key] for key in keys}}


def load() -> list[dict[str, Any]]:
    """The cells measured so far."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def table(results: list[dict[str, Any]]) -> str:
    """Every arm and rate over its seeds: perplexity, its ratio to the control of equal tokens, and what was saved."""
    head = ("rate", "arm", "perplexity", "ratio to control", "compression", "KV bytes / 1,024 tokens", "seeds")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for rate in SCHEDULES:
        first = control_rate(rate)
        controls = {r["seed"]: r["perplexity"] for r in results if r["arm"] == "control" and r["rate"] == first}
        for arm in ARMS:
            found = [r for r in results if r["arm"] == arm and r["rate"] == (first if arm == "control" else rate)]
            if not found:
                continue
            ratios = [r["perplexity"] / controls[r["seed"]] for r in found if r["seed"] in controls]
            lines.append(
                f"| {rate}x | {arm} | {_spread([r['perplexity'] for r in found], 2)} | {_spread(ratios, 3)} "
                f"| {_compression(arm, rate, found)} "
                f"| {statistics.mean(r['kv_bytes_per_1024'] for r in found):,.0f} | {len(found)} |"
            )
    return "\n".join(lines)


def _spread(values: list[float], digits: int) -> str:
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def _compression(arm: str, rate: int, found: list[dict[str, Any]]) -> str:
    """Tokens a slot as measured, times what fewer heads save."""
    return _spread([fewer_heads(arm, rate) * r["compression"] for r in found], 2)


def main() -> None:
    """Fill in what is missing of the seeds asked for, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[], help="train what is missing of these")
    parser.add_argument("--rates", type=int, nargs="+", default=[2, 4, 8], choices=list(SCHEDULES))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    asked = parser.parse_args()
    results = load()
    done = {Cell(r["arm"], r["rate"], r["seed"]) for r in results}
    for cell in cells(asked.arms, asked.rates, asked.seeds):
        if cell not in done:
            with tempfile.TemporaryDirectory(prefix="kvtrain-quality-") as work:
                results.append(measure(cell, Path(work)))
            RESULTS.parent.mkdir(parents=True, exist_ok=True)
            with RESULTS.open("a") as file:
                file.write(json.dumps(results[-1]) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
