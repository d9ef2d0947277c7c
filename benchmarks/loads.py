"""The same requests through the engine and through transformers: what ran together, and what it cost."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import ContinuousBatchingConfig, GenerationConfig

from kvtrain.inference.engine import Delta, Event, Finish, Limits, Request, Ticket
from kvtrain.inference.engine.loop import EngineLoop

Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Load:
    """Requests of one shape.

    Args:
        prompts: Token ids.
        new_tokens: Of every answer, whatever it says.
    """

    prompts: Prompts
    new_tokens: int

    @property
    def tokens(self) -> int:
        """New tokens of all answers."""
        return len(self.prompts) * self.new_tokens


@dataclass(frozen=True)
class Served:
    """What became of a load.

    Attributes:
        seconds: CPU time of the process.
        in_flight: Requests that ran, step by step, as long as others waited.
        preemptions: Of all requests.
        request_bytes: What a whole request held, in the mean.
    """

    seconds: float
    in_flight: list[int]
    preemptions: int
    request_bytes: float

    @property
    def median_in_flight(self) -> float:
        """Requests at a time."""
        return statistics.median(self.in_flight)


def serve(model: Any, load: Load, budget: int, limits: Limits | None = None) -> Served:
    """A load through the engine's loop, all requests at once."""
    loop, ends, in_flight = EngineLoop(model, None, budget, limits or Limits()), list[Finish](), list[int]()

    def deliver(event: Event) -> None:
        if not isinstance(event, Delta):
            ends.append(event)

    began = time.process_time()
    for prompt in load.prompts:
        loop.submit(Ticket(Request(prompt, max_new_tokens=load.new_tokens, ignore_eos=True), deliver))
    while loop.busy:
        loop.step()
        if loop.scheduler.queue:
            in_flight.append(len(loop.scheduler.running))
    seconds = time.process_time() - began
    if short := [end for end in ends if end.reason != "length"]:
        raise RuntimeError(f"{len(short)} of {len(ends)} answers are not whole: {short[0]}")
    held = statistics.mean(end.usage.held_bytes for end in ends)
    return Served(seconds, in_flight, loop.scheduler.preemptions, held)


def first_tokens(model: Any, load: Load, budget: int, limits: Limits) -> list[float]:
    """CPU seconds from the start until each request of a load, all at once, has its first token."""
    loop, seconds, began = EngineLoop(model, None, budget, limits), dict[int, float](), time.process_time()

    def note(number: int) -> Callable[[Event], None]:
        return lambda _: seconds.setdefault(number, time.process_time() - began)

    for number, prompt in enumerate(load.prompts):
        loop.submit(Ticket(Request(prompt, max_new_tokens=load.new_tokens, ignore_eos=True), note(number)))
    while len(seconds) < len(load.prompts):
        loop.step()
    return list(seconds.values())


def serve_continuously(host: Any, load: Load, blocks: int, page_size: int, batch_tokens: int) -> float:
    """CPU seconds that transformers' continuous batching takes for a load; its threads count together."""
    config = ContinuousBatchingConfig(
        page_size=page_size,
        num_blocks=blocks,
        max_batch_tokens=batch_tokens,
        allow_block_sharing=False,
        use_async_batching=False,
    )
    began = time.process_time()
    answers = host.generate_batch(
        inputs=[list(prompt) for prompt in load.prompts],
        generation_config=_exactly(load.new_tokens, eos_token_id=-1),
        continuous_batching_config=config,
    )
    seconds = time.process_time() - began
    given = [len(answer.generated_tokens) for answer in answers.values()]
    if given != [load.new_tokens] * len(load.prompts):
        raise RuntimeError(f"continuous batching gave {sum(given)} tokens in {len(given)} answers, not {load.tokens}")
    return seconds


def serve_in_batches(host: Any, load: Load, rows: int) -> float:
    """CPU seconds that transformers' ``generate`` takes for a load of equal prompts in static batches."""
    ids, config = torch.tensor(load.prompts), _exactly(load.new_tokens, min_new_tokens=load.new_tokens)
    began = time.process_time()
    for batch in ids.split(rows):
        answer = host.generate(batch, attention_mask=torch.ones_like(batch), generation_config=config)
        assert answer.shape[1] == ids.shape[1] + load.new_tokens
    return time.process_time() - began


def _exactly(new_tokens: int, **settings: Any) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=new_tokens, do_sample=False, pad_token_id=0, **settings)


def read_in_batches(model: Any, prompts: Prompts, rows: int) -> float:
    """CPU seconds that a model takes to read equal prompts in padded batches, each with a cache of its own."""
    began = time.process_time()
    with torch.no_grad():
        for batch in torch.tensor(prompts).split(rows):
            cache = model.make_cache() if hasattr(model, "make_cache") else transformers.DynamicCache()
            model(batch, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return time.process_time() - began
