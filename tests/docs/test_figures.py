"""Figures on pages are those of benchmarks/results."""

import json
import re
from pathlib import Path
from statistics import mean

import pytest

from tests.docs.pages import DOCS, README, ROOT

RESULTS = ROOT / "benchmarks" / "results"


def read(folder: Path) -> list[dict]:
    """Rows of all cells."""
    return [row for path in folder.glob("*.json") for row in json.loads(path.read_text())]


CELLS = read(RESULTS / "compare" / "kvtrain-recall")
SMOLLM2 = read(RESULTS / "smollm2" / "wikitext2-valid" / "1024")
POLICIES = (RESULTS / "2026-11-30-policies.txt").read_text().split("In short:")[1]
# Of the table of choose.md: a method's name in the comparison, and in the table of policies.
AS_THEY_ARE = ("4 bits", "GEAR, 2 bits", "KIVI, 2 bits", "KIVI, 4 bits")  # arms that have no size
NAMES = {
    "Full(kv_bits=8)": ("4 bits", None),
    "GEAR": ("GEAR, 2 bits", None),
    "KIVI": ("KIVI, 2 bits", None),
    "num_key_value_heads": ("GQA", None),
    "DMC": ("DMC", None),
    "DMS": ("DMS", None),
    "Duo": ("Duo", None),
    "free_signal": ("Duo, free signal", "Duo, free signal"),
    "razor_gates": ("RazorAttention", None),
    "StreamingLLM": ("StreamingLLM", "StreamingLLM"),
    "H2O": ("H2O", "H2O"),
    "TOVA": ("TOVA", "TOVA"),
    "SnapKV": ("SnapKV", "SnapKV"),
    'SnapKV(per_layer="pyramid")': ("PyramidKV", "PyramidKV"),
    'SnapKV(per_head="adaptive")': ("Ada-KV", "Ada-KV"),
    "ExpectedAttention": ("ExpectedAttention", "ExpectedAttention"),
    "CORM": (None, "CORM"),
    "D2O": ("D2O", "D2O"),
    "MiKV": (None, "MiKV, 4 bits"),
    "RandomEviction": ("random eviction", "random eviction"),
}


def measured(arm: str, ratio: int, cells: list[dict] = CELLS) -> tuple[str, str]:
    """Perplexity, and the share of answers found, in the mean over seeds."""
    rows = [row for row in cells if (row["arm"], row["ratio"]) == (arm, ratio)]
    found = []
    for seed in {row["seed"] for row in rows}:
        asked = [row for row in rows if row["seed"] == seed and row["task"] == "retrieval"]
        found.append(sum(row["accuracy"] * row["answers"] for row in asked) / sum(row["answers"] for row in asked))
    perplexity = mean(row["perplexity"] for row in rows if row["task"] == "continuation")
    return f"{perplexity:.2f}", f"{mean(found):.2f}"


def is_there(arm: str, ratio: int) -> bool:
    """Whether an arm came to such a share of the bytes, in both tasks."""
    tasks = {row["task"] for row in CELLS if (row["arm"], row["ratio"]) == (arm, ratio) and row["method"]}
    return tasks == {"continuation", "retrieval"}


def rows_of(text: str) -> list[list[str]]:
    """Cells of the rows of tables."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


def of_policies(name: str) -> tuple[str, str]:
    """Perplexity and what is found at a quarter."""
    (row,) = [row for row in rows_of(POLICIES) if row[0] == name]
    return row[2], row[5]


CHOICES = {row[0]: row[4:] for row in rows_of((DOCS / "choose.md").read_text()) if len(row) == 6}


@pytest.mark.parametrize("method", NAMES)
def test_the_table_of_methods_says_what_was_measured(method):
    (cells,) = [cells for name, cells in CHOICES.items() if re.search(rf"`{re.escape(method)}`", name)]
    arm, policy = NAMES[method]
    for place, cell in enumerate(cells):
        italic = re.findall(r"\*([\d.]+)\*", cell)
        assert italic == ([measured(arm, 0 if arm in AS_THEY_ARE else 4)[place]] if arm else []), cell
        if policy:
            upright = re.sub(r",? ?\*[\d.]+\*", "", cell)
            assert upright == of_policies(policy)[place]


def test_the_comparison_says_what_was_measured():
    section = (DOCS / "results.md").read_text().split("## One base, the same bytes")[1].split("\n## ")[0]
    rows = rows_of(section)[2:]
    for arm, *said in rows:
        sizes = [measured(arm, ratio) if is_there(arm, ratio) else ("-", "-") for ratio in (2, 4, 8)]
        assert said == [*(score for score, _ in sizes), *(found for _, found in sizes)], "benchmarks/compare.py --print"
    there = {row["arm"] for row in CELLS if is_there(row["arm"], 4)}  # some come to no such share
    assert {row[0] for row in rows} == there == {arm for arm, _ in NAMES.values()} & there
    plain = " ".join(section.split())
    arms = {"Control": "control", "the base": "Full", "8 bits": "8 bits", "4 bits": "4 bits"}
    arms |= {"four-bit blocks": "KIVI, 4 bits", "two-bit blocks": "KIVI, 2 bits", "GEAR": "GEAR, 2 bits"}
    for words, arm in arms.items():
        (said,) = re.findall(rf"{words} \(\d+%[^)]*\): ([\d.]+) and (\d\.\d+)", plain)
        assert said == measured(arm, 0)


def test_the_table_of_smollm2_says_what_was_measured():
    section = (DOCS / "results.md").read_text().split("## On a model that people know")[1].split("\n## ")[0]
    rows = rows_of(section)[2:]
    assert len(rows) >= 3
    for arm, share, *scores in rows:
        ratio = 0 if arm in ("Full", *AS_THEY_ARE) else round(1 / float(share))
        held = [row["kv_share_mean"] for row in SMOLLM2 if (row["arm"], row["ratio"]) == (arm, ratio)]
        assert tuple(scores) == measured(arm, ratio, SMOLLM2) and abs(mean(held) - float(share)) < 0.005


def test_the_readme_says_what_the_results_say():
    ours = [row for row in rows_of(README.read_text()) if row[0] in ("base, untouched", "DMC")]
    assert len(ours) == 2 and [row for row in ours if row not in rows_of((DOCS / "results.md").read_text())] == []
