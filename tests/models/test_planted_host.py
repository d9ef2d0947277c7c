"""A file dropped beside the others is a family of hosts: nothing that exists needs to know of it."""

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import kvtrain
from kvtrain.models.cache_size import cache_bytes, host_kv_bytes
from kvtrain.models.hosts import host_adapter, host_adapters, key_value_shapes
from tests.hosts import FAMILIES, make_host, random_ids

from .planted_families import planting

METHODS = [
    kvtrain.Full(),
    kvtrain.DMC(),
    kvtrain.Duo(sink=2, recent=5),
    kvtrain.Duo(sink=2, recent=5, full_heads=[[1], [], [0, 1]]),
    kvtrain.LCKV(kv_map="0_2_2", init="mean"),
]
HEADS = [4, 1, 2]


@pytest.fixture
def planted(tmp_path, monkeypatch):
    with planting("planted", tmp_path / "elsewhere", monkeypatch) as module:
        yield module


@pytest.fixture
def uneven(tmp_path, monkeypatch):
    with planting("uneven", tmp_path / "elsewhere", monkeypatch) as module:
        yield module


def renamed(name, planted):
    for old, new in planted.RENAMED.items():
        name = name.replace(old, new)
    return name


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_other_names_change_no_number(planted, method):
    """Weights, names and logits of every method are a Llama's."""
    llama, host, ids = make_host("llama", layers=3), make_host("planted", layers=3), random_ids(2, 20)
    host.load_state_dict({renamed(name, planted): tensor for name, tensor in llama.state_dict().items()})
    expected, model = kvtrain.retrofit(llama, method), kvtrain.retrofit(host, method)
    assert type(model).__name__ == "KVPlantedForCausalLM" and isinstance(model, planted.PlantedForCausalLM)
    weights = {renamed(name, planted): tensor for name, tensor in expected.state_dict().items()}
    assert weights.keys() == model.state_dict().keys()
    assert [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, weights[name])] == []
    kinds = {type(module).__name__ for module in model.modules()}
    assert {"RMSNorm", "GatedMLP"} <= kinds and not any(kind.startswith("Llama") for kind in kinds)
    with torch.no_grad():
        assert torch.equal(model(ids, use_cache=False).logits, expected(ids, use_cache=False).logits)


@pytest.mark.parametrize("method", METHODS[:2], ids=lambda m: m.name)
def test_it_trains_saves_and_opens(planted, method, tmp_path):
    model, ids = kvtrain.retrofit(make_host("planted", dtype=torch.float32), method).train(), random_ids(2, 20)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model(ids, labels=ids).loss.backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert [name for name, tensor in model.state_dict().items() if torch.equal(tensor, before[name])] == []
    model.eval().save_pretrained(tmp_path / "saved")
    for load in (AutoModelForCausalLM.from_pretrained, kvtrain.load):
        again = load(str(tmp_path / "saved"))
        assert type(again) is type(model) and again.config.method == method
        with torch.no_grad():
            assert torch.equal(again(ids, use_cache=True).logits, model(ids, use_cache=True).logits)


def test_its_heads_are_converted_and_rounded(planted):
    llama, host = make_host("llama", kv_heads=4), make_host("planted", kv_heads=4)
    host.load_state_dict({renamed(name, planted): tensor for name, tensor in llama.state_dict().items()})
    gates = torch.tensor([[0.1, 0.9, 0.2, 0.8], [0.7, 0.1, 0.2, 0.6]])
    for change in (
        lambda model: kvtrain.convert_gqa(model, 2),
        lambda model: kvtrain.retrofit(model, kvtrain.Duo(sink=1, recent=2)).binarize(0.5, gates),
    ):
        expected = {renamed(name, planted): tensor for name, tensor in change(llama).state_dict().items()}
        changed = change(host).state_dict()
        assert changed.keys() == expected.keys()
        assert [name for name, tensor in changed.items() if not torch.equal(tensor, expected[name])] == []


def test_an_attention_that_does_more_than_its_adapter_says_is_refused(planted, monkeypatch):
    monkeypatch.setattr(planted.PlantedAdapter, "query_key_norm", "head")
    with pytest.raises(ValueError, match="layer 0 has an attention of unknown parts: k_proj, o_proj, q_proj, v_proj"):
        kvtrain.retrofit(make_host("planted"), kvtrain.Full())


@pytest.mark.parametrize("method", METHODS[:2], ids=lambda m: m.name)
def test_layers_may_differ_in_key_value_heads(uneven, method, tmp_path):
    host, ids = make_host("uneven", layers=3, key_value_heads=HEADS, dtype=torch.float32), random_ids(2, 20)
    model = kvtrain.retrofit(host, method)
    assert key_value_shapes(host.config) == [(heads, 8) for heads in HEADS]
    cache = model.make_cache()
    with torch.no_grad():
        served = torch.cat([model(part, past_key_values=cache).logits for part in ids.split([13, 1, 6], 1)], 1)
        logits = model(ids, use_cache=False).logits
        torch.testing.assert_close(served, logits, atol=2e-5, rtol=1e-4)
        if isinstance(method, kvtrain.Full):
            torch.testing.assert_close(logits, host(ids).logits, atol=2e-5, rtol=1e-4)
    assert [layer.kv_tokens().shape for layer in cache.layers] == [(2, heads) for heads in HEADS]
    model.train()(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in model.parameters())
    model.eval().save_pretrained(tmp_path / "saved")
    again = kvtrain.load(str(tmp_path / "saved"))
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_bytes_are_counted_layer_by_layer(uneven):
    config = make_host("uneven", layers=3, key_value_heads=HEADS).config
    assert host_kv_bytes(config, 1) == 2 * sum(HEADS) * 8 * 2
    alike = [cache_bytes(make_host("llama", layers=3, kv_heads=heads).config, kvtrain.Full(), 64) for heads in HEADS]
    table = 2 * 4 + 8  # bytes of a head for 64 tokens: layers that are alike have one table
    assert 3 * cache_bytes(config, kvtrain.Full(), 64) == sum(alike) + 2 * table * sum(HEADS)
    assert kvtrain.Full().repeats(config) == []  # no layer stands for another
    assert kvtrain.Full().repeats(make_host("llama", layers=3).config) == [[(0,), (1,), (2,)]]


@pytest.mark.parametrize(
    "treat",
    [
        lambda host: kvtrain.retrofit(host, kvtrain.Duo()),
        lambda host: kvtrain.retrofit(host, kvtrain.LCKV(kv_map="0_2_2")),
        lambda host: kvtrain.convert_gqa(host, 1),
    ],
)
def test_what_treats_layers_alike_refuses_those_that_differ(uneven, treat):
    host = make_host("uneven", layers=3, key_value_heads=HEADS)
    with pytest.raises(ValueError, match=r"differ in key-value heads x channels \(1 x 8, 2 x 8, 4 x 8\)"):
        treat(host)


def test_a_planted_family_is_gone_again():
    assert list(host_adapters()) == list(FAMILIES)
    with pytest.raises(
        ValueError, match="'gpt2' are not supported; kvtrain retrofits gemma3_text, gpt_oss, llama, mistral"
    ):
        host_adapter(CONFIG_MAPPING["gpt2"]())
