"""The contract of a causal language model in transformers: what callers hand over is honoured, or refused in a line."""

import functools
import logging
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from transformers import DataCollatorWithFlattening
from transformers.utils import output_capturing

import kvtrain
from kvtrain.models.compat import CACHE, NEWEST_TESTED, say_if_untested
from kvtrain.models.context import ForwardContext
from kvtrain.models.dmc.attention import _say_untargeted
from kvtrain.models.transnormer.heads import TransNormerForMaskedLM, TransNormerForSequenceClassification
from tests.caches import CACHES
from tests.hosts import VOCAB, make_host, random_ids

NAMES = ["full", "dmc", "lckv", "lckv_fused", "duo", "duo_compensated", "transnormer_t1", "transnormer_t2"]
ONCE = ["full", "dmc", "lckv_fused", "duo", "transnormer_t2"]  # every layer runs once
QUIET = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}


def model_of(name):
    entry = CACHES[name]
    return entry.retrofit(make_host(layers=entry.layers))


shared_model = functools.cache(model_of)  # for tests that leave it as it was


def close(actual, expected, atol=1e-12):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


@pytest.fixture(params=NAMES)
def model(request):
    return shared_model(request.param)


@pytest.fixture
def config(model):
    """The model's configuration, put back at the end."""
    before = {name: getattr(model.config, name) for name in ("return_dict", "output_hidden_states", "use_cache")}
    yield model.config
    for name, value in before.items():
        setattr(model.config, name, value)


# Packed rows.


@settings(max_examples=12)
@given(st.data())
def test_a_position_of_0_begins_a_document(data):
    """Rows packed by ``position_ids`` are the rows fed apart, whatever stands before and behind them."""
    name = data.draw(st.sampled_from(NAMES))
    model, lengths = shared_model(name), data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    left, right = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3))
    parts = [random_ids(1, length, seed=index) for index, length in enumerate(lengths)]
    padding = [torch.zeros(1, count, dtype=torch.long) for count in (left, right)]
    ids = torch.cat([padding[0], *parts, padding[1]], 1)
    positions = torch.cat([padding[0], *(torch.arange(length)[None] for length in lengths), padding[1]], 1)
    mask = torch.cat([padding[0], *(torch.ones_like(part) for part in parts), padding[1]], 1)
    told = {"attention_mask": mask} if left or right else {}
    with torch.no_grad():
        packed = model(ids, position_ids=positions, use_cache=False, **told).logits[:, left : left + sum(lengths)]
        close(packed, torch.cat([model(part, use_cache=False).logits for part in parts], 1))


@pytest.mark.parametrize("name", ["full", "transnormer_t2"])
def test_other_positions_begin_none(name):
    """Left padding, rows that repeat one another, and rows that start further on."""
    model, ids = shared_model(name), random_ids(2, 9)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        close(model(ids, position_ids=torch.arange(9)[None], use_cache=False).logits, expected)
        close(model(ids, position_ids=torch.arange(9).expand(2, -1), use_cache=False).logits, expected)
        padded, mask = functional.pad(ids, (3, 0)), functional.pad(torch.ones_like(ids), (3, 0))
        positions = (mask.cumsum(-1) - 1).clamp(min=0)  # 0 0 0 0 1 2 ...
        again = model(padded, attention_mask=mask, position_ids=positions, use_cache=False).logits
        close(again[:, 3:], expected)
        shifted = model(ids, position_ids=torch.arange(9)[None] + 10, use_cache=False).logits
        if name == "full":  # blocks of the other follow positions
            close(shifted, expected, atol=1e-8)


def test_what_the_collator_of_transformers_packs_is_read_apart(model):
    """Also where only flash-attention's ``cu_seq_lens_q`` says so."""
    rows = [random_ids(1, length, seed=length)[0].tolist() for length in (4, 7, 2)]
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_tensors="pt")
    batch = dict(collator([{"input_ids": row} for row in rows]))
    batch.pop("seq_idx", None)
    expected = torch.cat([model(torch.tensor([row])).logits for row in rows], 1)
    close(model(**batch).logits, expected)
    batch.pop("position_ids")
    close(model(**batch, use_cache=False).logits, expected)


