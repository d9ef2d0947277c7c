"""The definition of eviction policies is itself right: against the host under masks, by hand, and by what must hold."""

import math
from itertools import pairwise

import pytest
import torch
from torch.nn.functional import avg_pool1d

from kvtrain.kernels.quantization import read_back
from tests.hosts import FAMILIES, make_host, random_ids
from tests.models.naive_policies import leaves_now, naive_policy
from tests.models.naive_scores import (
    Head,
    Layer,
    Rule,
    Slot,
    by_last_query,
    by_mass,
    by_window,
    evict,
    layer_budget,
    merge,
    round_to_nearest,
    slots_of,
    staying,
    staying_by_importance,
    variance_budgets,
)

LENGTH, PROMPT = 30, 20
KV_HEADS = {"mha": 4, "gqa": 2, "mqa": 1}
NAMES = ("streaming_llm", "random", "h2o", "mikv", "d2o", "tova", "snapkv", "corm")


def rule_of(name, **settings):
    chosen = {"codec": round_to_nearest(4), "random": lambda *token: math.sin(1e4 * (1 + sum(token) + 7 * token[0]))}
    return Rule(name, **{"budget": 8, "recent": 3, "window": 4, **chosen, **settings})


def run(rule, prompts=(), kv_heads=2, layers=2, length=LENGTH):
    return naive_policy(make_host(kv_heads=kv_heads, layers=layers), rule, random_ids(1, length)[0], prompts)


def counts(positions):
    return [[len(head) for head in layer] for layer in positions]


