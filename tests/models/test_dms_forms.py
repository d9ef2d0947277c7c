"""The heart: DMS's training form, its prefill in chunks and its token-by-token decode are one function."""

import copy
from random import Random
from statistics import NormalDist
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvtrain
from kvtrain.kernels.attention import attention
from kvtrain.models.dms import attention as dms_attention
from kvtrain.models.dms.attention import DMSStep
from tests.hosts import dms_at_rate, exact, make_host, random_ids
from tests.models.chunks import run_chunks
from tests.models.naive_dms import Rule, naive_dms

EXACT = 1e-12  # float64
CHANNEL = {"decide_by": "query_channel", "trainable": "all"}


def decisions_of(model, ids):
    """Hard decisions ``(layers, B, H_kv, T)``."""
    outputs = {}
    with torch.no_grad():
        model(ids, use_cache=False, outputs=outputs)
    return torch.stack([outputs[layer] for layer in sorted(outputs)])


def live_slots(decisions, window):
    """T - #{k: decision k + 1, and T - 1 - k > W}, ``(layers, B, H_kv)``."""
    length = decisions.shape[-1]
    old = max(0, length - 1 - window)
    return length - decisions[..., 1 : 1 + old].sum(-1).long()


def held_positions(cache):
    """By layer, row and head, ascending."""
    return [
        [
            [sorted(layer.pages.gather_row(row, head)["position"].tolist()) for head in range(layer.pages.num_heads)]
            for row in range(cache.num_rows)
        ]
        for layer in cache.layers
    ]


def assert_forms_agree(model, ids, sizes):
    """Soft decisions far from the threshold, hard ones, chunks, and one by one: logits and slots."""
    with torch.no_grad():
        parallel = model(ids, use_cache=False).logits
        soft = model.train()(ids, use_cache=False, step=DMSStep()).logits
        model.eval()
        chunked, cache = run_chunks(model, ids, sizes)
        decoded, single = run_chunks(model, ids, [1] * ids.shape[1])
    for logits in (soft, chunked, decoded):
        torch.testing.assert_close(logits, parallel, atol=EXACT, rtol=0)
    expected = live_slots(decisions_of(model, ids), model.method.window)
    assert torch.equal(cache.kv_tokens(), expected) and torch.equal(single.kv_tokens(), expected)
    assert held_positions(cache) == held_positions(single)
    for layer in (*cache.layers, *single.layers):
        pages = layer.pages
        owned = pages.table[pages.table >= 0]
        assert len(owned.unique()) == len(owned)
        ahead = (pages.table >= 0).sum(2) - -(-pages.lengths // pages.page_size)
        assert ahead.min() >= 0 and ahead.max() <= 1  # that of a head's next slot
    return parallel


@settings(max_examples=20)
@given(st.data())
def test_forms_agree_on_random_shapes(data):
    """T18 and T19 with random windows, groups, pages, rates and chunks, on every family, by both sources."""
    groups, kv_heads = data.draw(st.sampled_from([(1, 4), (2, 2), (2, 1), (4, 1)]))
    length, seed = data.draw(st.integers(1, 44)), data.draw(st.integers(0, 99))
    family = data.draw(st.sampled_from(["llama", "mistral", "olmo2", "qwen2", "qwen3"]))
    host = make_host(family, groups * kv_heads, kv_heads, seed=seed)
    own = {
        "window": data.draw(st.integers(0, 20)),
        "page_size": data.draw(st.integers(1, 20)),
        "temperature": 1e-9,
        "shared_decisions": data.draw(st.booleans()),
    }
    if data.draw(st.booleans()):
        model = kvtrain.retrofit(host, kvtrain.DMS(init_bias=0.0, **CHANNEL, **own))
    else:
        model = dms_at_rate(host, data.draw(st.sampled_from([0.0, 0.3, 0.8, 1.0])), seed, **own)
    sizes = []
    while sum(sizes) < length:
        sizes.append(data.draw(st.integers(1, length - sum(sizes))))
    with mock.patch.object(dms_attention, "BLOCK", data.draw(st.integers(1, 50))):
        assert_forms_agree(model, random_ids(data.draw(st.integers(1, 3)), length, seed), sizes)


@settings(max_examples=10)
@given(st.integers(0, 9), st.integers(1, 20), st.integers(0, 999))
def test_padding_changes_nothing(window, block, seed):
    """Rows of any number of tokens in a chunk, padding before them, through blocks of any size."""
    model = dms_at_rate(make_host("llama"), 0.7, window=window, page_size=4)
    ids, cache = random_ids(3, 40), model.make_cache()
    seen, logits, draw = [0, 0, 0], [[], [], []], Random(seed)
    with torch.no_grad(), mock.patch.object(dms_attention, "BLOCK", block):
        while min(seen) < 40:
            counts = [min(draw.randint(0, 16), 40 - begin) for begin in seen]
            width = max(1, *counts)
            part, mask = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width, dtype=torch.long)
            for row, count in enumerate(counts):
                part[row, width - count :], mask[row, width - count :] = ids[row, seen[row] : seen[row] + count], 1
            found = model(part, attention_mask=mask, past_key_values=cache).logits
            for row, count in enumerate(counts):
                logits[row].append(found[row, width - count :])
                seen[row] += count
        expected = model(ids, use_cache=False).logits
    torch.testing.assert_close(torch.stack([torch.cat(rows) for rows in logits]), expected, atol=EXACT, rtol=0)
    assert torch.equal(cache.kv_tokens(), live_slots(decisions_of(model, ids), model.method.window))


