"""What is kept of a run besides its last state: the best one, and a manifest that tells what was written."""

import errno
import hashlib
import json
import os
import signal
from dataclasses import asdict, replace

import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.strategies import SingleDeviceStrategy

from kvtrain import durable, run_folder
from kvtrain.cli import main
from kvtrain.errors import UsageError
from kvtrain.models.dmc import DMC
from kvtrain.run_lock import FILE_NAME, Owner
from kvtrain.training import DMCModule, Phase, checkpoint_io
from kvtrain.training.callbacks import checkpoints
from kvtrain.training.callbacks.head_compression import HeadCompression
from kvtrain.training.trainer import KVTrainer
from tests.training.measured import MEASURED

from .small_runs import fit, refused, steps_saved
from .tiny_runs import RowsData, TinyDMC, TinyFull, make_rows, table, train


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return make_rows(tmp_path_factory.mktemp("shards"))


def saved(folder, rows, steps=12, rates=(1e-2, 0.3), **settings):
    """A checkpoint every third step, a validation every second one; from the seventh step on it unlearns."""
    defaults = {"enable_checkpointing": True, "checkpoint_every": 3, "limit_val_batches": 1.0, "val_check_interval": 2}
    phases = [Phase("learn", 6, rates[0]), Phase("unlearn", 6, rates[1])]
    return train(TinyFull(phases), rows, folder, steps, **{**defaults, **settings})


def held_out(folder):
    """Perplexities by the number of steps behind them."""
    logged = table(folder / "metrics.csv")
    return {int(row["step"]) + 1: row["val_perplexity"] for row in logged if "val_perplexity" in row}


@pytest.fixture(scope="module")
def run(rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    saved(folder, rows)
    return folder


def test_the_best_step_that_was_saved_and_validated_is_kept(run):
    perplexities = held_out(run)
    assert sorted(perplexities) == [2, 4, 6, 8, 10, 12]
    assert perplexities[6] < perplexities[12]
    assert run_folder.best_checkpoint(run) == run / "checkpoints" / "step-000006.ckpt"
    assert steps_saved(run) == [6, 9, 12]
    assert torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)["global_step"] == 6


def test_the_manifest_tells_what_was_written(run):
    manifest = json.loads((run / "checkpoints" / "manifest.json").read_text())
    assert list(manifest) == [f"step-{step:06d}.ckpt" for step in (6, 9, 12)]
    for name, entry in manifest.items():
        content = (run / "checkpoints" / name).read_bytes()
        assert entry["step"] == int(name[5:11])
        assert entry["files"] == {name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}}
    perplexities = held_out(run)
    rated = [entry["val_perplexity"] for entry in manifest.values()]
    assert rated == [pytest.approx(perplexities[6]), None, pytest.approx(perplexities[12])]


def test_validations_between_checkpoints_rate_none(rows, tmp_path):
    saved(tmp_path, rows, 5)
    assert sorted(held_out(tmp_path)) == [2, 4]
    assert run_folder.best_checkpoint(tmp_path) is None
    assert [entry["val_perplexity"] for entry in run_folder.read_manifest(tmp_path / "checkpoints").values()] == [
        None
    ] * 2


def test_a_resumed_run_knows_what_was_best(rows, tmp_path, run):
    saved(tmp_path, rows, 9)
    assert run_folder.step_of(run_folder.best_checkpoint(tmp_path)) == 6
    trainer = saved(tmp_path, rows, 12, ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    assert run_folder.step_of(run_folder.best_checkpoint(tmp_path)) == 6
    assert held_out(tmp_path) == held_out(run)
    whole = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    ours = trainer.lightning_module.state_dict()
    assert [name for name in whole if not torch.equal(ours[name], whole[name])] == []


def test_what_another_future_left_is_not_rated_anew(rows, tmp_path):
    """Back at step 3, with another learning rate, and step 6 validated without being saved again."""
    saved(tmp_path, rows, 6)
    before = run_folder.read_manifest(tmp_path / "checkpoints")["step-000006.ckpt"]
    again = {"ckpt_path": run_folder.step_path(tmp_path, 3), "checkpoint_every": 100, "rates": (1e-4, 1e-4)}
    saved(tmp_path, rows, 7, **again)
    assert abs(held_out(tmp_path)[6] - before["val_perplexity"]) > 1
    assert run_folder.read_manifest(tmp_path / "checkpoints")["step-000006.ckpt"] == before


def test_a_run_from_python_holds_its_folder(rows, tmp_path):
    owner = json.dumps(asdict(replace(Owner.this_process(), host="elsewhere")))
    (tmp_path / FILE_NAME).write_text(owner)
    with pytest.raises(UsageError, match=r"is in use by process \d+ on elsewhere"):
        saved(tmp_path, rows, 3)
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]
    saved(tmp_path, rows, 1, enable_checkpointing=False, logger=False)  # writes nothing
    (tmp_path / FILE_NAME).unlink()
    held = []
    watch = LambdaCallback(on_train_start=lambda *_: held.append((tmp_path / FILE_NAME).exists()))
    saved(tmp_path, rows, 3, callbacks=[watch])
    assert held == [True] and not (tmp_path / FILE_NAME).exists()


