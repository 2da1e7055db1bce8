"""How a training step is run: one small interface, and two ways, resident.py and zero.py; the other files are parts.

The loop calls `set_lr`, `forward_backward`, `step`, and for a checkpoint `state` and `load_state`; it knows
nothing of their inside.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from engine.config import Config, ConfigError
from engine.data import Batch
from engine.distributed import Processes
from engine.model import GPT


@dataclass(frozen=True)
class StepResult:
    """grad_norm: global, before clipping. skipped: the gradients or the loss were not finite and nothing was updated.

    Updates inside the backward pass come before the norm is known: there, parameters with finite gradients were
    updated. rescaled: that was so because the loss scale was too large, and it is smaller now.
    """

    grad_norm: float
    skipped: bool
    rescaled: bool = False


class Strategy(Protocol):
    """`module` is the model to call, for training, validation and samples; `parameters` are its own, by name."""

    module: Callable[..., Tensor]
    parameters: dict[str, Tensor]

    def describe(self) -> str:
        """Return how a step is run, for a run's first lines."""

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the next update."""

    def forward_backward(self, batches: list[Batch]) -> Tensor:
        """Accumulate the gradients of these micro-batches; return this process's mean loss, fp32, on the device."""

    def step(self, loss: Tensor) -> StepResult:
        """Update the weights unless the gradients or `loss`, the mean over all processes, are not finite."""

    def state(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Yield each parameter's name and whole fp32 `weight`, `exp_avg`, `exp_avg_sq`; all processes call it."""

    def load_state(self, read: Callable[[str, str], Tensor]) -> None:
        """Take `read(parameter name, key)` for every parameter and key that `state` yields."""

    def counters(self) -> dict[str, Any]:
        """Return the numbers that belong to the state: updates done, loss scale."""

    def load_counters(self, counters: dict[str, Any]) -> None:
        """Take what `counters` returned, before `load_state`."""


def build(
    config: Config,
    model: GPT,
    processes: Processes,
    device: torch.device,
    dtype: torch.dtype,
    grad_accum: int,
    weights: Iterable[tuple[str, Tensor]],
) -> Strategy:
    """Return the strategy of a config whose choices are made (engine/placement.py).

    model: on the meta device (`GPT.outline`). weights: the name and the fp32 weights, in host memory, of each of its
    parameters (`GPT.initial_weights`). Each goes to its place and into its format before the next is asked for, so that
    no process ever holds the whole model in fp32 in host memory.
    """
    if config.strategy.strategy == "zero":
        if device.type == "cpu":  # else DeepSpeed takes a GPU where there is one
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        try:
            from engine.strategy.zero import Zero  # deepspeed takes seconds to import: only where it is used
        except ImportError as error:
            raise ConfigError(f"ZeRO needs DeepSpeed, which does not import: {error}; pip install deepspeed") from None
        return Zero(config, model, processes, device, dtype, grad_accum, weights)
    from engine.strategy.resident import Resident

    return Resident(config, model, processes, device, dtype, grad_accum, weights)


def give_memory(parameter: nn.Parameter, memory: Tensor) -> None:
    """Make `memory` what a parameter is, in every module and optimizer group with it; its shape may have had none."""
    torch.utils.swap_tensors(parameter, nn.Parameter(memory))
