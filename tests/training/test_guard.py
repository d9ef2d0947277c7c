"""Numbers that are not finite never reach weights or moments, whatever they come from."""

import json
import logging
import math
import os
import socket
import subprocess
import sys

import lightning.pytorch as pl
import pytest
import torch
import yaml

from kvtrain.data.loader import PackedLoader
from kvtrain.training.callbacks.guard import NonFiniteError
from kvtrain.training.cli import read_recipe
from kvtrain.training.strategies import DEEPSPEED_INSTALLED
from kvtrain.training.trainer import KVTrainer

from .planted import PlantedFull
from .small_runs import ROOT, fit, refused
from .tiny_runs import BATCH, TinyDMC, TinyFull, make_rows, table, train, weights

WINDOW, STEPS, BAD = 2, 4, 1  # the second of four steps meets the row


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return make_rows(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def window(rows):
    """Row ids of the step that goes wrong, batch by batch."""
    batches = list(PackedLoader(rows, BATCH, seed=0, window=WINDOW))
    return [batch["row_ids"].tolist() for batch in batches[BAD * WINDOW : (BAD + 1) * WINDOW]]


class Watch(pl.Callback):
    """Notes weights and AdamW's state after every optimizer step."""

    def __init__(self):
        self.weights, self.steps, self.finite = [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            states = list(trainer.optimizers[0].state.values())
            self.weights.append(weights(pl_module))
            self.steps.append(int(states[0]["step"]) if states else 0)
            self.finite.append(all(value.isfinite().all() for state in states for value in state.values()))


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def run(what, row, rows, folder, steps=STEPS, **settings):
    watch = Watch()
    module = PlantedFull(what, row)
    train(module, rows, folder, steps, callbacks=[watch], accumulate_grad_batches=WINDOW, **settings)
    return module, watch


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_skip_drops_the_whole_step_and_goes_on(rows, window, tmp_path, caplog, what, clip):
    with caplog.at_level(logging.WARNING, logger="kvtrain"):
        module, watch = run(what, window[0][1], rows, tmp_path, non_finite="skip", gradient_clip_val=clip)
    assert same(watch.weights[BAD], watch.weights[BAD - 1])
    assert not same(watch.weights[BAD + 1], watch.weights[BAD])
    assert (watch.steps, watch.finite) == ([1, 1, 2, 3], [True] * STEPS)
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    logged = table(tmp_path / "metrics.csv")
    assert [row["skipped_steps"] for row in logged] == [0, 1, 1, 1]
    assert [torch.tensor(row["gradient_norm"]).isfinite().item() for row in logged] == [True, False, True, True]
    guilty = sorted(window[0] if what == "loss" else window[0] + window[1])
    assert caplog.messages == [
        f"step {BAD + 1}: the {what} is not finite, from rows {', '.join(map(str, guilty))}; "
        "the weights are as they were before it"
    ]


def test_a_finite_run_is_left_alone(rows, tmp_path):
    ends = [weights(run("nothing", 0, rows, tmp_path / str(p), non_finite=p)[0]) for p in ("off", "skip", "stop")]
    assert same(ends[0], ends[1]) and same(ends[0], ends[2])


def test_off_lets_everything_through(rows, window, tmp_path):
    _, watch = run("gradient", window[0][0], rows, tmp_path, non_finite="off")
    assert watch.finite == [True, False, False, False]
    assert "skipped_steps" not in table(tmp_path / "metrics.csv")[-1]


def test_stop_names_step_rows_and_the_last_good_checkpoint(rows, window, tmp_path):
    saving = {"enable_checkpointing": True, "checkpoint_every": 1}
    with pytest.raises(NonFiniteError) as error:
        run("loss", window[1][0], rows, tmp_path, **saving)
    good = tmp_path / "checkpoints" / "step-000001.ckpt"
    assert str(error.value) == (
        f"step 2: the loss is not finite, from rows {', '.join(map(str, sorted(window[1])))}; the weights are as they "
        f"were before it; the last good checkpoint is {good}; lower the learning rate, or go on with "
        "--trainer.non_finite skip"
    )
    assert sorted(path.name for path in good.parent.glob("step-*")) == [good.name]


def test_a_stopped_run_goes_on_as_one_that_skips(rows, window, tmp_path):
    saving = {"enable_checkpointing": True, "checkpoint_every": 1}
    whole, _ = run("loss", window[1][0], rows, tmp_path / "whole", non_finite="skip", **saving)
    with pytest.raises(NonFiniteError):
        run("loss", window[1][0], rows, tmp_path / "run", **saving)
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    resumed, _ = run("loss", window[1][0], rows, tmp_path / "run", 3, non_finite="skip", ckpt_path=last, **saving)
    resumed, _ = run("loss", window[1][0], rows, tmp_path / "run", non_finite="skip", ckpt_path=last, **saving)
    assert same(weights(resumed), weights(whole))
    assert [row["skipped_steps"] for row in table(tmp_path / "run" / "metrics.csv")[1:]] == [1, 1, 1]


class AllBad(pl.Callback):
    """From some optimizer step on, none has a loss that is finite, but for those named."""

    def __init__(self, first, good=()):
        self.first, self.good = first, good

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step >= self.first and trainer.global_step not in self.good:
            batch["num_items"].zero_()


def test_skipping_ends_after_so_many_in_a_row(rows, tmp_path):
    """Good steps begin the count anew, and a resumed run goes on counting."""
    module, saving = TinyFull(), {"enable_checkpointing": True, "checkpoint_every": 5}
    kwargs = {"non_finite": "skip", "max_consecutive_skips": 3, **saving}
    with pytest.raises(NonFiniteError) as error:
        train(module, rows, tmp_path, 20, callbacks=[AllBad(2, good=(4,))], **kwargs)
    assert module.global_step == 7
    good = tmp_path / "checkpoints" / "step-000005.ckpt"
    assert "step 8: the loss is not finite" in str(error.value)
    assert "3 steps in a row were skipped (trainer.max_consecutive_skips)" in str(error.value)
    assert f"the last good checkpoint is {good}; lower the learning rate, and look at" in str(error.value)
    train(TinyFull(), rows, tmp_path, 7, ckpt_path=good, callbacks=[AllBad(5)], **kwargs)
    last = tmp_path / "checkpoints" / "last.ckpt"
    with pytest.raises(NonFiniteError, match=r"step 8: .* 3 steps in a row"):
        train(TinyFull(), rows, tmp_path, 20, ckpt_path=last, callbacks=[AllBad(5)], **kwargs)


PLANTED_CALLBACK = """
import lightning.pytorch as pl

class Divide(pl.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 9:
            batch["num_items"].zero_()
"""


def test_the_command_line_says_it_in_a_line(recipe, place, capsys):
    (place / "planted_divide.py").write_text(PLANTED_CALLBACK)
    callback = json.dumps([{"class_path": "planted_divide.Divide"}])
    assert fit(recipe, "--trainer.callbacks", callback) == 2
    answer = capsys.readouterr().err.splitlines()[-1]
    assert answer.startswith("kvtrain: error: step 5: the loss is not finite, from rows ")
    assert f"the last good checkpoint is {recipe.parent / 'run' / 'checkpoints' / 'step-000003.ckpt'};" in answer


@pytest.mark.parametrize(
    ("text", "policy"), [("off", False), ("'off'", "off"), ("skip", "skip"), ("stop", "stop"), (None, "stop")]
)
def test_a_recipe_says_the_policy(recipe, text, policy):
    content = recipe.read_text()
    if text is not None:
        content = content.replace("trainer:\n", f"trainer:\n  non_finite: {text}\n")
        assert yaml.safe_load(content)["trainer"]["non_finite"] == policy
    recipe.write_text(content)
    assert read_recipe(["--config", str(recipe)]).trainer["non_finite"] == policy


def test_another_policy_is_refused(recipe, capsys):
    with pytest.raises(ValueError, match="must be off, skip or stop, not 'maybe'"):
        KVTrainer(non_finite="maybe")
    answer = refused(capsys, "fit", "--config", str(recipe), "--trainer.non_finite", "maybe")
    assert answer == "trainer.non_finite: expected off, skip, stop or False, got 'maybe'"


def start(strategy, rank, port, folder):
    """One of two ranks."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-m", "tests.training.guard_worker", strategy, str(folder)],
        cwd=ROOT,
        env={**os.environ, **shared, "PYTHONPATH": path, "LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": "2"},
        stdout=(folder / f"log{rank}").open("w"),
        stderr=subprocess.STDOUT,
    )


@pytest.fixture(scope="module")
def one_process(rows, tmp_path_factory):
    """What a process by itself finds, which takes twice as many batches a step as two ranks do."""
    norm, heads = (tmp_path_factory.mktemp(name) for name in ("norm", "heads"))
    train(PlantedFull("nothing", 0), rows, norm, 1, accumulate_grad_batches=2 * WINDOW)
    looking = {"limit_val_batches": 1.0, "val_check_interval": 4 * WINDOW}
    train(TinyDMC(), rows, heads, 2, accumulate_grad_batches=2 * WINDOW, **looking)
    return {
        "norm": table(norm / "metrics.csv")[0]["gradient_norm"],
        "heads": [row["merged_fraction"] for row in table(heads / "head_compression.csv")],
    }


@pytest.mark.roads
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "strategy",
    [
        "ddp",
        pytest.param("fsdp2", marks=pytest.mark.slow),
        *(
            pytest.param(strategy, marks=pytest.mark.skipif(not DEEPSPEED_INSTALLED, reason="needs DeepSpeed"))
            for strategy in ("zero2", "zero3")
        ),
    ],
)
def test_ranks_drop_a_step_together(tmp_path, one_process, strategy):
    """The row lies on the second rank alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [start(strategy, rank, port, tmp_path) for rank in range(2)]
    try:
        codes = [process.wait(timeout=500) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert codes == [0, 0], (tmp_path / "log0").read_text()[-3000:]
    if strategy == "ddp":
        heads = [row["merged_fraction"] for row in table(tmp_path / "heads" / "head_compression.csv")]
        assert heads == pytest.approx(one_process["heads"], abs=0.01)
    results = [json.loads((tmp_path / f"results{rank}.json").read_text()) for rank in range(2)]
    assert results[0] == results[1]
    for what in ("loss", "gradient"):
        found = results[0][what]
        assert found["moved"] == [True, False, True, True]
        assert found["finite"] and found["checks"] and found["skipped"] == 1
        assert [math.isfinite(norm) for norm in found["norms"]] == [True, False, True, True]
        assert found["norms"][0] == pytest.approx(one_process["norm"], rel=1e-5)
        rows = found["guilty" if what == "loss" else "everyone"]
        expected = f"step 2: the {what} is not finite, from rows {', '.join(map(str, rows))}; the weights"
        assert found["stopped"].startswith(expected)
