"""The serving form of a sharing stack, defined once: how new tokens go through the layers over a cache.

Layers that read from below run once. A cyclic stage takes one new token a row in one pass, which is exact. A prompt
it reads in blocks of ``prefill_block`` tokens, counted from each row's own start, every one iterated over the exact
keys and values of what came before it. Where a prompt was cut inside a block, the block is read again as a whole:
what comes out depends neither on the chunks in which it was sent nor on the rows beside it.
"""

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from kvtrain.cache.ring import RingStore
from kvtrain.kernels.context_parallel import WHOLE_ROWS
from kvtrain.kernels.rope import apply_rotary
from kvtrain.models.context import ForwardContext
from kvtrain.models.lckv.cache import LCKVCacheLayer
from kvtrain.models.lckv.cache_view import CacheView, RingContent, copied
from kvtrain.models.lckv.kv_map import Stage
from kvtrain.models.lckv.layer_schedule import LayerSchedule, Shared
from kvtrain.models.ordering import block_columns, padding_first, take_slots, take_tokens
from kvtrain.models.recording import RecordedStates


def serve(
    schedule: LayerSchedule,
    hidden: Tensor,
    arguments: dict[str, Any],
    context: ForwardContext,
) -> Tensor:
    """All layers over new tokens, which enter the cache.

    Args:
        schedule: The layers.
        hidden: ``(B, n, hidden)`` inputs of the lowest one.
        arguments: Of a host's layer.
        context: Of the pass.

    Returns:
        ``(B, n, hidden)``.

    Raises:
        ValueError: Hidden states are wanted of a prompt that an endless cache must read in parts.
    """
    layers, valid = cast("list[LCKVCacheLayer]", context.cache_layers()), context.valid
    assert context.cache is not None and context.prefill is not None and valid is not None
    endless, tokens, new = layers[0].endless, context.cache.tokens, valid.sum(1)
    reads, recorded = context.prefill, context.recorded
    if context.decodes:
        return _decode(schedule, hidden, arguments, layers, tokens, valid, recorded, context.single)
    if endless is None or not bool(reads.any()) or int((tokens + new).max()) <= endless.capacity:
        return _serve_chunk(schedule, hidden, arguments, layers, tokens, valid, reads, recorded)
    if recorded is not None:
        raise ValueError("an endless cache reads long prompts in parts; feed single tokens, or no output_hidden_states")
    fits = valid & (tokens[:, None] + valid.cumsum(1) <= endless.capacity)
    order = padding_first(fits)
    chunk = _serve_chunk(schedule, take_tokens(hidden, order), arguments, layers, tokens, fits.gather(1, order), reads)
    outputs, tokens = take_tokens(chunk, order.argsort(1)), tokens + fits.sum(1)
    over = valid & ~fits
    for index in over.any(0).nonzero().flatten().tolist():  # every token drops another one
        now = slice(index, index + 1)
        output = _decode(schedule, hidden[:, now], arguments, layers, tokens, over[:, now])
        outputs[:, now] = torch.where(over[:, now, None], output, outputs[:, now])
        tokens = tokens + over[:, index]
    return outputs


def _decode(
    schedule: LayerSchedule,
    hidden: Tensor,
    arguments: dict[str, Any],
    layers: list[LCKVCacheLayer],
    tokens: Tensor,
    valid: Tensor,
    recorded: RecordedStates | None = None,
    single: bool = False,
) -> Tensor:
    """As ``serve``, one token a row at most and none of a prompt that goes on: every stage in one pass."""
    arguments, view = _placed(schedule, hidden, arguments, layers, tokens, valid, single=single)
    shared: Shared = {}
    for stage in schedule.plan:
        if stage.cyclic and recorded is not None:
            recorded[stage.first] = hidden
        pending = layers[stage.first].pending
        if stage.cyclic and pending is not None and pending.any_held():
            pending.replace(hidden, torch.zeros_like(tokens), valid[:, 0])
        noted = None if stage.cyclic else recorded
        hidden = schedule.run_stage(stage, hidden, shared, arguments, noted, view=view, parallel=WHOLE_ROWS)
    return hidden


def _serve_chunk(
    schedule: LayerSchedule,
    hidden: Tensor,
    arguments: dict[str, Any],
    layers: list[LCKVCacheLayer],
    tokens: Tensor,
    valid: Tensor,
    reads: Tensor,
    recorded: RecordedStates | None = None,
) -> Tensor:
    """As ``serve``; ``reads (B,)`` are the rows whose new tokens are part of a prompt."""
    rings = None if hidden.shape[1] == 1 else _ring_contents(layers)
    arguments, view = _placed(schedule, hidden, arguments, layers, tokens, valid, rings=rings)
    shared: Shared = {}
    for stage in schedule.plan:
        if not stage.cyclic:
            hidden = schedule.run_stage(stage, hidden, shared, arguments, recorded, view=view)
            continue
        if recorded is not None:
            recorded[stage.first] = hidden
        prompt = _Prompt.of(layers[stage.first], hidden, tokens, valid, reads)
        hidden = _read_prompt(schedule, stage, prompt, shared, arguments, view)
    return hidden


