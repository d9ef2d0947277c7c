"""The window of a streaming head: a ring that is a shift buffer, of keys that are rotated once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvtrain
from kvtrain.cache.rows import Placement
from kvtrain.kernels.attention import attention
from kvtrain.kernels.context_parallel import WHOLE_ROWS
from kvtrain.kernels.paged_attention import paged_attention
from kvtrain.kernels.rope import apply_rotary
from kvtrain.models.streaming_cache import StreamingCacheLayer
from tests.hosts import make_host, random_ids

RECENT = 5


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-9, rtol=0)


class ShiftBuffer:
    """What a streaming head keeps, as lists: sinks, and the latest tokens, which move up as older ones go."""

    def __init__(self, sink, recent):
        self.sink, self.recent, self.first, self.latest = sink, recent, [], []

    def append(self, entry):
        if len(self.first) < self.sink:
            self.first.append(entry)
        else:
            self.latest = [*self.latest, entry][-self.recent :]

    def entries(self):
        return [*self.first, *self.latest]


@settings(max_examples=40)
@given(st.data())
def test_a_ring_is_a_shift_buffer_in_another_order(data):
    """Rows of any length, in chunks of any size with padding before them; attention does not ask for the order."""
    sink, recent = data.draw(st.integers(0, 4)), data.draw(st.integers(1, 7))
    num_full, streaming, rows = data.draw(st.integers(0, 2)), data.draw(st.integers(1, 2)), 2
    heads = num_full + streaming
    layer = StreamingCacheLayer(
        num_full, heads, 4, sink, recent, Placement(torch.float64), data.draw(st.integers(1, 5))
    )
    layer.pages.admit(rows)
    buffers, past = [ShiftBuffer(sink, recent) for _ in range(rows)], torch.zeros(rows, dtype=torch.long)
    for width in data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=5)):
        counts = torch.tensor([data.draw(st.integers(0, width)) for _ in range(rows)])
        valid = torch.arange(width) >= width - counts[:, None]
        keys, values = torch.randn(2, rows, heads, width, 4, dtype=torch.float64)
        held_keys, _, positions = layer.window(past)
        for row, buffer in enumerate(buffers):
            entries = buffer.entries()
            if len(buffer.latest) == recent:  # of which the next token sees one less
                entries.pop(len(buffer.first))
            kept = positions[row] >= 0
            seen = torch.stack([key for key, _ in entries], 1) if entries else torch.zeros(streaming, 0, 4)
            close(held_keys[row][:, kept], seen.double())
        layer.write(keys, values, past, valid)
        past = past + counts
        for row, buffer in enumerate(buffers):
            for column in valid[row].nonzero().flatten().tolist():
                buffer.append((keys[row, num_full:, column], values[row, num_full:, column]))
    assert layer.kv_tokens()[:, num_full:].tolist() == [[len(buffer.entries())] * streaming for buffer in buffers]
    query, slots = torch.randn(rows, heads, 1, 4, dtype=torch.float64), layer.pages.pool.slots
    output, _ = paged_attention(query, slots["keys"], slots["values"], layer.pages.table, layer.pages.lengths, 0.5)
    for row, buffer in enumerate(buffers):
        if buffer.entries():
            order = data.draw(st.permutations(buffer.entries()))
            keys, values = (torch.stack(states, 1)[None] for states in zip(*order, strict=True))
            expected, _ = attention(query[row : row + 1, num_full:], keys, values, causal=False, scale=0.5)
            close(output[row : row + 1, num_full:], expected)


@pytest.mark.parametrize("sink", [0, 3])
@pytest.mark.parametrize("chunk", [1, 4])
def test_keys_keep_the_rotation_of_their_true_positions(sink, chunk):
    """They are rotated once. Rotated anew from unrotated keys they are the same, by true position; by place in the
    cache, as StreamingLLM has it, they are so without sinks alone, since rotation is relative."""
    model = kvtrain.retrofit(make_host(layers=1), kvtrain.Duo(sink=sink, recent=RECENT, full_heads=[[]], page_size=4))
    ids, cache, outputs, inputs = random_ids(1, 20), model.make_cache(), [], []
    module = model.model.layers[0].self_attn
    module.register_forward_hook(lambda *event: outputs.append(event[2][0]))
    module.register_forward_pre_hook(lambda _, __, told: inputs.append(told["hidden_states"]), with_kwargs=True)
    for part in ids.split(chunk, 1):
        model(part, past_key_values=cache)
    states, output = torch.cat(inputs, 1), torch.cat(outputs, 1)
    query, key = module.split_heads(module.q_proj(states)), module.split_heads(module.k_proj(states))
    value = module.split_heads(module.v_proj(states))

    def rotated(tensor, places):
        return apply_rotary(tensor, *model.model.rotary_emb(states, torch.tensor([places])), halves_repeat=True)

    def streamed(by_cache):
        steps = []
        for at in range(20):
            kept = [j for j in range(at + 1) if j < sink or at - j < RECENT]
            places = list(range(len(kept))) if by_cache else kept
            one = rotated(query[:, :, at : at + 1], places[-1:])
            steps.append(attention(one, rotated(key[:, :, kept], places), value[:, :, kept], causal=False)[0])
        return module.project_out(torch.cat(steps, 2), WHOLE_ROWS)

    close(output, streamed(by_cache=False))
    if sink:
        assert (output - streamed(by_cache=True))[:, sink + RECENT + 1 :].abs().amax(-1).min() > 1e-4
    else:
        close(output, streamed(by_cache=True))
