"""The surgery: a Hugging Face decoder keeps its class, its names and its weights, and gets other modules."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from kvtrain.cache.layer import KVCacheLayer
from kvtrain.cache.rows import Placement
from kvtrain.models.build import Builder
from kvtrain.models.config import KVTrainConfig
from kvtrain.models.experts import EXPERTS_NAME
from kvtrain.models.hosts import host_adapter, retrofitted_name, retrofitted_names
from kvtrain.models.hosts.base import HostAdapter
from kvtrain.models.language_model import CachedLanguageModel, check_attention
from kvtrain.models.method import Method
from kvtrain.models.registry import builder
from kvtrain.models.sliding import assisted_options, cache_layers, check_windows, layer_attention

ATTENTION_NAME = "kvtrain"


def _no_mask(*_: Any, **__: Any) -> None:
    """What takes the place of the host's mask: who sees whom is in the ``ForwardContext``."""


def _never_called(*_: Any, **__: Any) -> None:
    raise AssertionError("kvtrain attention modules do not go through the attention interface")


AttentionMaskInterface.register(ATTENTION_NAME, _no_mask)
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
    if host.config._experts_implementation != "grouped_mm":  # which is chosen where nobody chose
        host_config._experts_implementation = host.config._experts_implementation
    config = KVTrainConfig(text_config=host_config, method_config=method.to_dict(), dtype=host.dtype)
    with torch.device("meta"):
        model = retrofitted_class(host_config)(config)
    plain = host.state_dict(keep_vars=True)
    adapted = builder(method, host_config).adapt_state(plain)
    state = {name: tensor.to(plain[name].dtype) if name in plain else tensor for name, tensor in adapted.items()}
    model.load_state_dict(state, assign=True)
    _fill_buffers(model, host)
    model.tie_weights()
    model.generation_config = host.generation_config
    model.train(host.training)
    return model


def _fill_buffers(model: PreTrainedModel, host: PreTrainedModel) -> None:
    """Give buffers that no file holds the host's values; where it has none by this name, they are computed."""
    buffers = dict(host.named_buffers())
    for name, module in model.named_modules():
        if not module._non_persistent_buffers_set:
            continue
        places = {key: f"{name}.{key}" if name else key for key in module._non_persistent_buffers_set}
        if buffers.keys() >= set(places.values()):
            for key, place in places.items():
                module.register_buffer(key, buffers[place].clone(), persistent=False)
        else:
            computed: Any = module.to_empty(device=host.device)
            computed.reset_parameters()


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
    _check_undivided(host.config)
    if isinstance(host.config, KVTrainConfig):
        raise ValueError("this model is retrofitted already; retrofit its host, or load it with kvtrain.load")


def _check_undivided(config: PreTrainedConfig) -> None:
    """Refuse models whose experts transformers has given to different devices.

    Raises:
        ValueError: With the remedy.
    """
    if getattr(getattr(config, "distributed_config", None), "enable_expert_parallel", False):
        raise ValueError(
            "expert parallelism (enable_expert_parallel) is not supported; load the model without it, and train under "
            "fsdp2 or ZeRO-3, which shard experts like all other weights"
        )


def validate_method(method: Method, host_config: PreTrainedConfig) -> None:
    """Refuse a host that a method cannot serve.

    Raises:
        ValueError: With the remedy.
    """
    check_windows(method, host_config)
    _check_sinks(host_adapter(host_config), method)
    method.validate(host_config)


def _check_sinks(adapter: HostAdapter, method: Method) -> None:
    """Refuse a method that would leave a learned sink out of the softmax.

    Raises:
        ValueError: With the remedy.
    """
    if adapter.attention_sinks and not method.supports_attention_sinks:
        raise ValueError(
            f"method {method.name!r} does not know attention sinks, which hosts of type {adapter.model_type!r} learn; "
            "use one that does, such as dms or full"
        )


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
    """Replace embeddings, norms, feed-forward parts and attention of a freshly built host, in place."""
    decoder: Any = model.model
    adapter = host_adapter(parts.host_config)
    decoder.embed_tokens = adapter.embedding(decoder.embed_tokens)
    attention_norms = adapter.attention_norms
    setattr(decoder, adapter.final_norm, adapter.norm(getattr(decoder, adapter.final_norm)))
    decoder.rotary_emb = adapter.decoder_rotary(decoder.rotary_emb, parts.host_config)
    for layer_idx, layer in enumerate(decoder.layers):
        attention = getattr(layer, adapter.attention)
        found = {*attention._modules, *attention._parameters}
        if found != adapter.attention_parts:  # it does more, or less, than its family's adapter says
            raise ValueError(f"layer {layer_idx} has an attention of unknown parts: {', '.join(sorted(found))}")
        for name in attention_norms:
            setattr(attention, name, adapter.norm(getattr(attention, name)))
        for name in adapter.norms:
            setattr(layer, name, adapter.norm(getattr(layer, name)))
        setattr(layer, adapter.mlp, adapter.feed_forward(getattr(layer, adapter.mlp), layer_idx))
        setattr(layer, adapter.attention, layer_attention(parts, attention, layer_idx))
    decoder.layers = parts.layers(decoder.layers, decoder.rotary_emb)


class KVTrainMixin(CachedLanguageModel):
    """What a retrofitted model can do that its host cannot; mixed in before the host's class."""

    config: KVTrainConfig
    # The host's attention is gone, and with it the choice of another one; trainers and suites ask for these.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = False

    def __init__(self, config: KVTrainConfig) -> None:
        host_config, method = config.host_config, config.method
        adapter = host_adapter(host_config)
        _check_undivided(config)
        adapter.validate(host_config)
        validate_method(method, host_config)
        check_attention(config._attn_implementation, ATTENTION_NAME)
        config._attn_implementation = host_config._attn_implementation = ATTENTION_NAME
        chosen = config._experts_implementation or host_config._experts_implementation
        host_config._experts_implementation = chosen or EXPERTS_NAME
        super().__init__(host_config)
        _replace_modules(self, builder(method, host_config))
        self.config = config
        self.name_or_path = config.name_or_path  # not the host's: adapters write down what they were trained on
        config.architectures = [type(self).__name__]
        self.method = method
        self.extra_losses = tuple(loss for loss in adapter.extra_losses(host_config) if loss.weight)
        self.watch_decoder()
        if config.__dict__.pop("gradient_checkpointing", False):  # an old way to ask for it, which Trainer still knows
            self.gradient_checkpointing_enable()

    def cache_layers(self, placements: list[Placement], **options: Any) -> list[KVCacheLayer]:
        """See ``CachedLanguageModel``; the method's."""
        return cache_layers(self.builder, placements, **options)

    @property
    def builder(self) -> Builder[Any]:
        """What makes this model's modules and caches."""
        return builder(self.method, self.config.host_config)

    def assisted_options(self) -> dict[str, Any] | None:
        """See ``CachedLanguageModel``; the method's."""
        return assisted_options(self.method, self.config.host_config)

    @property
    def servable(self) -> bool:
        """See ``CachedLanguageModel``."""
        return self.method.servable

    @property
    def has_parallel_form(self) -> bool:
        """See ``CachedLanguageModel``; the method's."""
        return self.method.has_parallel_form

    @property
    def survives_reentrant_checkpointing(self) -> bool:
        """See ``CachedLanguageModel``; the method's, and what modules note has no gradient under it."""
        return self.method.survives_reentrant_checkpointing and not self.extra_losses

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
