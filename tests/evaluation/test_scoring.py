"""What continuations and windows score through the serving cache, against rows alone, token by token."""

import importlib.util
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import log_softmax

import kvtrain
from kvtrain.data.tokenizer import load_tokenizer
from kvtrain.evaluation.evaluate import run_tasks
from kvtrain.evaluation.lm_eval.generation import Decoding, generate_answers
from kvtrain.evaluation.lm_eval.scoring import Continuation, score_continuations, score_windows
from kvtrain.evaluation.perplexity import perplexity
from kvtrain.evaluation.row_meter import RowMeter
from kvtrain.models.cache_size import row_bytes
from tests.caches import CACHES, POLICIES
from tests.hosts import make_host, random_ids
from tests.thinning import thinned

# Policies that cut a prompt when it ends, beside the caches that do not.
DENSE = {f"{name}_dense": replace(policy, prompt="dense", page_size=4) for name, policy in POLICIES.items()}
METHODS = {"full": kvtrain.Full(), "h2o_dense": DENSE["h2o_dense"]}
WIDE = 0.1  # a row's list of pages is as wide as that of the longest row beside it
QUANTIZED = {f"{name}_4_bits": replace(method, kv_bits=4) for name, method in METHODS.items()}
SAMPLE = ("dmc", "lckv", "duo", "transnormer_t2", "h2o_dense")


def model_with(name):
    """A small model with a cache, in float64."""
    entry, plain = CACHES.get(name), {**DENSE, **QUANTIZED}
    host = make_host("llama", layers=2 if entry is None else entry.layers, dtype=torch.float64)
    return (kvtrain.retrofit(host, plain[name]) if entry is None else entry.retrofit(host)).eval()


def asked():
    """Two contexts that continuations share, of several lengths, and one of a single token."""
    ids = [tuple(row) for row in random_ids(6, 40).tolist()]
    contexts = [ids[0][:33], ids[1][:19], ids[2][:1]]
    lengths = [(0, 1), (0, 4), (1, 3), (0, 2), (1, 1), (2, 3)]
    return [Continuation(contexts[row], ids[3 + n % 3][n : n + length]) for n, (row, length) in enumerate(lengths)]


@torch.no_grad()
def by_hand(model, context, tokens):
    """Log-likelihood, whether greedy decoding gives it, and bytes and slots from which each token is predicted."""
    cache, logits = model.make_cache(), None
    for token in context:
        logits = model(torch.tensor([[token]]), past_key_values=cache, prefill=True).logits[0, -1]
    read = cache.held_bytes()
    cache.end_prompt()
    total, greedy, held = 0.0, True, []
    for token in tokens:
        held.append((cache.held_bytes(), cache.mean_kv_tokens().item()))
        total += log_softmax(logits, -1)[token].item()
        greedy &= logits.argmax().item() == token
        if len(held) < len(tokens):
            logits = model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1]
    return total, greedy, held, max(read, *(step for step, _ in held))


def scores(model, requests, batch=8):
    meter = RowMeter(model)
    found = dict(score_continuations(model, requests, batch, meter))
    assert sorted(found) == list(range(len(requests)))
    return [found[number] for number in range(len(requests))], meter.result()


@pytest.mark.parametrize("name", thinned([*CACHES, *DENSE, *QUANTIZED], SAMPLE))
def test_a_score_is_that_of_its_row_alone_token_by_token(name):
    model, requests = model_with(name), asked()
    found, figures = scores(model, requests)
    alone = [by_hand(model, *request) for request in requests]
    assert [score.log_likelihood for score in found] == pytest.approx([row[0] for row in alone], abs=1e-8)
    assert [score.greedy for score in found] == [row[1] for row in alone]
    steps = [step for row in alone for step in row[2]]
    assert figures.kept_tokens == pytest.approx(sum(row[2][-1][1] for row in alone) / len(alone))
    assert figures.kv_bytes_mean == pytest.approx(sum(held for held, _ in steps) / len(steps), rel=WIDE)
    assert figures.kv_bytes_end == pytest.approx(sum(row[2][-1][0] for row in alone) / len(alone), rel=WIDE)
    assert figures.kv_bytes_peak == pytest.approx(sum(row[3] for row in alone) / len(alone), rel=WIDE)


def test_batches_make_no_difference():
    model, requests = model_with("h2o_dense"), asked()
    (one, few), (many, figures) = scores(model, requests, batch=1), scores(model, requests, batch=8)
    assert [score.log_likelihood for score in one] == pytest.approx([score.log_likelihood for score in many], abs=1e-9)
    assert few.kept_tokens == figures.kept_tokens
    assert few.kv_bytes_end == pytest.approx(figures.kv_bytes_end, rel=0.02)


def test_what_greedy_decoding_says_is_marked_as_such():
    model = model_with("h2o_dense")
    model.generation_config.eos_token_id = None
    prompt = random_ids(1, 20)
    said = tuple(model.generate(prompt, max_new_tokens=4, do_sample=False)[0, 20:].tolist())
    context = tuple(prompt[0].tolist())
    other = Continuation(context, (*said[:3], (said[3] + 1) % model.config.get_text_config().vocab_size))
    found, _ = scores(model, [Continuation(context, said), Continuation(context, said[:2]), other])
    assert [score.greedy for score in found] == [True, True, False]


