"""Tasks that reasoning-gym generates and verifies, answered through the cache that serves."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvtrain.errors import UsageError, unknown
from kvtrain.evaluation.lm_eval.generation import Decoding, generate_answers
from kvtrain.evaluation.row_meter import RowFigures, RowMeter
from kvtrain.evaluation.samples import SAMPLES

NEW_TOKENS = 256  # of an answer, where nobody says how many
_BATCH = 8
_STOP = "\n\nQuestion:"
_ASK_FOR_TAGS = "Put your final answer, and nothing else, between <answer> and </answer>."


@dataclass(frozen=True)
class ReasoningResult:
    """How well a model answers.

    Attributes:
        score: What the task's own verifier gives its answers, from 0 to 1, in the mean.
        solved: Share of answers with the full score.
        samples: How many there are.
        answering: What the cache holds while answers are decoded.
    """

    score: float
    solved: float
    samples: int
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
            seed: Which; the first ones are the same whatever their number.

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
        num_fewshot: Examples before each question, which are none of those asked; None: 2, and none in a template.
        chat_template: Whether questions are put into the tokenizer's chat template.
        batch: Questions that are answered at a time; no figure depends on it.

    Raises:
        UsageError: The tokenizer has no chat template, or the task generates nothing by itself.
    """
    if chat_template and not tokenizer.chat_template:
        raise UsageError("the tokenizer has no chat template; leave --apply-chat-template out")
    count = SAMPLES if limit is None else limit
    shown = (0 if chat_template else 2) if num_fewshot is None else num_fewshot
    data = task.questions(count + shown, seed)
    entries = [data[place] for place in range(count + shown)]
    asked, examples = entries[:count], entries[count:]
    write = _chat if chat_template else _completion
    prompts = [write(tokenizer, examples, entry["question"]) for entry in asked]
    decoding, meter, scores = Decoding(task.new_tokens, () if chat_template else (_STOP,)), RowMeter(model), []
    for begin in range(0, count, batch):
        texts = generate_answers(model, tokenizer, prompts[begin : begin + batch], decoding, meter)
        scores += [_score(data, text, entry) for text, entry in zip(texts, asked[begin : begin + batch], strict=True)]
    answering = meter.result()
    assert answering is not None
    return ReasoningResult(sum(scores) / count, sum(score == 1.0 for score in scores) / count, count, answering)


def _score(data: Any, text: str, entry: dict[str, Any]) -> float:
    """What the verifier says of what stands between the last tags, or of all where there are none."""
    found = _package().utils.extract_answer(text)
    return float(data.score_answer((text if found is None else found).strip(), entry))


def _completion(tokenizer: Any, examples: Sequence[dict[str, Any]], question: str) -> list[int]:
    shown = [f"Question: {example['question']}\nAnswer: {example['answer']}\n\n" for example in examples]
    ids: list[int] = tokenizer("".join([*shown, f"Question: {question}\nAnswer:"]))["input_ids"]
    return ids


def _chat(tokenizer: Any, examples: Sequence[dict[str, Any]], question: str) -> list[int]:
    turns = []
    for example in examples:
        answer = f"<answer>{example['answer']}</answer>"
        turns += [_turn("user", f"{example['question']}\n\n{_ASK_FOR_TAGS}"), _turn("assistant", answer)]
    turns.append(_turn("user", f"{question}\n\n{_ASK_FOR_TAGS}"))
    settings = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
    ids: list[int] = tokenizer.apply_chat_template(turns, **settings)
    return ids


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _package() -> Any:
    try:
        import reasoning_gym
        import reasoning_gym.utils
    except ImportError as error:
        raise UsageError("reasoning tasks need reasoning-gym; pip install 'kvtrain[reasoning]'") from error
    return reasoning_gym
