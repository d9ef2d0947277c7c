"""LCKV while it trains: the golden table, the equations pass by pass, and what must not matter."""

import dataclasses
import functools
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvtrain
from kvtrain.models.lckv import attention as sharing
from kvtrain.models.lckv.layer_schedule import LayerSchedule
from kvtrain.training import LCKVModule, Phase
from tests.hosts import WITHOUT_SINKS, make_host, random_ids
from tests.models.lckv_models import ACYCLIC, CYCLIC, SEMANTICS, WINDOW, apart, close, grads, make, refer, run
from tests.models.lckv_reference import loss_of
from tests.training import tiny_runs

pytestmark = pytest.mark.filterwarnings("ignore:kv_map '1_1:UserWarning")


# The golden table.


def golden_model(kv_map, passes, dtype=torch.float64, **settings):
    """Weights in closed form, as their names say."""
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=61,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        tie_word_embeddings=False,
        max_position_embeddings=64,
    )
    method = kvtrain.LCKV(kv_map=kv_map, forward_passes=passes[0], backward_passes=passes[1], **settings)
    model = kvtrain.retrofit(LlamaForCausalLM(config).double(), method)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            number = functools.reduce(lambda h, letter: (131 * h + ord(letter)) % 1000003, name, 0)
            k = torch.arange(parameter.numel(), dtype=torch.float64)
            wave = torch.sin(1.7320508075688772 * k + 0.0123456789 * k**2 + 0.001 * number).view_as(parameter)
            parameter.copy_(1 + 0.1 * wave if "norm" in name else 0.25 * wave)
    return model.to(dtype).train()


GOLDEN_IDS = torch.tensor([[(7 * i + 3 * i * i + 11 * b) % 61 for i in range(16)] for b in range(2)])


@pytest.mark.parametrize(
    ("kv_map", "settings", "sequential", "loss", "norm", "full_norm"),
    [
        ("0_4_4_4_4_5", SEMANTICS[0], 4.789413853895, 4.789385750369, 5.6708558049, 6.5890575341),
        ("0_4_4_4_4_5", SEMANTICS[1], 4.677871172249, 4.677867404261, 5.4064608396, 5.9359912600),
        ("0_4_4_4_4_5", SEMANTICS[2], 4.677871172249, 4.677865434433, 5.3328660427, 5.9359912600),
        ("0_0_2_2_4_4", SEMANTICS[0], 4.866931437250, 4.866931437250, 6.7723781171, 6.7723781171),
        ("0_1_2_2_2_2", SEMANTICS[0], 4.872444155176, 4.872444155176, 5.5153839933, 5.5153839933),
    ],
    ids=["main", "main, no diagonal", "first published", "cla2", "pizza-bottom"],
)
def test_golden_numbers(kv_map, settings, sequential, loss, norm, full_norm):
    """Confirmed outside this repository against both published codes."""
    for passes, expected in (((7, 2), (loss, norm)), ((0, 16), (sequential, full_norm))):
        model = golden_model(kv_map, passes, **settings)
        embedding = torch.tensor([-0.197357509205, -0.117064057696, 0.239630575283], dtype=torch.float64)
        close(model.model.embed_tokens.weight[0, :3].detach(), embedding)
        found = model(GOLDEN_IDS, labels=GOLDEN_IDS).loss
        total = math.sqrt(sum(grad.square().sum().item() for grad in grads(found, model).values()))
        assert (found.item(), total) == pytest.approx(expected, abs=1e-10, rel=0)
        single = golden_model(kv_map, passes, torch.float32, **settings)
        assert single(GOLDEN_IDS, labels=GOLDEN_IDS).loss.item() == pytest.approx(expected[0], abs=1e-5, rel=0)
    with torch.no_grad():
        slow = loss_of(refer(model, kv_map, settings).sequential(GOLDEN_IDS), GOLDEN_IDS)
    assert slow.item() == pytest.approx(sequential, abs=1e-10, rel=0)


# The equations.


