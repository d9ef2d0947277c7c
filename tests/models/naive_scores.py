"""What leaves a cache and what becomes of it, by the formulas of the papers. Shares no code with kvtrain.

Every score is computed anew from all probabilities that there have been (``Head.looks``), never kept up to date.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean, pvariance

import torch
from torch import Tensor

Rank = tuple[float, int]  # score and position; the lowest leaves, of equals the older one


@dataclass(frozen=True)
class Rule:
    """A policy's name and all settings that any policy has; each reads its own."""

    name: str  # a key of SCORES, or "corm", which has no budget
    budget: int | float = 256  # slots a head; a float is a share of the tokens seen
    recent: int = 0  # latest tokens that always stay
    sink: int = 0  # first tokens that always stay
    every: int = 1  # slots leave when the number of tokens seen is a multiple
    prompt: str = "blocks"  # or "dense": read in full, cut once at its end
    per_head: str = "same"  # or "adaptive" (Ada-KV)
    floor: float = 0.2  # adaptive: share of its budget that a head cannot lose
    per_layer: str = "same"  # or "pyramid" (PyramidKV), or "variance" (D2O)
    beta: float = 20.0  # pyramid: how much narrower the top is
    num_future: int = 512  # expected attention: next positions whose rotations are averaged
    use_covariance: bool = True  # expected attention
    use_value_norm: bool = True  # expected attention
    epsilon: float = 0.02  # expected attention: added to probabilities before they are multiplied by norms
    kernel: int = 5  # SnapKV: slots that are pooled, an odd number
    window: int = 256  # CORM: latest queries that are asked
    threshold: str = "visible"  # CORM: a key is important above 1 / keys seen; "position": 1 / tokens so far
    smooth: float = 0.5  # D2O: how much of the old threshold stays
    codec: Callable[[Tensor], Tensor] | None = None  # MiKV: a vector (D) as the second store gives it back
    balance: bool = False  # MiKV: channels of keys are scaled before the codec; needs a dense prompt
    pack: Callable[[Tensor, str], Tensor] | None = None  # GEAR: a block (n, D) of "keys" or "values" as it is read back
    random: Callable[[int, int, int], float] | None = None  # random eviction: score of layer, head, position


@dataclass
class Slot:
    """A token's key, rotated, and value: ``(D)``."""

    position: int
    key: Tensor
    value: Tensor


@dataclass
class Head:
    """A key-value head: what it keeps, by position, and what its queries have looked at."""

    layer: int
    index: int
    slots: list[Slot] = field(default_factory=list)
    second: list[Slot] = field(default_factory=list)  # MiKV and GEAR: attended too, for ever
    looks: list[dict[int, list[float]]] = field(default_factory=list)  # by query: by position: of G query heads
    queries: list[Tensor] = field(default_factory=list)  # rotated, (G, D) each
    balancer: Tensor | None = None  # MiKV: (D), set by the first prompt
    merged: int = 0  # D2O: slots that went into others


@dataclass
class Layer:
    """A layer's heads, and D2O's state: the budget that the prompt has set, and the threshold of merging."""

    heads: list[Head]
    budget: int | None = None
    threshold: float | None = None


# Scores: a number a slot, in the order of the slots.


def looked_at(looks: list[dict[int, list[float]]], position: int) -> float:
    """Probability that a slot was given, over queries and the G heads."""
    return math.fsum(weight for look in looks for weight in look.get(position, ()))


def by_position(rule: Rule, layer: Layer, head: Head) -> list[float]:
    """StreamingLLM: the oldest leaves."""
    return [float(slot.position) for slot in head.slots]


def by_random(rule: Rule, layer: Layer, head: Head) -> list[float]:
    """The control: a function of the token alone."""
    assert rule.random is not None
    return [rule.random(head.layer, head.index, slot.position) for slot in head.slots]


def by_mass(rule: Rule, layer: Layer, head: Head) -> list[float]:
    """H2O, MiKV, D2O: all probability that a slot has ever been given."""
    return [looked_at(head.looks, slot.position) for slot in head.slots]


def by_last_query(rule: Rule, layer: Layer, head: Head) -> list[float]:
    """TOVA: the latest query's probability, mean over all query heads of the layer."""
    last = [other.looks[-1] for other in layer.heads]
    return [fmean(weight for look in last for weight in look[slot.position]) for slot in head.slots]


