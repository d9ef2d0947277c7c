"""The surgery: what a retrofitted host keeps, shares, saves and refuses."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, LlamaForCausalLM

import kvtrain
from kvtrain.models.config import KVTrainConfig
from tests.hosts import FAMILIES, SLIDING, make_host, random_ids

METHODS = [kvtrain.Full(), kvtrain.DMC()]


@pytest.mark.parametrize("family", [*FAMILIES, *SLIDING])
def test_full_is_the_host(family):
    """The replaced norms, MLPs and rotary embeddings compute what the host's did (in float32 as it does)."""
    host, ids = make_host(family, dtype=torch.float32), random_ids(2, 40)
    model = kvtrain.retrofit(host, kvtrain.Full())
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    with torch.no_grad():
        expected = host(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
        for use_cache in (True, False):
            ours = model(ids, attention_mask=mask, use_cache=use_cache).logits
            torch.testing.assert_close(ours[0, 9:], expected[0, 9:], atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(ours[1], expected[1], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", [*FAMILIES, *SLIDING])
def test_full_generates_what_the_host_generates(family):
    host, ids = make_host(family, dtype=torch.float32), random_ids(2, 12)
    model = kvtrain.retrofit(host, kvtrain.Full())
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    for extra in ({}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}):
        assert torch.equal(host.generate(ids, **options, **extra), model.generate(ids, **options, **extra))


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
@pytest.mark.parametrize("tied", [False, True])
def test_names_weights_and_ties_are_the_hosts(method, tied):
    host = make_host("llama", tie_word_embeddings=tied)
    before = {name: tensor.clone() for name, tensor in host.state_dict().items()}
    model = kvtrain.retrofit(host, method)
    assert isinstance(model, LlamaForCausalLM)
    assert list(model.state_dict()) == list(host.state_dict())
    assert dict(model.named_parameters()).keys() == dict(host.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert parameter is host.get_parameter(name)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert type(host.model.layers[0].self_attn).__name__ == "LlamaAttention"
    assert host.config._attn_implementation != "kvtrain"
    for name, tensor in host.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
@pytest.mark.parametrize("family", [*FAMILIES, *SLIDING])
def test_save_and_load(tmp_path, family, method):
    model, ids = kvtrain.retrofit(make_host(family, dtype=torch.float32), method), random_ids(2, 20)
    model.save_pretrained(tmp_path)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".json", ".py", ".safetensors"]
    for load in (AutoModelForCausalLM.from_pretrained, kvtrain.load):
        again = load(str(tmp_path))
        assert type(again) is type(model)
        assert again.config.method == method
        with torch.no_grad():
            assert torch.equal(again(ids).logits, model(ids).logits)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, KVTrainConfig) and config.model_type == "kvtrain"
    assert (config.vocab_size, config.num_hidden_layers) == (61, 2)


def test_the_hosts_own_class_gives_the_uncompressed_host(tmp_path):
    """What the model card warns of: an explicit class searches the nested configuration and finds itself."""
    model = kvtrain.retrofit(make_host("llama", dtype=torch.float32), kvtrain.DMC())
    model.save_pretrained(tmp_path)
    plain = LlamaForCausalLM.from_pretrained(tmp_path)
    assert type(plain) is LlamaForCausalLM
    assert torch.equal(plain.model.layers[0].self_attn.q_proj.weight, model.model.layers[0].self_attn.q_proj.weight)


def test_meta_instantiation_allocates_nothing():
    config = kvtrain.retrofit(make_host("llama"), kvtrain.DMC()).config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_float64_stays_float64():
    """Norm, RoPE and MLP compute in float64: float32 anywhere would show at 1e-7."""
    host, ids = make_host("llama"), random_ids(1, 30)
    model = kvtrain.retrofit(host, kvtrain.Full())
    with torch.no_grad():
        logits = model(ids).logits
        model.model.embed_tokens.weight += 1e-12
        moved = model(ids).logits
    assert logits.dtype == torch.float64
    change = (moved - logits).abs().max().item()
    assert 1e-13 < change < 1e-9


def test_bfloat16_runs():
    model, ids = kvtrain.retrofit(make_host("llama", dtype=torch.float32), kvtrain.DMC()), random_ids(1, 30)
    with torch.no_grad():
        wide = model(ids).logits
        narrow = model.to(torch.bfloat16)(ids).logits
    assert narrow.dtype == torch.bfloat16
    assert (narrow.float() - wide).abs().mean() < 0.1 * wide.abs().mean()


def test_loss_is_the_hosts_loss():
    host, ids = make_host("llama", dtype=torch.float32), random_ids(2, 30)
    model = kvtrain.retrofit(host, kvtrain.Full())
    labels = ids.clone()
    labels[0, :11] = -100
    expected = host(ids, labels=labels)
    ours = model(ids, labels=labels)
    torch.testing.assert_close(ours.loss, expected.loss)
    torch.testing.assert_close(ours.logits, expected.logits, atol=1e-5, rtol=1e-4)
    assert model(ids, labels=labels, skip_logits=True).logits is None
    counted = int((labels[:, 1:] >= 0).sum())
    torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=1).loss, expected.loss * counted)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_generate_picks_the_cache_by_itself(method):
    model, ids = kvtrain.retrofit(make_host("llama"), method), random_ids(2, 15)
    output = model.generate(ids, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, pad_token_id=0)
    assert type(output.past_key_values).__name__ == "KVCache"
    assert output.past_key_values.get_seq_length() == output.sequences.shape[1] - 1
    chunked = model.generate(ids, max_new_tokens=6, do_sample=False, prefill_chunk_size=4, pad_token_id=0)
    uncached = model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False, pad_token_id=0)
    assert torch.equal(chunked, output.sequences) and torch.equal(uncached, output.sequences)


