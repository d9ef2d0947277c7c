"""The next token of rows with settings of their own."""

import math
from collections import Counter

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessorList

from kvtrain.inference.engine.request import Sampling
from kvtrain.inference.engine.sampling import Sampler, sample

VOCAB = 50


def sampler(prompt=(1, 2, 3), output=(), logprobs=None, index=0, **settings):
    return Sampler(Sampling(**settings), prompt, list(output), index, logprobs)


def logits(rows, seed=0):
    return 3 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


def test_greedy_rows_take_the_best_token():
    scores = logits(4)
    tokens, logprobs = sample(scores, [sampler() for _ in range(4)])
    assert tokens == scores.argmax(-1).tolist() and logprobs == [None] * 4


def drawn(scores, draws, **settings):
    """How often each token is drawn from one row of scores."""
    rows = [sampler(seed=seed, **settings) for seed in range(draws)]
    return Counter(sample(scores.expand(draws, -1), rows)[0])


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7},
        {"temperature": 1.0, "top_k": 3},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 0.9, "top_k": 8, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.5},
    ],
)
def test_the_distribution_is_that_of_generate(tiny_generation, settings):
    """Processors in `generate`'s own order; tokens that it excludes never come, the others as often as they should."""
    scores, ids = logits(1), torch.tensor([[1, 2, 3]])
    config = GenerationConfig(do_sample=True, **{"top_k": 0, **settings})
    wanted = tiny_generation(config)(ids, scores.clone()).softmax(-1)[0]
    found, draws = drawn(scores, 4000, **settings), 4000
    for token, probability in enumerate(wanted.tolist()):
        assert (found[token] == 0) if probability == 0 else True
        assert abs(found[token] / draws - probability) < 4 * math.sqrt(probability * (1 - probability) / draws) + 1e-9


@pytest.fixture(scope="module")
def tiny_generation():
    from tests.hosts import make_host

    host = make_host(layers=1)

    def processors(config) -> LogitsProcessorList:
        host._prepare_special_tokens(config, device="cpu")
        return host._get_logits_processor(config, input_ids_seq_length=3, prefix_allowed_tokens_fn=None,
                                          logits_processor=LogitsProcessorList(), device="cpu")  # fmt: skip

    return processors


def test_penalties_and_bias_by_hand():
    scores = torch.zeros(1, VOCAB)
    scores[0, 4], scores[0, 5], scores[0, 6] = 5.0, 4.0, 3.0

    def best(**settings):
        return sample(scores, [sampler(output=(4, 4, 5), prompt=(6,), **settings)])[0][0]

    assert best() == 4
    assert best(presence_penalty=1.5) == 4 and best(presence_penalty=1.9) == 4
    assert best(frequency_penalty=0.9) == 4 and best(frequency_penalty=1.1) == 6  # 2.8, 2.9 and 3 are left
    assert best(presence_penalty=2.0, frequency_penalty=0.5) == 6
    assert best(logit_bias={9: 6.0}) == 9 and best(logit_bias={4: -100.0}) == 5
    assert best(repetition_penalty=4.0) == 4  # all three alike, the prompt's too
    assert best(repetition_penalty=4.0, logit_bias={7: 1.3}) == 7  # and no token more than once


def test_rows_do_not_touch():
    """Any mix of settings gives each row what it gets alone."""
    settings = [
        {}, {"temperature": 1.0, "seed": 3}, {"temperature": 1.0, "seed": 4}, {"frequency_penalty": 0.5},
        {"temperature": 0.7, "top_p": 0.8, "seed": 5, "repetition_penalty": 1.3}, {"logit_bias": {7: 5.0}},
    ]  # fmt: skip
    outputs = [(), (1, 2), (5,), (7, 7, 8), (9,) * 11, (3, 4)]
    scores = logits(6, seed=2)
    rows = [sampler(output=output, logprobs=2, **own) for own, output in zip(settings, outputs, strict=True)]
    together, logprobs = sample(scores, rows)
    for row, (own, output) in enumerate(zip(settings, outputs, strict=True)):
        alone, (logprob,) = sample(scores[row : row + 1], [sampler(output=output, logprobs=2, **own)])
        assert alone == [together[row]]
        assert logprob.alternatives[0][0] == logprobs[row].alternatives[0][0]
        assert logprob.logprob == pytest.approx(logprobs[row].logprob)


def test_answers_to_one_request_differ_and_the_first_is_that_of_one_alone():
    scores = logits(1).expand(8, -1) / 10
    tokens = sample(scores, [sampler(temperature=1.0, seed=7, index=index) for index in range(8)])[0]
    assert len(set(tokens)) > 3
    assert tokens[0] == sample(scores[:1], [sampler(temperature=1.0, seed=7)])[0][0]


def test_logprobs_are_of_the_model_before_settings():
    scores = logits(2)
    wanted = scores.log_softmax(-1)
    rows = [sampler(logprobs=3, temperature=0.5, logit_bias={9: 100.0}, seed=0), sampler(logprobs=0)]
    tokens, (first, second) = sample(scores, rows)
    assert tokens[0] == 9 == first.token_id and first.logprob == pytest.approx(wanted[0, 9].item())
    best = wanted[0].topk(3)
    assert [token for token, _ in first.alternatives] == best.indices.tolist()
    assert [value for _, value in first.alternatives] == pytest.approx(best.values.tolist())
    assert second.alternatives == () and second.logprob == pytest.approx(wanted[1].max().item())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_settings_at_their_ends_give_tokens(dtype):
    """Scores that overflow would give numbers that are no tokens."""
    scores = 60 * torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(0)).to(dtype)
    for temperature in (5e-324, 1e-300, 0.0099):
        assert sample(scores, [sampler(temperature=temperature, seed=1)] * 2)[0] == scores.argmax(-1).tolist()
    for settings in (
        {"temperature": 0.01},
        {"temperature": 1, "repetition_penalty": 0.01},
        {"temperature": 2, "top_p": 5e-324},
    ):
        for bias in ({}, {3: 100.0}, {3: -100.0}):
            tokens, _ = sample(scores, [sampler(**settings, logit_bias=bias, frequency_penalty=-2, seed=1)] * 2)
            assert all(0 <= token < VOCAB for token in tokens)
