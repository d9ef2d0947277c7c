"""Continuations through the serving cache: losses against one pass over all, bytes against a loop by hand."""

import json
import math

import pytest
import torch

import kvtrain
from kvtrain.data.tokenizer import load_tokenizer
from kvtrain.evaluation.answering import AnsweringMeter, decode_answers
from kvtrain.evaluation.continuation import continuation
from kvtrain.evaluation.evaluate import run_tasks
from kvtrain.evaluation.perplexity import perplexity
from kvtrain.evaluation.windows import full_windows
from kvtrain.models.cache_size import row_bytes
from tests.hosts import make_host, random_ids

LENGTH, PROMPT, PAGE = 160, 120, 8
BUDGET = 40


def model_with(method):
    return kvtrain.retrofit(make_host("llama", dtype=torch.float64), method).eval()


@pytest.fixture(scope="module")
def windows():
    return random_ids(3, LENGTH)


def h2o(**settings):
    return kvtrain.H2O(budget=BUDGET, recent=20, page_size=PAGE, **settings)


def by_hand(model, window):
    """Losses of the tokens behind the prompt, bytes after each of them, and after the prompt before it is cut."""
    cache, losses, held = model.make_cache(), [], []
    with torch.no_grad():
        logits = model(window[None, :PROMPT], past_key_values=cache, prefill=True).logits[0, -1]
        read = cache.held_bytes()
        cache.end_prompt()
        for token in window[PROMPT:]:
            losses.append(torch.nn.functional.cross_entropy(logits, token).item())
            logits = model(token[None, None], past_key_values=cache).logits[0, -1]
            held.append(cache.held_bytes())
    return losses, held, read


def test_of_full_it_is_the_perplexity_that_transformers_own_model_has(windows):
    host, model = make_host("llama", dtype=torch.float64), model_with(kvtrain.Full())
    with torch.no_grad():
        logits = host(windows).logits[:, PROMPT - 1 : -1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, PROMPT:].flatten()).exp().item()
    result = continuation(model, windows, PROMPT)
    assert result.perplexity == pytest.approx(expected, rel=1e-9)
    assert (result.tokens, result.windows) == (3 * (LENGTH - PROMPT), 3)
    answering = result.answering
    assert (answering.kv_share_mean, answering.kv_share_end, answering.kv_share_peak) == (1, 1, 1)


@pytest.mark.parametrize(("prompt", "batch"), [("dense", 2), ("dense", 8), ("blocks", 1), ("blocks", 2)])
def test_of_a_policy_it_is_what_rows_alone_give(windows, prompt, batch):
    model = model_with(h2o(prompt=prompt, every=4))
    rows = [by_hand(model, window) for window in windows]
    result = continuation(model, windows, PROMPT, batch)
    losses = [loss for row in rows for loss in row[0]]
    assert result.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-9)
    full = row_bytes(model.config.host_config, kvtrain.Full(), model.dtype)
    held, full_held = sum(sum(row[1]) for row in rows), 3 * sum(full(PROMPT + n + 1) for n in range(LENGTH - PROMPT))
    ends, peaks = sum(row[1][-1] for row in rows), sum(max(row[2], *row[1]) for row in rows)
    answering = result.answering
    assert answering.kv_bytes_mean == pytest.approx(held / 3 / (LENGTH - PROMPT), rel=0.01)
    assert answering.kv_bytes_peak == pytest.approx(peaks / 3, rel=0.01)
    assert answering.kv_bytes_end == pytest.approx(ends / 3, rel=0.01)  # tables of rows side by side are as wide
    assert answering.kv_share_mean == pytest.approx(held / full_held, rel=0.01)
    assert answering.kv_share_end == pytest.approx(ends / 3 / full(LENGTH), rel=0.01)
    assert answering.kv_share_peak == pytest.approx(peaks / 3 / full(LENGTH), rel=0.01)