def _placed(
    schedule: LayerSchedule,
    hidden: Tensor,
    arguments: dict[str, Any],
    layers: list[LCKVCacheLayer],
    tokens: Tensor,
    valid: Tensor,
    **given: Any,
) -> tuple[dict[str, Any], CacheView]:
    """Arguments with the new tokens' angles, at an endless cache's end where its slots do, and a view of the cache.

    ``given`` is what the ``CacheView`` says besides.
    """
    positions = (tokens[:, None] + valid.cumsum(-1) - 1).clamp(min=0)
    endless, slot_angles = layers[0].endless, None
    if endless is not None:
        positions = positions.clamp(max=endless.capacity - 1)
        slots = torch.arange(endless.capacity, device=hidden.device)[None]
        slot_angles = schedule.angles(hidden, slots)
    angles = schedule.angles(hidden, positions)
    view = CacheView(layers, tokens, valid, valid, angles, slot_angles, **given)
    return {**arguments, "position_ids": positions, "position_embeddings": angles}, view


def _ring_contents(layers: list[LCKVCacheLayer]) -> dict[int, RingContent]:
    """Copies of what the rings hold, by owner."""
    return {owner: copied(layer.ring) for owner, layer in enumerate(layers) if layer.ring is not None}


@dataclass(frozen=True)
class _Prompt:
    """What each row has to read: the tokens of its unfinished block, and its new ones behind them.

    Attributes:
        inputs: ``(B, S, hidden)``; a row's tokens stand at the end.
        start: ``(B,)`` position of the first one.
        counts: ``(B,)`` how many there are.
        goes_on: ``(B,)`` rows whose last block may go on; the others decode a single token.
        tokens: ``(B,)`` position of the first new one.
        length: New columns, n.
    """

    inputs: Tensor
    start: Tensor
    counts: Tensor
    goes_on: Tensor
    tokens: Tensor
    length: int

    @classmethod
    def of(cls, layer: LCKVCacheLayer, hidden: Tensor, tokens: Tensor, valid: Tensor, goes_on: Tensor) -> "_Prompt":
        """Put what is pending before the new tokens of rows that read a prompt."""
        new = valid.sum(1)
        pending = layer.pending
        if pending is None:
            return cls(hidden, tokens, new, goes_on, tokens, hidden.shape[1])
        remembered = torch.where(goes_on, pending.counts, 0)
        held = pending.inputs().to(hidden.dtype)
        real = torch.arange(held.shape[1], device=hidden.device) >= held.shape[1] - remembered[:, None]
        order = padding_first(torch.cat([real, valid], 1))
        inputs = take_tokens(torch.cat([held, hidden], 1), order)
        return cls(inputs, tokens - remembered, remembered + new, goes_on, tokens, hidden.shape[1])

    def positions(self) -> Tensor:
        """``(B, S)``, below the row's start where there is no token."""
        size = self.inputs.shape[1]
        column = torch.arange(size, device=self.start.device)
        return self.start[:, None] + column - (size - self.counts)[:, None]


def _read_prompt(
    schedule: LayerSchedule,
    stage: Stage,
    prompt: _Prompt,
    shared: Shared,
    arguments: dict[str, Any],
    cache_view: CacheView,
) -> Tensor:
    """A cyclic stage, block by block; ``shared`` gains the new tokens' keys and values of its owners."""
    block, positions = schedule.settings.prefill_block, prompt.positions()
    real = positions >= prompt.start[:, None]
    number = positions // block - (prompt.start // block)[:, None]
    number = number.masked_fill(~real, -1)  # of each token's block, from the row's first
    outputs = torch.zeros_like(prompt.inputs)
    new_states: Shared = {}
    for step in range(int(number.max()) + 1):
        columns, inside = block_columns(number == step)
        where = positions.gather(1, columns)
        past = prompt.start + ((number < step) & real).sum(1)
        write = inside & (where >= prompt.tokens[:, None])
        angles = schedule.angles(prompt.inputs, where.clamp(min=0))
        view = replace(cache_view, past=past, valid=inside, write=None, angles=angles, rings=None)
        if columns.shape[1] > 1:  # a single token takes a single pass
            view = replace(view, past_runs={})
        given = {**arguments, "position_ids": where.clamp(min=0), "position_embeddings": angles}
        below = _from_below(schedule, stage, cache_view.layers, where)
        hidden, block_states = _iterate(schedule, stage, take_tokens(prompt.inputs, columns), below, given, view, write)
        row, entry = inside.nonzero(as_tuple=True)
        outputs[row, columns[row, entry]] = hidden[row, entry]
        _collect(new_states, block_states, positions.shape[1], (row, entry, columns[row, entry]))
    _remember(cache_view.layers[stage.first], prompt, block)
    for owner, states in new_states.items():
        key, value = (None if state is None else state[:, :, -prompt.length :] for state in states)
        shared[owner] = (key, value)
    return outputs[:, -prompt.length :]


