"""From gates to heads: which are chosen, files that patterns are published in, heads that are sorted, random gates."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvtrain
from kvtrain.models.duo.attention import DuoStep
from kvtrain.models.duo.gates import (
    Pattern,
    choose_full_heads,
    hard_concrete,
    open_probability,
    pattern_of,
    read_pattern,
    write_pattern,
)
from tests.hosts import make_host, random_ids
from tests.models.test_duo_forms import FRACTIONS, LENGTH, Dense, close, gated, gates_for, host_of, rounded, states

PROPERTY = settings(max_examples=60)

# Which heads are full.


def gate_tables():
    """Gates that tie, saturate and leave 0..1, as trained ones do."""
    values = st.one_of(st.floats(-0.25, 1.25, width=32), st.sampled_from([-0.0014, 0.0, 0.5, 1.0, 1.001]))
    shapes = st.tuples(st.integers(1, 5), st.integers(1, 9))
    return shapes.flatmap(
        lambda shape: st.lists(values, min_size=math.prod(shape), max_size=math.prod(shape)).map(
            lambda flat: torch.tensor(flat).view(shape)
        )
    )


@PROPERTY
@given(gate_tables(), st.floats(0, 1), st.floats(0, 1))
def test_heads_are_chosen_by_gate_alone(gates, sparsity, other):
    """So many of them, the largest, the same every time, fewer of the same at a higher sparsity."""
    before = gates.clone()
    chosen = choose_full_heads(gates, sparsity)
    assert torch.equal(gates, before)
    assert choose_full_heads(gates.clone(), sparsity) == chosen
    assert len(chosen) == len(gates) and all(list(heads) == sorted(set(heads)) for heads in chosen)
    wanted = (1 - sparsity) * gates.numel()
    count = sum(map(len, chosen))
    assert count == round(wanted) or abs(wanted % 1 - 0.5) < 1e-9  # where a half is rounded up
    full = pattern_of(chosen, gates.shape[1]).bool()
    clipped = gates.clamp(0, 1)
    if 0 < count < gates.numel():
        least, most = clipped[full].min(), clipped[~full].max()
        assert least >= most
        tied = (clipped == least).flatten() & (clipped == most).flatten()
        order = full.flatten()[tied].tolist()
        assert order == sorted(order, reverse=True)  # of equal gates the first ones
    low, high = sorted([sparsity, other])
    few, many = (pattern_of(choose_full_heads(gates, share), gates.shape[1]).bool() for share in (high, low))
    assert not (few & ~many).any()
    assert choose_full_heads(clipped, sparsity) == choose_full_heads(gates.double(), sparsity) == chosen


def test_which_heads_by_value():
    gates = torch.tensor([[0.2, 1.3, 1.0], [1.0, -0.5, 0.0]], requires_grad=True)
    assert choose_full_heads(gates, 0.0) == ((0, 1, 2), (0, 1, 2))
    assert choose_full_heads(gates, 1.0) == ((), ())
    # 1.3 is as good as 1.0, and -0.5 as 0.0: then the order of layers and heads decides.
    assert [choose_full_heads(gates, 1 - count / 6) for count in range(1, 6)] == [
        ((1,), ()),
        ((1, 2), ()),
        ((1, 2), (0,)),
        ((0, 1, 2), (0,)),
        ((0, 1, 2), (0, 1)),
    ]
    assert choose_full_heads(torch.ones(1, 5), 0.5) == ((0, 1, 2),)  # a half is rounded up
    assert choose_full_heads(torch.ones(1, 10), 0.9) == ((0,),)
    # Neighbours in float64 are no tie, and in half precision they are.
    close_by = torch.tensor([[0.5, 0.5 + 1e-12]], dtype=torch.float64)
    assert choose_full_heads(close_by, 0.5) == ((1,),)
    assert choose_full_heads(close_by.bfloat16(), 0.5) == ((0,),)


@pytest.mark.parametrize("sparsity", [-0.01, 1.01, float("nan")])
def test_no_share_is_refused(sparsity):
    with pytest.raises(ValueError, match="share of streaming heads, from 0 to 1"):
        choose_full_heads(torch.ones(2, 2), sparsity)
    with pytest.raises(ValueError, match="share of streaming heads, from 0 to 1"):
        kvtrain.Duo(sparsity=sparsity)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_gates_of_a_diverged_training_are_refused(value):
    with pytest.raises(ValueError, match="diverged, lower its learning rate"):
        choose_full_heads(torch.tensor([[1.0, value]]), 0.5)


# Files.

# Layers, key-value heads and share of gates at exactly 1 of the six patterns that were published.
PUBLISHED = {
    "Llama-2-7B-32K-Instruct": (32, 32, 0.14),
    "Llama-3-8B-Instruct-Gradient-1048k": (32, 8, 0.36),
    "Llama-3-8B-Instruct-Gradient-4194k": (32, 8, 0.36),
    "Meta-Llama-3.1-8B-Instruct": (32, 8, 0.25),
    "Mistral-7B-Instruct-v0.2": (32, 8, 0.43),
    "Mistral-7B-Instruct-v0.3": (32, 8, 0.40),
}


def published(name):
    """Gates with the traits of a published pattern: bfloat16, saturated, uneven over layers, never clipped."""
    layers, heads, saturated = PUBLISHED[name]
    generator = torch.Generator().manual_seed(len(name))
    gates = torch.rand(layers, heads, generator=generator).bfloat16().double()
    gates[torch.rand(layers, heads, generator=generator) < saturated] = 1.0
    gates[2], gates[-1], gates[30] = 0.02, 0.0, 1.0
    gates[4, 1], gates[5, 0] = -0.0014, 1.001
    return gates


def write(folder, gates, **settings):
    """The released code's two files; its configuration is all that its command line was told."""
    folder.mkdir(exist_ok=True)
    np.savetxt(folder / "full_attention_heads.tsv", gates.numpy(), delimiter="\t")
    told = {"model_name": "m", "lr": 0.02, "sink_size": 128, "recent_size": 256, "deploy_sink_size": None, **settings}
    (folder / "config.json").write_text(json.dumps(told))
    return folder


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_patterns_are_read_and_written(tmp_path, name):
    gates = published(name)
    pattern = read_pattern(write(tmp_path / "theirs", gates))
    assert (pattern.sink, pattern.recent) == (128, 256)
    assert pattern.gates.dtype == torch.float64 and torch.equal(pattern.gates, gates.clamp(0, 1))
    for sparsity in (0.5, 0.75):
        full = choose_full_heads(pattern.gates, sparsity)
        assert full == choose_full_heads(gates, sparsity)
        assert sum(map(len, full)) == round((1 - sparsity) * gates.numel())
        assert full[-1] == full[2] == ()
        assert sparsity == 0.75 or full[30] == tuple(range(gates.shape[1]))  # before, ties may use up what there is
    write_pattern(tmp_path / "new" / "ours", pattern)
    again = read_pattern(str(tmp_path / "new" / "ours"))
    assert torch.equal(again.gates, pattern.gates) and (again.sink, again.recent) == (128, 256)
    table = np.loadtxt(tmp_path / "new" / "ours" / "full_attention_heads.tsv", delimiter="\t")
    assert table.shape == tuple(gates.shape)  # as numpy's users would read it


