"""TransNormer from its equations (arXiv 2210.10340), row by row under dense masks; it shares no code with kvtrain.

Rows are lists of tensors of any lengths, each of them one document, so that padding and packing do not exist here.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

import kvtrain
from kvtrain.models.transnormer.heads import TransNormerForCausalLM, TransNormerForMaskedLM
from kvtrain.models.transnormer.layers import TokenBatchNorm
from kvtrain.models.transnormer.model import TransNormerModel, TransNormerPreTrainedModel

Rows = list[Tensor]
VOCAB = 31


def small_config(**settings):
    """Three layers, one of them of blocks, without dropout."""
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "block_size": 5}
    return kvtrain.TransNormerConfig(**{**sizes, "hidden_dropout": 0.0, "max_position_embeddings": 64, **settings})


def small_model(head: type[TransNormerPreTrainedModel] | None = None, seed: int = 0, **settings):
    """A model in float64 whose angles, and batch norms if it has any, are not those that models begin with."""
    config = small_config(**settings)
    torch.manual_seed(seed)
    model = (head or (TransNormerForCausalLM if config.causal else TransNormerForMaskedLM))(config).double().eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("theta") and config.relative_position == "lrpe":
                tensor.mul_(1 + 0.3 * torch.rand_like(tensor))
            if name.endswith("reflection"):
                tensor.copy_(functional.normalize(tensor, dim=0))  # in float32 it is a unit vector to 1e-7 alone
        norms = [module for module in model.modules() if isinstance(module, TokenBatchNorm)]
        for norm in norms:
            norm.weight.copy_(0.5 + torch.rand_like(norm.weight))
            norm.bias.normal_()
        if norms:
            _warm(model.train(), norms)
    return model.eval()


def _warm(model, norms: list[TokenBatchNorm]) -> None:
    """Let batch norms remember a batch: with statistics of nothing, linear attention would grow without bounds."""
    decoder = model if isinstance(model, TransNormerModel) else model.model
    for norm in norms:
        norm.momentum = 1.0
    decoder(torch.stack(random_rows(20, 20, seed=9)), use_cache=False)
    for norm in norms:
        norm.momentum = 0.1
        norm.num_batches_tracked.zero_()


def random_rows(*lengths: int, seed: int = 0) -> Rows:
    """Token ids without 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, VOCAB, (length,), generator=generator) for length in lengths]


