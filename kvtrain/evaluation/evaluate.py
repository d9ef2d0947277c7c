"""``kvtrain eval``: tasks by name, a row of figures each, or one for each kind of question or each of lm-eval's."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from kvtrain.data.corpus import require_corpus
from kvtrain.data.passkey import PasskeyTask
from kvtrain.data.prepare import tokenizer_digest
from kvtrain.data.retrieval import RetrievalTask
from kvtrain.errors import UsageError, require_at_least, require_seed, unknown
from kvtrain.evaluation.answering import refuse_uncut
from kvtrain.evaluation.continuation import check_prompt, continuation
from kvtrain.evaluation.measured_method import measured_method
from kvtrain.evaluation.perplexity import perplexity
from kvtrain.evaluation.recall import Ask, check_ask, recall
from kvtrain.evaluation.samples import corpus_tokens
from kvtrain.evaluation.windows import full_windows
from kvtrain.inference.device import AUTO, pick_device
from kvtrain.inference.load import open_model
from kvtrain.models.method import Method


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
        seed: Of the samples of ``ruler`` and ``reasoning``.
        num_fewshot: Examples before each question of ``lm-eval`` and ``reasoning``; None leaves it to them.
        chat_template: Whether their questions are put into the tokenizer's chat template.

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
    seed: int = 0
    num_fewshot: int | None = None
    chat_template: bool = False

    def __post_init__(self) -> None:
        require_at_least(2, "sequence_length", self.sequence_length)
        require_at_least(1, "limit", self.limit)
        require_at_least(0, "num_fewshot", self.num_fewshot)
        require_seed("seed", self.seed)
        require_corpus(self.corpus)
        check_ask(self.ask)
        if self.prompt is not None:
            check_prompt(self.prompt, self.sequence_length)

    @property
    def chunk(self) -> int | None:
        """Tokens fed at a time; None leaves it to the task."""
        return 1 if self.decode else None

    @property
    def text(self) -> dict[str, Any]:
        """What is read of which text, for tasks that are made of one."""
        return {"corpus": self.corpus, "sequence_length": self.sequence_length}


Figures = dict[str, Any]
MEASURED_ON = "measured_on"  # what figures of a task must have in common to stand side by side


def _perplexity(model: Any, tokenizer: Any, asked: Settings) -> list[Figures]:
    settings: dict[str, Any] = {"stride": asked.stride, "limit": asked.limit, "chunk": asked.chunk}
    result = perplexity(model, tokenizer, asked.corpus, sequence_length=asked.sequence_length, **settings)
    return [{**_figures(result), MEASURED_ON: {**asked.text, **settings}}]


def _continuation(model: Any, tokenizer: Any, asked: Settings) -> list[Figures]:
    windows = full_windows(tokenizer, asked.corpus, asked.sequence_length, asked.limit)
    prompt = asked.sequence_length * 3 // 4 if asked.prompt is None else asked.prompt
    return [{**_figures(continuation(model, windows, prompt)), MEASURED_ON: {**asked.text, "prompt": prompt}}]


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
    return {**figures, MEASURED_ON: {**asked.text, "ask": asked.ask, "chunk": asked.chunk, **asdict(task)}}


def _figures(result: Any) -> Figures:
    """All figures of a result, those of its answers among the others."""
    figures = asdict(result)
    return figures | (figures.pop("answering", None) or {})


def _lm_eval(name: str) -> "Task":
    from kvtrain.evaluation.lm_eval.tasks import LmEvalTask

    found = LmEvalTask(name)

    def measure(model: Any, tokenizer: Any, asked: Settings) -> list[Figures]:
        settings: dict[str, Any] = {"limit": asked.limit, "decode": asked.decode}
        return found.measure(
            model, tokenizer, num_fewshot=asked.num_fewshot, chat_template=asked.chat_template, **settings
        )

    return measure


def _ruler(argument: str) -> "Task":
    """``LENGTH``, or ``LENGTH:KIND``."""
    from kvtrain.data.ruler import RulerTask
    from kvtrain.data.ruler_kinds import KINDS

    length, _, kind = argument.partition(":")
    if not length.isdecimal() or int(length) < 1:
        raise UsageError(f"ruler:{argument}: give a length in tokens, such as ruler:4096 or ruler:4096:vt")
    found = [RulerTask(name, int(length)) for name in ([kind] if kind else KINDS)]

    def measure(model: Any, tokenizer: Any, asked: Settings) -> list[Figures]:
        for task in found:  # said before any of them takes its time
            task.writer(tokenizer).require(task.length)
        haystack = corpus_tokens(tokenizer, asked.corpus)
        return [_ruler_row(model, tokenizer, asked, task, haystack) for task in found]

    return measure


def _ruler_row(model: Any, tokenizer: Any, asked: Settings, task: Any, haystack: Any) -> Figures:
    from kvtrain.evaluation.ruler import ruler

    result = ruler(model, tokenizer, haystack, task, limit=asked.limit, seed=asked.seed, ask=asked.ask)
    on = {"corpus": asked.corpus, "sequence_length": task.length, "ask": asked.ask or "within", "seed": asked.seed}
    return {"kind": task.kind, **_figures(result), MEASURED_ON: on}


def _reasoning(argument: str) -> "Task":
    """``NAME``, or ``NAME:TOKENS``."""
    from kvtrain.evaluation.reasoning import NEW_TOKENS, ReasoningTask, package_version, reasoning

    name, colon, tokens = argument.partition(":")
    if colon and (not tokens.isdecimal() or int(tokens) < 1):
        raise UsageError(f"reasoning:{argument}: give the most tokens of an answer, such as reasoning:{name}:1024")
    task = ReasoningTask(name, int(tokens) if colon else NEW_TOKENS)

    def measure(model: Any, tokenizer: Any, asked: Settings) -> list[Figures]:
        settings: dict[str, Any] = {"seed": asked.seed, "chat_template": asked.chat_template}
        found = reasoning(model, tokenizer, task, limit=asked.limit, num_fewshot=asked.num_fewshot, **settings)
        used = {"num_fewshot": found.num_fewshot, "new_tokens": task.new_tokens, "version": package_version()}
        return [{**_figures(found), MEASURED_ON: {**settings, **used}}]

    return measure


Task = Callable[[Any, Any, Settings], list[Figures]]  # a row of figures, or several of them
TASKS: dict[str, Task] = {
    "perplexity": _perplexity,
    "continuation": _continuation,
    "passkey": _passkey,
    "retrieval": _retrieval,
}
# Tasks with an argument, ``FAMILY:ARGUMENT``, which is refused before a model is read.
FAMILIES: dict[str, Callable[[str], Task]] = {"lm-eval": _lm_eval, "reasoning": _reasoning, "ruler": _ruler}
_FORMS = (*TASKS, "lm-eval:NAME", "reasoning:NAME", "ruler:LENGTH")
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
        tasks: Names from ``TASKS``, or of a family with an argument.
        dtype: Of the weights; None takes what the folder holds.
        method: For a plain model; see ``open_model``.
        device: See ``pick_device``.
        **settings: See ``Settings``.

    Raises:
        ValueError: Unknown task, model or corpus, or a task that the model's method leaves nothing to measure.
    """
    if not tasks:
        raise ValueError(f"no task to run; there are {', '.join(_FORMS)}")
    found = {task: _find(task) for task in tasks}
    asked = Settings(**settings)
    loaded, tokenizer = open_model(model, method=method, device=pick_device(device), dtype=dtype or "auto")
    if _READ_WHOLE & {*tasks} or (_ASKED & {*tasks} and asked.ask is None):  # said before another task takes its time
        refuse_uncut(loaded, asked.chunk)
    named = {"model": model, **measured_method(loaded, method)}
    common = {"limit": asked.limit, "tokenizer": tokenizer_digest(tokenizer)[:12]}
    return [
        {"task": task, **named, **figures, MEASURED_ON: {**figures[MEASURED_ON], **common}}
        for task, measure in found.items()
        for figures in measure(loaded, tokenizer, asked)
    ]


def _find(name: str) -> Task:
    """The task of a name.

    Raises:
        ValueError: There is none.
    """
    family, colon, argument = name.partition(":")
    if colon and family in FAMILIES:
        return FAMILIES[family](argument)
    if name not in TASKS:
        raise UsageError(unknown("task", name, TASKS, f"There are {', '.join(_FORMS)}"))
    return TASKS[name]
