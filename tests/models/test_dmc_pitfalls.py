"""Known ways to get DMC wrong, and the test that would notice each.

``AUDIT`` lists the pitfalls P1 to P27 of learned cache compression (DMC merges, its sibling DMS evicts), and three
properties of training, T12 to T14. An entry says what goes wrong, then names tests of this repository, as
``folder/file::test`` under ``tests/``, or says why there is none. Tests without a file are below.
"""

import ast
import gc
import re
import weakref
from functools import cache as remember
from pathlib import Path

import pytest
import torch

import kvtrain
from kvtrain.kernels.attention import attention
from kvtrain.losses.compression import compressed_fraction, compression_hinge
from kvtrain.models.context import ForwardContext
from kvtrain.models.dmc import attention as dmc_attention
from kvtrain.models.dmc.attention import DMCStep
from kvtrain.models.gating import has_choice
from kvtrain.training import DMCModule, Phase
from tests.hosts import dmc_at_rate, make_host, random_ids

TESTS = Path(__file__).resolve().parents[1]

AUDIT = {
    "P1": (
        "Another channel than the last is borrowed, which turns faster under RoPE.",
        "models/test_dmc_training_form::test_training_form_is_the_formula",
        "test_evaluation_decides_by_the_sign_of_the_channel",
    ),
    "P2": (
        "The channel is cleared before RoPE alone, and its partner leaks back into it.",
        "models/test_dmc_training_form::test_training_form_is_the_formula",
        "models/test_dmc_forms::test_no_merging_is_the_host_without_the_channel",
        "test_zero_out_shrinks_activations_and_not_weights",
    ),
    "P3": (
        "Keys are pooled after rotation, or rotate elsewhere than at their last token, or a slot is not rewritten.",
        "models/test_dmc_training_form::test_training_form_is_the_formula",
        "models/test_dmc_forms::test_forms_agree_in_float64",
    ),
    "P4": (
        "A decision hides its own token's state instead of the state before it, or the first token may merge.",
        "models/test_dmc_training_form::test_training_form_is_the_formula",
        "models/test_dmc_forms::test_forms_agree_in_float64",
    ),
    "P5": (
        "A token whose successor merges no longer sees itself.",
        "kernels/test_attention::test_the_definition_by_hand",
        "models/test_dmc_training_form::test_training_form_is_the_formula",
    ),
    "P6": (
        "Noise or temperature reach evaluation, or the noise is a single Gumbel variable, which has a mean.",
        "models/test_gating::test_limits_and_the_threshold",
        "kernels/test_noise::test_moments",
        "models/test_dmc_training_form::test_fresh_retrofit_merges_next_to_nothing",
        "test_evaluation_decides_by_the_sign_of_the_channel",
    ),
    "P7": (
        "Attention sees hard decisions while training, or the logarithm of 1 minus a sigmoid overflows.",
        "models/test_dmc_training_form::test_training_form_is_the_formula",
        "models/test_gating::test_bias_is_exact_where_a_naive_logarithm_overflows",
        "models/test_gating::test_straight_through_is_hard_forward_and_soft_backward",
    ),
    "P8": (
        "The ramp is linear in the share of tokens kept instead of in tokens a slot.",
        "training/test_dmc_module::test_schedules",
    ),
    "P9": (
        "The hinge averages before it cuts off, or compression is the mean of the heads' ratios.",
        "losses/test_compression::test_hinge_is_per_row",
        "losses/test_compression::test_hinge_is_zero_from_the_target_on_and_so_is_its_gradient",
        "test_compression_is_tokens_over_slots",
    ),
    "P10": (
        "The floor of importances follows the dtype, and a model serves other numbers than it trained.",
        "test_the_floor_of_importances_is_one_number",
    ),
    "P11": (
        "A popular trainer departs from the recipe: one Gumbel variable, no shift by a token, a temperature that "
        "falls, a zero-out factor that piles up on the weights, divergence divided by rows, a channel that training "
        "keeps and serving clears.",
        "kernels/test_noise::test_moments",
        "models/test_dmc_training_form::test_training_form_is_the_formula",
        "test_zero_out_shrinks_activations_and_not_weights",
        "training/test_dmc_module::test_schedules",
        "training/test_distillation::test_a_models_loss_is_the_naive_mixture",
        "models/test_dmc_forms::test_noiseless_saturated_training_is_evaluation",
    ),
    "P12": (
        "The divergence runs the other way than its name says.",
        "kernels/test_distillation::test_against_the_dense_divergence_with_gradients",
        "training/test_distillation::test_a_models_loss_is_the_naive_mixture",
    ),
    "P13": (
        "Serving knows one window and one query a key-value head, whatever was trained.",
        "models/test_dmc_forms::test_forms_agree_on_random_shapes",
    ),
    "P14": (
        "Sums from which old tokens are subtracted drift in long segments.",
        "models/test_dmc_forms::test_sums_are_exact_after_thousands_of_merges",
        "models/test_dmc_forms::test_long_segments_do_not_drift",
    ),
    "P15": (
        "Tokens merge or attend across documents, or padding counts in the compression.",
        "models/test_dmc_forms::test_packed_documents_are_documents_alone",
        "test_packed_documents_train_as_documents_alone",
        "test_compression_is_tokens_over_slots",
    ),
    "P16": (
        "The first real token of a left-padded row merges into the padding.",
        "models/test_dmc_forms::test_padded_rows_are_rows_alone",
        "cache/test_conformance::test_padded_rows_are_rows_alone",
    ),
    "P17": (
        "Grouped queries: the mean of sigmoids in place of the sigmoid of the mean. (A hinge by shard cannot happen: "
        "nothing here is tensor-parallel.)",
        "models/test_dmc_training_form::test_training_form_is_the_formula",
    ),
    "P18": (
        "Decisions are read before a key norm, or zeroing the channel's rows changes the norm of the others.",
        "test_evaluation_decides_by_the_sign_of_the_channel",
        "models/test_dmc_training_form::test_zeroing_rows_after_zero_out_changes_nothing",
    ),
    "P19": (
        "The cache of DMS holds no token more than its window. (DMC delays nothing and has no window.)",
        "models/test_dms_forms::test_rows_within_the_window_are_the_hosts",
        "models/test_dms_forms::test_the_definition_on_plain_lists",
    ),
    "P20": (
        "Compression is taken for what is aimed at, where DMS keeps all of its window, and so most of a short text.",
        "models/test_dms_forms::test_expected_slots_and_bytes",
    ),
    "P21": (
        "DMS reads its decisions at 100 times their weight, so that step 0 must start from zero. Here the factor is "
        "``decision_scale``, and the rows that it multiplies start from zero too.",
        "test_evaluation_decides_by_the_sign_of_the_channel",
        "training/test_dmc_module::test_a_recipe_without_zero_out_starts_from_zero_rows",
        "models/test_dmc_forms::test_rows_already_zero_make_the_host_itself",
        "training/test_dms_module::test_the_first_step_is_the_teacher_but_for_noise",
    ),
    "P22": (
        "Going back to a prefix forgets the open segment, into which later tokens have merged meanwhile.",
        "test_a_row_goes_back_with_its_open_segment",
        "cache/test_conformance::test_refusals_name_the_remedy",
    ),
    "P23": (
        "A recomputed layer draws other noise than the forward pass did.",
        "test_recomputed_layers_draw_the_same_noise",
        "models/test_dmc_training_form::test_checkpointing_changes_nothing",
    ),
    "P24": (
        "In bfloat16 a large bias that is added and taken away again on the diagonal costs the token's own score.",
        "test_a_hidden_past_leaves_the_own_value_exact",
        "kernels/test_attention::test_bf16_stays_near_fp32",
    ),
    "P25": (
        "Beams change places and leave their open segments behind.",
        "models/test_host::test_beams_of_a_compressing_cache",
        "cache/test_conformance::test_generating_with_the_cache_is_generating_without",
    ),
    "P26": (
        "Decisions are kept in a list that outlives the forward pass.",
        "test_no_decision_outlives_its_pass",
        "cache/test_conformance::test_nothing_stays_on_modules",
    ),
    "P27": (
        "Large pages waste what merging saved.",
        "test_a_head_that_merges_everything_takes_one_small_page",
        "cache/test_conformance::test_memory_is_bounded_by_what_is_kept",
    ),
    "T12": (
        "Prefill in chunks, then decoding, differs from decoding alone.",
        "models/test_dmc_forms::test_forms_agree_in_float64",
        "cache/test_conformance::test_any_chunks_are_the_parallel_form",
    ),
    "T13": (
        "The zero-out phase does not end at zero after 80 % of its steps, or clearing the rows then changes something.",
        "training/test_dmc_module::test_schedules",
        "training/test_dmc_module::test_boundary_clears_rows_and_moments",
        "models/test_dmc_training_form::test_zeroing_rows_after_zero_out_changes_nothing",
    ),
    "T14": (
        "Packed or padded documents are not what they are alone.",
        "models/test_dmc_forms::test_packed_documents_are_documents_alone",
        "models/test_dmc_forms::test_padded_rows_are_rows_alone",
        "test_packed_documents_train_as_documents_alone",
    ),
}


