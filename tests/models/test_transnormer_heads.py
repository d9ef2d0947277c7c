"""TransNormers with a head: initial weights, losses, pooling, and settings that are refused."""

import math

import pytest
import torch
from torch.nn import functional

from kvtrain.models.transnormer.config import TransNormerConfig
from kvtrain.models.transnormer.heads import (
    TransNormerForCausalLM,
    TransNormerForMaskedLM,
    TransNormerForSequenceClassification,
)

from .transnormer_reference import assert_near, random_rows, small_config, small_model

VARIANTS = pytest.mark.parametrize("variant", ["T1", "T2"])
WIDTH = 256


def fresh(head=TransNormerForCausalLM, seed=0, **settings):
    """A wide model of one block layer and a linear one, with the weights that it begins with."""
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300}
    torch.manual_seed(seed)
    return head(small_config(**{**sizes, **settings}))


def assert_uniform(tensor, bound):
    assert 0.98 * bound < tensor.abs().max() <= bound
    assert tensor.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1 if tensor.ndim == 1 else 0.02)


def assert_normal(tensor, deviation):
    assert tensor.std().item() == pytest.approx(deviation, rel=0.02)
    assert tensor.abs().max() > 3 * deviation
    assert tensor.mean().abs() < 0.05 * deviation


@VARIANTS
def test_initial_weights_of_a_language_model(variant):
    """Xavier with gain 1 in blocks and 1 / sqrt(2) in linear layers; the feed-forward part is torch's own."""
    model = fresh(variant=variant)
    xavier, own = math.sqrt(6 / (2 * WIDTH)), WIDTH**-0.5
    for layer, gain in zip(model.model.layers, (1.0, 2**-0.5), strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            assert_uniform(projection.weight, gain * xavier)
            assert_uniform(projection.bias, own)
        assert_uniform(attention.o_proj.weight, xavier)
        assert torch.equal(attention.o_proj.bias, torch.zeros(WIDTH))
        for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
            assert_uniform(linear.weight, linear.in_features**-0.5)
            assert_uniform(linear.bias, linear.in_features**-0.5)
    assert_normal(model.model.embed_tokens.weight, own)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_initial_weights_of_a_masked_language_model():
    settings = {"causal": False, "initialization": "normal", "position_embedding": "learned", "embedding_norm": True}
    model = fresh(TransNormerForMaskedLM, **settings)
    for name, tensor in model.named_parameters():
        if name.endswith("weight") and tensor.ndim == 2:
            assert_normal(tensor, 0.02)
        elif "norm" in name:
            assert torch.equal(tensor, torch.ones(WIDTH) if name.endswith("weight") else torch.zeros(WIDTH)), name
        elif not name.endswith("theta"):
            assert torch.equal(tensor, torch.zeros_like(tensor)), name


def test_the_row_of_padding_is_zero():
    weight = fresh(pad_token_id=4).model.embed_tokens.weight
    assert torch.equal(weight[4], torch.zeros(WIDTH)) and weight[3].abs().min() > 0


@pytest.mark.parametrize("initialization", ["xavier", "normal"])
def test_initial_angles_and_reflections(initialization):
    model = fresh(initialization=initialization, num_hidden_layers=4, num_block_heads=8)
    positions = [layer.self_attn.relative_position for layer in model.model.layers]
    for position, size in zip(positions, (32, 32, 64, 64), strict=True):
        angles = torch.tensor([10000.0 ** (-2 * j / size) for j in range(size // 2)])
        torch.testing.assert_close(position.theta, torch.nn.Parameter(angles), rtol=1e-6, atol=0)
        assert position.theta.requires_grad and not position.reflection.requires_grad
        assert position.reflection.norm().item() == pytest.approx(1.0, abs=1e-6)
    for one, other in ((0, 1), (2, 3)):
        assert not torch.allclose(positions[one].reflection, positions[other].reflection)
    rope = fresh(relative_position="rope").model.layers[0].self_attn.relative_position
    torch.testing.assert_close(rope.theta, positions[2].theta.detach(), rtol=0, atol=0)
    assert not rope.theta.requires_grad and rope.reflection is None


@pytest.mark.parametrize("head", [TransNormerForCausalLM, TransNormerForMaskedLM, TransNormerForSequenceClassification])
def test_one_seed_makes_one_model(head):
    models = [fresh(head, seed, causal=head is TransNormerForCausalLM).state_dict() for seed in (3, 3, 4)]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    assert not torch.equal(models[0]["model.embed_tokens.weight"], models[2]["model.embed_tokens.weight"])


@VARIANTS
def test_the_causal_loss_is_that_of_the_next_token(variant):
    model, ids = small_model(variant=variant), torch.stack(random_rows(13, 13))
    labels = ids.clone()
    labels[0, :4] = -100
    out = model(ids, labels=labels)
    expected = functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert_near(out.loss, expected)
    assert_near(model(ids, labels=labels, num_items_in_batch=50).loss, expected * 21 / 50)
    trained = model.train()(ids, labels=labels)
    assert trained.logits is None
    assert_near(trained.loss, expected)


@VARIANTS
def test_the_masked_loss_is_that_of_the_targets(variant):
    model, ids = small_model(TransNormerForMaskedLM, variant=variant, causal=False), torch.stack(random_rows(13, 13))
    labels = torch.where(torch.arange(26).view(2, 13) % 4 == 1, ids, -100)
    out = model(ids, labels=labels)
    expected = functional.cross_entropy(out.logits.flatten(0, 1), labels.flatten())
    hidden = functional.gelu(model.dense(model.model(ids).last_hidden_state))
    hidden = functional.layer_norm(hidden, (16,), model.dense_norm.weight, model.dense_norm.bias)
    assert_near(out.logits, hidden @ model.model.embed_tokens.weight.T + model.lm_head.bias)
    assert_near(out.loss, expected)
    assert_near(model(ids, labels=labels, num_items_in_batch=10).loss, out.loss * int((labels >= 0).sum()) / 10)
    assert model(ids, labels=labels, skip_logits=True).logits is None
    trained = model.train()(ids, labels=labels)
    assert trained.logits is None and torch.equal(trained.loss, out.loss)
    assert model(ids, labels=labels, skip_logits=False).logits is not None
    assert model(ids).loss is None


@pytest.mark.parametrize("num_items_in_batch", [None, 7])
@pytest.mark.parametrize("head", [TransNormerForMaskedLM, TransNormerForSequenceClassification])
def test_without_a_target_the_loss_is_zero(head, num_items_in_batch):
    """And every weight has a gradient, which other ranks wait for."""
    model, ids = small_model(head, causal=False).train(), torch.stack(random_rows(13, 13))
    labels = torch.full_like(ids, -100) if head is TransNormerForMaskedLM else torch.tensor([-100, -100])
    loss = model(ids, labels=labels, num_items_in_batch=num_items_in_batch).loss
    loss.backward()
    assert loss == 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


@VARIANTS
@pytest.mark.parametrize("pooling", ["mean", "first"])
@pytest.mark.parametrize("offsets", [(0, 0), (3, 9)], ids=["right", "left"])
@pytest.mark.parametrize("causal", [True, False])
def test_a_class_is_named_from_real_tokens(variant, pooling, offsets, causal):
    settings = {"variant": variant, "pooling": pooling, "causal": causal, "num_labels": 4}
    model, rows = small_model(TransNormerForSequenceClassification, **settings), random_rows(13, 7)
    ids, mask = torch.full((2, 16), 9), torch.zeros(2, 16, dtype=torch.long)
    for index, (row, offset) in enumerate(zip(rows, offsets, strict=True)):
        ids[index, offset : offset + len(row)], mask[index, offset : offset + len(row)] = row, 1
    found = model(ids, attention_mask=mask).logits
    for row, logits in zip(rows, found, strict=True):
        hidden = model.model(row[None]).last_hidden_state[0]
        pooled = hidden.mean(0) if pooling == "mean" else hidden[0]
        assert_near(logits, model.classifier(pooled))
        assert_near(logits, model(row[None]).logits[0])
    assert_near(model(ids, attention_mask=mask.bool()).logits, found)


def test_the_classifiers_loss():
    model = small_model(TransNormerForSequenceClassification, causal=False, num_labels=4)
    ids, labels = torch.stack(random_rows(13, 13, 13)), torch.tensor([3, -100, 1])
    out = model(ids, labels=labels)
    expected = functional.cross_entropy(out.logits[[0, 2]], labels[[0, 2]])
    assert_near(out.loss, expected)
    assert_near(model(ids, labels=labels, num_items_in_batch=8).loss, expected / 4)


def test_heads_refuse_the_wrong_direction():
    with pytest.raises(ValueError, match="set causal=True"):
        TransNormerForCausalLM(small_config(causal=False))
    with pytest.raises(ValueError, match="set causal=False"):
        TransNormerForMaskedLM(small_config(causal=True))


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"variant": "t1"}, "variant must be 'T1' or 'T2', not 't1'"),
        ({"norm": "layer"}, "norm must be 'rms' or 'batch'"),
        ({"decay": "alibi"}, "decay must be 'none', 'released' or 'paper'"),
        ({"relative_position": "none"}, "must be 'lrpe' or 'rope'"),
        ({"position_embedding": "rotary"}, "must be 'sinusoidal', 'learned' or 'none'"),
        ({"pooling": "last"}, "must be 'mean' or 'first'"),
        ({"initialization": "zero"}, "must be 'xavier' or 'normal'"),
        ({"hidden_act": "swish"}, "must be 'silu', 'identity' or 'gelu'"),
        ({"num_attention_heads": 3}, r"let hidden_size \(512\) be a multiple of twice the heads"),
        ({"num_attention_heads": 0}, "multiple of twice the heads"),
        ({"num_block_heads": 512}, "num_block_heads is 512, which leaves no even number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1, not 0"),
        ({"block_size": 0}, "block_size must be at least 1, not 0"),
        ({"vocab_size": 0}, "vocab_size must be at least 1"),
        ({"intermediate_size": 0}, "intermediate_size must be at least 1"),
        ({"norm_eps": -1e-8}, "norm_eps must"),
        ({"norm_eps": 0.0}, "norm_eps must"),
        ({"hidden_dropout": 1.0}, "hidden_dropout must"),
        ({"attention_dropout": -0.1}, "attention_dropout must"),
        ({"max_position_embeddings": 0, "position_embedding": "learned"}, "max_position_embeddings must be at least 1"),
    ],
)
def test_values_out_of_range_are_refused(settings, remedy):
    with pytest.raises(ValueError, match=remedy):
        TransNormerConfig(**settings)


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match="no preset 'bert'; there are lm, roberta, lra"):
        TransNormerConfig.preset("bert")


def test_sizes_that_follow_from_others():
    assert TransNormerConfig().intermediate_size == 1365
    assert TransNormerConfig(hidden_size=768, num_attention_heads=12).intermediate_size == 2048
    assert TransNormerConfig(gated_mlp=False).intermediate_size == 2048
    assert TransNormerConfig(num_block_heads=4).heads(2) == 4 and TransNormerConfig(num_block_heads=4).heads(3) == 8


def test_sums_that_float16_cannot_hold_pass_through_the_norm():
    """The norm takes the scale away, but the sums before it must be numbers."""
    model = fresh(vocab_size=50).eval()
    attention = model.model.layers[1].self_attn
    with torch.no_grad():
        attention.k_proj.bias.fill_(30.0)
        attention.q_proj.bias.fill_(30.0)
        attention.v_proj.bias.fill_(30.0)
    ids = torch.randint(3, 50, (1, 300), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        half = model.half()
        found, cached = half(ids, use_cache=False).logits, half(ids).logits
    assert found.dtype == cached.dtype == torch.float16
    for logits in (found, cached):
        torch.testing.assert_close(logits.float(), expected, atol=0.05, rtol=0)
