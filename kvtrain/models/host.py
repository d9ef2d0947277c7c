"""The surgery: a Hugging Face decoder keeps its class, its names and its weights, and gets other modules."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from kvtrain.cache.base import KVCacheLayer
from kvtrain.cache.rows import Placement
from kvtrain.models.build import Builder
from kvtrain.models.config import KVTrainConfig
from kvtrain.models.hosts import host_adapter, retrofitted_name, retrofitted_names
from kvtrain.models.hosts.base import PROJECTIONS, HostAdapter
from kvtrain.models.language_model import CachedLanguageModel, check_attention
from kvtrain.models.method import Method
from kvtrain.models.modules import GatedMLP, RMSNorm, RotaryEmbedding
from kvtrain.models.registry import builder

ATTENTION_NAME = "kvtrain"


def _padding_mask(*_: Any, attention_mask: Tensor | None = None, **__: Any) -> Tensor | None:
    """Hand the 2-D padding mask through: per-head lengths leave no common length to compare it with."""
    return attention_mask


def _never_called(*_: Any, **__: Any) -> None:
    raise AssertionError("kvtrain attention modules do not go through the attention interface")


AttentionMaskInterface.register(ATTENTION_NAME, _padding_mask)
AttentionInterface.register(ATTENTION_NAME, _never_called)


def retrofit(host: PreTrainedModel, method: Method) -> PreTrainedModel:
    """Put a method into a decoder. The weights are shared with the host, which stays as it was.

    Args:
        host: A causal language model of a supported family.
        method: ``kvtrain.DMC(...)``, ``kvtrain.Full()``, ...

    Returns:
        A model of a subclass of the host's class, with the same parameter names.

    Raises:
        ValueError: The host is of no supported family, or uses something the method cannot honour.
    """
    _check_host(host)
    host_config: PreTrainedConfig = type(host.config).from_dict(host.config.to_dict())
    config = KVTrainConfig(text_config=host_config, method_config=method.to_dict(), dtype=host.dtype)
    with torch.device("meta"):
        model = retrofitted_class(host_config)(config)
    plain = host.state_dict(keep_vars=True)
    adapted = builder(method, host_config).adapt_state(plain)
    state = {name: tensor.to(plain[name].dtype) if name in plain else tensor for name, tensor in adapted.items()}
    model.load_state_dict(state, assign=True)
    buffers = dict(host.named_buffers())
    for name, module in model.named_modules():
        for key in module._non_persistent_buffers_set:
            source = buffers[f"{name}.{key}"] if name else buffers[key]
            module.register_buffer(key, source.clone(), persistent=False)
    model.tie_weights()
    model.generation_config = host.generation_config
    model.train(host.training)
    return model


def _check_host(host: Any) -> None:
    """Refuse what is no plain decoder.

    Raises:
        ValueError: With the remedy.
    """
    is_model = isinstance(host, PreTrainedModel)
    if hasattr(host, "merge_and_unload") or (is_model and ".base_layer." in " ".join(host.state_dict())):
        raise ValueError("this model has adapters; retrofit what merge_and_unload() of its peft.PeftModel returns")
    if not is_model:
        raise ValueError(f"a host is a transformers model with a language-model head, not a {type(host).__name__}")
    if isinstance(host.config, KVTrainConfig):
        raise ValueError("this model is retrofitted already; retrofit its host, or load it with kvtrain.load")


@functools.cache
def _subclass(host_class: type[PreTrainedModel]) -> type["KVTrainMixin"]:
    name = retrofitted_name(host_class.__name__)
    return type(name, (KVTrainMixin, host_class), {"config_class": KVTrainConfig})


def __getattr__(name: str) -> Any:
    """The retrofitted classes are made at first use; ``pickle`` and ``import`` find them here by their names."""
    for host, retrofitted in retrofitted_names().items():
        if name == retrofitted:
            return _subclass(AutoModelForCausalLM._model_mapping[CONFIG_MAPPING[host]])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def retrofitted_class(host_config: PreTrainedConfig) -> type["KVTrainMixin"]:
    """The class for hosts of this configuration, a subclass of the host's own.

    Raises:
        ValueError: Unknown family.
    """
    host_adapter(host_config)
    return _subclass(AutoModelForCausalLM._model_mapping[type(host_config)])


def _replace_modules(model: PreTrainedModel, parts: Builder[Any]) -> None:
    """Replace norms, feed-forward parts, rotary embedding and attention of a freshly built host, in place."""
    decoder: Any = model.model
    adapter = host_adapter(parts.host_config)
    _replace(decoder, adapter.final_norm, RMSNorm)
    decoder.rotary_emb = RotaryEmbedding(decoder.rotary_emb)
    for layer_idx, layer in enumerate(decoder.layers):
        attention = getattr(layer, adapter.attention)
        _check_parts(attention, layer_idx, adapter)
        for norm in adapter.attention_norms:
            _replace(attention, norm, RMSNorm)
        for norm in adapter.norms:
            _replace(layer, norm, RMSNorm)
        _replace(layer, adapter.mlp, GatedMLP)
        setattr(layer, adapter.attention, parts.attention(attention, layer_idx))
    decoder.layers = parts.layers(decoder.layers, decoder.rotary_emb)


def _replace(parent: nn.Module, name: str, replacement: type[nn.Module]) -> None:
    setattr(parent, name, replacement(getattr(parent, name)))


def _check_parts(attention: nn.Module, layer_idx: int, adapter: HostAdapter) -> None:
    """Refuse an attention that does more, or less, than its family's adapter says."""
    parts = sorted(dict(attention.named_children()))
    if parts != sorted((*PROJECTIONS, *adapter.attention_norms)):
        raise ValueError(f"layer {layer_idx} has an attention of unknown parts: {', '.join(parts)}")


