"""What ``generate`` gives back with the cache of its own is what it gives without one, whatever is asked for.

Sequences alone, and second turns, are in ``tests/cache/test_conformance.py``; these are the outputs beside them.
"""

from functools import cache as remember

import pytest
import torch
from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput

from kvtrain.cache.base import KVCache
from tests.caches import CACHES
from tests.hosts import make_host, random_ids

METHODS = ("full", "dmc", "lckv", "duo", "transnormer_t2")
MODES = {
    "greedy": {"do_sample": False},
    "sample": {"do_sample": True, "top_k": 7, "num_return_sequences": 2},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "beam sample": {"do_sample": True, "top_k": 7, "num_beams": 2},
}
NEW, PROMPT = 5, 12
ROWS_OF_MODE = {"greedy": 2, "sample": 4, "beams": 6, "beam sample": 4}


@remember
def model_of(method):
    entry = CACHES[method]
    return entry.retrofit(make_host(layers=entry.layers))


@pytest.fixture(params=METHODS)
def model(request):
    return model_of(request.param)


def prompts():
    """Two of them, the shorter one padded on the left."""
    ids, mask = random_ids(2, PROMPT, seed=5), torch.ones(2, PROMPT, dtype=torch.long)
    ids[0, :4], mask[0, :4] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model, **asked):
    torch.manual_seed(0)
    told = {"max_new_tokens": NEW, "min_new_tokens": NEW, "pad_token_id": 0, "do_sample": False}
    return model.generate(**{**told, **asked})


EVERYTHING = dict.fromkeys(("return_dict_in_generate", "output_scores", "output_logits", "output_hidden_states"), True)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-9, rtol=0)


def check_hidden_states(found, expected, missing):
    """One tuple a step; with a cache of the prompt and then of single tokens, without one of all so far."""
    for step, (new, whole) in enumerate(zip(found, expected, strict=True)):
        assert [at for at, state in enumerate(new) if state is None] == missing
        pairs = [(one, all_) for one, all_ in zip(new, whole, strict=True) if one is not None]
        assert {one.shape[1] for one, _ in pairs} == {PROMPT if step == 0 else 1}
        assert {all_.shape[1] for _, all_ in pairs} == {PROMPT + step}
        close([one[:, -1] for one, _ in pairs], [all_[:, -1] for _, all_ in pairs])


@pytest.mark.parametrize("mode", MODES)
def test_outputs_are_those_without_a_cache(model, mode):
    asked = {**prompts(), **MODES[mode], **EVERYTHING}
    found, expected = (generate(model, **asked, use_cache=use) for use in (True, False))
    assert type(found) is (GenerateBeamDecoderOnlyOutput if "beam" in mode else GenerateDecoderOnlyOutput)
    assert torch.equal(found.sequences, expected.sequences) and found.sequences.shape[1] == PROMPT + NEW
    assert len(found.scores) == len(found.logits) == NEW
    close(found.scores, expected.scores)
    close(found.logits, expected.logits)
    if "beam" in mode:
        assert torch.equal(found.beam_indices, expected.beam_indices)
        close(found.sequences_scores, expected.sequences_scores)
    assert isinstance(found.past_key_values, KVCache) and expected.past_key_values is None
    lengths = torch.tensor([PROMPT - 4, PROMPT]).repeat_interleave(ROWS_OF_MODE[mode] // 2) + NEW - 1
    assert torch.equal(found.past_key_values.tokens, lengths)
    layers = range(model.config.num_hidden_layers)
    missing = sorted(set(layers) - set(layers if model.recorded_states() is None else model.recorded_states()))
    check_hidden_states(found.hidden_states, expected.hidden_states, missing)


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
def test_a_prompt_beside_padding_generates_what_it_does_alone(model, use_cache):
    together = generate(model, **prompts(), use_cache=use_cache)
    alone = generate(model, input_ids=prompts()["input_ids"][:1, 4:], use_cache=use_cache)
    assert torch.equal(together[:1, 4:], alone)


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
def test_embeddings_generate_what_their_tokens_do(model, use_cache):
    asked = prompts()
    embeds = model.get_input_embeddings()(asked["input_ids"])
    told = {"attention_mask": asked["attention_mask"], "use_cache": use_cache}
    ids = generate(model, inputs_embeds=embeds, **told)
    assert torch.equal(ids, generate(model, input_ids=asked["input_ids"], **told)[:, PROMPT:])


def test_logits_to_keep_does_not_change_what_is_generated(model):
    """``generate`` asks for the last logits alone; those of all tokens say the same."""
    assert torch.equal(generate(model, **prompts(), logits_to_keep=0), generate(model, **prompts()))


@pytest.mark.parametrize("helper", ["itself", "prompt"])
def test_assisted_decoding_gives_greedy_outputs(model, helper):
    """Not the tokens alone (``tests/cache/test_rollback.py``): the scores and logits of each, too."""
    helpers = {"itself": {"assistant_model": model}, "prompt": {"prompt_lookup_num_tokens": 2}}[helper]
    asked = {"input_ids": random_ids(1, 6).repeat(1, 2), **EVERYTHING}
    if model.assisted_options() is None:
        with pytest.raises(ValueError, match="plain decoding"):
            generate(model, **asked, **helpers)
        return
    found, expected = generate(model, **asked, **helpers), generate(model, **asked, use_cache=False)
    assert torch.equal(found.sequences, expected.sequences)
    close(found.scores, expected.scores)
    close(found.logits, expected.logits)
