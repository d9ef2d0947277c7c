"""The heart: DMC's parallel form, its prefill in chunks and its token-by-token decode are one function."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvtrain
from kvtrain.models.dmc.attention import DMCStep
from tests.hosts import dmc_at_rate, make_host, merge_rate, random_ids
from tests.models.chunks import run_chunks
from tests.thinning import thinned

RATES = (0.0, 0.1, 0.5, 0.9, 1.0)
# Every rate in one shape, and every family and number of heads at one rate.
SHAPES = [*product(("llama", "qwen3"), (4, 2, 1), RATES)]
SOME_SHAPES = [shape for shape in SHAPES if shape[:2] == ("llama", 2) or shape[2] == 0.5]


def assert_forms_agree(model, ids, tolerance, split):
    """Compare the three forms and their slot counts; returns the parallel logits."""
    length = ids.shape[1]
    with torch.no_grad():
        outputs = {}
        parallel = model(ids, use_cache=False, outputs=outputs).logits
        decoded, cache = run_chunks(model, ids, [1] * length)
        chunked, chunk_cache = run_chunks(model, ids, [size for size in split if size])
    slots = torch.stack([1 + (1 - outputs[layer][..., 1:]).sum(-1) for layer in sorted(outputs)])
    assert torch.equal(slots.long(), cache.kv_tokens())
    assert torch.equal(slots.long(), chunk_cache.kv_tokens())
    torch.testing.assert_close(decoded, parallel, atol=tolerance, rtol=0)
    torch.testing.assert_close(chunked, parallel, atol=tolerance, rtol=0)
    return parallel


@pytest.mark.parametrize(("family", "kv_heads", "rate"), thinned(SHAPES, SOME_SHAPES))
def test_forms_agree_in_float64(family, kv_heads, rate):
    """Around multiples of the window (12) and of the page (16)."""
    ids = random_ids(2, 37)
    model = dmc_at_rate(make_host(family, kv_heads=kv_heads), rate, ids, page_size=16)
    measured = merge_rate(model, ids)
    assert abs(measured - rate) < 0.12, measured
    for length in (1, 11, 12, 13, 17, 25, 37):
        third = length // 3
        assert_forms_agree(model, ids[:, :length], 1e-9, [third, length - 2 * third, third])


@settings(max_examples=15)
@given(st.data())
def test_forms_agree_on_random_shapes(data):
    """T6 with random groups, windows, pages, rates and chunks, on every family."""
    groups, kv_heads = data.draw(st.sampled_from([(1, 4), (2, 2), (2, 1), (4, 1), (8, 1)]))
    length = data.draw(st.integers(1, 50))
    family = data.draw(st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]))
    ids = random_ids(data.draw(st.integers(1, 3)), length, data.draw(st.integers(0, 99)))
    model = dmc_at_rate(
        make_host(family, groups * kv_heads, kv_heads, seed=data.draw(st.integers(0, 99))),
        data.draw(st.sampled_from(RATES)),
        ids,
        page_size=data.draw(st.integers(1, 40)),
        window=data.draw(st.integers(1, 14)),
    )
    first = data.draw(st.integers(0, length))
    second = data.draw(st.integers(0, length - first))
    assert_forms_agree(model, ids, 1e-9, [first, second, length - first - second])


@pytest.mark.parametrize("rate", RATES)
def test_forms_agree_in_float32(rate):
    ids = random_ids(2, 97)
    model = dmc_at_rate(make_host("llama", dtype=torch.float32), rate, ids)
    assert_forms_agree(model, ids, 1e-4, [40, 1, 56])


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_no_merging_is_the_host_without_the_channel(family):
    """Nothing merges and the borrowed channel is zero: the host with that channel zeroed."""
    host, ids = make_host(family), random_ids(2, 40)
    model = dmc_at_rate(host, 0.0, ids)
    with torch.no_grad():
        original = host(ids).logits.clone()
        changed = model(ids).logits
        assert (changed - original).abs().max() > 1e-6  # the channel did carry something
        masked = kvtrain.retrofit(host, kvtrain.DMC(init_bias=1e3))
        zeroed = masked(ids, use_cache=False, step=DMCStep(channel_scale=0.0)).logits
    if family != "qwen3":  # zero-out scales before a key norm, which changes the norm
        torch.testing.assert_close(changed, zeroed, atol=1e-12, rtol=0)


def test_rows_already_zero_make_the_host_itself():
    """T4, second half: with zero rows from the start a fresh retrofit changes nothing at all."""
    host, ids = make_host("llama"), random_ids(2, 40)
    with torch.no_grad():
        for layer in host.model.layers:
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                projection.weight[7::8] = 0
        # A zeroed channel before RoPE still receives its partner's rotation; the host must not see it either.
        for layer in host.model.layers:
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                projection.weight[3::8] = 0
        model = kvtrain.retrofit(host, kvtrain.DMC())
        torch.testing.assert_close(model(ids).logits, host(ids).logits, atol=1e-6, rtol=0)


def test_everything_merges_into_one_slot():
    """One slot a head, and its value is the mean of the last twelve tokens."""
    ids = random_ids(2, 30)
    model = dmc_at_rate(make_host("llama"), 1.0, ids)
    with torch.no_grad():
        _, cache = run_chunks(model, ids, [30])
    assert (cache.kv_tokens() == 1).all()
    layer = cache.layers[0]
    weights, segment = layer.segment["importance"][..., None], layer.segment["tokens"]
    values = segment[..., segment.shape[-1] // 2 :]
    # The segment keeps eleven tokens for the next mean, the slot holds twelve: their spans overlap.
    assert segment.shape[2] == 11 and bool((weights > 0).all())
    slot = torch.stack(
        [torch.stack([layer.pages.gather_row(row, head)["values"][0] for head in range(2)]) for row in range(2)]
    )
    low, high = values.amin(2), values.amax(2)
    inside = (slot >= low - (high - low)) & (slot <= high + (high - low))
    assert inside.all()


def test_noiseless_saturated_training_is_evaluation():
    """Soft decisions far from the threshold are the hard ones."""
    ids = random_ids(2, 40)
    model = dmc_at_rate(make_host("llama"), 0.5, ids, temperature=1e-6)
    with torch.no_grad():
        hard = model(ids, use_cache=False).logits
        model.train()
        soft = model(ids, use_cache=False).logits
    torch.testing.assert_close(soft, hard, atol=1e-7, rtol=0)


@pytest.mark.parametrize("training", [False, True])
def test_causality(training):
    """Changing a token changes nothing before it, also through decisions and importances."""
    ids = random_ids(1, 40)
    model = dmc_at_rate(make_host("llama"), 0.5, ids).train(training)
    other = ids.clone()
    other[0, 25] = (other[0, 25] - 3 + 7) % 58 + 3
    with torch.no_grad():
        first, second = model(ids, use_cache=False), model(other, use_cache=False)
        assert torch.equal(first.logits[:, :25], second.logits[:, :25])
        assert (first.logits[:, 25:] - second.logits[:, 25:]).abs().max() > 1e-6


def test_padded_rows_are_rows_alone():
    """Left padding, prefill and decode; the first real token appends."""
    ids = random_ids(3, 41)
    model = dmc_at_rate(make_host("llama"), 0.5, ids)
    pads = (0, 7, 23)
    mask = torch.ones_like(ids)
    for row, count in enumerate(pads):
        mask[row, :count] = 0
    with torch.no_grad():
        padded, cache = run_chunks(model, ids, [30, 8, 1, 1, 1], mask)
        parallel = model(ids, attention_mask=mask, use_cache=False).logits
        for row, count in enumerate(pads):
            alone, alone_cache = run_chunks(model, ids[row : row + 1, count:], [41 - count])
            torch.testing.assert_close(padded[row, count:], alone[0], atol=1e-9, rtol=0)
            torch.testing.assert_close(parallel[row, count:], alone[0], atol=1e-9, rtol=0)
            assert torch.equal(cache.kv_tokens()[:, row], alone_cache.kv_tokens()[:, 0])


def test_packed_documents_are_documents_alone():
    """No attention and no merging across a document start."""
    ids = random_ids(1, 50)
    model = dmc_at_rate(make_host("llama"), 0.9, ids)
    documents = torch.tensor([[1] * 13 + [2] * 1 + [3] * 24 + [4] * 12])
    with torch.no_grad():
        packed = model(ids, document_ids=documents).logits
        for number in range(1, 5):
            place = documents[0] == number
            alone = model(ids[:, place], use_cache=False).logits
            torch.testing.assert_close(packed[:, place], alone, atol=1e-9, rtol=0)


def test_two_caches_do_not_touch():
    ids, other = random_ids(2, 30), random_ids(2, 30, seed=5)
    model = dmc_at_rate(make_host("llama"), 0.5, ids)
    with torch.no_grad():
        expected = run_chunks(model, ids, [1] * 30)[0]
        first, second, logits = model.make_cache(), model.make_cache(), []
        for token in range(30):
            logits.append(model(ids[:, token : token + 1], past_key_values=first).logits)
            model(other[:, token : token + 1], past_key_values=second)
    assert torch.equal(torch.cat(logits, 1), expected)


def test_long_segments_do_not_drift():
    """After thousands of merges the slot is still the exact mean of its last twelve tokens."""
    ids = random_ids(1, 3000)
    model = dmc_at_rate(make_host("llama", layers=1), 1.0, ids)
    with torch.no_grad():
        _, streamed = run_chunks(model, ids, [500] * 6)
        _, fresh = run_chunks(model, ids[:, -12:], [12])
    values = (cache.layers[0].pages.gather_row(0, 1)["values"] for cache in (streamed, fresh))
    torch.testing.assert_close(*values, atol=1e-12, rtol=0)


@pytest.mark.parametrize("settings", [{"decisions": "random", "compression": 3.0}, {"shared_decisions": True}])
def test_other_decisions_serve_as_they_are_evaluated(settings):
    """Random and shared decisions keep the heart; padding does not shift what is random."""
    ids = random_ids(2, 45)
    model = kvtrain.retrofit(make_host("qwen3", kv_heads=2), kvtrain.DMC(**settings))
    if "shared_decisions" in settings:
        model = dmc_at_rate(make_host("qwen3", kv_heads=2), 0.5, ids, **settings)
    assert_forms_agree(model, ids, 1e-9, [20, 1, 24])
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    with torch.no_grad():
        padded, _ = run_chunks(model, ids, [30, 1, 14], mask)
        alone, _ = run_chunks(model, ids[:1, 9:], [36])
    torch.testing.assert_close(padded[0, 9:], alone[0], atol=1e-9, rtol=0)


def test_shared_decisions_keep_heads_equally_long():
    ids = random_ids(2, 60)
    model = dmc_at_rate(make_host("llama"), 0.5, ids, shared_decisions=True)
    with torch.no_grad():
        kept = run_chunks(model, ids, [60])[1].kv_tokens()
    assert torch.equal(kept[..., :1].expand_as(kept), kept)
    assert len(kept[:, :, 0].unique()) > 1


@pytest.mark.parametrize("compression", [1.0, 2.0, 8.0])
def test_random_decisions_merge_at_the_asked_rate(compression):
    """One pattern by position when serving, another one for every row and step while training."""
    ids = random_ids(4, 500)
    model = kvtrain.retrofit(make_host("llama", layers=1), kvtrain.DMC(compression=compression, decisions="random"))
    assert abs(merge_rate(model, ids) - (1 - 1 / compression)) < 0.05
    handed_out = []
    for number in (0, 0, 1):
        handed_out.append({})
        step = DMCStep(seed=0, step=number, row_ids=torch.arange(4), compression=2.0)
        with torch.no_grad():
            model.train()(ids, use_cache=False, outputs=handed_out[-1], step=step)
    first, again, later = (outputs[0] for outputs in handed_out)
    assert torch.equal(first, again) and not torch.equal(first, later) and not torch.equal(first[0], first[1])
    assert abs(first[..., 1:].mean() - 0.5) < 0.05


def test_sums_are_exact_after_thousands_of_merges():
    """16,384 tokens merged one by one, and the mean is that of the last twelve alone."""
    from kvtrain.cache.rows import Placement
    from kvtrain.models.dmc.cache import DMCCacheLayer

    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        layer = DMCCacheLayer(1, 4, Placement(dtype), window=12, page_size=32)
        layer.segment.admit(1)
        valid, one = torch.ones(1, 1, dtype=torch.bool), torch.ones(1, 1, 1)
        tokens, weights = torch.randn(1, 1, 16385, 8).to(dtype) + 2.6, torch.rand(1, 1, 16385) + 2**-7
        for token in range(16385):
            place = slice(token, token + 1)
            mean = layer.extend_segment(tokens[:, :, place], one * (token > 0), weights[..., place], valid)
        last = weights[..., -12:].double()
        exact = (last @ tokens[:, :, -12:].double()[0]) / last.sum()
        rounded = exact[0].to(dtype).double()
        torch.testing.assert_close(mean[0, 0].double(), rounded, atol=1e-6, rtol=1e-6)
