"""ZeRO-2 and ZeRO-3, in one process and in two, end where plain Lightning in one process ends."""

import pytest
import torch

from kvtrain.training.strategies import DEEPSPEED_INSTALLED

from .launch import launch
from .runs import LEARNING_RATE, assert_same_gates, assert_same_run, dmc_run, duo_run, lckv_run, make_host, sgd_step

CLIP = 0.5  # between a quarter of the gradient's norm and the whole, so that dividing it twice would show

pytestmark = [
    pytest.mark.roads,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not DEEPSPEED_INSTALLED, reason="needs DeepSpeed: pip install kvtrain[deepspeed]"),
]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Every run without DeepSpeed, in this process."""
    folder = tmp_path_factory.mktemp("plain")
    return {
        "free": sgd_step(folder, 0, 1, None, None),
        "clipped": sgd_step(folder, 0, 1, None, CLIP),
        "dmc": dmc_run(folder, 0, 1, None, enable_checkpointing=False),
        "lckv": lckv_run(folder, 0, 1, None),
        "duo": duo_run(folder, 0, 1, None),
    }


@pytest.fixture(
    scope="module", params=[(2, 1), (2, 2), (3, 1), (3, 2)], ids=lambda case: "zero{}-ranks{}".format(*case)
)
def zero(request, tmp_path_factory):
    """The same runs under DeepSpeed, in processes of their own."""
    stage, world_size = request.param
    folder = tmp_path_factory.mktemp("zero")
    return launch("tests.distributed.worker", world_size, folder, stage, CLIP, DS_ACCELERATOR="cpu")


def moved(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """How far a run has taken the host."""
    start = dict(make_host(dtype=torch.float32).named_parameters())
    return torch.cat([(weights[name] - start[name].detach()).double().flatten() for name in sorted(start)])


@pytest.mark.parametrize("run", ["free", "clipped"])
def test_accumulated_ragged_rows_move_as_far(plain, zero, run):
    expected, ours = moved(plain[run]), moved(zero[run])
    assert ours.norm() / expected.norm() == pytest.approx(1.0, abs=1e-4)
    assert (ours - expected).norm() / expected.norm() < 1e-5


def test_the_clip_is_active_and_would_show_a_quarter(plain):
    whole = moved(plain["free"]).norm().item() / LEARNING_RATE
    assert whole / 4 < CLIP < whole
    assert moved(plain["clipped"]).norm().item() / LEARNING_RATE == pytest.approx(CLIP, rel=1e-3)


def test_three_phases_end_with_the_same_weights(plain, zero):
    for name, expected in plain["dmc"]["weights"].items():
        torch.testing.assert_close(zero["dmc"]["weights"][name], expected, atol=1e-5, rtol=0)


def test_layers_that_run_many_times_end_with_the_same_weights(plain, zero):
    assert_same_run(zero["lckv"], plain["lckv"])


def test_gates_end_the_same_and_stay_between_0_and_1(plain, zero):
    assert_same_gates(zero["duo"], plain["duo"])


@pytest.mark.parametrize("run", ["dmc", "half"])
def test_a_boundary_clears_rows_and_moments(zero, run):
    after_zero_out, after_retrofit = zero[run]["notes"]
    for note, steps in ((after_zero_out, 3), (after_retrofit, 4)):
        assert note["before"]["step"] == steps
        assert min(note["before"].values()) > 0
        assert note["after"] == {"step": 0.0, "exp_avg": 0.0, "exp_avg_sq": 0.0}
    assert after_zero_out["rows"] == 0
    assert after_retrofit["rows"] > 0  # they decide by now; only the first boundary may touch them


def test_half_precision_keeps_rotary_frequencies(zero):
    assert zero["half"]["frequencies"] == torch.float32


def test_rows_of_a_matrix_that_ranks_share(zero):
    assert zero["sharded"][:, 0].tolist() == [1, 1, 0, 1, 1, 0, 1]
    assert (zero["sharded"] == zero["sharded"][:, :1]).all()
