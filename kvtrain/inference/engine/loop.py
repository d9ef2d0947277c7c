"""What the engine's thread does: takes requests, runs steps, sends events; no threads in here."""

import random
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from typing import Any

from tokenizers import Tokenizer
from torch import Tensor

from kvtrain.errors import UsageError
from kvtrain.inference.engine.answers import Answer, Outbox, Ticket
from kvtrain.inference.engine.forecast import Forecast
from kvtrain.inference.engine.limits import Limits
from kvtrain.inference.engine.meter import Meter
from kvtrain.inference.engine.request import Finish, FinishReason, Request, TooLargeError, Usage
from kvtrain.inference.engine.runner import Runner
from kvtrain.inference.engine.sampling import sample
from kvtrain.inference.engine.scheduler import Chunk, Scheduler
from kvtrain.inference.engine.sequence import ServedSequence
from kvtrain.inference.prompt import beyond_positions
from kvtrain.models.end_tokens import end_token_ids
from kvtrain.models.language_model import CachedLanguageModel

_PROBE = 256  # tokens that tell at the start what a token takes


class EngineLoop:
    """The state of an engine, and its steps.

    Args:
        model: With a cache of its own kind; it is put into evaluation mode.
        tokenizer: Makes text of tokens; None for events without.
        budget: Bytes of the cache.
        limits: Of the engine.

    Attributes:
        meter: Counts.
        max_positions: Of the model.

    Raises:
        ValueError: The model has no cache, or the budget does not hold a single token.
    """

    def __init__(self, model: Any, tokenizer: Tokenizer | None, budget: int, limits: Limits) -> None:
        _require_servable(model)
        self.limits, self._tokenizer = limits, tokenizer
        self.runner = Runner(model.eval(), budget, limits.compiled_rows, limits.page_size)
        self.max_positions: int | None = model.max_positions
        self.vocab_size = int(model.get_output_embeddings().weight.shape[0])
        self._eos_token_ids = frozenset(end_token_ids(model.generation_config))
        self.forecast = self._probe()
        rollback = model.assisted_options() == {}  # tokens go back without a limit
        self.scheduler = Scheduler(self.runner.rows, limits, self.forecast, rollback)
        self._answers: dict[ServedSequence, Answer] = {}
        self._outbox = Outbox()
        self._arrivals = count()
        self.meter = Meter(self.runner, self.scheduler)

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._answers)

    def _probe(self) -> Forecast:
        """Read some tokens to see what they take; texts may shrink better or worse, which is learned.

        Raises:
            ValueError: The budget does not hold a single token.
        """
        rows, ids = self.runner.rows, random.Random(0)
        most = _PROBE if self.max_positions is None else min(_PROBE, self.max_positions)
        prompt = tuple(ids.randrange(self.vocab_size) for _ in range(most))
        least = rows.cache.bytes_for(1, 1)
        if least > rows.budget:
            raise UsageError(f"a budget of {rows.budget:,} bytes is below one token, which takes {least:,}; raise it")
        sequence = ServedSequence(prompt, 1, -1, row=rows.take())
        sizes = [rows.row_bytes([sequence.row])[0]]
        left = (rows.budget - sizes[0]) * 3 // 4  # passes take some pages ahead
        halves = [size for size in (most // 2, 32, 8, 1) if 2 * size <= most]
        half = next((size for size in halves if rows.bytes_for([sequence.row], 2 * size) <= left), 0)
        for _ in range(2 if half else 0):
            self.runner.run([Chunk(sequence, half)], prefill=True)
            sequence.seen += half
            sizes.append(rows.row_bytes([sequence.row])[0])
        rows.release(sequence.row)
        rows.trim()
        slope = (sizes[-1] - sizes[-2]) / half if half else 0.0
        return Forecast(max(0.0, sizes[-1] - slope * sequence.seen), slope, rows.most_bytes())

    def check(self, request: Request) -> None:
        """Refuse what cannot be served here; from any thread.

        Raises:
            ValueError: A field is out of the model's or the engine's range.
            TooLargeError: The request is longer than the engine allows, than the model has positions, or than its
                budget can ever hold.
        """
        limits, sampling = self.limits, request.sampling
        named = {"prompt": request.prompt, "logit_bias": sampling.logit_bias, "eos_token_ids": request.eos_token_ids}
        for name, tokens in named.items():
            if wrong := [t for t in tokens or () if not isinstance(t, int) or not 0 <= t < self.vocab_size]:
                raise UsageError(f"{name} holds {wrong[0]!r}; tokens of this model are 0 to {self.vocab_size - 1}")
        if request.stop and self._tokenizer is None:
            raise UsageError("stop needs a tokenizer, which this engine does not have; end at eos_token_ids")
        for name, number, most in (("n", request.n, limits.max_n), ("logprobs", request.logprobs, limits.max_logprobs)):
            if (number or 0) > most:
                raise UsageError(f"{name} must be at most {most} here, not {number}")
        for name, number, bound in (
            ("prompt", len(request.prompt), limits.max_prompt_tokens),
            ("max_new_tokens", request.max_new_tokens, limits.max_new_tokens),
        ):
            if bound is not None and number > bound:
                raise TooLargeError(f"{name} comes to {number:,} tokens, above the {bound:,} that are served here")
        if request.n > limits.max_queue:
            raise UsageError(f"n must be at most {limits.max_queue} here, which is how many answers may wait")
        if (reason := beyond_positions(self.max_positions, len(request.prompt), request.max_new_tokens)) is not None:
            raise TooLargeError(reason)
        length, what, lower = request.most_tokens, "prompt and max_new_tokens come", " or lower max_new_tokens"
        if self.runner.rows.cuts_prompts:  # the end of the prompt is when the row holds most
            length, what, lower = len(request.prompt), "prompt comes", ""
        needed, budget = self.forecast.least_bytes(length), self.runner.rows.budget
        if needed > budget:
            raise TooLargeError(
                f"{what} to {length:,} tokens, which take about {needed:,} bytes of cache, above the budget of "
                f"{budget:,}; shorten the prompt{lower}"
            )

    def submit(self, ticket: Ticket) -> None:
        """Take a request that ``check`` allows."""
        for index in range(ticket.request.n):
            answer = Answer(ticket, index, next(self._arrivals), self._tokenizer, self._eos_token_ids)
            answer.sequence.replays = self.runner.rows.cuts_prompts
            self._answers[answer.sequence] = answer
            self.scheduler.add(answer.sequence)

    def step(self) -> None:
        """Let every running sequence go on by a token, and read some more of prompts."""
        now = time.monotonic()
        for answer in list(self._answers.values()):
            reason = answer.ticket.ended(now)
            if reason is not None:
                self._finish(answer, reason)
        self.scheduler.admit()
        self._commit(self.scheduler.decode_pass(lambda batch: self.runner.run(batch, prefill=False)))
        self._commit(self.scheduler.prompt_pass(lambda batch: self.runner.run(batch, prefill=True)))
        for refusal in self.scheduler.refused:
            self._end(self._answers[refusal.sequence], "error", _counts(refusal.sequence), refusal.reason)
        self.scheduler.refused.clear()
        self._outbox.flush()
        if not self.scheduler.running:
            self.runner.rows.trim()
        if self.meter.step(now):
            self._report()

    def fail(self, reason: str) -> None:
        """End every request with an error; the model is not asked for anything."""
        for answer in list(self._answers.values()):
            self._end(answer, "error", _counts(answer.sequence), reason)
        self._outbox.flush()

    def drop_kept_prefixes(self) -> None:
        """Give back what is kept for prompts to come."""
        self.scheduler.drop_kept()
        self.meter.look(time.monotonic())

    def _commit(self, fed: tuple[list[Chunk], Tensor] | None) -> None:
        """Count what a pass has fed, and choose next tokens by its logits ``(B, V)``."""
        if fed is None:
            return
        batch, logits = fed
        self._end_prompts(batch)
        for chunk in batch:
            self.scheduler.advance(chunk)
        whole = [number for number, (sequence, _) in enumerate(batch) if sequence.seen == sequence.length]
        if whole:
            answers = [self._answers[batch[number].sequence] for number in whole]
            self._choose(logits if len(whole) == len(batch) else logits[whole], answers)
            self._outbox.flush()  # whoever reads on does not wait for prompts of others

    def _end_prompts(self, batch: Sequence[Chunk]) -> None:
        """Say so where a pass has read the last token of a prompt, so that memory is free at once."""
        ended = [sequence.row for sequence, tokens in batch if 0 < len(sequence.prompt) - sequence.seen <= tokens]
        if ended and self.runner.rows.cuts_prompts:
            self.runner.rows.end_prompts(ended)

    def _choose(self, logits: Tensor, answers: Sequence[Answer]) -> None:
        """Add the next token to answers whose tokens have all been fed; logits ``(B, V)``."""
        tokens, logprobs = sample(logits, [answer.sampler for answer in answers])
        self.meter.new_tokens += len(tokens)
        for answer, token, logprob in zip(answers, tokens, logprobs, strict=True):
            delta, reason = answer.push(token, logprob)
            self._outbox.put(answer.ticket, delta)
            if reason is not None:
                self._finish(answer, reason)

    def _finish(self, answer: Answer, reason: FinishReason) -> None:
        sequence, whole = answer.sequence, reason in ("stop", "length")
        usage = _counts(sequence) if sequence.row is None else self._usages([sequence])[0]
        self.scheduler.remove(sequence, keep=whole)
        if whole:
            self.forecast.ended(len(sequence.output), sequence.max_new_tokens)
        self._end(answer, reason, usage)

    def _end(self, answer: Answer, reason: FinishReason, usage: Usage, error: str | None = None) -> None:
        del self._answers[answer.sequence]
        self.meter.finished[reason] += 1
        self.meter.cached_prompt_tokens += usage.cached_prompt_tokens
        self._outbox.put(answer.ticket, Finish(answer.index, reason, usage, answer.stop, error))

    def _report(self) -> None:
        """Say to every running request what it takes at present."""
        running = self.scheduler.running
        for sequence, usage in zip(running, self._usages(running), strict=True):
            answer = self._answers[sequence]
            answer.ticket.usage[answer.index] = usage

    def _usages(self, sequences: Sequence[ServedSequence]) -> list[Usage]:
        """What sequences take that hold rows."""
        if not sequences:
            return []
        rows = [sequence.row for sequence in sequences]
        entries = self.runner.kept_tokens(rows)  # (layers, rows, H_kv)
        there = entries >= 0
        kept = (entries.where(there, 0).sum((0, 2)) / there.sum((0, 2))).tolist()
        held = self.runner.rows.row_bytes(rows)
        return [
            replace(
                _counts(sequence),
                kept_tokens=kept[place],
                held_bytes=held[place],
                plain_bytes=sequence.seen * self.runner.plain_token_bytes,
            )
            for place, sequence in enumerate(sequences)
        ]


def _require_servable(model: Any) -> None:
    if not isinstance(model, CachedLanguageModel) or not model.servable:
        raise UsageError(f"a {type(model).__name__} has no cache to serve it with; open it with open_model")


def _counts(sequence: ServedSequence) -> Usage:
    """Usage of a sequence, without what a row takes."""
    return Usage(
        prompt_tokens=len(sequence.prompt),
        cached_prompt_tokens=sequence.cached,
        new_tokens=len(sequence.output),
        seen_tokens=sequence.seen,
        preemptions=sequence.preemptions,
    )
