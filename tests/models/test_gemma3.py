"""Gemma 3: frequencies by type of layer, norms around 1, a scaled embedding; and what it is refused with."""

import pytest
import torch
from transformers import Gemma3TextConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm, Gemma3RotaryEmbedding

import kvtrain
from kvtrain.models.compiled import CompiledStep
from kvtrain.models.hosts import host_adapter
from kvtrain.models.modules import ZeroCenteredRMSNorm
from kvtrain.training.strategies.shards import compute_buffers
from tests.caches import CACHES
from tests.hosts import exact, make_host, random_ids

KINDS = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
BASES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e2},
    "full_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
}
LENGTH = 40


def host_of(layers=4, **settings):
    """With windows that hold all of a test's tokens."""
    usual = {"sliding_window": 4096, "layer_types": KINDS[:layers], "rope_parameters": BASES}
    return make_host("gemma3_text", layers=layers, **{**usual, **settings})


def close(actual, expected, tolerance=1e-11):
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


@torch.no_grad()
def test_layers_of_both_types_are_the_host_s():
    """In float64, too, where every type's frequencies, norms and the scale of the embedding are exact."""
    host, ids = host_of(), random_ids(2, LENGTH)
    model, expected = kvtrain.retrofit(host, kvtrain.Full()), exact(host)(ids).logits
    close(model(ids).logits, expected)
    close(model(ids, use_cache=False).logits, expected)
    swapped = dict(zip(BASES, reversed(BASES.values()), strict=True))
    swapped = kvtrain.retrofit(host_of(rope_parameters=swapped), kvtrain.Full())
    assert (swapped(ids).logits - expected).abs().max() > 1e-3
    single = host_of(dtype=torch.float32)
    model, options = kvtrain.retrofit(single, kvtrain.Full()), {"max_new_tokens": 12, "do_sample": False}
    close(model(ids).logits, single(ids).logits, 1e-5)
    assert torch.equal(model.generate(ids, **options), single.generate(ids, **options))


@torch.no_grad()
def test_frequencies_are_the_host_s_and_computed_anew_where_no_file_has_them():
    config = host_of().config
    theirs, model = Gemma3RotaryEmbedding(config), kvtrain.retrofit(host_of(dtype=torch.float32), kvtrain.Full())
    states, positions = torch.empty(1), torch.tensor([[0, 1, 700], [3, 90_000, 5]])
    for place in ("copied", "computed"):
        for kind in BASES:
            for mine, its in zip(
                model.model.rotary_emb(states, positions, kind), theirs(states, positions, kind), strict=True
            ):
                assert torch.equal(mine, its), (place, kind)
        model.model.rotary_emb.to_empty(device="cpu")
        compute_buffers(model)


@torch.no_grad()
def test_caches_rotate_by_their_own_layer():
    host = host_of(sliding_window=None)  # so that every layer has one
    model = kvtrain.retrofit(host, kvtrain.ExpectedAttention(budget=9, recent=2, sink=2, num_future=16))
    positions = torch.tensor([[0, 1, 700], [3, 90_000, 5]])
    layers = model.make_cache().layers
    for kind, layer in zip(KINDS, layers, strict=True):
        expected = model.model.rotary_emb(torch.empty(1, dtype=torch.float64), positions, kind)
        assert all(map(torch.equal, layer.angles(positions), expected))
    assert not torch.equal(layers[0].angles(positions)[0], layers[1].angles(positions)[0])


@torch.no_grad()
@pytest.mark.parametrize("name", ["dmc", "dms", "duo", "snapkv", "expectedattention"])
def test_what_trains_is_what_is_served_with_both_types(name):
    entry, ids = CACHES[name], random_ids(2, LENGTH)
    model = entry.retrofit(host_of(entry.layers))
    cache, parts = model.make_cache(), ids.split([13, 1, 1, 8, *[1] * 17], 1)
    served = torch.cat([model(part, past_key_values=cache).logits for part in parts], 1)
    close(served, model(ids, use_cache=False).logits)
    assert (served - kvtrain.retrofit(host_of(entry.layers), kvtrain.Full())(ids).logits).abs().max() > 1e-3