@pytest.mark.parametrize(
    ("family", "heads", "kv_heads", "borrows"),
    [
        ("llama", 4, 2, False),
        ("qwen2", 4, 4, False),
        ("qwen3", 4, 2, True),
        ("llama", 4, 1, True),
        ("gpt_oss", 4, 2, False),
    ],
)
@pytest.mark.parametrize("window", [0, 5, 11])
def test_the_definition_on_plain_lists(family, heads, kv_heads, borrows, window):
    """The same logits, and the same tokens held by every head behind every token."""
    host, ids = make_host(family, heads, kv_heads), random_ids(1, 33)
    if borrows:
        model = kvtrain.retrofit(host, kvtrain.DMS(window=window, page_size=4, init_bias=1.0, **CHANNEL))
        adapters = [(torch.ones(1), torch.zeros(kv_heads, 32).double(), None)] * 2
    else:
        model = dms_at_rate(host, 0.6, window=window, page_size=4)
        attentions = [layer.self_attn for layer in model.model.layers]
        adapters = [(a.dms_proj_alpha_norm.weight, a.dms_proj_alpha.weight, a.dms_proj_alpha.bias) for a in attentions]
    rule = Rule(window, model.method.decision_scale, model.method.init_bias, borrows)
    logits, held = naive_dms(exact(host), rule, ids[0], adapters)
    cache, rows = model.make_cache(), []
    with torch.no_grad():
        for token in range(ids.shape[1]):
            rows.append(model(ids[:, token : token + 1], past_key_values=cache).logits[0, 0])
            found = [heads for (heads,) in held_positions(cache)]
            assert found == [[behind[token] for behind in heads] for heads in held]
    torch.testing.assert_close(torch.stack(rows), logits, atol=1e-11, rtol=0)
    assert cache.kv_tokens().float().mean() < (0.85 if window < 11 else 0.97) * ids.shape[1]


def formula(query, key, value, logits, method):
    """Spec 2.2 written out, ``z`` after the temperature."""
    z = logits / method.temperature
    groups, length = query.shape[1] // key.shape[1], query.shape[2]
    outputs = []
    for head in range(query.shape[1]):
        group, rows = head // groups, []
        for q in range(length):
            scores = (query[:, head, q, None] * key[:, group, : q + 1]).sum(-1) * query.shape[-1] ** -0.5
            bias = [
                torch.log1p(-torch.sigmoid(z[:, group, k + 1]))
                if q - k > method.window
                else torch.zeros_like(z[:, 0, 0])
                for k in range(q + 1)
            ]
            weights = (scores + torch.stack(bias, -1)).softmax(-1)
            rows.append((weights.unsqueeze(-1) * value[:, group, : q + 1]).sum(1))
        outputs.append(torch.stack(rows, 1))
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("kv_heads", [4, 1])
def test_the_training_form_is_the_formula(kv_heads, monkeypatch):
    """Values, and gradients of queries, keys, values and decisions."""
    model = dms_at_rate(make_host("qwen3", 4, kv_heads, layers=1), 0.5, window=4, temperature=0.7).train()
    seen = {}

    def watched(query, key, value, **kwargs):
        seen.update(inputs=[query, key, value], output=attention(query, key, value, **kwargs)[0])
        return seen["output"], None

    monkeypatch.setattr(dms_attention, "attention", watched)
    outputs, ids = {}, random_ids(2, 14)
    own = model.model.layers[0].self_attn
    logits = []
    usual = own._decide
    own._decide = lambda z, *rest: usual(logits.append(z) or z, *rest)
    model(ids, use_cache=False, outputs=outputs, step=DMSStep())
    leaves = [*seen["inputs"], logits[0]]
    expected, weights = formula(*leaves, model.method), torch.randn(seen["output"].shape, dtype=torch.float64)
    ours, theirs = (
        torch.autograd.grad((states * weights).sum(), leaves, retain_graph=True)
        for states in (seen["output"], expected)
    )
    torch.testing.assert_close(seen["output"], expected, atol=1e-11, rtol=0)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-11, rtol=1e-9)
    assert ours[3].abs().max() > 0 and not ours[3][..., 0].any()  # the first token decides about nothing


