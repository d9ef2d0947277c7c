"""The surgery: a Hugging Face decoder keeps its class, its names and its weights, and gets new organs."""

import functools
import warnings
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from kvtrain.cache.base import KVCache
from kvtrain.cache.budget import ByteBudget
from kvtrain.cache.rows import Placement
from kvtrain.kernels.cross_entropy import IGNORE_INDEX, linear_cross_entropy_sum
from kvtrain.kernels.distillation import TeacherHead
from kvtrain.losses.distillation import Distillation, distillation_sum
from kvtrain.models.attention import NORMS, PROJECTIONS
from kvtrain.models.config import KVTrainConfig
from kvtrain.models.method import Method
from kvtrain.models.modules import GatedMLP, RMSNorm, RotaryEmbedding
from kvtrain.models.outputs import LanguageModelOutput
from kvtrain.models.serving import check_cache, enter_cache, leave_cache, named_arguments, parallel_positions

if TYPE_CHECKING:
    from transformers.generation.utils import GenerationMixin

ATTENTION_NAME = "kvtrain"
HOSTS = ("llama", "mistral", "olmo2", "qwen2", "qwen3")
_STATIC_ROPE = ("default", "linear", "llama3", "yarn")


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
    if isinstance(host.config, KVTrainConfig):
        raise ValueError("this model is retrofitted already; retrofit its host, or load it with kvtrain.load")
    host_config: PreTrainedConfig = type(host.config).from_dict(host.config.to_dict())
    config = KVTrainConfig(text_config=host_config, method_config=method.to_dict(), dtype=host.dtype)
    with torch.device("meta"):
        model = retrofitted_class(host_config)(config)
    model.load_state_dict(method.adapt_state(host.state_dict(keep_vars=True), host_config), assign=True)
    buffers = dict(host.named_buffers())
    for name, module in model.named_modules():
        for key in module._non_persistent_buffers_set:
            source = buffers[f"{name}.{key}"] if name else buffers[key]
            module.register_buffer(key, source.clone(), persistent=False)
    model.tie_weights()
    model.generation_config = host.generation_config
    model.train(host.training)
    return model


@functools.cache
def _subclass(host_class: type[PreTrainedModel]) -> type["KVTrainMixin"]:
    return type(f"KV{host_class.__name__}", (KVTrainMixin, host_class), {"config_class": KVTrainConfig})


def retrofitted_class(host_config: PreTrainedConfig) -> type["KVTrainMixin"]:
    """The class for hosts of this configuration, a subclass of the host's own.

    Raises:
        ValueError: Unknown family.
    """
    if host_config.model_type not in HOSTS:
        raise ValueError(
            f"hosts of type {host_config.model_type!r} are not supported; kvtrain retrofits {', '.join(HOSTS)}"
        )
    return _subclass(AutoModelForCausalLM._model_mapping[type(host_config)])


