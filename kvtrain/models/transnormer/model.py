"""TransNormer's stack of layers on the Hugging Face base classes."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.output_capturing import capture_outputs

from kvtrain.models.compat import with_cache
from kvtrain.models.context import ForwardContext, packed_documents, parallel_context
from kvtrain.models.transnormer.attention import DiagAttention, NormAttention, TokenLayout, TransNormerAttention
from kvtrain.models.transnormer.config import TransNormerConfig
from kvtrain.models.transnormer.layers import Projection, RelativePosition, TransNormerMLP, make_norm


class TransNormerLayer(GradientCheckpointingLayer):
    """Attention and feed-forward part, each with a norm before it or after it.

    Args:
        config: Of the model.
        layer_idx: Which layer this is; the first half attends within blocks.
    """

    def __init__(self, config: TransNormerConfig, layer_idx: int) -> None:
        super().__init__()
        kind = DiagAttention if layer_idx < config.num_block_layers else NormAttention
        self.pre_norm, self.dropout = config.pre_norm, config.hidden_dropout
        self.self_attn: TransNormerAttention = kind(config, layer_idx)
        self.mlp = TransNormerMLP(config)
        self.attention_norm, self.mlp_norm = make_norm(config), make_norm(config)

    def forward(self, hidden_states: Tensor, context: ForwardContext) -> Tensor:
        """Run ``(B, T, D)`` through the layer; the arguments are those of its attention."""
        real = TokenLayout.of(context, len(hidden_states)).real
        inputs = self.attention_norm(hidden_states, real) if self.pre_norm else hidden_states
        attended = self.self_attn(inputs, context)
        hidden_states = hidden_states + self._drop(attended)
        if not self.pre_norm:
            hidden_states = self.attention_norm(hidden_states, real)
        inputs = self.mlp_norm(hidden_states, real) if self.pre_norm else hidden_states
        hidden_states = hidden_states + self._drop(self.mlp(inputs))
        return hidden_states if self.pre_norm else self.mlp_norm(hidden_states, real)

    def _drop(self, hidden_states: Tensor) -> Tensor:
        return functional.dropout(hidden_states, self.dropout, self.training)


class TransNormerPreTrainedModel(PreTrainedModel):
    """What all TransNormers share: how weights begin, and what half precision would spoil."""

    config: TransNormerConfig
    config_class = TransNormerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TransNormerLayer"]  # noqa: RUF012
    _can_record_outputs = {"hidden_states": TransNormerLayer}  # noqa: RUF012
    # In bfloat16 an angle is off by 1/500: half a turn after 800 tokens.
    _keep_in_fp32_modules_strict = {"relative_position"}  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As published (the specification's table of initial values)."""
        if isinstance(module, RelativePosition):
            fresh = RelativePosition(module.head_dim, module.learned)
            fresh.reset_parameters()
            init.copy_(module.theta, fresh.theta.to(module.theta))
            if module.reflection is not None and fresh.reflection is not None:
                init.copy_(module.reflection, fresh.reflection.to(module.reflection))
        elif isinstance(module, nn.Linear | nn.Embedding) and self.config.initialization == "normal":
            init.normal_(module.weight, std=self.config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=self.config.hidden_size**-0.5)
            if self.config.pad_token_id is not None and not getattr(module.weight, "_is_hf_initialized", False):
                init.zeros_(module.weight[self.config.pad_token_id])
        elif isinstance(module, nn.Linear):
            _like_torch(module)
            if isinstance(module, Projection):
                init.xavier_uniform_(module.weight, gain=module.gain)
            if isinstance(module, Projection) and module.zero_bias:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm | nn.BatchNorm1d):
            super()._init_weights(module)  # type: ignore[no-untyped-call]


def _like_torch(linear: nn.Linear) -> None:
    """Torch's own initial values."""
    bound = linear.in_features**-0.5
    init.uniform_(linear.weight, -bound, bound)
    if linear.bias is not None:
        init.uniform_(linear.bias, -bound, bound)


class TransNormerModel(TransNormerPreTrainedModel):
    """The stack without a head."""

    def __init__(self, config: TransNormerConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        if config.position_embedding == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, width)
        self.embed_norm = nn.LayerNorm(width) if config.embedding_norm else None
        self.layers = nn.ModuleList(TransNormerLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = make_norm(config) if config.pre_norm else None
        self.gradient_checkpointing = False
        self.post_init()  # type: ignore[no-untyped-call]

    @capture_outputs  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        document_ids: Tensor | None = None,
        context: ForwardContext | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPast:
        """Run tokens through the stack.

        Args:
            input_ids: ``(B, T)``.
            attention_mask: ``(B, T)`` padding mask; each row's tokens stand side by side.
            position_ids: ``(B, T)``; derived from documents or padding where absent. Blocks follow them.
            inputs_embeds: ``(B, T, hidden)`` in place of ``input_ids``.
            document_ids: ``(B, T)`` packed documents, 0 for padding.
            context: Of the pass, where somebody has made it; then it alone says what belongs together.

        Raises:
            ValueError: A row's tokens are not side by side, or a position is beyond the learnt ones.
        """
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if context is None:
            kwargs = {"attention_mask": attention_mask, "position_ids": position_ids, "document_ids": document_ids}
            kwargs["inputs_embeds"] = hidden
            context = parallel_context(kwargs, packed_documents(kwargs))
        layout = TokenLayout.of(context, len(hidden))
        hidden = self._embed(hidden, layout)
        for layer in self.layers:
            hidden = layer(hidden, context)
        if self.norm is not None:
            hidden = self.norm(hidden, layout.real)
        return with_cache(BaseModelOutputWithPast(last_hidden_state=hidden), context.cache)

    def _embed(self, tokens: Tensor, layout: TokenLayout) -> Tensor:
        """Scale ``(B, T, D)``, add absolute positions, normalize."""
        config = self.config
        if config.scale_embedding:
            tokens = tokens * config.hidden_size**0.5
        if config.position_embedding == "sinusoidal":
            tokens = tokens + _sinusoids(layout.position_ids, config.hidden_size, tokens.dtype)
        elif config.position_embedding == "learned":
            tokens = tokens + self.embed_positions(self._learned_positions(layout))
        if self.embed_norm is not None:
            tokens = self.embed_norm(tokens)
        return functional.dropout(tokens, config.hidden_dropout, self.training)

    def _learned_positions(self, layout: TokenLayout) -> Tensor:
        """Positions ``(B, T)`` of real tokens, 0 for padding."""
        limit, positions = self.config.max_position_embeddings, layout.position_ids
        if layout.real is not None:
            positions = positions.where(layout.real, 0)
        # Positions within rows that are short enough: a question to the device would hold up every step of training.
        surely = positions.shape[1] <= limit and (layout.aligned or self.training)
        if not surely and bool((positions >= limit).any()):
            raise ValueError(
                f"the model has learnt {limit} positions; shorten the input, or use sinusoidal ones from the start"
            )
        return positions


def _sinusoids(position_ids: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Absolute positions ``(B, T, width)``: sines in the first half, cosines in the second (Vaswani et al. 2017)."""
    half = width // 2
    steps = torch.arange(half, dtype=torch.float64, device=position_ids.device) * (math.log(10000.0) / max(1, half - 1))
    angles = (position_ids.double()[..., None] * torch.exp(-steps)).remainder(2 * math.pi)
    return torch.cat([angles.sin(), angles.cos()], -1).to(dtype)
