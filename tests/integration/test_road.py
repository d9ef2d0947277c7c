"""The whole road in real processes: fit, SIGKILL, resume to the same bits, export, open elsewhere, generate."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from kvtrain.data.tokenizer import load_tokenizer
from kvtrain.metrics import read_metrics
from tests.hosts import make_host

ROOT = Path(__file__).resolve().parents[2]
STEPS = 20
# Phase boundaries at 6 and 14, checkpoints at 3, 6, 9 ...: a checkpoint lies exactly on a boundary.
PHASES = (
    "[{name: zero_out, steps: 6, learning_rate: 1.0e-3}, {name: retrofit, steps: 8, learning_rate: 2.0e-3}, "
    "{name: finetune, steps: 6, learning_rate: 1.0e-3, final_learning_rate: 1.0e-4}]"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_host("llama", dtype=torch.float32, vocab_size=4096, tie_word_embeddings=True).save_pretrained(folder)
    load_tokenizer("kvtrain:tiny").save_pretrained(folder)
    return folder


def command(*arguments):
    return [sys.executable, "-m", "kvtrain_cli", *map(str, arguments)]


def fit_command(base, run, *extra):
    settings = {
        "trainer.default_root_dir": run,
        "trainer.max_steps": STEPS,
        "trainer.checkpoint_every": 3,
        "trainer.log_every_n_steps": 1,
        "trainer.val_check_interval": 10,
        "trainer.accumulate_grad_batches": 2,
        "trainer.num_threads": 1,
        "model.init_args.base": base,
        "model.init_args.phases": PHASES,
        "model.init_args.method.init_bias": 2.0,
        "data.sequence_length": 128,
        "data.batch_size": 4,
        "data.validation_rows": 4,
    }
    options = [word for key, value in settings.items() for word in (f"--{key}", value)]
    return command("fit", "--config", ROOT / "recipes/tiny/dmc.yaml", *options, *extra)


def run(arguments, **settings):
    return subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=280, check=True, **settings)


def weights(run_folder):
    checkpoint = torch.load(run_folder / "checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == STEPS
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


def test_the_road(base, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(fit_command(base, whole))
    kill_after(fit_command(base, killed), killed, 6)
    kill_after(fit_command(base, killed, "--ckpt_path", "last"), killed, 12)
    run(fit_command(base, killed, "--ckpt_path", "last"))
    expected, resumed = weights(whole), weights(killed)
    assert expected.keys() == resumed.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, resumed[name]), name
    # A kill between a checkpoint and its step's row of metrics loses that row, and nothing else.
    rows = [{int(row["step"]): row for row in read_metrics(path)} for path in (whole, killed)]
    assert len(rows[0]) == STEPS and len(rows[1]) >= STEPS - 2
    for step, row in rows[1].items():
        assert row["loss"] == rows[0][step]["loss"]

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
    assert name == "KVLlamaForCausalLM" and len(sequence) == 48 and kv_bytes > 0

    import kvtrain

    model = kvtrain.load(str(exported))
    ids = torch.arange(5, 45)[None]
    assert model.generate(ids, max_new_tokens=8, do_sample=False)[0].tolist() == sequence
