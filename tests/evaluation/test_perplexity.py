"""Perplexity through the serving cache."""

import json
import math

import pytest
import torch

import kvtrain
from kvtrain.assets import resolve
from kvtrain.data.tokenizer import load_tokenizer
from kvtrain.evaluation.evaluate import run_tasks
from kvtrain.evaluation.perplexity import perplexity
from kvtrain.models.host import KVTrainMixin
from tests.hosts import make_host, set_bias


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("kvtrain:tiny")


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    texts = ["import os\n" * 30, "x = 1\n", "def f(a, b):\n    return a + b\n" * 20]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path), texts


def dmc_model():
    host = make_host("llama", dtype=torch.float32, vocab_size=4096)
    model = kvtrain.retrofit(host, kvtrain.DMC(page_size=16))
    assert isinstance(model, KVTrainMixin)
    return model


def test_it_is_the_mean_loss_of_every_window(corpus, tokenizer):
    """Against one forward pass a window, without padding, batching or a cache."""
    path, texts = corpus
    model = dmc_model()
    set_bias(model, 0.0)
    result = perplexity(model, tokenizer, path, sequence_length=64)
    total, count, slots, tokens = 0.0, 0, 0.0, 0
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        for begin in range(0, len(ids), 63):
            window = torch.tensor([[tokenizer.bos_token_id, *ids[begin : begin + 63]]])
            ledger = {}
            with torch.no_grad():
                output = model(window, labels=window, use_cache=False, ledger=ledger)
            total += output.loss.item() * (window.shape[1] - 1)
            count += window.shape[1] - 1
            tokens += window.shape[1]
            slots += torch.stack([1 + (1 - d[..., 1:]).sum(-1) for d in ledger.values()]).mean().item()
    assert result.tokens == count
    assert result.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)
    assert result.compression == pytest.approx(tokens / slots, rel=1e-6)
    assert result.compression > 1.2
    num_bytes = sum(len(text.encode()) for text in texts)
    assert result.bits_per_byte == pytest.approx(total / math.log(2) / num_bytes, rel=1e-4)


def test_bytes_are_those_of_a_full_window(corpus, tokenizer):
    path, _ = corpus
    model = dmc_model()
    set_bias(model, 50.0)  # nothing merges
    result = perplexity(model, tokenizer, path, sequence_length=64)
    cache = model.make_cache()
    with torch.no_grad():
        model(torch.ones(1, 64, dtype=torch.long), past_key_values=cache)
    assert result.kv_bytes_per_1024 == pytest.approx(cache.kv_bytes() * 16, rel=0.02)


def test_limits_and_errors(tmp_path, corpus, tokenizer):
    model = dmc_model()
    assert perplexity(model, tokenizer, corpus[0], sequence_length=64, limit=1).tokens == 63
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    with pytest.raises(ValueError, match="empty"):
        perplexity(model, tokenizer, str(empty))
    with pytest.raises(ValueError, match="unknown task 'speling'; there are perplexity"):
        run_tasks("kvtrain:tiny", ["speling"])
    with pytest.raises(ValueError, match="no model at"):
        run_tasks(str(tmp_path / "nothing"), ["perplexity"])
    with pytest.raises(ValueError, match="kvtrain:tiny"):
        resolve("kvtrain:huge")
