"""Slices cover everything, once; without values the last few stand for all."""

import pytest
import torch

from kvtrain.kernels import cpu_tiling


@pytest.mark.parametrize(("length", "size", "expected"), [(7, 3, [3, 3, 1]), (6, 3, [3, 3]), (2, 3, [2]), (0, 3, [])])
def test_spans_cover_everything_once(length, size, expected):
    values = torch.arange(length)
    parts = [values[cut] for cut in cpu_tiling.spans(length, size)]
    assert [len(part) for part in parts] == expected
    assert torch.equal(torch.cat([*parts, values[:0]]), values)


@pytest.mark.parametrize(("length", "expected"), [(100, [90, 95]), (102, [90, 95, 100]), (3, [0])])
def test_without_values_the_last_few_are_worked_on(length, expected):
    with cpu_tiling.without_values():
        assert [cut.start for cut in cpu_tiling.spans(length, 5)] == expected
    assert len(cpu_tiling.spans(length, 5)) == -(-length // 5)


def test_matching_parts_are_cut_alike():
    rows = 2**17 // 2**12  # of 4,096 numbers fit
    left, right = torch.arange(3 * rows + 1.0)[:, None].expand(-1, 2**12), torch.zeros(3 * rows + 1, 5)
    assert [(len(one), len(other)) for one, other in cpu_tiling.tiles(left, right)] == [(rows, rows)] * 3 + [(1, 1)]
    with cpu_tiling.without_values():
        parts = list(cpu_tiling.tiles(left, right))
    assert [len(one) for one, _ in parts] == [rows, rows, 1]
    assert float(parts[0][0][0, 0]) == rows
