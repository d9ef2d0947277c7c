"""Which layer's keys and values does each layer read? One map says it for the whole family of cross-layer sharing.

``kv(i)`` is the layer whose keys and values the queries of layer ``i`` attend to. Where ``kv(i) > i`` they come from
above (LCKV): such a cyclic layer never sees its own token, and is trained and prefilled by iteration.
"""

import itertools
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from kvtrain.metrics import Rows, Table

_ENTRY = re.compile(r"(\d+)(s?)")
# The rows of the study's table (arXiv 2410.14442, section 3): how layers are parted, and which one of a part is read.
_STUDY = re.compile(r"(pizza|sandwich|lasagna)-(bottom|middle|top)(?:-(\d+))?")
_EXAMPLE = "a map such as '0_4_4_4_4_5', or a preset: lckv-w2, sandwich-middle, pizza-bottom, cla2, yoco, plain"


@dataclass(frozen=True)
class Stage:
    """Layers ``first`` to ``last`` that run together.

    Attributes:
        first: Lowest layer.
        last: Highest layer, inclusive. Of a cyclic stage it is the highest one that its layers read.
        cyclic: The stage iterates.
    """

    first: int
    last: int
    cyclic: bool


@dataclass(frozen=True)
class KVMap:
    """A map for a given depth.

    Attributes:
        sources: ``kv(i)`` of every layer.
        sliding: Whether a layer sees a window of latest tokens alone.
    """

    sources: tuple[int, ...]
    sliding: tuple[bool, ...]

    @property
    def depth(self) -> int:
        """Layers, L."""
        return len(self.sources)

    @property
    def owners(self) -> tuple[int, ...]:
        """Layers that compute keys and values, from below."""
        return tuple(sorted(set(self.sources)))

    def is_cyclic(self, layer_idx: int) -> bool:
        """Whether a layer reads from above."""
        return self.sources[layer_idx] > layer_idx

    def readers(self, owner: int) -> list[int]:
        """Layers that read an owner's keys and values, itself included."""
        return [layer_idx for layer_idx, source in enumerate(self.sources) if source == owner]

    def without(self, dropped: Collection[int]) -> "KVMap":
        """The map of the other layers, numbered anew; none of them may read a layer that is dropped."""
        kept = [layer for layer in range(self.depth) if layer not in dropped]
        return KVMap(
            tuple(kept.index(self.sources[layer]) for layer in kept), tuple(self.sliding[layer] for layer in kept)
        )

    def stages(self) -> list[Stage]:
        """The order of a forward pass: cyclic stages, and the runs of plain layers between them."""
        stages: list[Stage] = []
        first = 0
        while first < self.depth:
            last = self._top(first) if self.is_cyclic(first) else first
            cyclic = last > first
            if not cyclic and stages and not stages[-1].cyclic:
                stages[-1] = Stage(stages[-1].first, last, cyclic=False)
            else:
                stages.append(Stage(first, last, cyclic))
            first = last + 1
        return stages

    def _top(self, first: int) -> int:
        top = self.sources[first]
        while (higher := max(self.sources[first : top + 1])) > top:
            top = higher
        return top

    def __str__(self) -> str:
        entries = zip(self.sources, self.sliding, strict=True)
        return "_".join(f"{source}{'s' if sliding else ''}" for source, sliding in entries)


def parse_map(text: str, depth: int) -> KVMap:
    """Read a map, or expand a preset for a depth.

    Args:
        text: ``kv(0)_kv(1)_..``, an ``s`` behind an entry makes its layer's attention a sliding window; or a preset's
            name: ``plain``; ``claN`` (groups of N neighbours share; arXiv 2405.12981); ``yoco`` (windows in the lower
            half, one memory for the upper; 2405.05254); ``yi`` (three windows, then a layer that sees everything, of
            which every two share; after Yi-Lightning, 2412.01253); ``lckv-wN`` (N layers of their own at both ends
            together, one memory from the top for the rest; 2405.10637); and with N layers that own keys and values,
            half of all where N is left out (2410.14442), ``{pizza,sandwich,lasagna}-{bottom,middle,top}-N``.
        depth: Layers of the model.

    Raises:
        ValueError: No such preset, an entry that is no layer, a wrong length, an owner that itself reads another
            layer, or one memory for full and sliding layers.
    """
    entries = [_ENTRY.fullmatch(entry) for entry in text.split("_")]
    if all(entries):
        parsed = [(int(entry[1]), entry[2] == "s") for entry in entries if entry]
        kv_map = KVMap(tuple(source for source, _ in parsed), tuple(sliding for _, sliding in parsed))
    else:
        kv_map = _expand(text, depth)
    _check(kv_map, text, depth)
    return kv_map


def _check(kv_map: KVMap, text: str, depth: int) -> None:
    sources = kv_map.sources
    if len(sources) != depth:
        raise ValueError(f"kv_map {text!r} has {len(sources)} entries and the host {depth} layers; give one a layer")
    for layer_idx, source in enumerate(sources):
        if source >= depth:
            raise ValueError(f"kv_map {text!r}: layer {layer_idx} reads layer {source}; the last one is {depth - 1}")
        if sources[source] != source:
            raise ValueError(
                f"kv_map {text!r}: layer {layer_idx} reads layer {source}, which itself reads layer {sources[source]} "
                f"and owns nothing; let entry {source} be {source}, or entry {layer_idx} be {sources[source]}"
            )
        if kv_map.sliding[layer_idx] != kv_map.sliding[source]:
            raise ValueError(
                f"kv_map {text!r}: layers {layer_idx} and {source} share keys, but only one of them has a sliding "
                "window; mark both with 's', or neither"
            )
    if sources[0] != 0:
        warnings.warn(
            f"kv_map {text!r}: layer 0 owns no keys and values, which is known to fail (perplexity 222 against 14 in "
            "the paper's ablation); let its entry be 0",
            stacklevel=4,
        )


