"""Layers of a host that see a window of latest tokens alone: they stay as they are, whatever the method does elsewhere.

A method makes the attention and the cache of layers that see everything; the others come from here.
"""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig

from kvtrain.cache.layer import KVCacheLayer
from kvtrain.cache.rows import Placement, bookkeeping
from kvtrain.kernels.attention import attention
from kvtrain.kernels.quantization import read_back
from kvtrain.models.attention import Angles, HostAttention
from kvtrain.models.build import Builder
from kvtrain.models.context import ForwardContext
from kvtrain.models.hosts import host_adapter, key_value_shape, whole_layers, windows
from kvtrain.models.method import Method
from kvtrain.models.streaming_cache import StreamingCacheLayer
from kvtrain.models.windows import attend_cache_and_window

_GUESSES = 64  # tokens that assisted decoding may take back
_PAGE_SIZE = 32  # where a method's settings have none


class SlidingAttention(HostAttention):
    """The host's attention over the latest tokens of a document, the current one included.

    Args:
        host_attention: The module to replace.
        layer_idx: Its layer.
        window: So many tokens.
        bits: Of a channel, in which every key and value is kept and read, by its own token too; None: as they are.
    """

    def __init__(self, host_attention: nn.Module, layer_idx: int, window: int, bits: int | None = None) -> None:
        super().__init__(host_attention, layer_idx)
        self.window, self.bits = window, bits

    def mixing_flops(self, sequence_length: int) -> int:
        """See ``HostAttention``; rows longer than the window see it alone."""
        seen = min(sequence_length, self.window)
        return 2 * 2 * self.num_heads * self.head_dim * seen * (2 * sequence_length - seen) // (2 * sequence_length)

    def forward(
        self, hidden_states: Tensor, position_embeddings: Angles, context: ForwardContext, **_: Any
    ) -> tuple[Tensor, None]:
        """See ``HostAttention``."""
        query, key, value = self.project(hidden_states, position_embeddings, context.parallel)
        if context.cache is None:
            bits = None if self.training else self.bits
            key, value = read_back(key, bits), read_back(value, bits)
            documents = context.documents
            attended = attention(query, key, value, window=self.window, documents=documents, scale=self.scaling)
        else:
            layer = context.cache_layer(self.layer_idx)
            assert isinstance(layer, StreamingCacheLayer)
            attended = self._serve(query, key, value, context, layer)
        output = self.with_sinks(attended, context.parallel)[0]
        return self.project_out(output, context.parallel), None

    @bookkeeping
    def _serve(
        self, query: Tensor, key: Tensor, value: Tensor, context: ForwardContext, layer: StreamingCacheLayer
    ) -> tuple[Tensor, Tensor]:
        """New tokens, one or many, over those before them that are in their windows."""
        assert context.cache is not None and context.valid is not None
        past, valid = context.cache.tokens.to(query.device), context.valid
        layer.drop(key, value, past, valid)
        if query.shape[2] == 1:
            layer.write(key, value, past, None if context.single else valid)
            return self.attend_pages(query, layer.pages)
        new = read_back(key, self.bits), read_back(value, self.bits)
        held = layer.window(past)
        attended = attend_cache_and_window(query, new, held, valid, window=self.window, scale=self.scaling)
        layer.write(key, value, past, valid)
        return attended


def layer_attention(parts: Builder[Any], host_attention: nn.Module, layer_idx: int) -> nn.Module:
    """What takes the place of a layer's attention: the method's, or the host's own window."""
    config = parts.host_config
    window = None if parts.settings.marks_windows else host_adapter(config).window(config, layer_idx)
    if window is None:
        return parts.attention(host_attention, layer_idx)
    return SlidingAttention(host_attention, layer_idx, window, _bits(parts))


def cache_layers(
    parts: Builder[Any], placements: list[Placement], page_size: int | None = None, slack: int = 0, **options: Any
) -> list[KVCacheLayer]:
    """An empty cache layer for every layer of a model.

    Args:
        parts: Of the method.
        placements: Where the tensors of each layer lie.
        page_size: Slots in a page; those of the settings where absent.
        slack: Tokens that ``rollback`` may take back although windows have dropped others for them.
        **options: Of ``make_cache``, for methods that have some.

    Raises:
        ValueError: ``slack`` is negative, the method has no such option, or there is a page without a slot.
    """
    if slack < 0:
        raise ValueError(f"slack is a number of tokens that can be taken back, 0 or more, not {slack}")
    sliding = _windows(parts.settings, parts.host_config)
    if slack and not (sliding and parts.settings.assisted_options() == {}):  # whose own layers need none
        options["slack"] = slack
    whole = {layer: placement for layer, placement in enumerate(placements) if layer not in sliding}
    layers = parts.cache_layers(whole, page_size=page_size, **options) if whole else {}
    size = page_size if page_size is not None else int(getattr(parts.settings, "page_size", _PAGE_SIZE))
    for layer, window in sliding.items():
        shape, placement = key_value_shape(parts.host_config, layer), placements[layer]
        layers[layer] = StreamingCacheLayer(0, *shape, 0, window, placement, size, slack=slack, bits=_bits(parts))
    return [layers[layer] for layer in range(len(placements))]


def assisted_options(settings: Method, host_config: PreTrainedConfig) -> dict[str, Any] | None:
    """See ``Method.assisted_options``; windows, too, take tokens back."""
    options = settings.assisted_options()
    return {"slack": _GUESSES, **options} if options is not None and _windows(settings, host_config) else options


def check_windows(settings: Method, host_config: PreTrainedConfig) -> None:
    """Refuse a method that would find nothing to act on.

    Raises:
        ValueError: Every layer of the host slides, and the method leaves such layers alone.
    """
    if _windows(settings, host_config) and not whole_layers(host_config) and not settings.trains_as_host:
        raise ValueError(
            f"every layer of this host sees a window of {host_config.sliding_window} tokens, and method "
            f"{settings.name!r} acts on layers that see everything; set sliding_window=None, or use kvtrain.Full()"
        )


def _windows(settings: Method, host_config: PreTrainedConfig) -> dict[int, int]:
    return {} if settings.marks_windows else windows(host_config)


def _bits(parts: Builder[Any]) -> int | None:
    """Of a channel, where a method keeps its own layers in so many."""
    return getattr(parts.settings, "kv_bits", None)
