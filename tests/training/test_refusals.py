"""A library's refusal fits a line as long as nothing has begun; slips keep their traceback."""

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer

from kvtrain.errors import UsageError
from kvtrain.training.refusals import refusals


def test_a_refusal_of_lightning_is_one_line():
    with pytest.raises(UsageError, match=r"`accelerator='banana'`") as refused, refusals():
        Trainer(accelerator="banana")
    assert "\n" not in str(refused.value)


def test_what_comes_after_the_beginning_stays_as_it_is():
    with pytest.raises(MisconfigurationException), refusals(until=lambda: True):
        raise MisconfigurationException("in the middle of a run")


def test_a_slip_stays_as_it_is():
    with pytest.raises(ZeroDivisionError), refusals():
        _ = 1 // 0
    with pytest.raises(ValueError, match="not ours") as raised, refusals():
        raise ValueError("not ours")
    assert type(raised.value) is ValueError
