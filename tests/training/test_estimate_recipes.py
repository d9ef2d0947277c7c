"""Estimates of every recipe in the repository: in seconds, and what a rehearsal of all layers comes to."""

import copy
import importlib.util
import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from kvtrain.training.cli import read_recipe
from kvtrain.training.memory_estimate import full_precision_name, measure_step_memory

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
DEPTH = 7
# Transformers imports torchao wherever it is installed, which takes a processor two thirds of a second.
SECONDS = 10 if importlib.util.find_spec("torchao") is None else 11
every_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")


def shallower(module):
    """The module with seven groups of layers of each kind, where it has more."""
    module = copy.deepcopy(module)
    module.simplify({layer for units in module.repeats() for unit in units[DEPTH:] for layer in unit})
    return module


@pytest.mark.roads
@every_recipe
def test_an_estimate_is_what_all_layers_come_to(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    module, data, trainer = read_recipe(["--config", str(path)])
    settings = {
        "batch_size": min(data.batch_size, 2),
        "sequence_length": min(getattr(data, "sequence_length", 1), 512),
        "precision": full_precision_name(trainer["precision"]),
        "accumulates": trainer["accumulate_grad_batches"] > 1,
        "on_cpu": trainer["accelerator"] != "cuda",
    }
    module = shallower(module)
    quick, full = measure_step_memory(module, **settings), measure_step_memory(module, every_layer=True, **settings)
    for figure in ("parameters", "gradients", "optimizer", "teacher"):
        assert getattr(quick, figure) == getattr(full, figure)
    assert quick.activations == pytest.approx(full.activations, rel=1e-3)
    assert quick.peak == pytest.approx(full.peak, rel=1e-3)


@pytest.mark.slow
@every_recipe
def test_an_estimate_takes_seconds(path):
    """Of a processor, imports among them."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "kvtrain", "estimate", "--config", str(path), "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert json.loads(result.stdout)["peak_bytes"] > 10**7
    assert (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime) <= SECONDS
