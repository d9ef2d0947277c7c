"""The whole road in real processes: fit, SIGKILL, resume to the same bits, export, open elsewhere, generate."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from kvtrain.data.tokenizer import load_tokenizer
from kvtrain.metrics import read_metrics
from tests.hosts import make_host

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Road:
    """How one architecture trains, is killed and goes on.

    Attributes:
        recipe: Under ``recipes/tiny``.
        phases: Their steps, by name. Checkpoints come every third step, so that one lies exactly on a boundary.
        kills: After these steps the run is killed.
        layers: Of the host.
        settings: Of the method, or of a model that has no host.
        data: Of the data, beyond what all roads share.
        opens: Class of the exported model; one that is no host's starts from nothing.
    """

    recipe: str
    phases: dict[str, int]
    kills: tuple[int, ...]
    layers: int = 2
    settings: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    opens: str = "KVLlamaForCausalLM"

    @property
    def steps(self) -> int:
        """Of all phases."""
        return sum(self.phases.values())


# Columns of the metrics that time has no part in.
COMPARED = {"loss", "gradient_norm", "mean_gate", "val_loss", "val_compression", "val_serving_gap"}

# One line an architecture.
ROADS = {
    "dmc": Road("dmc", {"zero_out": 6, "retrofit": 8, "finetune": 6}, (6, 12), settings={"init_bias": 2.0}),
    "lckv": Road("lckv", {"train": 3, "settle": 7}, (3,), 4, {"kv_map": "0_2_2_3", "forward_passes": 2}),
    "duo": Road(
        "duo",
        {"gates": 8},
        (3,),
        settings={"sink": 2, "recent": 8},
        data={"task": {"passkeys": 1, "words": 2}, "shortest": 112},
    ),
    "transnormer": Road(
        "transnormer_t1",
        {"pretrain": 8},
        (3,),
        settings={"hidden_size": 32, "num_hidden_layers": 3, "hidden_dropout": 0.1, "block_size": 16},
        opens="TransNormerForCausalLM",
    ),
}


@pytest.fixture(params=list(ROADS))
def road(request):
    return ROADS[request.param]


@pytest.fixture
def base(road, tmp_path):
    folder = tmp_path / "base"
    host = make_host("llama", dtype=torch.float32, layers=road.layers, vocab_size=4096, tie_word_embeddings=True)
    host.save_pretrained(folder)
    load_tokenizer("kvtrain:tiny").save_pretrained(folder)
    return folder


def command(*arguments):
    return [sys.executable, "-m", "kvtrain_cli", *map(str, arguments)]


def fit_command(road, base, run, resume=False):
    curve = {"learning_rate": 1e-3, "final_learning_rate": 1e-4, "initial_learning_rate": 0, "decay_steps": None}
    phases = [{"name": name, "steps": steps, "warmup_steps": 0, **curve} for name, steps in road.phases.items()]
    settings = {
        "trainer.default_root_dir": run,
        "trainer.max_steps": road.steps,
        "trainer.checkpoint_every": 3,
        "trainer.log_every_n_steps": 1,
        "trainer.val_check_interval": 10,
        "trainer.accumulate_grad_batches": 2,
        "trainer.num_threads": 1,
        "model.init_args.phases": json.dumps(phases),
        "data.sequence_length": 128,
        "data.batch_size": 4,
        "data.validation_rows": 4,
    }
    part = "method" if road.opens.startswith("KV") else "config"
    if part == "method":
        settings["model.init_args.base"] = base
    settings |= {f"model.init_args.{part}.{name}": value for name, value in road.settings.items()}
    settings |= {f"data.init_args.{name}": value for name, value in road.data.items()}
    if road.data:  # of another class, whose tokenizer is another model's
        settings["data.init_args.tokenizer"] = base
    options = [word for key, value in settings.items() for word in (f"--{key}", value)]
    resuming = ["--ckpt_path", "last"] if resume else []
    return command("fit", "--config", ROOT / f"recipes/tiny/{road.recipe}.yaml", *options, *resuming)


def run(arguments, **settings):
    return subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=280, check=True, **settings)


@contextmanager
def beside(arguments, log):
    """Run a command next to what the block does; at its end the command must have succeeded."""
    with log.open("w") as file:
        process = subprocess.Popen(arguments, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
    try:
        yield
        assert process.wait(timeout=280) == 0, log.read_text()[-3000:]
    finally:
        process.kill()


def weights(run_folder, steps):
    checkpoint = torch.load(run_folder / "checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == steps
    return checkpoint["state_dict"]


def kill_after(arguments, run_folder, step):
    """Start a run and kill it, without mercy, once a checkpoint of at least ``step`` steps exists."""
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        saved = [int(path.stem.split("-")[1]) for path in run_folder.glob("checkpoints/step-*.ckpt")]
        if max(saved, default=0) >= step:
            break
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def test_the_road(road, base, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    with beside(fit_command(road, base, whole), tmp_path / "whole.log"):
        for number, step in enumerate(road.kills):
            kill_after(fit_command(road, base, killed, resume=number > 0), killed, step)
        run(fit_command(road, base, killed, resume=True))
    expected, resumed = weights(whole, road.steps), weights(killed, road.steps)
    assert expected.keys() == resumed.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, resumed[name]), name
    # A kill between a checkpoint and its step's row of metrics loses that row, and nothing else.
    rows = [{int(row["step"]): row for row in read_metrics(path)} for path in (whole, killed)]
    assert len(rows[0]) == road.steps and len(rows[1]) >= road.steps - len(road.kills)
    for step, row in rows[1].items():
        for name in COMPARED & row.keys():
            assert row[name] == rows[0][step][name], (step, name)

    exported = tmp_path / "exported"
    run(command("export", killed, exported))
    program = (
        "import sys, json, torch, kvtrain\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "ids = torch.arange(5, 45)[None]\n"
        "out = model.generate(ids, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)\n"
        "cache = out.past_key_values\n"
        "print(json.dumps([type(model).__name__, out.sequences[0].tolist(), cache.kv_bytes()]))\n"
    )
    opened = run([sys.executable, "-c", program, str(exported)]).stdout.splitlines()[-1]
    name, sequence, kv_bytes = json.loads(opened)
    assert name == road.opens and len(sequence) == 48 and kv_bytes > 0

    import kvtrain

    model = kvtrain.load(str(exported))
    ids = torch.arange(5, 45)[None]
    assert model.generate(ids, max_new_tokens=8, do_sample=False)[0].tolist() == sequence