def by_window(rule: Rule, layer: Layer, head: Head) -> list[float]:
    """SnapKV: probability from the ``recent`` latest queries to what is older than they, pooled over neighbours."""
    assert rule.recent > 0 and rule.kernel % 2 == 1
    seen, half = len(head.looks), rule.kernel // 2
    sums = [
        looked_at(head.looks[-rule.recent :], slot.position)
        for slot in head.slots
        if slot.position < seen - rule.recent
    ]
    pooled = [sum(sums[max(0, place - half) : place + half + 1]) / rule.kernel for place in range(len(sums))]
    return pooled + [math.inf] * (len(head.slots) - len(sums))


def by_expected_attention(rule: Rule, layer: Layer, head: Head) -> list[float]:
    """Expected attention: a Gaussian of the queries behind the sink, moved on to the next positions."""
    seen, (groups, channels) = len(head.queries), head.queries[0].shape
    keys, values = (torch.stack([getattr(slot, name) for slot in head.slots]) for name in ("key", "value"))
    behind = torch.tensor([slot.position >= rule.sink for slot in head.slots])
    chances = torch.zeros(len(head.slots), dtype=keys.dtype)
    for group in range(groups):
        queries = [
            mean_turn(query[group], seen - position, rule.num_future)
            for position, query in enumerate(head.queries)
            if position >= rule.sink
        ]
        if not queries:
            return [0.0] * len(head.slots)
        sample = torch.stack(queries)
        logits = keys @ sample.mean(0) / math.sqrt(channels)
        if rule.use_covariance:
            logits += ((sample - sample.mean(0)) @ keys.T).square().mean(0) / channels / 2  # k S k by key
        chances[behind] += logits[behind].softmax(0) / groups
    if rule.use_value_norm:
        chances = (chances + rule.epsilon) * values.square().sum(1).sqrt()
    return chances.tolist()


def mean_turn(vector: Tensor, nearest: int, count: int) -> Tensor:
    """A vector ``(D)`` moved on by ``nearest`` positions and more, mean over ``count`` of them."""
    half = len(vector) // 2
    turned = torch.complex(vector[:half], vector[half:]) * turns(half, nearest, count)
    return torch.cat([turned.real, turned.imag])


@functools.cache
def turns(half: int, nearest: int, count: int) -> Tensor:
    """Mean rotations ``(D / 2)``; rotary embedding with a base of 10,000."""
    distances = torch.arange(nearest, nearest + count, dtype=torch.float64)
    angles = distances[:, None] * 1e4 ** -(torch.arange(half).double() / half)
    return torch.polar(torch.ones_like(angles), angles).mean(0)


SCORES: dict[str, Callable[[Rule, Layer, Head], list[float]]] = {
    "streaming_llm": by_position,
    "random": by_random,
    "h2o": by_mass,
    "mikv": by_mass,
    "d2o": by_mass,
    "tova": by_last_query,
    "snapkv": by_window,
    "expected_attention": by_expected_attention,
}


# Budgets.


def protected(rule: Rule, position: int, seen: int) -> bool:
    """Whether a token always stays."""
    return position < rule.sink or position >= seen - rule.recent


def slots_of(rule: Rule, seen: int) -> int:
    """A head's budget before layers share it out."""
    return math.floor(rule.budget * seen) if isinstance(rule.budget, float) else rule.budget


def layer_budget(rule: Rule, index: int, layers: list[Layer], seen: int) -> int:
    """A head's budget in layer ``index``; tokens that always stay are of it, and all of them find room."""
    budget, depth = slots_of(rule, seen), len(layers)
    if rule.per_layer == "pyramid" and depth > 1:
        lowest = (budget - rule.recent) / rule.beta
        highest = 2 * (budget - rule.recent) - lowest
        budget = math.floor(rule.recent + highest - index * (highest - lowest) / (depth - 1) + 0.5)
    if rule.per_layer == "variance":
        if index in (0, 1, depth - 1):
            return seen
        set_by_prompt = layers[index].budget
        budget = budget if set_by_prompt is None else set_by_prompt
    return max(
        budget, *(sum(protected(rule, slot.position, seen) for slot in head.slots) for head in layers[index].heads)
    )


