"""Answers to lm-eval's prompts by ``model.generate`` with the matching cache, up to a stop string."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, StoppingCriteria, StoppingCriteriaList

from kvtrain.cache.base import KVCache
from kvtrain.errors import UsageError
from kvtrain.evaluation.answering import PROMPT_CHUNK, pad_rows
from kvtrain.evaluation.row_meter import RowMeter, RowWatch
from kvtrain.inference.engine.text import TextStream
from kvtrain.models.end_tokens import end_token_ids

_ONE_EACH = ("num_beams", "num_return_sequences")  # settings under which rows would not be answers


@dataclass(frozen=True)
class Decoding:
    """How answers are decoded.

    Args:
        max_new_tokens: Tokens of an answer at most.
        stops: Strings before which it ends.
        sampling: What else ``model.generate`` is told; greedy where nothing.
    """

    max_new_tokens: int
    stops: tuple[str, ...]
    sampling: dict[str, Any] = field(default_factory=dict)


def decoding_of(settings: dict[str, Any], max_new_tokens: int) -> Decoding:
    """Read the ``generation_kwargs`` of a task.

    Args:
        settings: Those.
        max_new_tokens: Where the task does not say how many.

    Raises:
        ValueError: They ask for beams, for several answers, or bound prompt and answer together.
    """
    from lm_eval.models.utils import normalize_gen_kwargs

    asked = normalize_gen_kwargs(settings, max_new_tokens)
    stops, most = tuple(stop for stop in asked.pop("until") if stop), asked.pop("max_gen_toks")
    for name in _ONE_EACH:
        if asked.pop(name, 1) not in (1, None):
            raise UsageError(f"generation_kwargs: {name} must be 1, as answers are single rows of the cache")
    if "max_length" in asked:
        raise UsageError("generation_kwargs: max_length counts the prompt too; say max_gen_toks")
    if not asked["do_sample"]:
        asked = {name: value for name, value in asked.items() if name not in ("temperature", "top_p", "top_k", "min_p")}
    return Decoding(most, stops, dict(asked))


@torch.no_grad()
def generate_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[list[int]],
    decoding: Decoding,
    meter: RowMeter,
) -> list[str]:
    """Answer prompts, a row each.

    Args:
        model: From ``open_model``.
        tokenizer: Its tokenizer. Stop strings that are tokens of their own there, such as ``<|im_end|>``, stop as such.
        prompts: Token ids.
        decoding: How.
        meter: Sees the cache that each token of an answer is predicted from.

    Returns:
        The answers, without what ended them.
    """
    ids, mask = pad_rows([torch.tensor(prompt) for prompt in prompts], model.device, left=True)
    cache, watch, ends = model.make_cache(), meter.watch(), _end_tokens(model, tokenizer, decoding.stops)
    answers = _Answers(tokenizer, len(prompts), decoding.stops, ends, cache, watch)
    hook = model.get_decoder().register_forward_hook(lambda *_: watch.look(cache))  # before a prompt is cut, too
    try:
        model.generate(
            ids,
            attention_mask=mask,
            past_key_values=cache,
            prefill_chunk_size=PROMPT_CHUNK,
            max_new_tokens=decoding.max_new_tokens,
            eos_token_id=sorted(ends) or None,
            pad_token_id=tokenizer.pad_token_id or 0,
            stopping_criteria=StoppingCriteriaList([answers]),
            **decoding.sampling,
        )
    finally:
        hook.remove()
    watch.close()
    return answers.texts()


def _end_tokens(model: Any, tokenizer: PreTrainedTokenizerFast, stops: Sequence[str]) -> set[int]:
    """Tokens that end an answer: the model's, the tokenizer's, and stop strings that are special tokens."""
    special = tokenizer.added_tokens_encoder
    found = {*end_token_ids(model.generation_config), tokenizer.eos_token_id, *map(special.get, stops)}
    return {token for token in found if token is not None}


class _Answers(StoppingCriteria):
    """Reads answers as they come, and says which have ended.

    Args:
        tokenizer: Whose tokens come.
        count: Answers.
        stops: Strings that end one.
        ends: Tokens that do.
        cache: Holds a row for each.
        watch: Looks at those that have not ended.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        count: int,
        stops: Sequence[str],
        ends: set[int],
        cache: KVCache,
        watch: RowWatch,
    ) -> None:
        self._streams = [TextStream(tokenizer.backend_tokenizer, stops) for _ in range(count)]
        self._texts, self._open = [""] * count, torch.ones(count, dtype=torch.bool)
        self._ends, self._cache, self._watch = ends, cache, watch

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        """Take in one more token of every row."""
        self._watch.look(self._cache, self._open)
        for row, token in enumerate(input_ids[:, -1].tolist()):
            if not self._open[row]:
                continue
            if token not in self._ends:
                self._texts[row] += self._streams[row].push(token)
            self._open[row] = token not in self._ends and self._streams[row].stop is None
        return ~self._open.to(input_ids.device)

    def texts(self) -> list[str]:
        """All answers, when no token will follow."""
        return [text + stream.flush() for text, stream in zip(self._texts, self._streams, strict=True)]
