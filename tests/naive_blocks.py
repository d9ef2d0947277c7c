"""A block of keys or values as GEAR gives it back: vector by vector, in numpy. Shares no code with kvtrain."""

import math

import numpy as np


def half(number):
    """A number, or many, as float16 keeps it."""
    return np.asarray(number, dtype=np.float64).astype(np.float16).astype(np.float64)


def read_back(vector, bits, at_each_end):
    """One vector: outliers as they are, the others by a scale and a zero of their own."""
    order = sorted(range(len(vector)), key=lambda place: vector[place])
    outliers = order[:at_each_end] + order[len(order) - at_each_end :]
    inner = [value for place, value in enumerate(vector) if place not in outliers]
    mean = sum(inner) / len(inner)
    filled = [mean if place in outliers else value for place, value in enumerate(vector)]
    levels, zero = 2**bits - 1, float(half(min(filled)))
    scale = float(half(max((max(filled) - zero) / levels, abs(zero) / 1024, 2.0 ** (bits - 24))))
    opened = [zero + min(max(round((value - zero) / scale), 0), levels) * scale for value in filled]
    for place in outliers:
        opened[place] = float(half(vector[place]))
    return opened


def naive_block(block, by, bits, at_each_end, rank):
    """``block (n, D)`` once it has been packed, and what was missed before the low rank came."""
    block = np.asarray(block, dtype=np.float64)
    vectors = block.T if by == "channel" else block
    opened = np.array([read_back(vector.tolist(), bits, at_each_end) for vector in vectors])
    opened = opened.T if by == "channel" else opened
    missed = block - opened
    rank = min(rank, *block.shape)
    if rank == 0:
        return opened, missed
    channels = block.shape[1]
    right = np.array([[math.cos(math.pi / channels * (d + 0.5) * j) for j in range(rank)] for d in range(channels)])
    for _ in range(3):
        left = np.linalg.qr(missed @ right)[0]
        right = missed.T @ left
    return opened + half(left) @ half(right).T, missed
