"""``kvtrain fit`` and ``validate``: run folders, resuming after every kind of end, pages."""

import csv
import json
import os
import re
import shutil
import signal
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml

from kvtrain import run_folder
from kvtrain.help import FOLDER
from kvtrain.run_lock import Owner
from kvtrain.training.cli import ReadCLI, read_recipe
from kvtrain_cli import main
from tests.thinning import thinned
from tests.training.measured import MEASURED

from .small_runs import STEPS, acting, fit, recipe_text, refused, steps_saved


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def metrics(run: Path) -> list[dict[str, float]]:
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{key: float(v) for key, v in row.items() if v and key not in MEASURED} for row in rows]


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory):
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "recipe.yaml").write_text(recipe_text(place, folder / "run"))
    assert fit(folder / "recipe.yaml") == 0
    return folder / "run"


def assert_same_run(run: Path, whole: Path) -> None:
    ours, theirs = weights(run), weights(whole)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert metrics(run) == metrics(whole)


def test_every_option_on_the_page_exists(recipe):
    known = set(ReadCLI(["--config", str(recipe)]).vocabulary().options)
    for page, fewest in (("fit", 25), ("validate", 6)):
        named = set(re.findall(r"--([a-z_]+(?:[.-][a-z_]+)*)", (FOLDER / f"{page}.txt").read_text()))
        assert len(named) >= fewest
        assert named - known == {"help-all"}


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_the_whole_page_is_the_parsers_own(capsys, command):
    assert main([command, "--help-all"]) == 0
    page = capsys.readouterr().out
    assert "--trainer.checkpoint_every" in page
    assert "--trainer.gradient_clip_val" in page
    assert "--data.help" in page
    assert "--weights_only" not in page


def test_the_resolved_recipe_can_be_printed(capsys, recipe):
    assert fit(recipe, "--model.seed", "8", "--print_config") == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["model"]["init_args"]["seed"], printed["data"]["init_args"]["batch_size"]) == (8, 2)


def test_a_run_folder_holds_all_of_a_run(whole, capsys):
    config = yaml.safe_load((whole / "config.yaml").read_text())
    assert config["ckpt_path"] is None
    assert config["model"]["init_args"]["weight_decay"] == 0.1
    assert config["trainer"]["checkpoint_every"] == 3
    assert steps_saved(whole) == [9, 12]
    assert (whole / "checkpoints" / "last.ckpt").resolve().name == "step-000012.ckpt"
    assert [row["step"] for row in metrics(whole)] == list(range(STEPS))
    assert sorted(path.name for path in whole.iterdir()) == ["checkpoints", "config.yaml", "metrics.csv"]
    assert metrics(whole)[-1]["loss"] < metrics(whole)[0]["loss"]


def test_checkpoints_load_without_pickled_objects(whole):
    for path in run_folder.step_files(whole):
        content = torch.load(path, weights_only=True)
        assert content["global_step"] == run_folder.step_of(path)
        assert not [key for key in content if "hparams" in key or "hyper_parameters" in key]


def test_the_opening_line_says_what_trains(recipe, capsys):
    assert fit(recipe, "--trainer.max_steps", "1") == 0
    words = capsys.readouterr().err
    parameters = 4096 * 16 + 2 * (16 * 16 * 2 + 2 * 16 * 8 + 3 * 16 * 32 + 32) + 16
    opening = (
        f"PretrainModule: {parameters:,} parameters; 1 x cpu, 32-true; phases first 5, second 7; "
        f"1 steps of 128 tokens; run folder {recipe.parent / 'run'}"
    )
    assert opening in words.splitlines()
    for foreign in ("GPU", "TPU", "Tip", "litlogger", "LeafSpec", "args parameter", "Warning"):
        assert foreign not in words


@pytest.mark.parametrize("batch", thinned([3, 7, 10, 17], [3, 10]))
def test_a_crash_costs_nothing(recipe, whole, batch):
    with pytest.raises(RuntimeError, match="planted"):
        fit(recipe, *acting("crash", batch))
    run = recipe.parent / "run"
    assert fit(recipe, "--ckpt_path", "last") == 0
    assert_same_run(run, whole)


