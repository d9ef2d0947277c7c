"""Learning rates that fall with the root of the step (fairseq's inverse_sqrt); the other curves have their modules."""

import math

import pytest

from kvtrain.training.schedules import Phase


def test_after_the_warm_up_the_rate_falls_with_the_root_of_the_step():
    phase = Phase("a", 1000, 5e-4, warmup_steps=80, initial_learning_rate=1e-7, inverse_root=True)
    rates = [phase.learning_rate_at(step) for step in range(1000)]
    assert rates[79] == pytest.approx(5e-4) == max(rates)
    assert all(rates[step] == pytest.approx(5e-4 * math.sqrt(80 / (step + 1))) for step in range(80, 1000))
    assert rates[319] == pytest.approx(2.5e-4)  # four times the steps, half the rate


@pytest.mark.parametrize("settings", [{"warmup_steps": 0}, {"warmup_steps": 5, "final_learning_rate": 0.0}])
def test_a_rate_without_a_warm_up_or_with_an_end_is_refused(settings):
    with pytest.raises(ValueError, match="give warmup_steps, and leave final_learning_rate out"):
        Phase("a", 10, 1e-3, inverse_root=True, **settings)