@torch.no_grad()
def test_a_decoding_step_is_one_graph():
    model, ids = kvtrain.retrofit(host_of(dtype=torch.float32), kvtrain.Full()), random_ids(2, 9)
    caches = [model.make_cache(1 << 22, preallocate=True) for _ in range(2)]
    for cache in caches:
        model(ids, past_key_values=cache)
    step = CompiledStep(model, caches[0], backend="aot_eager")
    found, expected = step(ids[:, :1]), model(ids[:, :1], past_key_values=caches[1]).logits[:, -1]
    assert (step.compilations, step.eager) == (1, False)
    close(found, expected, 1e-5)


def test_layers_that_rotate_differently_share_no_keys():
    with pytest.raises(ValueError, match=r"rotate keys differently .* such as kvtrain\.DMC"):
        kvtrain.retrofit(host_of(), kvtrain.LCKV(kv_map="cla2"))
    alike = {kind: {"rope_type": "default", "rope_theta": 1e3} for kind in BASES}
    method = kvtrain.LCKV(kv_map="0s_1_0s_1", sliding_window=4096)
    model, ids = kvtrain.retrofit(host_of(rope_parameters=alike), method), random_ids(2, LENGTH)
    with torch.no_grad():
        cache, parts = model.make_cache(), ids.split([13, 1, 26], 1)
        served = torch.cat([model(part, past_key_values=cache).logits for part in parts], 1)
        close(served, model(ids, use_cache=False).logits)


@torch.no_grad()
def test_norms_multiply_in_float32():
    """A weight of 2 ** -9 beside 1 is nothing in bfloat16; what is rounded is the product, and once."""
    theirs = Gemma3RMSNorm(64).to(torch.bfloat16)
    theirs.weight.copy_(torch.linspace(-(2**-9), 2**-9, 64))
    hidden = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    wide = hidden.double()
    expected = (1 + theirs.weight.double()) * wide / (wide.square().mean(-1, keepdim=True) + theirs.eps).sqrt()
    found = ZeroCenteredRMSNorm(theirs)(hidden)
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected.to(torch.bfloat16))
    assert not torch.equal((expected / (1 + theirs.weight.double())).to(torch.bfloat16), found)


def test_every_weight_learns_and_opens_again(tmp_path):
    """By the host's names, and with head and embedding tied."""
    host, ids = host_of(dtype=torch.float32), random_ids(2, LENGTH)
    model = kvtrain.retrofit(host, kvtrain.Full()).train()
    assert list(model.state_dict()) == list(host.state_dict())
    model(ids, labels=ids).loss.backward()
    host.train()(ids, labels=ids).loss.backward()  # the very parameters
    before = {name: parameter.grad.clone() for name, parameter in host.named_parameters()}
    host.zero_grad()
    host(ids, labels=ids).loss.backward()
    for name, parameter in host.named_parameters():
        torch.testing.assert_close(before[name], 2 * parameter.grad, atol=1e-5, rtol=1e-3, msg=name)
        assert parameter.grad.abs().max() > 0
    model.eval().save_pretrained(tmp_path)
    again = kvtrain.load(str(tmp_path))
    assert again.lm_head.weight is again.model.embed_tokens.weight
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attn_logit_softcapping": 50.0}, "set attn_logit_softcapping=None"),
        ({"final_logit_softcapping": 30.0}, "set final_logit_softcapping=None"),
        ({"use_bidirectional_attention": True}, "set use_bidirectional_attention=False"),
        ({"attention_dropout": 0.1}, "set attention_dropout=0.0"),
        ({"hidden_activation": "silu"}, "activation 'silu' is not supported; use 'gelu_pytorch_tanh'"),
        (
            {
                "rope_parameters": {
                    **BASES,
                    "full_attention": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
                }
            },
            "type 'dynamic' is not supported",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_would_be_ignored_is_refused(settings, message):
    config = Gemma3TextConfig(num_hidden_layers=4, **{"layer_types": KINDS, "rope_parameters": BASES, **settings})
    with pytest.raises(ValueError, match=message):
        host_adapter(config).validate(config)
