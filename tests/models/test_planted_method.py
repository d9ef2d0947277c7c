"""Files dropped beside the others are an architecture: nothing that exists needs to know of it."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import kvtrain
from kvtrain import models, training
from kvtrain.cli import main
from kvtrain.evaluation.report import figures, load_tables
from kvtrain.export.remote_code import remote_code
from kvtrain.metrics import read_metrics
from kvtrain.models import registry
from kvtrain.models.registry import architectures, methods
from tests.hosts import make_host, random_ids
from tests.training.small_runs import recipe_text, write_place

PLANTED = Path(__file__).parents[1] / "planted"


def forget() -> None:
    architectures.cache_clear()
    training._modules.cache_clear()


@pytest.fixture
def window(monkeypatch):
    """Plant ``kvtrain/models/window/`` and ``kvtrain/training/window.py`` on the packages' paths."""
    for package in (models, training):
        folder = PLANTED / package.__name__.rpartition(".")[2]
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
    importlib.invalidate_caches()
    forget()
    yield kvtrain.Window
    forget()
    for name in [name for name in sys.modules if name.startswith(("kvtrain.models.window", "kvtrain.training.window"))]:
        if not name.endswith("windows"):
            del sys.modules[name]


def test_it_serves_generates_and_loads(window, tmp_path):
    model = kvtrain.retrofit(make_host("qwen2", dtype=torch.float64), window(sink=2, recent=6))
    ids = random_ids(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :11] = 0
    with torch.no_grad():
        # The sinks of the parallel form are the first of the row as it is given: rows without their padding.
        alone = [model(row[keep > 0][None], use_cache=False).logits[0] for row, keep in zip(ids, mask, strict=True)]
        cache = model.make_cache()
        parts = [
            model(ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache).logits
            for begin, end in ((0, 15), (15, 16), (16, 17), (17, 30), (30, 40))
        ]
        torch.testing.assert_close(torch.cat(parts, 1)[mask > 0], torch.cat(alone), atol=1e-9, rtol=0)
        assert (cache.kv_tokens() == 8).all()
        size = cache.kv_bytes()
        model(ids[:, :5], past_key_values=cache)
        assert cache.kv_bytes() == size
    options = {"max_new_tokens": 20, "do_sample": False, "num_beams": 2, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))

    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert again.config.method == window(sink=2, recent=6)
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_its_code_travels(window):
    code = remote_code(kvtrain.retrofit(make_host("olmo2"), window()).config)
    assert {f"kvtrain_models_window_{part}.py" for part in ("attention", "build", "cache", "config")} <= code.keys()
    assert "from .kvtrain_models_hosts_olmo2 import ADAPTER" in code["kvtrain_registry.py"]
    assert "import Window\n" in code["kvtrain_registry.py"] and "figures" not in "".join(code)


def test_the_loss_reaches_its_parameters(window):
    model, ids = kvtrain.retrofit(make_host("llama"), window()).train(), random_ids(2, 30)
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in model.parameters())


def test_a_recipe_trains_estimates_exports_evaluates_and_reports(window, tmp_path, capsys):
    write_place(tmp_path)
    run, exported = tmp_path / "run", tmp_path / "exported"
    recipe = yaml.safe_load(recipe_text(tmp_path, run, steps=6))
    own = {"base": "kvtrain:tiny", "method": {"sink": 1, "recent": 8}, "norm_weight": 0.5}
    settings = {"base": "kvtrain:tiny", **own, "phases": recipe["model"]["init_args"]["phases"]}
    recipe["model"] = {"class_path": "WindowModule", "init_args": settings}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))

    assert main(["estimate", "--config", str(tmp_path / "recipe.yaml")]) == 0
    said = capsys.readouterr().out
    assert "KVLlamaForCausalLM with Window" in said and "KV cache of 32 tokens, after" in said

    assert main(["fit", "--config", str(tmp_path / "recipe.yaml")]) == 0
    assert "norm_pull" in (run / "metrics.csv").read_text().splitlines()[0]
    assert main(["export", str(run), str(exported), "--dtype", "float32"]) == 0
    card = (exported / "README.md").read_text()
    assert "Key-value cache: WINDOW." in card and '"recent": 8' in card

    measured = tmp_path / "eval.json"
    asked = ["eval", str(exported), "--tasks", "perplexity", "--corpus", str(tmp_path / "held.jsonl")]
    assert main([*asked, "--limit", "2", "--json", str(measured)]) == 0
    (row,) = json.loads(measured.read_text())
    assert row["compression"] > 2 and row["perplexity"] > 1
    capsys.readouterr()
    assert main(["report", str(run)]) == 0
    written = [Path(line).name for line in capsys.readouterr().out.splitlines()]
    assert written == ["loss.png", "window_seen.png", "learning_rate.png", "speed.png", "report.html"]
    page, last = (run / "report" / "report.html").read_text(), read_metrics(run)[-1]
    assert f"<th>Pull on the last norm at the end</th><td>{last['norm_pull']:.3f}</td>" in page
    (bars,) = figures(load_tables(run))["window_seen"].axes[0].containers
    assert [bar.get_height() for bar in bars] == [9] * 6


def test_it_is_gone_again():
    assert "window" not in methods() and "WindowModule" not in training._modules()
    assert "window_seen" not in [figure.name for figure in registry.figures().drawn]