def variance_budgets(rule: Rule, layers: list[Layer], seen: int) -> list[int]:
    """D2O: a layer whose heads look at few tokens each needs fewer slots than one that looks at many."""
    peaks = []
    for layer in layers:
        variances = [pvariance(by_mass(rule, layer, head)) for head in layer.heads]
        low, high = min(variances), max(variances)
        peaks.append(fmean((variance - low) / (high - low) if high > low else 0.0 for variance in variances))
    budget, total = slots_of(rule, seen), math.fsum(math.exp(-peak) for peak in peaks)
    least = max(math.ceil(budget / 100), rule.sink + rule.recent)
    shares = [math.exp(-peak) / total * len(layers) for peak in peaks]
    return [min(seen, max(least, round(share * budget))) for share in shares]


# What stays.


def best(ranks: list[Rank], count: int) -> set[int]:
    """Positions of the ``count`` highest."""
    return {position for _, position in sorted(ranks, reverse=True)[:count]}


def staying(rule: Rule, ranks: list[list[Rank]], budget: int) -> list[set[int]]:
    """Positions that stay in each head of a layer."""
    if rule.per_head == "same":
        return [best(head, budget) for head in ranks]
    stay = [best(head, math.floor(rule.floor * budget)) for head in ranks]
    others = [(rank, index) for index, head in enumerate(ranks) for rank in head if rank[1] not in stay[index]]
    left = len(ranks) * budget - sum(map(len, stay))
    for (_, position), index in sorted(others, reverse=True)[:left]:
        stay[index].add(position)
    return stay


def important(rule: Rule, query: int, weights: list[float], keys: int) -> bool:
    """CORM: whether any of the G heads of query ``query``, who sees ``keys`` keys, gives one of them its even share."""
    count = keys if rule.threshold == "visible" else query + 1
    return any(weight * count >= 1 for weight in weights)


def staying_by_importance(rule: Rule, head: Head) -> set[int]:
    """CORM: what any of the ``window`` latest queries found important; a token's own query always does."""
    seen, stay = len(head.looks), set()
    for slot in head.slots:
        for query in range(max(0, seen - rule.window), seen):
            look = head.looks[query]
            if query == slot.position or important(rule, query, look.get(slot.position, []), len(look)):
                stay.add(slot.position)
        if protected(rule, slot.position, seen):
            stay.add(slot.position)
    return stay


# What becomes of what leaves.


def evict(rule: Rule, layers: list[Layer], prompt: range | None = None) -> None:
    """Every layer and head lets go of what does not stay; ``prompt`` is the one that ends here."""
    seen = len(layers[0].heads[0].looks)
    if prompt is not None:
        learn_from_prompt(rule, layers, prompt)
    if rule.pack is not None:
        settle(rule, layers, seen)
        return
    for index, layer in enumerate(layers):
        if rule.name == "corm":
            stay = [staying_by_importance(rule, head) for head in layer.heads]
        else:
            stay = staying(rule, ranks_of(rule, layer, seen), layer_budget(rule, index, layers, seen))
        victims = [
            [slot for slot in head.slots if slot.position not in keep]
            for head, keep in zip(layer.heads, stay, strict=True)
        ]
        for head, keep in zip(layer.heads, stay, strict=True):
            head.slots = [slot for slot in head.slots if slot.position in keep]
        if rule.name == "d2o":
            merge(rule, layer, victims)
        if rule.name == "mikv":
            demote(rule, layer, victims)


def learn_from_prompt(rule: Rule, layers: list[Layer], prompt: range) -> None:
    """What the first prompt of a row decides for good."""
    assert rule.prompt == "dense" or (rule.per_layer != "variance" and not rule.balance)
    if rule.per_layer == "variance" and layers[0].budget is None:
        for layer, budget in zip(layers, variance_budgets(rule, layers, prompt.stop), strict=True):
            layer.budget = budget
    for head in (head for layer in layers for head in layer.heads):
        if rule.balance and head.balancer is None:
            queries = torch.stack(head.queries[prompt.start : prompt.stop])  # (T, G, D)
            keys = torch.stack([slot.key for slot in head.slots if slot.position in prompt])
            head.balancer = (queries.abs().amax((0, 1)) / keys.abs().amax(0)).sqrt()