class Reference:
    """The decoder of a model.

    Args:
        model: Its configuration, weights and mode are taken over.

    Attributes:
        weights: Leaves by the names of ``TransNormerModel``; parameters ask for gradients.
    """

    def __init__(self, model: TransNormerPreTrainedModel) -> None:
        decoder = model if isinstance(model, TransNormerModel) else model.model
        self.config, self.training = model.config, model.training
        learnt = {name for name, _ in decoder.named_parameters()}
        self.weights = {
            name: tensor.detach().clone().requires_grad_(name in learnt)
            for name, tensor in decoder.state_dict().items()
        }

    def hidden(self, rows: Rows) -> Rows:
        """What leaves the stack: ``(T, D)`` for every row."""
        streams = [self._embed(ids) for ids in rows]
        for layer in range(self.config.num_hidden_layers):
            streams = self._part(streams, layer, "attention_norm", self._attention)
            streams = self._part(streams, layer, "mlp_norm", self._mlp)
        return self._norm(streams, "norm") if self.config.pre_norm else streams

    def logits(self, rows: Rows) -> Rows:
        """Of the next tokens, with the embedding as the head."""
        return [stream @ self.weights["embed_tokens.weight"].T for stream in self.hidden(rows)]

    def _embed(self, ids: Tensor) -> Tensor:
        config, positions = self.config, torch.arange(len(ids))
        stream = self.weights["embed_tokens.weight"][ids]
        if config.scale_embedding:
            stream = stream * math.sqrt(config.hidden_size)
        if config.position_embedding == "sinusoidal":
            half = config.hidden_size // 2
            angles = [[p * 10000.0 ** (-i / (half - 1)) for i in range(half)] for p in range(len(ids))]
            table = torch.tensor(angles, dtype=stream.dtype)
            stream = stream + torch.cat([table.sin(), table.cos()], 1)
        elif config.position_embedding == "learned":
            stream = stream + self.weights["embed_positions.weight"][positions]
        if config.embedding_norm:
            stream = stream - stream.mean(1, keepdim=True)
            stream = stream / (stream.square().mean(1, keepdim=True) + 1e-5).sqrt()
            stream = stream * self.weights["embed_norm.weight"] + self.weights["embed_norm.bias"]
        return stream

    def _part(self, streams: Rows, layer: int, norm: str, part) -> Rows:
        """A residual branch with its norm before or after it."""
        norm = f"layers.{layer}.{norm}"
        inputs = self._norm(streams, norm) if self.config.pre_norm else streams
        sums = [stream + branch for stream, branch in zip(streams, part(inputs, layer), strict=True)]
        return sums if self.config.pre_norm else self._norm(sums, norm)

    def _linear(self, stream: Tensor, name: str) -> Tensor:
        return stream @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def _norm(self, streams: Rows, name: str) -> Rows:
        if self.config.norm == "batch":
            return self._batch_norm(streams, name)
        size, eps = self.config.hidden_size, self.config.norm_eps
        if self.config.norm_eps_in_root:
            return [x / (x.square().mean(1, keepdim=True) + eps).sqrt() for x in streams]
        return [x / (x.norm(dim=1, keepdim=True) / math.sqrt(size) + eps) for x in streams]

    def _batch_norm(self, streams: Rows, name: str) -> Rows:
        everything = torch.cat(streams)
        mean, variance = everything.mean(0), everything.var(0, unbiased=False)
        if not self.training:
            mean, variance = self.weights[f"{name}.running_mean"], self.weights[f"{name}.running_var"]
        normed = (everything - mean) / (variance + 1e-5).sqrt()
        normed = normed * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]
        return list(normed.split([len(stream) for stream in streams]))

    def _mlp(self, streams: Rows, layer: int) -> Rows:
        return [self._feed_forward(stream, f"layers.{layer}.mlp") for stream in streams]

    def _feed_forward(self, stream: Tensor, name: str) -> Tensor:
        activate = {
            "silu": lambda x: x * x.sigmoid(),
            "gelu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
            "identity": lambda x: x,
        }[self.config.hidden_act]
        up = self._linear(stream, f"{name}.up_proj")
        inner = activate(self._linear(stream, f"{name}.gate_proj")) * up if self.config.gated_mlp else activate(up)
        return self._linear(inner, f"{name}.down_proj")

    def _attention(self, streams: Rows, layer: int) -> Rows:
        name = f"layers.{layer}.self_attn"
        blocks = layer < self.config.num_hidden_layers // 2
        attend = self._diag if blocks else self._linear_attention
        outputs = [attend(stream, layer, name) for stream in streams]
        if not blocks or self.config.variant == "T1":
            outputs = self._norm(outputs, f"{name}.norm")
        return [self._linear(output, f"{name}.o_proj") for output in outputs]

    def _project(self, stream: Tensor, name: str, heads: int) -> list[Tensor]:
        """Queries, keys and values ``(H, T, d)``."""
        parts = (self._linear(stream, f"{name}.{part}_proj") for part in "qkv")
        return [part.reshape(len(stream), heads, -1).transpose(0, 1) for part in parts]

    def _turn(self, heads: Tensor, positions: Tensor, name: str) -> Tensor:
        """LRPE: a reflection, then rotations of neighbouring channels; RoPE: the rotations alone."""
        theta = self.weights[f"{name}.relative_position.theta"]
        if self.config.relative_position == "lrpe":
            mirror = self.weights[f"{name}.relative_position.reflection"]
            heads = heads - 2 * (heads @ mirror)[..., None] * mirror
        cos, sin = (positions[:, None] * theta).cos(), (positions[:, None] * theta).sin()
        even, odd = heads[..., 0::2], heads[..., 1::2]
        return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)

    def _seen(self, length: int) -> Tensor:
        """``(T, T)`` what causality leaves."""
        positions = torch.arange(length)
        return (positions[:, None] >= positions) if self.config.causal else torch.ones(length, length).bool()

    def _diag(self, stream: Tensor, layer: int, name: str) -> Tensor:
        """Section 1.3."""
        positions, size = torch.arange(len(stream)), self.config.block_size
        query, key, value = self._project(stream, name, self.config.num_block_heads)
        query = query / math.sqrt(query.shape[-1])
        query, key = (self._turn(part, positions % size, name) for part in (query, key))
        scores = query @ key.transpose(1, 2)
        seen = self._seen(len(stream)) & (positions[:, None] // size == positions // size)
        if self.config.variant == "T1":
            weights = torch.where(seen, scores.clamp(min=0), torch.zeros_like(scores))
        else:
            weights = torch.softmax(scores.masked_fill(~seen, -math.inf), -1)
        return (weights @ value).transpose(0, 1).flatten(1)

    def _linear_attention(self, stream: Tensor, layer: int, name: str) -> Tensor:
        """Section 1.2."""
        positions = torch.arange(len(stream))
        query, key, value = self._project(stream, name, self.config.num_attention_heads)
        shift = 0 if self.config.variant == "T1" else 1
        query, key = (x.clamp(min=0) + x.clamp(max=0).exp() - 1 + shift for x in (query, key))
        query, key = (self._turn(part, positions, name) for part in (query, key))
        distance = (positions[:, None] - positions).abs()
        fading = torch.stack([torch.exp(-slope * distance.double()) for slope in self._slopes(layer)])
        weights = query @ key.transpose(1, 2) * fading * self._seen(len(stream))
        return (weights @ value).transpose(0, 1).flatten(1)

    def _slopes(self, layer: int) -> list[float]:
        heads, layers = self.config.num_attention_heads, self.config.num_hidden_layers
        if self.config.decay == "none":
            return [0.0] * heads
        if self.config.decay == "paper":
            return [8 * head / heads * (1 - layer / layers) for head in range(1, heads + 1)]
        return [2 ** (-8 * head / heads) * (1 - layer / (layers - 1) + 1e-5) for head in range(1, heads + 1)]


def loss_weights(rows: Rows, width: int) -> Rows:
    """A random linear loss for outputs ``(T, width)`` of rows: the same for the same place of the same row."""
    generator = torch.Generator().manual_seed(91)
    return [torch.randn(len(row), width, generator=generator, dtype=torch.float64) for row in rows]


def gradients(outputs: Rows, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of the random loss with respect to tensors that ask for them; zero where it does not depend on one."""
    chosen = loss_weights(outputs, outputs[0].shape[-1])
    loss = sum((output * weight).sum() for output, weight in zip(outputs, chosen, strict=True))
    leaves = {name: tensor for name, tensor in weights.items() if tensor.requires_grad}
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), found, strict=True)
    }


def assert_near(found: Tensor, expected: Tensor, name: str = "", tolerance: float = 1e-12) -> None:
    """Close, measured on the largest entry, and finite."""
    assert found.shape == expected.shape and bool(found.isfinite().all()), name
    distance = (found - expected).abs().max().item() if found.numel() else 0.0
    scale = max(1.0, expected.abs().max().item()) if found.numel() else 1.0
    assert distance <= tolerance * scale, f"{name}: {distance / scale:.1e}"


def assert_like_reference(model, found: Rows, rows: Rows, tolerance: float = 1e-12) -> None:
    """Hidden states of rows, and the gradients of every weight of the decoder, are the reference's."""
    reference = Reference(model)
    expected = reference.hidden(rows)
    for index, (mine, its) in enumerate(zip(found, expected, strict=True)):
        assert_near(mine, its, f"row {index}", tolerance)
    decoder = model if isinstance(model, TransNormerModel) else model.model
    ours, theirs = gradients(found, dict(decoder.named_parameters())), gradients(expected, reference.weights)
    assert ours.keys() == theirs.keys()
    for name, grad in theirs.items():
        assert_near(ours[name], grad, name, 10 * tolerance)
