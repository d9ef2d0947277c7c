"""DMC's training form against the written formula, and what flows back through it."""

import math

import pytest
import torch

from kvtrain.kernels.context_parallel import WHOLE_ROWS
from kvtrain.kernels.pooling import pool_segments_reference
from kvtrain.kernels.rope import apply_rotary
from kvtrain.models.context import ForwardContext
from kvtrain.models.dmc.attention import IMPORTANCE_FLOOR, DMCStep
from kvtrain.models.gating import borrowed_parameters
from tests.hosts import dmc_at_rate, make_host, random_ids


def formula(attention, hidden, angles):
    """Spec 1.2 to 1.5 written with loops: one layer, soft decisions, no noise."""
    settings, dim = attention.settings, attention.head_dim
    query = attention.split_heads(attention.q_proj(hidden))
    key = attention.split_heads(attention.k_proj(hidden))
    value = attention.split_heads(attention.v_proj(hidden))
    kv_heads, groups = key.shape[1], query.shape[1] // key.shape[1]
    z = (key[..., -1] - settings.init_bias) / settings.temperature
    omega = torch.stack([query[:, h * groups : (h + 1) * groups, :, -1].mean(1) for h in range(kv_heads)], 1)
    omega = torch.sigmoid(omega + settings.init_bias) + IMPORTANCE_FLOOR
    alpha = torch.sigmoid(z)
    keep = torch.ones(dim, dtype=hidden.dtype)
    keep[-1] = 0
    pooled = pool_segments_reference(torch.cat([key * keep, value], -1), alpha, omega, settings.window)
    query = apply_rotary(query * keep, *angles) * keep
    pooled_key = apply_rotary(pooled[..., :dim], *angles) * keep
    output = torch.zeros_like(query)
    for head in range(query.shape[1]):
        group = head // groups
        for i in range(query.shape[2]):
            scores = []
            for j in range(i + 1):
                score = (query[:, head, i] * pooled_key[:, group, j]).sum(-1) / math.sqrt(dim)
                if j < i:
                    score = score + torch.log1p(-alpha[:, group, j + 1])
                scores.append(score)
            weights = torch.softmax(torch.stack(scores, -1), -1)
            output[:, head, i] = (weights.unsqueeze(-1) * pooled[:, group, : i + 1, dim:]).sum(1)
    return attention.project_out(output, WHOLE_ROWS)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_training_form_is_the_formula(kv_heads):
    """Values and the gradients of every projection, in float64."""
    ids = random_ids(2, 20)
    model = dmc_at_rate(make_host("llama", kv_heads=kv_heads, layers=1), 0.5, ids, temperature=0.7, window=4).train()
    attention = model.model.layers[0].self_attn
    hidden = torch.randn(2, 20, 32, dtype=torch.float64, requires_grad=True)
    context = ForwardContext(torch.arange(20)[None])
    angles = model.model.rotary_emb(hidden, context.positions.expand(2, -1))
    weights = torch.randn(2, 20, 32, dtype=torch.float64)
    leaves = [hidden, *attention.parameters()]
    results = []
    for output in (attention(hidden, angles, context)[0], formula(attention, hidden, angles)):
        results.append((output, *torch.autograd.grad((output * weights).sum(), leaves)))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-9, rtol=1e-7)


def test_gradcheck():
    """Finite differences through decisions, importances, keys and values."""
    model = dmc_at_rate(make_host("llama", layers=1), 0.5, random_ids(1, 7), temperature=0.8, window=3).train()
    attention = model.model.layers[0].self_attn
    hidden = torch.randn(1, 7, 32, dtype=torch.float64, requires_grad=True)
    context = ForwardContext(torch.arange(7)[None])
    angles = model.model.rotary_emb(hidden, context.positions)
    assert torch.autograd.gradcheck(lambda x: attention(x, angles, context)[0], (hidden,), atol=1e-6)


@torch.no_grad()
def zero_borrowed_rows(model):
    for parameter, rows in borrowed_parameters(model):
        parameter[rows] = 0


def loss_gradients(model, ids, step):
    """Gradients of the loss and of the decisions with everything that training passes."""
    outputs = {}
    model.zero_grad()
    loss = model(ids, labels=ids, outputs=outputs, step=step).loss
    decisions = torch.stack([outputs[layer] for layer in sorted(outputs)])
    (loss + decisions.mean()).backward()
    return decisions.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_checkpointing_changes_nothing():
    """Recomputation draws the same noise, and decisions in the outputs keep their gradients."""
    ids = random_ids(2, 24)
    model = dmc_at_rate(make_host("llama"), 0.3, ids).train()
    step = DMCStep(seed=3, step=11, row_ids=torch.tensor([5, 9]))
    plain, gradients = loss_gradients(model, ids, step)
    model.gradient_checkpointing_enable()
    recomputed, recomputed_gradients = loss_gradients(model, ids, step)
    assert torch.equal(plain, recomputed)
    assert len(gradients) == len(recomputed_gradients)
    for ours, expected in zip(recomputed_gradients, gradients, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-12, rtol=0)


def test_reentrant_checkpointing_is_refused():
    model = dmc_at_rate(make_host("llama"), 0.0, random_ids(1, 4))
    with pytest.raises(ValueError, match="use_reentrant=False"):
        model.gradient_checkpointing_enable({"use_reentrant": True})


def test_noise_belongs_to_seed_step_and_row():
    """The same key gives the same decisions wherever the row stands; another key other ones."""
    ids = random_ids(1, 64).expand(2, -1)
    model = dmc_at_rate(make_host("llama"), 0.5, ids).train()

    def decisions(rows, seed=1, step=1):
        outputs = {}
        model(ids, use_cache=False, outputs=outputs, step=DMCStep(seed=seed, step=step, row_ids=torch.tensor(rows)))
        return outputs[1].detach()

    here, there = decisions([7, 8]), decisions([8, 7])
    assert torch.equal(here[0], there[1]) and torch.equal(here[1], there[0])
    assert not torch.equal(here[0], here[1])
    assert not torch.equal(here, decisions([7, 8], seed=2))
    assert not torch.equal(here, decisions([7, 8], step=2))


def test_fresh_retrofit_merges_next_to_nothing():
    """With zeroed rows the logit is -5, so noise alone merges 0.67 % of the tokens."""
    model = dmc_at_rate(make_host("llama"), 0.0, random_ids(1, 8)).train()
    zero_borrowed_rows(model)
    for layer in model.model.layers:
        layer.self_attn.settings = type(layer.self_attn.settings)()
    outputs = {}
    rows = torch.arange(32)
    model(random_ids(32, 256), use_cache=False, outputs=outputs, step=DMCStep(seed=0, step=0, row_ids=rows))
    share = torch.stack(list(outputs.values()))[..., 1:].mean().item()
    expected, count = 1 / (1 + math.exp(5)), 2 * 32 * 2 * 255
    assert abs(share - expected) < 3 * math.sqrt(expected * (1 - expected) / count)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_zeroing_rows_after_zero_out_changes_nothing(family):
    """At scale 0 the rows are unused, also where a key norm follows and where there are biases."""
    model = dmc_at_rate(make_host(family), 0.0, random_ids(1, 8)).train()
    ids, step = random_ids(2, 30), DMCStep(channel_scale=0.0)
    with torch.no_grad():
        before = model(ids, use_cache=False, step=step).logits
        zero_borrowed_rows(model)
        after = model(ids, use_cache=False, step=step).logits
        compressing = model.eval()(ids, use_cache=False).logits
    assert torch.equal(before, after)
    torch.testing.assert_close(compressing, after, atol=1e-12, rtol=0)