def validate_host(config: PreTrainedConfig) -> None:
    """Refuse what the replaced modules would silently ignore.

    Raises:
        ValueError: With the remedy.
    """
    layer_types = getattr(config, "layer_types", None) or []
    sliding = any(kind != "full_attention" for kind in layer_types)
    if not layer_types and getattr(config, "sliding_window", None) is not None:
        sliding = bool(getattr(config, "use_sliding_window", True))
    if sliding:
        raise ValueError("hosts with sliding-window layers are not supported; set sliding_window=None first")
    if getattr(config, "attention_dropout", 0.0):
        raise ValueError("attention dropout is not supported; set attention_dropout=0.0")
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind not in _STATIC_ROPE:
        raise ValueError(f"rotary embedding of type {kind!r} is not supported; use {', '.join(_STATIC_ROPE)}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("partial rotary embedding is not supported; the whole head must rotate")
    if getattr(config, "hidden_act", "silu") != "silu":
        raise ValueError(f"feed-forward activation {config.hidden_act!r} is not supported; use 'silu'")


def _operate(model: PreTrainedModel, method: Method) -> None:
    """Swap the organs of a freshly built host, in place."""
    decoder: Any = model.model
    for module in list(decoder.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                setattr(module, name, RMSNorm(child))
            elif hasattr(child, "gate_proj"):
                setattr(module, name, GatedMLP(child))
    decoder.rotary_emb = RotaryEmbedding(decoder.rotary_emb)
    for index, layer in enumerate(decoder.layers):
        children = {name for name, _ in layer.self_attn.named_children()}
        if not set(PROJECTIONS) <= children <= {*PROJECTIONS, *NORMS}:
            raise ValueError(f"layer {index} has an attention of unknown parts: {', '.join(sorted(children))}")
        layer.self_attn = method.attention(layer.self_attn, index)
    decoder.layers = method.stack(decoder.layers, decoder.rotary_emb)


if TYPE_CHECKING:

    class _Host(PreTrainedModel, GenerationMixin):
        model: Any
        lm_head: nn.Linear

else:
    _Host = object


class KVTrainMixin(_Host):
    """What a retrofitted model can do that its host cannot; mixed in before the host's class."""

    config: KVTrainConfig

    def __init__(self, config: KVTrainConfig) -> None:
        host_config, method = config.host_config, config.method
        validate_host(host_config)
        method.validate(host_config)
        config._attn_implementation = host_config._attn_implementation = ATTENTION_NAME
        super().__init__(host_config)
        _operate(self, method)
        self.config = config
        config.architectures = [type(self).__name__]
        self.method = method
        self.model.register_forward_pre_hook(self._enter, with_kwargs=True)
        self.model.register_forward_hook(self._leave, with_kwargs=True)

    def make_cache(self, budget: ByteBudget | int | None = None, **options: Any) -> KVCache:
        """An empty cache of the kind that this model's attention reads.

        Args:
            budget: Bytes that it may take, or a ``ByteBudget`` that several caches share. What may not fit is
                refused before a forward pass begins.
            **options: The method's own, such as the ``sink`` and ``recent`` of LCKV's cache for endless generation.

        Raises:
            ValueError: The method has no such option.
        """
        budget = ByteBudget(budget) if isinstance(budget, int) else budget
        devices = [layer.self_attn.o_proj.weight.device for layer in self.model.layers]
        placements = [Placement(self.dtype, device, budget) for device in devices]
        layers = self.method.cache_layers(self.config.host_config, placements, **options)
        return KVCache(layers, budget)

    def binarise(self, sparsity: float | None = None, **options: Any) -> Self:
        """Round the gates of a model whose heads learn to stream (``kvtrain.Duo``), in place.

        Args:
            sparsity: Share of streaming heads; the method's own where absent.
            **options: The method's own, such as ``gates`` to round in place of the model's.

        Returns:
            This model, which has a cache from now on.

        Raises:
            ValueError: The method has no gates, or they are rounded already.
        """
        self.method.binarise(self, sparsity, **options)
        return self

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """As the host's, but never reentrant: side channels would lose their gradients.

        Raises:
            ValueError: ``use_reentrant=True`` was asked for.
        """
        settings = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        if settings["use_reentrant"]:
            raise ValueError("reentrant checkpointing loses the gradients of decisions; use use_reentrant=False")
        with warnings.catch_warnings():  # the name is deprecated from 5.20 on, and the only one before
            warnings.simplefilter("ignore", FutureWarning)
            super().gradient_checkpointing_enable(settings, **kwargs)  # type: ignore[no-untyped-call]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items: Tensor | int | None = None,
        skip_logits: bool | None = None,
        teacher: TeacherHead | None = None,
        distillation: Distillation | None = None,
        **kwargs: Any,
    ) -> LanguageModelOutput:
        """The host's forward pass, with five additions.

        Args:
            input_ids: ``(B, T)``.
            attention_mask: ``(B, past + T)`` padding mask; with a cache the new tokens' columns are enough.
            position_ids: ``(B, T)``; derived from documents, padding or the cache where absent.
            past_key_values: A cache from ``make_cache``. It holds constants: no gradient flows into it.
            inputs_embeds: ``(B, T, hidden)`` in place of ``input_ids``.
            labels: ``(B, T)``, unshifted; ``-100`` counts nothing.
            use_cache: Whether to fill a cache; off while training.
            logits_to_keep: As the host's.
            num_items: The summed loss is divided by it; the number of targets where absent.
            skip_logits: Do not build logits; on while training, where there are labels. Without labels the last hidden
                states are given instead.
            teacher: Learn from this teacher, hidden states ``(B, T, D_t)``, where ``labels`` say which tokens count.
            distillation: How to; by its divergence alone where absent.
            **kwargs: Go to every attention module: ``document_ids (B, T)``, ``ledger`` and the method's own; with a
                cache, ``prefill=True``: even a single token a row is part of a prompt, cut anywhere.

        Raises:
            ValueError: A foreign cache, a cache together with training or packed documents, or one with other rows.
            CacheFullError: The new tokens may not fit into the cache's budget; nothing has changed.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        loss = parts = None
        if labels is not None:
            loss, parts = self._loss(hidden, labels, num_items, teacher, distillation or Distillation())
        skip_logits = labels is not None and self.training if skip_logits is None else skip_logits
        logits = None
        if not skip_logits:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, kept])
        return LanguageModelOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            loss_parts=parts or None,
            last_hidden_state=hidden if loss is None and logits is None else None,
        )

    def _loss(
        self,
        hidden: Tensor,
        labels: Tensor,
        num_items: Tensor | int | None,
        teacher: TeacherHead | None,
        distillation: Distillation,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        targets, weight = labels[:, 1:].flatten(), self.lm_head.weight
        hidden = hidden[:, :-1].flatten(0, 1)
        parts: dict[str, Tensor] = {}
        if teacher is None:
            total = linear_cross_entropy_sum(hidden, weight, targets)
        else:
            flat = TeacherHead(teacher.hidden[:, :-1].flatten(0, 1), teacher.weight)
            total, parts = distillation_sum(hidden, weight, flat, targets, distillation)
        count = (targets != IGNORE_INDEX).sum() if num_items is None else num_items
        return total / count, {name: part / count for name, part in parts.items()}

    def _enter(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Before the decoder runs. A plain ``model(x)`` would get a ``DynamicCache`` from the host; give it ours."""
        kwargs = named_arguments(args, kwargs)
        if kwargs.get("output_attentions") or self.config.output_attentions:
            raise ValueError("attention weights are never materialised here; set output_attentions=False")
        wants_layers = kwargs.get("output_hidden_states") or self.config.output_hidden_states
        if wants_layers and not self.method.runs_layers_once(self.config.host_config):
            raise ValueError("layers that iterate have no single hidden state; set output_hidden_states=False")
        cache, documents = kwargs.get("past_key_values"), kwargs.get("document_ids")
        if kwargs.get("use_cache") is None:
            kwargs["use_cache"] = self.config.host_config.use_cache and self.method.servable and not self.training
        if kwargs["use_cache"] and cache is None and documents is None:
            cache = self.make_cache()
        kwargs.update(past_key_values=cache, use_cache=cache is not None)
        if cache is not None:
            check_cache(cache, self.training, documents)
            enter_cache(kwargs, cache)
        elif kwargs.get("position_ids") is None:
            kwargs["position_ids"] = parallel_positions(kwargs.get("attention_mask"), documents)
        return (), kwargs

    def _leave(self, _: nn.Module, __: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """After the decoder has run."""
        cache = kwargs["past_key_values"]
        return output if cache is None else leave_cache(output, cache, kwargs["new_tokens"])

    def _prefill(  # type: ignore[override]
        self, input_ids: Any, generation_config: Any, model_kwargs: dict[str, Any], **kwargs: Any
    ) -> Any:
        """A prompt's last chunk may be one token: say that it is no decoding yet."""
        model_kwargs = {**model_kwargs, "prefill": True}
        return super()._prefill(input_ids, generation_config, model_kwargs, **kwargs)  # type: ignore[misc]

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, *_: Any, **__: Any
    ) -> None:
        if generation_config.cache_implementation is not None:
            raise ValueError("this model brings its own cache; leave cache_implementation unset")
        if generation_mode == GenerationMode.ASSISTED_GENERATION or generation_config.is_assistant:
            raise ValueError("assisted decoding must take tokens back, which this cache cannot; use plain decoding")
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = self.make_cache()
