"""``make quickstart`` in seconds, and a control that is what it says."""

from functools import partial
from pathlib import Path

import pytest
import yaml

from kvtrain import quickstart
from kvtrain.evaluation import evaluate

RECIPES = Path(__file__).resolve().parents[1] / "recipes" / "tiny"


def test_the_control_is_the_recipe_with_the_method_off():
    dmc, control = (yaml.safe_load((RECIPES / f"{name}.yaml").read_text()) for name in ("dmc", "dmc_control"))
    assert dmc["trainer"].pop("default_root_dir") != control["trainer"].pop("default_root_dir")
    assert dmc["model"].pop("class_path").endswith("DMCModule")
    assert control["model"].pop("class_path").endswith("RetrofitModule")
    assert dmc["model"]["init_args"].pop("method")["compression"] == 2
    assert not dmc["model"]["init_args"].pop("noisy_finetune")
    assert dmc == control


def test_quickstart_runs_and_prints_what_it_promises(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(Path(__file__).resolve().parents[1])
    monkeypatch.setattr(evaluate, "run_tasks", partial(evaluate.run_tasks, limit=2, sequence_length=128))
    overrides = ("--trainer.max_steps", "2", "--data.sequence_length", "128", "--data.batch_size", "2")
    overrides += ("--data.validation_rows", "2", "--trainer.log_every_n_steps", "1")
    assert quickstart.main(tmp_path, overrides) == 0
    printed = capsys.readouterr().out
    for part in ("base, untouched", "control", "DMC", "KV bytes / 1,024 tokens", "loss.png", "report.html", "tok/s"):
        assert part in printed, part
    assert (tmp_path / "quickstart" / "dmc-exported" / "README.md").is_file()
    assert quickstart._new_place(tmp_path) == tmp_path / "quickstart-2"


@pytest.mark.slow
def test_the_packaged_model_is_as_good_as_its_card_says():
    """On all of the held-out text, which quickstart reads."""
    (figures,) = evaluate.run_tasks(quickstart.BASE, ["perplexity"])
    assert figures["perplexity"] == pytest.approx(18.74, abs=0.05)