def _expand(name: str, depth: int) -> KVMap:
    sliding = [False] * depth
    if name == "plain":
        sources = list(range(depth))
    elif name == "yoco":
        half = depth // 2
        sources, sliding = [*range(half), *[half] * (depth - half)], [layer < half for layer in range(depth)]
    elif name == "yi":
        whole = range(3, depth, 4)
        sources, sliding = list(range(depth)), [layer not in whole for layer in range(depth)]
        sources[7::8] = whole[: len(whole) // 2 * 2 : 2]
    elif match := re.fullmatch(r"cla(\d+)", name):
        size = _positive(match[1], name)
        sources = [layer - layer % size for layer in range(depth)]
    elif match := re.fullmatch(r"lckv-w(\d+)", name):
        bottom = int(match[1]) // 2
        top = depth - (int(match[1]) - bottom)
        if top <= bottom:
            raise ValueError(f"kv_map {name!r} leaves none of {depth} layers to share; give it fewer of their own")
        sources = [*range(bottom), *[top - 1] * (top - bottom), *range(top, depth)]
    elif match := _STUDY.fullmatch(name):
        owners = _positive(match[3], name) if match[3] else (depth + 1) // 2
        if owners > depth:
            raise ValueError(f"kv_map {name!r}: the host has {depth} layers only")
        sources = _study(match[1], match[2], owners, depth)
    else:
        raise ValueError(f"kv_map {name!r} is not understood; give {_EXAMPLE}")
    return KVMap(tuple(sources), tuple(sliding))


def _positive(number: str, name: str) -> int:
    if int(number) < 1:
        raise ValueError(f"kv_map {name!r}: the number must be at least 1")
    return int(number)


def _study(shape: str, target: str, owners: int, depth: int) -> list[int]:
    """Part the layers, and let every part read one of its own."""
    if shape == "lasagna":
        bounds = [depth * part // owners for part in range(owners + 1)]
    else:
        below = owners - 1 if shape == "pizza" else owners // 2
        above = owners - 1 - below
        bounds = [*range(below + 1), *range(depth - above, depth + 1)]
    choose: dict[str, Callable[[int, int], int]] = {
        "bottom": lambda first, last: first,
        "middle": lambda first, last: (first + last) // 2,
        "top": lambda first, last: last,
    }
    parts = itertools.pairwise(bounds)
    return [choose[target](first, end - 1) for first, end in parts for _ in range(end - first)]


def values_map(text: str | None, keys: KVMap) -> KVMap:
    """The map of values beside that of keys.

    Args:
        text: As for ``parse_map``; ``"first"``: whatever reads another layer's keys reads the values of layer 0
            (FusedKV-Lite, arXiv 2512.03870); None: values follow keys.
        keys: The map of keys.

    Raises:
        ValueError: As ``parse_map``; or layers iterate; or windows differ.
    """
    if text is None:
        return keys
    if text == "first":
        sources: Sequence[int] = [i if i == source else 0 for i, source in enumerate(keys.sources)]
        values = KVMap(tuple(sources), keys.sliding)
        _check(values, "first", keys.depth)
    else:
        values = parse_map(text, keys.depth)
    if any(kv_map.is_cyclic(layer) for kv_map in (keys, values) for layer in range(keys.depth)):
        raise ValueError("value_map needs maps that read from below alone; leave it out, or choose another kv_map")
    if values.sliding != keys.sliding:
        raise ValueError("kv_map and value_map must mark the same layers with 's'")
    return values


def repeats(keys: KVMap, values: KVMap) -> list[list[tuple[int, ...]]]:
    """Groups of layers that come again: parts of the same pattern side by side, and in a part its readers of one owner.

    Args:
        keys: The map of keys.
        values: The map of values, of the same depth.
    """

    def pattern(part: range) -> list[tuple[int, int, bool]]:
        return [(keys.sources[layer] - layer, values.sources[layer] - layer, keys.sliding[layer]) for layer in part]

    def reads(layer: int) -> tuple[int, int] | int:
        owns = layer in (keys.sources[layer], values.sources[layer])
        return layer if owns else (keys.sources[layer], values.sources[layer])

    found: list[list[tuple[int, ...]]] = []
    for _, alike in itertools.groupby(_closed_parts(keys, values), pattern):
        parts = [tuple(part) for part in alike]
        if len(parts) > 1:
            found.append(parts)
        else:
            runs = (list(run) for _, run in itertools.groupby(parts[0], reads))
            found += [[(layer,) for layer in run] for run in runs if len(run) > 1]
    return found


def _closed_parts(keys: KVMap, values: KVMap) -> Iterator[range]:
    """The smallest runs of layers that read each other and nobody else."""
    reach = list(range(keys.depth))
    for layer, sources in enumerate(zip(keys.sources, values.sources, strict=True)):
        for source in sources:
            low, high = min(layer, source), max(layer, source)
            reach[low] = max(reach[low], high)
    first = 0
    while first < keys.depth:
        last = first
        while (further := max(reach[first : last + 1])) > last:
            last = further
        yield range(first, last + 1)
        first = last + 1


def _count_fault(rows: Rows) -> str | None:
    return None if [row["layer"] for row in rows] == list(range(len(rows))) else "layers are not counted from 0"


# The map of a run, written for its report.
KV_MAP = Table("kv_map.csv", ("layer", "key_layer", "value_layer", "sliding"), _count_fault)
