"""Passkeys and names through the serving cache: against greedy decoding by hand, and what a model must find."""

import copy

import numpy as np
import pytest
import torch

import kvtrain
from kvtrain.data.passkey import PasskeyTask, PasskeyWriter
from kvtrain.data.retrieval import RetrievalTask
from kvtrain.data.tokenizer import load_tokenizer
from kvtrain.evaluation import evaluate
from kvtrain.evaluation import recall as module
from kvtrain.evaluation.answering import AnsweringMeter
from kvtrain.evaluation.evaluate import run_tasks
from kvtrain.evaluation.recall import recall
from kvtrain.evaluation.samples import corpus_tokens, draw_samples
from tests.hosts import make_host

TASK = PasskeyTask(passkeys=2, words=2)
LENGTH = 208


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("kvtrain:tiny")


@pytest.fixture(scope="module")
def model():
    host = make_host("llama", vocab_size=4096, dtype=torch.float64)
    return kvtrain.retrofit(host, kvtrain.Duo(sink=2, recent=9)).binarize(0.5, gates=torch.rand(2, 2))


def greedy(model, sample):
    """Which passkeys come out whole when the model itself goes on from the question."""
    whole = []
    for answer in sample.answers:
        ids = torch.from_numpy(sample.input_ids[: answer.start])[None]
        count = answer.stop - answer.start
        found = model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False)[0, answer.start :]
        whole.append(found.tolist() == sample.input_ids[answer].tolist())
    return whole


class Oracle:
    """Says the next token of a sample, or another one at the places given."""

    device = torch.device("cpu")

    def __init__(self, samples, wrong=()):
        self.samples, self.wrong = samples, wrong

    def make_cache(self):
        return Seen(len(self.samples))

    def get_output_embeddings(self):
        return torch.nn.Identity()

    def get_decoder(self):
        def decode(ids, past_key_values, **_):
            begin = past_key_values.seen
            past_key_values.seen += ids.shape[1]
            logits = torch.zeros(*ids.shape, 4096)
            for row, sample in enumerate(self.samples):
                for column in range(ids.shape[1]):
                    place = begin + column + 1
                    if place < len(sample.input_ids):
                        token = int(sample.input_ids[place]) + ((row, place) in self.wrong)
                        logits[row, column, token] = 1.0
            return type("Decoded", (), {"last_hidden_state": logits})

        return decode


class Seen:
    """As much of a cache as is asked for."""

    cuts_prompts = False

    def __init__(self, rows):
        self.rows, self.seen = rows, 0

    def mean_kv_tokens(self):
        return torch.full((self.rows,), self.seen / 2)

    def kv_bytes(self):
        return 100 * self.rows

    def free_bytes(self):
        return 0


def samples_of(tokenizer, count):
    return draw_samples(PasskeyWriter(tokenizer, TASK), corpus_tokens(tokenizer, "heldout"), LENGTH, count)


def test_an_oracle_finds_all_and_one_wrong_token_costs_its_passkey(tokenizer):
    samples = samples_of(tokenizer, 3)
    settings = {"sequence_length": LENGTH, "limit": 3, "chunk": 50}
    best = recall(Oracle(samples), tokenizer, "heldout", TASK, **settings)
    assert (best.accuracy, best.token_accuracy, best.answers, best.hidden) == (1.0, 1.0, 6, TASK.passkeys)
    assert best.compression == pytest.approx(2.0)
    assert best.kv_bytes_per_1024 == pytest.approx(100 / LENGTH * 1024)
    place = samples[1].answers[1].start
    worse = recall(Oracle(samples, {(1, place), (1, place - 1)}), tokenizer, "heldout", TASK, **settings)
    tokens = sum(answer.stop - answer.start for sample in samples for answer in sample.answers)
    assert worse.accuracy == pytest.approx(5 / 6)
    assert worse.token_accuracy == pytest.approx(1 - 1 / tokens)


