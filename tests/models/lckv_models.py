"""LCKV models of a few layers, and how their tests run and compare them."""

import torch

import kvtrain
from tests.hosts import make_host
from tests.models.lckv_reference import Reference

CYCLIC = ("0_4_4_4_4_5", "0_2_2_4_4_5", "0_4_0_4_4_4", "0_3_2_3_3_3", "0s_4s_4s_4s_4s_5", "1_1_3_3_5_5")
ACYCLIC = ("0_0_2_2_4_4", "0_1_2_2_2_2", "0s_0s_2_2_2_5s")
NODIAG = {"mask_all_diagonals": True}
SEMANTICS = ({}, NODIAG, {**NODIAG, "stale_target": True})
WINDOW = 5


def make(kv_map, passes=(7, 2), family="llama", host=None, **settings):
    """A model with so many passes, in evaluation mode."""
    free, graded = passes
    host = make_host(family, layers=len(kv_map.split("_")), **(host or {}))
    method = kvtrain.LCKV(kv_map=kv_map, forward_passes=free, backward_passes=graded, sliding_window=WINDOW, **settings)
    return kvtrain.retrofit(host, method)


def refer(model, kv_map, semantics=None, values=None):
    closed = bool((semantics or {}).get("mask_all_diagonals"))
    return Reference(model, kv_map, values, window=WINDOW, closed=closed)


def run(model, ids, **told):
    return model(ids, use_cache=False, **told).logits


def grads(loss, model):
    """Gradients by name, zeros where none flows."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, materialize_grads=True)
    return dict(zip(names, found, strict=True))


def close(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


def apart(first, second):
    return max((first[name] - second[name]).abs().max().item() for name in first)