def _iterate(
    schedule: LayerSchedule,
    stage: Stage,
    inputs: Tensor,
    below: Shared,
    arguments: dict[str, Any],
    view: CacheView,
    write: Tensor,
) -> tuple[Tensor, Shared]:
    """One block ``(B, W, hidden)``: passes until its keys and values stand, then the one that is stored."""
    settings, shared = schedule.settings, dict(below)
    most = inputs.shape[1] if settings.prefill_tolerance is not None else min(settings.passes, inputs.shape[1])
    done = ~view.valid  # padding
    for _ in range(most - 1):
        before = {owner: shared.get(owner) for owner in schedule.targets(stage)}
        schedule.update_kv(stage, inputs, shared, arguments, view=view)
        if settings.prefill_tolerance is not None:
            done = _settle(before, shared, done, settings.prefill_tolerance)
            if bool(done.all()):
                break
    hidden = schedule.run_stage(stage, inputs, shared, arguments, view=replace(view, write=write))
    return hidden, {owner: states for owner, states in shared.items() if owner not in below}


def _settle(before: "dict[int, Any]", shared: Shared, done: Tensor, tolerance: float) -> Tensor:
    """Tokens ``(B, W)`` whose keys and values have come to rest, and so have those of all tokens before them.

    They keep what they have, so that a token never depends on what follows it. Those of ``done`` came to rest before.
    """
    rests = torch.ones_like(done)
    for owner, old in before.items():
        if old is None:
            return done
        states: list[Tensor] = []
        for was, new in zip(old, shared[owner], strict=True):
            assert new is not None
            now = torch.where(done[:, None, :, None], was, new)
            states.append(now)
            size = now.abs().amax((1, 3)).cummax(1).values  # (B, W)
            rests &= (now - was).abs().amax((1, 3)) <= tolerance * size
        shared[owner] = (states[0], states[1])
    return done | (rests | done).cumprod(1).bool()


def _from_below(schedule: LayerSchedule, stage: Stage, layers: list[LCKVCacheLayer], positions: Tensor) -> Shared:
    """Keys and values at ``positions (B, W)`` of owners under a stage that its layers read."""
    sources = {schedule.keys.sources[index] for index in range(stage.first, stage.last + 1)}
    below: Shared = {}
    for owner in (source for source in sources if source < stage.first):
        pages, ring = layers[owner].pages, layers[owner].ring
        if pages is not None:
            keys, values = (pages.gather(f"{name}.{owner}", positions.clamp(min=0)) for name in ("keys", "values"))
        else:  # endless and not yet full: token p lies in slot p, its key not rotated
            assert isinstance(ring, RingStore)
            slots = positions.clamp(0, ring.sink + ring.recent - 1)
            keys, values = (take_slots(ring[name], slots) for name in ("keys", "values"))
            keys = apply_rotary(keys, *schedule.angles(keys, slots))
        below[owner] = (keys, values)
    return below


def _collect(new_states: Shared, block_states: Shared, size: int, places: tuple[Tensor, Tensor, Tensor]) -> None:
    """Put a block's keys and values where its tokens stand in the prompt."""
    row, entry, column = places
    for owner, states in block_states.items():
        if owner not in new_states:
            new_states[owner] = cast(
                "tuple[Tensor | None, Tensor | None]",
                tuple(None if s is None else s.new_zeros(*s.shape[:2], size, s.shape[3]) for s in states),
            )
        for whole, part in zip(new_states[owner], states, strict=True):
            if whole is not None and part is not None:
                whole[row, :, column] = part[row, :, entry]


def _remember(layer: LCKVCacheLayer, prompt: _Prompt, block: int) -> None:
    """Keep the inputs of every prompt's unfinished block."""
    if layer.pending is None:
        return
    new = prompt.counts - (prompt.tokens - prompt.start)
    open_tokens = torch.minimum((prompt.start + prompt.counts) % block, prompt.counts)
    layer.pending.replace(prompt.inputs, torch.where(prompt.goes_on, open_tokens, 0), new > 0)
