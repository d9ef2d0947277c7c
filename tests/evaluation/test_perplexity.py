"""Perplexity through the serving cache."""

import json
import math
from typing import NamedTuple

import pytest
import torch

import kvtrain
from kvtrain.assets import resolve
from kvtrain.data.tokenizer import load_tokenizer
from kvtrain.evaluation.evaluate import run_tasks
from kvtrain.evaluation.perplexity import perplexity
from tests.hosts import VOCAB, make_host, set_bias

LENGTH = 64
STRIDES = pytest.mark.parametrize("stride", [None, 40, 9])


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("kvtrain:tiny")


@pytest.fixture
def corpus(tmp_path):
    texts = ["import os\n" * 30, "x = 1\n", "def f(a, b):\n    return a + b\n" * 20]
    return write(tmp_path / "corpus.jsonl", texts), texts


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def dmc_model(vocab_size=4096):
    """A model about half of whose decisions merge."""
    model = kvtrain.retrofit(make_host("llama", vocab_size=vocab_size), kvtrain.DMC(page_size=16))
    set_bias(model, 0.0)
    return model


class Naive(NamedTuple):
    """What one window costs, from one forward pass without padding, batching or a cache."""

    losses: torch.Tensor  # (n,) of the token after each prefix of 1, 2, ... tokens; NaN where it is no target
    slots: torch.Tensor  # (n + 1,) kept after each of these prefixes, mean over layers and heads


def naive_window(model, window, first_target):
    ids, outputs = torch.tensor([window]), {}
    with torch.no_grad():
        logits = model(ids, use_cache=False, outputs=outputs).logits[0]
    losses = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")
    losses[: first_target - 1] = torch.nan
    opened = torch.stack([1 - decisions[0] for decisions in outputs.values()]).double()
    opened[..., 0] = 1
    return Naive(losses, opened.cumsum(-1).mean((0, 1)))


def naive(model, tokenizer, texts, stride):
    """Windows of a sliding evaluation, as everyone writes the loop."""
    found = []
    for text in texts:
        ids, previous = tokenizer(text, add_special_tokens=False)["input_ids"], 0
        for begin in range(0, len(ids), min(stride or LENGTH, LENGTH - 1)):
            end = min(begin + LENGTH - 1, len(ids))
            window = [tokenizer.bos_token_id, *ids[begin:end]]
            found.append(naive_window(model, window, len(window) - (end - previous)))
            previous = end
            if end == len(ids):
                break
    return found


