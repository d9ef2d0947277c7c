"""The page size that a cache is asked for, in place of the one in its model's settings."""

import re

import pytest
import torch
import transformers

import kvtrain
from kvtrain.assets import resolve
from kvtrain.inference.engine.limits import Limits
from kvtrain.inference.engine.loop import EngineLoop
from kvtrain.models import build
from kvtrain.models.method import Method
from tests.cache.test_conformance import close, filled, model_of, streams
from tests.caches import CACHES
from tests.hosts import make_host

pytestmark = pytest.mark.usefixtures("no_grad")
PAGED = [name for name in CACHES if not name.startswith("transnormer")]


def page_sizes(cache):
    found = (getattr(layer, "pages", None) for layer in cache.layers)
    return {pages.page_size for pages in found if pages is not None}


@pytest.mark.parametrize("page_size", [1, 3, 64])
@pytest.mark.parametrize("method", PAGED)
def test_pages_of_any_size_give_the_same_logits(method, page_size):
    """A prompt in chunks, then token by token; rows leave in between."""
    model, (ids, expected) = model_of(method), streams(method)
    cache, begin = model.make_cache(page_size=page_size), 0
    for size in (13, 1, 1, 9, 1, 1, 1):
        logits = model(ids[:3, begin : begin + size], past_key_values=cache).logits
        close(logits, expected[:3, begin : begin + size])
        begin += size
    cache.free_rows([1])
    close(model(ids[[0, 2], begin : begin + 4], past_key_values=cache).logits, expected[[0, 2], begin : begin + 4])
    assert page_sizes(cache) == {page_size}
    assert page_sizes(model.make_cache()) == {32 if method == "full" else 4}


@pytest.mark.parametrize("page_size", [8, 32])
def test_a_short_row_takes_as_many_bytes_as_its_pages(page_size):
    """A token of DMC: a page a head and layer, its place in the table and its length, and the open segment."""
    host, method = transformers.AutoModelForCausalLM.from_pretrained(resolve("kvtrain:tiny")).float(), kvtrain.DMC()
    model, layers, window = kvtrain.retrofit(host, method), host.config.num_hidden_layers, method.window
    heads, head_dim = host.config.num_key_value_heads, host.config.head_dim
    cache = model.make_cache(page_size=page_size)
    model(torch.tensor([[5]]), past_key_values=cache)
    page, segment = page_size * 2 * head_dim * 4, (window - 1) * (2 * head_dim + 1) * 4
    assert cache.held_bytes() == layers * heads * (page + 4 + 8 + segment) + 8
    assert round(cache.held_bytes() / 1024) == {8: 231, 32: 519}[page_size]


def test_an_engine_serves_with_pages_of_the_size_that_it_is_given():
    loop = EngineLoop(model_of("dmc"), None, 1 << 22, Limits(page_size=3))
    assert page_sizes(loop.runner.rows.cache) == {3}
    with pytest.raises(ValueError, match="page_size must be at least 1, not 0"):
        Limits(page_size=0)


@pytest.mark.parametrize(
    ("method", "options", "reason"),
    [
        ("transnormer_t2", {}, "TransNormer's caches have no option 'page_size'; leave it out"),
        (
            "lckv",
            {"sink": 1, "recent": 5},
            "an endless cache is of constant size and has no pages; leave page_size out",
        ),
        *((method, {"page_size": 0}, "page_size must be at least 1") for method in ("full", "dmc", "duo", "lckv")),
    ],
)
def test_what_has_no_pages_and_pages_without_slots_are_refused(method, options, reason):
    with pytest.raises(ValueError, match=re.escape(reason)) as refusal:
        model_of(method).make_cache(**{"page_size": 8, **options})
    assert "\n" not in str(refusal.value)


def test_a_method_without_the_setting_has_no_such_option():
    class Builder(build.Builder[Method]):
        attention = None

    Builder.__abstractmethods__ = frozenset()
    with pytest.raises(ValueError, match="caches of method 'full' have no option 'page_size'; leave it out"):
        Builder(kvtrain.Full(), make_host("llama").config).cache_layers([], page_size=8)


@pytest.mark.parametrize("method", ["full", "dmc", "duo_compensated", "lckv", "lckv_fused"])
def test_rows_of_other_pages_are_refused_and_nothing_has_changed(method):
    model, (ids, expected) = model_of(method), streams(method)
    cache, other = filled(model, ids[:2, :20]), model.make_cache(page_size=7)
    model(ids[:1, :9], past_key_values=other)
    for attempt in (lambda: cache.join(other), lambda: cache.restore_row(1, other.snapshot_row(0))):
        with pytest.raises(ValueError, match="page size"):
            attempt()
    assert cache.tokens.tolist() == [20, 20] and {store.num_rows for store in cache.stores} == {2}
    close(model(ids[:2, 20:25], past_key_values=cache).logits, expected[:2, 20:25])
