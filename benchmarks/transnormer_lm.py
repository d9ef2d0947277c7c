"""TransNormer T1 and T2 beside a Llama of as many parameters: quality, speed of training, bytes of state.

All three train by their recipes on the same tokens in the same order, and are measured through their serving caches on
all held-out text, 1,024 tokens a window. Steps are timed by turns in one process, 8 rows of 1,024 tokens in bfloat16
autocast. Runs are kept and go on where they stopped.

    python benchmarks/transnormer_lm.py --runs runs     # three quarters of an hour on two cores
    python benchmarks/transnormer_lm.py                 # print what there is
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from turns import machine, median_seconds

from kvtrain.data.module import PackedDataModule
from kvtrain.evaluation.perplexity import perplexity
from kvtrain.inference.load import open_model
from kvtrain.run_folder import last_checkpoint
from kvtrain.training.cli import read_recipe

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "transnormer_lm.jsonl"
CONTENDERS = {"Llama": "transnormer_llama", "TransNormer T1": "transnormer_t1", "TransNormer T2": "transnormer_t2"}
CONTEXT, ROWS = 4096, 8


def recipe_of(name: str) -> str:
    """Where a contender's recipe lies."""
    return f"recipes/tiny/{CONTENDERS[name]}.yaml"


def trained(name: str, runs: Path) -> Path:
    """The exported folder of a contender, trained as far as it was not."""
    run, exported = runs / CONTENDERS[name], runs / f"{CONTENDERS[name]}-exported"
    if not exported.exists():
        resume = ["--ckpt_path", "last"] if last_checkpoint(run) else []
        fit = ["fit", "--config", recipe_of(name), "--trainer.default_root_dir", str(run), *resume]
        for arguments in (fit, ["export", str(run), str(exported), "--dtype", "float32"]):
            subprocess.run([sys.executable, str(ROOT / "kvtrain_cli.py"), *arguments], cwd=ROOT, check=True)
    return exported


@torch.no_grad()
def state_bytes(model: Any) -> int:
    """Bytes of the serving cache after a row of so many tokens."""
    cache = model.make_cache()
    model(torch.full((1, CONTEXT), 7), past_key_values=cache, logits_to_keep=1)
    return int(cache.kv_bytes())


def step(name: str) -> Any:
    """A function that runs one training step's passes."""
    module = read_recipe(["--config", recipe_of(name)]).module
    module.configure_model()
    batch = PackedDataModule().rows(["stdlib"]).batch(np.arange(ROWS))
    kwargs = {key: batch[key] for key in ("document_ids", "position_ids", "labels")}

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = module.model(batch["input_ids"], use_cache=False, **kwargs).loss
        loss.backward()

    return run


def figures(runs: Path) -> list[dict[str, Any]]:
    """A row for every contender, trained as far as it was not."""
    folders = {name: trained(name, runs) for name in CONTENDERS}
    times = median_seconds({name: step(name) for name in CONTENDERS}, 1, 5)
    rows = []
    for name, folder in folders.items():
        model, tokenizer = open_model(folder, dtype=torch.float32)
        row = {
            "model": name,
            "parameters": model.num_parameters(),
            "held-out perplexity": round(perplexity(model, tokenizer, "heldout").perplexity, 2),
            "tokens/s in training": round(ROWS * 1024 / times[name]),
            "KV bytes after 4,096 tokens": state_bytes(open_model(folder, dtype=torch.bfloat16)[0]),
            "machine": machine(),
        }
        rows.append(row)
    return rows


def main() -> None:
    """Measure if asked to, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, help="train what is missing there, and measure anew")
    if runs := parser.parse_args().runs:
        RESULTS.write_text("".join(json.dumps(row) + "\n" for row in figures(runs.resolve())))
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    print(f"| {' | '.join(rows[0])} |\n{'|---' * len(rows[0])}|")
    for row in rows:
        print(f"| {' | '.join(f'{value:,}' if not isinstance(value, str) else value for value in row.values())} |")


if __name__ == "__main__":
    main()
