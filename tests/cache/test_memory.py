"""Memory as the operating system sees it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.roads
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_compressed_cache_occupies_less_than_a_third():
    """8,192 tokens at 4 tokens a slot: at most 0.3 of the host's own cache, by its account and the process'."""
    command = [sys.executable, str(ROOT / "benchmarks" / "dmc_memory.py"), "--json"]
    figures = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    plain, full, dmc = (figures[name] for name in ("DynamicCache", "Full", "DMC"))
    assert dmc["cache"] <= 0.3 * plain["cache"]
    assert dmc["process"] <= 0.3 * plain["process"]
    assert full["cache"] <= 1.01 * plain["cache"]
    for sizes in (plain, full, dmc):
        assert abs(sizes["process"] - sizes["cache"]) <= 0.15 * sizes["cache"] + 2**20