def test_what_is_found_whole_is_what_greedy_decoding_gives(model, tokenizer):
    samples = samples_of(tokenizer, 2)
    predicted, cache = module._read(model, samples, 64)
    for row, sample in zip(predicted, samples, strict=True):
        right = [
            bool((row[answer.start - 1 : answer.stop - 1] == torch.from_numpy(sample.input_ids[answer])).all())
            for answer in sample.answers
        ]
        assert right == greedy(model, sample)
    assert cache.tokens.tolist() == [LENGTH, LENGTH]


def test_chunks_make_no_difference(model, tokenizer):
    samples = samples_of(tokenizer, 2)
    first = min(sample.answers[0].start for sample in samples) - 1
    expected, _ = module._read(model, samples, LENGTH)
    assert (expected[:, first:] >= 0).all() and (expected[:, :first] == -1).all()
    for chunk in (1, 37):
        assert torch.equal(module._read(model, samples, chunk)[0], expected)


@pytest.mark.parametrize("ask", ["after", "within"])
def test_asked_while_decoding_a_model_that_keeps_all_says_the_same(tokenizer, ask):
    host = make_host("llama", vocab_size=4096, dtype=torch.float64)
    full, samples = kvtrain.retrofit(host, kvtrain.Full()), samples_of(tokenizer, 3)
    whole, _ = module._read(full, samples, LENGTH)
    predicted, cache = module._answer(full, samples, ask, AnsweringMeter(full))
    for row, sample in enumerate(samples):
        first, asked = (sample.book if ask == "after" else sample.answers[0].start) - 1, sample.answers[0].start - 1
        assert torch.equal(predicted[row, asked:-1], whole[row, asked:-1])
        assert (predicted[row, :first] == -1).all() and (predicted[row, first:-1] >= 0).all()
    assert cache.tokens.tolist() == [LENGTH] * 3


@pytest.mark.parametrize("ask", ["after", "within"])
def test_the_cache_is_cut_before_the_first_question_or_behind_it(tokenizer, ask):
    """Against a loop by hand; the question is all that a policy knows beside the book."""
    host = make_host("llama", vocab_size=4096, dtype=torch.float64)
    model = kvtrain.retrofit(host, kvtrain.SnapKV(budget=64, recent=32)).eval()
    samples, expected = samples_of(tokenizer, 2), []
    for sample in samples:
        ids, cache, row = torch.from_numpy(sample.input_ids)[None], model.make_cache(), []
        begin = sample.book if ask == "after" else sample.answers[0].start
        text = tokenizer.decode(sample.input_ids[:begin])
        assert text.endswith("</book>.\n\n" if ask == "after" else "Passkey:")
        with torch.no_grad():
            logits = model(ids[:, :begin], past_key_values=cache, prefill=True).logits
            for place in range(begin, LENGTH):
                row.append(logits[0, -1].argmax().item())
                logits = model(ids[:, place : place + 1], past_key_values=cache).logits
        expected.append((begin, row))
    predicted, _ = module._answer(model, samples, ask, AnsweringMeter(model))
    for row, (begin, tokens) in zip(predicted, expected, strict=True):
        assert row[begin - 1 : LENGTH - 1].tolist() == tokens


def test_what_is_gone_before_it_is_asked_for_is_not_found():
    """The packaged model finds passkeys, and none that has left its cache; bytes are those of what stays."""
    task, settings = PasskeyTask(passkeys=2, words=4), {"sequence_length": 320, "limit": 4, "ask": "after"}
    (full,) = run_tasks("kvtrain:copy", ["passkey"], passkeys=task, **settings)
    assert full["accuracy"] >= 0.75 and full["kv_share_mean"] == full["kv_share_peak"] == 1
    window = kvtrain.StreamingLLM(budget=40, recent=36, sink=4)
    (cut,) = run_tasks("kvtrain:copy", ["passkey"], passkeys=task, method=window, **settings)
    assert cut["accuracy"] == 0 and cut["token_accuracy"] < 0.5
    assert 40 / 320 < cut["kv_share_end"] < 80 / 320
    (whole,) = run_tasks("kvtrain:copy", ["passkey"], passkeys=task, sequence_length=320, limit=4)
    assert (whole["accuracy"], whole["token_accuracy"]) == (full["accuracy"], full["token_accuracy"])
    assert "kv_share_end" not in whole


