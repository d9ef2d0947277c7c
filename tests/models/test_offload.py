"""Models whose weights accelerate keeps elsewhere until a module runs: they compute what they compute without."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook
from torch import nn

import kvtrain
from kvtrain.models.placement import execution_device
from tests.caches import CACHES
from tests.hosts import make_host, random_ids

TOLD = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
CPU = torch.device("cpu")


def spread(model, folder):
    """As ``device_map`` does: some of the layers at hand, the others and the head on disk."""
    layers = {f"model.layers.{layer}": "cpu" if layer % 2 else "disk" for layer in range(len(model.model.layers))}
    rest = {f"model.{name}": "cpu" for name, _ in model.model.named_children() if name != "layers"}
    return dispatch_model(model, {**rest, **layers, "lm_head": "disk"}, main_device="cpu", offload_dir=folder)


WAYS = {
    "disk": lambda model, folder: disk_offload(model, folder, execution_device=CPU),
    "cpu": lambda model, folder: cpu_offload(model, execution_device=CPU),
    "spread": spread,
}


def stays_the_same(model, way, folder):
    ids = random_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0

    def told(model):
        with torch.no_grad():
            loss = model(ids, attention_mask=mask, labels=ids, use_cache=False).loss
        return model.generate(ids, attention_mask=mask, **TOLD), loss

    expected = told(model)
    model = WAYS[way](model, folder)
    assert model.model.layers[0].self_attn.o_proj.weight.is_meta
    torch.testing.assert_close(told(model), expected)
    placements = {(store.placement.dtype, store.placement.device) for store in model.make_cache().stores}
    assert placements == {(torch.bfloat16, CPU)}


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("full", "spread"),
        ("dmc", "cpu"),
        ("duo_compensated", "disk"),
        ("lckv", "spread"),
        ("lckv_fused", "disk"),
        ("transnormer_t1", "spread"),
        ("transnormer_t2", "disk"),
    ],
)
def test_offloaded_weights(name, way, tmp_path):
    entry = CACHES[name]
    stays_the_same(entry.retrofit(make_host(layers=entry.layers, dtype=torch.bfloat16)), way, tmp_path)


def test_a_layer_that_sees_nothing_has_its_bias(tmp_path):
    """In the first pass of layers that iterate, of hosts whose attention has biases."""
    host = make_host(layers=3, dtype=torch.bfloat16, attention_bias=True)
    stays_the_same(kvtrain.retrofit(host, kvtrain.LCKV(kv_map="0_2_2")), "disk", tmp_path)


def test_where_a_module_runs():
    """On one of several hooks, on a hook within a wrapper, or where its weights lie."""
    assert execution_device(nn.Linear(1, 1)) == CPU
    hooked = nn.Linear(1, 1)
    hooked._hf_hook = SequentialHook(ModelHook(), AlignDevicesHook("cuda:1"))  # as accelerate leaves it
    assert execution_device(hooked) == execution_device(nn.Sequential(hooked)) == torch.device("cuda", 1)