def test_refusals_name_the_remedy():
    model, ids = kvtrain.retrofit(make_host("llama"), kvtrain.DMC()), random_ids(1, 8)
    with pytest.raises(ValueError, match="make_cache"):
        model(ids, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="output_attentions=False"):
        model(ids, output_attentions=True)
    with pytest.raises(ValueError, match="cache_implementation unset"):
        model.generate(ids, cache_implementation="static", max_new_tokens=2)
    with pytest.raises(ValueError, match="one document a row"):
        model(ids, document_ids=torch.ones_like(ids), past_key_values=model.make_cache())
    with pytest.raises(ValueError, match=r"model.eval\(\)"):
        model.train()(ids, past_key_values=model.make_cache())
    with pytest.raises(ValueError, match="retrofitted already"):
        kvtrain.retrofit(model, kvtrain.Full())
    with pytest.raises(ValueError, match="cropped"):
        model.make_cache().crop(-1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention_dropout": 0.1}, "attention_dropout=0.0"),
        ({"hidden_act": "gelu"}, "silu"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
    ],
)
def test_unsupported_hosts_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        kvtrain.retrofit(make_host("llama", **settings), kvtrain.DMC())


def test_strange_families_are_refused():
    from transformers import AutoModelForCausalLM, GPT2Config

    other = AutoModelForCausalLM.from_config(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=61))
    with pytest.raises(ValueError, match="gpt2"):
        kvtrain.retrofit(other, kvtrain.Full())


@pytest.mark.parametrize(
    ("field", "value"), [("compression", 0.5), ("window", 0), ("temperature", 0.0), ("page_size", 0)]
)
def test_settings_are_validated(field, value):
    with pytest.raises(ValueError, match=field):
        kvtrain.DMC(**{field: value})


def test_unknown_settings_in_a_checkpoint_say_so():
    with pytest.raises(ValueError, match="update kvtrain"):
        kvtrain.DMC.from_dict({"name": "dmc", "colour": 1})
    with pytest.raises(ValueError, match="dmc, dms, duo, expectedattention, full"):
        KVTrainConfig(text_config={"model_type": "llama"}, method_config={"name": "none"}).method  # noqa: B018


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_beams_of_a_compressing_cache(rate):
    """Reordering moves slots and open segments together: beams with a cache are beams without one."""
    from tests.hosts import dmc_at_rate

    ids = random_ids(2, 20)
    model = dmc_at_rate(make_host("llama"), rate, ids)
    options = {"max_new_tokens": 10, "do_sample": False, "num_beams": 3, "num_return_sequences": 2, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))
