"""DuoAttention's forms against each other and against a dense model of torch operations alone: values and gradients."""

import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import kvtrain
from kvtrain.models.duo.attention import DuoStep
from tests.hosts import FAMILIES, make_host, random_ids

from . import naive_families
from .naive_experts import naive_experts

PROPERTY = settings(max_examples=25)
SINK, RECENT, LENGTH = 2, 5, 21
# Fractions on both sides of one half, and both ends: two layers of two key-value heads.
FRACTIONS = torch.tensor([[0.1, 0.85], [0.0, 0.55]])
# Every half of a gate's rounding in every place; the second layer streams entirely.
ROUNDED = ((1,), ())


class Dense:
    """A host with gates, from torch operations alone: one head at a time, with its mask written out.

    Args:
        host: Whose weights are read, by name.
        sink: First tokens of a document that streaming heads see.
        recent: Latest ones, the token's own included.
    """

    def __init__(self, host, sink=SINK, recent=RECENT):
        self.weights, self.config = host.state_dict(keep_vars=True), host.config
        self.sink, self.recent = sink, recent
        self.head_dim = (
            self.weights["model.layers.0.self_attn.k_proj.weight"].shape[0] // self.config.num_key_value_heads
        )

    def states(self, ids, gates, mixing="self", documents=None):
        """Final hidden states of the gated model and of the host, ``(B, T, hidden)`` both."""
        documents = torch.zeros_like(ids) if documents is None else documents
        same = documents[:, :, None] == documents[:, None]
        places = same.tril(-1).sum(-1)  # within each document
        gated = plain = naive_families.embed(self.config, self.weights["model.embed_tokens.weight"], ids)
        for layer in range(self.config.num_hidden_layers):
            local, full = self.attend(layer, gated, same, places)
            host_full = self.attend(layer, plain, same, places)[1]
            share = gates[layer].repeat_interleave(full.shape[1] // gates.shape[1])[:, None, None]
            mixed = (1 - share) * local + share * (host_full if mixing == "teacher" else full)
            gated, plain = self.finish(layer, gated, mixed), self.finish(layer, plain, host_full)
        return self.norm("model.norm", gated), self.norm("model.norm", plain)

    def logits(self, ids, gates, mixing="self", documents=None):
        """Of the gated model."""
        return self.states(ids, gates, mixing, documents)[0] @ self.weights["lm_head.weight"].mT

    def attend(self, layer, states, same, places):
        """Through the window and over everything, ``(B, H, T, D)`` both."""
        prefix = f"model.layers.{layer}."
        states = self.norm(f"{prefix}input_layernorm", states)
        query, key, value = (self.linear(f"{prefix}self_attn.{name}_proj", states) for name in "qkv")
        query, key = (self.heads(layer, name, tensor, places) for name, tensor in (("q", query), ("k", key)))
        value = value.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        distance = places[:, :, None] - places[:, None]
        visible = same & (distance >= 0)
        local = visible & ((places < self.sink)[:, None] | (distance < self.recent))
        outputs = [[], []]
        for head in range(query.shape[1]):
            owner = head * key.shape[1] // query.shape[1]
            scores = query[:, head] @ key[:, owner].mT * naive_families.score_scale(self.config)
            for output, mask in zip(outputs, (local, visible), strict=True):
                weights = self.with_sink(layer, head, scores.masked_fill(~mask, float("-inf"))).softmax(-1)
                output.append(weights[..., : scores.shape[-1]] @ value[:, owner])
        return [torch.stack(output, 1) for output in outputs]

    def with_sink(self, layer, head, scores):
        """Scores ``(B, T, T)`` and beside them that of the key without a value, where the host learns one."""
        sinks = self.weights.get(f"model.layers.{layer}.self_attn.sinks")
        if sinks is None:
            return scores
        return torch.cat([scores, sinks[head].expand(*scores.shape[:2], 1)], -1)

    def finish(self, layer, states, heads):
        """What follows attention in a layer."""
        prefix = f"model.layers.{layer}."
        attended = self.linear(f"{prefix}self_attn.o_proj", heads.transpose(1, 2).flatten(2))
        if f"{prefix}post_feedforward_layernorm.weight" in self.weights:
            states = states + self.norm(f"{prefix}post_attention_layernorm", attended)
            fed = self.feed(prefix, self.norm(f"{prefix}pre_feedforward_layernorm", states))
            return states + self.norm(f"{prefix}post_feedforward_layernorm", fed)
        states = states + attended
        return states + self.feed(prefix, self.norm(f"{prefix}post_attention_layernorm", states))

    def feed(self, prefix, states):
        if any(name.startswith(f"{prefix}mlp.experts.") for name in self.weights):
            return naive_experts(self.weights, f"{prefix}mlp.", self.config, states)
        gate, up = (self.linear(f"{prefix}mlp.{name}_proj", states) for name in ("gate", "up"))
        return self.linear(f"{prefix}mlp.down_proj", naive_families.activate(self.config, gate) * up)

    def heads(self, layer, name, projected, places):
        """Normalized where the host does it, and rotated, ``(B, heads, T, D)``."""
        norm = f"model.layers.{layer}.self_attn.{name}_norm"
        wide = norm + ".weight" in self.weights and self.weights[norm + ".weight"].numel() != self.head_dim
        projected = self.norm(norm, projected) if wide else projected
        heads = projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        if norm + ".weight" in self.weights and not wide:
            heads = self.norm(norm, heads)
        exponents = torch.arange(0, self.head_dim, 2, dtype=heads.dtype) / self.head_dim
        angles = places[:, None, :, None] * naive_families.rotary_base(self.config, layer) ** -exponents
        first, second = heads.chunk(2, -1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    def linear(self, name, states):
        return F.linear(states, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def norm(self, name, states):
        """By weights of this name, where the host has them."""
        weight = self.weights.get(f"{name}.weight")
        return states if weight is None else naive_families.norm(self.config, weight, states)


def close(actual, expected, tolerance=1e-11):
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


def gated(host, values=None, **settings):
    """A model with these gates, ``(layers, H_kv)``."""
    model = kvtrain.retrofit(host, kvtrain.Duo(**{"sink": SINK, "recent": RECENT, "page_size": 4, **settings}))
    if values is not None:
        with torch.no_grad():
            for layer, row in zip(model.model.layers, values, strict=True):
                layer.self_attn.gates.copy_(row)
    return model


def rounded(host, full_heads, **settings):
    """A model with these full heads, the same number of layers."""
    return gated(host, full_heads=full_heads, **settings)


def gates_for(full_heads, kv_heads=2):
    """Float64 gates ``(layers, H_kv)`` of 0 and 1."""
    return torch.tensor([[float(head in heads) for head in range(kv_heads)] for heads in full_heads]).double()


def states(model, ids, **told):
    """Hidden states after the last norm, without a cache."""
    return model.model(ids, use_cache=False, **told).last_hidden_state


def taught(model, ids, graph=False, **told):
    """The teacher's pass and then the student's: hidden states of both, student first."""
    record = {}
    with torch.set_grad_enabled(graph and torch.is_grad_enabled()):
        teacher = states(model, ids, step=DuoStep(full_attention=True), outputs=record, **told)
    return states(model, ids, step=DuoStep(teacher=record), **told), teacher


def parameters(model):
    return [layer.self_attn.gates for layer in model.model.layers]


def gradient(loss, model):
    """Of the gates, ``(layers, H_kv)``."""
    return torch.stack(torch.autograd.grad(loss, parameters(model), retain_graph=True))


def distance(student, teacher):
    """What the published loss compares."""
    return (student - teacher).square().sum()


@functools.cache
def host_of(family="llama", **shape):
    return make_host(family, **shape)


def documents_of(packed, rows=2, length=LENGTH, seed=0):
    """Ids of documents of any length, ``(B, T)``, and the positions within them; nothing where rows are not packed."""
    if not packed:
        return {}
    cuts = torch.rand(rows, length, generator=torch.Generator().manual_seed(seed)) < 0.15
    return {"document_ids": cuts.cumsum(1) + 1}


# Gates at their ends.


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_open_gates_are_the_host(family, packed):
    host, ids, told = host_of(family), random_ids(2, LENGTH), documents_of(packed)
    model = gated(host)
    with torch.no_grad():
        expected = states(kvtrain.retrofit(host, kvtrain.Full()), ids, **told)
        close(expected, Dense(host).states(ids, torch.ones(2, 2), documents=told.get("document_ids"))[1])
        close(states(model, ids, **told), expected)
        for found in taught(model, ids, **told):
            close(found, expected)
        close(model(ids, use_cache=False, **told).logits, expected @ host.lm_head.weight.mT)


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_closed_gates_are_the_window(family, packed):
    host, ids, told = host_of(family), random_ids(2, LENGTH), documents_of(packed)
    gates = torch.zeros(2, 2)
    with torch.no_grad():
        expected = Dense(host).states(ids, gates, documents=told.get("document_ids"))[0]
        close(states(gated(host, gates), ids, **told), expected)
        close(taught(gated(host, gates), ids, **told)[0], expected)
        assert (expected - states(gated(host), ids, **told)).abs().max() > 1e-2


@PROPERTY
@given(st.integers(1, 30), st.integers(0, 4), st.integers(1, 9), st.booleans(), st.sampled_from(["self", "teacher"]))
def test_fractions_are_the_dense_mixture(length, sink, recent, packed, mixing):
    """Whatever the window, documents shorter and longer than it."""
    host, ids, told = host_of(layers=2), random_ids(2, length), documents_of(packed, length=length, seed=length)
    model = gated(host, FRACTIONS, sink=sink, recent=recent, mixing=mixing)
    with torch.no_grad():
        expected, _ = Dense(host, sink, recent).states(ids, FRACTIONS.double(), mixing, told.get("document_ids"))
        close(taught(model, ids, **told)[0] if mixing == "teacher" else states(model, ids, **told), expected)


def test_gates_beyond_their_ends_count_as_clipped():
    host, ids = host_of(), random_ids(2, LENGTH)
    model = gated(host, torch.tensor([[-0.4, 1.3], [1.001, -0.0014]]))
    values = states(model, ids)
    close(values, states(gated(host, gates_for([[1], [0]])), ids), 0)
    assert not gradient(values.square().sum(), model).any()
    for end in (0.0, 1.0):  # at the end itself a gate can move
        model = gated(host, torch.full((2, 2), end))
        assert gradient(states(model, ids).square().sum(), model).all()


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
def test_short_documents_are_the_hosts(packed):
    """Up to ``sink + recent`` tokens nothing is out of sight; the next one sees less."""
    host, length = host_of(), SINK + RECENT
    full = kvtrain.retrofit(host, kvtrain.Full())
    with torch.no_grad():
        for extra in (0, 1):
            ids, told = random_ids(2, (length + extra) * (3 if packed else 1)), {}
            if packed:
                told["document_ids"] = (torch.arange(ids.shape[1]) // (length + extra)).expand(2, -1)
            expected = states(full, ids, **told)
            models = [gated(host, FRACTIONS), gated(host, torch.zeros(2, 2)), rounded(host, ROUNDED)]
            found = [states(model, ids, **told) for model in models] + [taught(models[0], ids, **told)[0]]
            for one in found:
                same = (one - expected).abs().amax((0, 2)) < 1e-11
                last = (torch.arange(ids.shape[1]) + 1) % (length + 1) == 0
                assert torch.equal(same, ~last if extra else same.new_ones(ids.shape[1]))


def test_the_teacher_knows_no_gates():
    host, ids = host_of(), random_ids(2, LENGTH)
    with torch.no_grad():
        expected = states(kvtrain.retrofit(host, kvtrain.Full()), ids)
        for gates in (FRACTIONS, torch.zeros(2, 2)):
            model = gated(host, gates)
            assert torch.equal(taught(model, ids)[1], taught(gated(host), ids)[1])
            close(taught(model, ids)[1], expected)


# Gradients.


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize("mixing", ["self", "teacher"])
def test_the_gradient_of_gates_is_the_dense_ones_and_that_of_finite_differences(mixing, packed):
    """Gates are float32, and so are their gradients."""
    host, ids, told = host_of(), random_ids(2, LENGTH), documents_of(packed)
    start = FRACTIONS.clamp(0.25, 0.75)  # where a step is no rounding
    model = gated(host, start, mixing=mixing)

    def loss(gates):
        with torch.no_grad():
            for parameter, row in zip(parameters(model), gates, strict=True):
                parameter.copy_(row)
        student, teacher = taught(model, ids, **told)
        return distance(states(model, ids, **told) if mixing == "self" else student, teacher)

    found = gradient(loss(start), model).double()
    step, differences = 2.0**-14, torch.zeros(2, 2, dtype=torch.float64)
    with torch.no_grad():
        for place in torch.cartesian_prod(torch.arange(2), torch.arange(2)).tolist():
            nudge = torch.zeros(2, 2)
            nudge[tuple(place)] = step
            differences[tuple(place)] = (loss(start + nudge) - loss(start - nudge)) / (2 * step)
    leaf = start.double().requires_grad_()
    dense = distance(*Dense(host).states(ids, leaf, mixing, told.get("document_ids")))
    (expected,) = torch.autograd.grad(dense, leaf)
    assert expected.abs().min() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(differences, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
def test_every_weight_has_the_gradient_of_the_dense_model(packed):
    """Gates that float64 holds and float32 does, too: 1e-9 is for all the weights."""
    host, ids, told = host_of(), random_ids(2, LENGTH), documents_of(packed)
    names, weights = zip(*host.named_parameters(), strict=True)
    found = states(gated(host, FRACTIONS), ids, **told).square().sum()
    expected = Dense(host).states(ids, FRACTIONS.double(), documents=told.get("document_ids"))[0].square().sum()
    pairs = zip(*(torch.autograd.grad(loss, weights, allow_unused=True) for loss in (found, expected)), strict=True)
    for name, (one, other) in zip(names, pairs, strict=True):
        assert (one is None) == (other is None) == (name == "lm_head.weight")
        if one is not None:
            close(one, other, 1e-9 * other.abs().max().item())


@pytest.mark.parametrize("mixing", ["self", "teacher"])
def test_a_teacher_that_is_not_detached_changes_no_gate(mixing):
    ids, model, found = random_ids(2, LENGTH), gated(host_of(), FRACTIONS), []
    for graph in (False, True):
        student, teacher = taught(model, ids, graph=graph)
        student = states(model, ids) if mixing == "self" else student
        assert teacher.requires_grad is graph
        found.append(gradient(distance(student, teacher), model))
    assert found[0].all()
    assert torch.equal(*found)


@pytest.mark.parametrize("mixing", ["self", "teacher"])
def test_open_gates_feel_nothing_of_the_distance(mixing):
    """The first step moves all of them alike, by the penalty."""
    ids, model = random_ids(2, LENGTH), gated(host_of())
    student, teacher = taught(model, ids)
    student = states(model, ids) if mixing == "self" else student
    apart = distance(student, teacher)
    assert apart < 1e-20
    assert gradient(apart, model).abs().max() < 1e-9
    assert gradient(student.square().sum(), model).abs().min() > 1e-3


def test_outputs_get_gates_as_used_and_as_stored():
    model, outputs = gated(host_of(), torch.tensor([[1.5, 0.25], [0.5, -1.0]])), {}
    states(model, random_ids(1, 9), outputs=outputs)
    used, stored = (torch.stack([outputs[layer][which] for layer in range(2)]) for which in (0, 1))
    assert used.tolist() == [[1.0, 0.25], [0.5, 0.0]]
    assert stored.tolist() == [[1.5, 0.25], [0.5, -1.0]]
    assert gradient(used.sum(), model).tolist() == [[0, 1], [1, 0]]
    assert gradient(stored.sum(), model).tolist() == [[1, 1], [1, 1]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gates_are_float32_whatever_the_weights_are(dtype):
    model = gated(make_host(dtype=dtype), FRACTIONS)
    for found in (states(model, random_ids(2, LENGTH)), *taught(model, random_ids(2, LENGTH))):
        assert found.dtype == dtype
    assert gradient(states(model, random_ids(2, LENGTH)).float().sum(), model).dtype == torch.float32


# Rounded gates: what trains is what is served.


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize("full_heads", [((1,), (), (0,)), ((), (0,), (0, 1))], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_trained_is_rounded_is_served(family, full_heads, packed):
    """The gated model, a dense one, the rounded model without a cache and with one."""
    host, ids, told = host_of(family, layers=3), random_ids(2, LENGTH), documents_of(packed)
    gates = gates_for(full_heads)
    with torch.no_grad():
        expected = Dense(host).logits(ids, gates, documents=told.get("document_ids"))
        trained, served = gated(host, gates), rounded(host, full_heads)
        close(trained(ids, use_cache=False, **told).logits, expected)
        close(served(ids, use_cache=False, **told).logits, expected)
        assert (
            expected - kvtrain.retrofit(host, kvtrain.Full())(ids, use_cache=False, **told).logits
        ).abs().max() > 1e-2
        taught_logits = taught(trained, ids, **told)[0] @ host.lm_head.weight.mT
        close(taught_logits, Dense(host).logits(ids, gates, "teacher", told.get("document_ids")))
        assert (taught_logits - expected).abs().max() > 1e-6  # what the released code trains is not what it serves
        if not packed:
            cache = served.make_cache()
            parts = [served(part, past_key_values=cache).logits for part in ids.split([9, 1, 1, 3, 1, 6], 1)]
            close(torch.cat(parts, 1), expected)
            close(trained.binarize(gates=gates, sparsity=1 - gates.mean().item())(ids).logits, expected)


def test_gates_without_a_step_mix_the_models_own_attention():
    """Also where it learns from the teacher's: validation sees what could be served."""
    host, ids = host_of(), random_ids(2, LENGTH)
    with torch.no_grad():
        expected = Dense(host).logits(ids, FRACTIONS.double())
        for mixing in ("self", "teacher"):
            close(gated(host, FRACTIONS, mixing=mixing)(ids).logits, expected)
