"""LCKV's kin, which read from below alone: CLA, YOCO, FusedKV and YOCO++; and which parameters a map leaves."""

import functools

import pytest
import torch

import kvtrain
from tests.hosts import WITHOUT_SINKS, make_host, random_ids
from tests.models.lckv_models import ACYCLIC, apart, close, grads, make, refer, run
from tests.models.lckv_reference import loss_of

# Maps that read from below alone.


def shared_host(family, sources):
    """The host's own code, its sharers given the producers' keys and values."""
    host, made = make_host(family, layers=len(sources)), {}

    def give(layer, name, _module, _inputs, output):
        made[layer, name] = output
        return made[sources[layer], name]

    for layer, decoder in enumerate(host.model.layers):
        for name in ("k_norm" if family == "qwen3" else "k_proj", "v_proj"):
            getattr(decoder.self_attn, name).register_forward_hook(functools.partial(give, layer, name))
    return host


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("kv_map", ["0_0_2_2_4_4", "0_1_2_2_2_2"])
def test_sharing_from_below_is_the_host_with_others_keys(family, kv_map):
    """Transformers computes norms and angles in float32, hence the tolerance."""
    ids, sources = random_ids(2, 20), [int(entry) for entry in kv_map.split("_")]
    with torch.no_grad():
        close(run(make(kv_map, family=family), ids), shared_host(family, sources)(ids).logits, 1e-5)


@pytest.mark.parametrize("kv_map", ACYCLIC)
def test_passes_mean_nothing_where_nothing_iterates(kv_map):
    ids = random_ids(2, 20)
    runs = []
    for passes in ((7, 2), (0, 1), (3, 4)):
        model = make(kv_map, passes).train()
        loss = loss_of(run(model, ids), ids)
        runs.append((loss, grads(loss, model)))
        close(loss, loss_of(refer(model, kv_map).parallel(ids, 0, 1), ids))
    for loss, gradient in runs[1:]:
        assert torch.equal(loss, runs[0][0]) and apart(gradient, runs[0][1]) == 0.0


@pytest.mark.parametrize("family", WITHOUT_SINKS)
def test_the_plain_map_is_the_plain_model(family):
    """Bit for bit, loss and hidden states; gradients but for the order in which three terms are added."""
    ids, host = random_ids(2, 20), make_host(family, layers=3)
    results = []
    for method in (kvtrain.Full(), kvtrain.LCKV(kv_map="plain")):
        model = kvtrain.retrofit(host, method)
        output = model(ids, labels=ids, use_cache=False, output_hidden_states=True)
        results.append((output, grads(output.loss, model)))
    (full, full_grads), (plain, plain_grads) = results
    assert torch.equal(full.loss, plain.loss) and torch.equal(full.logits, plain.logits)
    assert full_grads.keys() == plain_grads.keys() and apart(full_grads, plain_grads) < 1e-15
    assert len(plain.hidden_states) == 4
    assert all(map(torch.equal, full.hidden_states, plain.hidden_states))


@pytest.mark.parametrize("family", WITHOUT_SINKS)
@pytest.mark.parametrize("settings", [{}, {"residual": True}, {"value_map": "0_1_0_0_0_0"}], ids=str)
def test_parts_that_nobody_reads_are_not_there(family, settings):
    """By name; what is there is trained."""
    kv_map = "0_1_2_2_2_2" if settings else "0_4_4_4_4_5"
    model, ids = make(kv_map, family=family, **settings), random_ids(2, 16)
    host, owners = make_host(family, layers=6), {int(entry) for entry in kv_map.split("_")}
    value_owners = {0, 1} if "value_map" in settings else owners
    parts = {"k_proj": owners, "k_norm": owners, "v_proj": value_owners}
    if settings.get("residual"):
        parts |= {"key_mix": owners - {0}, "value_mix": owners - {0}}
    names = {name for name, _ in model.named_parameters()}
    for layer in range(6):
        prefix, there = f"model.layers.{layer}.self_attn.", {name for name, _ in host.named_modules()}
        for part, holders in parts.items():
            expected = layer in holders and (part.endswith("_mix") or f"{prefix}{part}" in there)
            assert any(name.startswith(prefix + part) for name in names) is expected, (layer, part)
    found = grads(loss_of(run(model.train(), ids), ids), model)
    assert all(gradient.any() for gradient in found.values())


# Residuals, values of other layers, and where weights start from.


def mixed(model):
    """Move a residual's numbers off their start."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_mix"):
                parameter.add_(0.02 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_residual_starts_without_effect(dtype):
    ids = random_ids(2, 16)
    with torch.no_grad():
        plain, residual = (make("0_1_2_2", host={"dtype": dtype}, residual=on) for on in (False, True))
        assert torch.equal(run(plain, ids), run(residual, ids))
        assert (run(mixed(residual), ids) - run(plain, ids)).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["llama", "olmo2", "qwen3"])
@pytest.mark.parametrize(
    ("kv_map", "settings", "values"),
    [
        ("0_1_2_2_2", {"residual": True}, None),
        ("0_1_2_2_2", {"value_map": "first"}, "0_1_2_0_0"),
        ("0_1_2_2_2", {"value_map": "0_0_0_3_0"}, "0_0_0_3_0"),
        ("0_0_2_2_2", {"value_map": "0_1_1_1_4", "residual": True}, "0_1_1_1_4"),
    ],
    ids=["residual", "values of the first", "values of others", "both"],
)
def test_residuals_and_values_by_hand(family, kv_map, settings, values):
    """YOCO++ and FusedKV: outputs and every gradient, those of the mixing numbers among them."""
    ids, model = random_ids(2, 16), mixed(make(kv_map, family=family, **settings))
    expected = refer(model, kv_map, values=values).parallel(ids, 0, 1)
    found = run(model, ids)
    close(found, expected)
    ours, theirs = (grads(loss_of(logits, ids), model) for logits in (found, expected))
    assert apart(ours, theirs) < 1e-11
    assert all(ours[name].all() for name in ours if name.endswith("_mix"))


@pytest.mark.parametrize("init", ["copy", "mean"])
def test_owners_start_from_their_own_weights_or_the_mean_of_their_readers(init):
    host = make_host("qwen2", layers=4)
    model = kvtrain.retrofit(host, kvtrain.LCKV(kv_map="0_2_2_2", value_map=None, init=init))
    theirs, ours = dict(host.named_parameters()), dict(model.named_parameters())
    for name in ("k_proj.weight", "v_proj.bias"):
        of = [theirs[f"model.layers.{layer}.self_attn.{name}"] for layer in range(4)]
        close(ours[f"model.layers.0.self_attn.{name}"], of[0])
        close(ours[f"model.layers.2.self_attn.{name}"], of[2] if init == "copy" else (of[1] + of[2] + of[3]) / 3)
