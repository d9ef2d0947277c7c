"""One line a method: a model whose cache the conformance suite puts through its paces."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

import kvtrain
from kvtrain.models.eviction.config import Policy
from kvtrain.models.hosts import windows
from tests.hosts import (
    FAMILIES,
    SINKS,
    SLIDING,
    WITHOUT_SINKS,
    dmc_at_rate,
    dms_at_rate,
    random_ids,
    with_random_mixers,
)

ALL_FAMILIES = (*FAMILIES, *SLIDING)


class Entry(NamedTuple):
    """A way to retrofit a host of so many layers, or to build a model that only takes its sizes from one."""

    retrofit: Callable[[PreTrainedModel], PreTrainedModel]
    layers: int = 2
    families: tuple[str, ...] = ALL_FAMILIES


def lckv(kv_map: str, **settings: object) -> Entry:
    """As many passes as tokens: then the parallel form is exact, and so are blocks."""
    method = kvtrain.LCKV(kv_map=kv_map, forward_passes=50, prefill_block=8, **{"page_size": 4, **settings})
    depth = len(kv_map.split("_"))  # whose map says itself which layers slide
    return Entry(lambda host: kvtrain.retrofit(host, method), depth, WITHOUT_SINKS)


def duo(*full_heads: Callable[[int], list[int]], compensation: bool = False) -> Entry:
    """For every layer its full heads, from the number of heads that the host has."""

    def retrofit(host: PreTrainedModel) -> PreTrainedModel:
        heads, sliding = host.config.num_key_value_heads, windows(host.config)
        chosen = [[] if layer in sliding else full(heads) for layer, full in enumerate(full_heads)]
        method = kvtrain.Duo(sink=2, recent=7, full_heads=chosen, page_size=4, compensation=compensation)
        return kvtrain.retrofit(host, method)

    return Entry(retrofit, layers=len(full_heads))


def hybrid(families: tuple[str, ...] | None = None, **settings: object) -> Entry:
    """Every second of the layers that see everything is linear, its new weights random."""

    def retrofit(host: PreTrainedModel) -> PreTrainedModel:
        return with_random_mixers(kvtrain.convert_linear(host, page_size=4, **settings))

    every = tuple(family for family in ALL_FAMILIES if family not in SINKS)
    return Entry(retrofit, 3, every if families is None else families)


def evicting(policy: Policy, families: tuple[str, ...] = ("llama",)) -> Entry:
    """A policy, in the form in which it cuts prompts as it cuts everything else."""
    method = replace(policy, prompt="blocks", page_size=4)
    return Entry(lambda host: kvtrain.retrofit(host, method), families=families)


def transnormer(variant: str, **settings: object) -> Entry:
    """A model of its own, as wide and deep as the host and with its vocabulary."""

    def build(host: PreTrainedModel) -> PreTrainedModel:
        names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "tie_word_embeddings")
        sizes = {name: getattr(host.config, name) for name in (*names, "bos_token_id", "eos_token_id", "pad_token_id")}
        config = kvtrain.TransNormerConfig(variant=variant, block_size=5, **{**sizes, **settings})
        torch.manual_seed(0)
        return kvtrain.TransNormerForCausalLM(config).to(host.dtype).eval()

    return Entry(build, layers=3, families=("llama",))


# Eviction policies that evict, of rows of some 40 tokens.
POLICIES: dict[str, Policy] = {
    "streamingllm": kvtrain.StreamingLLM(budget=9, sink=2),
    "h2o": kvtrain.H2O(budget=9, recent=3),
    "h2o_adaptive": kvtrain.H2O(budget=9, recent=3, every=4, per_head="adaptive"),
    "tova": kvtrain.TOVA(budget=9),
    "snapkv": kvtrain.SnapKV(budget=12, recent=4, every=8),
    "snapkv_pyramid": kvtrain.SnapKV(budget=12, recent=4, every=5, per_layer="pyramid", beta=3.0),
    "expectedattention": kvtrain.ExpectedAttention(budget=9, recent=2, sink=2, num_future=16),
    "corm": kvtrain.CORM(recent=5, window=6),
    "d2o": kvtrain.D2O(budget=9, recent=3, sink=2),
    "mikv": kvtrain.MiKV(budget=9, recent=3),
    "random": kvtrain.RandomEviction(budget=0.4, every=3, recent=2),
    "gear": kvtrain.GEAR(bits=4, block=12, rank=2),
    "kivi": kvtrain.KIVI(bits=4, block=12),
}

# By method's name, or by one that begins with it.
CACHES: dict[str, Entry] = {
    "full": Entry(lambda host: kvtrain.retrofit(host, kvtrain.Full())),
    "dmc": Entry(lambda host: dmc_at_rate(host, 0.6, random_ids(2, 40, seed=7), page_size=4, window=5)),
    "dms": Entry(lambda host: dms_at_rate(host, 0.7, window=6, page_size=4)),
    "lckv": lckv("0_2_2_2"),
    "lckv_sliding": lckv("0s_2s_2s_3", sliding_window=7),
    "lckv_fused": lckv("0_1_1", value_map="first", residual=True),
    "duo": duo(lambda heads: [heads - 1], lambda heads: [0]),
    "duo_uneven": duo(lambda heads: [], lambda heads: list(range(heads))),
    "duo_compensated": duo(lambda heads: [0], lambda heads: [], compensation=True),
    "hybrid": hybrid(),
    "hybrid_elu": hybrid(families=("llama",), features="elu", decay="none", gate=False),
    **{name: evicting(policy, ALL_FAMILIES if name == "h2o" else ("llama",)) for name, policy in POLICIES.items()},
    "transnormer_t1": transnormer("T1", num_block_heads=2),
    "transnormer_t2": transnormer("T2"),
    "transnormer_decay": transnormer("T2", decay="released", relative_position="rope", pre_norm=False),
}
# Of all policies those that stand for the others in the gating tiers: fields, a ring of queries, a second store; and of
# settings that change what a layer computes and not what it keeps, none. That any chunks are the parallel form, and
# padded rows rows alone, is asked there of every policy.
_ALIKE = {*POLICIES, "hybrid_elu", "transnormer_decay"} - {"h2o", "snapkv", "mikv"}
SOME_CACHES = [name for name in CACHES if name not in _ALIKE]
# The first of each method, without its variants.
MAIN = tuple({name.split("_")[0]: name for name in reversed(CACHES)}.values())
# Of those one policy alone, where a whole server or folder is made of each.
SOME_MAIN = tuple(name for name in MAIN if name == "h2o" or name not in POLICIES)

# Every cache in every family; and every cache in one family, and every family with one cache.
PAIRS = [(name, family) for name, entry in CACHES.items() for family in entry.families]
SOME_PAIRS = [(name, family) for name, family in PAIRS if name == "dmc" or family == "llama"]
