"""Tasks that reasoning-gym generates and verifies, answered through the cache that serves."""

import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvtrain.errors import UsageError, unknown
from kvtrain.evaluation.lm_eval.generation import Decoding, generate_answers
from kvtrain.evaluation.row_meter import RowFigures, RowMeter
from kvtrain.evaluation.samples import SAMPLES
from kvtrain.inference.prompt import beyond_positions, chat_ids, prompt_ids

NEW_TOKENS = 256  # of an answer, where nobody says how many
_BATCH = 8
_STOP = "\n\nQuestion:"
_EXAMPLES = 2  # before a question, where nobody says how many and no template asks for the answer's form
_ASK_FOR_TAGS = "Put your final answer, and nothing else, between <answer> and </answer>."


@dataclass(frozen=True)
class ReasoningResult:
    """How well a model answers.

    Attributes:
        score: What the task's own verifier gives its answers, from 0 to 1, in the mean.
        solved: Share of answers with the full score.
        unreadable: Answers on which the verifier fails, which score nothing.
        samples: How many there are.
        num_fewshot: Examples before each question.
        answering: What the cache holds while answers are decoded.
    """

    score: float
    solved: float
    unreadable: int
    samples: int
    num_fewshot: int
    answering: RowFigures


@dataclass(frozen=True)
class ReasoningTask:
    """One of reasoning-gym's tasks, with its settings as the package has them.

    Args:
        name: As reasoning-gym knows it.
        new_tokens: Of an answer, at most.

    Raises:
        UsageError: There is none of this name, or reasoning-gym is not installed.
    """

    name: str
    new_tokens: int = NEW_TOKENS

    def __post_init__(self) -> None:
        names = _package().factory.DATASETS
        if self.name not in names:
            raise UsageError(unknown("reasoning-gym task", self.name, names))

    def questions(self, count: int, seed: int) -> Any:
        """Questions with what verifies their answers.

        Args:
            count: How many.
            seed: Which.

        Raises:
            UsageError: The task generates nothing by itself.
        """
        try:
            return _package().create_dataset(self.name, size=count, seed=seed)
        except (AssertionError, ValueError) as error:
            raise UsageError(f"reasoning:{self.name} generates nothing as it is: {error}") from error


def reasoning(
    model: Any,
    tokenizer: Any,
    task: ReasoningTask,
    *,
    limit: int | None = None,
    seed: int = 0,
    num_fewshot: int | None = None,
    chat_template: bool = False,
    batch: int = _BATCH,
) -> ReasoningResult:
    """Let a model answer greedily, and its answers be verified.

    In the tokenizer's chat template a model is asked to put its answer between tags; without one it is shown questions
    with their answers, and ends by beginning another question.

    Args:
        model: From ``open_model``.
        tokenizer: Its tokenizer.
        task: What is asked.
        limit: Questions; 50 where absent.
        seed: Of the questions.
        num_fewshot: Examples before each question, which are none of those asked; None: 2, but none in a template, nor
            where the task has no answer to show.
        chat_template: Whether questions are put into the tokenizer's chat template.
        batch: Questions that are answered at a time; no figure depends on it.

    Raises:
        ValueError: The tokenizer has no chat template, the task has nothing to show or generates nothing by itself, or
            the model has too few positions.
    """
    count = SAMPLES if limit is None else limit
    data = task.questions(count, seed)
    asked = [data[place] for place in range(count)]
    examples = _examples(task, asked, seed, num_fewshot, chat_template)
    write = _chat if chat_template else _completion
    prompts = [write(tokenizer, examples, entry["question"]) for entry in asked]
    if reason := beyond_positions(model.max_positions, max(map(len, prompts)), task.new_tokens):
        raise UsageError(f"reasoning:{task.name}: {reason}")
    decoding, meter = Decoding(task.new_tokens, () if chat_template else (_STOP,)), RowMeter(model)
    scores: list[float | None] = []
    for begin in range(0, count, batch):
        texts = generate_answers(model, tokenizer, prompts[begin : begin + batch], decoding, meter)
        scores += [_score(data, text, entry) for text, entry in zip(texts, asked[begin : begin + batch], strict=True)]
    answering = meter.result()
    assert answering is not None
    read = [score for score in scores if score is not None]
    solved, unreadable = sum(score == 1.0 for score in read) / count, count - len(read)
    return ReasoningResult(sum(read) / count, solved, unreadable, count, len(examples), answering)


def _examples(
    task: ReasoningTask, asked: Sequence[dict[str, Any]], seed: int, num_fewshot: int | None, chat_template: bool
) -> list[dict[str, Any]]:
    """Questions with answers to show, of another seed and none of those asked."""
    shows = all(isinstance(entry["answer"], str) for entry in asked)
    count = (0 if chat_template or not shows else _EXAMPLES) if num_fewshot is None else num_fewshot
    if count and not shows:
        raise UsageError(f"reasoning:{task.name} has answers to verify and none to show; set num_fewshot to 0")
    questions, found = {entry["question"] for entry in asked}, list[dict[str, Any]]()
    others = task.questions(4 * count, seed + 1) if count else ()
    for entry in others:
        if entry["question"] not in questions and len(found) < count:
            found.append(entry)
    if len(found) < count:
        raise UsageError(
            f"reasoning:{task.name} repeats itself: no {count} examples are none of the {len(asked)} asked"
        )
    return found


def _score(data: Any, text: str, entry: dict[str, Any]) -> float | None:
    """What the verifier says of what stands between the last tags, or of all where there are none; None if it fails."""
    found = _package().utils.extract_answer(text)
    try:
        return float(data.score_answer((text if found is None else found).strip(), entry))
    except Exception:  # a verifier is a program, and some read whatever they are given as JSON or as numbers
        return None


def package_version() -> str:
    """Of reasoning-gym, whose questions may change with it."""
    return importlib.metadata.version("reasoning-gym")


def _completion(tokenizer: Any, examples: Sequence[dict[str, Any]], question: str) -> list[int]:
    shown = [f"Question: {example['question']}\nAnswer: {example['answer']}\n\n" for example in examples]
    return prompt_ids(tokenizer, "".join([*shown, f"Question: {question}\nAnswer:"]))


def _chat(tokenizer: Any, examples: Sequence[dict[str, Any]], question: str) -> list[int]:
    turns = []
    for example in examples:
        answer = f"<answer>{example['answer']}</answer>"
        turns += [_turn("user", f"{example['question']}\n\n{_ASK_FOR_TAGS}"), _turn("assistant", answer)]
    return chat_ids(tokenizer, [*turns, _turn("user", f"{question}\n\n{_ASK_FOR_TAGS}")])


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _package() -> Any:
    try:
        import reasoning_gym
        import reasoning_gym.utils
    except ImportError as error:
        raise UsageError("reasoning tasks need reasoning-gym; pip install 'kvtrain[reasoning]'") from error
    return reasoning_gym
