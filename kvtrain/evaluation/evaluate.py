"""``kvtrain eval``: tasks by name, one row of figures each."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from kvtrain.data.corpus import require_corpus
from kvtrain.data.passkey import PasskeyTask
from kvtrain.errors import require_at_least
from kvtrain.evaluation.answering import refuse_uncut
from kvtrain.evaluation.continuation import ContinuationResult, check_prompt, continuation
from kvtrain.evaluation.passkey import Ask, PasskeyResult, check_ask, passkey
from kvtrain.evaluation.perplexity import PerplexityResult, perplexity
from kvtrain.evaluation.windows import full_windows
from kvtrain.inference.load import open_model
from kvtrain.models.method import Method
from kvtrain.models.parse_method import method_text


@dataclass(frozen=True)
class Settings:
    """What tasks measure on; each takes what concerns it.

    Attributes:
        corpus: Text to measure on, or to hide passkeys in.
        sequence_length: Tokens in a window or sample.
        stride: Tokens from one window to the next; None leaves no overlap.
        limit: Windows or samples to read; None reads all windows, or as many samples as the task has.
        prompt: Tokens of a window that are read before the rest is decoded; None takes three quarters of it.
        ask: When passkeys are asked for; see ``passkey``. None reads book and questions as a whole.
        decode: Feed what is read as a whole token by token, as generation does, instead of in stretches.
        passkeys: What is hidden in a sample.

    Raises:
        ValueError: A number is out of range, there is no such corpus, or no such time to ask.
    """

    corpus: str = "heldout"
    sequence_length: int = 1024
    stride: int | None = None
    limit: int | None = None
    prompt: int | None = None
    ask: Ask | None = None
    decode: bool = False
    passkeys: PasskeyTask = field(default_factory=PasskeyTask)

    def __post_init__(self) -> None:
        require_at_least(2, "sequence_length", self.sequence_length)
        require_at_least(1, "limit", self.limit)
        require_corpus(self.corpus)
        check_ask(self.ask)
        if self.prompt is not None:
            check_prompt(self.prompt, self.sequence_length)

    @property
    def chunk(self) -> int | None:
        """Tokens fed at a time; None leaves it to the task."""
        return 1 if self.decode else None


def _perplexity(model: Any, tokenizer: Any, asked: Settings) -> PerplexityResult:
    length, stride = asked.sequence_length, asked.stride
    return perplexity(
        model, tokenizer, asked.corpus, sequence_length=length, stride=stride, limit=asked.limit, chunk=asked.chunk
    )


def _passkey(model: Any, tokenizer: Any, asked: Settings) -> PasskeyResult:
    length, limit = asked.sequence_length, asked.limit
    return passkey(
        model,
        tokenizer,
        asked.corpus,
        asked.passkeys,
        sequence_length=length,
        limit=limit,
        chunk=asked.chunk,
        ask=asked.ask,
    )


def _continuation(model: Any, tokenizer: Any, asked: Settings) -> ContinuationResult:
    windows = full_windows(tokenizer, asked.corpus, asked.sequence_length, asked.limit)
    return continuation(model, windows, asked.sequence_length * 3 // 4 if asked.prompt is None else asked.prompt)


TASKS: dict[str, Callable[[Any, Any, Settings], Any]] = {
    "perplexity": _perplexity,
    "continuation": _continuation,
    "passkey": _passkey,
}


def run_tasks(
    model: str, tasks: list[str], *, dtype: str | None = None, method: Method | None = None, **settings: Any
) -> list[dict[str, Any]]:
    """Run tasks on a model.

    Args:
        model: Folder, Hub id, or a model of the package such as ``kvtrain:tiny``.
        tasks: Names from ``TASKS``.
        dtype: Of the weights; None takes what the folder holds.
        method: For a plain model; see ``open_model``.
        **settings: See ``Settings``.

    Raises:
        ValueError: Unknown task, model or corpus, or a task that the model's method leaves nothing to measure.
    """
    if not tasks:
        raise ValueError(f"no task to run; there are {', '.join(TASKS)}")
    for task in tasks:
        if task not in TASKS:
            raise ValueError(f"unknown task {task!r}; there are {', '.join(TASKS)}")
    asked = Settings(**settings)
    loaded, tokenizer = open_model(model, method=method, dtype=dtype or "auto")
    if "perplexity" in tasks or ("passkey" in tasks and asked.ask is None):  # said before another task takes its time
        refuse_uncut(loaded, asked.chunk)
    named = {"model": model, **_method_of(loaded, method), "corpus": asked.corpus, "length": asked.sequence_length}
    return [{"task": task, **named, **_figures(TASKS[task](loaded, tokenizer, asked))} for task in tasks]


def _method_of(model: Any, given: Method | None) -> dict[str, Any]:
    """What shrinks a model's cache, as ``--method`` takes it, and whether weights were trained with it in them."""
    method = getattr(model.config, "method", None)
    if method is None:
        return {"method": type(model.config).__name__.removesuffix("Config") + "()", "trained": True}
    trained = given is None and method.has_parallel_form and not method.trains_as_host
    return {"method": method_text(method), "trained": trained}


def _figures(result: Any) -> dict[str, Any]:
    """All figures of a result, those of its answers among the others."""
    figures = asdict(result)
    return figures | (figures.pop("answering", None) or {})
