"""The planner's formulas against torch's memory tracker, which follows the real model and loss on fake tensors."""

import pytest

from engine.cards import CARDS
from engine.config import PRESETS, ModelConfig
from engine.footprint import METHODS, Recompute, predict
from engine.step_time import chip_of
from tests.marks import slow_unless
from tools.track_memory import METHOD_OF_WEIGHTS, main, predict_tracked, track


def model_of(preset: str, **changes) -> ModelConfig:
    return ModelConfig(**(PRESETS[preset]["model"] | changes))


def way(kind: str, layers: int) -> Recompute:
    return Recompute(kind, layers) if layers and kind != "none" else Recompute()


def error(model: ModelConfig, **asked) -> float:
    return predict_tracked(model, **asked).card_bytes / track(model, **asked)["total"] - 1


SHORT = {
    "13m": {},
    "gpt2": {"n_layer": 3, "block_size": 256},
    "2b": {"n_layer": 2, "block_size": 256},
    "3b": {"n_layer": 2},
}


@pytest.mark.parametrize(
    "case",
    slow_unless(
        lambda case: case[:2] in (("13m", 16), ("2b", 1)),
        [
            ("13m", 1, "fp32", "fp32"),
            ("13m", 64, "fp32", "fp32"),
            ("13m", 16, "bf16", "fp32"),
            ("gpt2", 1, "fp32", "fp32"),
            ("gpt2", 16, "bf16", "fp32"),
            ("gpt2", 32, "fp16", "fp16"),
            ("2b", 1, "bf16", "fp32"),
            ("2b", 8, "bf16", "bf16"),
            ("3b", 4, "fp16", "fp16"),
        ],
    ),
    ids=lambda case: "-".join(map(str, case)),
)
def test_formulas_are_within_five_percent_of_the_tracker(case):
    preset, micro_batch_size, dtype, weights = case
    model = model_of(preset, **SHORT[preset])
    for kind in ("none", "blocks", "selective"):
        asked = dict(
            dtype=dtype, weights=weights, micro_batch_size=micro_batch_size, recompute=way(kind, model.n_layer)
        )
        assert abs(error(model, **asked)) < 0.05, kind


WAYS = [
    (kind, layers, accumulates)
    for kind in ("none", "blocks", "selective", "offloaded")
    for layers in ((0,) if kind == "none" else (1, 3))
    for accumulates in (True, False)
]


@pytest.mark.parametrize(
    "case",
    slow_unless(lambda case: case[0] == "none" or (case[1] == 3) == case[2], WAYS),  # each kind in two of four ways
    ids=lambda case: "-".join(map(str, case)),
)
def test_partial_recomputation_and_single_micro_batches(case):
    kind, layers, accumulates = case
    model = model_of("gpt2", n_layer=3, block_size=512, vocab_size=4096)
    asked = dict(dtype="bf16", weights="bf16", micro_batch_size=8, accumulates=accumulates)
    assert abs(error(model, **asked, recompute=way(kind, layers))) < 0.05


def test_offloaded_activations_do_not_grow_with_depth():
    asked = dict(dtype="bf16", weights="bf16", micro_batch_size=8, accumulates=False)
    held = {}
    for kind in ("blocks", "offloaded"):
        for n_layer in (2, 4):
            model = model_of("gpt2", n_layer=n_layer, n_head=4, n_embd=64, block_size=256, vocab_size=512)
            seen = track(model, **asked, recompute=way(kind, n_layer))
            held[kind, n_layer] = seen["total"] - seen["param"] - seen["grad"]
    stream = 8 * 256 * 64 * 2
    assert held["offloaded", 4] - held["offloaded", 2] < stream / 2
    assert held["blocks", 4] - held["blocks", 2] > 1.5 * stream


def test_the_tracker_sees_the_parts(capsys):
    model = model_of("gpt2", n_layer=2, block_size=128)
    asked = dict(dtype="bf16", weights="fp32", micro_batch_size=4)
    seen, planned = track(model, **asked), predict_tracked(model, **asked)
    assert planned.card["weights"] == pytest.approx(seen["param"], rel=0.001)
    assert planned.card["gradients"] >= seen["grad"] * 0.999
    assert main(["--preset", "13m", "--micro_batch_size", "4"]) == 0
    assert "tracked" in capsys.readouterr().out


@pytest.mark.slow
def test_what_is_planned_for_a_card_covers_what_the_tracker_sees():
    """The whole prediction, with context and what ops hold inside, is never below what is certainly needed."""
    model = model_of("gpt2", n_layer=4, block_size=512)
    for weights, dtype, kind in (("fp32", "bf16", "none"), ("fp16", "fp16", "blocks"), ("bf16", "bf16", "offloaded")):
        method = next(m for m in METHODS if m.name == METHOD_OF_WEIGHTS[weights])
        asked = dict(dtype=dtype, micro_batch_size=4, recompute=way(kind, 4))
        seen = track(model, weights=weights, **asked)["total"]
        for card in CARDS:
            made = predict(model, method, chip=chip_of(card), **asked)
            assert made.allocated_bytes - made.card["optimizer_states"] > 0.99 * seen


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["gpt2", "2b"])
@pytest.mark.parametrize("block_size", [1024, 2048])
@pytest.mark.parametrize("micro_batch_size", [1, 4])
@pytest.mark.parametrize("kind", ["none", "blocks", "selective", "offloaded"])
def test_whole_presets_are_within_five_percent_of_the_tracker(preset, block_size, micro_batch_size, kind):
    model = model_of(preset, block_size=block_size)
    asked = dict(dtype="bf16", weights="bf16", micro_batch_size=micro_batch_size, recompute=way(kind, model.n_layer))
    assert abs(error(model, **asked)) < 0.05
