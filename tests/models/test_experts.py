"""Hosts with experts: what their files hold, what is chosen for them, and what is refused."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

import kvtrain
from kvtrain.models.compiled import CompiledStep
from kvtrain.models.late_tensor import LateTensor
from kvtrain.models.weights import host_weights
from tests.hosts import EXPERT_FAMILIES, make_host, random_ids


@pytest.mark.parametrize("family", EXPERT_FAMILIES)
def test_files_that_hold_every_expert_by_itself_are_read(family, tmp_path):
    host = make_host(family, dtype=torch.float32)
    host.save_pretrained(tmp_path)
    weights = host_weights(str(tmp_path), host.config)
    late = {name for name, weight in weights.items() if isinstance(weight, LateTensor)}
    assert late == {name for name in host.state_dict() if ".experts." in name}
    assert list(weights) == list(host.state_dict())
    for name, expected in host.state_dict().items():
        assert (weights[name].shape, weights[name].dtype) == (expected.shape, expected.dtype)
        assert torch.equal(torch.empty_like(expected).copy_(weights[name]), expected), name
    save_file(host.state_dict(), tmp_path / "model.safetensors")  # all experts of a layer in two tensors
    stored = host_weights(str(tmp_path), host.config)
    assert [name for name, expected in host.state_dict().items() if not torch.equal(stored[name], expected)] == []


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("qwen3_moe", {"mlp_only_layers": [1]}),
        ("qwen3_moe", {"decoder_sparse_step": 2, "norm_topk_prob": True}),
        ("olmoe", {"norm_topk_prob": True, "num_experts_per_tok": 1}),
        ("mixtral", {"num_experts_per_tok": 5}),
    ],
)
def test_layers_and_shares_of_every_kind_are_the_hosts(family, settings):
    host, ids = make_host(family, layers=3, dtype=torch.float32, **settings), random_ids(2, 20)
    model = kvtrain.retrofit(host, kvtrain.Full())
    dense = [type(layer.mlp).__name__ for layer in model.model.layers].count("GatedMLP")
    assert dense == {"mlp_only_layers": 1, "decoder_sparse_step": 2}.get(next(iter(settings)), 0)
    with torch.no_grad():
        torch.testing.assert_close(model(ids, use_cache=False).logits, host(ids).logits, atol=1e-5, rtol=0)


def test_files_of_gpt_oss_hold_what_models_hold(tmp_path):
    host = make_host("gpt_oss", dtype=torch.float32)
    host.save_pretrained(tmp_path)
    weights = host_weights(str(tmp_path), host.config)
    assert list(weights) == list(host.state_dict())
    assert [name for name, expected in host.state_dict().items() if not torch.equal(weights[name], expected)] == []
    assert not any(isinstance(weight, LateTensor) for weight in weights.values())


def chosen(model):
    return {layer.mlp.experts.config._experts_implementation for layer in model.model.layers}


def test_an_implementation_that_was_chosen_stays(tmp_path):
    host, ids = make_host("olmoe", dtype=torch.float32), random_ids(1, 12)
    model = kvtrain.retrofit(host, kvtrain.Full())
    assert chosen(model) == {"kvtrain"} and chosen(host) == {"grouped_mm"}
    expected = model(ids).logits
    model.save_pretrained(tmp_path)
    host.set_experts_implementation("eager")
    models = [kvtrain.retrofit(host, kvtrain.Full()), kvtrain.load(tmp_path, experts_implementation="batched_mm")]
    assert [chosen(one) for one in models] == [{"eager"}, {"batched_mm"}]
    model.set_experts_implementation("grouped_mm")
    assert chosen(model) == {"grouped_mm"}
    for one in (*models, model):
        torch.testing.assert_close(one(ids).logits, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_decoding_step_is_one_graph():
    model, ids = kvtrain.retrofit(make_host("qwen3_moe", dtype=torch.float32), kvtrain.Full()), random_ids(2, 9)
    caches = [model.make_cache(1 << 22, preallocate=True) for _ in range(2)]
    for cache in caches:
        model(ids, past_key_values=cache)
    step = CompiledStep(model, caches[0], backend="aot_eager")
    found, expected = step(ids[:, :1]), model(ids[:, :1], past_key_values=caches[1]).logits[:, -1]
    assert (step.compilations, step.eager) == (1, False)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("family", "settings", "words"),
    [
        ("olmoe", {"clip_qkv": 5.0}, "set clip_qkv=None"),
        ("mixtral", {"router_jitter_noise": 0.1}, "set router_jitter_noise=0.0"),
    ],
)
def test_what_is_not_honoured_is_refused(family, settings, words):
    with pytest.raises(ValueError, match=words):
        kvtrain.retrofit(make_host(family, **settings), kvtrain.Full())


def test_expert_parallelism_is_refused_by_name():
    host = make_host("mixtral", dtype=torch.float32)
    host.config.distributed_config = SimpleNamespace(enable_expert_parallel=True)
    with pytest.raises(ValueError, match=r"expert parallelism \(enable_expert_parallel\) is not supported; load"):
        kvtrain.retrofit(host, kvtrain.Full())


def test_adapters_on_experts_are_refused():
    pytest.importorskip("peft")
    from kvtrain.models.adapters import LoRA, add_adapters

    model = kvtrain.retrofit(make_host("qwen3_moe", mlp_only_layers=[1]), kvtrain.Full())
    words = r"'down_proj' of model\.layers\.0\.mlp\.experts are experts, .*: \[q_proj, k_proj, v_proj, o_proj\]"
    with pytest.raises(ValueError, match=words):
        add_adapters(model, LoRA(rank=2), {})
    add_adapters(model, LoRA(rank=2, targets=["q_proj", "v_proj"]), {})
    assert sum(parameter.requires_grad for parameter in model.parameters()) == 2 * 2 * 2
