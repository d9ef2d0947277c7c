"""A decoder with a head: its forward pass, its losses, and the matching cache, which nobody passes by hand."""

import contextlib
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn, Unpack

import torch
from torch import Tensor, nn
from transformers.generation.configuration_utils import GenerationMode
from transformers.utils.generic import can_return_tuple

from kvtrain.cache.base import KVCache
from kvtrain.cache.budget import ByteBudget
from kvtrain.cache.layer import KVCacheLayer
from kvtrain.cache.rows import Placement
from kvtrain.kernels.context_parallel import ContextParallel
from kvtrain.kernels.cross_entropy import IGNORE_INDEX, linear_cross_entropy_sum
from kvtrain.kernels.distillation import TeacherHead
from kvtrain.losses.distillation import Distillation, distillation_sum
from kvtrain.models.compat import CACHE, rename_cache, with_cache
from kvtrain.models.context import PassOptions
from kvtrain.models.extra_losses import LayerNotes, add_extra_losses, collect_notes
from kvtrain.models.outputs import LanguageModelOutput
from kvtrain.models.placement import execution_device
from kvtrain.models.watched_decoder import WatchedDecoder


class CachedLanguageModel(WatchedDecoder):
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
    def max_positions(self) -> int | None:
        """Tokens of a row that the model can tell the places of; None where places are computed and have no end."""
        return None

    @property
    def survives_reentrant_checkpointing(self) -> bool:
        """Whether all that layers hand over is their hidden states, which is all that reentrant checkpointing sees."""
        return True

    def assisted_options(self) -> dict[str, Any] | None:
        """Options of ``make_cache`` under which it takes tokens back, for assisted decoding; None where none does."""
        return None

    def make_cache(
        self,
        budget: ByteBudget | int | None = None,
        *,
        preallocate: bool = False,
        page_size: int | None = None,
        **options: Any,
    ) -> KVCache:
        """An empty cache of the kind that this model's attention reads.

        Args:
            budget: Bytes that it may take, or a ``ByteBudget`` that several caches share. What may not fit is
                refused before a forward pass begins.
            preallocate: Reserve the budget's pages once, and room for more rows of constant size than are here, so that
                rows join and leave at the cost of what they hold; without it memory is never much more than what is
                held. On a CPU, whose memory is there when it is first written, every layer may come to the whole
                budget, elsewhere to an equal part of it.
            page_size: Slots in a page, for models whose caches have pages: small ones waste less of the last page of
                every head, and large ones take fewer steps to attend. The model's own where absent.
            **options: The model's own, such as the ``sink`` and ``recent`` of LCKV's cache for endless generation.

        Raises:
            ValueError: The model's cache has no such option or no pages, or there is no budget to reserve.
        """
        budget = ByteBudget(budget) if isinstance(budget, int) else budget
        if preallocate and budget is None:
            raise ValueError("preallocate reserves a budget's pages: give make_cache a budget, in bytes")
        devices = [execution_device(layer) for layer in self.model.layers]
        placements = [
            Placement(self.dtype, device, budget, _reserve(budget, device, devices) if preallocate else None)
            for device in devices
        ]
        if page_size is not None:
            options["page_size"] = page_size
        return KVCache(self.cache_layers(placements, **options), budget)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """As the host's, but not reentrant unless asked for.

        Raises:
            ValueError: ``use_reentrant=True`` was asked for, and gradients would be lost.
        """
        settings = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        if settings["use_reentrant"] and not self.survives_reentrant_checkpointing:
            raise ValueError("reentrant checkpointing loses gradients of this model; use use_reentrant=False")
        with warnings.catch_warnings():  # the name is deprecated from 5.20 on, and the only one before
            warnings.simplefilter("ignore", FutureWarning)
            super().gradient_checkpointing_enable(settings, **kwargs)  # type: ignore[no-untyped-call]

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        """Refused: attention is the model's own.

        Raises:
            ValueError: Another implementation than the model's was asked for.
        """
        check_attention(attn_implementation, self.config._attn_implementation)

    @can_return_tuple  # type: ignore[untyped-decorator]
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
        cache: KVCache | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        skip_logits: bool | None = None,
        teacher: TeacherHead | None = None,
        distillation: Distillation | None = None,
        document_ids: Tensor | None = None,
        **kwargs: Unpack[PassOptions],
    ) -> LanguageModelOutput:
        """The host's forward pass, with some additions.

        Args:
            input_ids: ``(B, T)``.
            attention_mask: ``(B, past + T)`` padding mask; with a cache the new tokens' columns are enough.
            position_ids: ``(B, T)``; derived where absent. Without a cache a 0 behind a real token begins a document.
            past_key_values: A cache from ``make_cache``. It holds constants: no gradient flows into it.
            inputs_embeds: ``(B, T, hidden)`` in place of ``input_ids``.
            labels: ``(B, T)``, unshifted; ``-100`` counts nothing.
            use_cache: Whether to fill a cache; off while training, and for packed rows.
            logits_to_keep: As the host's.
            cache: The same as ``past_key_values``.
            shift_labels: ``(B, T)``, shifted already: each stands where it is predicted. Instead of ``labels``.
            num_items_in_batch: The summed loss is divided by it; the number of targets where absent.
            skip_logits: Build none, but give last hidden states where there are no labels; on while training on labels.
            teacher: Learn from this teacher, hidden states ``(B, T, D_t)``, where ``labels`` say which tokens count.
            distillation: How to; by its divergence alone where absent.
            document_ids: ``(B, T)`` packed documents of a pass without a cache, 0 for padding.
            **kwargs: See ``PassOptions``.

        Raises:
            ValueError: A foreign cache, one of other rows, or one beside training or packed rows; an unknown argument.
            CacheFullError: The new tokens may not fit into the cache's budget; nothing has changed.
        """
        targets = _targets(labels, shift_labels, self.context_parallel)
        listens = self.training and targets is not None and bool(self.extra_losses)
        with collect_notes() if listens else contextlib.nullcontext() as notes:
            decoded = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                cache=cache,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                document_ids=document_ids,
                **{**kwargs, "return_dict": True},
            )
        sought = None if targets is None else _Sought(targets, num_items_in_batch, teacher, distillation, notes)
        return self._output(decoded, sought, logits_to_keep, skip_logits)

    def _output(
        self, decoded: Any, sought: "_Sought | None", logits_to_keep: int | Tensor, skip_logits: bool | None
    ) -> LanguageModelOutput:
        """What is made of the decoder's output: a loss where one is sought, logits unless they are skipped."""
        hidden, loss, parts, logits = decoded.last_hidden_state, None, None, None
        if sought is not None:
            loss, parts = self._loss(hidden, sought)
        if not (self.training and sought is not None if skip_logits is None else skip_logits):
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, kept])
        output = LanguageModelOutput(
            loss=loss,
            logits=logits,
            hidden_states=decoded.hidden_states,
            loss_parts=parts or None,
            last_hidden_state=hidden if loss is None and logits is None else None,
        )
        return with_cache(output, decoded.get(CACHE))

    def _loss(self, hidden: Tensor, sought: "_Sought") -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its parts, of all last hidden states."""
        targets, num_items, teacher, distillation, notes = sought
        length, head = targets.shape[1], self.lm_head
        hidden, targets = hidden[:, :length].flatten(0, 1), targets.flatten()
        parts: dict[str, Tensor] = {}
        if teacher is None:
            total = linear_cross_entropy_sum(hidden, head, targets)
        else:
            flat = TeacherHead(teacher.hidden[:, :length].flatten(0, 1), teacher.head)
            total, parts = distillation_sum(hidden, head, flat, targets, distillation or Distillation())
        if notes:
            parts = parts or {"cross_entropy" if teacher is None else "divergence": total.detach()}
            total = add_extra_losses(total, parts, self.extra_losses, notes, (targets != IGNORE_INDEX).sum())
        count = (targets != IGNORE_INDEX).sum() if num_items is None else num_items
        return total / count, {name: part / count for name, part in parts.items()}

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As the host's, with the matching cache, and in evaluation mode even between two steps of training."""
        rename_cache(kwargs)
        training = [module for module in self.modules() if module.training]
        for module in training:
            module.training = False
        try:
            return super().generate(*args, **kwargs)  # type: ignore[misc]
        finally:
            for module in training:
                module.training = True

    def init_continuous_batching(self, *_: Any, **__: Any) -> NoReturn:
        """Refused, and with it ``generate_batch``: it brings a cache and an attention of its own.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "generate_batch brings transformers' own cache, which this model cannot use; call model.generate on padded "
            "rows, or let rows join and leave a cache from model.make_cache()"
        )

    generate_batch = continuous_batching_context_manager = init_continuous_batching

    def _prefill(  # type: ignore[override]
        self, input_ids: Any, generation_config: Any, model_kwargs: dict[str, Any], **kwargs: Any
    ) -> Any:
        """A prompt's last chunk may be one token: say that it is no decoding yet, and then that the prompt is over."""
        model_kwargs = {**model_kwargs, "prefill": True}
        output = super()._prefill(input_ids, generation_config, model_kwargs, **kwargs)  # type: ignore[misc]
        if isinstance(cache := model_kwargs.get(CACHE), KVCache):
            cache.end_prompt()
        return output

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, *_: Any, **__: Any
    ) -> None:
        if generation_config.cache_implementation is not None:
            raise ValueError("this model brings its own cache; leave cache_implementation unset")
        assisted = generation_mode == GenerationMode.ASSISTED_GENERATION or generation_config.is_assistant
        options = self.assisted_options() if assisted else {}
        if options is None:
            raise ValueError("assisted decoding must take tokens back, which this cache cannot; use plain decoding")
        if model_kwargs.get(CACHE) is None and generation_config.use_cache is not False:
            model_kwargs[CACHE] = self.make_cache(**options)


