"""What a kernel that can be tuned says of itself, and how results are judged; the kernels lie beside it."""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kernels.aot import Case, with_launch
from kernels.dispatch import Chip, use_backend
from kernels.launch_configs import LaunchConfig, launch_config

Function = Callable[..., Tensor | tuple[Tensor, ...]]
Timed = tuple[Callable[[], object], dict[str, int]]  # what to time, and its shape
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


@dataclass(frozen=True)
class Problem:
    """Inputs by name and a function of them, ours and PyTorch's: `exact` works in any dtype, so in fp64 as well."""

    inputs: dict[str, Tensor]
    ours: Function
    exact: Function
    backward: bool = True

    def by_ours(self) -> dict[str, Tensor]:
        with use_backend("triton"):
            return self._run(self.ours, self.inputs)

    def by_pytorch(self) -> dict[str, Tensor]:
        return self._run(self.exact, self.inputs)

    def by_definition(self) -> dict[str, Tensor]:
        return self._run(self.exact, {name: x.double() for name, x in self.inputs.items()})

    def _run(self, function: Function, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return "out" and, with a backward pass, the gradient "dx" of each input x."""
        if not self.backward:
            return {"out": torch.stack(as_tuple(function(**inputs)))}
        leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
        outs = as_tuple(function(**leaves))
        narrow = next(iter(self.inputs.values())).dtype
        grads = [random(o.shape, o.device, narrow, seed=10 + i).to(o.dtype) for i, o in enumerate(outs)]
        results = torch.autograd.grad(outs, list(leaves.values()), grads)
        return {"out": torch.stack(outs).detach()} | {f"d{name}": result for name, result in zip(leaves, results)}


def wrong(problem: Problem, outputs: Iterable[str], where: str) -> str:
    """Return how the configuration in force is wrong, or nothing.

    The error against fp64 may be twice that of PyTorch's operations in the same dtype, a gradient's three times.
    """
    exact, theirs, ours = problem.by_definition(), problem.by_pytorch(), problem.by_ours()
    for name in outputs:
        error = _error(ours[name], exact[name])
        allowed = 1e-5 + _error(theirs[name], exact[name]) * (2 if name == "out" else 3)
        if not error <= allowed:
            return f"{name} is off by {error:.2g} {where}, allowed {allowed:.2g}"
    return ""


def as_tuple(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _error(values: Tensor, exact: Tensor) -> float:
    return (values.double() - exact).abs().max().item()


def random(shape: Iterable[int], device: torch.device, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(tuple(shape), device=device, generator=generator).to(dtype)


@dataclass(frozen=True)
class Tunable(ABC):
    """A kernel whose launch configurations are searched.

    kernel: its name in kernels/configs/; space: the values that are tried for each constant; sizes: what a winner is
    measured at, such as sequence lengths. Its cases are what the table tells its configurations apart by.
    """

    kernel: str
    space: dict[str, tuple[int | None, ...]]
    sizes: tuple[int, ...]

    def candidates(self, case: str, chip: Chip) -> list[LaunchConfig]:
        made = (dict(zip(self.space, values)) for values in itertools.product(*self.space.values()))
        return [config for config in made if self.sensible(config, case)]

    def sensible(self, config: LaunchConfig, case: str) -> bool:
        """Whether a configuration is worth compiling."""
        return True

    @abstractmethod
    def cases(self, chip: Chip) -> tuple[str, ...]:
        """Every case that the kernel has on a chip."""

    def usual(self, chip: Chip) -> tuple[str, ...]:
        """The cases that are tuned where nobody says which: those of the presets."""
        return self.cases(chip)

    @abstractmethod
    def shared_bytes(self, config: LaunchConfig, case: str) -> int:
        """Return the least shared memory that a configuration can do with."""

    @abstractmethod
    def shipped(self, case: str, target: str) -> Case:
        """Return what ships for a chip: the kernel as it is launched now."""

    def to_compile(self, config: LaunchConfig, case: str, target: str) -> Case:
        made = with_launch(self.shipped(case, target), config)
        return replace(made, label=" ".join(f"{k}={v}" for k, v in config.items()), targets=(target,))

    def current(self, case: str, chip: Chip) -> LaunchConfig:
        """Return the configuration that the kernel is launched with now."""
        made = self.shipped(case, chip.target)
        launch = made.constants | {"num_warps": made.num_warps, "num_stages": made.num_stages}
        return dict(launch_config(chip, self.kernel, case, {key: launch[key] for key in self.space}))

    @abstractmethod
    def wrong(self, case: str, device: torch.device, dtype: torch.dtype, **sizes: Any) -> str:
        """Return how the configuration in force is wrong, at awkward sizes, or nothing."""

    @abstractmethod
    def speed(self, case: str, device: torch.device, dtype: torch.dtype, size: int) -> Timed:
        """Return what to time at a size, and its shape."""


def timed_backward(function: Function, inputs: dict[str, Tensor]) -> Callable[[], object]:
    """Return what runs the backward pass of `function(**inputs)` alone, over and over."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    outs = as_tuple(function(**leaves))
    grads = [random(out.shape, out.device, out.dtype, seed=1) for out in outs]

    def run() -> object:
        return torch.autograd.grad(outs, list(leaves.values()), grads, retain_graph=True)

    return run


def timed_forward(function: Function, inputs: dict[str, Tensor]) -> Callable[[], object]:
    @torch.no_grad()
    def run() -> object:
        return function(**inputs)

    return run
