"""What a request may ask for; every refusal names the field and the remedy."""

import math
import re

import pytest

from kvtrain.inference.engine.limits import Limits
from kvtrain.inference.engine.request import Request, Sampling, Usage


@pytest.mark.parametrize(
    ("settings", "refusal"),
    [
        ({"temperature": -0.1}, "temperature must lie between 0 and 2, not -0.1"),
        ({"temperature": math.nan}, "temperature must lie between 0 and 2, not nan"),
        ({"temperature": "hot"}, "temperature must be a number, not 'hot'"),
        ({"temperature": True}, "temperature must be a number, not True"),
        ({"top_p": 0}, "top_p must be above 0; use temperature=0 for the best token alone"),
        ({"top_p": 1.5}, "top_p must lie between 0 and 1, not 1.5"),
        ({"top_k": -1}, "top_k must be at least 0, not -1"),
        ({"top_k": 1.5}, "top_k must be a whole number, not 1.5"),
        ({"min_p": 2}, "min_p must lie between 0 and 1, not 2"),
        ({"repetition_penalty": 0}, "repetition_penalty must lie between 0.01 and 10, not 0"),
        ({"presence_penalty": 3}, "presence_penalty must lie between -2 and 2, not 3"),
        ({"frequency_penalty": math.inf}, "frequency_penalty must lie between -2 and 2, not inf"),
        ({"logit_bias": {5: 101}}, "logit_bias of token 5 must lie between -100 and 100, not 101"),
        ({"logit_bias": {"5": 1}}, "logit_bias must be a whole number, not '5'"),
        ({"seed": -1}, "seed must be from 0 to 9223372036854775807, not -1"),
        ({"seed": 1 << 63}, "seed must be from 0 to 9223372036854775807, not 9223372036854775808"),
    ],
)
def test_sampling_out_of_range_is_refused(settings, refusal):
    with pytest.raises(ValueError, match=f"^{re.escape(refusal)}$"):
        Sampling(**settings)


@pytest.mark.parametrize(
    ("fields", "refusal"),
    [
        ({"prompt": []}, "prompt is empty; give at least one token, such as the tokenizer's start token"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
        ({"max_new_tokens": 2.0}, "max_new_tokens must be a whole number, not 2.0"),
        ({"n": 0}, "n must be at least 1, not 0"),
        ({"logprobs": -1}, "logprobs must be at least 0, not -1"),
        ({"stop": "end"}, "stop must be a list of strings; put 'end' into one"),
        ({"stop": ["a", ""]}, "stop must hold strings of at least one character; leave empty ones out"),
        ({"timeout": -1}, "timeout must lie between 0 and inf, not -1"),
    ],
)
def test_a_request_out_of_range_is_refused(fields, refusal):
    with pytest.raises(ValueError, match=f"^{re.escape(refusal)}$"):
        Request(**{"prompt": [1], **fields})


def test_requests_are_values():
    assert Request([1, 2]) == Request((1, 2)) and Request([1, 2], max_new_tokens=5).most_tokens == 7
    biased = Sampling(logit_bias={1: 2.0})
    assert biased != Sampling() and hash(biased) == hash(Sampling()) and biased == Sampling(logit_bias={1: 2.0})


def test_compression_is_tokens_seen_over_kept():
    assert Usage(prompt_tokens=3, seen_tokens=12, kept_tokens=3.0).compression == 4.0
    assert Usage(prompt_tokens=3).compression == 1.0


def test_a_step_has_room_for_prompts_beside_all_that_run():
    with pytest.raises(ValueError, match="step_tokens must be above max_requests \\(64\\), not 64"):
        Limits(step_tokens=64)
    with pytest.raises(ValueError, match="max_queue must be at least 1, not 0"):
        Limits(max_queue=0)
