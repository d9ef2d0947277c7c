"""A compiled model is what it is uncompiled: with a cache, token by token and several at a time, and in training."""

import pytest
import torch

import kvtrain
from tests.caches import CACHES
from tests.hosts import make_host, random_ids

pytestmark = pytest.mark.roads  # tracing takes long; what it trips over first is tested beside stores and kernels


@pytest.fixture(autouse=True)
def _forgotten():
    """Graphs of one test are none of another's."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def model_of(name, layers=None):
    entry = CACHES[name]
    return entry.retrofit(make_host(layers=layers or entry.layers, dtype=torch.float32))


def reading(forward, model, ids):
    """Logits of a prompt in two pieces and of two tokens behind it, one at a time, and what the cache has kept."""
    cache = model.make_cache()
    logits = [forward(part, past_key_values=cache).logits for part in ids.split([7, 3, 1, 1], 1)]
    return torch.cat(logits, 1), [layer.kv_tokens() for layer in cache.layers]


def reads_the_same(name, backend, layers=None):
    model, ids = model_of(name, layers), random_ids(2, 12)
    with torch.no_grad():
        expected = reading(model, model, ids)
        torch.testing.assert_close(reading(torch.compile(model, backend=backend), model, ids), expected)


def learns_the_same(name, backend, layers=None):
    model, ids = model_of(name, layers).train(), random_ids(2, 12)

    def step(forward):
        torch.manual_seed(0)  # of dropout
        loss = forward(ids, labels=ids).loss
        return loss.detach(), torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)

    expected = step(model)
    assert any(grad is not None and grad.abs().max() > 0 for grad in expected[1])
    torch.testing.assert_close(step(torch.compile(model, backend=backend)), expected)


@pytest.mark.parametrize("name", ["dmc", "dms", "duo_compensated", "transnormer_t2"])
def test_reading(name):
    reads_the_same(name, "eager", layers=2)


@pytest.mark.parametrize("name", ["dmc", "dms", "transnormer_t2"])
def test_learning(name):
    """As far as the graphs that a compiler would get, in which what is written to may not overlap."""
    learns_the_same(name, "aot_eager", layers=2)


def test_generating():
    model, ids = kvtrain.retrofit(make_host(layers=1), kvtrain.DMC(init_bias=0.0, page_size=4)), random_ids(2, 5)
    told = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **told)
    model.forward = torch.compile(model.forward, backend="eager")
    assert torch.equal(model.generate(ids, **told), expected)


def test_inductor():
    reads_the_same("dmc", "inductor", layers=1)
    learns_the_same("dmc", "inductor", layers=1)