def test_it_is_a_task_of_eval():
    settings = {"sequence_length": LENGTH, "limit": 1, "passkeys": TASK}
    rows = run_tasks("kvtrain:tiny", ["passkey", "perplexity"], **settings)
    assert [row["task"] for row in rows] == ["passkey", "perplexity"]
    assert rows[0]["answers"] == 2 and 0 <= rows[0]["token_accuracy"] <= 1


@pytest.mark.parametrize("ask", [None, "after", "within"])
def test_each_kind_of_retrieval_is_measured_by_itself(model, tokenizer, monkeypatch, ask):
    """A row each, whose shares are those of a pass without a cache, by a model that knows three words alone."""
    guessing = copy.deepcopy(model)
    known = tokenizer(" means, and", add_special_tokens=False)["input_ids"]
    guessing.lm_head.weight.data[[token for token in range(4096) if token not in known]] = 0
    monkeypatch.setattr(evaluate, "open_model", lambda *_, **__: (guessing, tokenizer))
    kinds = {"multiquery": 1.0, "single": 0.0, "multihop": 2.0}
    task = RetrievalTask(keys=4, questions=3, kinds=kinds)
    settings = {"sequence_length": LENGTH, "limit": 3, "ask": ask}
    rows = run_tasks("m", ["retrieval"], retrieval=task, **settings)
    assert [(row["task"], row["kind"], row["answers"]) for row in rows] == [
        ("retrieval", "multiquery", 9),
        ("retrieval", "multihop", 6),
    ]
    assert 0 < rows[1]["token_accuracy"] < 0.5
    haystack = corpus_tokens(tokenizer, "heldout")
    for row in rows:
        writer = RetrievalTask(4, 3, {row["kind"]: 1.0}).writer(tokenizer)
        right = []
        for sample in draw_samples(writer, haystack, LENGTH, 3):
            logits = guessing(torch.from_numpy(sample.input_ids)[None], use_cache=False).logits[0].detach()
            right += [
                (logits[answer.start - 1 : answer.stop - 1].argmax(-1).numpy() == sample.input_ids[answer])
                for answer in sample.answers
            ]
        assert row["accuracy"] == np.mean([answer.all() for answer in right])
        assert row["token_accuracy"] == pytest.approx(np.mean(np.concatenate(right)))
        assert ("kv_share_mean" in row) == (ask is not None)


def test_nothing_to_measure(model, tokenizer, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="the corpus is empty"):
        recall(model, tokenizer, str(tmp_path / "empty.txt"), TASK)
    with pytest.raises(ValueError, match="let the limit be 1 or more"):
        recall(model, tokenizer, "heldout", TASK, limit=0)
    with pytest.raises(ValueError, match="lower words, or raise the length"):
        recall(model, tokenizer, "heldout", TASK, sequence_length=32, limit=1)
    with pytest.raises(ValueError, match="ask must be after or within, not 'before'"):
        recall(model, tokenizer, "heldout", TASK, ask="before")
    dense = kvtrain.retrofit(kvtrain.load("kvtrain:copy"), kvtrain.H2O()).eval()
    with pytest.raises(ValueError, match="all of a text would be one"):
        recall(dense, tokenizer, "heldout", TASK)


@pytest.mark.slow
def test_the_packaged_base_finds_names_and_still_reads_text():
    """As its README says: six keys in 1,024 tokens, and hardly more perplexity than the model that it comes from."""
    rows = run_tasks("kvtrain:recall", ["retrieval", "perplexity"], limit=50)
    (before,) = run_tasks("kvtrain:tiny", ["perplexity"], limit=50)
    found = {row["kind"]: row["accuracy"] for row in rows if row["task"] == "retrieval"}
    assert len(found) == 4 and min(found.values()) >= 0.9
    assert rows[-1]["perplexity"] <= 1.05 * before["perplexity"]