def test_packed_rows_have_no_cache(model):
    ids, positions = random_ids(1, 9), torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1]])
    assert model(ids, position_ids=positions).get(CACHE) is None
    for told in ({"use_cache": True}, {"past_key_values": model.make_cache()}):
        with pytest.raises(ValueError, match=r"packed rows .* have no cache; pass one document a row"):
            model(ids, position_ids=positions, **told)


def test_documents_and_padding_together(model):
    """Document ids that go on through the padding, and a mask that says where it is."""
    ids = random_ids(2, 12)
    documents = torch.tensor([[1] * 5 + [2] * 7, [1] * 12])
    mask = torch.tensor([[1] * 10 + [0] * 2, [1] * 12])
    logits = model(ids, document_ids=documents, attention_mask=mask, use_cache=False).logits
    close(logits[0, :5], model(ids[:1, :5]).logits[0])
    close(logits[0, 5:10], model(ids[:1, 5:10]).logits[0])
    close(logits[1], model(ids[1:]).logits[0])


@pytest.mark.parametrize("head", [TransNormerForMaskedLM, TransNormerForSequenceClassification])
def test_models_without_a_cache_read_packed_rows_apart(head):
    config = kvtrain.TransNormerConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=2, vocab_size=VOCAB)
    config.causal = False
    model, ids = head(config).double().eval(), random_ids(1, 9)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    packed = model.model(ids, position_ids=positions).last_hidden_state
    apart = [model.model(part).last_hidden_state for part in (ids[:, :4], ids[:, 4:])]
    close(packed, torch.cat(apart, 1))


# The loss.


def test_the_caller_says_what_the_loss_is_divided_by(model):
    """As ``Trainer`` does under gradient accumulation."""
    ids, labels = random_ids(3, 11), random_ids(3, 11)
    labels[0, :7] = -100
    whole = model(ids, labels=labels)
    parts = [model(ids[row, None], labels=labels[row, None], num_items_in_batch=24).loss for row in range(3)]
    close(sum(parts), whole.loss)
    close(model(ids, labels=labels, num_items_in_batch=torch.tensor(48)).loss, whole.loss / 2)


def test_labels_may_be_shifted_already(model):
    ids, labels = random_ids(2, 11), random_ids(2, 11)
    shifted = functional.pad(labels[:, 1:], (0, 1), value=-100)
    expected = model(ids, labels=labels).loss
    close(model(ids, shift_labels=shifted).loss, expected)
    close(model(ids, labels=torch.zeros_like(ids), shift_labels=shifted).loss, expected)
    logits = model(ids).logits
    shifted[:, -1] = 5  # the last token predicts something, too
    close(model(ids, shift_labels=shifted).loss, functional.cross_entropy(logits.flatten(0, 1), shifted.flatten()))


# Outputs.


def test_an_output_may_be_a_tuple(model, config):
    ids = random_ids(2, 7)
    whole = model(ids, labels=ids)
    loss, logits, *_ = model(ids, labels=ids, return_dict=False)
    close(loss, whole.loss)
    close(logits, whole.logits)
    config.return_dict = False
    assert isinstance(model(ids), tuple)


@pytest.mark.parametrize("model", ONCE, indirect=True)
def test_hidden_states_by_argument_and_by_configuration(model, config):
    ids = random_ids(2, 7)
    states = model(ids, output_hidden_states=True).hidden_states
    assert len(states) == model.config.num_hidden_layers + 1
    close(model.lm_head(states[-1]), model(ids).logits)
    config.output_hidden_states = True
    again = model(ids).hidden_states
    assert all(torch.equal(one, other) for one, other in zip(states, again, strict=True))
    assert model(ids, output_hidden_states=False).hidden_states is None


