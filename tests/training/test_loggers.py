"""What a recipe may ask for beside ``metrics.csv``: loggers and profilers in a word, below the run folder."""

import importlib.util
import time
from types import SimpleNamespace

import pytest
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.profilers import PyTorchProfiler, SimpleProfiler

from kvtrain.errors import UsageError
from kvtrain.training.csv_logger import CSVMetrics
from kvtrain.training.loggers import RunWandb, run_loggers, run_profiler
from tests.training.small_runs import fit, recipe_text, refused, write_place

TENSORBOARD_INSTALLED = importlib.util.find_spec("tensorboard") is not None


@pytest.fixture
def recipe(tmp_path):
    write_place(tmp_path)
    path = tmp_path / "r.yaml"
    path.write_text(recipe_text(tmp_path, tmp_path / "run").replace("val_check_interval: 8", "limit_val_batches: 0"))
    return path


def test_metrics_csv_is_written_beside_all_others(tmp_path):
    own = CSVLogger(str(tmp_path))
    assert [type(logger) for logger in run_loggers(tmp_path, None)] == [CSVMetrics]
    assert [type(logger) for logger in run_loggers(tmp_path, True)] == [CSVMetrics]
    assert run_loggers(tmp_path, own)[1:] == run_loggers(tmp_path, [own])[1:] == [own]
    assert run_loggers(tmp_path, False) is False


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_logger_that_is_not_installed_is_named_with_its_extra(tmp_path, monkeypatch, name):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UsageError) as refusal:
        run_loggers(tmp_path, [name])
    assert str(refusal.value) == f"trainer.logger: {name} is not installed: pip install 'kvtrain[{name}]'"


@pytest.mark.skipif(TENSORBOARD_INSTALLED, reason="TensorBoard is installed")
def test_the_command_line_says_so_in_a_line(recipe, capsys):
    answer = refused(capsys, "fit", "--config", str(recipe), "--trainer.logger", "tensorboard")
    assert answer == "trainer.logger: tensorboard is not installed: pip install 'kvtrain[tensorboard]'"
    assert not (recipe.parent / "run").exists()


def test_a_profile_lies_in_the_run_folder(tmp_path):
    simple = run_profiler(tmp_path, "simple")
    assert isinstance(simple, SimpleProfiler) and simple.dirpath == str(tmp_path / "profile")
    assert isinstance(run_profiler(tmp_path, "pytorch"), PyTorchProfiler)
    assert run_profiler(tmp_path, simple) is simple
    assert run_profiler(tmp_path, None) is None
    with pytest.raises(UsageError, match=r"unknown trainer\.profiler 'simpel'\. Did you mean 'simple'"):
        run_profiler(tmp_path, "simpel")


def test_profilers_write_where_the_run_is(recipe):
    run = recipe.parent / "run"
    assert fit(recipe, "--trainer.max_steps", "2", "--trainer.profiler", "simple") == 0
    (profile,) = (run / "profile").iterdir()
    assert profile.name == "fit-simple.txt"
    assert "[Strategy]SingleDeviceStrategy.training_step" in profile.read_text()
    assert fit(recipe, "--trainer.max_steps", "4", "--trainer.profiler", "pytorch", "--ckpt_path", "last") == 0
    assert "ProfilerStep*" in (run / "profile" / "fit-pytorch.txt").read_text()  # of operators the costliest alone
    (trace,) = (run / "profile").glob("fit-pytorch-*training_step*.pt.trace.json")
    assert "aten::" in trace.read_text()
    assert {path.name for path in run.iterdir()} == {"profile", "checkpoints", "config.yaml", "metrics.csv"}


def written(record, word, seconds=30):
    """What wandb's own process has written, once a word is in it."""
    until = time.monotonic() + seconds
    while word not in record.read_bytes():
        assert time.monotonic() < until, f"{record} has {record.stat().st_size} bytes without {word}"
        time.sleep(0.1)
    return record.read_bytes()


def test_an_empty_id_is_none(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    (tmp_path / "wandb_id").touch()  # as a kill could leave it
    logger = RunWandb(tmp_path)
    assert logger.version is None
    monkeypatch.setattr(logger, "_experiment", SimpleNamespace(id="abc", log=lambda *_, **__: None))
    monkeypatch.setattr(RunWandb, "experiment", property(lambda self: self._experiment))
    logger.log_metrics({"loss": 1.0}, 0)
    assert (tmp_path / "wandb_id").read_text() == "abc\n"
    assert RunWandb(tmp_path).version == "abc"


@pytest.mark.roads
def test_wandb_keeps_a_run_s_id_when_it_goes_on(recipe, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = recipe.parent / "run"
    assert fit(recipe, "--trainer.max_steps", "3", "--trainer.logger", "wandb") == 0
    wandb.finish()  # as a process that ends
    name = (run / "wandb_id").read_text().strip()
    assert fit(recipe, "--trainer.max_steps", "6", "--trainer.logger", "[wandb]", "--ckpt_path", "last") == 0
    wandb.finish()
    assert (run / "wandb_id").read_text().strip() == name
    records = sorted((run / "wandb").glob("offline-run-*/*.wandb"))
    assert [record.name for record in records] == [f"run-{name}.wandb"] * 2
    for record in records:
        content = written(record, b"tokens_per_second")
        assert b"model_config" in content  # of the recipe, as the run's configuration


@pytest.mark.roads
@pytest.mark.skipif(not TENSORBOARD_INSTALLED, reason="needs TensorBoard: pip install kvtrain[tensorboard]")
def test_tensorboard_has_the_metrics_of_every_step(recipe):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert fit(recipe, "--trainer.max_steps", "3", "--trainer.logger", "tensorboard") == 0
    events = EventAccumulator(str(recipe.parent / "run" / "tensorboard"))
    events.Reload()
    losses = events.Scalars("loss")
    assert [event.step for event in losses] == [0, 1, 2]
    assert losses[-1].value < losses[0].value
