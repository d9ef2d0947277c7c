"""Scores without training: by their published definition, by ablation, and by a head that is planted."""

import math

import numpy as np
import pytest
import torch

import kvtrain
from kvtrain.data.passkey import PasskeyTask, PasskeyWriter
from kvtrain.data.tokenizer import load_tokenizer
from kvtrain.evaluation.recall import recall
from kvtrain.models.duo.gates import choose_full_heads
from kvtrain.models.duo.scores import RazorScores, free_signal, razor_gates, razor_scores
from tests.hosts import VOCAB, make_host, random_ids

METHODS = {"full": kvtrain.Full(), "duo": kvtrain.Duo(sink=2, recent=3)}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def prompts_of(model, **options):
    """Scores, and the prompts that were read."""
    prompts = []
    hook = model.model.embed_tokens.register_forward_pre_hook(lambda _, args: prompts.append(args[0].clone()))
    scores = razor_scores(model, **options)
    hook.remove()
    return scores, torch.cat(prompts)


def watched(model, run):
    """Rotated heads and outputs of every attention in one forward pass."""
    heads, outputs = [], []

    def before(module, _, told):
        heads.append(module.project(told["hidden_states"], told["position_embeddings"], told["context"].parallel))

    hooks = [layer.self_attn.register_forward_pre_hook(before, with_kwargs=True) for layer in model.model.layers]
    hooks += [
        layer.self_attn.register_forward_hook(lambda _, __, output: outputs.append(output[0]))
        for layer in model.model.layers
    ]
    run()
    for hook in hooks:
        hook.remove()
    return heads, outputs


