"""A folder dropped beside the others is an architecture: nothing that exists needs to know of it."""

import importlib
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import kvtrain
from kvtrain import models
from kvtrain.models.registry import architectures, methods
from tests.hosts import make_host, random_ids


@pytest.fixture
def window(tmp_path, monkeypatch):
    """Plant ``kvtrain/models/window/`` on the package's path."""
    folder = tmp_path / "elsewhere" / "window"
    folder.mkdir(parents=True)
    shutil.copy(Path(__file__).parent / "planted_window.py", folder / "__init__.py")
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(folder.parent)])
    importlib.invalidate_caches()
    architectures.cache_clear()
    yield kvtrain.Window
    architectures.cache_clear()
    sys.modules.pop("kvtrain.models.window", None)


def test_it_trains_serves_and_loads(window, tmp_path):
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


def test_the_loss_reaches_its_parameters(window):
    model, ids = kvtrain.retrofit(make_host("llama"), window()).train(), random_ids(2, 30)
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in model.parameters())


def test_it_is_gone_again():
    assert "window" not in methods()
    with pytest.raises(AttributeError, match="Window"):
        kvtrain.Window  # noqa: B018
