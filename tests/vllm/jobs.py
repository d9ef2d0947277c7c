"""Runs vLLM engines in processes of their own."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.vllm.engine_job import MARK
from tests.vllm.folders import expected, folder

ROOT = Path(__file__).resolve().parents[2]


def start(name: str, rounds: list[list[list[int]]], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run an engine over a folder to its end, well or not.

    Args:
        name: Of the folder.
        rounds: Lists of prompts that are asked together, one after the other.
        **options: Of ``LLM``.
    """
    return _process({"folder": folder(name), "rounds": rounds, "options": options})


def _process(job: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.vllm.engine_job"]
    return subprocess.run(
        command, input=json.dumps(job), text=True, capture_output=True, cwd=ROOT, timeout=280, check=False
    )


def answers(name: str, rounds: list[list[list[int]]], **options: Any) -> dict[str, Any]:
    """What ``engine_job`` writes."""
    return _written(start(name, rounds, **options))


def refusals(pairs: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """What vLLM's configuration says to each folder with options, all in one process."""
    return _written(_process({"refused": [(folder(name), options) for name, options in pairs]}))


def _written(ended: subprocess.CompletedProcess[str]) -> Any:
    lines = [line for line in ended.stdout.splitlines() if line.startswith(MARK)]
    assert lines, (ended.stdout + ended.stderr)[-4000:]
    return json.loads(lines[-1].removeprefix(MARK))


def check_tokens(name: str, tokens: list[list[int]]) -> None:
    """Compare answers to all prompts with those of ``generate``, of which most must be sure."""
    wanted = expected(name)
    sure = [number for number, one in enumerate(wanted) if one is not None]
    assert len(sure) >= 6, f"{name}: only {len(sure)} answers of {len(wanted)} are far from a tie"
    assert [tokens[number] for number in sure] == [wanted[number] for number in sure]
    lively = [number for number in sure if len(set(tokens[number])) >= 4]
    assert len(lively) >= 6, f"{name}: {len(sure) - len(lively)} answers repeat themselves, and would show no mistake"
