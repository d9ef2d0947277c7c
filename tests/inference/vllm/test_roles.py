"""Names of classes say what a cache is made of."""

import pytest

import kvtrain
from kvtrain.inference.vllm.roles import Role, class_name, class_names, host_and_role, role_of
from kvtrain.models.config import KVTrainConfig
from kvtrain.models.hosts import retrofitted_names
from tests.hosts import FAMILIES, make_host

BLOCKS = {"prompt": "blocks"}
ROLES = {
    "full": (kvtrain.Full(), Role.PAGED),
    "shared": (kvtrain.LCKV(kv_map="cla2"), Role.PAGED),
    "windows": (kvtrain.LCKV(kv_map="yoco"), Role.PAGED),
    "both kinds of heads": (kvtrain.Duo(full_heads=((0,), (1,))), Role.HYBRID),
    "full heads alone": (kvtrain.Duo(full_heads=((0, 1), (0, 1))), Role.PAGED),
    "streaming heads alone": (kvtrain.Duo(full_heads=((), ())), Role.STATE),
    "a window": (kvtrain.StreamingLLM(**BLOCKS), Role.STATE),
    "not served": (kvtrain.DMC(), Role.PAGED),
}


@pytest.mark.parametrize("name", ROLES)
def test_what_a_cache_is_made_of(name):
    method, role = ROLES[name]
    assert role_of(KVTrainConfig(text_config=make_host().config, method_config=method.to_dict())) is role


def test_a_model_of_our_own_is_a_state_alone():
    assert role_of(kvtrain.TransNormerConfig()) is Role.STATE


@pytest.mark.parametrize(
    ("role", "name"),
    [
        (Role.PAGED, "KVLlamaForCausalLM"),
        (Role.HYBRID, "KVLlamaHybridForCausalLM"),
        (Role.STATE, "KVLlamaStateForCausalLM"),
    ],
)
def test_a_name_says_which_and_is_read_back(role, name):
    assert class_name("KVLlamaForCausalLM", role) == name
    assert host_and_role(name) == ("LlamaForCausalLM", role)


def test_names_of_all_families_are_different_and_read_back():
    names = list(class_names())
    assert len(set(names)) == len(names) == 3 * len(FAMILIES)
    read = [host_and_role(name) for name in names]
    assert [class_name(f"KV{host}", role) for host, role in read] == names
    assert set(retrofitted_names().values()) <= set(names)  # what folders name


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "KVGemmaForCausalLM", "KVLlamaPagedForCausalLM", "__path__"])
def test_any_other_name_is_nobody_s(name):
    assert host_and_role(name) is None
