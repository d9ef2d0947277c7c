"""``make quickstart`` in seconds, and a control that is what it says."""

import json
import shlex
from pathlib import Path

import pytest
import yaml

import kvtrain
from kvtrain import cli, quickstart
from kvtrain.evaluation import evaluate
from kvtrain.recipes import shown
from kvtrain.training import RetrofitModule
from kvtrain.training.cli import read_recipe

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "recipes" / "tiny"
TINY = ("--trainer.max_steps", "2", "--data.sequence_length", "64", "--data.batch_size", "2")
TINY += ("--data.validation_rows", "2", "--trainer.log_every_n_steps", "1")
FIGURES = {
    "base": {"perplexity": 18.75, "compression": 1.0, "kv_bytes_per_1024": 6000.0},
    "control": {"perplexity": 18.81, "compression": 1.0, "kv_bytes_per_1024": 6000.0},
    "DMC": {"perplexity": 19.6875, "compression": 2.03, "kv_bytes_per_1024": 3200.0},
}


def test_the_control_is_the_recipe_with_the_method_off():
    dmc, control = (yaml.safe_load((RECIPES / f"{name}.yaml").read_text()) for name in ("dmc", "dmc_control"))
    assert dmc["trainer"].pop("default_root_dir") != control["trainer"].pop("default_root_dir")
    assert dmc["model"].pop("class_path").endswith("DMCModule")
    assert control["model"].pop("class_path").endswith("RetrofitModule")
    assert dmc["model"]["init_args"].pop("method")["compression"] == 2
    assert not dmc["model"]["init_args"].pop("noisy_finetune")
    assert dmc == control


def test_quickstart_runs_and_prints_what_it_promises(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert quickstart.main(tmp_path, (*TINY, "--data.corpus", "heldout"), limit=4) == 0
    printed = capsys.readouterr()
    for part in ("base, untouched", "KV bytes / 1,024 tokens", "report.html", "tok/s", quickstart.next_commands()):
        assert part in printed.out, part
    assert "control" not in printed.out and "Loading weights" not in printed.err
    run = tmp_path / "quickstart" / "dmc"
    assert {path.name for path in run.parent.iterdir()} == {"dmc", "dmc-exported"}
    assert {"loss.png", "slots_by_position.png"} <= {path.name for path in (run / "report").iterdir()}
    assert f"{json.loads((run / 'eval.json').read_text())[0]['perplexity']:.2f}" in printed.out
    assert quickstart._new_place(tmp_path) == tmp_path / "quickstart-2"


def test_the_control_is_trained_too_where_it_is_asked_for(tmp_path, monkeypatch):
    calls, measured = [], []
    monkeypatch.setattr(cli, "main", lambda arguments: calls.append(arguments) or 0)
    monkeypatch.setattr(quickstart, "_measure", lambda *arguments: measured.append(arguments[1:]))
    assert quickstart.main(tmp_path, ("--seed", "3"), control=True) == 0
    place = tmp_path / "quickstart"
    recipes = {"dmc": shown(RECIPES / "quickstart.yaml"), "control": str(place / "control.yaml")}
    for name, (fit, export) in zip(recipes, (calls[:2], calls[2:]), strict=True):
        run = str(place / name)
        assert fit == ["fit", "--config", recipes[name], "--trainer.default_root_dir", run, "--seed", "3"]
        assert export == ["export", run, f"{run}-exported"]
    assert measured == [(place, True, None)]
    control = read_recipe(["--config", str(place / "control.yaml")]).module
    dmc = read_recipe(["--config", str(RECIPES / "quickstart.yaml")]).module
    assert (type(control), type(control.method)) == (RetrofitModule, kvtrain.Full)
    assert control.schedule.phases == dmc.schedule.phases
    assert control.distillation == dmc.distillation


def test_a_step_that_fails_is_the_last(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "main", lambda arguments: 2)
    monkeypatch.setattr(quickstart, "_measure", lambda *_: pytest.fail("there is nothing to measure"))
    assert quickstart.main(tmp_path) == 2


def test_the_verdict_compares_with_what_was_measured():
    base, control, dmc = FIGURES.values()
    assert quickstart.verdict({"base": base, "DMC": dmc}) == (
        "DMC keeps 1 of 2.03 tokens, in 1.88x fewer bytes, at 1.050x the base's perplexity."
    )
    short = [{**row, "kv_bytes_per_1024": None} for row in (base, dmc)]
    assert quickstart.verdict({"base": short[0], "DMC": short[1]}) == (
        "DMC keeps 1 of 2.03 tokens, at 1.050x the base's perplexity."
    )
    both = quickstart.verdict({"base": base, "control": control, "DMC": dmc})
    assert both.endswith("at 1.050x the base's and 1.047x the control's perplexity.")


def test_the_next_commands_are_right(tmp_path, monkeypatch, capsys):
    """As they are printed, but for fewer and smaller steps."""
    text, heldout = tmp_path / "my text.jsonl", tmp_path / "heldout.jsonl"
    for path in (text, heldout):
        path.write_text("".join(json.dumps({"text": f"x = {n}\n" * 400}) + "\n" for n in range(3)))
    monkeypatch.chdir(tmp_path)
    commands = quickstart.next_commands("kvtrain:tiny", str(text), str(heldout))
    for words in map(shlex.split, commands.replace("\\\n", "").splitlines()):
        assert Path(words[0]).name == "kvtrain"
        smaller = TINY if words[1] == "fit" else ()
        assert cli.main([*words[1:], *smaller]) == 0, words
    assert "perplexity" in capsys.readouterr().out
    assert (tmp_path / "exported" / "mine" / "config.json").is_file()


@pytest.mark.slow
def test_the_packaged_model_is_as_good_as_its_card_says():
    """On all of the held-out text, which quickstart reads."""
    (figures,) = evaluate.run_tasks(quickstart.BASE, ["perplexity"])
    assert figures["perplexity"] == pytest.approx(18.74, abs=0.05)