@pytest.mark.parametrize("semantics", SEMANTICS, ids=["main", "no diagonal", "first published"])
@pytest.mark.parametrize("kv_map", CYCLIC)
def test_a_few_passes_are_the_equations_pass_by_pass(kv_map, semantics):
    """T15 and more: what is skipped changes nothing, in the loss or in any gradient."""
    ids = random_ids(2, 11)
    for free, graded in ((0, 1), (2, 2)):
        model = make(kv_map, (free, graded), **semantics)
        expected = refer(model, kv_map, semantics).parallel(ids, free, graded, "stale_target" in semantics)
        found = run(model, ids)
        close(found, expected)
        ours, theirs = (grads(loss_of(logits, ids), model) for logits in (found, expected))
        assert apart(ours, theirs) < 1e-11


@pytest.mark.parametrize("semantics", SEMANTICS)
def test_biases(semantics):
    """A layer that sees nothing still adds its output's bias."""
    model, ids = make("0_3_3_3_3", (1, 1), host={"attention_bias": True}, **semantics), random_ids(2, 9)
    expected = refer(model, "0_3_3_3_3", semantics).parallel(ids, 1, 1, "stale_target" in semantics)
    close(run(model, ids), expected)
    first = refer(model, "0_3_3_3_3", semantics).sequential(ids[:, :1])
    close(model(ids[:, :1]).logits, first)


@pytest.mark.parametrize(
    ("family", "kv_map"),
    [*(("llama", kv_map) for kv_map in (*CYCLIC, *ACYCLIC)), *((family, CYCLIC[2]) for family in WITHOUT_SINKS)],
)
def test_enough_passes_are_token_by_token(family, kv_map):
    """As many passes as tokens, with gradient or without."""
    ids = random_ids(2, 13)
    with torch.no_grad():
        slow = refer(make(kv_map, family=family), kv_map).sequential(ids)
        for passes in ((0, 13), (40, 2)):
            close(run(make(kv_map, passes, family), ids), slow)


@pytest.mark.parametrize("kv_map", CYCLIC)
def test_a_pass_makes_one_more_token_exact(kv_map):
    """One and no more; further passes leave it alone."""
    ids = random_ids(2, 16)
    with torch.no_grad():
        slow = refer(make(kv_map), kv_map).sequential(ids)
        for passes in (1, 2, 9):
            error = (run(make(kv_map, (passes - 1, 1)), ids) - slow).abs().amax((0, 2))
            assert error[:passes].max() < 1e-13
            # Windows forget, and two stages in a row are late by a token each.
            if "s" not in kv_map:
                assert error[passes] > 1e-9


@pytest.mark.parametrize("kv_map", CYCLIC[:4])
def test_all_passes_with_gradient_are_backpropagation_through_time(kv_map):
    """And with the last two alone the loss is the same, its gradient a truncated one."""
    ids, whole, cut = random_ids(2, 12), make(kv_map, (0, 12)), make(kv_map, (12, 2))
    slow = loss_of(refer(whole, kv_map).sequential(ids), ids)
    exact = grads(slow, whole)
    for model, same in ((whole, True), (cut, False)):
        loss = loss_of(run(model, ids), ids)
        close(loss, slow)
        assert (apart(grads(loss, model), exact) < 1e-12) is same


def seeded(monkeypatch, scale):
    """Let stages begin with random keys and values in place of none."""
    iterate = LayerSchedule._iterate

    def from_noise(stack, stage, hidden, shared, *rest):
        for owner in stack.targets(stage):
            noise = torch.randn(2, hidden.shape[0], 2, hidden.shape[1], 8, dtype=hidden.dtype) * scale
            shared[owner] = (noise[0], noise[1])
        return iterate(stack, stage, hidden, shared, *rest)

    monkeypatch.setattr(LayerSchedule, "_iterate", from_noise)


@pytest.mark.parametrize(("kv_map", "scale"), [*((kv_map, 10.0) for kv_map in CYCLIC), (CYCLIC[0], 1.0)])
def test_any_start_comes_to_the_same_rest(kv_map, scale, monkeypatch):
    """In as many passes as there are tokens, and not before."""
    ids = random_ids(2, 10)
    with torch.no_grad():
        expected, early = run(make(kv_map, (9, 1)), ids), run(make(kv_map, (3, 1)), ids)
        seeded(monkeypatch, scale)
        close(run(make(kv_map, (9, 1)), ids), expected)
        assert (run(make(kv_map, (3, 1)), ids) - early).abs().max() > 1e-6


