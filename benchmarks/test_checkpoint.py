"""Saving and loading a run's weights and moments, synced to the disk; beside it torch.save, as scripts do it."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.contenders import some_weights
from benchmarks.throughput import random_batches
from engine import checkpoint
from engine.config import Config, from_dict, merge, preset
from engine.device import choose_dtype
from engine.distributed import Processes
from engine.model import GPT
from engine.placement import settle
from engine.strategy import Strategy, build

PRESET = "gpt2" if torch.cuda.is_available() else "13m"
PROGRESS = checkpoint.Progress(step=1, tokens=256)


@pytest.fixture
def run(device: torch.device, tmp_path: Path) -> tuple[Config, Strategy, GPT]:
    """A run after its first step, when the moments are there."""
    small = {
        "optimizer": {"batch_tokens": 1024},
        "strategy": {"weights": "fp32", "moments": "fp32"},
        "run_dir": str(tmp_path / "run"),
    }
    dtype = choose_dtype("auto", device)[0]
    config, grad_accum, _ = settle(from_dict(merge(preset(PRESET), small)), device, dtype, Processes())
    model = GPT.outline(config.model)
    strategy = build(config, model, Processes(), device, dtype, grad_accum, some_weights(model, config.seed))
    strategy.set_lr(config.optimizer.lr)
    strategy.step(strategy.forward_backward(random_batches(config, config.optimizer.micro_batch_size, grad_accum, 0)))
    return config, strategy, model


def about(model: GPT, step: str, implementation: str) -> dict:
    n = model.num_parameters()
    return dict(
        op="checkpoint",
        step=step,
        implementation=implementation,
        shape={"parameters": n},
        dtype="float32",
        bytes=12 * n,
    )


@pytest.mark.parametrize("step", ["save", "load"])
def test_checkpoint(measure: Callable[..., None], run: tuple, step: str) -> None:
    config, strategy, model = run

    def save() -> Path:
        shutil.rmtree(Path(config.run_dir), ignore_errors=True)
        return checkpoint.save(config, strategy, Processes(), PROGRESS, "r50k_base")

    saved = save()
    measure(save if step == "save" else lambda: checkpoint.load(saved, strategy), **about(model, step, "pilesmith"))


@pytest.mark.parametrize("step", ["save", "load"])
def test_torch_save(measure: Callable[..., None], run: tuple, tmp_path: Path, step: str) -> None:
    """The usual script's: one file, here synced as well, so that both have reached the disk when they are done."""
    _, strategy, model = run
    state = dict(strategy.state())

    def save() -> None:
        with open(tmp_path / "checkpoint.pt", "wb") as file:
            torch.save(state, file)
            os.fsync(file.fileno())

    def load() -> None:
        for name, tensors in torch.load(tmp_path / "checkpoint.pt").items():
            for key, value in tensors.items():
                state[name][key].copy_(value)

    save()
    with torch.no_grad():
        measure(save if step == "save" else load, **about(model, step, "torch.save"))
