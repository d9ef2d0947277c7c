"""The table of failures is short, names what exists, and says what covers the rest."""

import ast
import unittest
from collections import Counter
from pathlib import Path

import pytest

from tests.huggingface.known import ASK_FOR_WEIGHTS, CHOOSE_ATTENTION, MODEL, OURS, TABLE, must_fail, refusal
from tests.huggingface.source import CHECKOUT, checkout

ROOT = Path(__file__).resolve().parents[2]
MOST = {subject: 30 if subject == "lckv" else 25 for subject in OURS}


def names_of(subject):
    return [test for known in TABLE if subject in known.subjects for test in known.tests]


@pytest.mark.parametrize("subject", OURS)
def test_few_fail_and_each_for_one_reason(subject):
    names = names_of(subject)
    assert 0 < len(names) <= MOST[subject]
    assert [name for name, count in Counter(names).items() if count > 1] == []


def test_the_control_has_no_failures():
    assert {subject for known in TABLE for subject in known.subjects} == set(OURS)


@pytest.mark.parametrize("known", TABLE, ids=lambda known: known.tests[0])
def test_what_looks_into_the_host_is_covered_by_ours(known):
    assert known.kind == "refusal" or known.covered, "internals name the test of ours that covers the behaviour"
    if known.covered:
        file, _, name = known.covered.partition("::")
        functions = ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8")))
        assert name in {node.name for node in functions if isinstance(node, ast.FunctionDef)}


def raising(error):
    def test(_):
        if error is not None:
            raise error

    return must_fail(test, refusal("it may not", "words of the refusal", OURS, "test"))


def test_the_table_is_held_to_its_word():
    with pytest.raises(pytest.xfail.Exception, match="refusal: it may not"):
        raising(ValueError("the words of the refusal"))(None)
    with pytest.raises(ValueError, match="something else"):
        raising(ValueError("something else"))(None)
    with pytest.raises(AssertionError, match=r"passes now; take it out of known\.py"):
        raising(None)(None)
    with pytest.raises(AssertionError, match="it is skipped: here"):
        raising(unittest.SkipTest("here"))(None)


@pytest.mark.roads
def test_what_stands_in_the_table_exists():
    from tests.huggingface.suites import Suite

    here = TABLE if checkout() else MODEL
    assert [test for known in here for test in known.tests if not hasattr(Suite, test)] == []


@pytest.mark.roads
def test_what_asks_by_the_way_exists():
    if checkout() is None:
        pytest.skip(f"{CHECKOUT} names no checkout of transformers: its tests of generation do not run")
    from tests.huggingface.suites import Suite

    assert [test for test in (*ASK_FOR_WEIGHTS, *CHOOSE_ATTENTION) if not hasattr(Suite, test)] == []