@pytest.mark.parametrize(
    ("number", "batch"),
    [
        (signal.SIGTERM, 4),
        (signal.SIGUSR1, 9),
        (signal.SIGHUP, 4),
        pytest.param(signal.SIGTERM, 20, marks=pytest.mark.slow),
    ],
)
def test_a_signal_finishes_the_step_saves_and_exits_143(recipe, whole, capsys, number, batch):
    before = signal.SIG_DFL
    signal.signal(number, before)  # nohup starts what it runs with SIGHUP ignored
    assert fit(recipe, *acting(int(number), batch)) == 143
    run = recipe.parent / "run"
    step = (batch + 2) // 2
    assert run_folder.step_of(run_folder.last_checkpoint(run)) == step
    assert f"{number.name} at step {step}: saved; continue with --ckpt_path last" in capsys.readouterr().err
    assert signal.getsignal(number) == before
    assert fit(recipe, "--ckpt_path", "last") == 0
    assert_same_run(run, whole)


def slurm(monkeypatch, folder: Path, scontrol: str) -> None:
    """One task of an array job, and SLURM's command in place of a scheduler."""
    job = {"JOB_ID": 1240, "ARRAY_JOB_ID": 1234, "ARRAY_TASK_ID": 6, "JOB_NAME": "train"}
    place = {"NTASKS": 1, "PROCID": 0, "LOCALID": 0, "NODEID": 0, "NODELIST": "localhost"}
    for name, value in {**job, **place}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    command = folder / "scontrol"
    command.write_text(f"#!/bin/sh\n{scontrol}\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.mark.parametrize(
    ("number", "scontrol", "said"),
    [
        (signal.SIGUSR1, 'echo "$@" >> {}/asked', "SLURM job 1234_6 is queued again"),
        (signal.SIGUSR1, "echo not now >&2; exit 1", "scontrol requeue 1234_6: not now; submit the job again"),
        (signal.SIGTERM, 'echo "$@" >> {}/asked', "SIGTERM at step 5: saved"),
    ],
)
def test_under_slurm_a_job_is_saved_and_queued_again(
    recipe, whole, capsys, monkeypatch, tmp_path, number, scontrol, said
):
    slurm(monkeypatch, tmp_path, scontrol.format(tmp_path))
    assert fit(recipe, *acting(int(number), 9)) == 143
    assert said in capsys.readouterr().err
    asked = tmp_path / "asked"
    queued = number == signal.SIGUSR1 and "asked" in scontrol
    assert (asked.read_text() if asked.exists() else "") == ("requeue 1234_6\n" if queued else "")
    run = recipe.parent / "run"
    assert list(run.rglob("hpc_ckpt*")) == []
    assert fit(recipe, "--ckpt_path", "last") == 0
    assert_same_run(run, whole)


def test_sigterm_does_not_wait_for_a_validation(recipe, whole):
    assert fit(recipe, *acting(int(signal.SIGTERM), 6)) == 143
    run = recipe.parent / "run"
    assert steps_saved(run) == [3, 4]
    assert "val_loss" not in metrics(run)[-1]
    assert "val_loss" in metrics(whole)[3]
    assert fit(recipe, "--ckpt_path", "last") == 0  # which makes up for it
    assert_same_run(run, whole)


def test_sigterm_in_the_last_step_leaves_a_finished_run(recipe, whole, capsys):
    assert fit(recipe, *acting(int(signal.SIGTERM), 23)) == 143
    run = recipe.parent / "run"
    assert fit(recipe, "--ckpt_path", "last") == 0
    assert f"{run}: 12 steps of 12 done" in capsys.readouterr().err.splitlines()
    assert_same_run(run, whole)
    assert run_folder.step_of(run_folder.best_checkpoint(run)) == 12


def test_ctrl_c_exits_130_and_says_how_to_go_on(recipe, whole, capsys):
    before = signal.default_int_handler
    signal.signal(signal.SIGINT, before)  # a shell starts what runs in the background with SIGINT ignored
    assert fit(recipe, *acting(int(signal.SIGINT), 9)) == 130
    assert signal.getsignal(signal.SIGINT) == before
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == (
        "kvtrain: interrupted at step 5, the last checkpoint is step-000003.ckpt; "
        "continue with the same command and --ckpt_path last"
    )
    assert fit(recipe, "--ckpt_path", "last") == 0
    assert_same_run(recipe.parent / "run", whole)


def snapshot(run: Path) -> dict[str, tuple[int, int]]:
    files = [path for path in run.rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in files}