class KVTrainMixin(CachedLanguageModel):
    """What a retrofitted model can do that its host cannot; mixed in before the host's class."""

    config: KVTrainConfig
    # The host's attention is gone, and with it the choice of another one; trainers and suites ask for these.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = False

    def __init__(self, config: KVTrainConfig) -> None:
        host_config, method = config.host_config, config.method
        host_adapter(host_config).validate(host_config)
        method.validate(host_config)
        check_attention(config._attn_implementation, ATTENTION_NAME)
        config._attn_implementation = host_config._attn_implementation = ATTENTION_NAME
        super().__init__(host_config)
        _replace_modules(self, builder(method, host_config))
        self.config = config
        self.name_or_path = config.name_or_path  # not the host's: adapters write down what they were trained on
        config.architectures = [type(self).__name__]
        self.method = method
        self.watch_decoder()
        if config.__dict__.pop("gradient_checkpointing", False):  # an old way to ask for it, which Trainer still knows
            self.gradient_checkpointing_enable()

    def cache_layers(self, placements: list[Placement], **options: Any) -> list[KVCacheLayer]:
        """See ``CachedLanguageModel``; the method's."""
        return self.builder.cache_layers(placements, **options)

    @property
    def builder(self) -> Builder[Any]:
        """What makes this model's modules and caches."""
        return builder(self.method, self.config.host_config)

    def assisted_options(self) -> dict[str, Any] | None:
        """See ``CachedLanguageModel``; the method's."""
        return self.method.assisted_options()

    @property
    def servable(self) -> bool:
        """See ``CachedLanguageModel``."""
        return self.method.servable

    @property
    def survives_reentrant_checkpointing(self) -> bool:
        """See ``CachedLanguageModel``; the method's."""
        return self.method.survives_reentrant_checkpointing

    def recorded_states(self) -> Sequence[int] | None:
        """See ``CachedLanguageModel``; the method's."""
        return self.method.recorded_states(self.config.host_config)

    def __getattr__(self, name: str) -> Any:
        """What the method's ``Builder`` gives its models besides, such as ``binarize``."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            function = self.builder.model_functions.get(name) if "method" in self.__dict__ else None
            if function is None:
                raise
            return functools.partial(function, self)
