"""Learning-rate schedules have the shapes they promise."""

import pytest

from engine.config import OptimizerConfig
from engine.schedule import learning_rate, never_drops


def rates(**changes) -> list[float]:
    config = OptimizerConfig(**dict(max_steps=100, lr=1.0, min_lr=0.1, warmup_steps=10) | changes)
    return [learning_rate(step, config) for step in range(config.max_steps)]


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "step"])
def test_warmup_is_linear_and_ends_at_the_peak(schedule):
    lr = rates(schedule=schedule, lr_decay_step=50)
    assert lr[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert lr[10] == pytest.approx(1.0) and max(lr) <= 1.0
    assert rates(schedule=schedule, warmup_steps=0, lr_decay_step=50)[0] == pytest.approx(1.0)


def test_cosine():
    lr = rates(schedule="cosine", warmup_steps=9)
    assert lr[9] == pytest.approx(1.0) and lr[54] == pytest.approx(0.55) and lr[99] == pytest.approx(0.1)
    falls = [a - b for a, b in zip(lr[9:], lr[10:])]
    assert min(falls) > 0 and max(falls) == pytest.approx(falls[44], rel=1e-3)  # steepest in the middle
    assert falls[0] == pytest.approx(falls[-1])


def test_wsd():
    lr = rates(schedule="wsd", decay_steps=40)
    assert set(lr[10:60]) == {1.0}
    assert lr[79] == pytest.approx(0.55) and lr[99] == pytest.approx(0.1)
    falls = [a - b for a, b in zip(lr[59:], lr[60:])]
    assert falls == pytest.approx([0.9 / 40] * 40)
    default = rates(schedule="wsd")  # the last fifth
    assert default[79] == 1.0 > default[80] and default[99] == pytest.approx(0.1)


def test_step():
    lr = rates(schedule="step", lr_decay_step=70)
    assert set(lr[10:71]) == {1.0} and set(lr[71:]) == {0.1}


@pytest.mark.parametrize("lr_decay_step, drops", [(98, True), (99, False), (50_000, False)])
def test_a_step_that_never_comes_is_said(lr_decay_step, drops):
    options = dict(schedule="step", lr_decay_step=lr_decay_step)
    assert (rates(**options)[-1] == 0.1) == drops
    said = never_drops(OptimizerConfig(**options, max_steps=100, lr=1.0, min_lr=0.1))
    assert said == [] if drops else f"stays at 1: --lr_decay_step {lr_decay_step} is not before" in said[0]
    assert not never_drops(OptimizerConfig(max_steps=100))  # another schedule's


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "step"])
@pytest.mark.parametrize("max_steps", [1, 2, 3, 11])
def test_runs_shorter_than_the_warmup_work(schedule, max_steps):
    for warmup_steps in (0, 1, 10, 50):
        lr = rates(schedule=schedule, max_steps=max_steps, warmup_steps=warmup_steps)
        assert all(0 < rate <= 1.0 for rate in lr)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_beyond_the_end_it_stays_at_the_minimum(schedule):
    config = OptimizerConfig(max_steps=100, lr=1.0, min_lr=0.1, warmup_steps=10, schedule=schedule)
    assert learning_rate(150, config) == pytest.approx(0.1)
