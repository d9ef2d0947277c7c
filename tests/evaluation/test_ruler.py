"""RULER's kinds through the serving cache: greedy answers against ``generate``, and their score."""

import pytest
import torch

import kvtrain
from kvtrain.data.ruler import RulerTask
from kvtrain.data.ruler_kinds import KINDS
from kvtrain.data.tokenizer import load_tokenizer
from kvtrain.evaluation import evaluate
from kvtrain.evaluation import ruler as module
from kvtrain.evaluation.evaluate import run_tasks
from kvtrain.evaluation.row_meter import RowMeter
from kvtrain.evaluation.ruler import decode_greedily, ruler, string_recall
from kvtrain.evaluation.samples import corpus_tokens, draw_samples
from tests.hosts import make_host, random_ids


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("kvtrain:tiny")


def model_with(method, **settings):
    return kvtrain.retrofit(make_host("llama", dtype=torch.float64, **settings), method).eval()


def test_the_score_is_the_share_of_references_in_the_answer():
    assert string_recall("ABC, then def.", ["abc", "DEF", "ghi", "bc"]) == 0.75


@pytest.mark.parametrize("method", [kvtrain.Full(), kvtrain.SnapKV(budget=12, recent=4)], ids=["full", "snapkv"])
def test_answers_are_those_of_rows_alone(method):
    """What is left of a question behind its prompt is fed first; rows end by their own token or number of tokens."""
    model = model_with(method)
    rows, prompts, most = (
        [row[:size] for row, size in zip(random_ids(3, 50), (50, 31, 42), strict=True)],
        [50, 25, 41],
        [7, 9, 4],
    )
    alone = []
    for row, prompt, count in zip(rows, prompts, most, strict=True):
        cache, said = model.make_cache(), []
        with torch.no_grad():
            logits = model(row[None, :prompt], past_key_values=cache, prefill=True).logits[0, -1]
            cache.end_prompt()
            for token in row[prompt:]:
                logits = model(token.view(1, 1), past_key_values=cache).logits[0, -1]
            for _ in range(count):
                said.append(int(logits.argmax()))
                logits = model(torch.tensor([[said[-1]]]), past_key_values=cache).logits[0, -1]
        alone.append(said)
    meter = RowMeter(model)
    assert decode_greedily(model, rows, prompts, most, set(), meter) == alone
    assert meter.looks == sum(most) and meter.tokens == sum(map(len, rows)) + sum(most) - 3
    end = alone[0][3]
    stopped = decode_greedily(model, rows, prompts, most, {end}, RowMeter(model))
    assert stopped == [said[: said.index(end)] if end in said else said for said in alone]


class Knowing:
    """Answers as it is told, whatever the model says."""

    def __init__(self, tokenizer, answers):
        self.tokenizer, self.answers, self.asked = tokenizer, list(answers), []

    def __call__(self, model, rows, prompts, most, ends, meter):
        self.asked += zip(rows, prompts, most, strict=True)
        watch = meter.watch()
        cache = model.make_cache()
        cache.admit(len(rows))
        model(torch.ones(len(rows), 1, dtype=torch.long), past_key_values=cache)
        watch.look(cache, torch.ones(len(rows), dtype=torch.bool))
        watch.close()
        return [self.tokenizer(self.answers.pop(0), add_special_tokens=False)["input_ids"] for _ in rows]


@pytest.mark.parametrize("ask", [None, "after"])
def test_prompts_are_cut_where_they_should_be_and_answers_scored(tokenizer, monkeypatch, ask):
    model = model_with(kvtrain.Full(), vocab_size=4096)
    task = RulerTask("niah_multivalue", 512)
    writer = task.writer(tokenizer)
    haystack = corpus_tokens(tokenizer, "heldout")
    samples = draw_samples(writer, haystack, 512, 3, seed=5)
    told = [writer.references(sample) for sample in samples]
    knowing = Knowing(tokenizer, [" and ".join(told[0]), told[1][2], "none"])
    monkeypatch.setattr(module, "decode_greedily", knowing)
    result = ruler(model, tokenizer, haystack, task, limit=3, seed=5, ask=ask, batch=2)
    assert (result.recall, result.samples, result.needles) == ((1 + 1 / 4 + 0) / 3, 3, 4)
    for sample, (row, prompt, most) in zip(samples, knowing.asked, strict=True):
        assert row.tolist() == sample.input_ids[: sample.answers[0].start].tolist()
        assert prompt == (sample.book if ask else sample.answers[0].start)
        assert most == 128  # RULER's, as the expected answer is not half as long


def test_it_is_a_task_of_eval_with_a_row_for_each_kind(tokenizer, monkeypatch):
    model = model_with(kvtrain.StreamingLLM(budget=32, recent=24), vocab_size=4096)
    monkeypatch.setattr(evaluate, "open_model", lambda *_, **__: (model, tokenizer))
    monkeypatch.setattr(module, "decode_greedily", Knowing(tokenizer, [""] * 99))
    rows = run_tasks("m", ["ruler:600"], limit=1, seed=3)
    assert [row["kind"] for row in rows] == list(KINDS)
    assert {row["task"] for row in rows} == {"ruler:600"} and {row["recall"] for row in rows} == {0}
    on = rows[0]["measured_on"]
    assert (on["sequence_length"], on["seed"], on["ask"], on["limit"]) == (600, 3, "within", 1)


@pytest.mark.roads
def test_what_has_left_the_cache_is_not_said(tokenizer):
    """The packaged base copies; a window of the latest tokens is all that it has left here."""
    settings = {"limit": 2, "seed": 1}
    method = kvtrain.StreamingLLM(budget=40, recent=36, sink=4, page_size=8)
    (row,) = run_tasks("kvtrain:tiny", ["ruler:400:niah_single_2"], method=method, **settings)
    assert row["recall"] == 0 and row["kept_tokens"] < 60 and row["compression"] > 6
    assert row["kv_share_peak"] > row["kv_share_end"]


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("ruler:", "give a length in tokens, such as ruler:4096"),
        ("ruler:4k", "ruler:4k: give a length in tokens"),
        ("ruler:0", "give a length in tokens"),
        ("ruler:512:cwo", r"unknown kind of ruler 'cwo'\. Did you mean 'cwe'"),
        ("ruler:200", "a sample of 200 tokens cannot hold"),
        ("rular:512", r"unknown task 'rular:512'"),
    ],
)
def test_mistakes(task, words):
    with pytest.raises(ValueError, match=words):
        run_tasks("kvtrain:copy", [task], limit=1)
