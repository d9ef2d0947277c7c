"""Modules and caches of DuoAttention, and the rounding of its gates."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from kvtrain.cache.layer import KVCacheLayer
from kvtrain.cache.rows import Placement
from kvtrain.models import build
from kvtrain.models.attention import HostAttention
from kvtrain.models.duo.attention import GatedAttention, RoundedAttention
from kvtrain.models.duo.config import Duo
from kvtrain.models.duo.convert import adapt_state, round_gates, round_state
from kvtrain.models.hosts import key_value_shape
from kvtrain.models.streaming_cache import StreamingCacheLayer


def binarize(model: Any, sparsity: float | None = None, gates: Tensor | None = None) -> Any:
    """Round the gates of a model in place; it has a cache from now on.

    Args:
        model: A model with gates.
        sparsity: Share of streaming heads; the method's own where absent.
        gates: ``(layers, H_kv)`` to round in place of the model's own.

    Returns:
        The model.

    Raises:
        ValueError: The gates are rounded already, or ``gates`` does not fit the model.
    """
    round_gates(model, model.method, model.method.sparsity if sparsity is None else sparsity, gates)
    return model


def _as_spelt_before(model: Any, *args: Any, **kwargs: Any) -> Any:
    """``binarize`` as version 0.1 spelt it."""
    warnings.warn("binarise() is now binarize(); the old name goes with version 0.3", FutureWarning, stacklevel=2)
    return binarize(model, *args, **kwargs)


class Builder(build.Builder[Duo]):
    """See ``build.Builder``."""

    model_functions: ClassVar[Mapping[str, Callable[..., Any]]] = {"binarize": binarize, "binarise": _as_spelt_before}

    def attention(self, host_attention: nn.Module, layer_idx: int) -> HostAttention:
        """See ``build.Builder``."""
        chosen = GatedAttention if self.settings.full_heads is None else RoundedAttention
        return chosen(host_attention, layer_idx, self.settings)

    def cache_layers(
        self, placements: Mapping[int, Placement], page_size: int | None = None, slack: int = 0, **options: Any
    ) -> dict[int, KVCacheLayer]:
        """See ``build.Builder``.

        Args:
            placements: Where the tensors of each layer lie.
            page_size: Slots in a page; those of the settings where absent.
            slack: Tokens that ``rollback`` may take back although streaming heads have dropped others for them.
            **options: Refused.

        Raises:
            ValueError: There is another option or no slot in a page, or the gates are not rounded.
        """
        self.refuse_options(options)
        sized = self.with_page_size(page_size)
        return {layer: sized.cache_layer(layer, placement, slack) for layer, placement in placements.items()}

    def cache_layer(self, layer_idx: int, placement: Placement, slack: int = 0) -> StreamingCacheLayer:
        """See ``build.Builder``; ``slack`` as in ``cache_layers``.

        Raises:
            ValueError: The gates are not rounded.
        """
        settings = self.settings
        if settings.full_heads is None:
            raise ValueError(
                "gates are fractions yet, and no cache fits them; round them with model.binarize(sparsity) "
                "(kvtrain export does), or pass use_cache=False"
            )
        heads, head_dim = key_value_shape(self.host_config, layer_idx)
        shape = (len(settings.full_heads[layer_idx]), heads, head_dim, settings.sink, settings.recent)
        return StreamingCacheLayer(
            *shape, placement, settings.page_size, settings.compensation, slack, settings.kv_bits
        )

    def adapt_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """See ``build.Builder``."""
        return adapt_state(self.settings, state, self.host_config)

    def deploy(self, weights: Mapping[str, Tensor]) -> tuple[Duo, Mapping[str, Tensor]]:
        """See ``build.Builder``: rounds what is not rounded yet."""
        return round_state(self.settings, weights, self.host_config)