@pytest.mark.parametrize("step", [6, 12])
def test_a_signal_in_a_validation_does_not_wait_for_its_end(rows, tmp_path, run, step):
    """Where the step is saved; the validation is made up for, as a whole, whatever is looked at before training."""
    seen = []

    def ask(trainer, *_):
        seen.append(trainer.global_step)
        if seen[-1] == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as stop:
        saved(tmp_path, rows, callbacks=[LambdaCallback(on_validation_batch_end=ask)])
    batches = seen.count(2)
    validated = [earlier for earlier in range(2, step, 2) for _ in range(batches)]
    assert stop.value.code == 143 and batches > 1 and seen == [*validated, step]
    last = run_folder.last_checkpoint(tmp_path)
    assert run_folder.step_of(last) == step
    saved(tmp_path, rows, ckpt_path=last, num_sanity_val_steps=1)
    assert held_out(tmp_path) == held_out(run)
    assert ratings(tmp_path) == ratings(run)


def test_going_on_from_the_best(recipe, capsys):
    assert fit(recipe) == 0
    run = recipe.parent / "run"
    assert run_folder.step_of(run_folder.best_checkpoint(run)) == 12
    arguments = ["validate", "--config", str(recipe), "--ckpt_path", "best"]
    capsys.readouterr()
    assert main(arguments) == 0
    figures = capsys.readouterr().out.split()
    assert float(figures[3]) == pytest.approx(held_out(run)[12], rel=1e-4)
    run_folder.point_best(run_folder.step_path(run, 9))
    assert fit(recipe, "--ckpt_path", "best") == 0
    assert "12 steps from 9 of 128 tokens" in capsys.readouterr().err
    durable.remove(run / "checkpoints" / "best.ckpt")
    assert "has no best checkpoint" in refused(capsys, *arguments)


def test_a_checkpoint_is_measured_in_its_own_phase(rows, tmp_path):
    """Not in the first one, in which the borrowed channel still takes part in attention."""

    class Phased(TinyDMC):
        def __init__(self):
            phases = [Phase(name, steps, 1e-2) for name, steps in (("zero_out", 4), ("retrofit", 4), ("finetune", 4))]
            DMCModule.__init__(self, "unused", DMC(compression=2.0, window=4), phases=phases, seed=3)

    settings = {"limit_val_batches": 1.0, "val_check_interval": 6, "enable_checkpointing": True, "checkpoint_every": 6}
    train(Phased(), rows, tmp_path, 12, **settings)
    logged = {int(row["step"]) + 1: row["val_loss"] for row in table(tmp_path / "metrics.csv") if "val_loss" in row}
    for step in (6, 12):
        module = Phased()
        trainer = KVTrainer(default_root_dir=str(tmp_path), accelerator="cpu", devices=1, enable_progress_bar=False)
        path = run_folder.step_path(tmp_path, step)
        trainer.validate(module, RowsData(rows), ckpt_path=path, verbose=False, weights_only=True)
        assert trainer.callback_metrics["val_loss"].item() == pytest.approx(logged[step], rel=1e-6), step


def test_a_flipped_byte_is_refused(recipe, capsys):
    assert fit(recipe) == 0
    last, other = (run_folder.step_path(recipe.parent / "run", step) for step in (12, 9))
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.write_bytes(content)
    capsys.readouterr()
    for command, asked in (("fit", str(last)), ("validate", "last")):
        answer = refused(capsys, command, "--config", str(recipe), "--ckpt_path", asked)
        assert answer == f"{last}: damaged, it is not what manifest.json says was written; try --ckpt_path {other}"
    for source in (recipe.parent / "run", last):
        answer = refused(capsys, "export", str(source), str(recipe.parent / "exported"))
        assert answer == f"{last}: damaged, it is not what manifest.json says was written; try {other}"
    assert not (recipe.parent / "exported").exists()
    assert main(["export", str(other), str(recipe.parent / "exported")]) == 0
    assert fit(recipe, "--ckpt_path", str(other)) == 0
    assert run_folder.resolve_checkpoint(recipe.parent / "run", "last") == last


class Killed(BaseException):
    """Nothing may catch it."""


def kill_in(patch, owner, name, call):
    """Let the process die when something is called for the so-manieth time; nothing is tidied up after a kill."""
    calls, original = iter(range(1, 1000)), getattr(owner, name)

    def killed(*arguments, **settings):
        if next(calls) == call:
            raise Killed
        return original(*arguments, **settings)

    patch.setattr(owner, name, killed)
    patch.setattr(checkpoints.RunCheckpoint, "on_exception", lambda *_: None)