def test_a_second_run_never_touches_the_first(recipe, whole, capsys):
    before = snapshot(whole)
    answer = refused(capsys, "fit", "--config", str(recipe), "--trainer.default_root_dir", str(whole))
    assert answer == (
        f"{whole} already holds a run (step 12); continue it with --ckpt_path last, "
        "or choose another --trainer.default_root_dir"
    )
    other = recipe.parent / "foreign.ckpt"
    other.write_bytes((whole / "checkpoints" / "last.ckpt").read_bytes())
    arguments = ["--config", str(recipe), "--trainer.default_root_dir", str(whole), "--ckpt_path", str(other)]
    assert "already holds a run" in refused(capsys, "fit", *arguments)
    assert snapshot(whole) == before


def test_last_without_a_checkpoint_starts_from_the_beginning(recipe, whole, capsys):
    run = recipe.parent / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / ".step-000003.ckpt.new").write_bytes(b"half")
    (run / "metrics.csv").write_text("step,loss\n0,1.0\n2,1.0\n")
    assert fit(recipe, "--ckpt_path", "last") == 0
    assert f"{run} has no checkpoint yet: starting from the beginning" in capsys.readouterr().err.splitlines()
    assert_same_run(run, whole)
    assert list((run / "checkpoints").glob(".*")) == []


def test_going_on_with_another_recipe_warns(recipe, whole, capsys, tmp_path):
    assert fit(recipe, "--trainer.max_steps", "3") == 0
    assert "differs" not in capsys.readouterr().err
    assert fit(recipe, "--ckpt_path", "last", "--trainer.max_steps", "4") == 0
    assert "differs" not in capsys.readouterr().err
    changed = ["--data.seed", "6", "--data.strict_resume", "false"]
    assert fit(recipe, "--ckpt_path", "last", "--trainer.max_steps", "5", *changed) == 0
    lines = capsys.readouterr().err.splitlines()
    assert "kvtrain: warning: the recipe differs from the one this run was begun with, first in 'data.seed'" in lines
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (config["data"]["init_args"]["seed"], config["ckpt_path"]) == (6, None)


def test_another_number_of_threads_warns(recipe, capsys, monkeypatch):
    assert fit(recipe, "--trainer.max_steps", "3", "--trainer.num_threads", "1") == 0
    capsys.readouterr()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert fit(recipe, "--ckpt_path", "last", "--trainer.max_steps", "4") == 0
    assert "trained on 1 CPU threads and goes on with 2" in capsys.readouterr().err


@pytest.mark.parametrize(("asked", "threads"), [("1", 1), ("2", 2)])
def test_a_run_takes_the_threads_that_it_is_given(recipe, asked, threads):
    """Of a single step, for threads that wait for each other are a burden on busy cores."""
    assert fit(recipe, "--trainer.max_steps", "1", "--trainer.num_threads", asked) == 0
    assert torch.get_num_threads() == threads


def copy_run(whole: Path, run: Path) -> None:
    """A run that ends at step 12, with 9 before."""
    shutil.copytree(whole, run, symlinks=True)