@pytest.mark.skipif(not hasattr(output_capturing, "selected_hidden_states"), reason="older ones count otherwise")
@pytest.mark.parametrize("name", ONCE)
def test_some_hidden_states_of_padded_rows(name):
    """Padding behind real tokens moves to the front and back; states that nobody asked for are None."""
    model, ids = shared_model(name), random_ids(2, 7)
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    every = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    close(every[1][1, :4], model(ids[1:, :4], output_hidden_states=True).hidden_states[1][0])
    some = model(ids, attention_mask=mask, output_hidden_states=[0, 1]).hidden_states
    assert some[-1] is None
    close(some[0], every[0])
    close(some[1], every[1])


def test_layers_that_iterate_have_no_state_inside():
    """``0_2_2_2``: layers 1 and 2 iterate; what enters 0, 1 and 3 has a value, and what leaves the last norm."""
    model, ids = shared_model("lckv"), random_ids(2, 9)
    for told in ({}, {"use_cache": False}):
        states = model(ids, output_hidden_states=True, **told).hidden_states
        assert [state is None for state in states] == [False, False, True, False, False]
        close(model.lm_head(states[-1]), model(ids).logits)
    cache, parts = model.make_cache(), []
    for chunk in ids.split([4, 1, 4], 1):
        parts.append(model(chunk, past_key_values=cache, output_hidden_states=True).hidden_states)
    for number in (0, 1, 3, 4):
        close(torch.cat([part[number] for part in parts], 1), states[number])
    only = model(ids, output_hidden_states=[1, -1]).hidden_states
    assert [state is None for state in only] == [True, False, True, True, False]
    with pytest.raises(ValueError, match=r"hidden state 2 lies between .* ask for some of 0, 1, 3, 4"):
        model(ids, output_hidden_states=[2])


# Modes.


@pytest.mark.parametrize("name", NAMES)
def test_generating_between_two_steps_of_training(name):
    """As trainers that learn from their own samples do; every module is in its mode again behind it."""
    model, ids = model_of(name), random_ids(2, 6)
    expected = model.generate(ids, **QUIET)
    model.train()
    model.model.embed_tokens.eval()
    modes = [module.training for module in model.modules()]
    assert torch.equal(model.generate(ids, **QUIET), expected)
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(ValueError, match="training has no cache"):
        model(ids, past_key_values=model.make_cache())


def test_checkpointing_by_configuration():
    """The old way to ask for it; the flag is gone afterwards, as transformers does."""
    host = make_host()
    config = kvtrain.retrofit(host, kvtrain.DMC()).config
    config.gradient_checkpointing = True
    model = type(kvtrain.retrofit(host, kvtrain.DMC()))(config)
    assert model.is_gradient_checkpointing
    assert not hasattr(model.config, "gradient_checkpointing")


@pytest.mark.parametrize("name", ["full", "duo", "transnormer_t2"])
def test_reentrant_checkpointing_where_nothing_is_lost(name):
    model, ids = model_of(name).train(), random_ids(2, 9)
    if name == "transnormer_t2":
        model.config.hidden_dropout = 0.0
        for layer in model.model.layers:
            layer.dropout = 0.0
    gradients = []
    for settings_ in (None, {"use_reentrant": True}):
        if settings_:
            model.gradient_checkpointing_enable(settings_)
            model.enable_input_require_grads()
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for parameter, gradient in gradients[0].items():
        close(gradients[1][parameter], gradient)


@pytest.mark.parametrize("name", ["dmc", "lckv"])
def test_reentrant_checkpointing_is_refused_where_gradients_would_be_lost(name):
    with pytest.raises(ValueError, match="use_reentrant=False"):
        model_of(name).gradient_checkpointing_enable({"use_reentrant": True})


# Caches.


def test_what_is_set_on_the_configuration_reaches_the_host(model, config):
    """``model.config.use_cache = False`` is how trainers and notebooks turn caches off."""
    ids = random_ids(1, 5)
    assert model(ids).get(CACHE) is not None
    config.use_cache = False
    assert model(ids).get(CACHE) is None
    assert config.get_text_config().use_cache is False


