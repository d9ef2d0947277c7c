"""A decoder with a head: its forward pass, its losses, and the matching cache, which nobody passes by hand."""

import warnings
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode

from kvtrain.cache.base import KVCache, KVCacheLayer
from kvtrain.cache.budget import ByteBudget
from kvtrain.cache.rows import Placement
from kvtrain.kernels.cross_entropy import IGNORE_INDEX, linear_cross_entropy_sum
from kvtrain.kernels.distillation import TeacherHead
from kvtrain.losses.distillation import Distillation, distillation_sum
from kvtrain.models.outputs import LanguageModelOutput
from kvtrain.models.placement import execution_device
from kvtrain.models.serving import check_cache, enter_cache, leave_cache, named_arguments, parallel_positions

if TYPE_CHECKING:
    from transformers.generation.utils import GenerationMixin

    class _Decoder(PreTrainedModel, GenerationMixin):
        model: Any
        lm_head: nn.Linear

else:
    _Decoder = object


class CachedLanguageModel(_Decoder):
    """What every causal language model here can do; mixed in before its Hugging Face class."""

    def cache_layers(self, placements: list[Placement], **options: Any) -> list[KVCacheLayer]:
        """An empty cache layer for every layer.

        Args:
            placements: Where the tensors of each layer lie.
            **options: Of ``make_cache``.

        Raises:
            ValueError: An option that the model does not have.
        """
        raise NotImplementedError

    @property
    def servable(self) -> bool:
        """Whether the model has a cache as it is; without one it runs all the same."""
        return True

    @property
    def runs_layers_once(self) -> bool:
        """Whether a forward pass runs every layer once, so that hidden states between them can be recorded."""
        return True

    def assisted_options(self) -> dict[str, Any] | None:
        """Options of ``make_cache`` under which it takes tokens back, for assisted decoding; None where none does."""
        return None

    def watch_decoder(self) -> None:
        """Check and complete the arguments of every forward pass of the decoder; once, when it has been built."""
        self.model.register_forward_pre_hook(self._enter, with_kwargs=True)
        self.model.register_forward_hook(self._leave, with_kwargs=True)

    def make_cache(self, budget: ByteBudget | int | None = None, **options: Any) -> KVCache:
        """An empty cache of the kind that this model's attention reads.

        Args:
            budget: Bytes that it may take, or a ``ByteBudget`` that several caches share. What may not fit is
                refused before a forward pass begins.
            **options: The model's own, such as the ``sink`` and ``recent`` of LCKV's cache for endless generation.

        Raises:
            ValueError: The model's cache has no such option.
        """
        budget = ByteBudget(budget) if isinstance(budget, int) else budget
        devices = [execution_device(layer.self_attn.o_proj) for layer in self.model.layers]
        placements = [Placement(self.dtype, device, budget) for device in devices]
        return KVCache(self.cache_layers(placements, **options), budget)

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
        targets, head = labels[:, 1:].flatten(), self.lm_head
        hidden = hidden[:, :-1].flatten(0, 1)
        parts: dict[str, Tensor] = {}
        if teacher is None:
            total = linear_cross_entropy_sum(hidden, head, targets)
        else:
            flat = TeacherHead(teacher.hidden[:, :-1].flatten(0, 1), teacher.head)
            total, parts = distillation_sum(hidden, head, flat, targets, distillation)
        count = (targets != IGNORE_INDEX).sum() if num_items is None else num_items
        return total / count, {name: part / count for name, part in parts.items()}

    def _enter(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Before the decoder runs. A plain ``model(x)`` would get a ``DynamicCache`` from the host; give it ours."""
        kwargs = named_arguments(args, kwargs)
        if kwargs.get("output_attentions") or self.config.output_attentions:
            raise ValueError("attention weights are never materialised here; set output_attentions=False")
        wants_layers = kwargs.get("output_hidden_states") or self.config.output_hidden_states
        if wants_layers and not self.runs_layers_once:
            raise ValueError("layers that iterate have no single hidden state; set output_hidden_states=False")
        cache, documents = kwargs.get("past_key_values"), kwargs.get("document_ids")
        if kwargs.get("use_cache") is None:
            kwargs["use_cache"] = self.config.get_text_config().use_cache and self.servable and not self.training
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
        assisted = generation_mode == GenerationMode.ASSISTED_GENERATION or generation_config.is_assistant
        options = self.assisted_options() if assisted else {}
        if options is None:
            raise ValueError("assisted decoding must take tokens back, which this cache cannot; use plain decoding")
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = self.make_cache(**options)