def test_going_on_after_damage_falls_back_and_ends_alike(recipe, whole, capsys):
    """A byte in the middle of the newest checkpoint; the metrics behind it are written anew, too."""
    run = recipe.parent / "run"
    copy_run(whole, run)
    bad, good = (run_folder.step_path(run, step) for step in (12, 9))
    content = bytearray(bad.read_bytes())
    content[len(content) // 2] ^= 1
    bad.write_bytes(content)
    (run / ".config.yaml.new").write_text("half")
    fault = f"{bad}: damaged, it is not what manifest.json says was written"
    for command in ("fit", "validate"):
        answer = refused(capsys, command, "--config", str(recipe), "--ckpt_path", str(bad))
        assert answer == f"{fault}; try --ckpt_path {good}"
    assert "damaged" in refused(capsys, "validate", "--config", str(recipe), "--ckpt_path", "last")
    assert fit(recipe, "--ckpt_path", "last") == 0
    lines = capsys.readouterr().err.splitlines()
    assert f"kvtrain: warning: {fault}; it will be kept as {bad.name}.damaged" in lines
    assert f"kvtrain: warning: going on from {good}, the newest checkpoint that is whole" in lines
    assert "12 steps from 9 of 128 tokens" in "".join(lines)
    assert bad.with_name("step-000012.ckpt.damaged").read_bytes() == content
    assert_same_run(run, whole)
    assert steps_saved(run) == [9, 12]
    assert list(run.rglob(".*")) == []


def test_a_run_with_nothing_left_refuses_and_begins_nothing(recipe, whole, capsys):
    run = recipe.parent / "run"
    copy_run(whole, run)
    for path in run_folder.step_files(run):
        path.write_bytes(path.read_bytes()[:1000])
    before = snapshot(run)
    answer = refused(capsys, "fit", "--config", str(recipe), "--ckpt_path", "last")
    assert answer.startswith("no checkpoint to go on from: ") and answer.count("damaged or no checkpoint") == 2
    assert snapshot(run) == before


def test_validate_prints_figures_and_leaves_the_run_alone(recipe, whole, capsys):
    before = snapshot(whole)
    arguments = ["validate", "--config", str(recipe), "--trainer.default_root_dir", str(whole)]
    assert main([*arguments, "--ckpt_path", "last"]) == 0
    figures = capsys.readouterr().out.split()
    assert figures[0::2] == ["val_loss", "val_perplexity"]
    assert float(figures[1]) == pytest.approx(metrics(whole)[-1]["val_loss"], abs=1e-3)
    assert main(arguments) == 0
    assert float(capsys.readouterr().out.split()[1]) > float(figures[1])
    assert snapshot(whole) == before
    assert refused(capsys, "validate", "--config", str(recipe), "--ckpt_path", "last").endswith("holds no checkpoint")


def test_reading_a_recipe_touches_nothing(recipe):
    read = read_recipe(["--config", str(recipe), "--trainer.accelerator", "cuda", "--model.seed", "9"])
    assert (read.module.seed, read.data.batch_size, read.trainer["max_steps"]) == (9, 2, STEPS)
    assert not (recipe.parent / "run").exists()


def test_a_folder_in_use_is_refused_and_may_be_read(recipe, place, whole, tmp_path, capsys, monkeypatch):
    """The process that tests started is alive, and holds the folder."""
    run = tmp_path / "run"
    shutil.copytree(whole, run, symlinks=True)
    owner = replace(Owner.this_process(), pid=os.getppid(), started=None)
    (run / "run.lock").write_text(json.dumps(asdict(owner)))
    before = snapshot(run)
    for options in ([], ["--ckpt_path", "last"]):
        answer = refused(capsys, "fit", "--config", str(recipe), *options)
        assert answer.startswith(f"{run} is in use by process {os.getppid()} on ")
        assert answer.endswith(f"delete {run / 'run.lock'}")
    assert main(["validate", "--config", str(recipe), "--ckpt_path", "last"]) == 0
    assert main(["export", str(run), str(tmp_path / "exported")]) == 0
    assert snapshot(run) == before


def test_a_run_that_is_further_than_asked_is_refused(recipe, whole, capsys):
    options = ["--trainer.default_root_dir", str(whole), "--trainer.max_steps", "7", "--ckpt_path", "last"]
    answer = refused(capsys, "fit", "--config", str(recipe), *options)
    assert (
        answer
        == f"{run_folder.step_path(whole, 12)} lies beyond trainer.max_steps, 7; raise that, or give an earlier one"
    )


def test_a_run_holds_its_folder_until_it_ends(recipe, monkeypatch):
    lock, held = recipe.parent / "run" / "run.lock", []
    monkeypatch.setattr("kvtrain.training.cli.FitCLI.after_fit", lambda *_: held.append(lock.exists()))
    assert fit(recipe, "--trainer.max_steps", "1") == 0
    with pytest.raises(RuntimeError, match="planted"):
        fit(recipe, *acting("crash", 3), "--ckpt_path", "last")
    assert held == [True]
    assert not lock.exists()


def test_a_changed_corpus_is_refused_unless_the_recipe_says_go_on(recipe, place, whole, capsys):
    run, corpus = recipe.parent / "run", recipe.parent / "changed.jsonl"
    assert fit(recipe, "--trainer.max_steps", "6") == 0
    corpus.write_text((place / "train.jsonl").read_text().replace("31", "32"))
    before, options = snapshot(run), ["--ckpt_path", "last", "--data.corpus", str(corpus)]
    capsys.readouterr()
    main(["fit", "--config", str(recipe), *options])
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("kvtrain: error: the data has changed since the checkpoint (corpus was ")
    assert line.endswith("--data.strict_resume false")
    assert snapshot(run) == before
    assert fit(recipe, *options, "--data.strict_resume", "false") == 0
    assert "kvtrain: warning: the data has changed since the checkpoint" in capsys.readouterr().err
    assert steps_saved(run)[-1] == STEPS
