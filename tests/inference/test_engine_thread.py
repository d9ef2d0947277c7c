"""The engine's thread: streams, blocking calls, cancellation, deadlines, a full queue, the end and a sudden one."""

import asyncio
import queue
import threading
import time
from functools import cache

import pytest
import torch

from kvtrain.data.tokenizer import load_tokenizer
from kvtrain.inference.engine.engine import Engine
from kvtrain.inference.engine.limits import Limits
from kvtrain.inference.engine.request import (
    Delta,
    EngineClosedError,
    Finish,
    QueueFullError,
    Request,
    Sampling,
    TooLargeError,
)
from tests.caches import CACHES, SOME_MAIN
from tests.hosts import make_host

BUDGET = 1 << 22


@cache
def dmc():
    return CACHES["dmc"].retrofit(make_host())


@cache
def words():
    """A model of the packaged tokenizer's vocabulary, and that."""
    return CACHES["full"].retrofit(make_host(vocab_size=4096)), load_tokenizer("kvtrain:tiny")


def endless(prompt=(5, 6, 7), tokens=2000, **fields):
    """A request that ends when somebody ends it."""
    return Request(prompt, max_new_tokens=tokens, ignore_eos=True, **fields)


@pytest.fixture
def engine():
    with Engine(dmc(), None, BUDGET, Limits(max_requests=4, step_tokens=32, max_queue=8)) as engine:
        yield engine


@pytest.fixture
def slow(monkeypatch):
    """Steps of a hundredth of a second at least."""
    from kvtrain.inference.engine.loop import EngineLoop

    step = EngineLoop.step
    monkeypatch.setattr(EngineLoop, "step", lambda loop: (time.sleep(0.01), step(loop))[1])


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def test_a_blocking_call_and_a_stream_give_the_same(engine):
    request = Request((5, 6, 7), max_new_tokens=9, n=2, sampling=Sampling(temperature=1.0, seed=3), logprobs=2)
    whole = engine.generate(request)

    async def stream():
        return [event async for event in engine.stream(request)]

    events = asyncio.run(stream())
    for index, completion in enumerate(whole):
        own = [event for event in events if event.index == index]
        *deltas, finish = own
        assert isinstance(finish, Finish) and all(isinstance(delta, Delta) for delta in deltas)
        assert [token for delta in deltas for token in delta.token_ids] == list(completion.token_ids)
        assert [logprob.token_id for logprob in completion.logprobs] == list(completion.token_ids)
        assert all(len(logprob.alternatives) == 2 for logprob in completion.logprobs)
        assert finish.reason == completion.finish.reason
    assert whole[0].token_ids != whole[1].token_ids


def test_text_stops_and_special_tokens():
    model, tokenizer = words()
    prompt = tuple(tokenizer("def main():")["input_ids"])
    with Engine(model, tokenizer, BUDGET) as engine:
        sampling = Sampling(temperature=1.0, seed=1)
        (plain,) = engine.generate(Request(prompt, max_new_tokens=30, sampling=sampling))
        assert plain.text == tokenizer.decode(plain.token_ids, skip_special_tokens=True)
        stop = plain.text[10:13]
        (stopped,) = engine.generate(Request(prompt, max_new_tokens=30, sampling=sampling, stop=[stop]))
        end = plain.text.index(stop)
        assert stopped.text == plain.text[:end] and stopped.finish.reason == "stop" and stopped.finish.stop == stop
        assert len(stopped.token_ids) < len(plain.token_ids)
        last = plain.token_ids[4]
        (ended,) = engine.generate(Request(prompt, max_new_tokens=30, sampling=sampling, eos_token_ids=[last]))
        first = plain.token_ids.index(last)
        assert ended.token_ids == plain.token_ids[: first + 1] and ended.finish.reason == "stop"
        assert ended.text == tokenizer.decode(plain.token_ids[:first])