@pytest.mark.parametrize("method", [{}, {"window": 3}])
def test_what_marks_nothing_is_the_host(method):
    """T16: a fresh retrofit, and whatever it has learnt where it teaches."""
    host, ids = make_host("qwen3"), random_ids(2, 40)
    plain = kvtrain.retrofit(host, kvtrain.Full())
    with torch.no_grad():
        expected = plain(ids, use_cache=False).logits
        fresh = kvtrain.retrofit(host, kvtrain.DMS(**method))
        torch.testing.assert_close(fresh(ids, use_cache=False).logits, expected, atol=1e-14, rtol=0)
        assert (run_chunks(fresh, ids, [30, 10])[1].kv_tokens() == 40).all()
        learnt = dms_at_rate(host, 0.8, **method)
        for training in (False, True):
            taught = learnt.train(training)(ids, use_cache=False, step=DMSStep(full_attention=True)).logits
            assert torch.equal(taught, expected)


@pytest.mark.parametrize("rate", [0.5, 1.0])
def test_rows_within_the_window_are_the_hosts(rate):
    """T17: up to W + 1 tokens; one more, and marks count."""
    host = make_host("llama")
    plain, model = kvtrain.retrofit(host, kvtrain.Full()), dms_at_rate(host, rate, window=19)
    ids = random_ids(2, 21)
    with torch.no_grad():
        assert torch.equal(model(ids[:, :20], use_cache=False).logits, plain(ids[:, :20], use_cache=False).logits)
        longer = model(ids, use_cache=False).logits - plain(ids, use_cache=False).logits
        served, cache = run_chunks(model, ids[:, :20], [13, 7])
        assert (cache.kv_tokens() == 20).all()
        torch.testing.assert_close(served, plain(ids[:, :20], use_cache=False).logits, atol=1e-13, rtol=0)
    assert longer[:, :20].abs().max() < 1e-13 and longer[:, 20].abs().max() > 1e-6


def test_a_decision_is_about_the_token_before_it():
    """T20: another decision of token 9 changes what queries behind token 8's window see, and no other output."""
    model, ids, window = dms_at_rate(make_host("llama", layers=1), 0.0, window=6), random_ids(1, 24), 6
    projection = model.model.layers[0].self_attn.dms_proj_alpha

    def flipped(module, inputs, output):
        output = output.clone()
        output[:, 9, 1] += 1e3
        return output

    with torch.no_grad():
        before = model(ids, use_cache=False).logits
        handle = projection.register_forward_hook(flipped)
        after = model(ids, use_cache=False).logits
        handle.remove()
    changed = (after - before).abs().amax(-1)[0]
    assert changed[: 8 + window + 1].max() == 0 and changed[8 + window + 1 :].min() > 1e-9


def test_a_token_that_is_marked_hides_alone():
    """T20, the other half: what is hidden is the key and value of the token before, in the head that decided."""
    model, ids = dms_at_rate(make_host("llama", layers=1), 0.0, window=6, page_size=3), random_ids(1, 24)
    projection = model.model.layers[0].self_attn.dms_proj_alpha
    cache = model.make_cache()
    with torch.no_grad():
        model(ids[:, :9], past_key_values=cache)
        handle = projection.register_forward_hook(lambda *args: args[2] + torch.tensor([0.0, 1e3]).double())
        model(ids[:, 9:10], past_key_values=cache)
        handle.remove()
        model(ids[:, 10:15], past_key_values=cache)  # the last of these still sees it
        assert held_positions(cache) == [[[[*range(15)], [*range(15)]]]]
        model(ids[:, 15:16], past_key_values=cache)
        assert held_positions(cache) == [[[[*range(16)], [*range(8), *range(9, 16)]]]]
        model(ids[:, 16:], past_key_values=cache)
    assert held_positions(cache) == [[[[*range(24)], [*range(8), *range(9, 24)]]]]