@pytest.mark.parametrize("backend", ["auto", "chunked", "reference"])
@pytest.mark.parametrize("kv_map", ["0_4_4_4_4_5", "0s_4s_4s_4s_4s_5", "0_0_2_2_4_4"])
def test_causality(kv_map, backend, monkeypatch):
    """Bit for bit, with fewer and more tokens than passes, alone and beside padding at either end."""
    monkeypatch.setattr(sharing, "attention", functools.partial(sharing.attention, backend=backend))
    model = make(kv_map)
    for length, changed in ((6, 3), (30, 13), (30, 1)):
        ids = random_ids(3, length)
        other = ids.clone()
        other[:, changed] = (other[:, changed] - 3 + 7) % 58 + 3
        mask = torch.ones_like(ids)
        mask[1, :2], mask[2, -2:] = 0, 0
        with torch.no_grad():
            first, second = (run(model, sent, attention_mask=mask) for sent in (ids, other))
        assert torch.equal(first[:, :changed], second[:, :changed]) and first.isfinite().all()
        assert (first[0, changed] - second[0, changed]).abs().max() > 1e-6


@pytest.mark.parametrize("kv_map", CYCLIC[:4])
def test_the_first_token_sees_nothing_above(kv_map, monkeypatch):
    """Its attention is zero in cyclic layers, whatever their targets hold."""
    ids, model, outputs = random_ids(2, 5), make(kv_map), []
    for layer in model.model.layers:
        if layer.self_attn.cyclic:
            layer.self_attn.o_proj.register_forward_hook(lambda _, __, output: outputs.append(output[:, 0]))
    with torch.no_grad():
        expected = run(model, ids[:, :1])
        seeded(monkeypatch, 10.0)
        close(run(model, ids)[:, :1], expected)
        assert torch.equal(run(model, ids[:, :1]), expected)
    assert len(outputs) > 5 and not torch.stack(outputs).any()


# Gradients and parameters.


@pytest.mark.parametrize(("semantics", "reaches"), [(SEMANTICS[2], False), (SEMANTICS[1], True), ({}, True)])
def test_one_pass_with_gradient(semantics, reaches):
    """Where the target sees its keys of the pass before, none of it reaches them."""
    model, ids = make("0_4_4_4_4_5", (7, 1), **semantics), random_ids(2, 16)
    found = grads(loss_of(run(model, ids), ids), model)
    for name in ("k_proj", "v_proj"):
        assert bool(found[f"model.layers.4.self_attn.{name}.weight"].any()) is reaches
        assert found[f"model.layers.0.self_attn.{name}.weight"].any()


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("passes", [(7, 2), (0, 2)])
def test_activation_checkpointing_changes_nothing(passes, checkpointing):
    """Every layer of every pass is computed again from what it saw, not from what came later."""
    ids, results, calls = random_ids(2, 24), [], []
    for recompute in (False, checkpointing):
        model = make("0_3_3_3_4", passes).train()
        if recompute:
            model.gradient_checkpointing_enable()
        calls.append(0)
        model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: calls.__setitem__(-1, calls[-1] + 1))
        loss = model(ids, labels=ids).loss
        results.append((loss, grads(loss, model)))
    assert torch.equal(results[0][0], results[1][0]) and apart(results[0][1], results[1][1]) == 0.0
    assert calls == [sum(passes), sum(passes) + 2 * checkpointing]


