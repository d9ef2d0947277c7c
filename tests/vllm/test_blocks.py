"""Methods whose caches lie in vLLM's own blocks: its tokens are ours, and its pool holds so many more."""

import functools
from typing import Any

import pytest

from tests.vllm.folders import FAMILIES, prompts
from tests.vllm.jobs import answers, check_tokens

GIB = 2**30
NAMES = ("full", "gqa2", "cla2", "thirds", "gqa4-cla3", "yoco")


@functools.cache
def together_and_alone(name: str) -> dict[str, Any]:
    """All prompts at once, each by itself, all again over the pages that are free now."""
    return answers(name, [prompts(), *([prompt] for prompt in prompts()), prompts()], enable_prefix_caching=False)


def pool_tokens(name: str) -> int:
    figures = together_and_alone(name)
    assert 0 < figures["allocated"] <= GIB
    return figures["num_blocks"] * figures["block_size"]


@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_those_of_generate(name):
    together, *alone, again = together_and_alone(name)["tokens"]
    check_tokens(name, together)
    check_tokens(name, [one for (one,) in alone])
    check_tokens(name, again)


@pytest.mark.parametrize("name", NAMES)
def test_prompts_may_come_in_pieces(name):
    check_tokens(name, answers(name, [prompts()], max_num_batched_tokens=40)["tokens"][0])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_shares_layers(family):
    check_tokens(f"{family}-cla2", answers(f"{family}-cla2", [prompts()])["tokens"][0])


@pytest.mark.parametrize(("name", "least"), [("cla2", 1.99), ("thirds", 2.99), ("gqa2", 3.99), ("gqa4-cla3", 5.99)])
def test_the_pool_holds_more_tokens(name, least):
    assert pool_tokens(name) / pool_tokens("full") >= least


def test_rows_that_are_preempted_go_on():
    few = {"num_gpu_blocks_override": 16, "block_size": 32, "max_model_len": 256}
    figures = answers("cla2", [prompts()], enable_prefix_caching=False, **few)
    assert figures["preemptions"] > 0
    check_tokens("cla2", figures["tokens"][0])


def test_a_shared_beginning_is_found_again():
    figures = answers("cla2", [prompts(), prompts()], block_size=32, enable_prefix_caching=True)
    assert figures["cached"][1] > 0
    for tokens in figures["tokens"]:
        check_tokens("cla2", tokens)


def test_a_compiled_model_answers_alike():
    check_tokens("cla2", answers("cla2", [prompts()], enforce_eager=False)["tokens"][0])


def test_an_engine_in_a_process_of_its_own_answers_alike(monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    check_tokens("cla2", answers("cla2", [prompts()])["tokens"][0])
