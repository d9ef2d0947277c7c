"""Checkpoints of LCKV's authors, in both of their forms, open as kvtrain models."""

import json

import pytest
import torch
from safetensors.torch import save_file

import kvtrain
from kvtrain.models.lckv.convert import load_published, published_settings
from tests.hosts import make_host, random_ids

OLD = {"layer_types": "0_1_1_1_2_0", "target_layer": -2, "num_encoders": 8, "num_trained_encoders": 1}
NEW = {"layer_types": "0_4s_4s_4s_4s_5", "forward_passes": 5, "backward_passes": 3, "sliding_window": 9}


def write(folder, host, **published):
    """A folder as the authors write it: a Llama's configuration and their own fields, no unused projections."""
    config = host.config.to_dict() | {"model_type": "lckv-llama", "architectures": ["LCKVLlamaForCausalLM"]}
    config |= {"rope_theta": config.pop("rope_parameters")["rope_theta"], "rope_scaling": None, "use_sequential": False}
    (folder / "config.json").write_text(json.dumps(config | published))
    unused = tuple(f"model.layers.{layer}.self_attn.{name}_proj" for layer in (1, 2, 3) for name in "kv")
    state = {name: tensor for name, tensor in host.state_dict().items() if not name.startswith(unused)}
    save_file(state, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("published", "method"),
    [
        (OLD, {"kv_map": "0_4_4_4_4_5", "mask_all_diagonals": True, "stale_target": True}),
        (NEW, {"kv_map": NEW["layer_types"], "forward_passes": 5, "backward_passes": 3, "sliding_window": 9}),
        (NEW | {"force_nodiag": True}, {"kv_map": NEW["layer_types"], "mask_all_diagonals": True}),
    ],
    ids=["2024-05", "2024-11", "all diagonals"],
)
def test_a_published_folder_opens(tmp_path, published, method):
    host, ids = make_host(layers=6), random_ids(2, 30)
    write(tmp_path, host, **published)
    opened = load_published(tmp_path, dtype=torch.float64)
    settings = {"forward_passes": 5, "backward_passes": 3, "sliding_window": 9} if "s" in method["kv_map"] else {}
    expected = kvtrain.retrofit(host, kvtrain.LCKV(**settings | method))
    assert opened.method == expected.method
    with torch.no_grad():
        for use_cache in (True, False):
            assert torch.equal(opened(ids, use_cache=use_cache).logits, expected(ids, use_cache=use_cache).logits)
    opened.save_pretrained(tmp_path / "ours")
    assert kvtrain.load(str(tmp_path / "ours")).method == opened.method


def test_passes_of_the_old_form():
    """The encoders are the passes before the last."""
    settings = published_settings(OLD | {"num_encoders": 6, "num_trained_encoders": 2})
    assert (settings.forward_passes, settings.backward_passes) == (4, 3)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, "no layer_types string"),
        ({"layer_types": ["full_attention"]}, "no layer_types string"),
        (OLD | {"layer_types": "0_2_1_2_0"}, "one target"),
        (OLD | {"layer_types": "0_3_2_0"}, "one target"),
    ],
)
def test_what_is_no_such_checkpoint_is_refused(config, words):
    with pytest.raises(ValueError, match=words):
        published_settings(config)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="download the checkpoint"):
        load_published(tmp_path / "absent")