def probabilities(query, key, scale):
    """Dense causal attention ``(B, H, T, T)``."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = (query @ key.mT * scale).masked_fill(torch.ones(query.shape[2], key.shape[2]).triu(1) > 0, -math.inf)
    return scores.softmax(-1)


def published_scores(weights, period):
    """Row by row, as published: first row and column dropped, means over the rows behind the first copy."""
    weights = weights[:, :, 1:, 1:]
    length = weights.shape[-1]
    induction, echo = torch.zeros(2, *weights.shape[:2], dtype=torch.float64)
    for row in range(period, length):
        for column in range(row % period, row, period):
            echo += weights[:, :, row, column]
            induction += weights[:, :, row, column + 1]
    return induction / (length - period), echo / (length - period)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (8, 2), (2, 1)])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_razor_scores_are_the_published_definition(method, heads, kv_heads, family):
    model = kvtrain.retrofit(make_host(family, heads=heads, kv_heads=kv_heads, layers=2), METHODS[method])
    for layer in model.model.layers:
        if method == "duo":
            layer.self_attn.gates.fill_(0.3)  # gates count as open
    period, repeats = 5 + heads, 3
    scores, prompts = prompts_of(model, period=period, repeats=repeats, rows=2, seed=heads)
    assert prompts.shape == (2, 1 + period * repeats)
    full = kvtrain.retrofit(make_host(family, heads=heads, kv_heads=kv_heads, layers=2), kvtrain.Full())
    seen, _ = watched(full, lambda: full(prompts, use_cache=False))
    for layer, (query, key, _) in enumerate(seen):
        kinds = published_scores(probabilities(query, key, full.model.layers[layer].self_attn.scaling), period)
        for kind, expected in zip(scores, kinds, strict=True):
            expected = expected.mean(0).unflatten(0, (kv_heads, -1)).amax(1)
            torch.testing.assert_close(kind[layer], expected, atol=1e-12, rtol=0)


def test_prompts_repeat_random_ids_behind_a_special_token():
    model = kvtrain.retrofit(make_host(max_position_embeddings=50), kvtrain.Full())
    _, prompts = prompts_of(model, rows=3)
    assert prompts.shape == (3, 1 + 4 * 12)  # as much as 50 positions allow
    copies = prompts[:, 1:].unflatten(1, (4, 12))
    assert torch.equal(copies, copies[:, :1].expand_as(copies))
    assert bool((prompts[:, 0] == 1).all()) and int(prompts[:, 1:].min()) > 2  # special ones are 0, 1 and 2
    assert not torch.equal(prompts[0], prompts[1])
    assert torch.equal(prompts_of(model, rows=3)[1], prompts)
    assert not torch.equal(prompts_of(model, rows=3, seed=1)[1], prompts)


def test_a_large_vocabulary_gives_the_published_ids():
    host = make_host(vocab_size=13_000, max_position_embeddings=300_000, layers=1, dtype=torch.float32)
    _, prompts = prompts_of(kvtrain.retrofit(host, kvtrain.Full()), repeats=2)
    assert prompts.shape == (1, 5001)
    assert 10_000 <= int(prompts[:, 1:].min()) < 10_010 and 12_490 < int(prompts[:, 1:].max()) <= 12_500


def test_ids_are_drawn_from_a_vocabulary_that_is_given():
    model, allowed = kvtrain.retrofit(make_host(), kvtrain.Full()), [7, 11, 40]
    scores, prompts = prompts_of(model, period=30, rows=2, vocabulary=allowed)
    assert prompts.shape == (2, 121) and set(prompts[:, 1:].unique().tolist()) == set(allowed)
    copies = prompts[:, 1:].unflatten(1, (4, 30))
    assert torch.equal(copies, copies[:, :1].expand_as(copies))
    for same in (torch.tensor(allowed), np.array(allowed)):
        assert torch.equal(razor_scores(model, period=30, rows=2, vocabulary=same).echo, scores.echo)
    scored = razor_scores(model, period=30, vocabulary=range(3, VOCAB))  # all but the special ones
    assert torch.equal(scored.induction, razor_scores(model, period=30).induction)


def test_a_model_that_copies_some_words_shows_its_heads_on_those():
    """Half of its heads, chosen on the words of its passkeys, find them; chosen on any ids, they find none."""
    tokenizer, task = load_tokenizer("kvtrain:copy"), PasskeyTask(passkeys=4, words=8)
    words = PasskeyWriter(tokenizer, task).vocabulary
    host, found = kvtrain.load("kvtrain:copy", dtype=torch.float32), []
    for vocabulary in (None, words):
        model = kvtrain.retrofit(host, kvtrain.Duo(sink=4, recent=32))
        scores = razor_scores(model, period=16, rows=8, vocabulary=vocabulary)
        model.binarize(0.5, gates=razor_gates(scores))
        found.append(recall(model, tokenizer, "heldout", task, sequence_length=512, limit=8).accuracy)
    assert found[0] < 0.1 and found[1] > 0.7, found


def test_an_echo_head_is_found_and_kept():
    """Its queries and keys are the same reading of the token, where positions hardly turn."""
    host = make_host(layers=1, heads=8, kv_heads=4, rope_parameters={"rope_type": "default", "rope_theta": 1e12})
    attention, weight = host.model.layers[0].self_attn, torch.randn(8, 32, dtype=torch.float64) * 1.5
    weight[[0, 4]] = 0  # the one pair of channels that turns at any base
    attention.q_proj.weight[5 * 8 : 6 * 8] = attention.k_proj.weight[2 * 8 : 3 * 8] = weight
    model = kvtrain.retrofit(host, kvtrain.Duo(sink=2, recent=4))
    scores = razor_scores(model, period=24, rows=2)
    assert scores.echo.argmax() == 2 and scores.echo[0, 2] > 3 * scores.echo.flatten().sort().values[-2]
    gates = razor_gates(scores, 0.25, 0.25)
    assert model.binarize(0.5, gates=gates).method.full_heads[0].count(2) == 1


@pytest.mark.parametrize(("induction_share", "echo_share"), [(0.14, 0.01), (0.3, 0.2), (0.0, 0.5), (1.0, 0.02)])
def test_rounding_takes_the_union_of_both_kinds(induction_share, echo_share):
    """At every scale of the two shares, ties included."""
    generator = torch.Generator().manual_seed(int(100 * induction_share))
    for layers, heads in ((4, 8), (3, 2), (1, 1)):
        scores = RazorScores(*torch.randint(0, 9, (2, layers, heads), generator=generator).double() / 9)
        gates = razor_gates(scores, induction_share, echo_share)
        assert gates.max() == 1.0 and gates.min() > 0.0 and len(gates.unique()) == gates.numel()
        number, sizes = layers * heads, set()
        for scale in (0.3, 1.0, 1.7, 3.0, 50.0):
            union = set()
            for kind, share in zip(scores, (induction_share, echo_share), strict=True):
                best = kind.flatten().argsort(descending=True, stable=True)
                union.update(best[: math.ceil(share * scale * number - 1e-9)].tolist())
            chosen = choose_full_heads(gates, 1 - len(union) / number)
            assert {layer * heads + head for layer, kept in enumerate(chosen) for head in kept} == union
            sizes.add(len(union))
        assert len(sizes) > 1 or number == 1


@pytest.mark.parametrize("rows", ["one document", "packed", "padded"])
@pytest.mark.parametrize("compensation", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2), (2, 1)])
def test_the_free_signal_is_what_closing_a_gate_does(rows, compensation, heads, kv_heads):
    """The squared move of an attention's output, all before it unchanged."""
    method = kvtrain.Duo(sink=2, recent=5, compensation=compensation)
    model, ids = kvtrain.retrofit(make_host(heads=heads, kv_heads=kv_heads), method), random_ids(2, 24)
    told, counted = {}, torch.rand(2, 24) < 0.5
    if rows == "packed":
        told["document_ids"] = torch.tensor([[0] * 11 + [1] * 13, [4] * 3 + [6] * 21])
    elif rows == "padded":
        told["attention_mask"] = torch.ones(2, 24, dtype=torch.long)
        told["attention_mask"][0, :9] = 0
        counted = counted & (told["attention_mask"] > 0)
    signal = free_signal(model, ids, counted, **told)
    expected = torch.zeros(2, kv_heads, dtype=torch.float64)
    for layer, decoder in enumerate(model.model.layers):
        for head in range(kv_heads):
            _, outputs = watched(model, lambda: model(ids, use_cache=False, **told))
            decoder.self_attn.gates[head] = 0.0
            _, moved = watched(model, lambda: model(ids, use_cache=False, **told))
            decoder.self_attn.gates[head] = 1.0
            expected[layer, head] = (outputs[layer] - moved[layer])[counted].square().sum(-1).mean()
    assert expected.min() > 0 and signal.max() == 1.0
    torch.testing.assert_close(signal, expected / expected.max(), atol=1e-9, rtol=0)
    full = kvtrain.retrofit(make_host(heads=heads, kv_heads=kv_heads), kvtrain.Full())
    again = free_signal(full, ids, counted, settings=method, **told)
    torch.testing.assert_close(again, signal, atol=1e-12, rtol=0)


