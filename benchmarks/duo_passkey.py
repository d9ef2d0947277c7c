"""How many passkeys are found once half of the heads stream, and which heads to choose, over seeds.

The packaged copy model, samples of 1,024 tokens with four passkeys of eight words, streaming heads with a window of
4 + 32 tokens. Arms: the base; heads by learnt gates (``recipes/tiny/duo.yaml``); heads drawn at random; all heads
streaming (StreamingLLM's window); and the choices that need no training. Each is measured through its serving cache.
Cells that the results file holds already are left alone, so a stopped benchmark goes on.

    python benchmarks/duo_passkey.py --seeds 1 2 3     # a quarter of an hour on two cores
    python benchmarks/duo_passkey.py                   # print what there is
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from arms import answers_signal, learnt_worth, open_gates

import kvtrain
from kvtrain.data.passkey import PasskeyTask, PasskeyWriter
from kvtrain.data.tokenizer import load_tokenizer
from kvtrain.evaluation.recall import recall
from kvtrain.models.duo.gates import pattern_of
from kvtrain.models.duo.scores import razor_gates, razor_scores

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "duo_passkey.jsonl"
BASE, TASK, LENGTH = "kvtrain:copy", PasskeyTask(passkeys=4, words=8), 1024
ONCE, SEEDED = ("razor", "razor, random ids", "free signal"), ("learnt gates", "random heads")


class Cell(NamedTuple):
    """One model: how its heads were chosen, from which seed, at which sparsity."""

    arm: str
    sparsity: float
    seed: int


def cells(seeds: list[int], sparsities: list[float]) -> Iterator[Cell]:
    """All cells; what no seed touches comes once."""
    yield Cell("base", 0.0, 0)
    yield Cell("all streaming", 1.0, 0)
    for sparsity in sparsities:
        for arm in ONCE:
            yield Cell(arm, sparsity, 0)
        for seed in seeds:
            for arm in SEEDED:
                yield Cell(arm, sparsity, seed)


def learnt(seed: int, work: Path) -> torch.Tensor:
    """Gates of the recipe, with another seed for everything."""
    exported, run = work / f"exported-{seed}", work / f"run-{seed}"
    options = {"seed_everything": seed, "model.init_args.seed": seed, "data.init_args.seed": seed + 1}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    fit = ["fit", "--config", "recipes/tiny/duo.yaml", "--trainer.default_root_dir", str(run), *words]
    for arguments in (fit, ["export", str(run), str(exported)]) if not exported.exists() else ():
        subprocess.run([sys.executable, str(ROOT / "kvtrain_cli.py"), *arguments], cwd=ROOT, check=True)
    return learnt_worth(run)


def choose(cell: Cell, work: Path) -> Any:
    """The model of a cell."""
    model = open_gates(BASE)
    shape = (len(model.model.layers), model.config.num_key_value_heads)
    if cell.arm == "base":
        return kvtrain.retrofit(kvtrain.load(BASE, dtype=torch.float32), kvtrain.Full()).eval()
    if cell.arm == "learnt gates":
        gates = learnt(cell.seed, work)
    elif cell.arm == "random heads":
        gates = torch.rand(shape, generator=torch.Generator().manual_seed(cell.seed))
    elif cell.arm == "razor":  # over the words that the model copies
        words = PasskeyWriter(load_tokenizer(BASE), TASK).vocabulary
        gates = razor_gates(razor_scores(model, vocabulary=torch.from_numpy(words)))
    elif cell.arm == "razor, random ids":
        gates = razor_gates(razor_scores(model))
    elif cell.arm == "free signal":
        gates = answers_signal(model, BASE, TASK, LENGTH)
    else:
        gates = pattern_of([()] * shape[0], shape[1])
    return model.binarize(cell.sparsity, gates=gates)


def table(results: list[dict[str, Any]]) -> str:
    """Mean and spread of every arm."""
    names = ("heads", "streaming", "passkeys found", "of their tokens", "KV bytes / 1,024 tokens", "seeds")
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    kinds = dict.fromkeys((result["arm"], result["sparsity"]) for result in results)
    for arm, sparsity in kinds:
        found = [result for result in results if (result["arm"], result["sparsity"]) == (arm, sparsity)]
        columns = [_spread([result[name] for result in found]) for name in ("accuracy", "token_accuracy")]
        size = statistics.mean(result["kv_bytes_per_1024"] for result in found)
        lines.append(f"| {arm} | {sparsity:.0%} | {columns[0]} | {columns[1]} | {size:,.0f} | {len(found)} |")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def main() -> None:
    """Fill in what is missing of the seeds asked for, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[], help="train what is missing of these")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5], help="shares of streaming heads")
    parser.add_argument("--work", type=Path, help="keep runs there (a temporary folder)")
    asked = parser.parse_args()
    results = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    done = {Cell(result["arm"], result["sparsity"], result["seed"]) for result in results}
    tokenizer = load_tokenizer(BASE)
    with tempfile.TemporaryDirectory(prefix="kvtrain-duo-") as temporary:
        work = asked.work or Path(temporary)
        for cell in cells(asked.seeds, asked.sparsities) if asked.seeds else ():
            if cell not in done:
                figures = recall(choose(cell, work), tokenizer, "heldout", TASK, sequence_length=LENGTH)
                results.append({**cell._asdict(), **figures.__dict__})
                RESULTS.parent.mkdir(parents=True, exist_ok=True)
                with RESULTS.open("a") as file:
                    file.write(json.dumps(results[-1]) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