def test_any_gates_come_back_to_the_bit(tmp_path):
    gates = torch.rand(3, 1, dtype=torch.float64)
    for table in (gates, gates.T, gates.float(), torch.rand(2, 3).bfloat16()):
        write_pattern(tmp_path, Pattern(table, 0, 7))
        found = read_pattern(tmp_path)
        assert torch.equal(found.gates, table.double()) and (found.sink, found.recent) == (0, 7)


@pytest.mark.parametrize(
    ("table", "settings", "reason"),
    [
        (None, None, "no readable pattern"),
        ("1\t0.5\n", None, "config.json"),
        (None, '{"sink_size": 1, "recent_size": 2}', "full_attention_heads.tsv"),
        ("1\t0.5\n", '{"sink_size": 1}', "recent_size"),
        ("1\t0.5\n", '{"sink_size": null, "recent_size": 2}', "with sink_size and recent_size"),
        ("1\t0.5\n", "[128, 256]", "with sink_size and recent_size"),
        ("1\t0.5\n", '{"sink_size"', "with sink_size and recent_size"),
        ("1\t0.5\n1\n", '{"sink_size": 1, "recent_size": 2}', "a row of numbers for every layer"),
        ("full\tstream\n", '{"sink_size": 1, "recent_size": 2}', "a row of numbers for every layer"),
        ("1\tnan\n", '{"sink_size": 1, "recent_size": 2}', "missing or not finite"),
        ("1\tinf\n", '{"sink_size": 1, "recent_size": 2}', "missing or not finite"),
        ("\n", '{"sink_size": 1, "recent_size": 2}', "missing or not finite"),
    ],
)
@pytest.mark.filterwarnings("ignore:loadtxt. input contained no data:UserWarning")
def test_damaged_patterns_say_what_is_wrong(tmp_path, table, settings, reason):
    for name, text in (("full_attention_heads.tsv", table), ("config.json", settings)):
        if text is not None:
            (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=reason) as refusal:
        read_pattern(tmp_path)
    assert str(tmp_path) in str(refusal.value)