def test_the_free_signal_is_nothing_where_windows_hide_nothing():
    model, ids = kvtrain.retrofit(make_host(), kvtrain.Duo(sink=4, recent=6)), random_ids(2, 10)
    assert torch.equal(free_signal(model, ids, torch.ones_like(ids)), torch.zeros(2, 2, dtype=torch.float64))
    longer = random_ids(2, 11)
    assert free_signal(model, longer, torch.ones_like(longer)).max() == 1.0
    assert free_signal(model, longer, torch.arange(11).expand(2, -1) < 10).max() < 1e-20


def test_scoring_leaves_the_model_as_it_was():
    model, ids = kvtrain.retrofit(make_host(dtype=torch.bfloat16), kvtrain.Duo(sink=1, recent=3)), random_ids(1, 20)
    before, logits = {name: id(value) for name, value in model.state_dict(keep_vars=True).items()}, model(ids).logits
    scores, signal = razor_scores(model, period=9), free_signal(model, ids, ids > 0)
    assert before == {name: id(value) for name, value in model.state_dict(keep_vars=True).items()}
    assert torch.equal(model(ids).logits, logits)
    assert all(not layer.self_attn._forward_pre_hooks for layer in model.model.layers)
    assert scores.echo.dtype == signal.dtype == torch.float64 and bool(scores.echo.isfinite().all())


def test_refusals_name_the_remedy():
    host, ids = make_host(max_position_embeddings=64), random_ids(1, 12)
    full, rounded = kvtrain.retrofit(host, kvtrain.Full()), kvtrain.retrofit(host, kvtrain.Duo()).binarize(0.5)
    for model in (host, rounded, kvtrain.retrofit(host, kvtrain.DMC())):
        with pytest.raises(ValueError, match="before its gates are rounded"):
            razor_scores(model)
        with pytest.raises(ValueError, match="before its gates are rounded"):
            free_signal(model, ids, ids > 0)
    for options in ({"period": 16}, {"period": 1}, {"repeats": 1}, {"repeats": 40}, {"rows": 0}, {"repeats": 0}):
        with pytest.raises(ValueError, match="make the period shorter"):
            razor_scores(full, **options)
    for vocabulary in ([], [5, VOCAB], [-1], [0.5], [[3, 4]], torch.tensor(5)):
        with pytest.raises(ValueError, match=f"from 0 to {VOCAB - 1}; give one or more, or leave it out"):
            razor_scores(full, period=4, vocabulary=vocabulary)
    with pytest.raises(ValueError, match="settings=kvtrain"):
        free_signal(full, ids, ids > 0)
    with pytest.raises(ValueError, match="no token is supervised"):
        free_signal(full, ids, ids < 0, settings=kvtrain.Duo())
    for shares in ((0.0, 0.0), (-0.1, 0.5), (0.5, 1.1)):
        with pytest.raises(ValueError, match="one of them is above 0"):
            razor_gates(RazorScores(torch.zeros(1, 2), torch.zeros(1, 2)), *shares)
