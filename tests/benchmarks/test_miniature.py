"""A card's plan in miniature: it trains inside the limit, which is a real one."""

from dataclasses import replace

import pytest

from benchmarks import miniature
from engine.cards import get
from engine.config import PRESETS, ModelConfig
from engine.footprint import MiB
from engine.memory import choose, plan

TWO_B = ModelConfig(**PRESETS["2b"]["model"])


@pytest.fixture
def trial(monkeypatch):
    """The T4's plan, smaller still, and what the formulas predict for it."""
    if not miniature.STATUS.exists():
        pytest.skip("the limit is Linux's")
    monkeypatch.setattr(miniature, "SCALE", 32)
    chosen = choose(plan(TWO_B, get("T4"), miniature.HOST_MEMORY))
    assert chosen.dtype == "fp16"
    return miniature.trial(chosen, 3)


def test_the_plan_trains_inside_its_limit(trial):
    asked, predicted = trial
    result = miniature.in_a_process(asked)
    assert result["status"] == "trained" and len(result["losses"]) == 3
    assert result["losses"][-1] < result["losses"][0]
    assert predicted / 2 < result["peak_bytes"] < asked.limit_bytes + miniature.PROCESS_BYTES


def test_the_limit_is_a_limit(trial):
    asked, predicted = trial
    result = miniature.in_a_process(replace(asked, limit_bytes=predicted // 2))
    assert result["status"] == miniature.OUT_OF_MEMORY


def test_the_miniature_is_to_scale():
    small = miniature.miniature(TWO_B)
    assert small.n_layer == TWO_B.n_layer and small.head_dim == TWO_B.head_dim // 2
    chosen = choose(plan(TWO_B, get("A100 40GB"), miniature.HOST_MEMORY))
    asked, predicted = miniature.trial(chosen, 1)
    whole = miniature.held_bytes(chosen.footprint) / miniature.SCALE**2
    assert whole < predicted < 1.1 * whole
    assert asked.limit_bytes - predicted > 100 * MiB // miniature.SCALE**2


@pytest.mark.slow
def test_the_tracker_sees_what_is_planned_at_full_size():
    chosen = choose(plan(TWO_B, get("RTX 3090"), miniature.HOST_MEMORY))
    seen = miniature.full_size(chosen)
    assert seen["predicted_of_tracked_bytes"] == pytest.approx(seen["tracked_bytes"], rel=0.05)
    assert seen["tracked_bytes"] < seen["card_bytes"]