def test_a_pattern_of_heads():
    gates = pattern_of(((1, 2), (), (0,)), 3)
    assert gates.tolist() == [[0, 1, 1], [0, 0, 0], [1, 0, 0]]
    assert choose_full_heads(gates, 1 - 3 / 9) == ((1, 2), (), (0,))


# Sorted heads.

SHAPES = {
    "groups of 1": {"heads": 4, "kv_heads": 4},
    "groups of 4": {"heads": 16, "kv_heads": 4, "head_dim": 4},
    "groups of 7": {"family": "mistral", "heads": 28, "kv_heads": 4, "head_dim": 6},
    "all biases": {"heads": 8, "kv_heads": 4, "attention_bias": True},
    "tied": {"heads": 8, "kv_heads": 4, "tie_word_embeddings": True},
    "qwen2": {"family": "qwen2", "heads": 28, "kv_heads": 4, "head_dim": 4},
    "qwen3": {"family": "qwen3", "heads": 8, "kv_heads": 4, "head_dim": 10},
    "qwen3, biases": {"family": "qwen3", "heads": 8, "kv_heads": 4, "attention_bias": True},
    "olmo2": {"family": "olmo2", "heads": 8, "kv_heads": 4},
    "olmo2, biases": {"family": "olmo2", "heads": 8, "kv_heads": 4, "attention_bias": True},
    "one head": {"family": "olmo2", "heads": 4, "kv_heads": 1},
}
# None, one, all but one and all of four heads, none of them in their old place.
CHOICES = [((), (2,)), ((3,), (1, 2, 3)), ((0, 1, 3), (0, 1, 2, 3)), ((0, 1, 2, 3), ())]


