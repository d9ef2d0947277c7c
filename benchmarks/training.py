"""Trainings of benchmarks: recipes of ``recipes/tiny`` with other bases, sizes and data, in runs that go on."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from kvtrain.kernels.dispatch import cpu_has_bfloat16

ROOT = Path(__file__).resolve().parent.parent
DMS_COMPRESSION = {2: 2.08, 4: 4.4, 8: 9.8}  # beside a window of 16 it leaves this part of 1,024 tokens
_STEPS = ("steps", "warmup_steps", "decay_steps")  # of a phase


def read_recipe(name: str) -> dict[str, Any]:
    """A recipe of the packaged models."""
    content: dict[str, Any] = yaml.safe_load((ROOT / "recipes" / "tiny" / f"{name}.yaml").read_text())
    return content


def config(
    recipe: str,
    run: Path,
    *,
    steps: int,
    seed: int,
    data: Mapping[str, Any],
    changes: Mapping[str, Any],
    base: str | None = None,
) -> dict[str, Any]:
    """What ``kvtrain fit`` reads: a recipe on a base, with data and a schedule of its own, on a GPU where there is one.

    Args:
        recipe: Its name in ``recipes/tiny``.
        run: Where the run goes.
        steps: Of all phases together, which are stretched to them.
        seed: Of everything but the data.
        data: What stands in the recipe's place for them.
        changes: Settings of the module by dotted names.
        base: Folder or name; None trains a model from nothing.
    """
    content = read_recipe(recipe)
    init = content["model"]["init_args"]
    init |= {"seed": seed} if base is None else {"seed": seed, "base": base}
    for name, value in changes.items():
        place, _, last = name.rpartition(".")
        (init[place] if place else init)[last] = value
    init["phases"] = stretched(init["phases"], steps)
    own = {"val_check_interval": max(1, steps // 2), "checkpoint_every": max(1, steps // 20)}
    content["trainer"] |= {"default_root_dir": str(run), "max_steps": steps, "accelerator": "auto", **own}
    if not torch.cuda.is_available() and not cpu_has_bfloat16():
        content["trainer"]["precision"] = "32-true"
    return {**content, "seed_everything": seed, "data": dict(data)}


def stretched(phases: list[dict[str, Any]], steps: int) -> list[dict[str, Any]]:
    """Phases over all steps."""
    factor = steps / sum(phase["steps"] for phase in phases)
    scaled = [{k: round(v * factor) if k in _STEPS else v for k, v in phase.items()} for phase in phases]
    scaled[-1]["steps"] += steps - sum(phase["steps"] for phase in scaled)  # what rounding left
    return scaled


def train(run: Path, content: Mapping[str, Any]) -> Path:
    """A run, trained to its end; one that was stopped goes on.

    Args:
        run: Its folder.
        content: Of ``config``.
    """
    run.mkdir(parents=True, exist_ok=True)
    settings = run / "asked.yaml"
    settings.write_text(yaml.safe_dump(dict(content)))
    begun = ("--ckpt_path", "last") if any((run / "checkpoints").glob("*")) else ()
    kvtrain("fit", "--config", str(settings), *begun)
    return run


def export(run: Path) -> Path:
    """The model of a run that is over, as a folder; written once."""
    exported = run / "exported"
    if not exported.exists():
        kvtrain("export", str(run), str(exported))
    return exported


def kvtrain(*arguments: str) -> None:
    """Run a command; its output goes to the terminal.

    Raises:
        SystemExit: It failed.
    """
    if subprocess.run([sys.executable, str(ROOT / "kvtrain_cli.py"), *arguments], cwd=ROOT, check=False).returncode:
        raise SystemExit(f"kvtrain {arguments[0]} failed")