@remember
def functions_of(path):
    body = ast.parse(path.read_text()).body if path.is_file() else []
    return {node.name for node in body if isinstance(node, ast.FunctionDef)}


def missing(names):
    """Names of ``AUDIT`` that are no test."""
    places = {name: name.rpartition("::") for name in names}
    paths = {name: TESTS / f"{file}.py" if file else Path(__file__) for name, (file, _, _) in places.items()}
    return [n for n, (_, _, test) in places.items() if not (test[:5] == "test_" and test in functions_of(paths[n]))]


def test_every_pitfall_has_a_test_that_exists_or_a_reason():
    assert list(AUDIT) == [f"P{number}" for number in range(1, 28)] + ["T12", "T13", "T14"]
    for number, entry in AUDIT.items():
        if isinstance(entry, str):
            assert re.match(r"No test: .{40,}", entry), number
        else:
            assert len(entry) > 1 and missing(entry[1:]) == [], number
    wrong = ["test_nothing", "models/test_dmc_forms::test_nothing", "models/test_dmc_forms::run_chunks", "no::test_a"]
    assert missing(wrong) == wrong


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_evaluation_decides_by_the_sign_of_the_channel(family):
    """P1, P6, P18, P21: the last channel of the host's own key, normed but not rotated, and nothing random."""
    host, ids, scale = make_host(family), random_ids(3, 40), 3.0
    layer = host.model.layers[0]
    with torch.no_grad():
        key = layer.self_attn.k_proj(layer.input_layernorm(host.model.embed_tokens(ids))).unflatten(-1, (2, 8))
        key = layer.self_attn.k_norm(key) if family == "qwen3" else key
        channel = key[..., -1].transpose(1, 2)
        bias = scale * channel.median().item() + 1e-3
        model = kvtrain.retrofit(host, kvtrain.DMC(init_bias=bias, decision_scale=scale))
        outputs, step = {}, DMCStep(seed=1, step=2, row_ids=torch.arange(3))
        model(ids, use_cache=False, outputs=outputs, step=step)
    expected = scale * channel > bias
    expected[..., 0] = False
    assert torch.equal(outputs[0] > 0, expected)
    assert 0.3 < outputs[0].mean() < 0.7


