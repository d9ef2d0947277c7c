"""What heads see in a forward pass without a cache: everything, a window, or a mixture."""

from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from kvtrain.kernels.attention import attention
from kvtrain.kernels.attention_mixed import mixed_attention, window_attention
from kvtrain.kernels.compensation import add_compensation, dropped_by_window
from kvtrain.kernels.dispatch import at_least_float32
from kvtrain.kernels.documents import Documents
from kvtrain.models.context import ForwardContext
from kvtrain.models.duo.config import Duo


class AttentionPatterns(NamedTuple):
    """Who sees whom in a forward pass without a cache.

    Attributes:
        settings: The method.
        documents: Of the tokens, or None where every row is one.
        position_ids: ``(B or 1, T)`` places within each document.
        scale: Factor on the scores.
    """

    settings: Duo
    documents: Documents | None
    position_ids: Tensor
    scale: float

    @classmethod
    def of(cls, settings: Duo, scale: float, context: ForwardContext) -> Self:
        """Who sees whom in this pass."""
        return cls(settings, context.documents, context.positions, scale)

    def full(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """All tokens before: output ``(B, H, T, D)`` and log-sum-exp ``(B, H, T)``."""
        return attention(query, key, value, documents=self.documents, scale=self.scale)

    def streaming(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The first tokens and the latest ones, and where it is so set one that stands for all others; as ``full``."""
        local = window_attention(query, key, value, scale=self.scale, **self._window())
        if not self.settings.compensation:
            return local
        return add_compensation(local, query, dropped_by_window(key, value, **self._window()), self.scale)

    def mixed(self, query: Tensor, key: Tensor, value: Tensor, gates: Tensor) -> Tensor:
        """Both outputs, by ``gates (H_kv,)``, for less than each of them; it knows no compensation."""
        return mixed_attention(query, key, value, gates, scale=self.scale, **self._window())

    def _window(self) -> dict[str, Any]:
        return {
            "window": self.settings.recent,
            "sink": self.settings.sink,
            "position_ids": self.position_ids,
            "documents": self.documents,
        }


def mix_heads(streaming: Tensor, full: Tensor, gates: Tensor) -> Tensor:
    """``(1 - gate) * streaming + gate * full`` of ``(B, H, T, D)``, by ``gates (H_kv,)``."""
    local, remote = at_least_float32(streaming), at_least_float32(full)
    share = gates.repeat_interleave(local.shape[1] // len(gates))[:, None, None].to(local.dtype)
    return torch.lerp(local, remote, share).to(streaming.dtype)