def mask_of(held, every_head):
    """What each query attends, ``(1, H_q, T, T)``: what was kept behind the token before, and itself; of one layer."""
    length, heads = len(held), len(held[0].kept[0])
    mask = torch.eye(length, dtype=torch.bool).repeat(heads, 1, 1)
    for position, before in enumerate(held[:-1]):
        for head, kept in enumerate(before.kept[0]):
            mask[head, position + 1, kept] = True
    return mask.repeat_interleave(every_head // heads, 0)[None]


# Against the host.


@pytest.mark.parametrize("kv_heads", KV_HEADS.values(), ids=KV_HEADS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("prompt", ["blocks", "dense"])
def test_room_for_everything_is_the_host(name, kv_heads, prompt):
    host, ids = make_host(kv_heads=kv_heads), random_ids(1, 16)
    rule = rule_of(name, budget=16, window=16, prompt=prompt)
    ours = naive_policy(host, rule, ids[0], [range(9)])
    assert torch.allclose(ours.logits, host(ids).logits[0], rtol=0, atol=1e-10)
    assert ours.held[-1].kept == [[list(range(16))] * kv_heads] * 2


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_read(family):
    host, ids = make_host(family), random_ids(1, 12)
    host.set_experts_implementation("eager")  # the only one that has float64
    before = host.config._attn_implementation
    ours = naive_policy(host, rule_of("h2o", budget=12), ids[0])
    assert host.config._attn_implementation == before
    assert torch.allclose(ours.logits, host(ids).logits[0], rtol=0, atol=1e-10)
    assert not torch.allclose(naive_policy(host, rule_of("h2o", budget=5), ids[0]).logits, ours.logits, atol=1e-3)


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("prompt", ["blocks", "dense"])
def test_streaming_is_a_window_with_sinks(every, prompt):
    host, ids = make_host(layers=3), random_ids(1, LENGTH)
    ours = naive_policy(host, Rule("streaming_llm", 8, sink=2, every=every, prompt=prompt), ids[0], [range(PROMPT)])
    query, key = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
    cut = query // every * every  # tokens seen when slots last left
    if prompt == "dense":
        cut = torch.where(query < PROMPT, 0, cut.clamp(min=PROMPT))
    mask = (key <= query) & ((key < 2) | (key >= cut - 6))
    assert torch.allclose(ours.logits, host(ids, attention_mask=mask[None, None]).logits[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("kv_heads", KV_HEADS.values(), ids=KV_HEADS)
@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("name", ["h2o", "tova", "snapkv", "corm", "random"])
def test_a_token_attends_what_was_kept_and_its_block(name, every, kv_heads):
    host, ids = make_host(kv_heads=kv_heads, layers=1), random_ids(1, LENGTH)
    ours = naive_policy(host, rule_of(name, every=every, window=1), ids[0])
    logits = host(ids, attention_mask=mask_of(ours.held, 4)).logits[0]
    assert torch.allclose(ours.logits, logits, rtol=0, atol=1e-10)
    assert counts(ours.held[-1].kept) != [[LENGTH] * kv_heads]


@pytest.mark.parametrize("kv_heads", KV_HEADS.values(), ids=KV_HEADS)
@pytest.mark.parametrize("name", ["h2o", "tova"])
def test_the_lowest_by_the_hosts_own_probabilities_leaves(name, kv_heads):
    host, ids = make_host(kv_heads=kv_heads, layers=1), random_ids(1, LENGTH)
    ours = naive_policy(host, rule_of(name), ids[0])
    host.set_attn_implementation("eager")
    mask = torch.where(mask_of(ours.held, 4), 0.0, -torch.inf).double()
    weights = host(ids, attention_mask=mask, output_attentions=True).attentions[0][0]  # (H_q, T, T)
    groups = weights.unflatten(0, (kv_heads, -1)).sum(1)
    scores = groups.cumsum(1) if name == "h2o" else weights.sum(0).expand_as(groups)
    for time, (before, after) in enumerate(pairwise(ours.held), 1):
        for head in range(kv_heads):
            kept, candidates = after.kept[0][head], torch.tensor([*before.kept[0][head], time])
            ranked = scores[head, time, candidates].masked_fill(candidates > time - 3, torch.inf)
            best = candidates[ranked.topk(min(8, len(candidates))).indices]
            assert kept == best.sort().values.tolist()


@pytest.mark.parametrize("per_head", ["same", "adaptive"])
@pytest.mark.parametrize("name", ["h2o", "tova", "snapkv"])
def test_a_dense_prompt_is_cut_as_published(name, per_head):
    host, ids = make_host(), random_ids(1, PROMPT)
    ours = naive_policy(host, rule_of(name, prompt="dense", per_head=per_head), ids[0], [range(PROMPT)])
    assert torch.allclose(ours.logits, host(ids).logits[0], rtol=0, atol=1e-10)
    host.set_attn_implementation("eager")
    for layer, weights in enumerate(host(ids, output_attentions=True).attentions):
        groups = weights[0].unflatten(0, (2, -1)).sum(1)  # (H, T, T)
        scores = {
            "h2o": groups.sum(1)[:, :-3],
            "tova": groups.sum(0)[-1, :-3].expand(2, -1),
            "snapkv": avg_pool1d(groups[:, -3:, :-3].sum(1)[None], 5, 1, 2)[0],
        }[name]
        if name == "tova" and per_head == "adaptive":
            continue  # every score stands twice: which of the equals stays is nobody's rule
        if per_head == "same":
            kept = [[*sorted(head.topk(5).indices.tolist()), 17, 18, 19] for head in scores]
        else:  # the three latest are more than the share that no head can lose
            places = scores.flatten().topk(10).indices.tolist()
            kept = [[*sorted(place % 17 for place in places if place // 17 == head), 17, 18, 19] for head in range(2)]
        assert ours.held[-1].kept[layer] == kept


# When slots leave.


def test_blocks_and_dense_prompts_differ_and_agree_on_when():
    for name in ("h2o", "snapkv", "corm", "mikv", "d2o"):
        blocks, dense = (run(rule_of(name, every=4, prompt=prompt), [range(PROMPT)]) for prompt in ("blocks", "dense"))
        assert not torch.allclose(blocks.logits, dense.logits, atol=1e-3)
        assert torch.allclose(blocks.logits[:4], dense.logits[:4])
    rule = rule_of("h2o", every=4, prompt="dense")
    prompts = [range(8), range(11, 18)]
    assert [position + 1 for position in range(24) if leaves_now(rule, position, prompts)] == [8, 18, 20, 24]
    assert [position + 1 for position in range(24) if leaves_now(rule_of("h2o", every=4), position, prompts)] == [
        *range(4, 25, 4)
    ]


@pytest.mark.parametrize("name", ["streaming_llm", "random", "h2o", "tova", "snapkv"])
def test_heads_grow_by_a_block_and_shrink_to_the_budget(name):
    sizes = [counts(held.kept) for held in run(rule_of(name, every=4)).held]
    expected = [seen if seen < 12 else 8 + seen % 4 for seen in range(1, LENGTH + 1)]
    assert sizes == [[[size] * 2] * 2 for size in expected]


def test_a_second_prompt_is_read_over_what_the_first_left():
    ours = run(rule_of("h2o", prompt="dense"), [range(10), range(12, 22)])
    assert [counts(ours.held[time].kept)[0] for time in (8, 9, 11, 12, 20, 21, 29)] == [
        [size] * 2 for size in (9, 8, 8, 9, 17, 8, 8)
    ]


def test_a_share_is_of_the_tokens_seen():
    sizes = [counts(held.kept)[1][0] for held in run(rule_of("h2o", budget=0.25, recent=1, sink=1)).held]
    assert sizes == [max(min(seen, 2), seen // 4) for seen in range(1, LENGTH + 1)]
    assert slots_of(rule_of("h2o", budget=0.25), 30) == 7
    assert slots_of(rule_of("h2o", budget=1.0), 30) == 30


@pytest.mark.parametrize("name", ["streaming_llm", "random", "h2o", "tova", "snapkv", "corm", "d2o", "mikv"])
def test_protected_tokens_stay(name):
    for time, held in enumerate(run(rule_of(name, sink=2, window=1)).held):
        always = {position for position in range(time + 1) if position < 2 or position > time - 3}
        assert all(always <= set(head) for layer in held.kept for head in layer)


# Scores.


def head_of(looks, keep=None, index=0):
    """A head that was looked at so: a row a query, a column a position, whose slots are those in ``keep``."""
    rows = [{place: [*weight] for place, weight in enumerate(row)} for row in looks]
    kept = range(len(looks)) if keep is None else keep
    return Head(0, index, [Slot(place, torch.zeros(2), torch.zeros(2)) for place in kept], looks=rows)


LOOKS = [[(1.0, 1.0)], [(0.7, 0.2), (0.3, 0.8)], [(0.1, 0.5), (0.6, 0.1), (0.3, 0.4)]]


def test_mass_by_hand():
    assert by_mass(Rule("h2o"), Layer([]), head_of(LOOKS)) == pytest.approx([3.5, 1.8, 0.7])
    layer = Layer([head_of(LOOKS)])
    evict(Rule("h2o", budget=2), [layer])
    assert [slot.position for slot in layer.heads[0].slots] == [0, 1]
    layer = Layer([head_of(LOOKS)])
    evict(Rule("h2o", budget=2, recent=1), [layer])
    assert [slot.position for slot in layer.heads[0].slots] == [0, 2]


def test_the_last_query_by_hand():
    other = [[(1.0, 1.0)], [(1.0, 1.0), (0.0, 0.0)], [(0.2, 0.0), (0.2, 0.2), (0.6, 0.8)]]
    layer = Layer([head_of(LOOKS), head_of(other, index=1)])
    assert [by_last_query(Rule("tova"), layer, head) for head in layer.heads] == [
        pytest.approx([0.2, 0.275, 0.525])
    ] * 2


def test_tova_keeps_the_same_tokens_in_every_head():
    held = run(rule_of("tova", recent=0), kv_heads=4).held
    assert all(head == layer[0] for at in held for layer in at.kept for head in layer)
    assert any(time not in at.kept[0][0] for time, at in enumerate(held))  # the newest may leave
    assert held[-1].kept[0] != held[-1].kept[1]


def test_pooling_divides_by_the_whole_kernel_and_skips_what_has_gone():
    looks = [[(0.0,)] * (query + 1) for query in range(8)]
    looks[6][:5], looks[7][:5] = [(0.1,), (0.2,), (0.9,), (0.0,), (0.1,)], [(0.2,), (0.1,), (0.9,), (0.0,), (0.2,)]
    pooled = by_window(Rule("snapkv", recent=2, kernel=3), Layer([]), head_of(looks, keep=[0, 1, 3, 4, 5, 6, 7]))
    assert pooled[:5] == pytest.approx([0.2, 0.2, 0.2, 0.1, 0.1])  # 2 has gone: 1 and 3 are neighbours
    assert pooled[5:] == [math.inf] * 2


def test_corm_by_hand():
    looks = [
        [(1.0,)],
        [(0.6,), (0.4,)],
        [(0.5,), (0.3,), (0.2,)],
        [(0.1,), (0.26,), (0.3,), (0.34,)],
        [(0.1,), (0.1,), (0.19,), (0.31,), (0.3,)],
    ]

    def stay(**settings):
        return staying_by_importance(Rule("corm", **settings), head_of(looks))

    assert stay(window=1) == {3, 4}  # above 1 / 5
    assert stay(window=2) == {1, 2, 3, 4}  # above 1 / 4 before
    assert stay(window=3) == {0, 1, 2, 3, 4}
    assert stay(window=1, recent=3) == {2, 3, 4}
    assert stay(window=1, sink=1) == {0, 3, 4}
    assert stay(window=6) == {0, 1, 2, 3, 4}  # not as many queries yet
    fewer = head_of(looks, keep=[1, 2, 3, 4])  # 0 had gone when the last query came
    fewer.looks[-1] = {1: [0.22], 2: [0.24], 3: [0.26], 4: [0.28]}
    assert staying_by_importance(Rule("corm", window=1), fewer) == {3, 4}
    assert staying_by_importance(Rule("corm", window=1, threshold="position"), fewer) == {1, 2, 3, 4}
    fewer.looks[-1] = {1: [0.1, 0.26], 2: [0.24, 0.24], 3: [0.26, 0.1], 4: [0.4, 0.4]}
    assert staying_by_importance(Rule("corm", window=1), fewer) == {1, 3, 4}  # any of its query heads


def test_corm_has_no_budget_and_its_thresholds_differ():
    visible, position = (run(rule_of("corm", threshold=which)).held[-1] for which in ("visible", "position"))
    assert len({size for layer in counts(visible.kept) for size in layer}) > 1
    assert visible.kept != position.kept
    assert sum(map(sum, counts(visible.kept))) < sum(map(sum, counts(position.kept)))  # a lower bar later


# Budgets.


def test_adaptive_by_hand():
    high, low = [(9.0, 0), (8.0, 1), (7.0, 2), (6.0, 3)], [(1.0, 0), (4.0, 1), (2.0, 2), (3.0, 3)]
    assert staying(Rule("h2o", per_head="adaptive", floor=0.0), [high, low], 2) == [{0, 1, 2, 3}, set()]
    assert staying(Rule("h2o", per_head="adaptive", floor=0.5), [high, low], 2) == [{0, 1, 2}, {1}]
    assert staying(Rule("h2o", per_head="adaptive", floor=1.0), [high, low], 2) == [{0, 1}, {1, 3}]
    assert staying(Rule("h2o", per_head="adaptive", floor=1.0), [high[:1], low], 2) == [{0}, {1, 2, 3}]


@pytest.mark.parametrize("prompt", ["blocks", "dense"])
@pytest.mark.parametrize("per_layer", ["same", "pyramid"])
def test_adaptive_heads_share_the_layers_budget(prompt, per_layer):
    rule = rule_of("snapkv", per_head="adaptive", per_layer=per_layer, prompt=prompt, beta=4.0)
    held = run(rule, [range(PROMPT)], kv_heads=4).held
    budgets = {"same": [8, 8], "pyramid": [12, 4]}[per_layer]
    assert [sum(layer) for layer in counts(held[-1].kept)] == [4 * budget for budget in budgets]
    assert len(set(counts(held[-1].kept)[0])) > 1
    assert all(size >= 3 for at in held[3:] for layer in counts(at.kept) for size in layer)


@pytest.mark.parametrize(("budget", "recent", "depth"), [(64, 16, 5), (100, 8, 8), (40, 0, 3), (48, 32, 1)])
def test_a_pyramid_has_the_same_slots_in_all(budget, recent, depth):
    layers = [Layer([Head(index, 0)]) for index in range(depth)]
    rule = Rule("snapkv", budget, recent=recent, per_layer="pyramid")
    sizes = [layer_budget(rule, index, layers, 1000) for index in range(depth)]
    assert abs(sum(sizes) - depth * budget) <= depth / 2
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] >= recent
    if depth > 1:
        assert sizes[-1] == math.floor(recent + (budget - recent) / 20 + 0.5)


def test_variances_set_the_budgets_when_the_prompt_ends():
    rule = rule_of("d2o", budget=0.4, per_layer="variance", prompt="dense", sink=1)
    ours = run(rule, [range(PROMPT), range(23, 27)], kv_heads=4, layers=6)  # the first counts
    at_end, later = counts(ours.held[PROMPT - 1].kept), counts(ours.held[-1].kept)
    assert [later[layer] for layer in (0, 1, 5)] == [[LENGTH] * 4] * 3
    assert at_end[2:5] == later[2:5] and len({heads[0] for heads in later[2:5]}) > 1
    assert [heads[0] for heads in later[2:5]] == [layer.budget for layer in ours.layers[2:5]]


def test_variances_by_hand():
    first = [(1.0,)]
    peaked = head_of([first, [(1.0,), (0.0,)], [(1.0,), (0.0,), (0.0,)]])  # masses 3, 0, 0
    middle = head_of([first, [(1.0,), (0.0,)], [(0.5,), (0.5,), (0.0,)]])  # 2.5, 0.5, 0
    flat = head_of([first, [(0.5,), (0.5,)], [(0.5,), (0.0,), (0.5,)]])  # 2, 0.5, 0.5
    mixed = Layer([peaked, middle, flat])  # variances 2, 7 / 6 and 1 / 2, which become 1, 4 / 9 and 0
    alike = Layer([flat, flat, flat])
    peak = math.exp(-13 / 27)
    mean = (1 + 2 * peak) / 3
    expected = [round(1000 / mean), round(1000 * peak / mean), round(1000 * peak / mean)]
    assert variance_budgets(Rule("d2o", 1000), [alike, mixed, mixed], seen=9999) == expected
    assert variance_budgets(Rule("d2o", 1000), [alike, mixed, mixed], seen=1100) == [1100, *expected[1:]]
    assert variance_budgets(Rule("d2o", 1000, sink=4, recent=900), [alike, mixed, mixed], seen=9999)[1] == 904


# What becomes of what leaves.


def slot(position, *vector):
    return Slot(position, torch.tensor(vector), torch.tensor(vector) + 1)


def test_merging_by_hand():
    head, other = Head(0, 0, [slot(3, 2.0, 0.0), slot(4, 0.0, 1.0)]), Head(0, 1, [slot(3, 1.0, 0.0), slot(4, 0.0, 3.0)])
    layer = Layer([head, other])
    rule = Rule("d2o", smooth=0.25)
    merge(rule, layer, [[slot(0, 3.0, 0.0), slot(1, 1.0, 1.0)], [slot(0, 5.0, 0.0), slot(2, 0.0, -1.0)]])
    # Likeness: 1 and 0.707 in one head, 1 and 0 in the other: the first victims merge, the second do not.
    mean = (2 + math.sqrt(0.5)) / 4
    assert layer.threshold == pytest.approx(mean) and [head.merged, other.merged] == [1, 1]
    assert head.slots[0].key.tolist() == [2.5, 0.0] and head.slots[0].value.tolist() == [3.5, 1.0]
    assert other.slots[0].key.tolist() == [3.0, 0.0] and other.slots[1].key.tolist() == [0.0, 3.0]
    merge(rule, layer, [[slot(5, 3.0, 4.0)], []])  # likeness 0.8 to the second; the threshold moves first
    assert layer.threshold == pytest.approx(0.25 * mean + 0.75 * 0.8) and head.merged == 2
    assert head.slots[1].key.tolist() == pytest.approx([1.2, 2.1])  # (0, 1) + 0.8 (3, 4), halved
    assert head.slots[1].value.tolist() == pytest.approx([2.1, 3.0])  # (1, 2) + 0.8 (4, 5), halved


def test_the_threshold_moves_before_it_is_asked():
    layer = Layer([Head(0, 0, [slot(9, 1.0, 0.0)])])
    merge(Rule("d2o"), layer, [[slot(0, 3.0, 4.0)]])  # its own mean is the first threshold, and reaches it
    assert layer.threshold == pytest.approx(0.6) and layer.heads[0].merged == 1
    layer = Layer([Head(0, 0, [slot(9, 1.0, 0.0)])], threshold=0.9)
    merge(Rule("d2o", smooth=0.25), layer, [[slot(0, 4.0, 3.0), slot(1, 7.0, -24.0)]])  # likeness 0.8 and 0.28
    assert layer.threshold == pytest.approx(0.25 * 0.9 + 0.75 * 0.54) and layer.heads[0].merged == 1


def test_all_that_merge_into_one_are_averaged_at_once():
    head = Head(0, 0, [slot(9, 2.0, 0.0)])
    merge(Rule("d2o"), Layer([head], threshold=-9.0), [[slot(0, 1.0, 0.0), slot(1, 6.0, 8.0)]])
    assert head.slots[0].key.tolist() == pytest.approx([(2 + 1 + 0.6 * 6) / 3, 0.6 * 8 / 3])
    assert head.merged == 2


def test_some_merge_and_some_are_dropped():
    ours = run(rule_of("d2o", sink=1))
    for layer in range(2):
        assert all(0 < merged < LENGTH - 8 for merged in ours.held[-1].merged[layer])
    assert not torch.allclose(ours.logits, run(rule_of("h2o", sink=1)).logits, atol=1e-3)


def test_an_exact_second_store_loses_nothing():
    host, ids = make_host(), random_ids(1, LENGTH)
    ours = naive_policy(host, rule_of("mikv", codec=lambda vector: vector), ids[0])
    assert torch.allclose(ours.logits, host(ids).logits[0], rtol=0, atol=1e-10)
    assert counts(ours.held[-1].kept) == [[8, 8]] * 2
    errors = []
    for bits in (2, 4, 8):
        low = naive_policy(host, rule_of("mikv", codec=round_to_nearest(bits)), ids[0])
        errors.append((low.logits - ours.logits).abs().max().item())
        for kept, second in zip(low.held[-1].kept, low.held[-1].second, strict=True):
            assert all(sorted(a + b) == list(range(LENGTH)) for a, b in zip(kept, second, strict=True))
    assert errors[0] > 3 * errors[1] > 9 * errors[2] > 0


def test_channels_are_balanced_by_the_first_prompt():
    host, ids = make_host(), random_ids(1, LENGTH)
    asked = []

    def codec(vector):
        asked.append(vector)
        return vector

    ours = naive_policy(
        host, rule_of("mikv", prompt="dense", balance=True, codec=codec), ids[0], [range(12), range(20, 25)]
    )
    assert torch.allclose(ours.logits, host(ids).logits[0], rtol=0, atol=1e-10)  # scaled there and back
    head = ours.layers[0].heads[0]
    keys = torch.stack([slot.key for slot in sorted(head.slots + head.second, key=lambda slot: slot.position)])
    largest = torch.stack(head.queries[:12]).flatten(0, 1).abs().max(0).values
    expected = (largest / keys[:12].abs().max(0).values).sqrt()
    assert torch.allclose(head.balancer, expected) and not torch.allclose(expected, torch.ones_like(expected))
    victim = head.second[0]
    assert torch.allclose(asked[0], victim.key * expected) and torch.equal(asked[1], victim.value)


def test_the_codec_by_hand_and_as_the_package_packs():
    channels = torch.tensor([0.0, 0.9, 2.1, 3.0], dtype=torch.float64)
    assert round_to_nearest(2)(channels).tolist() == [0.0, 1.0, 2.0, 3.0]
    grouped = torch.tensor([0.0, 3.0, 10.0, 40.0], dtype=torch.float64)
    assert round_to_nearest(2, group=2)(grouped).tolist() == [0.0, 3.0, 10.0, 40.0]
    assert round_to_nearest(2)(grouped).tolist() != grouped.tolist()
    vectors = torch.randn(50, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    vectors[25:] += 100  # where the zero's own spacing counts
    for bits in (2, 4, 8):
        ours = torch.stack([round_to_nearest(bits)(vector) for vector in vectors])
        assert torch.equal(ours, read_back(vectors, bits))
        ours = torch.stack([round_to_nearest(bits, group=4)(vector) for vector in vectors])
        assert torch.equal(ours, read_back(vectors.unflatten(1, (2, 4)), bits).flatten(1))


def test_random_eviction_asks_for_the_token_alone():
    scored = {}

    def score(layer, head, position):
        return scored.setdefault((layer, head, position), math.sin(1e4 * (1 + layer + 5 * head + 11 * position)))

    held = run(rule_of("random", random=score)).held[-1]
    for layer in range(2):
        for head in range(2):
            best = sorted(range(LENGTH - 3), key=lambda position: scored[layer, head, position])[-5:]
            assert held.kept[layer][head] == [*sorted(best), 27, 28, 29]
