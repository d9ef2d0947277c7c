"""MiKV's second store besides its definition: what a balancer is good for, and what is refused."""

from dataclasses import replace

import pytest
import torch

import kvtrain
from tests.hosts import make_host, random_ids

PROMPT, LENGTH = 30, 40


def scaled_keys(factor):
    """A host whose keys are so much larger in one pair of channels, and its queries smaller: the same logits, but 0."""
    host = make_host()
    with torch.no_grad():
        for layer in host.model.layers:
            layer.self_attn.k_proj.weight.unflatten(0, (-1, 4))[:, 1] *= factor  # of 8, 1 and 5 rotate together
            layer.self_attn.q_proj.weight.unflatten(0, (-1, 4))[:, 1] /= factor or 1
    return host


@torch.no_grad()
def logits_of(host, **settings):
    model, ids = (
        kvtrain.retrofit(host, kvtrain.MiKV(budget=8, recent=3, page_size=4, **settings)),
        random_ids(1, LENGTH),
    )
    cache = model.make_cache()
    model(ids[:, :PROMPT], past_key_values=cache, prefill=True)
    cache.end_prompt()
    return torch.cat([model(token, past_key_values=cache).logits[0] for token in ids[:, PROMPT:].split(1, 1)]), cache


def test_a_large_channel_costs_no_precision_where_channels_are_balanced():
    expected = make_host()(random_ids(1, LENGTH)).logits[0, PROMPT:]
    errors = {
        (balance, factor): (logits_of(scaled_keys(factor), balance=balance)[0] - expected).norm().item()
        for balance in (False, True)
        for factor in (1, 64)
    }
    assert errors[True, 64] == pytest.approx(errors[True, 1], rel=1e-9)  # a power of two
    assert errors[False, 64] > 3 * errors[True, 64] > 0


def test_a_channel_without_keys_stays_as_it_is():
    logits, cache = logits_of(scaled_keys(0), balance=True)
    balancer = cache.layers[0].state["balancer"][0]
    assert logits.isfinite().all()
    assert (balancer[:, [1, 5]] == 1).all() and (balancer[:, [0, 2, 3, 4, 6, 7]] != 1).all()


def test_smaller_groups_and_more_bits_lose_less():
    expected = make_host()(random_ids(1, LENGTH)).logits[0, PROMPT:]
    errors = [
        (logits_of(make_host(), low_bits=bits, group=group)[0] - expected).norm().item()
        for bits, group in ((2, None), (2, 4), (4, None), (8, None))
    ]
    assert errors == sorted(errors, reverse=True) and errors[0] > 20 * errors[-1] > 0


@pytest.mark.parametrize(("bits", "group", "width"), [(2, None, 6), (2, 4, 10), (4, 2, 20), (8, 8, 12)])
def test_a_slot_of_the_second_store_by_hand(bits, group, width):
    """Of 8 channels: their codes, and 4 bytes a group."""
    _, cache = logits_of(make_host(), low_bits=bits, group=group)
    pool = cache.layers[0].secondary.pool
    assert {name: slots.shape[2] for name, slots in pool.slots.items()} == {"keys": width, "values": width}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"low_bits": 3}, "low_bits must be 8, 4 or 2, not 3; a larger budget"),
        ({"group": 0}, "group must be at least 1 channel, not 0; None gives"),
        ({"group": 3}, "groups of 3 channels do not make up a head_dim of 8; use one of its divisors"),
    ],
)
def test_mistakes_name_the_remedy(settings, message):
    with pytest.raises(ValueError, match=message):
        kvtrain.retrofit(make_host(), kvtrain.MiKV(**settings))


def test_a_balancer_needs_a_prompt_that_ends():
    with pytest.raises(ValueError, match="give it prompt='dense'"):
        kvtrain.MiKV(balance=True, prompt="blocks")


def test_what_has_left_before_the_first_prompt_keeps_its_scale():
    """A row that answers first has let tokens go that no balancer knows of."""
    policy = kvtrain.MiKV(budget=8, recent=3, low_bits=8, balance=True)
    model, ids = kvtrain.retrofit(scaled_keys(64), policy), random_ids(1, LENGTH)
    cache, plain = model.make_cache(), kvtrain.retrofit(scaled_keys(64), replace(policy, balance=False))
    with torch.no_grad():
        expected = read(plain, ids, plain.make_cache())
        torch.testing.assert_close(read(model, ids, cache), expected, atol=1e-9, rtol=0)
    assert cache.layers[0].secondary.lengths.unique().tolist() == [LENGTH - 8]


def read(model, ids, cache):
    """An answer, a prompt, and an answer."""
    parts = [model(token, past_key_values=cache).logits for token in ids[:, :12].split(1, 1)]
    parts.append(model(ids[:, 12:PROMPT], past_key_values=cache, prefill=True).logits)
    return torch.cat(
        [*parts, *(model(token, past_key_values=cache).logits for token in ids[:, PROMPT:].split(1, 1))], 1
    )
