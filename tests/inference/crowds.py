"""A random mix of requests for one model, and the tokens that ``generate`` gives to each of them alone."""

import random
from dataclasses import dataclass, field

import torch

from kvtrain.inference.engine.answers import Ticket
from kvtrain.inference.engine.limits import Limits
from kvtrain.inference.engine.loop import EngineLoop
from kvtrain.inference.engine.request import Delta, Request

TIE = 1e-3
EOS = 2  # of the tests' hosts


def mix(count, vocabulary, seed=0, longest=40, most_new=14):
    """Prompts of all lengths, a third of which begin alike."""
    draw = random.Random(seed)

    def tokens(least, most):
        return [draw.randrange(3, vocabulary) for _ in range(draw.randint(least, most))]

    common = tokens(20, 20)
    prompts = [[*common, *tokens(1, 8)] if number % 3 == 0 else tokens(1, longest) for number in range(count)]
    return [Request(prompt, max_new_tokens=draw.randint(1, most_new)) for prompt in prompts]


@torch.no_grad()
def greedy(model, requests):
    """Tokens by ``generate`` for every request, cut at its first tie, and whether there was one."""
    longest, most = max(len(r.prompt) for r in requests), max(r.max_new_tokens for r in requests)
    ids = torch.tensor([[0] * (longest - len(r.prompt)) + list(r.prompt) for r in requests])
    mask = torch.tensor([[0] * (longest - len(r.prompt)) + [1] * len(r.prompt) for r in requests])
    output = model.generate(
        ids, attention_mask=mask, max_new_tokens=most, do_sample=False, pad_token_id=0, eos_token_id=None,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    best = torch.stack(output.logits, 1).topk(2).values
    tied = (best[..., 0] - best[..., 1] < TIE).tolist()
    expected = []
    for request, row, ties in zip(requests, output.sequences[:, longest:].tolist(), tied, strict=True):
        tokens = row[: request.max_new_tokens]
        if EOS in tokens and not request.ignore_eos:
            tokens = tokens[: tokens.index(EOS) + 1]
        first = next((at for at, tie in enumerate(ties[: len(tokens)]) if tie), None)
        expected.append((tokens[:first], first is not None))
    return expected


@dataclass
class Outcome:
    """Tokens and ends of a run, and what it took."""

    tokens: list[list[int]]
    finishes: list[object] = field(default_factory=list)
    peak: int = 0
    loop: EngineLoop | None = None


def serve(model, requests, budget=1 << 26, cancelled=(), per_step=3, loop=None, hopeful=False, **limits):
    """Run an engine's loop over requests, some of which arrive at every step and some of which leave half-way."""
    loop = loop or EngineLoop(model, None, budget, Limits(**{"max_requests": 16, "step_tokens": 48, **limits}))
    for _ in range(100 * hopeful):  # as after many requests that ended early
        loop.forecast.ended(1, 100)
    outcome = Outcome([[] for _ in requests], [None for _ in requests], loop=loop)
    tickets, waiting = {}, list(enumerate(requests))

    def deliver(number, event):
        if isinstance(event, Delta):
            outcome.tokens[number] += event.token_ids
        else:
            assert outcome.finishes[number] is None
            outcome.finishes[number] = event

    while waiting or loop.busy:
        for number, request in waiting[:per_step]:
            loop.check(request)
            tickets[number] = Ticket(request, lambda event, number=number: deliver(number, event))
            loop.submit(tickets[number])
        waiting = waiting[per_step:]
        loop.step()
        for number in cancelled:
            if number in tickets and len(outcome.tokens[number]) >= 1:
                tickets[number].cancel()
        held = loop.runner.rows.cache.held_bytes()
        assert held <= budget
        outcome.peak = max(outcome.peak, held)
    return outcome


def check(outcome, wanted):
    """The same tokens up to the first tie."""
    for number, (tokens, tied) in enumerate(wanted):
        found, finish = outcome.tokens[number], outcome.finishes[number]
        whole = finish.reason in ("stop", "length")
        assert finish.reason == "cancelled" or whole
        assert found[: len(tokens)] == tokens[: len(found)]
        assert not whole or len(found) == len(tokens) or tied
        assert finish.usage.new_tokens == len(found)
