"""The context of a forward pass: what it takes, what it refuses, and what is found once for all layers."""

import pytest
import torch
from accelerate.utils import send_to_device

import kvtrain
from kvtrain.models import context as contexts
from kvtrain.models.context import ForwardContext
from kvtrain.models.dmc import attention as dmc_attention
from tests.caches import CACHES
from tests.hosts import make_host, random_ids


@pytest.fixture(params=["full", "dmc", "duo", "lckv", "transnormer_t2"])
def model(request):
    entry = CACHES[request.param]
    return entry.retrofit(make_host(layers=entry.layers))


def test_a_misspelt_argument_is_refused_with_the_right_name(model):
    ids = random_ids(1, 6)
    with pytest.raises(ValueError, match="Did you mean 'document_ids'"):
        model(ids, documents_ids=torch.ones_like(ids), use_cache=False)
    with pytest.raises(ValueError, match=r"unknown argument .* 'no_such_thing'. It has input_ids"):
        model(ids, no_such_thing=1)


def test_what_tokenizers_and_collators_add_is_left_unread(model):
    ids = random_ids(2, 6)
    with torch.no_grad():
        expected = model(ids).logits
        added = {"token_type_ids": torch.zeros_like(ids), "no_such_thing": None, "cache_position": torch.arange(6)}
        assert torch.equal(model(ids, **added).logits, expected)


def test_generating_hands_more_on_than_it_uses(model):
    """``transformers serve`` passes a tokenizer, which ends up in the arguments of every step."""
    if model.can_generate():
        asked = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(
            model.generate(random_ids(1, 5), tokenizer=object(), **asked), model.generate(random_ids(1, 5), **asked)
        )


def test_a_mask_that_is_none_of_padding_is_refused(model):
    ids = random_ids(2, 6)
    with pytest.raises(ValueError, match=r"attention_mask is \(2, 1, 6, 6\); pass the padding mask"):
        model(ids, attention_mask=torch.ones(2, 1, 6, 6), use_cache=False)


def test_what_follows_from_a_pass_is_found_once(monkeypatch):
    """Not in every layer, and not again where layers are recomputed."""
    counts = {"_without_channel": 0, "_bound_to_append": 0}

    def counting(name, original):
        def count(*args):
            counts[name] += 1
            return original(*args)

        return count

    for name in counts:
        monkeypatch.setattr(dmc_attention, name, counting(name, getattr(dmc_attention, name)))
    model = kvtrain.retrofit(make_host("llama", layers=4), kvtrain.DMC()).train()
    model.gradient_checkpointing_enable()
    ids = random_ids(2, 12)
    model(ids, labels=ids, document_ids=torch.tensor([[1] * 5 + [2] * 7] * 2)).loss.backward()
    assert counts == {"_without_channel": 1, "_bound_to_append": 1}


def test_prefill_is_said_for_each_row():
    """A single token is part of a prompt in one row and a step of decoding in the other."""
    valid = torch.tensor([[True], [True], [False]])
    for said, real, rows, some in (
        (torch.tensor([True, False, True]), valid, [True, False, False], True),
        (torch.tensor([False, False, True]), valid, [False, False, False], False),
        (True, valid, [True, True, False], True),
        (None, valid, [False, False, False], False),
        (None, valid.expand(-1, 2), [True, True, False], True),
    ):
        reads, may = contexts._prefill(said, real)
        assert reads.tolist() == rows and may is some


def test_rows_of_an_iterated_stack_read_and_decode_side_by_side():
    """Each row as it would be alone: the first reads the last token of its prompt, the second decodes."""
    options = {"kv_map": "0_2_2_3", "forward_passes": 3, "prefill_block": 4}
    model = kvtrain.retrofit(make_host("llama", layers=4, dtype=torch.float64), kvtrain.LCKV(**options)).eval()
    ids = random_ids(2, 7)
    with torch.no_grad():
        alone = []
        for row, prefill in ((0, True), (1, None)):
            cache = model.make_cache()
            model(ids[row : row + 1, :6], past_key_values=cache, prefill=True)
            alone.append(model(ids[row : row + 1, 6:], past_key_values=cache, prefill=prefill).logits[0])
        cache = model.make_cache()
        model(ids[:, :6], past_key_values=cache, prefill=True)
        together = model(ids[:, 6:], past_key_values=cache, prefill=torch.tensor([True, False])).logits
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-10, rtol=0)
    assert (alone[0] - model(ids[:1], use_cache=False).logits[0, 6:]).abs().max() < 1  # both are outputs of the model


def test_it_follows_its_layers_to_other_devices():
    """Where accelerate spreads a model, its hooks move what layers get."""
    model = kvtrain.retrofit(make_host("llama"), kvtrain.Full())
    cache = model.make_cache()
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    here = contexts.cache_context({"input_ids": random_ids(2, 3), "attention_mask": mask}, cache)
    assert send_to_device(here, "cpu") is here
    there = send_to_device(here, torch.device("meta"))
    assert {there.positions.device.type, there.valid.device.type, there.prefill.device.type} == {"meta"}
    assert there.to("meta") is there is here.to("meta") and there.cache is cache
    there.cache_layer(0)
    here.leave(object())  # somebody has looked at the cache
    parallel = contexts.parallel_context({"input_ids": random_ids(2, 3), "attention_mask": mask}, None)
    assert parallel.to("meta").documents.queries.device.type == "meta" and parallel.to("meta").cache is None


def test_a_pass_without_a_cache_leaves_its_outputs_alone():
    output = object()
    assert ForwardContext(torch.arange(3)[None]).leave(output) is output