def test_windows_of_layers_that_read_from_above():
    """Token i of a strict layer sees i - W + 1 to i - 1, that of a plain one itself too."""
    model = make("0s_2s_2s_3s")
    hidden = torch.randn(1, 12, 32, dtype=torch.float64)
    angles = model.model.rotary_emb(hidden, torch.arange(12)[None])
    for layer, nearest in ((1, 1), (2, 0)):
        key, value = torch.randn(2, 1, 2, 12, 8, dtype=torch.float64)
        module = model.model.layers[layer].self_attn
        call = sharing.LayerInputs(key, value.requires_grad_(), own=False)
        output, _ = module(hidden, angles, dataclasses.replace(call), outputs=sharing.LayerOutputs())
        for token in range(12):
            (reached,) = torch.autograd.grad(output[0, token].sum(), value, retain_graph=True)
            seen = reached[0].abs().amax((0, 2)).nonzero().flatten().tolist()
            assert seen == list(range(max(0, token - WINDOW + 1), token - nearest + 1))


@pytest.mark.parametrize(
    ("kv_map", "semantics"),
    [*((kv_map, {}) for kv_map in (*CYCLIC, "0_0_2_2_4_4")), *(("0_3_2_3_3_3", way) for way in SEMANTICS[1:])],
)
def test_packed_documents_are_documents_alone(kv_map, semantics):
    """Outputs and gradients, documents shorter and longer than there are passes, padding behind."""
    model, ids = make(kv_map, (3, 2), **semantics).train(), random_ids(2, 30)
    sizes = ([1, 13, 4, 12], [9, 2, 19])
    documents = torch.zeros_like(ids)
    for row, counts in enumerate(sizes):
        documents[row, : sum(counts)] = torch.arange(1, len(counts) + 1).repeat_interleave(torch.tensor(counts))
    documents[0, -3:] = 0
    weight = torch.randn(61, dtype=torch.float64)
    packed = run(model, ids, document_ids=documents) @ weight
    total = packed.new_zeros(())
    for row in range(2):
        for number in range(1, int(documents[row].max()) + 1):
            place = documents[row] == number
            alone = run(model, ids[row : row + 1, place]) @ weight
            close(packed[row, place], alone[0])
            total = total + alone.sin().sum()
    assert apart(grads(packed[documents > 0].sin().sum(), model), grads(total, model)) < 1e-11


@pytest.mark.parametrize("passes", [1, 2, 9])
@pytest.mark.parametrize("kv_map", CYCLIC)
def test_the_plan_spares_what_changes_no_bit(kv_map, passes, monkeypatch):
    """The whole target in every pass, attention to zeros in the first, and passes beyond the length."""
    ids = random_ids(2, 7)
    with torch.no_grad():
        spared = run(make(kv_map, (passes - 1, 1)), ids)

        def everything(stack, stage, hidden, shared, kwargs, context):
            for owner in stack.targets(stage):
                shared[owner] = (torch.zeros(2, 2, 7, 8).double(), torch.zeros(2, 2, 7, 8).double())
            for _ in range(passes):
                output = stack.run_stage(stage, hidden, shared, kwargs, documents=context.documents)
            return output

        monkeypatch.setattr(LayerSchedule, "_iterate", everything)
        assert torch.equal(spared, run(make(kv_map, (passes - 1, 1)), ids))


class SharingBySGD(LCKVModule):
    """Plain gradient descent: AdamW would hide a wrong scale."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


def test_accumulation_over_ragged_rows_is_one_big_batch(tmp_path, monkeypatch):
    """Rows of many documents of any length, by one or by four, move the weights alike."""
    host, rows = make_host(layers=4, dtype=torch.float32), tiny_runs.make_rows(tmp_path)
    host.save_pretrained(tmp_path / "host")
    assert rows.num_targets.max() > rows.num_targets.min()
    method, results = kvtrain.LCKV(kv_map="0_3_3_3", forward_passes=2), []
    for size, accumulate in ((1, 4), (4, 1)):
        monkeypatch.setattr(tiny_runs, "BATCH", size)
        module = SharingBySGD(str(tmp_path / "host"), method, phases=[Phase("all", 2, 1e-3)])
        tiny_runs.train(module, rows, tmp_path / str(size), 2, accumulate_grad_batches=accumulate)
        results.append(dict(module.model.named_parameters()))
    start = dict(kvtrain.retrofit(host, method).named_parameters())
    assert apart(results[0], results[1]) < 1e-6 < 1e-3 < apart(results[0], start)
