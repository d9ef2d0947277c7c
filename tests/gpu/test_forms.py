"""Whole models on every device: the form that trains, the form that serves, and the gradients of float64."""

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import kvtrain
from tests.caches import CACHES
from tests.hosts import dmc_at_rate, make_host, random_ids

# More than a block of FlexAttention, and a prompt that ends within one.
LENGTH, PROMPT, PADDED = 140, 133, 6


@cache
def served(name: str, device: str) -> PreTrainedModel:
    """A model in float32."""
    entry = CACHES[name]
    return entry.retrofit(make_host(layers=entry.layers, dtype=torch.float32)).to(device)


@pytest.mark.parametrize("name", CACHES)
def test_the_parallel_form_is_prefill_and_decoding(name: str, device: str):
    """Of a row, and of one with padding before it."""
    model, ids = served(name, device), random_ids(2, LENGTH).to(device)
    mask = torch.ones_like(ids)
    mask[1, :PADDED] = 0
    with torch.no_grad():
        parallel = model(ids, attention_mask=mask, use_cache=False).logits
        cache, parts = model.make_cache(), []
        for begin, end in ((0, 90), (90, PROMPT), *((at, at + 1) for at in range(PROMPT, LENGTH))):
            options = {"attention_mask": mask[:, :end], "past_key_values": cache}
            parts.append(model(ids[:, begin:end], **options).logits)
    difference = (torch.cat(parts, 1) - parallel)[mask.bool()].abs().max()
    assert difference < 2e-4 * parallel.abs().max()
    assert {store.placement.device.type for layer in cache.layers for store in layer.stores} == {device}


@pytest.mark.parametrize("name", ["full", "dmc", "lckv_fused", "duo", "transnormer_t2"])
def test_greedy_tokens_are_those_without_a_cache(name: str, device: str):
    model, ids = served(name, device), random_ids(2, 130).to(device)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "min_new_tokens": 4}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


def gated(host: PreTrainedModel) -> PreTrainedModel:
    model = kvtrain.retrofit(host, kvtrain.Duo(sink=2, recent=20))
    for layer in model.model.layers:
        torch.nn.init.constant_(layer.self_attn.gates, 0.7)
    return model


TRAINED: dict[str, Callable[[PreTrainedModel], PreTrainedModel]] = {
    "full": CACHES["full"].retrofit,
    "dmc": lambda host: dmc_at_rate(host, 0.6, random_ids(2, 40)).train(),
    "lckv": CACHES["lckv"].retrofit,
    "lckv_sliding": CACHES["lckv_sliding"].retrofit,
    "duo": gated,
    "transnormer_t1": CACHES["transnormer_t1"].retrofit,
    "transnormer_t2": CACHES["transnormer_t2"].retrofit,
}


@cache
def exact_model(name: str) -> PreTrainedModel:
    """A model as it trains, without dropout."""
    return TRAINED[name](make_host(layers=CACHES[name].layers if name in CACHES else 2))


def trained(name: str, device: str) -> PreTrainedModel:
    """The same in float32."""
    return copy.deepcopy(exact_model(name)).to(device, torch.float32)


def step(model: PreTrainedModel, device: str, *, halves: bool = False) -> dict[str, Tensor]:
    """Loss and gradients over rows of two documents."""
    ids = random_ids(2, LENGTH).to(device)
    documents = 1 + (torch.arange(LENGTH, device=device) >= 131).long().expand(2, -1)
    with torch.autocast(device, torch.bfloat16, enabled=halves):
        loss = model(ids, labels=ids, use_cache=False, document_ids=documents).loss
    loss.backward()
    grads = {name: p.grad.cpu().double() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach().cpu().double(), **grads}


def gradients(found: dict[str, Tensor]) -> Tensor:
    """Of all parameters, one after the other."""
    return torch.cat([tensor.flatten() for name, tensor in found.items() if name != "loss"])


@cache
def exact_step(name: str) -> dict[str, Tensor]:
    return step(exact_model(name), "cpu")


@pytest.mark.parametrize("name", TRAINED)
def test_a_training_step_is_that_of_float64(name: str, device: str):
    found, exact = step(trained(name, device), device), exact_step(name)
    assert found.keys() == exact.keys()
    assert found["loss"].item() == pytest.approx(exact["loss"].item(), rel=1e-4)
    assert (gradients(found) - gradients(exact)).norm() < 2e-3 * gradients(exact).norm()


@pytest.mark.parametrize("name", TRAINED)
def test_a_training_step_in_bfloat16(name: str, device: str):
    """A model this small and this random rounds badly: the loss is near, and the gradients point the same way."""
    found, exact = step(trained(name, device), device, halves=True), exact_step(name)
    assert found["loss"].item() == pytest.approx(exact["loss"].item(), rel=2e-2)
    assert torch.cosine_similarity(gradients(found), gradients(exact), 0) > 0.9