def test_a_cache_has_two_names(model):
    ids, new, old = random_ids(2, 8), model.make_cache(), model.make_cache()
    close(model(ids, cache=new).logits, model(ids, past_key_values=old).logits)
    assert new.tokens.tolist() == old.tokens.tolist() == [8, 8]
    with pytest.raises(ValueError, match="two names"):
        model(ids, cache=new, past_key_values=old)
    texts = []
    for name in ("cache", "past_key_values"):
        cache = model.make_cache()
        texts.append(model.generate(ids, **{name: cache}, **QUIET))
        assert cache.tokens.tolist() == [12, 12]
    assert torch.equal(*texts)


def test_a_cache_that_no_layer_looks_at_is_an_error(model, monkeypatch):
    """What happened in silence when transformers gave the cache another name."""
    layers = model.model.layers
    stack = layers if type(layers).__name__ == "LayerSchedule" else None
    for module in [stack] if stack else [layer.self_attn for layer in layers]:
        name = "run" if stack else "forward"
        forward = getattr(module, name)

        def forgetful(*args, forward=forward, **kwargs):
            def without(value):
                return replace(value, cache=None, valid=None) if isinstance(value, ForwardContext) else value

            return forward(*map(without, args), **{name: without(value) for name, value in kwargs.items()})

        monkeypatch.setattr(module, name, forgetful)
    with pytest.raises(RuntimeError, match="did not hand the cache to any layer"):
        model(random_ids(1, 4), past_key_values=model.make_cache())


@pytest.mark.parametrize("version", ["5.17.0", NEWEST_TESTED, f"{NEWEST_TESTED}.3", "99.0.1"])
def test_an_untested_transformers_is_named_in_a_line(version, caplog):
    with caplog.at_level(logging.WARNING, "kvtrain"):
        say_if_untested(version)
    assert [version in record.message and NEWEST_TESTED in record.message for record in caplog.records] == [True] * (
        version == "99.0.1"
    )


# Refusals.


def test_another_attention_is_refused(model):
    words = "would do nothing: this model has an attention of its own"
    with pytest.raises(ValueError, match=words):
        model.set_attn_implementation("sdpa")
    model.set_attn_implementation(model.config._attn_implementation)
    if isinstance(model.config, kvtrain.TransNormerConfig):  # which transformers refuses by itself
        return
    config = type(model.config).from_dict(model.config.to_dict())
    config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=words):
        type(model)(config)


def test_continuous_batching_is_refused_at_once(model):
    for ask in (model.generate_batch, model.init_continuous_batching):
        with pytest.raises(ValueError, match=r"call model\.generate on padded rows"):
            ask([[1, 2, 3]])


def test_models_that_are_no_plain_hosts_are_refused(tmp_path):
    host = make_host(dtype=torch.float32)
    adapted = make_host(dtype=torch.float32)
    projection = adapted.model.layers[0].self_attn.q_proj
    adapted.model.layers[0].self_attn.q_proj = torch.nn.ModuleDict({"base_layer": projection})
    with pytest.raises(ValueError, match=r"merge_and_unload\(\)"):
        kvtrain.retrofit(adapted, kvtrain.Full())
    with pytest.raises(ValueError, match="not a Linear"):
        kvtrain.retrofit(torch.nn.Linear(2, 2), kvtrain.Full())
    host.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"open a plain model with AutoModelForCausalLM .* kvtrain\.retrofit"):
        type(kvtrain.retrofit(host, kvtrain.Full())).from_pretrained(tmp_path)


def test_training_dmc_without_a_target_is_named_once(caplog):
    _say_untargeted.cache_clear()
    model, ids = model_of("dmc").train(), random_ids(1, 6)
    with caplog.at_level(logging.WARNING, "kvtrain"):
        for _ in range(2):
            model(ids, labels=ids)
    assert ["kvtrain fit" in record.message for record in caplog.records] == [True]
