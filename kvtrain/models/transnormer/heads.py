"""TransNormers with a head: next tokens, masked tokens, classes."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import MaskedLMOutput, SequenceClassifierOutput

from kvtrain.cache.layer import KVCacheLayer
from kvtrain.cache.rows import Placement
from kvtrain.kernels.cross_entropy import IGNORE_INDEX
from kvtrain.kernels.dispatch import at_least_float32
from kvtrain.models.language_model import CachedLanguageModel
from kvtrain.models.transnormer.cache import cache_layers
from kvtrain.models.transnormer.config import TransNormerConfig
from kvtrain.models.transnormer.model import TransNormerModel, TransNormerPreTrainedModel


class TransNormerForCausalLM(CachedLanguageModel, TransNormerPreTrainedModel, GenerationMixin):
    """Predicts the next token; generates with a cache that does not grow."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: TransNormerConfig) -> None:
        if not config.causal:
            raise ValueError("a causal language model sees no later tokens; set causal=True")
        super().__init__(config)
        self.model = TransNormerModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.watch_decoder()
        self.post_init()  # type: ignore[no-untyped-call]

    @property
    def max_positions(self) -> int | None:
        """See ``CachedLanguageModel``; learnt positions are as many as there are."""
        return self.config.max_position_embeddings if self.config.position_embedding == "learned" else None

    def cache_layers(self, placements: list[Placement], **options: Any) -> list[KVCacheLayer]:
        """See ``CachedLanguageModel``."""
        if options:
            raise ValueError(f"TransNormer's caches have no option {next(iter(options))!r}; leave it out")
        return cache_layers(self.config, placements)


class TransNormerForMaskedLM(TransNormerPreTrainedModel):
    """Predicts masked tokens, with RoBERTa's head: a layer, GELU, a norm, and the embedding's transpose with a bias."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: TransNormerConfig) -> None:
        if config.causal:
            raise ValueError("a masked language model sees all tokens; set causal=False")
        super().__init__(config)
        self.model = TransNormerModel(config)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dense_norm = nn.LayerNorm(config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self,
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        skip_logits: bool | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """Run tokens through the model.

        Args:
            input_ids: ``(B, T)``.
            labels: ``(B, T)``, each at its own place; ``-100`` counts nothing.
            num_items_in_batch: The summed loss is divided by it; the number of targets where absent.
            skip_logits: Give the loss alone; on while training, where there are labels.
            **kwargs: As for ``TransNormerModel``.
        """
        decoded = self.model(input_ids, **kwargs)
        hidden, loss = decoded.last_hidden_state, None
        if labels is not None:
            targets = (labels.flatten() != IGNORE_INDEX).nonzero()[:, 0]  # few: no logits for the others
            logits = at_least_float32(self._logits(hidden.flatten(0, 1)[targets]))
            total = functional.cross_entropy(logits, labels.flatten()[targets], reduction="sum")
            loss = total / (max(1, len(targets)) if num_items_in_batch is None else num_items_in_batch)
        skip_logits = labels is not None and self.training if skip_logits is None else skip_logits
        return MaskedLMOutput(
            loss=loss, logits=None if skip_logits else self._logits(hidden), hidden_states=decoded.hidden_states
        )

    def _logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(self.dense_norm(functional.gelu(self.dense(hidden))))
        return logits


class TransNormerForSequenceClassification(TransNormerPreTrainedModel):
    """Names a row's class, from the mean over its tokens or from its first one."""

    def __init__(self, config: TransNormerConfig) -> None:
        super().__init__(config)
        self.model = TransNormerModel(config)
        assert config.num_labels is not None
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Run rows through the model.

        Args:
            input_ids: ``(B, T)``.
            attention_mask: ``(B, T)`` padding mask.
            labels: ``(B,)`` classes; ``-100`` counts nothing.
            num_items_in_batch: The summed loss is divided by it; the number of labels where absent.
            **kwargs: As for ``TransNormerModel``.
        """
        decoded = self.model(input_ids, attention_mask=attention_mask, **kwargs)
        logits, loss = self.classifier(self._pool(decoded.last_hidden_state, attention_mask)), None
        if labels is not None:
            wide = at_least_float32(logits)
            total = functional.cross_entropy(wide, labels, ignore_index=IGNORE_INDEX, reduction="sum")
            count = (labels != IGNORE_INDEX).sum().clamp(min=1)
            loss = total / (count if num_items_in_batch is None else num_items_in_batch)
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=decoded.hidden_states)

    def _pool(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """``(B, D)`` from ``(B, T, D)``."""
        wide = at_least_float32(hidden)
        real = torch.ones_like(wide[..., :1]) if mask is None else (mask > 0)[..., None].to(wide.dtype)
        if self.config.pooling == "first":
            return hidden[torch.arange(len(hidden), device=hidden.device), real[..., 0].argmax(1)]
        return ((real * wide).sum(1) / real.sum(1).clamp(min=1)).to(hidden.dtype)
