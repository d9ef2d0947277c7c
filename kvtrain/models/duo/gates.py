"""From numbers to heads: which key-value heads keep everything, and the files in which patterns are published."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from kvtrain.metrics import Table
from kvtrain.models.hosts import whole_layers

PATTERN_FILE, SETTINGS_FILE = "full_attention_heads.tsv", "config.json"

# Gates at every validation; ``full`` is 1 where a head would keep everything if gates were rounded now.
HEAD_GATES = Table("head_gates.csv", ("step", "layer", "head", "gate", "full"))

# Of hard-concrete gates (Louizos et al. 2018, section 2.3; PruLong's code): temperature, and how far they reach
# beyond 0 and 1 before they are clipped.
_TEMPERATURE, _LOW, _HIGH = 2 / 3, -0.1, 1.1
# Logit of a fresh one (PruLong's code): open nearly always.
HARD_CONCRETE_START = 4.5


def choose_full_heads(gates: Tensor, sparsity: float) -> tuple[tuple[int, ...], ...]:
    """The heads with the largest gates, ``round((1 - sparsity) * heads)`` of them over all layers.

    Heads of equal gates are taken in the order of layers and heads, so that the same gates give the same heads, and
    those of a higher sparsity are among those of a lower one. Gates count as clipped to 0 and 1.

    Args:
        gates: ``(layers, H_kv)``, left as they are.
        sparsity: Share of streaming heads.

    Returns:
        For every layer its full heads in ascending order.

    Raises:
        ValueError: The sparsity is no share, or a gate is no number.
    """
    if not 0.0 <= sparsity <= 1.0:
        raise ValueError(f"sparsity is the share of streaming heads, from 0 to 1, not {sparsity}")
    if not bool(gates.isfinite().all()):
        raise ValueError("a gate is not a finite number; the training has diverged, lower its learning rate")
    layers, heads = gates.shape
    count = math.floor((1.0 - sparsity) * gates.numel() + 0.5)
    order = gates.detach().double().clamp(0.0, 1.0).flatten().argsort(descending=True, stable=True)
    chosen = order[:count].sort().values.tolist()
    return tuple(tuple(index % heads for index in chosen if index // heads == layer) for layer in range(layers))


def by_layer(full_heads: Sequence[tuple[int, ...]], host_config: PreTrainedConfig) -> tuple[tuple[int, ...], ...]:
    """Full heads of every layer, of those of the layers that have gates; none where the host slides."""
    chosen = dict(zip(whole_layers(host_config), full_heads, strict=True))
    return tuple(chosen.get(layer, ()) for layer in range(host_config.num_hidden_layers))


def hard_concrete(logits: Tensor, noise: Tensor | None) -> Tensor:
    """Gates from their logits: random with logistic ``noise``, the most likely ones without.

    Args:
        logits: ``(H_kv,)``.
        noise: ``(H_kv,)`` or None.
    """
    shares = torch.sigmoid(logits) if noise is None else torch.sigmoid((logits + noise) / _TEMPERATURE)
    return (shares * (_HIGH - _LOW) + _LOW).clamp(0.0, 1.0)


def gate_values(stored: Tensor, kind: str, noise: Tensor | None = None) -> Tensor:
    """Gates within 0 and 1, of the numbers that are learnt.

    Args:
        stored: ``(..., H_kv)``.
        kind: ``Duo.gates``.
        noise: As in ``hard_concrete``.
    """
    return stored.float().clamp(0.0, 1.0) if kind == "plain" else hard_concrete(stored.float(), noise)


def open_probability(logits: Tensor) -> Tensor:
    """Probability that a hard-concrete gate is not 0 (Louizos et al. 2018, equation 12)."""
    return torch.sigmoid(logits - _TEMPERATURE * math.log(-_LOW / _HIGH))


@dataclass(frozen=True)
class Pattern:
    """Gates as they are published.

    Attributes:
        gates: ``(layers, H_kv)`` float64, within 0 and 1.
        sink: First tokens that streaming heads were trained to keep.
        recent: Latest ones.
    """

    gates: Tensor
    sink: int
    recent: int


def write_pattern(folder: Path, pattern: Pattern) -> None:
    """Write ``full_attention_heads.tsv`` and ``config.json`` in the form of the published patterns."""
    folder.mkdir(parents=True, exist_ok=True)
    np.savetxt(folder / PATTERN_FILE, pattern.gates.double().numpy(), delimiter="\t")
    settings = {"sink_size": pattern.sink, "recent_size": pattern.recent}
    (folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=4) + "\n")


def read_pattern(folder: Path | str) -> Pattern:
    """Read a published pattern; values outside 0 and 1 are clipped, as the released loader does.

    Raises:
        ValueError: A file is missing or damaged.
    """
    folder = Path(folder)
    try:
        table = np.loadtxt(folder / PATTERN_FILE, delimiter="\t", ndmin=2)
        settings: dict[str, Any] = json.loads((folder / SETTINGS_FILE).read_text())
        sink, recent = int(settings["sink_size"]), int(settings["recent_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder}: no readable pattern ({error}); it holds {PATTERN_FILE}, a row of numbers for every layer, and "
            f"{SETTINGS_FILE} with sink_size and recent_size"
        ) from error
    if not table.size or not np.isfinite(table).all():
        raise ValueError(f"{folder / PATTERN_FILE}: some gates are missing or not finite")
    return Pattern(torch.from_numpy(table).clamp(0.0, 1.0), sink, recent)


def pattern_of(full_heads: Sequence[Sequence[int]], num_key_value_heads: int) -> Tensor:
    """Rounded gates ``(layers, H_kv)``: 1 for full heads, 0 for streaming ones."""
    gates = torch.zeros(len(full_heads), num_key_value_heads, dtype=torch.float64)
    for layer, heads in enumerate(full_heads):
        gates[layer, list(heads)] = 1.0
    return gates
