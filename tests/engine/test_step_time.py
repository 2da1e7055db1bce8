"""Estimated times against figures that others published, and against what must hold of any estimate."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from engine.cards import CARDS, GiB, get
from engine.config import PRESETS, ModelConfig
from engine.footprint import METHODS, Elements, Recompute, on_nvme
from engine.memory import plan
from engine.step_time import DRIVE_BYTES_S, StepTime, chip_of, communication_bytes, step_time
from kernels import dispatch

BY_NAME = {method.name: method for method in METHODS}
TWO_B = ModelConfig(**PRESETS["2b"]["model"])
SMALL = ModelConfig(**PRESETS["13m"]["model"])


def time_of(model=TWO_B, card="RTX 4090", method="residual", recompute=Recompute(), **changes) -> StepTime:
    asked = dict(dtype="bf16", micro_batch_size=2, grad_accum=128) | changes
    return step_time(model, get(card), BY_NAME[method], recompute, **asked)


@pytest.mark.parametrize(
    ("n_layer", "n_embd", "n_head", "card", "published"),
    [
        (28, 2048, 16, "H100", 59_000),
        (28, 2048, 16, "RTX 4090", 14_000),
        (28, 2048, 16, "RTX 5060 Ti", 3_900),
        (36, 2560, 20, "H100", 31_000),
        (36, 2560, 20, "RTX 4090", 7_000),
    ],
)
def test_estimates_are_near_the_best_published_and_not_above(n_layer, n_embd, n_head, card, published):
    """LLMQ (arXiv 2512.15306), 1.5 and 3 billion parameters, sequences of 1024, 524,288 tokens a step."""
    model = ModelConfig(n_layer=n_layer, n_embd=n_embd, n_head=n_head, block_size=1024, positions="rotary")
    assert 0.78 * published < plan(model, get(card), 64 * GiB)[0].tokens_per_s < 1.05 * published


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_no_card_beats_its_peak(card):
    for made in plan(TWO_B, card, 256 * GiB, micro_batch_size=8):
        assert 0 < made.mfu < 0.95
        assert all(getattr(made.time, name) >= 0 for name in made.time.__dataclass_fields__)


def test_recomputing_costs_at_most_a_third_and_less_of_it_less():
    none, half, all_of_it = (time_of(recompute=Recompute("blocks", n)) for n in (0, 12, 24))
    assert none.recompute == 0 and half.recompute == pytest.approx(all_of_it.recompute / 2)
    assert 0.2 * none.total < all_of_it.total - none.total < 0.36 * none.total
    assert time_of(recompute=Recompute("selective", 24)).total < all_of_it.total


def test_offload_of_two_billion_parameters_costs_about_two_seconds_a_step():
    made = time_of(method="zero-1-offload-optimizer")
    assert 1.8 < made.host_transfer + made.optimizer < 2.6
    assert time_of(method="streamed").host_transfer < 1.2
    small_steps = time_of(method="zero-1-offload-optimizer", grad_accum=8)  # 32k tokens
    assert 0.25 < (small_steps.host_transfer + small_steps.optimizer) / small_steps.total < 0.45


def test_stage_two_pays_for_offload_at_every_micro_batch():
    one, two = (time_of(method=f"zero-{stage}-offload-optimizer") for stage in (1, 2))
    assert two.host_transfer > 50 * one.host_transfer


def test_a_drive_is_waited_for():
    near = BY_NAME["zero-3-offload-params"]
    asked = dict(dtype="bf16", micro_batch_size=2, grad_accum=128)
    in_memory, on_drive = (step_time(TWO_B, get("RTX 4090"), m, Recompute(), **asked) for m in (near, on_nvme(near)))
    n = Elements.of(TWO_B).total
    moved = 32 * n + (2 * 128 + 1) * 2 * n  # a step's weights, gradients and moments in fp32; weights as they are used
    assert on_drive.host_transfer - in_memory.host_transfer == pytest.approx(moved / DRIVE_BYTES_S)


def test_small_models_wait_for_the_host():
    made = time_of(SMALL, "H100", "resident", micro_batch_size=1, grad_accum=16)
    assert made.launches > 0.5 * made.total
    assert time_of(TWO_B, "H100", "resident", micro_batch_size=8, grad_accum=32).launches == 0


def test_communication_is_that_of_the_ring_algorithms():
    n = Elements.of(TWO_B).total

    def sent(name: str, gpus: int, grad_accum: int = 1) -> float:
        return communication_bytes(BY_NAME[name], n, "bf16", gpus, grad_accum)

    assert all(sent(method.name, 1) == 0 for method in METHODS)
    assert sent("residual", 2) == 2 * n
    assert sent("zero-2", 10**6) == pytest.approx(4 * n, rel=1e-3)
    assert sent("zero-2", 10**6, grad_accum=4) == pytest.approx(10 * n, rel=1e-3)
    assert sent("zero-3", 10**6, grad_accum=4) == pytest.approx(24 * n, rel=1e-3)


@pytest.mark.parametrize("name", ["rtx5090", "a40", "rx7900xtx", "rx6800", "rx9070", "mi300x"])
def test_a_card_is_planned_with_the_kernels_that_it_gets(name, monkeypatch):
    """A chip that no kernel was compiled for runs PyTorch's, whichever table it is looked up from."""
    card = get(name)
    family, number = card.target.split(":")
    properties = SimpleNamespace(name=card.name, gcnArchName=f"{number}:sramecc-")
    if family == "cuda":
        properties.major, properties.minor = divmod(int(number), 10)
    monkeypatch.setattr(torch.version, "hip", "7.0" if family == "hip" else None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: card.bf16_flops > 0)
    monkeypatch.setattr(dispatch, "_chips", {})
    assert replace(dispatch.chip(torch.device("cuda")), name="") == replace(chip_of(card), name="")


def test_a_slow_network_shows_only_beyond_one_machine():
    near = time_of(method="zero-3", gpus=8, network_bytes_s=1e8)
    far = time_of(method="zero-3", gpus=16, network_bytes_s=1e8)
    assert near.communication < 0.01 * far.communication
    assert time_of(method="zero-3", gpus=16, network_bytes_s=5e10).communication < far.communication
