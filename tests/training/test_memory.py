"""Figures of memory: blended along a line, and divided between ranks."""

import pytest

from kvtrain.training.memory import Held, Sharding, TrainingMemory


def memory(layers):
    """A model whose logits are the peak while it is shallow, and whose update is once it is deep."""
    update = Held(parameters=10 * layers, gradients=10 * layers, optimizer=20 * layers, others=10 * layers)
    logits = Held(parameters=10 * layers, gradients=0, optimizer=20 * layers, others=2 * layers + 100)
    moments = {"update": update, "logits": logits, ("layer", 0): logits._replace(others=layers)}
    if layers > 2:
        moments["layer", 1] = logits
    return TrainingMemory(10 * layers, 10 * layers, 20 * layers, 7, (2 * layers, 3), moments)


def test_the_peak_is_found_after_the_blend():
    shallow, deeper = memory(2), memory(3)
    assert shallow.peak == sum(shallow.moments["logits"])
    deep = TrainingMemory.blend([(-29.0, shallow), (30.0, deeper)])
    assert deep.peak == sum(deep.moments["update"]) == 50 * 32
    assert deep == TrainingMemory(320, 320, 640, 7, (64, 3), {k: memory(32).moments[k] for k in shallow.moments})
    assert deep.activations == 64


@pytest.mark.parametrize(
    ("sharding", "parts"),
    [
        (Sharding(), (320, 320, 640)),
        (Sharding(optimizer=3), (320, 320, 214)),
        (Sharding(gradients=4, optimizer=4), (320, 80, 160)),
        (Sharding(parameters=4, gradients=4, optimizer=4), (80, 80, 160)),
    ],
)
def test_ranks_divide_what_they_shard(sharding, parts):
    rank = memory(32).sharded(sharding)
    assert (rank.parameters, rank.gradients, rank.optimizer) == parts
    assert (rank.teacher, rank.kept) == (7, (64, 3))
    assert rank.peak == max(sum(parts) + 320, parts[0] + parts[2] + 164)


def test_a_rank_s_peak_may_lie_elsewhere():
    whole = TrainingMemory(100, 100, 0, 0, (0,), {"backward": Held(100, 100, 0, 30), "logits": Held(100, 0, 0, 90)})
    assert (whole.peak, whole.sharded(Sharding(gradients=10)).peak) == (230, 190)
