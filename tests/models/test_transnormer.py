"""TransNormer against its equations, and the properties that the paper claims or needs."""

import math

import pytest
import torch
from torch import Tensor
from transformers.models.minimax.configuration_minimax import MiniMaxConfig
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

from kvtrain.kernels.norm import simple_rms_norm
from kvtrain.models.context import ForwardContext
from kvtrain.models.transnormer.attention import DiagAttention, NormAttention
from kvtrain.models.transnormer.config import TransNormerConfig
from kvtrain.models.transnormer.heads import TransNormerForCausalLM, TransNormerForMaskedLM
from kvtrain.models.transnormer.layers import RelativePosition, TokenBatchNorm
from kvtrain.models.transnormer.model import TransNormerModel

from .transnormer_reference import Reference, assert_like_reference, assert_near, random_rows, small_config, small_model

VARIANTS = pytest.mark.parametrize("variant", ["T1", "T2"])
WAYS = pytest.mark.parametrize("causal", [True, False], ids=["causal", "both ways"])
OPTIONS = {
    "published": {},
    "post-norm": {"pre_norm": False, "position_embedding": "learned", "scale_embedding": False, "embedding_norm": True},
    "rope": {"relative_position": "rope", "gated_mlp": False, "hidden_act": "gelu", "position_embedding": "none"},
    "bilinear": {"hidden_act": "identity", "norm_eps_in_root": True, "norm_eps": 1e-3, "num_hidden_layers": 4},
    "released decay": {"decay": "released", "num_block_heads": 4, "norm_eps": 1e-2},
    "paper decay": {"decay": "paper", "num_hidden_layers": 1},
    "batch norm": {"norm": "batch", "num_block_heads": 1},
}


@VARIANTS
@WAYS
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("length", [4, 10, 13])
def test_hidden_states_and_gradients_are_the_equations(variant, causal, options, length):
    """Blocks have 5 tokens. Gradients of every weight, the angles' too."""
    model, rows = small_model(TransNormerModel, variant=variant, causal=causal, **options), random_rows(length, length)
    assert_like_reference(model, list(model(torch.stack(rows)).last_hidden_state), rows)
    if options.get("norm") == "batch":
        model.train()
        assert_like_reference(model, list(model(torch.stack(rows)).last_hidden_state), rows)


@VARIANTS
def test_logits_and_hidden_states_of_a_language_model(variant):
    model, rows = small_model(variant=variant), random_rows(13, 13)
    out = model(torch.stack(rows), use_cache=False, output_hidden_states=True)
    for mine, its in zip(out.logits, Reference(model).logits(rows), strict=True):
        assert_near(mine, its)
    entering, leaving = [], []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, args: entering.append(args[0]))
        layer.register_forward_hook(lambda _, __, output: leaving.append(output))
    model(torch.stack(rows), use_cache=False)
    assert len(out.hidden_states) == len(entering) + 1 == 4
    for mine, its in zip(out.hidden_states, entering, strict=False):
        assert torch.equal(mine, its)
    assert_near(out.hidden_states[-1], simple_rms_norm(leaving[-1], 1e-8))
    assert model(torch.stack(rows), use_cache=False).hidden_states is None


