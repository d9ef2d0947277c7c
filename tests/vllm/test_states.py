"""Methods with a state of constant size: vLLM's pages hold it, and it does not grow."""

import functools
from typing import Any

import pytest
import torch

import kvtrain
from tests.vllm.folders import FAMILIES, folder, prompts
from tests.vllm.jobs import answers, check_tokens

TRANSNORMERS = ("t1", "t2", "t2-none", "t1-paper")
NAMES = ("duo", "streaming", *TRANSNORMERS)


@functools.cache
def together_and_alone(name: str) -> dict[str, Any]:
    """All prompts at once, each by itself, all again over the pages that are free now, not cleared."""
    return answers(name, [prompts(), *([prompt] for prompt in prompts()), prompts()])


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
def test_every_family_has_streaming_heads(family):
    check_tokens(f"{family}-duo", answers(f"{family}-duo", [prompts()])["tokens"][0])


def test_a_linear_model_takes_a_page_a_row():
    """Of 6 layers the lower 3 keep a block of 64 tokens, the upper ones sums; 8 heads of 32 channels; float32."""
    (group,) = together_and_alone("t1")["groups"]
    assert group == {"layers": 1, "kind": "MambaSpec", "page": 3 * 2 * 8 * 64 * 32 * 4 + 3 * 8 * 32 * 32 * 4} | {
        "tokens": group["tokens"]
    }
    assert group["tokens"] >= 512  # so many tokens take one page


def test_streaming_heads_save_what_they_should():
    figures = answers("duo-long", [prompts()])
    check_tokens("duo-long", figures["tokens"][0])
    (blocks,) = (group for group in figures["groups"] if group["kind"] == "FullAttentionSpec")
    rings = [group for group in figures["groups"] if group["kind"] == "MambaSpec"]
    assert {group["page"] for group in rings} == {blocks["page"]}
    ring_bytes = sum(group["layers"] * group["page"] for group in rings)
    full_bytes = 2048 * 6 * 2 * 8 * 32 * 4
    request = -(-2048 // blocks["tokens"]) * blocks["layers"] * blocks["page"] + ring_bytes
    assert request / full_bytes <= 0.60
    assert 6 * 2 * 4 * (128 + 256) * 32 * 4 / ring_bytes >= 0.75


def test_rows_that_are_preempted_go_on():
    figures = answers("duo", [prompts()], max_model_len=256, num_gpu_blocks_override=20)
    assert figures["preemptions"] > 0
    check_tokens("duo", figures["tokens"][0])


def test_a_linear_model_reads_on_where_it_is_asked_to():
    long = [[3 + number % 500 for number in range(700)]]
    (answer,) = answers("t1", [long], max_model_len=1024)["tokens"][0]
    model = kvtrain.load(folder("t1"), dtype=torch.float32).eval()
    wanted = model.generate(torch.tensor(long), max_new_tokens=48, do_sample=False, eos_token_id=None)
    assert answer == wanted[0, 700:].tolist()


def test_few_pages_serve_many_rows():
    check_tokens("t1", answers("t1", [prompts()], num_gpu_blocks_override=4)["tokens"][0])