def test_who_leaves_a_stream_frees_its_row(engine):
    async def leave(how):
        stream = engine.stream(endless())
        if how == "task":
            task = asyncio.ensure_future(_read(stream))
            await asyncio.sleep(0.1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            async for event in stream:
                assert isinstance(event, Delta)
                break
            await stream.aclose() if how == "close" else None
        if how == "forget":
            del stream
            until(lambda: dict(engine.stats().finished) == {"cancelled": 3})  # before its event loop ends

    async def _read(stream):
        async for _ in stream:
            pass

    for number, how in enumerate(("task", "close", "forget"), 1):
        asyncio.run(leave(how))
        until(lambda number=number: dict(engine.stats().finished) == {"cancelled": number})
    assert engine.stats().running == 0 == engine.stats().held_bytes


def test_whatever_waits_can_be_cancelled_and_a_deadline_ends_it(engine, slow):
    events = queue.SimpleQueue()
    running = [engine.submit(endless(), events.put) for _ in range(4)]
    until(lambda: engine.stats().running == 4)
    waiting = engine.submit(endless(), events.put)
    late = engine.submit(endless(timeout=0.05), events.put)
    waiting.cancel()
    ends = []
    while len(ends) < 2:
        event = events.get(timeout=20)
        ends += [event] if isinstance(event, Finish) else []
    assert sorted(end.reason for end in ends) == ["cancelled", "deadline"]
    assert all(end.usage.new_tokens == 0 and end.usage.held_bytes == 0 for end in ends)
    for ticket in (*running, late):
        ticket.cancel()
    until(lambda: engine.stats().running == 0)


def test_a_deadline_gives_what_is_there(engine, slow):
    (answer,) = engine.generate(endless(timeout=0.3))
    assert answer.finish.reason == "deadline" and 0 < len(answer.token_ids) == answer.finish.usage.new_tokens < 100


def test_a_full_queue_refuses(engine, slow):
    tickets = [engine.submit(endless(), lambda event: None) for _ in range(4)]
    until(lambda: engine.stats().running == 4)
    tickets += [engine.submit(endless(), lambda event: None) for _ in range(8)]
    with pytest.raises(QueueFullError, match="8 answers wait already, of 8; try again later"):
        engine.submit(endless(), print)
    for ticket in tickets:
        ticket.cancel()


@pytest.mark.parametrize(
    ("request_", "error", "refusal"),
    [
        (Request([61]), ValueError, "prompt holds 61; tokens of this model are 0 to 60"),
        (Request([-1]), ValueError, "prompt holds -1; tokens"),
        (Request([True, "a"]), ValueError, "prompt holds 'a'; tokens"),
        (Request([5], sampling=Sampling(logit_bias={99: 1})), ValueError, "logit_bias holds 99; tokens"),
        (Request([5], eos_token_ids=[99]), ValueError, "eos_token_ids holds 99; tokens"),
        (Request([5], n=17), ValueError, "n must be at most 16 here, not 17"),
        (Request([5], n=16), ValueError, "n must be at most 8 here"),
        (Request([5], logprobs=21), ValueError, "logprobs must be at most 20 here, not 21"),
        (Request([5], stop=["x"]), ValueError, "stop needs a tokenizer"),
        (
            Request([5], max_new_tokens=10**9),
            TooLargeError,
            r"come to 1,000,000,001 tokens, which take about [\d,]{9,} bytes of cache, above the budget of 4,194,304",
        ),
    ],
)
def test_what_can_never_be_served_is_refused_at_once(engine, request_, error, refusal):
    with pytest.raises(error, match=refusal):
        engine.submit(request_, print)


def test_a_model_without_a_cache_is_refused():
    with pytest.raises(ValueError, match="a LlamaForCausalLM has no cache to serve it with; open it with open_model"):
        Engine(make_host(), None, BUDGET)


def test_lengths_have_limits_of_their_own():
    with Engine(dmc(), None, BUDGET, Limits(max_prompt_tokens=4, max_new_tokens=6)) as engine:
        with pytest.raises(TooLargeError, match="prompt comes to 5 tokens, above the 4 that are served here"):
            engine.generate(Request([5] * 5))
        with pytest.raises(TooLargeError, match="max_new_tokens comes to 7 tokens, above the 6"):
            engine.generate(Request([5], max_new_tokens=7))


def test_a_sudden_end_fails_every_request_with_the_reason(slow, monkeypatch, caplog):
    engine = Engine(dmc(), None, BUDGET, Limits(max_requests=2, step_tokens=32))
    events = queue.SimpleQueue()
    for _ in range(3):
        engine.submit(endless(), events.put)
    until(lambda: engine.stats().running == 2)

    def broken(*_, **__):
        raise RuntimeError("device lost")

    monkeypatch.setattr(engine._loop.runner, "run", broken)
    ends = []
    while len(ends) < 3:
        event = events.get(timeout=20)
        ends += [event] if isinstance(event, Finish) else []
    reason = "the engine has died of RuntimeError: device lost"
    assert {(end.reason, end.error) for end in ends} == {("error", reason)}
    assert not engine.health().ok and engine.health().reason == reason
    with pytest.raises(EngineClosedError, match="device lost"):
        engine.submit(endless(), print)
    assert "device lost" in caplog.text
    engine.drop_kept_prefixes()
    engine.close(grace=5)


def test_a_listener_that_fails_loses_its_request_alone(engine, caplog):
    def broken(event):
        raise RuntimeError("nobody home")

    engine.submit(endless(), broken)
    (answer,) = engine.generate(Request((5, 6), max_new_tokens=4, ignore_eos=True))
    assert answer.finish.reason == "length"
    until(lambda: engine.stats().running == 0)
    assert engine.health().ok and "nobody home" in caplog.text


def test_events_of_a_pass_cross_to_an_event_loop_together(engine, monkeypatch):
    """Six streams, all there before the first step; every event comes, in order, and each pass wakes the loop once."""
    passes, crossings, gate, run = [], [], threading.Event(), engine._loop.runner.run

    async def listen():
        event_loop = asyncio.get_running_loop()
        cross = event_loop.call_soon_threadsafe
        event_loop.call_soon_threadsafe = lambda *asked: (crossings.append(1), cross(*asked))
        streams = [engine.stream(endless(tokens=12)) for _ in range(6)]
        gate.set()
        return await asyncio.gather(*(listened(stream) for stream in streams))

    async def listened(stream):
        return [event async for event in stream]

    engine._commands.put(lambda loop: gate.wait())
    monkeypatch.setattr(
        engine._loop.runner, "run", lambda batch, prefill: (passes.append(1), run(batch, prefill=prefill))[1]
    )
    for *deltas, finish in asyncio.run(listen()):
        assert finish.reason == "length" and [len(delta.token_ids) for delta in deltas] == [1] * 12
    (alone,) = engine.generate(endless(tokens=12))
    assert 12 <= len(crossings) <= len(passes) < 6 * 12 and len(alone.token_ids) == 12


def test_an_event_loop_that_is_closed_loses_its_request_alone(engine, slow, caplog):
    async def leave():
        return engine.submit(endless(), print, asyncio.get_running_loop())

    lost = asyncio.run(leave())
    (answer,) = engine.generate(endless(tokens=4))
    assert answer.finish.reason == "length"
    until(lambda: engine.stats().running == 0)
    assert lost.cancelled and engine.health().ok and caplog.text.count("could not be delivered") == 1


@pytest.mark.parametrize(("grace", "reason"), [(30.0, "length"), (0.0, "error")])
def test_closing_lets_requests_end_or_says_that_it_does_not(slow, grace, reason):
    engine, events = Engine(dmc(), None, BUDGET, Limits(max_requests=2, step_tokens=32)), queue.SimpleQueue()
    for _ in range(3):
        engine.submit(endless(tokens=12), events.put)
    closing = threading.Thread(target=engine.close, args=(grace,))
    closing.start()
    until(lambda: not engine.health().ok)
    with pytest.raises(EngineClosedError, match="the engine shuts down"):
        engine.submit(endless(), print)
    closing.join(timeout=30)
    ends = []
    while not events.empty():
        event = events.get()
        ends += [event] if isinstance(event, Finish) else []
    assert [end.reason for end in ends] == [reason] * 3
    assert reason == "length" or ends[0].error == "the engine shut down before the answer was complete"
    engine.close()


def test_figures_of_a_moment(engine, slow):
    before = engine.stats()
    assert (before.running, before.held_bytes, before.budget_bytes) == (0, 0, BUDGET) and before.compression == 1.0
    ticket = engine.submit(endless(tokens=400), lambda event: None)
    until(lambda: engine.stats().seen_tokens > 30 and ticket.usage and ticket.usage[0].seen_tokens > 30)
    stats, usage = engine.stats(), ticket.usage[0]
    ticket.cancel()
    assert stats.running == 1 and 0 < stats.held_bytes < BUDGET and stats.free_bytes == BUDGET - stats.held_bytes
    assert len(stats.kept_share) == 2 and {len(layer) for layer in stats.kept_share} == {2}
    shares = torch.tensor(stats.kept_share)
    assert ((shares > 0) & (shares <= 1)).all()
    assert stats.compression == pytest.approx(1 / shares.mean().item())
    assert stats.plain_bytes == stats.seen_tokens * 2 * 2 * 2 * 8 * 8
    assert usage.compression == pytest.approx(stats.compression, rel=0.5) and 0 < usage.held_bytes <= BUDGET
    assert stats.tokens_per_second > 0 and stats.new_tokens > 20
    until(lambda: engine.stats().running == 0)


def test_what_was_said_before_is_not_read_again(engine):
    prompt = list(range(3, 33))
    (first,) = engine.generate(Request(prompt, max_new_tokens=5, ignore_eos=True))
    (second,) = engine.generate(Request([*prompt, *first.token_ids, 3, 4], max_new_tokens=5, ignore_eos=True))
    assert first.finish.usage.cached_prompt_tokens == 0 and second.finish.usage.cached_prompt_tokens == 34
    assert engine.stats().kept_prefixes == 1 and engine.stats().held_bytes > 0
    engine.drop_kept_prefixes()
    assert engine.stats().kept_prefixes == 0 == engine.stats().held_bytes


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in SOME_MAIN else pytest.mark.roads) for n in CACHES])
def test_sixteen_prompts_that_begin_alike_read_that_once(name, monkeypatch):
    """Counted where the model is fed; what comes later finds it, too."""
    model, common = CACHES[name].retrofit(make_host(layers=CACHES[name].layers)), tuple(range(3, 40))
    requests = [Request((*common, own, own + 1, own + 2), max_new_tokens=3, ignore_eos=True) for own in range(40, 56)]
    with Engine(model, None, 1 << 24) as engine:
        fed = counted(monkeypatch, engine)
        gate, events = threading.Event(), queue.SimpleQueue()
        engine._commands.put(lambda loop: gate.wait())  # all come between two steps
        for request in requests:
            engine.submit(request, events.put)
        gate.set()
        ends = finishes(events, 16)
        assert fed == {"prompt": len(common) + 16 * 3, "decoding": 16 * 2}
        assert sorted(end.usage.cached_prompt_tokens for end in ends) == [0, *[len(common)] * 15]
        engine.generate(Request((*common, 58, 59), max_new_tokens=1))
        assert fed["prompt"] == len(common) + 16 * 3 + 2
        until(lambda: engine.stats().prompt_tokens == fed["prompt"])


def counted(monkeypatch, engine):
    """Tokens that the model is fed from now on, of prompts and while decoding."""
    fed, run = {"prompt": 0, "decoding": 0}, engine._loop.runner.run

    def counting(batch, prefill):
        fed["prompt" if prefill else "decoding"] += sum(chunk.tokens for chunk in batch)
        return run(batch, prefill)

    monkeypatch.setattr(engine._loop.runner, "run", counting)
    return fed


def finishes(events, count):
    """The ends of so many answers."""
    ends = []
    while len(ends) < count:
        event = events.get(timeout=60)
        ends += [event] if isinstance(event, Finish) else []
    return ends
