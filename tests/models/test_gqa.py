"""Conversion to fewer key-value heads."""

import pytest
import torch

import kvtrain
from tests.hosts import FAMILIES, make_host, random_ids


def repeat_heads(model, groups):
    """Make every ``groups`` neighbouring key-value heads equal."""
    for layer in model.model.layers:
        for name, parameter in layer.self_attn.named_parameters():
            if name.startswith(("k_proj", "v_proj")) or (name.startswith("k_norm") and parameter.numel() > 8):
                heads = parameter.data.unflatten(0, (-1, groups, 8))
                parameter.data = heads[:, :1].expand_as(heads).flatten(0, 2).contiguous()


@pytest.mark.parametrize("how", ["mean", "first"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_heads_convert_exactly(family, how):
    host, ids = make_host(family, heads=4, kv_heads=4, attention_bias=family == "llama"), random_ids(2, 20)
    repeat_heads(host, 2)
    with torch.no_grad():
        expected = kvtrain.retrofit(host, kvtrain.Full())(ids).logits
        converted = kvtrain.convert_gqa(host, 2, how=how)
        actual = kvtrain.retrofit(converted, kvtrain.Full())(ids).logits
    # OLMo2 normalizes keys over all heads: half as many equal ones have the same mean square.
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)
    assert type(converted) is type(host) and converted.config.num_key_value_heads == 2
    assert host.config.num_key_value_heads == 4


def test_heads_are_averaged_or_the_first_is_taken():
    host = make_host("qwen2", heads=4, kv_heads=4)
    old = host.model.layers[1].self_attn
    for how, pool in (("mean", lambda heads: heads.mean(1)), ("first", lambda heads: heads[:, 0])):
        new = kvtrain.convert_gqa(host, 2, how=how).model.layers[1].self_attn
        for name in ("k_proj.weight", "k_proj.bias", "v_proj.weight"):
            wanted = pool(old.get_parameter(name).unflatten(0, (2, 2, 8))).flatten(0, 1)
            torch.testing.assert_close(new.get_parameter(name), wanted)
        assert torch.equal(new.q_proj.weight, old.q_proj.weight)


def test_dmc_goes_on_top(tmp_path):
    host, ids = make_host("llama", heads=4, kv_heads=4, dtype=torch.float32), random_ids(2, 20)
    model = kvtrain.retrofit(kvtrain.convert_gqa(host, 1), kvtrain.DMC(compression=2, decisions="random"))
    cache = model.make_cache()
    with torch.no_grad():
        model(ids, past_key_values=cache)
    assert cache.kv_tokens().shape == (2, 2, 1)
    model.save_pretrained(tmp_path)
    assert kvtrain.load(str(tmp_path)).config.num_key_value_heads == 1


def test_mistakes_name_the_remedy():
    host = make_host("llama", heads=4, kv_heads=4)
    with pytest.raises(ValueError, match="use 1, 2"):
        kvtrain.convert_gqa(host, 3)
    with pytest.raises(ValueError, match="'mean' or 'first'"):
        kvtrain.convert_gqa(host, 2, how="last")
    with pytest.raises(ValueError, match="convert its host"):
        kvtrain.convert_gqa(kvtrain.retrofit(host, kvtrain.Full()), 2)