def test_a_shared_context_is_read_once():
    model, requests, read = model_with("full"), asked(), []
    model.get_decoder().register_forward_hook(
        lambda _, __, kwargs, ___: read.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    scores(model, requests)
    contexts = {request.context for request in requests}
    assert read == [(len(contexts), max(map(len, contexts))), *[(len(requests), 1)] * 3]


def test_shares_are_of_full_after_as_many_tokens():
    _, figures = scores(model_with("full"), asked(), batch=1)
    assert figures.kv_share_mean == figures.kv_share_end == figures.kv_share_peak == figures.compression == 1
    model, requests = model_with("h2o_dense"), asked()
    _, figures = scores(model, requests, batch=1)
    full = row_bytes(model.config.host_config, kvtrain.Full(), model.dtype)
    ends = [full(len(request.context) + len(request.tokens) - 1) for request in requests]
    assert figures.kv_share_end == pytest.approx(figures.kv_bytes_end * len(requests) / sum(ends))
    assert figures.kv_bytes_peak > figures.kv_bytes_end and figures.compression > 1.5


@pytest.mark.parametrize(("name", "decode"), [("dmc", False), ("h2o_dense", True)])
def test_windows_score_their_ends(name, decode):
    model = model_with(name)
    ids = [tuple(row) for row in random_ids(3, 40).tolist()]
    windows = [
        Continuation(ids[0][:1], ids[0][1:]),
        Continuation(ids[1][:30], ids[1][30:]),
        Continuation(ids[2][:1], (5,)),
    ]
    meter = RowMeter(model)
    found = dict(score_windows(model, windows, 2, meter, decode=decode))
    for number, (context, tokens) in enumerate(windows):
        cache, whole = model.make_cache(), torch.tensor([context + tokens])
        with torch.no_grad():
            logits = [
                model(whole[:, n : n + 1], past_key_values=cache).logits[0, -1] for n in range(whole.shape[1] - 1)
            ]
        losses = log_softmax(torch.stack(logits), -1).gather(1, whole[0, 1:, None])[-len(tokens) :]
        assert found[number] == pytest.approx(losses.sum().item(), abs=1e-8)
    assert meter.result().compression >= 1


def test_a_window_costs_what_perplexity_says(tmp_path):
    tokenizer = load_tokenizer("kvtrain:tiny")
    path, text = tmp_path / "a.txt", "def f(a, b):\n    return a + b\n" * 20
    path.write_text(text)
    model = kvtrain.retrofit(make_host("llama", vocab_size=4096, dtype=torch.float64), kvtrain.H2O(prompt="blocks"))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    expected = perplexity(model, tokenizer, str(path), sequence_length=len(ids) + 1)
    window = Continuation((tokenizer.bos_token_id,), tuple(ids))
    ((_, total),) = score_windows(model, [window], 8, RowMeter(model))
    assert torch.tensor(-total / len(ids)).exp().item() == pytest.approx(expected.perplexity, rel=1e-6)


class TestAnswers:
    """Greedy answers, against ``generate`` on each prompt alone."""

    tokenizer = load_tokenizer("kvtrain:tiny")

    def model(self, method):
        torch.manual_seed(3)
        return kvtrain.retrofit(make_host("llama", vocab_size=4096, dtype=torch.float64), method).eval()

    def answers(self, model, prompts, *stops, most=12):
        meter = RowMeter(model)
        return generate_answers(model, self.tokenizer, prompts, Decoding(most, stops), meter), meter.result()

    def alone(self, model, prompt, most=12):
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=most, do_sample=False)[0, len(prompt) :]
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    @pytest.mark.parametrize("method", [kvtrain.Full(), kvtrain.SnapKV(budget=12, recent=4)], ids=["full", "snapkv"])
    def test_a_batch_is_its_rows_and_stops_cut(self, method):
        model, prompts = self.model(method), [random_ids(1, n, seed=n)[0].tolist() for n in (31, 7, 1)]
        expected = [self.alone(model, prompt) for prompt in prompts]
        found, _ = self.answers(model, prompts)
        assert found == expected and all(found)
        stop = expected[0][len(expected[0]) // 2 :][:3]
        (cut,), fewer = self.answers(model, prompts[:1], stop)
        assert cut == expected[0][: expected[0].index(stop)] != expected[0]
        assert fewer.kept_tokens <= self.answers(model, prompts[:1])[1].kept_tokens

    def test_a_prompt_is_seen_before_it_is_cut(self):
        model = self.model(kvtrain.SnapKV(budget=12, recent=4, page_size=4))
        _, figures = self.answers(model, [random_ids(1, 60)[0].tolist()], most=3)
        assert figures.kv_bytes_peak > 3 * figures.kv_bytes_end
        assert figures.compression == pytest.approx(62 / figures.kept_tokens)

    def test_a_special_token_stops_as_such(self):
        model, prompt = self.model(kvtrain.Full()), random_ids(1, 9)[0].tolist()
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)[0, 9:].tolist()
        model.lm_head.weight.data[[1, ids[3]]] = model.lm_head.weight.data[[ids[3], 1]]  # now it says <|pad|> there
        model.generation_config.pad_token_id = 0
        (found,), _ = self.answers(model, [prompt], "<|pad|>", most=6)
        assert found == self.tokenizer.decode(ids[:3])


def test_without_lm_eval_its_tasks_say_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"lm-eval is not installed: pip install 'kvtrain\[eval\]'"):
        run_tasks("kvtrain:tiny", ["lm-eval:hellaswag"])
