"""PEFT's adapters around retrofitted models, and where they are refused."""

import pytest
import torch
from torch.nn import functional

import kvtrain
from tests.caches import CACHES
from tests.hosts import make_host, random_ids

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.roads

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]


def adapted(model, targets):
    """A model whose adapters are not zero."""
    torch.manual_seed(1)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1)
    return model


@pytest.mark.parametrize("name", ["full", "dmc", "lckv", "duo", "transnormer_t2"])
def test_adapters_of_the_head_learn(name):
    """The loss is that of the model's own logits, and so are the gradients."""
    entry = CACHES[name]
    model = adapted(entry.retrofit(make_host(layers=entry.layers)), ["lm_head"]).eval()
    ids = random_ids(2, 12)
    loss = model(input_ids=ids, labels=ids).loss
    logits = model(input_ids=ids).logits
    expected = functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(loss, expected, atol=1e-10, rtol=0)
    adapters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(adapters) == 2
    found = torch.autograd.grad(loss, list(adapters.values()))
    for gradient, other in zip(found, torch.autograd.grad(expected, list(adapters.values())), strict=True):
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, other, atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", ["full", "dmc", "lckv", "duo"])
def test_adapters_are_saved_opened_and_merged(name, tmp_path):
    entry = CACHES[name]
    base = entry.retrofit(make_host(layers=entry.layers))
    model, ids = adapted(base, PROJECTIONS).eval(), random_ids(1, 14)
    logits = model(input_ids=ids).logits
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(entry.retrofit(make_host(layers=entry.layers)), tmp_path).eval()
    again = again.to(logits.dtype)
    torch.testing.assert_close(again(input_ids=ids).logits, logits, atol=1e-5, rtol=0)
    asked = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    text = model.generate(input_ids=ids, **asked)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, logits, atol=1e-9, rtol=0)
    assert torch.equal(merged.generate(ids, **asked), text)


def test_a_host_with_adapters_is_refused_until_they_are_merged():
    model = adapted(make_host(), PROJECTIONS)
    with pytest.raises(ValueError, match=r"merge_and_unload\(\)"):
        kvtrain.retrofit(model, kvtrain.Full())
    with pytest.raises(ValueError, match=r"merge_and_unload\(\)|adapters"):
        kvtrain.retrofit(model.base_model.model, kvtrain.Full())
    ids, merged = random_ids(1, 9), model.merge_and_unload()
    torch.testing.assert_close(kvtrain.retrofit(merged, kvtrain.Full())(ids).logits, merged(ids).logits)
