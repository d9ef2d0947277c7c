"""``kvtrain eval``: tasks by name, a row of figures each, or one for each kind of question."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from kvtrain.data.corpus import require_corpus
from kvtrain.data.passkey import PasskeyTask
from kvtrain.data.prepare import tokenizer_digest
from kvtrain.data.retrieval import RetrievalTask
from kvtrain.errors import require_at_least
from kvtrain.evaluation.answering import refuse_uncut
from kvtrain.evaluation.continuation import check_prompt, continuation
from kvtrain.evaluation.perplexity import perplexity
from kvtrain.evaluation.recall import Ask, check_ask, recall
from kvtrain.evaluation.windows import full_windows
from kvtrain.inference.device import AUTO, pick_device
from kvtrain.inference.load import open_model
from kvtrain.models.method import Method
from kvtrain.models.parse_method import method_text


@dataclass(frozen=True)
class Settings:
    """What tasks measure on; each takes what concerns it.

    Attributes:
        corpus: Text to measure on, or to hide things in.
        sequence_length: Tokens in a window or sample.
        stride: Tokens from one window to the next; None leaves no overlap.
        limit: Windows or samples to read; None reads all windows, or as many samples as the task has.
        prompt: Tokens of a window that are read before the rest is decoded; None takes three quarters of it.
        ask: When questions are asked about a text; see ``recall``. None reads text and questions as a whole.
        decode: Feed what is read as a whole token by token, as generation does, instead of in stretches.
        passkeys: What is hidden in a sample of the task ``passkey``.
        retrieval: Likewise of ``retrieval``; each of its kinds is measured by itself.

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
    retrieval: RetrievalTask = field(default_factory=RetrievalTask)

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


Figures = dict[str, Any]
MEASURED_ON = "measured_on"  # what figures of a task must have in common to stand side by side


def _perplexity(model: Any, tokenizer: Any, asked: Settings) -> list[Figures]:
    settings: dict[str, Any] = {"stride": asked.stride, "limit": asked.limit, "chunk": asked.chunk}
    result = perplexity(model, tokenizer, asked.corpus, sequence_length=asked.sequence_length, **settings)
    return [{**_figures(result), MEASURED_ON: settings}]


def _continuation(model: Any, tokenizer: Any, asked: Settings) -> list[Figures]:
    windows = full_windows(tokenizer, asked.corpus, asked.sequence_length, asked.limit)
    prompt = asked.sequence_length * 3 // 4 if asked.prompt is None else asked.prompt
    return [{**_figures(continuation(model, windows, prompt)), MEASURED_ON: {"prompt": prompt}}]


def _passkey(model: Any, tokenizer: Any, asked: Settings) -> list[Figures]:
    return [_recall(model, tokenizer, asked, asked.passkeys)]


def _retrieval(model: Any, tokenizer: Any, asked: Settings) -> list[Figures]:
    tasks = {
        kind: replace(asked.retrieval, kinds={kind: 1.0}) for kind, share in asked.retrieval.kinds.items() if share
    }
    return [{"kind": kind, **_recall(model, tokenizer, asked, task)} for kind, task in tasks.items()]


def _recall(model: Any, tokenizer: Any, asked: Settings, task: PasskeyTask | RetrievalTask) -> Figures:
    length, limit = asked.sequence_length, asked.limit
    settings: dict[str, Any] = {"sequence_length": length, "limit": limit, "chunk": asked.chunk, "ask": asked.ask}
    figures = _figures(recall(model, tokenizer, asked.corpus, task, **settings))
    return {**figures, MEASURED_ON: {"ask": asked.ask, "chunk": asked.chunk, **asdict(task)}}


def _figures(result: Any) -> Figures:
    """All figures of a result, those of its answers among the others."""
    figures = asdict(result)
    return figures | (figures.pop("answering", None) or {})


# What each task measures: a row of figures, or several of them.
TASKS: dict[str, Callable[[Any, Any, Settings], list[Figures]]] = {
    "perplexity": _perplexity,
    "continuation": _continuation,
    "passkey": _passkey,
    "retrieval": _retrieval,
}
_READ_WHOLE = {"perplexity"}  # as one prompt
_ASKED = {"passkey", "retrieval"}  # likewise, unless it is said when to ask


def run_tasks(
    model: str,
    tasks: list[str],
    *,
    dtype: str | None = None,
    method: Method | None = None,
    device: str = AUTO,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Run tasks on a model.

    Args:
        model: Folder, Hub id, or a model of the package such as ``kvtrain:tiny``.
        tasks: Names from ``TASKS``.
        dtype: Of the weights; None takes what the folder holds.
        method: For a plain model; see ``open_model``.
        device: See ``pick_device``.
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
    loaded, tokenizer = open_model(model, method=method, device=pick_device(device), dtype=dtype or "auto")
    if _READ_WHOLE & {*tasks} or (_ASKED & {*tasks} and asked.ask is None):  # said before another task takes its time
        refuse_uncut(loaded, asked.chunk)
    named = {"model": model, **_method_of(loaded, method)}
    common = {"corpus": asked.corpus, "sequence_length": asked.sequence_length, "limit": asked.limit}
    common["tokenizer"] = tokenizer_digest(tokenizer)[:12]
    return [
        {"task": task, **named, **figures, MEASURED_ON: {**common, **figures[MEASURED_ON]}}
        for task in tasks
        for figures in TASKS[task](loaded, tokenizer, asked)
    ]


def _method_of(model: Any, given: Method | None) -> dict[str, Any]:
    """What shrinks a model's cache, and whether it was trained: neither given here nor put in by an export alone.

    Methods read as ``--method`` takes them; a model without a host has its own name in place of one.
    """
    method = getattr(model.config, "method", None)
    if method is None:
        return {"method": type(model.config).__name__.removesuffix("Config") + "()", "trained": True}
    learns = method.has_parallel_form and not method.trains_as_host
    return {"method": method_text(method), "trained": learns and given is None and not model.config.untrained}