def test_the_order_of_slots_means_nothing():
    """T21: slots change places within every head, and what follows is the same."""
    model, ids = dms_at_rate(make_host("qwen3"), 0.6, window=5, page_size=4), random_ids(2, 40)
    with torch.no_grad():
        _, cache = run_chunks(model, ids[:, :25], [25])
        shuffled = copy.deepcopy(cache)
        for layer in shuffled.layers:
            pages = layer.pages
            for row in range(2):
                for head in range(pages.num_heads):
                    slot = torch.randperm(int(pages.lengths[row, head]))
                    places = [(pages.table[row, head, s // 4].long(), s % 4) for s in (torch.arange(len(slot)), slot)]
                    for states in pages.pool.slots.values():
                        states[places[0]] = states[places[1]].clone()
        assert held_positions(shuffled) == held_positions(cache)
        for begin, end in ((25, 26), (26, 34), (34, 40)):
            results = [model(ids[:, begin:end], past_key_values=one).logits for one in (cache, shuffled)]
            torch.testing.assert_close(*results, atol=EXACT, rtol=0)
        assert held_positions(shuffled) == held_positions(cache)


@pytest.mark.parametrize("training", [False, True])
def test_documents_of_a_row_are_rows_alone(training):
    """A document's first token decides about nothing of the one before it; padding neither."""
    model = dms_at_rate(make_host("llama"), 0.9, window=3, temperature=0.5).train(training)
    ids, documents = random_ids(1, 40), torch.tensor([[1] * 13 + [2] * 9 + [3] * 14 + [0] * 4])
    outputs, step = {}, DMSStep() if training else None
    with torch.no_grad():
        packed = model(ids, document_ids=documents, use_cache=False, outputs=outputs, step=step).logits
        for number in (1, 2, 3):
            inside, own = documents[0] == number, {}
            alone = model(ids[:, inside], use_cache=False, outputs=own, step=step).logits
            torch.testing.assert_close(packed[:, inside], alone, atol=EXACT, rtol=0)
            for layer, decisions in own.items():
                assert torch.equal(outputs[layer][..., inside], decisions)
                assert not decisions[..., 0].any() and decisions[..., 1:].any()
    assert not any(decisions[..., 36:].any() for decisions in outputs.values())


@pytest.mark.parametrize("rate", [0.5, 0.9])
def test_a_quantized_cache_is_read_the_same_everywhere(rate):
    model, ids = dms_at_rate(make_host("llama"), rate, window=4, page_size=5, kv_bits=8), random_ids(2, 30)
    with torch.no_grad():
        parallel = model(ids, use_cache=False).logits
        for sizes in ([30], [1] * 30, [11, 1, 18]):
            torch.testing.assert_close(run_chunks(model, ids, sizes)[0], parallel, atol=1e-9, rtol=0)


def test_shared_decisions_give_heads_one_length():
    model, ids = dms_at_rate(make_host("llama"), 0.6, window=4, shared_decisions=True), random_ids(2, 30)
    decisions = decisions_of(model, ids)
    assert torch.equal(decisions[:, :, 0], decisions[:, :, 1]) and 0.3 < decisions.mean() < 0.8
    alone = decisions_of(dms_at_rate(make_host("llama"), 0.6, window=4), ids)
    first = alone[0]  # the input of later layers is another one
    assert torch.equal(decisions[0][:, 0], first[:, 0]) and not torch.equal(first[:, 0], first[:, 1])


def test_memory_falls_with_what_is_marked():
    """T26: bytes that are allocated, while a prompt is read in chunks and behind it."""
    host, ids = make_host("llama"), random_ids(2, 400)
    sizes = {}
    with torch.no_grad():
        for rate in (0.0, 0.5, 0.875):
            model = dms_at_rate(host, rate, window=15, page_size=8)
            cache, most = model.make_cache(), 0
            for begin in range(0, 400, 50):
                model(ids[:, begin : begin + 50], past_key_values=cache)
                most = max(most, cache.kv_bytes())
            sizes[rate] = cache.kv_bytes(), most, cache.mean_kv_tokens().mean().item()
    kept = {rate: tokens for rate, (_, _, tokens) in sizes.items()}
    assert kept[0.0] == 400 and kept[0.5] == pytest.approx(208, rel=0.15) and kept[0.875] == pytest.approx(64, rel=0.3)
    for rate in (0.5, 0.875):
        share = kept[rate] / 400
        assert all(sizes[rate][i] < (share + 0.06) * sizes[0.0][i] for i in (0, 1))


def test_expected_slots_and_bytes():
    """The closed form's mean where a share of ``1 - 1 / compression`` is marked (spec 2.2)."""
    method = kvtrain.DMS(compression=8.0, window=256)
    assert [4096 / method.expected_slots(4096), 1024 / method.expected_slots(1024)] == pytest.approx([5.56, 2.90], 2e-3)
    assert method.expected_slots(257) == 257 and method.expected_slots(3) == 3
    assert method.expected_slots(265) == 258


def test_a_threshold_marks_the_share_that_it_should():
    """What the tests here rely on."""
    model, ids = dms_at_rate(make_host("llama"), 0.7), random_ids(4, 200)
    assert model.method.init_bias == pytest.approx(NormalDist().inv_cdf(0.3))
    assert decisions_of(model, ids)[..., 1:].mean() == pytest.approx(0.7, abs=0.08)
