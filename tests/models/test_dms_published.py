"""Models in the released code's layout: settings from their fields, adapters or a channel from their weights."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import kvtrain
from kvtrain.models.dms.published import load_published
from tests.hosts import make_host, random_ids


def released(folder, adapters=False, **fields):
    """A Qwen3 as the released code saves it: its fields in the configuration, its code named, adapters in the file."""
    host = make_host("qwen3", dtype=torch.float32)
    host.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    code = {"AutoConfig": "configuration.Config", "AutoModelForCausalLM": "modeling.Model"}
    config |= {"architectures": ["Qwen3ForCausalLMDMS"], "auto_map": code, **fields}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling.py").write_text("raise RuntimeError('code of a model was run')\n")
    if adapters:
        generator, weights = torch.Generator().manual_seed(4), load_file(folder / "model.safetensors")
        for layer in range(2):
            prefix = f"model.layers.{layer}.self_attn.dms_proj_alpha"
            weights[f"{prefix}.weight"] = 0.02 * torch.randn(2, 32, generator=generator)
            weights[f"{prefix}_norm.weight"] = 1 + 0.1 * torch.randn(32, generator=generator)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return host


def test_decisions_come_from_a_channel_of_the_queries(tmp_path):
    """The layout of Qwen3-8B-DMS-8x: a Qwen3's weights, and fields of which some may be absent."""
    host = released(tmp_path, dms_window_size=6, dms_initial_alpha_offset=1.0, dms_cr=8)
    model, ids = load_published(str(tmp_path)), random_ids(2, 30)
    assert model.method == kvtrain.DMS(window=6, init_bias=1.0, decide_by="query_channel", trainable="all")
    assert not [name for name in vars(model.config.host_config) if name.startswith("dms_")]
    expected = kvtrain.retrofit(host, model.method)
    with torch.no_grad():
        assert torch.equal(model(ids, use_cache=False).logits, expected(ids, use_cache=False).logits)
        cache = model.make_cache()
        model(ids, past_key_values=cache)
    assert cache.kv_tokens().float().mean() < 28
    model.save_pretrained(tmp_path / "ours")
    again = kvtrain.load(str(tmp_path / "ours"))
    assert again.method == model.method


def test_adapters_are_taken_as_they_are(tmp_path):
    released(
        tmp_path,
        adapters=True,
        dms_separate_alpha=True,
        dms_alpha_per="layer",
        dms_window_size=5,
        dms_tau=0.2,
        dms_cr=4,
    )
    model = load_published(str(tmp_path), dtype=torch.float32)
    assert model.method == kvtrain.DMS(compression=4.0, window=5, temperature=0.2, shared_decisions=True)
    weights, outputs = load_file(tmp_path / "model.safetensors"), {}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    model(random_ids(2, 30), use_cache=False, outputs=outputs)
    assert 0.1 < torch.stack(list(outputs.values())).mean() < 0.9


def test_what_is_no_such_model_is_refused(tmp_path):
    released(tmp_path, dms_separate_alpha=True)
    with pytest.raises(
        ValueError, match=r"decisions come from adapters, and it has no model\.layers\.0\.self_attn\.dms"
    ):
        load_published(str(tmp_path))
    released(tmp_path / "another")
    with pytest.raises(ValueError, match=r"config\.json has no dms_ settings; open it with kvtrain\.load"):
        load_published(str(tmp_path / "another"))
    released(tmp_path / "plain", dms_disable_eviction=True)
    with pytest.raises(
        ValueError, match=r"dms_disable_eviction is set, this is a plain model; open it with kvtrain\.load"
    ):
        load_published(str(tmp_path / "plain"))