MOMENTS = [
    (checkpoints, "add_checkpoint", 1),
    (checkpoints, "add_checkpoint", 2),
    (run_folder, "point_last", 2),
    (run_folder, "describe_checkpoint", 2),
    (checkpoints, "prune", 2),
    (TinyDMC, "validation_step", 2 * 3 + 2),
    (HeadCompression, "on_validation_end", 3),
    (checkpoints, "_sync_metrics", 3),
    (checkpoints, "rate_checkpoint", 1),
    (run_folder, "point_best", 1),
    (checkpoints, "prune", 3),
]


@pytest.mark.parametrize(("owner", "name", "call"), MOMENTS)
def test_killing_between_a_step_and_its_figures_loses_none(rows, tmp_path, whole_dmc, owner, name, call):
    """Step 6 is saved and validated: all that is written then, in its order."""
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        kill_in(patch, owner, name, call)
        with pytest.raises(Killed):
            dmc_run(run, rows)
    last = run_folder.last_checkpoint(run)
    assert last is None or run_folder.step_of(last) in (3, 6)
    dmc_run(run, rows, last)
    assert_same_files(run, whole_dmc)


def dmc_run(folder, rows, ckpt_path=None):
    saving = {"enable_checkpointing": True, "checkpoint_every": 3, "limit_val_batches": 1.0, "val_check_interval": 2}
    return train(TinyDMC(), rows, folder, 6, ckpt_path, **saving)


@pytest.fixture(scope="module")
def whole_dmc(rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    dmc_run(folder, rows)
    return folder


def assert_same_files(run, whole):
    """The same bits, figures, ratings and names; times and speeds apart."""
    tables = [[without_measures(row) for row in table(folder / "metrics.csv")] for folder in (run, whole)]
    assert tables[0] == tables[1]
    assert (run / "head_compression.csv").read_text() == (whole / "head_compression.csv").read_text()
    assert sorted(p.name for p in run.rglob("*")) == sorted(p.name for p in whole.rglob("*"))
    assert ratings(run) == ratings(whole)
    ours, theirs = (torch.load(folder / "checkpoints/best.ckpt", weights_only=True) for folder in (run, whole))
    assert ours["global_step"] == theirs["global_step"] == 6
    assert all(torch.equal(ours["state_dict"][name], value) for name, value in theirs["state_dict"].items())


def ratings(run):
    return {name: entry["val_perplexity"] for name, entry in run_folder.read_manifest(run / "checkpoints").items()}


def without_measures(row):
    return {name: value for name, value in row.items() if name not in MEASURED}


@pytest.mark.parametrize(("owner", "name", "call"), [moment for moment in MOMENTS if moment[0] != TinyDMC])
def test_an_interruption_there_keeps_what_is_complete(rows, tmp_path, whole_dmc, monkeypatch, owner, name, call):
    """Unlike a kill it is tidied up after, and a checkpoint that was all written is kept."""
    run, original, calls = tmp_path / "run", getattr(owner, name), iter(range(1, 1000))

    def interrupted(*arguments, **settings):
        if next(calls) == call:
            raise KeyboardInterrupt
        return original(*arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        with pytest.raises(SystemExit):
            dmc_run(run, rows)
    assert list(run.rglob(".*")) == []
    last = run_folder.resolve_checkpoint(run, "last")
    assert run_folder.step_of(last) == (3 if (name, call) in (("add_checkpoint", 1), ("point_last", 2)) else 6)
    dmc_run(run, rows, last)
    assert_same_files(run, whole_dmc)


def test_a_save_that_fails_leaves_nothing_and_the_run_goes_on_later(rows, tmp_path, whole_dmc, monkeypatch):
    """The disk is full in the middle of the second checkpoint."""
    run, writes = tmp_path / "run", checkpoint_io._Stream.write

    def full(self, data):
        if (run / "checkpoints/step-000003.ckpt").exists():
            writes(self, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return writes(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_io._Stream, "write", full)
        with pytest.raises(OSError, match="No space left on device") as raised:
            dmc_run(run, rows)
    assert raised.value.filename == str(run / "checkpoints/.step-000006.ckpt.new")
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "last.ckpt",
        "manifest.json",
        "step-000003.ckpt",
    ]
    dmc_run(run, rows, run / "checkpoints/last.ckpt")
    assert_same_files(run, whole_dmc)


def test_ranks_that_found_different_checkpoints_do_not_train(rows, tmp_path, monkeypatch):
    def reduce(self, tensor, *_, reduce_op="mean", **__):
        return tensor + (reduce_op == "max")

    monkeypatch.setattr(SingleDeviceStrategy, "reduce", reduce)
    with pytest.raises(ValueError, match="ranks go on from different steps, 0 and 1; give a --ckpt_path by name"):
        saved(tmp_path, rows, 3)
