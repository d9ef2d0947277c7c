"""What is logged of an optimizer step tells of all its micro-batches, weighed by their targets."""

from types import SimpleNamespace

import pytest
import torch

from kvtrain.training.step_figures import StepFigures
from tests.distributed.logged_runs import MODULES, assert_same_figures, logged_run


@pytest.mark.parametrize("name", ["plain", "distilled", "hard-concrete duo", "transnormer"])
def test_four_micro_batches_are_logged_as_one_batch_of_all_their_rows(tmp_path, name):
    together = logged_run(tmp_path / "together", name, per_batch=8)
    assert len(together) == 20
    assert_same_figures(logged_run(tmp_path / "apart", name), together, name)


def test_every_training_module_of_a_kind_is_compared():
    kinds = {type(build()).__mro__[0 if name == "transnormer" else 1].__name__ for name, build in MODULES.items()}
    assert kinds == {"RetrofitModule", "DMCModule", "DuoModule", "LCKVModule", "TransNormerModule"}


def module(world_size=1, reduced=None):
    logged, reductions = {}, []

    def reduce(totals, reduce_op):
        reductions.append(totals)
        assert reduce_op == "sum"
        return totals * 2

    trainer = SimpleNamespace(world_size=world_size, strategy=SimpleNamespace(reduce=reduce))
    log = lambda name, value, prog_bar: logged.update({name: (value.item(), prog_bar)})  # noqa: E731
    return SimpleNamespace(trainer=trainer, log=log), logged, reductions


def test_shares_add_up_and_all_figures_travel_in_one_reduction():
    figures = StepFigures()
    for share in (0.25, 0.5):
        figures.add("loss", torch.tensor(share, requires_grad=True), prog_bar=True)
        figures.add("compression", torch.tensor(share / 3), transform=lambda fraction: 1 / (1 - fraction))
    one, logged, reductions = module(world_size=2)
    figures.log(one)
    assert logged == {"loss": (1.5, True), "compression": (pytest.approx(2.0), False)}
    assert [totals.tolist() for totals in reductions] == [[0.75, 0.25]]
    figures.log(one)
    assert len(reductions) == 1  # what is logged is gone


def test_one_process_reduces_nothing_and_a_new_step_forgets_the_last():
    figures = StepFigures()
    figures.add("loss", torch.tensor(3.0))
    figures.clear()
    figures.add("loss", torch.tensor(1.0))
    one, logged, reductions = module()
    figures.log(one)
    assert logged == {"loss": (1.0, False)}
    assert not reductions
