"""A cache of constant size over any length: sinks and latest tokens, each token at a position assigned anew."""

from functools import cache as remember
from itertools import product

import pytest
import torch

import kvtrain
from tests.hosts import make_host, random_ids
from tests.models.lckv_reference import Reference
from tests.thinning import thinned

SINK, RECENT = 4, 12
EXACT = {"forward_passes": 20, "prefill_block": 16}  # as many passes as a block has tokens
YARN = {
    "max_position_embeddings": 64,
    "rope_parameters": {
        "rope_type": "yarn",
        "factor": 4.0,
        "rope_theta": 1e4,
        "original_max_position_embeddings": 16,
    },
}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def make(family, kv_map, host=None, **settings):
    host = make_host(family, layers=len(kv_map.split("_")), **(host or {}))
    return kvtrain.retrofit(host, kvtrain.LCKV(kv_map=kv_map, **{**EXACT, **settings}))


def stream(model, ids, size, mask=None, cache=None, **told):
    """Feed chunks of ``size``; logits of all, and the cache."""
    cache = cache or model.make_cache(sink=SINK, recent=RECENT)
    mask = torch.ones_like(ids) if mask is None else mask
    parts = zip(ids.split(size, 1), mask.split(size, 1), strict=True)
    logits = [model(part, attention_mask=real, past_key_values=cache, **told).logits for part, real in parts]
    return torch.cat(logits, 1), cache


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-9, rtol=0)


@remember
def long_streams(family, kv_map):
    model, ids = make(family, kv_map), random_ids(2, 200)
    with torch.no_grad():
        return model, ids, Reference(model, kv_map).sequential(ids, SINK, RECENT)


STREAMING = [*product(("llama", "qwen3"), ("0_3_3_3_3", "0_0_2_2"), (1, 7, 64))]
SOME_STREAMING = [
    ("llama", "0_3_3_3_3", 1),
    ("llama", "0_0_2_2", 7),
    ("qwen3", "0_3_3_3_3", 7),
    ("qwen3", "0_0_2_2", 64),
]


@pytest.mark.parametrize(("family", "kv_map", "size"), thinned(STREAMING, SOME_STREAMING))
def test_streaming_is_the_kept_tokens_side_by_side(family, kv_map, size):
    """Far beyond what fits, in any chunks; the second row has a third of its columns padded."""
    model, ids, expected = long_streams(family, kv_map)
    mask = torch.ones_like(ids)
    mask[1] = torch.arange(200) % 3 > 0
    sent = ids.clone()
    sent[1, mask[1] > 0] = ids[1, : int(mask[1].sum())]
    logits, cache = stream(model, sent, size, mask)
    close(logits[0], expected[0])
    close(logits[1][mask[1] > 0], expected[1, : int(mask[1].sum())])
    owners = {int(entry) for entry in kv_map.split("_")}
    kept = [[SINK + RECENT] * 2 if layer in owners else [0] * 2 for layer in range(len(kv_map.split("_")))]
    assert cache.kv_tokens()[..., 0].tolist() == kept


def test_dropping_tokens_matters():
    """What the reference above drops is seen in its logits."""
    model, ids, expected = long_streams("llama", "0_3_3_3_3")
    unlimited = Reference(model, "0_3_3_3_3").sequential(ids[:, :40])
    close(unlimited[:, : SINK + RECENT], expected[:, : SINK + RECENT])
    assert (unlimited - expected[:, :40])[:, SINK + RECENT :].abs().amax((0, 2)).min() > 1e-3


@pytest.mark.parametrize(
    ("kv_map", "host", "settings", "reference"),
    [
        ("0_3_3_3_3", YARN, {}, {}),
        ("0_0_2_2", YARN, {}, {}),
        ("0_3_0_3_3", {}, {}, {}),
        ("0_2_2_4_4", {}, {}, {}),
        ("0_3_3_3_4", {}, {"mask_all_diagonals": True, "stale_target": True}, {"closed": True}),
        ("0s_2s_2s_3", {}, {"sliding_window": 16}, {"window": 16}),
        ("0_1_1", {}, {"value_map": "first", "residual": True}, {"values": "0_1_0"}),
    ],
    ids=["yarn", "yarn cla", "reads below its stage", "two stages", "no diagonal", "windows", "fused residual"],
)
def test_other_maps_and_angles(kv_map, host, settings, reference):
    model, ids = make("llama", kv_map, host, **settings), random_ids(2, 30)
    for name, parameter in model.named_parameters():
        if name.endswith("_mix"):
            parameter.add_(0.3)
    expected = Reference(model, kv_map, **reference).sequential(ids, SINK, RECENT)
    for size in (1, 7, 30):
        close(stream(model, ids, size)[0], expected)


@pytest.mark.parametrize(("sink", "recent"), [(0, 1), (0, 9), (1, 1), (15, 1)])
def test_any_split_of_the_capacity(sink, recent):
    """Where the token itself is all that is recent, cyclic layers see the sinks alone, or nothing."""
    model, ids = make("llama", "0_3_3_3"), random_ids(2, 24)
    cache = model.make_cache(sink=sink, recent=recent)
    close(stream(model, ids, 5, cache=cache)[0], Reference(model, "0_3_3_3").sequential(ids, sink, recent))