def count(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def test_parameters_of_the_published_language_model():
    """Of the paper's 156M, 6 x 32 are angles; 6 x 64 numbers of reflections do not train."""
    with torch.device("meta"):
        model = TransNormerForCausalLM(TransNormerConfig.preset("lm"))
    assert count(model) == 155_988_156
    assert sum(p.numel() for name, p in model.named_parameters() if name.endswith("theta")) == 6 * 32
    assert sum(b.numel() for name, b in model.named_buffers() if name.endswith("reflection")) == 6 * 64
    with torch.device("meta"):
        other = TransNormerForCausalLM(TransNormerConfig.preset("lm", "T1", tie_word_embeddings=False))
    assert count(other) == 155_988_156 + 267_744 * 512


def test_parameters_of_the_published_masked_language_model():
    config = TransNormerConfig.preset("roberta", "T1")
    with torch.device("meta"):
        model = TransNormerForMaskedLM(config)
    layer = 4 * (768 * 768 + 768) + 2 * (768 * 2048 + 2048) + 2048 * 768 + 768 + 32
    embedding, head = (50265 + 512) * 768 + 2 * 768, 768 * 768 + 768 + 2 * 768 + 50265
    assert count(model) == embedding + 12 * layer + head
    assert (config.causal, config.pre_norm, config.scale_embedding) == (False, False, False)
    assert (config.attention_dropout, config.hidden_dropout, config.initialization) == (0.1, 0.1, "normal")


def test_the_long_range_arenas_settings():
    config = TransNormerConfig.preset("lra", "T1")
    expected = {
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_block_heads": 8,
        "intermediate_size": 512,
        "block_size": 64,
        "causal": False,
        "pre_norm": True,
        "norm": "batch",
        "relative_position": "rope",
        "position_embedding": "sinusoidal",
        "gated_mlp": False,
        "hidden_act": "gelu",
        "hidden_dropout": 0.0,
        "pooling": "mean",
        "tie_word_embeddings": False,
    }
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(("layers", "blocks"), [(1, 0), (2, 1), (3, 1), (6, 3), (7, 3)])
def test_of_an_odd_number_of_layers_the_larger_half_is_linear(layers, blocks):
    model = TransNormerModel(small_config(num_hidden_layers=layers))
    kinds = [DiagAttention] * blocks + [NormAttention] * (layers - blocks)
    assert [type(layer.self_attn) for layer in model.layers] == kinds


def lrpe(head_dim: int = 8) -> RelativePosition:
    position = RelativePosition(head_dim, learned=True).double()
    position.reset_parameters()
    with torch.no_grad():
        position.theta.mul_(1 + torch.rand(head_dim // 2))
        position.reflection.div_(position.reflection.norm())
    return position


def attention_with(position: RelativePosition, variant: str = "T2", **settings) -> NormAttention:
    attention = NormAttention(small_config(variant=variant, num_hidden_layers=1, **settings), 0).double()
    attention.relative_position = position
    return attention


def test_scores_depend_on_the_distance_alone():
    attention = attention_with(lrpe())
    query, key = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64).expand(2, 1, 1, 40, 8)
    query, key = attention.turn(query, key, torch.arange(40)[None])
    scores = (query @ key.mT)[0, 0]
    for distance in range(-39, 40):
        diagonal = scores.diagonal(distance)
        assert_near(diagonal, diagonal[:1].expand_as(diagonal))
    assert scores[0].std() > 1e-3


def test_turning_keeps_lengths_and_the_mirror_undoes_itself():
    """The mirror gives even channels first; in their own order, twice is nothing."""
    position, order = lrpe(), torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    heads, attention = torch.randn(2, 3, 9, 8, dtype=torch.float64), attention_with(position)
    for turned, plain in zip(attention.turn(heads, heads + 1, torch.arange(9)[None]), (heads, heads + 1), strict=True):
        assert_near(turned.norm(dim=-1), plain.norm(dim=-1))
    mirror = position.mirror(torch.float64)[:, order.argsort()]
    assert_near(mirror @ mirror, torch.eye(8, dtype=torch.float64))
    assert_near(mirror @ position.reflection, -position.reflection)


@VARIANTS
@WAYS
@pytest.mark.parametrize("shift", [1, 1000])
def test_a_shift_of_all_positions_changes_no_linear_layer(variant, causal, shift):
    attention, hidden = attention_with(lrpe(), variant, causal=causal), torch.randn(2, 13, 16, dtype=torch.float64)
    positions = torch.arange(13)[None]
    assert_near(
        attention(hidden, ForwardContext(positions + shift)), attention(hidden, ForwardContext(positions, counted=True))
    )


def test_angles_far_into_a_text():
    """In float32 alone, 100,000 times an angle is off in the third digit."""
    position, places = RelativePosition(64, learned=True), torch.tensor([[100_000, 99_991]])
    position.reset_parameters()
    exact = places.double()[..., None] * position.theta.double()
    naive = (places.float()[..., None] * position.theta).double()
    for found, function in zip(position.angles(places, torch.float32), (torch.cos, torch.sin), strict=True):
        assert found.dtype == torch.float32
        assert (found.double() - function(torch.cat([exact, exact], -1))).abs().max() < 1e-6
        assert (function(naive) - function(exact)).abs().max() > 1e-4


@pytest.mark.parametrize("in_root", [True, False])
def test_simple_rms_norm_by_its_formula(in_root):
    hidden, eps = torch.randn(3, 7, 6, dtype=torch.float64), 0.1
    square = hidden.square().sum(-1, keepdim=True) / 6
    expected = hidden / ((square + eps).sqrt() if in_root else square.sqrt() + eps)
    assert_near(simple_rms_norm(hidden, eps, epsilon_in_root=in_root), expected)
    for dtype in (torch.bfloat16, torch.float16):  # squares of 300 are beyond float16, 1e-8 is nothing in it
        half = (300 * hidden).to(dtype)
        wide = simple_rms_norm(half.double(), 1e-8, epsilon_in_root=in_root).to(dtype)
        assert simple_rms_norm(half, 1e-8, epsilon_in_root=in_root).dtype == dtype
        torch.testing.assert_close(simple_rms_norm(half, 1e-8, epsilon_in_root=in_root), wide, atol=0, rtol=1e-2)


@pytest.mark.parametrize("in_root", [True, False])
def test_rows_of_zeros_stay_zero_and_have_gradients(in_root):
    hidden = torch.randn(4, 6, dtype=torch.float64)
    hidden[1] = 0.0
    hidden.requires_grad_()
    normed = simple_rms_norm(hidden, 1e-8, epsilon_in_root=in_root)
    assert torch.equal(normed[1], torch.zeros(6, dtype=torch.float64))
    (gradient,) = torch.autograd.grad((normed * torch.arange(6.0)).sum(), hidden)
    steep = 1e4 if in_root else 1e8
    assert_near(gradient[1] / steep, torch.arange(6, dtype=torch.float64))
    assert gradient.isfinite().all()


def test_a_denominator_has_unbounded_gradients():
    """Equal scores s of n tokens: the largest derivative of a weight is (1 - 1/n) / (n s); a softmax's is below 1/4."""
    for score in (1e-1, 1e-3, 1e-6):
        scores = torch.full((8,), score, dtype=torch.float64)
        slopes = torch.autograd.functional.jacobian(lambda s: s / s.sum(), scores).abs().max()
        assert slopes.item() == pytest.approx(7 / 8 / 8 / score, rel=1e-9)
        assert torch.autograd.functional.jacobian(lambda s: s.softmax(0), scores).abs().max() <= 1 / 4


def score_gradients(scores: Tensor, values: Tensor, upstream: Tensor, eps: float, in_root: bool) -> Tensor:
    """``dL / ds (n, n)`` where ``upstream`` is ``dL / dO`` and O the norm of ``s v``."""
    scores = scores.clone().requires_grad_()
    output = simple_rms_norm(scores @ values, eps, epsilon_in_root=in_root)
    return torch.autograd.grad(output, scores, upstream)[0].abs()


def test_the_norms_gradients_are_bounded():
    """With epsilon in the root by c1 c2 / sqrt(eps), a tighter one than the paper's; near zero it is met."""
    ratios = []
    for trial in range(300):
        scale = 10.0 ** -(trial % 5)
        scores, values, upstream = (torch.randn(*s, dtype=torch.float64) for s in ((5, 5), (5, 8), (5, 8)))
        found = score_gradients(scale * scores, values, upstream, 0.01, in_root=True)
        bound = upstream.norm(dim=1).max() * values.norm(dim=1).max() / 0.1
        ratios.append((found.max() / bound).item())
    assert 0.3 < max(ratios) <= 1 + 1e-12
    values = torch.randn(5, 8, dtype=torch.float64)
    met = score_gradients(torch.full((5, 5), 1e-9).double(), values, values, 0.01, in_root=True)
    assert (met.diagonal() / (values.square().sum(1) / 0.1)).min() > 0.999


def test_the_released_norms_gradients_are_bounded_by_the_size_of_a_row():
    """By ``|dO_i| |v_j| / (rms_i + eps)``: with epsilon at 1e-8, what bounds them is the root mean square."""
    ratios = []
    for trial in range(300):
        scores, values, upstream = (torch.randn(*s, dtype=torch.float64) for s in ((5, 5), (5, 8), (5, 8)))
        scores = scores * 10.0 ** -(trial % 5)
        rms = (scores @ values).square().mean(1).sqrt()
        bound = upstream.norm(dim=1, keepdim=True) * values.norm(dim=1) / (rms[:, None] + 1e-8)
        ratios.append((score_gradients(scores, values, upstream, 1e-8, in_root=False) / bound).max().item())
    assert 0.8 < max(ratios) <= 1 + 1e-12


@VARIANTS
@pytest.mark.parametrize("factor", [1e-4, 7.0, 1e4])
@pytest.mark.parametrize("what", ["values", "features"])
def test_the_scale_of_queries_keys_and_values_does_not_matter(monkeypatch, variant, factor, what):
    attention, hidden = small_model(variant=variant, norm_eps=1e-20).model.layers[-1].self_attn, torch.randn(2, 13, 16)
    context, hidden = ForwardContext(torch.arange(13)[None], counted=True), hidden.double()
    expected = attention(hidden, context)
    if what == "features":
        original = attention._features
        monkeypatch.setattr(attention, "_features", lambda heads: factor * original(heads))
    else:
        with torch.no_grad():
            attention.v_proj.weight.mul_(factor), attention.v_proj.bias.mul_(factor)
    assert_near(attention(hidden, context), expected, tolerance=1e-10)


@VARIANTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", ["published", "post-norm", "released decay"])
def test_no_token_sees_a_later_one(variant, dtype, options):
    """To the bit, through all layers, over the borders of blocks and of the linear layers' chunks."""
    model, (ids,) = small_model(variant=variant, **{**OPTIONS[options], "position_embedding": "none"}), random_rows(150)
    model, other = model.to(dtype), ids.clone()
    for place in (0, 4, 5, 63, 64, 100, 149):
        other[place] = 1
        with torch.no_grad():
            before, after = (model(row[None], use_cache=False).logits[0] for row in (ids, other))
        assert torch.equal(before[:place], after[:place])
        assert not torch.equal(before[place], after[place])
        other[place] = ids[place]


@VARIANTS
@WAYS
def test_tokens_of_other_blocks_change_no_block_layer(variant, causal):
    attention = small_model(variant=variant, causal=causal).model.layers[0].self_attn
    hidden, context = torch.randn(2, 13, 16, dtype=torch.float64), ForwardContext(torch.arange(13)[None], counted=True)
    before = attention(hidden, context)
    hidden[:, 7] += 1.0
    after = attention(hidden, context)
    same = [bool(torch.equal(before[:, token], after[:, token])) for token in range(13)]
    assert same == [not (7 <= token < 10 if causal else 5 <= token < 10) for token in range(13)]


def test_slopes_as_published():
    """Released: Lightning Attention's, to which MiniMax adds 1e-5 below; paper: exp(-(8h / H)(1 - l / L))."""
    config = small_config(num_hidden_layers=5, num_attention_heads=4, decay="released")
    settings = {"num_hidden_layers": 5, "num_attention_heads": 4, "hidden_size": 32, "num_key_value_heads": 4}
    for layer in range(5):
        minimax = MiniMaxLightningAttention(MiniMaxConfig(**settings, layer_types=["linear_attention"] * 5), layer)
        theirs = minimax.slope_rate.flatten().tolist()
        assert config.slopes(layer) == pytest.approx(theirs, abs=1e-5, rel=1e-5)
        exact = [2.0 ** (-2 * head) * (1 - layer / 4 + 1e-5) for head in (1, 2, 3, 4)]
        assert config.slopes(layer) == pytest.approx(exact, rel=1e-12)
        paper = small_config(num_hidden_layers=5, num_attention_heads=4, decay="paper").slopes(layer)
        expected = [math.exp(-(8 * head / 4) * (1 - layer / 5)) for head in (1, 2, 3, 4)]
        assert [math.exp(-slope) for slope in paper] == pytest.approx(expected, rel=1e-12)
    assert small_config(decay="none").slopes(1) is None


@VARIANTS
@pytest.mark.parametrize("head", [TransNormerForCausalLM, TransNormerForMaskedLM])
def test_checkpointing_changes_no_gradient(variant, head):
    """Nor, with batch norm, what is remembered of the batches, although layers run twice."""
    settings = {"causal": head is TransNormerForCausalLM, "norm": "batch", "hidden_dropout": 0.2}
    model, ids = small_model(head, variant=variant, **settings).train(), torch.stack(random_rows(13, 13))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    results = []
    for checkpointing in (False, True):
        model.load_state_dict(state)
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(5)
        model(ids, labels=ids).loss.backward()
        grads = {name: parameter.grad for name, parameter in model.named_parameters()}
        results.append((grads, {name: tensor.clone() for name, tensor in model.named_buffers()}))
    for plain, checkpointed in zip(*results, strict=True):
        assert {name for name in plain if not torch.equal(plain[name], checkpointed[name])} == set()
    assert any(isinstance(module, TokenBatchNorm) for module in model.modules())


@VARIANTS
def test_dropout_is_for_training_alone(variant):
    model, ids = (
        small_model(variant=variant, hidden_dropout=0.3, attention_dropout=0.3),
        torch.stack(random_rows(13, 13)),
    )
    with torch.no_grad():
        first, second = (model(ids, use_cache=False).logits for _ in range(2))
        noisy, other = (model.train()(ids, use_cache=False).logits for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(noisy, other) and not torch.equal(noisy, first)
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_engines_are_told_that_only_learnt_positions_end():
    assert TransNormerConfig(position_embedding="learned").model_max_length is None
    assert TransNormerConfig().model_max_length > 1 << 20 > TransNormerConfig().max_position_embeddings
    assert "model_max_length" not in TransNormerConfig().to_dict()
