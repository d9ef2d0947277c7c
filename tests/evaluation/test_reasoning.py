"""reasoning-gym's tasks through the serving cache: what is asked, what is verified, what is refused."""

import pytest
import torch

import kvtrain
from kvtrain.data.tokenizer import load_tokenizer
from kvtrain.errors import UsageError
from kvtrain.evaluation import reasoning as module
from kvtrain.evaluation.evaluate import run_tasks
from kvtrain.evaluation.reasoning import ReasoningTask, reasoning

pytest.importorskip("reasoning_gym")

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tiny():
    host = kvtrain.load("kvtrain:tiny", dtype=torch.float32)
    return kvtrain.retrofit(host, kvtrain.Full()).eval(), load_tokenizer("kvtrain:tiny")


@pytest.mark.parametrize("chat", [False, True])
def test_verified_answers_score(tiny, chat, monkeypatch):
    """Every second answer is the right one, in a chat between the tags that are asked for."""
    model, tokenizer = tiny
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE if chat else None)
    task, seen = ReasoningTask("basic_arithmetic"), []
    data = task.questions(6, seed=3)
    right = ["so <answer>" + entry["answer"] + "</answer>" if chat else f" {entry['answer']}\n" for entry in data]

    def answers(model, tokenizer, prompts, decoding, meter):
        first = len(seen)
        seen.extend(tokenizer.decode(prompt) for prompt in prompts)
        return [right[place] if place % 2 else "no idea" for place in range(first, len(seen))]

    monkeypatch.setattr(module, "generate_answers", answers)
    monkeypatch.setattr(module.RowMeter, "result", lambda self: "figures")
    result = reasoning(model, tokenizer, task, limit=6, seed=3, chat_template=chat, batch=4)
    assert (result.score, result.solved, result.samples) == (pytest.approx(0.5, abs=0.01), 0.5, 6)
    assert (result.num_fewshot, result.unreadable) == (0 if chat else 2, 0)
    for prompt, entry in zip(seen, list(data)[:6], strict=True):
        assert entry["question"] in prompt
        assert prompt.endswith("<assistant>" if chat else "\nAnswer:")
        shown = [line for line in prompt.split("\n") if line.startswith(("Question: ", "<|endoftext|>Question: "))]
        assert len(shown) == len({*shown}) == (0 if chat else 3)  # none of those asked stands before
        assert prompt.startswith("<user>" if chat else "<|endoftext|>")


def test_scores_come_with_what_the_cache_holds(tiny):
    """Whatever is answered beside; an eviction leaves its budget."""
    model, tokenizer = tiny
    task = ReasoningTask("chain_sum", 6)
    method = kvtrain.StreamingLLM(budget=24, sink=2, recent=22)
    served = kvtrain.retrofit(kvtrain.load("kvtrain:tiny", dtype=torch.float32), method).eval()
    whole, parts = (reasoning(served, tokenizer, task, limit=4, batch=batch) for batch in (4, 3))
    assert (whole.score, whole.answering.kept_tokens) == (parts.score, parts.answering.kept_tokens)
    assert whole.answering.kept_tokens == 24
    full = reasoning(model, tokenizer, task, limit=4)
    assert full.answering.kept_tokens > 60 and full.answering.compression == 1


def test_an_answer_that_a_verifier_cannot_read_scores_nothing(tiny):
    """It wants numbers, and raises on words."""
    result = reasoning(*tiny, ReasoningTask("prime_factorization", 4), limit=3)
    assert (result.score, result.unreadable, result.samples) == (0, 3, 3)


def test_a_task_without_answers_shows_none(tiny):
    task = ReasoningTask("graph_color", 4)
    assert reasoning(*tiny, task, limit=2).num_fewshot == 0
    with pytest.raises(UsageError, match="has answers to verify and none to show; set num_fewshot to 0"):
        reasoning(*tiny, task, limit=2, num_fewshot=1)


def test_rows_of_the_command():
    (row,) = run_tasks("kvtrain:tiny", ["reasoning:chain_sum:4"], limit=2, seed=5, num_fewshot=1)
    assert row["task"] == "reasoning:chain_sum:4" and 0 <= row["score"] <= 1 and row["kv_bytes_mean"] > 0
    assert row["measured_on"].items() >= {"seed": 5, "num_fewshot": 1, "new_tokens": 4, "limit": 2}.items()


@pytest.mark.parametrize(
    ("task", "settings", "words"),
    [
        ("reasoning:chain_sums", {}, "unknown reasoning-gym task 'chain_sums'. Did you mean 'chain_sum'?"),
        ("reasoning:chain_sum:many", {}, "give the most tokens of an answer, such as reasoning:chain_sum:1024"),
        ("reasoning:composite", {}, "reasoning:composite generates nothing as it is"),
        ("reasoning:chain_sum", {"chat_template": True}, "has no chat template; leave --apply-chat-template out"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_a_line(task, settings, words):
    with pytest.raises(UsageError) as refusal:
        run_tasks("kvtrain:tiny", [task], limit=1, **settings)
    assert words in str(refusal.value) and "\n" not in str(refusal.value)
