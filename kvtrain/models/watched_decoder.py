"""What a decoder is told before every forward pass, and what is made of its output behind it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from kvtrain.cache.base import KVCache
from kvtrain.kernels.context_parallel import WHOLE_ROWS
from kvtrain.models.compat import CACHE, without_cache
from kvtrain.models.context import (
    ForwardContext,
    cache_context,
    check_cache,
    named_arguments,
    packed_documents,
    parallel_context,
)
from kvtrain.models.extra_losses import ExtraLoss, note_real_tokens
from kvtrain.models.recording import RecordedStates

if TYPE_CHECKING:
    from transformers.generation.utils import GenerationMixin

    class _Decoder(PreTrainedModel, GenerationMixin):
        model: Any
        lm_head: nn.Linear

else:
    _Decoder = object


class WatchedDecoder(_Decoder):
    """A model whose decoder hears of every pass by a ``ForwardContext``, and gets the cache that matches.

    Attributes:
        extra_losses: Join the loss of the tokens while the model trains; evaluation measures the tokens alone.
        context_parallel: Ranks that share rows. Each is given whole rows, and has the hidden states, the logits and
            the summed loss of its own tokens.
    """

    extra_losses: Sequence[ExtraLoss] = ()
    context_parallel = WHOLE_ROWS

    def watch_decoder(self) -> None:
        """Check and complete the arguments of every forward pass of the decoder; once, when it has been built."""
        self.model.register_forward_pre_hook(self._enter, with_kwargs=True)
        self.model.register_forward_hook(self._leave, with_kwargs=True)

    @property
    def servable(self) -> bool:
        """Whether the model has a cache as it is; without one it runs all the same."""
        return True

    @property
    def has_parallel_form(self) -> bool:
        """Whether a pass without a cache computes what one with it does; if not, each has a cache of its own."""
        return True

    def recorded_states(self) -> Sequence[int] | None:
        """Layers whose input has a single value, where the stack records hidden states by itself; see ``Method``."""
        return None

    def make_cache(self) -> KVCache:
        """An empty cache of the kind that this model's attention reads."""
        raise NotImplementedError

    def _enter(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Before the decoder runs. A plain ``model(x)`` would get a ``DynamicCache`` from the host; give it ours."""
        kwargs = named_arguments(args, kwargs)
        kwargs["recorded"] = recorded = self._recorded(kwargs)
        cache, asked = kwargs.get(CACHE), kwargs.get("use_cache")
        documents = packed_documents(kwargs) if cache is None else None
        if asked is None:
            serves = self.servable and not self.training and documents is None and self.context_parallel.size == 1
            asked = serves and self.config.use_cache
        returned = asked or cache is not None
        if cache is None and not self.has_parallel_form:
            self._check_served(documents)
        if cache is None and (asked or not self.has_parallel_form):
            cache = self.make_cache()
        if cache is not None:
            check_cache(cache, self.training, self.context_parallel)
            context = cache_context(kwargs, cache)
        else:
            context = parallel_context(kwargs, documents, self.context_parallel)
        if self.extra_losses:
            note_real_tokens(context.real)
        return (), {
            **{name: self._own_tokens(kwargs.get(name)) for name in ("input_ids", "inputs_embeds")},
            "attention_mask": None,
            "position_ids": context.positions,
            CACHE: cache,
            "use_cache": returned,
            "output_hidden_states": kwargs["output_hidden_states"] if recorded is None else False,
            "return_dict": kwargs.get("return_dict"),
            "context": context,
        }

    def _check_served(self, documents: Tensor | None) -> None:
        """Refuse passes that need the parallel form, of a model that has none.

        Raises:
            ValueError: It trains, or rows are packed.
        """
        if self.training:
            raise ValueError(
                "what this model forgets is decided while it serves, and there is no form for training: "
                "call model.eval(), or train its host"
            )
        if documents is not None:
            raise ValueError(
                "packed rows (document_ids, cu_seq_lens_q, or a position of 0 inside a row) need a parallel form, and "
                "this model has none; pass one document a row"
            )

    def _own_tokens(self, tokens: Tensor | None) -> Tensor | None:
        return None if tokens is None else self.context_parallel.own_tokens(tokens)

    def _recorded(self, kwargs: dict[str, Any]) -> RecordedStates | None:
        """Hidden states to be recorded, where the stack does so by itself.

        An argument decides, or the configuration, of which the decoder knows another.
        """
        if kwargs.get("output_attentions") or self.config.output_attentions:
            raise ValueError("attention weights are never materialised here; set output_attentions=False")
        if kwargs.get("output_hidden_states") is None:
            kwargs["output_hidden_states"] = self.config.output_hidden_states
        known, wanted = self.recorded_states(), kwargs["output_hidden_states"]
        if known is None or wanted is None or wanted is False:
            return None
        return RecordedStates(wanted, known, self.config.get_text_config().num_hidden_layers)

    def _leave(self, _: nn.Module, __: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """After the decoder has run."""
        context: ForwardContext = kwargs["context"]
        if context.recorded is not None:
            states = context.recorded.tuple_with(output[0])
            if isinstance(output, tuple):
                output = (*output, states)
            else:
                output.hidden_states = states
        output = context.leave(output)
        return output if kwargs["use_cache"] else without_cache(output, context.cache)
