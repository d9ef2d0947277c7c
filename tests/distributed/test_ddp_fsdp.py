"""Two processes, replicated (DDP) or sharded (FSDP2), learn as one does: layers that run again and again, and gates."""

import pytest
import torch

from .launch import launch
from .logged_runs import MODULES, STOP_AT, assert_same_figures, logged_run
from .plain_worker import CASES, gates, gradients
from .runs import assert_same_gates, assert_same_run, duo_run, lckv_run

pytestmark = [pytest.mark.roads, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return launch("tests.distributed.plain_worker", 2, tmp_path_factory.mktemp("ranks"))


def test_ddp_ends_with_the_same_weights(ranks, tmp_path):
    assert_same_run(ranks["ddp"], lckv_run(tmp_path, 0, 1, None))


@pytest.mark.parametrize("name", list(MODULES))
def test_ddp_logs_the_same_loss_and_figures(ranks, tmp_path, name):
    assert_same_figures(ranks["logged"][name], logged_run(tmp_path, name), name)


def test_a_run_that_is_logged_now_and_then_and_stops_in_between_tells_of_those_steps(ranks, tmp_path):
    expected = logged_run(tmp_path, "dmc")
    assert_same_figures(ranks["sparse"], [expected[4], expected[STOP_AT - 1]], "dmc")


@pytest.mark.parametrize("case", list(CASES))
def test_fsdp2_has_the_same_loss_and_gradients(ranks, case):
    loss, expected = gradients(CASES[case])
    found_loss, found = ranks["fsdp2"][case]
    torch.testing.assert_close(found_loss, loss, atol=1e-12, rtol=0)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(found[name], gradient, atol=1e-12, rtol=0)


def test_ddp_ends_with_the_same_gates(ranks, tmp_path):
    assert_same_gates(ranks["ddp gates"], duo_run(tmp_path, 0, 1, None))


def test_sharded_gates_take_the_same_steps_and_stay_between_0_and_1(ranks):
    found, expected = ranks["fsdp2 gates"], gates()
    beyond = torch.stack(expected[::2])
    assert beyond.min() < -0.01 and beyond.max() > 1.01
    for before, after in zip(found[::2], found[1::2], strict=True):
        assert torch.equal(after, before.clamp(0.0, 1.0))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
