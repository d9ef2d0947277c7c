"""Tables of comparisons at equal bytes, in Markdown."""

from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from cells import AS_IT_IS, Figures

_NEAR = 0.1  # of the bytes aimed at: what lies farther says its share
SHARES = ("kv_share_mean", "kv_share_end", "kv_share_peak")
_DIGITS = {"continuation": 2, "retrieval": 2}


def summary(rows: Sequence[Figures], arms: Sequence[str]) -> str:
    """A row an arm: perplexity and what is found at every part of the bytes, and a line for arms without a size.

    Args:
        rows: Of cells; several of a cell where a task has kinds, or a training seeds.
        arms: In their order.
    """
    ratios = sorted({row["ratio"] for row in rows} - {AS_IT_IS})
    titles = [f"{title}1/{ratio}" for title in ("perplexity at ", "found at ") for ratio in ratios]
    titles = [title if f"1/{ratios[0]}" in title else title.split(" at ")[1] for title in titles]
    lines = [f"| {' | '.join(('method', *titles))} |", "|---" * (len(titles) + 1) + "|"]
    rest = []
    for arm in arms:
        own = [row for row in rows if row["arm"] == arm and row["method"]]
        if not own:
            continue
        if own[0]["ratio"] == AS_IT_IS:
            share = mean(row["kv_share_mean"] for row in own)
            rest.append(f"{arm} ({share:.0%} of the bytes): {' and '.join(_score(own, task) for task in _DIGITS)}")
            continue
        scores = [_at(own, ratio, task) for task in _DIGITS for ratio in ratios]
        lines.append(f"| {' | '.join((arm, *scores))} |")
    return "\n".join([*lines, "", "; ".join(rest)])


def details(rows: Sequence[Figures], arms: Sequence[str]) -> str:
    """A row an arm, ratio and task: score, bytes of three kinds, tokens that it was trained on, and seeds."""
    head = ("method", "bytes aimed at", "task", "score", "bytes, mean", "end", "peak", "training tokens", "seeds")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for arm in arms:
        mine = [row for row in rows if row["arm"] == arm and row["method"]]
        for ratio, task in dict.fromkeys((row["ratio"], row["task"]) for row in mine):
            own = [row for row in mine if (row["ratio"], row["task"]) == (ratio, task)]
            shares = [f"{mean(row[name] for row in own):.1%}" for name in SHARES]
            seeds = len({row["seed"] for row in own}) if own[0]["training_tokens"] else "-"
            aim = f"1/{ratio}" if ratio else "-"
            scores = [_score(own, task), *(f"{kind} {score:.2f}" for kind, score in _kinds(own).items())]
            cells = [arm, aim, task, ", ".join(scores), *shares, f"{own[0]['training_tokens']:,}", str(seeds)]
            lines.append(f"| {' | '.join(cells)} |")
    absent = [f"{row['arm']} at 1/{row['ratio']} ({row['task']})" for row in rows if not row["method"]]
    lines += [f"\nNot within a tenth of the bytes at any size: {', '.join(absent)}."] if absent else []
    return "\n".join(lines)


def _at(rows: Sequence[Figures], ratio: int, task: str) -> str:
    """A score, and its share of the bytes where that is not what was aimed at; a dash where there is none."""
    own = [row for row in rows if (row["ratio"], row["task"]) == (ratio, task)]
    if not own:
        return "-"
    share = mean(row["kv_share_mean"] for row in own)
    return _score(own, task) + (f" ({share:.0%})" if abs(share * ratio - 1) > _NEAR else "")


def _score(rows: Sequence[Figures], task: str) -> str:
    """Perplexity, or the share of all answers that is found; with the spread over seeds."""
    by_seed: dict[int, list[Figures]] = {}
    for row in rows:
        if row["task"] == task:
            by_seed.setdefault(row["seed"], []).append(row)
    if not by_seed:
        return "-"
    scores = [_pooled(own) for own in by_seed.values()]
    digits = _DIGITS[task]
    return f"{mean(scores):.{digits}f}" + (f" ± {stdev(scores):.{digits}f}" if len(scores) > 1 else "")


def _pooled(rows: Sequence[Mapping[str, Any]]) -> float:
    """The score of one model on one task: that of its single row, or of all answers of all kinds."""
    if "perplexity" in rows[0]:
        return mean(row["perplexity"] for row in rows)
    return sum(row["accuracy"] * row["answers"] for row in rows) / sum(row["answers"] for row in rows)


def _kinds(rows: Sequence[Figures]) -> dict[str, float]:
    """What is found of every kind."""
    kinds = dict.fromkeys(row["kind"] for row in rows if "kind" in row)
    return {kind: mean(row["accuracy"] for row in rows if row["kind"] == kind) for kind in kinds}