def test_shares_are_those_of_the_slots_within_a_page(windows):
    """A slot has two vectors of eight bytes a channel, and a position and a mass beside them."""
    host = make_host("llama", dtype=torch.float64)
    head_dim = host.config.hidden_size // host.config.num_attention_heads
    slot = 1 + (4 + 8) / (2 * head_dim * 8)
    dense = continuation(model_with(h2o()), windows, PROMPT).answering
    blocks = continuation(model_with(h2o(prompt="blocks")), windows, PROMPT).answering
    for answering in (dense, blocks):
        for share, tokens in ((answering.kv_share_end, LENGTH), (answering.kv_share_mean, (LENGTH + PROMPT) / 2)):
            assert BUDGET / tokens * slot <= share * 1.05 and share <= (BUDGET + PAGE) / tokens * slot * 1.1
    assert dense.kv_share_peak == pytest.approx(PROMPT / LENGTH * slot, rel=0.1)
    assert blocks.kv_share_peak <= (BUDGET + PAGE) / LENGTH * slot * 1.1


def test_prompts_of_different_lengths_stand_beside_each_other(windows):
    """What every answer is predicted from is what the row gives alone; the prompts come in several chunks."""
    model, rows = model_with(h2o()), list(random_ids(3, 400))
    rows, prompts = [rows[0], rows[1][:12], rows[2][:290]], [390, 3, 280]
    hidden, cache = decode_answers(model, rows, prompts, AnsweringMeter(model))
    assert cache.tokens.tolist() == [400, 12, 290]
    for number, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        alone, _ = decode_answers(model, [row], [prompt], AnsweringMeter(model))
        torch.testing.assert_close(hidden[number, : len(row) - prompt], alone[0], atol=1e-9, rtol=0)


def test_a_model_without_a_host_has_bytes_and_no_shares():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
    model = kvtrain.TransNormerForCausalLM(kvtrain.TransNormerConfig(**sizes)).eval()
    answering = continuation(model, random_ids(2, 30) % 64, 20).answering
    assert answering.kv_share_mean is answering.kv_share_end is answering.kv_share_peak is None
    assert answering.kv_bytes_end > 0


def test_windows_are_whole(tmp_path):
    tokenizer = load_tokenizer("kvtrain:tiny")
    texts = ["import os\n" * 30, "x = 1\n", "def f(a, b):\n    return a + b\n" * 20]
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    windows = full_windows(tokenizer, str(path), 32)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    expected = [one[at : at + 31] for one in ids for at in range(0, len(one) - 30, 31)]
    assert windows.tolist() == [[tokenizer.bos_token_id, *window] for window in expected]
    assert torch.equal(full_windows(tokenizer, str(path), 32, limit=2), windows[:2])
    with pytest.raises(ValueError, match="no document has 1024 tokens; lower the sequence length"):
        full_windows(tokenizer, str(path), 1024)


def test_it_is_a_task_of_eval_with_its_bytes_among_the_figures():
    method = kvtrain.StreamingLLM(budget=32, recent=28, sink=4, page_size=8)
    (row,) = run_tasks("kvtrain:copy", ["continuation"], method=method, sequence_length=128, limit=2)
    assert (row["tokens"], row["windows"]) == (2 * 32, 2)  # three quarters are the prompt
    assert 0.25 < row["kv_share_end"] <= row["kv_share_mean"] < row["kv_share_peak"] < 1
    json.dumps(row)


def test_what_would_be_one_prompt_is_decoded_or_refused(tmp_path):
    """Where every token is decoded, both forms of prompts are one."""
    path, tokenizer = tmp_path / "a.txt", load_tokenizer("kvtrain:tiny")
    path.write_text("def f(a, b):\n    return a + b\n" * 12)
    host = make_host("llama", vocab_size=4096, dtype=torch.float64)
    figures = []
    for prompt in ("dense", "blocks"):
        model = kvtrain.retrofit(host, h2o(prompt=prompt)).eval()
        figures.append(perplexity(model, tokenizer, str(path), sequence_length=128, chunk=1))
        if prompt == "dense":
            with pytest.raises(ValueError, match="all of a text would be one: add --decode"):
                perplexity(model, tokenizer, str(path), sequence_length=128)
        else:
            whole = perplexity(model, tokenizer, str(path), sequence_length=128)
            assert whole.perplexity == pytest.approx(figures[1].perplexity, rel=1e-9)
    assert figures[0].perplexity == pytest.approx(figures[1].perplexity, rel=1e-9)
    assert figures[0].compression > 2