def _reserve(budget: ByteBudget | None, device: torch.device, devices: Sequence[torch.device]) -> int:
    """Bytes that the pages of one of so many layers may come to."""
    assert budget is not None
    return budget.limit if device.type == "cpu" else budget.limit // len(devices)


class _Sought(NamedTuple):
    """What a loss is made of: ``forward`` says what each is; targets ``(B, n)`` stand where they are predicted."""

    targets: Tensor
    num_items: Tensor | int | None
    teacher: TeacherHead | None
    distillation: Distillation | None
    notes: LayerNotes | None


def _targets(labels: Tensor | None, shift_labels: Tensor | None, parallel: ContextParallel) -> Tensor | None:
    """Next tokens ``(B, T - 1)``, or ``(B, T)`` where the caller has shifted them; None where there are none.

    Ranks that share rows have those of their own tokens, the last of which is asked for the next rank's first one.
    """
    if shift_labels is None and labels is not None:
        shift_labels = labels[:, 1:]
        if parallel.size > 1:
            shift_labels = nn.functional.pad(shift_labels, (0, 1), value=IGNORE_INDEX)
    return None if shift_labels is None else parallel.own_tokens(shift_labels)


def check_attention(requested: Any, own: str | None) -> None:
    """Refuse a choice of attention that would do nothing.

    Args:
        requested: What ``attn_implementation=`` asked for; None leaves the choice to the model.
        own: What the model has.

    Raises:
        ValueError: They differ.
    """
    if requested not in (None, own):
        raise ValueError(
            f"attn_implementation={requested!r} would do nothing: this model has an attention of its own; leave it out "
            "(KVTRAIN_AVOID=flash,flex in the environment passes over kernels)"
        )