@pytest.mark.parametrize("full_heads", CHOICES, ids=["0 and 1", "1 and 3", "3 and 4", "4 and 0"])
@pytest.mark.parametrize("shape", SHAPES)
def test_sorting_heads_changes_no_output(shape, full_heads):
    """With windows as long as the text the host's, with short ones those of a dense model in the old order."""
    host, ids = host_of(**SHAPES[shape]), random_ids(2, LENGTH)
    kv_heads = host.config.num_key_value_heads
    full_heads = tuple(tuple(head for head in heads if head < kv_heads) for heads in full_heads)
    before = {name: tensor.clone() for name, tensor in host.state_dict().items()}
    with torch.no_grad():
        expected = Dense(host).logits(ids, gates_for(full_heads, kv_heads))
        unchanged = kvtrain.retrofit(host, kvtrain.Full())(ids, use_cache=False).logits
        close(rounded(host, full_heads, recent=LENGTH)(ids, use_cache=False).logits, unchanged)
        at_once = rounded(host, full_heads)
        close(at_once(ids, use_cache=False).logits, expected)
        later = gated(host, gates_for(full_heads, kv_heads)).binarize(1 - len(sum(full_heads, ())) / (2 * kv_heads))
    assert later.method == at_once.method and later.method.full_heads == full_heads
    assert_same_weights(later, at_once)
    for name, tensor in host.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def assert_same_weights(one, other):
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_only_what_is_sorted_is_copied():
    """Full heads, then the others, each in their old order; the rest stays the host's own memory and names."""
    host = make_host(heads=8, kv_heads=4, attention_bias=True)
    model = rounded(host, ((2,), (1, 3)))
    theirs, ours = dict(host.named_parameters()), dict(model.named_parameters())
    assert theirs.keys() == ours.keys()
    copied = {name for name in ours if ours[name].data_ptr() != theirs[name].data_ptr()}
    sorted_kinds = ("q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias")
    wanted = {f"model.layers.{layer}.self_attn.{kind}" for layer in (0, 1) for kind in (*sorted_kinds, "o_proj.weight")}
    assert copied == wanted
    for layer, order in enumerate(([2, 0, 1, 3], [1, 3, 0, 2])):
        for kind in sorted_kinds:
            name = f"model.layers.{layer}.self_attn.{kind}"
            assert torch.equal(ours[name].unflatten(0, (4, -1)), theirs[name].unflatten(0, (4, -1))[order])


def test_rounding_in_place_by_its_own_gates_or_others():
    host, ids = host_of(), random_ids(2, LENGTH)
    model = gated(host, FRACTIONS, sparsity=0.75).requires_grad_(False)
    assert model.binarize() is model and not any(module.training for module in model.modules())
    assert model.method.full_heads == ((1,), ()) and model.config.method.full_heads == ((1,), ())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any("gates" in name for name, _ in model.named_parameters())
    with torch.no_grad():
        close(model(ids).logits, Dense(host).logits(ids, gates_for([[1], []])))
        model = gated(host, FRACTIONS).train().binarize(0.5, gates=torch.tensor([[0.9, 0.1], [0.2, 0.8]]))
        assert model.training and all(layer.self_attn.training for layer in model.model.layers)
        assert model.method.full_heads == ((0,), (1,))
        assert all(parameter.requires_grad for parameter in model.parameters())
        close(model.eval()(ids).logits, Dense(host).logits(ids, gates_for([[0], [1]])))


def test_settings_come_back_from_lists():
    """JSON and YAML have no tuples, and nobody need sort."""
    method = kvtrain.Duo(full_heads=[[2, 0], [], [1]])
    assert method.full_heads == ((0, 2), (), (1,)) and method == kvtrain.Duo(full_heads=((0, 2), (), (1,)))
    assert kvtrain.Duo.from_dict(json.loads(json.dumps(method.to_dict()))) == method


@pytest.mark.parametrize("gates", ["plain", "hard_concrete"])
def test_deploying_rounds_once_and_as_a_model_in_memory_does(gates):
    model = gated(host_of(), FRACTIONS, sparsity=0.25, gates=gates)
    method, weights = model.builder.deploy({name: tensor.clone() for name, tensor in model.state_dict().items()})
    assert method.full_heads == ((0, 1), (1,))
    rounded_model = model.binarize()
    assert method == rounded_model.method and set(weights) == set(rounded_model.state_dict())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in rounded_model.state_dict().items())
    assert rounded_model.builder.deploy(weights) == (method, weights)


def test_a_rounded_model_is_saved_as_it_is(tmp_path):
    """Its heads are sorted already; the names of full heads stay those of the base."""
    host, ids = make_host(dtype=torch.float32, attention_bias=True), random_ids(2, LENGTH)
    model = rounded(host, ((1,), (1,)))
    model.save_pretrained(tmp_path)
    again = kvtrain.load(str(tmp_path))
    assert again.method == model.method and again.method.full_heads == ((1,), (1,))
    assert_same_weights(again, model)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_hard_concrete_gates_are_rounded_by_the_gates_that_logits_stand_for():
    """Logits beyond 1 are no ties yet."""
    model = gated(host_of(), torch.tensor([[1.5, 0.5], [-1.0, 2.0]]), gates="hard_concrete")
    assert model.binarize(0.75).method.full_heads == ((), (1,))