def test_nothing_differs_until_something_is_dropped():
    """Also with few passes and blocks that a chunk cuts."""
    model = make("llama", "0_3_3_3_3", forward_passes=2, backward_passes=1, prefill_block=8, page_size=4)
    ids = random_ids(2, SINK + RECENT)
    expected, _ = stream(model, ids, 16, cache=model.make_cache(), prefill=True)
    for size in (16, 5, 1):
        close(stream(model, ids, size, prefill=True)[0], expected)
    assert (expected - stream(model, ids, 1)[0]).abs().max() > 1e-3  # decoding is another thing


@pytest.mark.parametrize("kv_map", ["0_3_3_3_3", "0_3_0_3_4"])
def test_few_passes_depend_neither_on_chunks_nor_on_neighbours(kv_map):
    """A prompt iterates as far as it fits, and every later token goes in alone, wherever it is cut."""
    model = make("llama", kv_map, forward_passes=2, backward_passes=1, prefill_block=7, page_size=4)
    ids = random_ids(2, 30)
    expected, _ = stream(model, ids, 30, prefill=True)
    mask = torch.ones_like(ids)
    mask[1] = torch.arange(30) % 3 > 0
    sent = ids.clone()
    sent[1, mask[1] > 0] = ids[1, :20]
    for size in (1, 5, 13, 30):
        close(stream(model, ids, size, prefill=True)[0], expected)
        logits, _ = stream(model, sent, size, mask, prefill=True)
        close(logits[0], expected[0])
        close(logits[1][mask[1] > 0], expected[1, :20])


@pytest.mark.parametrize("kv_map", ["0_3_3_3_3", "0_0_2_2"])
def test_memory_is_constant(kv_map):
    model, ids = make("llama", kv_map), random_ids(2, 120)
    _, cache = stream(model, ids[:, :1], 1)
    before = cache.kv_bytes()
    owners = len(set(kv_map.split("_")))
    rings = 2 * owners * (2 * 2 * 8 * (SINK + RECENT) * 8 + 8)  # rows, keys and values, heads, D, slots, float64
    assert before == rings + 2 * 8
    for begin in (1, 8, 100):
        stream(model, ids[:, begin : begin + 7], 7, cache=cache)
        assert cache.kv_bytes() == before and cache.free_bytes() == 0


def test_a_prompt_of_one_token_after_the_cache_is_full():
    """A second turn, or a last chunk, may be a single token: it drops another one like any other."""
    model, ids, expected = long_streams("llama", "0_3_3_3_3")
    logits, cache = stream(model, ids[:, :30], 7)
    close(logits, expected[:, :30])
    close(stream(model, ids[:, 30:36], 1, cache=cache, prefill=True)[0], expected[:, 30:36])


def test_generation_goes_on_for_ever():
    """Greedy tokens are those that the reference would choose, through two turns."""
    model, ids = make("llama", "0_3_3_3_3"), random_ids(1, 9)
    cache = model.make_cache(sink=SINK, recent=RECENT)
    told = {"past_key_values": cache, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    first = model.generate(ids, max_new_tokens=30, **told)
    turn = torch.cat([first, random_ids(1, 4, seed=1)], 1)
    second = model.generate(turn, max_new_tokens=10, **told)
    assert second.shape == (1, 9 + 30 + 4 + 10) and cache.get_seq_length() == 52
    chosen = Reference(model, "0_3_3_3_3").sequential(second, SINK, RECENT).argmax(-1)
    assert torch.equal(chosen[:, 8:38], second[:, 9:39])
    assert torch.equal(chosen[:, 42:52], second[:, 43:])


def test_rows_of_any_length_share_a_batch():
    """Full rows and fresh ones join, change places and leave."""
    model, ids, expected = long_streams("llama", "0_3_3_3_3")
    _, cache = stream(model, ids[:1, :40], 40)
    _, other = stream(model, ids[1:, :9], 9)
    cache.join(other)
    cache.reorder_cache(torch.tensor([1, 0, 1]))
    seen = torch.tensor([9, 40, 9])
    rows = torch.tensor([1, 0, 1])
    for _ in range(12):
        logits = model(ids[rows, seen][:, None], past_key_values=cache).logits
        close(logits[:, 0], expected[rows, seen])
        seen += 1
    state = cache.snapshot_row(1)
    cache.free_rows([1])
    cache.restore_row(0, state)
    close(model(ids[[0, 1], [52, 21]][:, None], past_key_values=cache).logits[:, 0], expected[[0, 1], [52, 21]])


def test_refusals_name_the_remedy():
    model = make("llama", "0_3_3_3_3")
    with pytest.raises(ValueError, match="needs recent="):
        model.make_cache(sink=4)
    with pytest.raises(ValueError, match="at least 1 recent token"):
        model.make_cache(sink=4, recent=0)
    with pytest.raises(ValueError, match="no option 'bogus'"):
        model.make_cache(bogus=1)
    with pytest.raises(ValueError, match="let sink \\+ recent be no more than sliding_window"):
        make("llama", "0s_2s_2s_3", sliding_window=15).make_cache(sink=SINK, recent=RECENT)
