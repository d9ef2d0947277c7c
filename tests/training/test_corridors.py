"""How far a batch walks through the code: calls of kvtrain's functions and moves between its files, bounded above."""

import importlib
import sys
from pathlib import Path

import pytest

import kvtrain
from benchmarks.corridors import RECIPE, ROOT, CallCounter, count_fit

PACKAGE = Path(kvtrain.__file__).parent

# What the benchmark counts, in shorter rows: attention works in fewer tiles.
LENGTH, STEPS = 128, 3
STEP = 2  # the first one opens a phase, the last one ends the run

# What was counted in a process of its own (1,387 and 624 before the first step, 1,267 and 732 in one) and a tenth: a
# process that has run other tests differs by a few per cent. Two small functions that a compiler can follow, where a
# tensor lies and whether it has values, are 155 of the calls, and every tensor's way between ranks that share rows is
# some of the moves.
MOST_CALLS_BEFORE, MOST_MOVES_BEFORE = 1525, 686
MOST_CALLS_A_STEP, MOST_MOVES_A_STEP = 1360, 795


@pytest.fixture(scope="module")
def stretches():
    counted = (PACKAGE, str(ROOT / RECIPE), STEPS, ["--data.sequence_length", str(LENGTH)])
    count_fit(*counted)  # tokenises the corpus, if nobody has yet
    return count_fit(*counted)


def test_the_way_to_the_first_step_is_short(stretches):
    assert stretches[0].calls <= MOST_CALLS_BEFORE
    assert stretches[0].moves <= MOST_MOVES_BEFORE


def test_a_step_is_short(stretches):
    assert stretches[STEP].calls <= MOST_CALLS_A_STEP
    assert stretches[STEP].moves <= MOST_MOVES_A_STEP


def test_the_backward_pass_is_counted(stretches):
    counts = stretches[STEP].by_function(PACKAGE)
    assert counts["kernels/norm.py", "_RMSNorm.forward"] >= counts["kernels/norm.py", "_RMSNorm.backward"] > 0


def test_calls_and_moves_of_a_planted_package(tmp_path, monkeypatch):
    package = tmp_path / "planted_walk"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "a.py").write_text("from planted_walk.b import C, g\n\ndef f():\n    return g() + g() + C().m(abs)\n")
    (package / "b.py").write_text("class C:\n    def m(self, h):\n        return h(1)\n\ndef g():\n    return 1\n")
    monkeypatch.syspath_prepend(tmp_path)

    def _call_callback_hooks(hook_name):
        """Named as Lightning's function that the counter takes for the start of a step."""

    with CallCounter(package) as counter:
        f = importlib.import_module("planted_walk.a").f
        f()
        _call_callback_hooks("on_train_batch_start")
        _call_callback_hooks("on_train_batch_end")
        f()
        f()
    assert [(stretch.calls, stretch.moves) for stretch in counter.stretches] == [(4, 1), (8, 3)]
    assert counter.stretches[1].by_function(package) == {("a.py", "f"): 2, ("b.py", "g"): 4, ("b.py", "C.m"): 2}
    assert sys.getprofile() is None