def test_zero_out_shrinks_activations_and_not_weights():
    """P2, P11: the factor counts once, before and after RoPE, however often the step is taken."""
    model = kvtrain.retrofit(make_host(kv_heads=4, layers=1), kvtrain.DMC()).train()
    module, hidden = model.model.layers[0].self_attn, torch.randn(2, 9, 32, dtype=torch.float64)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cos, sin = (angles.unsqueeze(1) for angles in model.model.rotary_emb(hidden, torch.arange(9)[None]))
    factor = torch.tensor([1.0] * 7 + [0.25], dtype=torch.float64)
    query, key, value = (module.split_heads(part(hidden)) for part in (module.q_proj, module.k_proj, module.v_proj))
    rotated = []
    for heads in (query * factor, key * factor):
        first, second = heads.chunk(2, -1)
        rotated.append((heads * cos + torch.cat([-second, first], -1) * sin) * factor)
    expected = torch.nn.functional.scaled_dot_product_attention(*rotated, value, is_causal=True)
    context = ForwardContext(torch.arange(cos.shape[-2])[None], step=DMCStep(channel_scale=0.25))
    for _ in range(2):
        output, _ = module(hidden, (cos.squeeze(1), sin.squeeze(1)), context)
        torch.testing.assert_close(output, module.project_out(expected, context.parallel), atol=1e-12, rtol=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_compression_is_tokens_over_slots():
    """P9, P15: one head merges everything, one nothing: two tokens a slot. Padding and first tokens do not count."""
    module = DMCModule("kvtrain:tiny", kvtrain.DMC(), phases=[Phase("finetune", 4, 1e-3)])
    logged = {}
    module.log = lambda name, value, **_: logged.update({name: float(value)})
    module.log_mean = lambda name, mean, transform, **_: logged.update({name: float(transform(mean))})
    module.phase_step = lambda: module.schedule.phase_step(0)
    documents = torch.tensor([[1] * 6 + [2] * 4 + [0] * 3])
    decisions = torch.zeros(1, 2, 13)
    decisions[:, 0] = 1
    decisions[..., [0, 6, 10, 11, 12]] = 1
    module.extra_loss({"document_ids": documents}, {"outputs": {0: decisions, 1: decisions}})
    assert logged == {"compression": pytest.approx(2.0), "compression_target": 4.0}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_floor_of_importances_is_one_number(dtype):
    """P10: 1/128 in every dtype."""
    module = kvtrain.retrofit(make_host(dtype=dtype, layers=1), kvtrain.DMC()).model.layers[0].self_attn
    query, key = torch.full((1, 4, 3, 8), -1e4, dtype=dtype), torch.zeros(1, 2, 3, 8, dtype=dtype)
    _, importance = module._borrow(query, key, ForwardContext(torch.arange(3)[None]), None)
    assert importance.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert importance.flatten().tolist() == [0.0078125] * 6


def test_packed_documents_train_as_documents_alone():
    """P15, T14: soft decisions, and gradients, stop at a document's start; padding at the end has none."""
    ids, documents = random_ids(1, 40), torch.tensor([[1] * 13 + [2] + [3] * 20 + [0] * 6])
    model = dmc_at_rate(make_host(), 0.8, ids, temperature=1.0).train()
    weights = torch.randn(1, 40, 61, dtype=torch.float64)
    weights[documents == 0] = 0
    (model(ids, document_ids=documents, use_cache=False).logits * weights).sum().backward()
    packed = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    for number in (1, 2, 3):
        phase_step = documents[0] == number
        (model(ids[:, phase_step], use_cache=False).logits * weights[:, phase_step]).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(packed[name], parameter.grad, atol=1e-9, rtol=1e-9)


def feed(model, cache, ids):
    with torch.no_grad():
        return model(ids, past_key_values=cache).logits


def last_slots(cache):
    """Values of the last slot of every layer and head of row 0."""
    return torch.stack([layer.pages.gather_row(0, head)["values"][-1] for layer in cache.layers for head in range(2)])


@pytest.mark.parametrize("rate", [0.6, 1.0])
def test_a_row_goes_back_with_its_open_segment(rate):
    """P22: what other tokens merged into the last slot is undone, and the next merges see the old segment."""
    ids, other = random_ids(2, 40), random_ids(2, 9, seed=5)
    model = dmc_at_rate(make_host(), rate, ids)
    cache, expected = model.make_cache(), feed(model, model.make_cache(), ids)
    feed(model, cache, ids[:, :20])
    opened, last, snapshots = cache.kv_tokens(), last_slots(cache), [cache.snapshot_row(row) for row in range(2)]
    feed(model, cache, other[:, :1])
    merged = (cache.kv_tokens() == opened)[:, 0].flatten()
    assert merged.any() and not (last_slots(cache) == last)[merged].all(1).any()
    feed(model, cache, other[:, 1:])
    for row, snapshot in enumerate(snapshots):
        cache.restore_row(row, snapshot)
    assert torch.equal(cache.kv_tokens(), opened)
    for begin, end in ((20, 21), (21, 22), (22, 35), (35, 40)):
        torch.testing.assert_close(feed(model, cache, ids[:, begin:end]), expected[:, begin:end], atol=1e-9, rtol=0)


def step_of(model, ids, documents, step):
    """Loss of a training step, hinge included, and all gradients."""
    model.zero_grad()
    outputs = {}
    loss = model(ids, labels=ids, document_ids=documents, use_cache=False, outputs=outputs, step=step).loss
    loss = loss + compression_hinge(compressed_fraction(outputs.values(), has_choice(documents)), 8.0)
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_recomputed_layers_draw_the_same_noise(monkeypatch):
    """P23: loss and all gradients are equal with checkpointing on and off, whatever torch's own generator does."""
    drawn, draw = [], dmc_attention.keyed_logistic

    def spy(*key):
        torch.rand(7)
        drawn.append((key[1:], draw(*key)))
        return drawn[-1][1]

    monkeypatch.setattr(dmc_attention, "keyed_logistic", spy)
    ids, documents = random_ids(2, 24), torch.tensor([[1] * 24, [1] * 10 + [2] * 14])
    model = dmc_at_rate(make_host(), 0.3, ids).train()
    step = DMCStep(seed=3, step=11, row_ids=torch.tensor([5, 9]))
    loss, gradients = step_of(model, ids, documents, step)
    assert len(drawn) == 2
    model.gradient_checkpointing_enable({"preserve_rng_state": False})
    recomputed_loss, recomputed = step_of(model, ids, documents, step)
    assert len(drawn) == 6  # each of the two layers again in the forward pass, and in the backward pass
    for key, noise in drawn[2:]:
        assert torch.equal(noise, drawn[key[2]][1]), key
    assert torch.equal(recomputed_loss, loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(recomputed[name], gradient, atol=1e-12, rtol=0, msg=name)
    assert gradients["model.layers.0.self_attn.k_proj.weight"][7::8].abs().max() > 0


@pytest.mark.parametrize("backend", ["chunked", "flash_cpu"])
@pytest.mark.parametrize("bias", [float("-inf"), -5e4])
def test_a_hidden_past_leaves_the_own_value_exact(backend, bias):
    """P24: where everything merges a token sees itself alone; adding and cancelling would cost its score 0.002."""
    query, key, value = (torch.randn(2, heads, 70, 16).to(torch.bfloat16) for heads in (4, 2, 2))
    hidden = torch.full((2, 2, 70), bias)
    output, lse = attention(query, key, value, key_bias=hidden, bias_after=1, backend=backend)
    assert torch.equal(output, value.repeat_interleave(2, 1))
    own = (query.double() * key.double().repeat_interleave(2, 1)).sum(-1) / 4
    torch.testing.assert_close(lse.double(), own, atol=1e-5, rtol=0)


def test_no_decision_outlives_its_pass(monkeypatch):
    """P26: with a outputs nobody keeps, or without one, in training and in evaluation."""
    alive, decide = [], dmc_attention.decide

    def spy(*args, **settings):
        decisions = decide(*args, **settings)
        alive.extend(weakref.ref(tensor) for tensor in decisions)
        return decisions

    monkeypatch.setattr(dmc_attention, "decide", spy)
    ids = random_ids(2, 12)
    model = dmc_at_rate(make_host(), 0.5, ids)
    for training in (False, True):
        for arguments in ({}, {"outputs": {}}):
            with torch.set_grad_enabled(training):
                model.train(training)(ids, use_cache=False, **arguments)
    del arguments
    feed(model.eval(), model.make_cache(), ids)
    gc.collect()
    assert len(alive) >= 5 * 2 * 2 and not any(reference() is not None for reference in alive)


def test_a_head_that_merges_everything_takes_one_small_page():
    """P27: 100 tokens in one slot are one page of 32 slots."""
    ids = random_ids(1, 100)
    model = dmc_at_rate(make_host(), 1.0, ids)
    cache = model.make_cache()
    feed(model, cache, ids)
    assert (cache.kv_tokens() == 1).all() and 16 <= kvtrain.DMC().page_size <= 64
    for layer in cache.layers:
        assert layer.pages.table.shape == (1, 2, 1)
        assert layer.pages.pool.page_bytes == kvtrain.DMC().page_size * 2 * 8 * 8  # keys and values, 8 channels, fp64
