"""lm-eval's model class over a cache that serves: every score is what the model would give while it answers."""

import inspect
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import groupby
from typing import Any, TypeVar

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from kvtrain.errors import UsageError, require_at_least, unknown
from kvtrain.evaluation.lm_eval.generation import decoding_of, generate_answers
from kvtrain.evaluation.lm_eval.scoring import Continuation, batched, score_continuations, score_windows
from kvtrain.evaluation.measured_method import measured_method
from kvtrain.evaluation.row_meter import RowMeter
from kvtrain.inference.device import pick_device
from kvtrain.inference.load import open_model
from kvtrain.models.method import Method
from kvtrain.models.parse_method import parse_method

logger = logging.getLogger("kvtrain")
Answer = TypeVar("Answer")
_MAX_LENGTH = 2048  # of models that do not say how long a row may be


class ServedLM(TemplateLM):  # type: ignore[misc]
    """A model with its matching cache, for lm-eval.

    ``loglikelihood`` reads a context as a prompt, once for all continuations of it, and decodes each from a snapshot.
    ``loglikelihood_rolling`` reads windows as ``kvtrain eval --tasks perplexity`` does, and cuts texts as lm-eval does:
    the first window has the start token before its first token, every later one the last token of the window before
    it, and the last is filled up from the left with tokens that it does not score. (``kvtrain eval`` puts the start
    token before every window and lets the last one be short.) A text that fits into one window costs the same in both.

    Args:
        pretrained: Folder, Hub id or a model of the package; or a model from ``open_model``.
        tokenizer: Of a model that is open already.
        method: As ``--method`` takes it, for a plain model.
        dtype: Of the weights; what the folder holds where absent.
        batch_size: Rows of a pass; no figure depends on it.
        max_length: Tokens of a row; the positions that the model was trained with where absent. Longer contexts lose
            their beginnings, which is said.
        max_gen_toks: Tokens of an answer whose task does not say how many.
        add_bos_token: Whether texts begin with the tokenizer's start token; where it has one, unless said otherwise, as
            they do when the model serves.
        decode: Read the windows of ``loglikelihood_rolling`` token by token, for methods that cut prompts.
        device: To run on; see ``pick_device``.
        max_batch_size: lm-eval's command hands it to every model; refused, as batches are not sized by trying.

    Raises:
        ValueError: There is no such model or method, or a number is out of range.
    """

    def __init__(
        self,
        pretrained: Any,
        tokenizer: PreTrainedTokenizerFast | None = None,
        method: str | Method | None = None,
        dtype: str = "auto",
        batch_size: int | str = 8,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        decode: bool = False,
        device: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self.batch_size = _batch_size(batch_size, max_batch_size)
        require_at_least(2, "max_length", max_length)
        require_at_least(1, "max_gen_toks", max_gen_toks)
        if isinstance(pretrained, str):
            given = parse_method(method) if isinstance(method, str) else method
            pretrained, tokenizer = open_model(pretrained, method=given, dtype=dtype)
        elif method is not None:
            raise UsageError("a model that is open already has its method; leave out method=")
        if tokenizer is None:
            raise UsageError("a model that is open already comes with its tokenizer: give tokenizer=")
        self.model = pretrained if device is None else pretrained.to(pick_device(device))
        self.tokenizer = tokenizer
        self.max_length = max_length or _positions(self.model)
        self.max_gen_toks = max_gen_toks
        self.add_bos_token = tokenizer.bos_token_id is not None if add_bos_token is None else add_bos_token
        if self.add_bos_token and tokenizer.bos_token_id is None:
            raise UsageError("add_bos_token: the tokenizer has no start token")
        self._given, self._device, self._decode = method, self.model.device, decode
        self._meter = RowMeter(self.model)  # of the task whose requests are answered
        self.meters: dict[str, RowMeter] = {}
        self._shortened = False  # whether that was said

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> "ServedLM":
        """From ``--model_args``, as lm-eval's command line reads them.

        Raises:
            ValueError: One is none of ours, or the model is missing.
        """
        known = list(inspect.signature(cls).parameters)
        if wrong := next((name for name in arg_dict if name not in known), None):
            raise UsageError(unknown("model argument", wrong, known, f"There are {', '.join(known)}"))
        if "pretrained" not in arg_dict:
            raise UsageError("--model_args pretrained=MODEL is missing: a folder, a Hub id or kvtrain:tiny")
        given = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return cls(**{**given, **arg_dict})

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> "ServedLM":
        """From ``model_args`` in one string, whose values may hold commas within brackets; see the other form."""
        from lm_eval._cli.utils import key_val_to_dict

        return cls.create_from_arg_obj(key_val_to_dict(arg_string), additional_config)

    @property
    def eot_token_id(self) -> int | None:
        """The token that ends a text."""
        token: int | None = self.tokenizer.eos_token_id
        return token

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that nothing else stands before.

        Raises:
            ValueError: The tokenizer has neither a start nor an end token.
        """
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        raise UsageError("the tokenizer has neither a start nor an end token to put before a text")

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer where lm-eval keeps requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokens of a text, behind the start token unless that is written out in it already.

        Args:
            string: The text.
            add_special_tokens: Whether the start token comes; as the model has it where None.
        """
        ids: list[int] = self.tokenizer(string, add_special_tokens=False)["input_ids"]
        begins = self.add_bos_token if add_special_tokens is None else add_special_tokens
        start = self.tokenizer.bos_token_id
        return [start, *ids] if begins and start is not None and ids[:1] != [start] else ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A chat as the text that the model reads.

        Raises:
            ValueError: The tokenizer has no template, or it refuses this chat.
        """
        if not self.tokenizer.chat_template:
            raise UsageError("the tokenizer has no chat template; leave out --apply_chat_template")
        ending = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        try:
            return str(self.tokenizer.apply_chat_template(chat_history, tokenize=False, **ending))  # type: ignore[arg-type]
        except Exception as error:  # jinja's, whatever the template raises
            roles = ", ".join(message["role"] for message in chat_history)
            raise UsageError(f"the chat template refuses a chat of {roles}: {error}") from error

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihoods of continuations and whether greedy decoding gives them; see ``TemplateLM``."""
        score = super().loglikelihood
        return self._task_by_task(requests, lambda part: score(part, disable_tqdm))

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        asked = [self._fitting(context, tokens) for _, context, tokens in requests]
        found: list[tuple[float, bool]] = [(0.0, True)] * len(asked)
        scores = score_continuations(self.model, asked, self.batch_size, self._meter)
        for number, score in tqdm(scores, total=len(asked), desc="continuations", disable=disable_tqdm):
            found[number] = tuple(score)
            self.cache_hook.add_partial("loglikelihood", requests[number][0], tuple(score))
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts.

        Raises:
            ValueError: The model's method cuts prompts, and nothing is decoded.
        """
        if not self._decode and self.model.make_cache().cuts_prompts:
            raise UsageError(
                'this method cuts a prompt when it ends (prompt="dense"), and all of a text would be one: decode it '
                '(kvtrain eval --decode; --model_args decode=True), or set prompt="blocks"'
            )
        return self._task_by_task(requests, lambda part: self._rolling(part, disable_tqdm))

    def _rolling(self, requests: list[Any], disable_tqdm: bool) -> list[float]:
        windows = [self._windows(*request.args) for request in requests]
        owners = [number for number, cut in enumerate(windows) for _ in cut]
        found = [0.0] * len(requests)
        flat = [window for cut in windows for window in cut]
        scores = score_windows(self.model, flat, self.batch_size, self._meter, decode=self._decode)
        for window, total in tqdm(scores, total=len(flat), desc="windows", disable=disable_tqdm):
            found[owners[window]] += total
        for request, total in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return found

    def _windows(self, text: str) -> list[Continuation]:
        tokens = self.tok_encode(text, add_special_tokens=False)
        windows = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
        return [Continuation(*map(tuple, make_disjoint_window(window))) for window in windows]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers, each up to the first of its stop strings."""
        return self._task_by_task(requests, lambda part: self._generate(part, disable_tqdm))

    def _generate(self, requests: list[Any], disable_tqdm: bool) -> list[str]:
        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(number)
        found = [""] * len(requests)
        with tqdm(total=len(requests), desc="answers", disable=disable_tqdm) as progress:
            for numbers in alike.values():
                for part, texts in self._answer_alike(requests, numbers):
                    for number, text in zip(part, texts, strict=True):
                        found[number] = text
                        self.cache_hook.add_partial("generate_until", requests[number].args, text)
                    progress.update(len(part))
        return found

    def _answer_alike(self, requests: list[Any], numbers: list[int]) -> Iterator[tuple[list[int], list[str]]]:
        """Answer requests that are decoded alike, batch by batch, the longest prompts first."""
        decoding = decoding_of(requests[numbers[0]].args[1], self.max_gen_toks)
        room = self.max_length - decoding.max_new_tokens
        if room < 1:
            raise UsageError(f"answers of {decoding.max_new_tokens} tokens leave no room in {self.max_length}")
        prompts = {number: self._last(self.tok_encode(requests[number].args[0]), room) for number in numbers}
        ordered = sorted(numbers, key=lambda number: -len(prompts[number]))
        for part in batched(ordered, self.batch_size):
            rows = [prompts[number] or [self.prefix_token_id] for number in part]
            yield part, generate_answers(self.model, self.tokenizer, rows, decoding, self._meter)

    def _fitting(self, context: list[int], tokens: list[int]) -> Continuation:
        """A continuation behind as much of its context as there is room for, whose last token is not read."""
        room = self.max_length + 1 - len(tokens)
        if not tokens or room < 1:
            raise UsageError(f"a continuation of {len(tokens)} tokens cannot be scored in rows of {self.max_length}")
        return Continuation(tuple(self._last(context, room)), tuple(tokens))

    def _last(self, tokens: list[int], room: int) -> list[int]:
        if len(tokens) > room and not self._shortened:
            self._shortened = True
            logger.warning("contexts of more than %d tokens lose their beginnings; see max_length", room)
        return tokens[-room:]

    def _task_by_task(self, requests: list[Any], answer: Callable[[list[Any]], list[Answer]]) -> list[Answer]:
        """Answer the requests of each task by themselves, so that its bytes are its own."""
        found: list[Answer] = []
        for task, part in groupby(requests, lambda request: request.task_name or ""):
            self._meter = self.meters.setdefault(task, RowMeter(self.model))
            found += answer(list(part))
        return found

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes beside its results: the method, and what rows of each task held, which is logged too."""
        held = {task: result for task, meter in self.meters.items() if (result := meter.result()) is not None}
        for task, result in held.items():
            kept = f"{result.kept_tokens:.1f} tokens kept in the mean ({result.compression:.2f}x)"
            own = f"{result.kv_bytes_mean:,.0f} bytes a row, {result.kv_bytes_end:,.0f} at its end"
            logger.info("%s: %s, %s, %s at its peak", task, kept, own, f"{result.kv_bytes_peak:,.0f}")
        return {
            **measured_method(self.model, self._given),
            "kv_cache": {task: asdict(result) for task, result in held.items()},
        }


def _batch_size(given: int | str, most: int | None) -> int:
    """A number, as lm-eval's command line brings it.

    Raises:
        ValueError: It is to be found by trying.
    """
    if most is not None or not str(given).isdecimal() or int(given) < 1:
        raise UsageError(f"batch_size must be a number from 1 on, not {given!r}; none is found by trying")
    return int(given)


def _positions(model: Any) -> int:
    """Tokens of a row that a model was made for."""
    host = getattr(model.config, "host_config", None) or model.config
    return int(model.max_positions or getattr(host, "max_position_embeddings", None) or _MAX_LENGTH)