def ranks_of(rule: Rule, layer: Layer, seen: int) -> list[list[Rank]]:
    """Of each head, in the order of its slots."""
    return [
        [
            (math.inf if protected(rule, slot.position, seen) else score, slot.position)
            for slot, score in zip(head.slots, SCORES[rule.name](rule, layer, head), strict=True)
        ]
        for head in layer.heads
    ]


def demote(rule: Rule, layer: Layer, victims: list[list[Slot]]) -> None:
    """MiKV: what leaves is attended for ever, from fewer bits.

    Scaling keys before the codec and back behind it is the paper's scaling of keys there and queries the other way.
    """
    assert rule.codec is not None
    for head, leaving in zip(layer.heads, victims, strict=True):
        for slot in leaving:
            scale = torch.ones_like(slot.key) if head.balancer is None else head.balancer
            head.second.append(Slot(slot.position, rule.codec(slot.key * scale) / scale, rule.codec(slot.value)))


def merge(rule: Rule, layer: Layer, victims: list[list[Slot]]) -> None:
    """D2O: what leaves goes into the survivor whose key points the same way, where that is so for most of its kind.

    The e-th victims of all heads, by position, share one decision. A threshold follows the mean likeness over events.
    """
    nearest = [
        [nearest_of(slot, head.slots) for slot in leaving if head.slots]
        for head, leaving in zip(layer.heads, victims, strict=True)
    ]
    likeness = [like for row in nearest for like, _ in row]
    if not likeness:
        return
    old, mean = layer.threshold, fmean(likeness)
    layer.threshold = mean if old is None else rule.smooth * old + (1 - rule.smooth) * mean
    merges = [
        fmean(row[event][0] for row in nearest if event < len(row)) >= layer.threshold
        for event in range(max(map(len, nearest)))
    ]
    for head, leaving, row in zip(layer.heads, victims, nearest, strict=True):
        joining = [
            (slot, like, survivor)
            for slot, (like, survivor), wanted in zip(leaving, row, merges, strict=False)
            if wanted
        ]
        head.merged += len(joining)
        for survivor in head.slots:
            own = [(slot, like) for slot, like, other in joining if other is survivor]
            survivor.key = (survivor.key + sum(like * slot.key for slot, like in own)) / (1 + len(own))
            survivor.value = (survivor.value + sum(like * slot.value for slot, like in own)) / (1 + len(own))


def nearest_of(slot: Slot, survivors: list[Slot]) -> tuple[float, Slot]:
    """The survivor with the largest cosine of keys, and that cosine."""
    cosines = [torch.cosine_similarity(slot.key, survivor.key, dim=0).item() for survivor in survivors]
    return max(zip(cosines, survivors, strict=True), key=lambda pair: pair[0])


def settle(rule: Rule, layers: list[Layer], seen: int) -> None:
    """GEAR: whole blocks of ``every`` tokens, counted from the row's first, are attended for ever from fewer bits."""
    assert rule.pack is not None
    for head in (head for layer in layers for head in layer.heads):
        while head.slots and head.slots[0].position + rule.every <= seen:
            block, head.slots = head.slots[: rule.every], head.slots[rule.every :]
            keys, values = (torch.stack([getattr(slot, name) for slot in block]) for name in ("key", "value"))
            read = zip(block, rule.pack(keys, "keys"), rule.pack(values, "values"), strict=True)
            head.second += [Slot(slot.position, key, value) for slot, key, value in read]


# The second store's numbers.


def round_to_nearest(bits: int, group: int | None = None) -> Callable[[Tensor], Tensor]:
    """A codec of vectors ``(D)``: ``zero + code * scale``, with zero and scale of each group of channels in float16.

    Zero is the smallest channel, the largest code the largest one; a scale is no finer than float16 spaces its zero.
    """

    def half(number: float) -> float:
        return torch.tensor(number, dtype=torch.float64).half().item()

    def read_back(channels: list[float]) -> list[float]:
        levels, zero = 2**bits - 1, half(min(channels))
        scale = half(max((max(channels) - zero) / levels, abs(zero) / 1024, 2.0 ** (bits - 24)))
        return [zero + min(max(round((channel - zero) / scale), 0), levels) * scale for channel in channels]

    def codec(vector: Tensor) -> Tensor:
        channels, width = vector.tolist(), group or len(vector)
        bounds = pairwise([*range(0, len(channels), width), len(channels)])
        return vector.new_tensor([number for begin, end in bounds for number in read_back(channels[begin:end])])

    return codec