# Random gates.


def test_random_gates_are_drawn_by_seed_step_and_layer():
    """The most likely ones without a step; the same ones for every row, and again when a layer is recomputed."""
    host, ids = host_of(), random_ids(2, LENGTH)
    model = gated(host, torch.zeros(2, 2), gates="hard_concrete")

    def drawn(**step):
        outputs = {}
        logits = states(model, ids, outputs=outputs, step=DuoStep(**step) if step else None)
        gates = torch.stack([outputs[layer][0] for layer in range(2)]).detach()
        close(logits, Dense(host).states(ids, gates.double())[0])
        return gates

    with torch.no_grad():
        assert torch.equal(drawn(), torch.full((2, 2), 0.5))
        assert torch.equal(drawn(seed=3), drawn())
        first = drawn(seed=3, step=5)
        assert torch.equal(drawn(seed=3, step=5), first) and len(set(first[(first > 0) & (first < 1)].tolist())) > 1
        others = [drawn(seed=3, step=6), drawn(seed=4, step=5), first.flip(0)]
        assert not any(torch.equal(other, first) for other in others)


def test_hard_concrete_gates_open_as_often_as_they_say():
    uniform = (torch.arange(20000).double() + 0.5) / 20000
    for logit in (-3.0, 0.0, 1.5):
        logits = torch.full((20000,), logit, dtype=torch.float64)
        found = hard_concrete(logits, torch.logit(uniform))
        assert found.min() == 0.0 and found.max() == 1.0
        assert abs((found > 0).double().mean() - open_probability(logits[:1])) < 1e-4
    likely = hard_concrete(torch.tensor([0.0, 9.0, -9.0, 1.5]), None)  # clip(1.2 sigmoid(logit) - 0.1)
    close(likely, torch.tensor([0.5, 1.0, 0.0, 0.8810894]), 1e-6)
    fresh = gated(host_of(), gates="hard_concrete").model.layers[0].self_attn.gates
    assert (open_probability(fresh) > 0.99).all() and (hard_concrete(fresh, None) > 0.98).all()


# Refusals.


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"sink": -1}, "sink >= 0 first and recent >= 1"),
        ({"recent": 0}, "sink >= 0 first and recent >= 1"),
        ({"mixing": "both"}, "mixing must be self or teacher"),
        ({"gates": "soft"}, "gates must be plain or hard_concrete"),
        ({"sparsity": 1.5}, "from 0 to 1, not 1.5"),
        ({"page_size": 0}, "at least 1 slot"),
    ],
)
def test_settings_out_of_range_are_refused(options, remedy):
    with pytest.raises(ValueError, match=remedy):
        kvtrain.Duo(**options)


@pytest.mark.parametrize(
    ("full_heads", "remedy"),
    [
        (((0,),), "names 1 layers and the host has 2"),
        (((0,), (2,)), r"layer 1 are \[2\]; give different numbers from 0 to 1"),
        (((-1,), ()), r"layer 0 are \[-1\]"),
        (((0, 0), ()), r"layer 0 are \[0, 0\]"),
    ],
)
def test_heads_that_the_host_has_not_are_refused(full_heads, remedy):
    with pytest.raises(ValueError, match=remedy):
        rounded(host_of(), full_heads)


def test_what_cannot_be_rounded_is_refused():
    model = gated(host_of())
    with pytest.raises(ValueError, match=r"\(layers, key-value heads\) = \(2, 2\), not \(2, 3\)"):
        model.binarize(gates=torch.ones(2, 3))
    with pytest.raises(ValueError, match="from 0 to 1, not 2"):
        model.binarize(2)
    assert model.method.full_heads is None and "model.layers.0.self_attn.gates" in model.state_dict()
    with pytest.raises(ValueError, match="no gates"):
        model.binarize().binarize()
    with pytest.raises(AttributeError, match="has no attribute 'binarize'"):
        kvtrain.retrofit(host_of(), kvtrain.Full()).binarize()