@STRIDES
def test_it_is_the_mean_loss_of_every_window(corpus, tokenizer, stride):
    path, texts = corpus
    model = dmc_model()
    windows = naive(model, tokenizer, texts, stride)
    losses = torch.cat([window.losses for window in windows])
    total, count = losses.nansum().item(), losses.isfinite().sum().item()
    result = perplexity(model, tokenizer, path, sequence_length=LENGTH, stride=stride)
    assert result.tokens == count == sum(len(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in texts)
    assert result.perplexity == pytest.approx(math.exp(total / count), rel=1e-9)
    assert result.bits_per_byte == pytest.approx(total / math.log(2) / sum(len(t.encode()) for t in texts), rel=1e-9)
    slots, tokens = sum(w.slots[-1].item() for w in windows), sum(len(w.slots) for w in windows)
    assert result.compression == pytest.approx(tokens / slots, rel=1e-9)
    assert result.compression > 1.2


@STRIDES
def test_positions(corpus, tokenizer, stride):
    """Losses by the tokens read before a prediction, and what the cache held when so many were read."""
    path, texts = corpus
    model = dmc_model()
    windows = naive(model, tokenizer, texts, stride)
    result = perplexity(model, tokenizer, path, sequence_length=LENGTH, stride=stride)
    assert [bucket.position for bucket in result.by_position] == list(range(4, LENGTH + 1, 4))
    for bucket in result.by_position:
        end = bucket.position
        losses = torch.cat([window.losses[end - 4 : end] for window in windows])
        assert bucket.targets == losses.isfinite().sum()
        assert bucket.loss == pytest.approx(losses.nanmean().item(), rel=1e-9)
        assert bucket.perplexity == pytest.approx(math.exp(bucket.loss), rel=1e-9)
        reached = [window.slots[end - 1].item() for window in windows if len(window.slots) >= end]
        assert bucket.kept == pytest.approx(sum(reached) / len(reached), rel=1e-9)
    total = sum(bucket.loss * bucket.targets for bucket in result.by_position)
    assert sum(bucket.targets for bucket in result.by_position) == result.tokens
    assert math.exp(total / result.tokens) == pytest.approx(result.perplexity, rel=1e-9)


@pytest.mark.parametrize("chunk", [1, 3])
def test_the_chunk_changes_nothing(corpus, tokenizer, chunk):
    """Token by token, in odd chunks, or in whole buckets."""
    settings = {"sequence_length": LENGTH, "stride": 30}
    model = dmc_model()
    results = [perplexity(model, tokenizer, corpus[0], chunk=size, **settings) for size in (chunk, None)]
    ours, theirs = ([r.perplexity, r.bits_per_byte, r.compression, r.tokens] for r in results)
    assert ours == pytest.approx(theirs, rel=1e-9)
    for mine, other in zip(*(result.by_position for result in results), strict=True):
        assert (mine.position, mine.targets) == (other.position, other.targets)
        assert (mine.loss, mine.kept) == pytest.approx((other.loss, other.kept), rel=1e-9)
    assert results[0].kv_bytes_per_1024 == pytest.approx(results[1].kv_bytes_per_1024, rel=0.001)


def test_kept_slots_are_the_caches(corpus, tokenizer):
    model = dmc_model()
    result = perplexity(model, tokenizer, corpus[0], sequence_length=LENGTH, limit=1)
    ids = tokenizer(corpus[1][0], add_special_tokens=False)["input_ids"][: LENGTH - 1]
    window, cache = torch.tensor([[tokenizer.bos_token_id, *ids]]), model.make_cache()
    for bucket in result.by_position:
        with torch.no_grad():
            model(window[:, bucket.position - 4 : bucket.position], past_key_values=cache)
        assert bucket.kept == pytest.approx(cache.kv_tokens().double().mean().item(), rel=1e-12)
    assert result.kv_bytes_per_1024 == pytest.approx((cache.kv_bytes() - cache.free_bytes()) * 1024 / LENGTH)


def test_buckets_that_no_window_reaches(tmp_path, tokenizer):
    """A start token and ten more: the third bucket has targets and no end, those beyond it are absent."""
    path = write(tmp_path / "a.jsonl", ["x = 1\n" * 2])
    result = perplexity(dmc_model(), tokenizer, path, sequence_length=LENGTH)
    assert [(bucket.position, bucket.targets) for bucket in result.by_position] == [(4, 4), (8, 4), (12, 2)]
    assert [bucket.kept is None for bucket in result.by_position] == [False, False, True]
    assert result.kv_bytes_per_1024 is None


def test_bytes_are_those_of_a_full_window(corpus, tokenizer):
    path, _ = corpus
    model = dmc_model()
    set_bias(model, 50.0)  # nothing merges
    result = perplexity(model, tokenizer, path, sequence_length=LENGTH)
    cache = model.make_cache()
    with torch.no_grad():
        model(torch.ones(1, LENGTH, dtype=torch.long), past_key_values=cache)
    assert result.kv_bytes_per_1024 == pytest.approx(cache.kv_bytes() * 16, rel=0.02)


def test_bytes_of_text_count_once_where_a_window_cuts_a_character(tmp_path, tokenizer):
    text = "π≈3.14159 — 数学 🎲 " * 12
    assert len(tokenizer(text, add_special_tokens=False)["input_ids"]) > 3 * LENGTH
    path = write(tmp_path / "a.jsonl", [text])
    for stride in (7, None):
        result = perplexity(dmc_model(), tokenizer, path, sequence_length=LENGTH, stride=stride)
        total = math.log(result.perplexity) * result.tokens
        assert total / math.log(2) / result.bits_per_byte == pytest.approx(len(text.encode()), rel=1e-9)


class Letters:
    """A tokenizer without a start token: one token a character."""

    bos_token_id, pad_token_id = None, None

    def __call__(self, text, **_):
        ids = [3 + ord(letter) % (VOCAB - 3) for letter in text]
        return {"input_ids": ids, "offset_mapping": [(place, place + 1) for place in range(len(text))]}


@pytest.mark.parametrize(("stride", "targets"), [(None, 9 + 9 + 4), (10, 9 + 9 + 4), (9, 24), (4, 24)])
def test_without_a_start_token_a_window_s_first_token_is_no_target(tmp_path, stride, targets):
    path = write(tmp_path / "a.jsonl", ["abcdefghijklmnopqrstuvwxy"])  # 25 tokens
    model = dmc_model(VOCAB)
    result = perplexity(model, Letters(), path, sequence_length=10, stride=stride)
    assert result.tokens == targets
    total = math.log(result.perplexity) * result.tokens
    assert total / math.log(2) / result.bits_per_byte == pytest.approx(targets, rel=1e-9)


def test_limits_and_errors(tmp_path, corpus, tokenizer):
    model = dmc_model()
    assert perplexity(model, tokenizer, corpus[0], sequence_length=64, limit=1).tokens == 63
    for wrong in ({"stride": 0}, {"stride": 65}, {"chunk": 0}, {"sequence_length": 1}):
        with pytest.raises(ValueError, match=r"use \d"):
            perplexity(model, tokenizer, corpus[0], **{"sequence_length": 64, **wrong})
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    with pytest.raises(ValueError, match="empty"):
        perplexity(model, tokenizer, str(empty))
    with pytest.raises(ValueError, match=r"unknown task 'speling'\. There are perplexity"):
        run_tasks("kvtrain:tiny", ["speling"])
    with pytest.raises(ValueError, match="no model at"):
        run_tasks(str(tmp_path / "nothing"), ["perplexity"])
    with pytest.raises(ValueError, match="kvtrain:tiny"):
        resolve("kvtrain:huge")


def test_the_command_s_figures(corpus):
    """Every setting arrives, and what it gives can be written as JSON."""
    settings = {"corpus": corpus[0], "sequence_length": LENGTH, "stride": 16, "limit": 2, "dtype": "float32"}
    (fed,) = run_tasks("kvtrain:tiny", ["perplexity"], **settings)
    (decoded,) = run_tasks("kvtrain:tiny", ["perplexity"], decode=True, **settings)
    assert (fed["task"], fed["model"], fed["tokens"]) == ("perplexity", "kvtrain:tiny", 63 + 16)
    assert decoded["perplexity"] == pytest.approx(fed["perplexity"], rel=1e-4)
    assert json.loads(json.dumps(fed))["by_position"][3] == fed["by_position"][3]
    assert fed["by_position"][3].keys() == {"position", "loss", "perplexity", "targets", "kept"}
