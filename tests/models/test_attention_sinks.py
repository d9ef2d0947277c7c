"""Learned sinks: the naive softmax with a column more, every method that knows them, and gpt-oss as it is published."""

import pytest
import torch
from transformers import Mxfp4Config

import kvtrain
from kvtrain.kernels.attention import add_sinks, attention
from kvtrain.kernels.documents import Documents
from tests.hosts import make_host, random_ids

# As of openai/gpt-oss-20b, but for lengths.
PUBLISHED_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 16,
}
BACKENDS = ["reference", "chunked", "flash_cpu"]


def inputs(batch=2, heads=4, kv_heads=2, length=7, dim=8):
    """Queries, keys, values and sinks, in float64."""
    shapes = [(batch, heads, length, dim), (batch, kv_heads, length, dim), (batch, kv_heads, length, dim), (heads,)]
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes]


def with_sinks(query, key, value, sinks, **told):
    return add_sinks(attention(query, key, value, **told), sinks)[0]


def naive(query, key, value, sinks, visible):
    """One softmax over all keys and a column more, which has no value."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = (query @ key.mT * query.shape[-1] ** -0.5).masked_fill(~visible, float("-inf"))
    column = sinks[:, None, None].expand(*scores.shape[:3], 1)
    return torch.cat([scores, column], -1).softmax(-1)[..., :-1] @ value


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_the_softmax_with_a_column_more(backend, strict):
    """Forward and backward; under a strict mask the first token of a document sees the sink alone."""
    tensors, ids = inputs(), torch.tensor([[0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 2, 2, 2, 2]])
    visible = (ids[:, :, None] == ids[:, None]).tril(-1 if strict else 0)[:, None]
    found = with_sinks(*tensors, documents=Documents(ids), strict=strict, backend=backend)
    expected = naive(*tensors, visible)
    torch.testing.assert_close(found, expected, atol=1e-14, rtol=0)
    assert bool((found[1, :, 3] == 0).all()) is strict
    cotangent = torch.randn_like(expected, generator=torch.Generator().manual_seed(4))
    ours, theirs = (torch.autograd.grad(output, tensors, cotangent) for output in (found, expected))
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, atol=1e-13, rtol=0)
    assert all(gradient.abs().max() > 1e-3 for gradient in ours)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_those_of_differences(backend):
    assert torch.autograd.gradcheck(lambda *tensors: with_sinks(*tensors, backend=backend), inputs(1, 2, 1, 4, 4))


def test_half_types_are_rounded_once():
    query, key, value, sinks = (tensor.detach() for tensor in inputs())
    exact = with_sinks(query, key, value, sinks)
    output, lse = attention(query, key, value)
    found, total = add_sinks((output.bfloat16(), lse.float()), sinks.bfloat16())
    assert (found.dtype, total.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(found.double(), exact, atol=0, rtol=2**-7)


def without_sinks(model):
    for layer in model.model.layers:
        layer.self_attn.sinks.data.fill_(-1e4)
    return model


METHODS = [
    kvtrain.Full(),
    kvtrain.DMC(),
    kvtrain.DMS(window=5),
    kvtrain.Duo(sink=2, recent=5),
    kvtrain.Duo(sink=2, recent=5, compensation=True),
    kvtrain.Duo(sink=2, recent=5, full_heads=((0,), (1,))),
]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_every_method_learns_them(method):
    """All parameters have a gradient, and sinks that weigh nothing are another model."""
    ids = random_ids(2, 20)
    model = kvtrain.retrofit(make_host("gpt_oss"), method).train()
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    sinks = [layer.self_attn.sinks for layer in model.model.layers]
    assert all(bool((sink.grad.abs() > 1e-9).all()) for sink in sinks)
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert (without_sinks(model)(ids, labels=ids, use_cache=False).loss - loss).abs() > 1e-6


def test_a_gradient_is_that_of_the_host():
    host, ids = make_host("gpt_oss", dtype=torch.float32), random_ids(2, 20)
    model = kvtrain.retrofit(make_host("gpt_oss", dtype=torch.float32, router_aux_loss_coef=0.0), kvtrain.Full())
    for one in (host, model.train()):
        one(ids, labels=ids).loss.backward()
    theirs = {name: parameter.grad for name, parameter in host.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name], atol=1e-4 * theirs[name].abs().max().item(), rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_published_angles_are_the_hosts(dtype):
    """YaRN without truncation, beyond the length that it stretches."""
    host, ids = make_host("gpt_oss", dtype=dtype, rope_parameters=PUBLISHED_ROPE), random_ids(2, 48)
    model = kvtrain.retrofit(host, kvtrain.Full())
    assert model.model.rotary_emb.attention_scaling == host.model.rotary_emb.attention_scaling > 1.3
    with torch.no_grad():
        expected, tolerance = host(ids).logits, 1e-5 if dtype == torch.float32 else 0.1
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected, atol=tolerance, rtol=0)
        cache = model.make_cache()
        served = torch.cat([model(part, past_key_values=cache).logits for part in ids.split([13, 1, 30, 4], 1)], 1)
        torch.testing.assert_close(served, expected, atol=tolerance, rtol=0)


def test_angles_leave_the_meta_device_as_they_were():
    model = kvtrain.retrofit(make_host("gpt_oss", rope_parameters=PUBLISHED_ROPE), kvtrain.Full())
    rotary = model.model.rotary_emb
    expected = rotary.inv_freq.clone()
    rotary.inv_freq.zero_()
    rotary.reset_parameters()
    assert torch.equal(rotary.inv_freq, expected)


def test_heads_are_sorted_with_their_sinks():
    host = make_host("gpt_oss")
    sinks = host.model.layers[0].self_attn.sinks.detach().clone()
    rounded = kvtrain.retrofit(host, kvtrain.Duo(sink=2, recent=5, full_heads=((1,), (0,))))
    assert torch.equal(rounded.model.layers[0].self_attn.sinks, sinks[[2, 3, 0, 1]])
    gates = torch.tensor([[0.1, 0.9], [0.9, 0.1]])
    same = kvtrain.retrofit(host, kvtrain.Duo(sink=2, recent=5)).binarize(0.5, gates)
    weights = rounded.state_dict()
    assert same.method.full_heads == rounded.method.full_heads
    assert [name for name, tensor in same.state_dict().items() if not torch.equal(tensor, weights[name])] == []


def test_a_method_that_does_not_know_them_is_refused():
    words = "method 'lckv' does not know attention sinks, which hosts of type 'gpt_oss' learn; use one that does"
    with pytest.raises(ValueError, match=words):
        kvtrain.retrofit(make_host("gpt_oss"), kvtrain.LCKV(kv_map="0_0"))


@pytest.mark.parametrize("settings", [Mxfp4Config(), Mxfp4Config().to_dict()], ids=["object", "file"])
def test_quantized_weights_are_refused(settings):
    host = make_host("gpt_oss")
    host.config.quantization_config = settings
    with pytest.raises(ValueError, match=r"quantized by 'mxfp4' are not supported; load .*dequantize=True"):
        kvtrain.retrofit(host, kvtrain.Full())
