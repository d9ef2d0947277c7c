"""Models of our own whose cache does not grow: they run as they are, over caches whose rows lie in vLLM's pages."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import HasInnerState, IsAttentionFree
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper

from kvtrain.cache.base import KVCache
from kvtrain.inference.vllm.state_layout import cache_layout, model_layout
from kvtrain.inference.vllm.state_pages import Requests, StatePages
from kvtrain.models.registry import own_model_class

_STATE = "model.layers.0.state"  # vLLM wants the number of a layer in every name


class OwnModel(nn.Module, HasInnerState, IsAttentionFree):
    """One of our models; all layers' states are one page a request.

    Args:
        vllm_config: vLLM's.
        prefix: Of names; unused.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config, self.max_tokens = vllm_config.model_config.hf_config, vllm_config.model_config.max_model_len
        self.model = own_model_class(config)(config).eval().requires_grad_(False)
        self.model.tie_weights()
        _keep_wide(self.model)
        self.cache: KVCache = self.model.make_cache()
        self.state = StatePages(cache_layout(self.cache), _STATE)

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, ...], ...]:
        """See vLLM's ``IsHybrid``."""
        model = vllm_config.model_config
        return ((model_layout(model.hf_config, model.dtype).piece_bytes,),)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        """See vLLM's ``IsHybrid``."""
        return (torch.uint8,)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """See vLLM's."""
        embedded: Tensor = self.model.model.embed_tokens(input_ids)
        return embedded

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """Hidden states ``(T, D)`` of a step's tokens ``(T,)``, whose positions the cache knows."""
        embedded = inputs_embeds
        if embedded is None:
            assert input_ids is not None
            embedded = self.embed_input_ids(input_ids)
        output = torch.empty_like(embedded)

        def decode(requests: Requests) -> Tensor:
            return self._decode(embedded[requests.tokens], past_key_values=self.cache)

        if not self.state.run(decode, output):
            rows = embedded.split(self.max_tokens)
            output = torch.cat([self._decode(row[None])[0] for row in rows])
        return output

    def _decode(self, embedded: Tensor, **cache: Any) -> Tensor:
        decoded: Tensor = self.model.model(inputs_embeds=embedded, **cache).last_hidden_state
        return decoded

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """See vLLM's."""
        logits: Tensor = self.model.lm_head(hidden_states)
        return logits

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """See vLLM's; a folder's names are those of the model."""
        loaded: set[str] = AutoWeightsLoader(self).load_weights(
            weights, mapper=WeightsMapper(orig_to_new_prefix={"": "model."})
        )
        return loaded


def _keep_wide(model: nn.Module) -> None:
    """Modules that half precision would spoil stay in float32, as where transformers loads them."""
    wide = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in wide:
            module.float()
