"""AdamW with its state in 32, 16 or 8 bits; which parameters decay; clipping by the global norm.

Bytes a parameter, without its gradient; matrices only, since vectors stay fp32 throughout:

    weights     fp32 4, residual 2 + 2 (a 16-bit weight and what completes it to fp32), stochastic 2
    moments     fp32 8, bf16 4, int8 2
"""

import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn as nn
from torch import Tensor

from kernels.adamw import adamw
from kernels.number_formats import BLOCK, NEAREST, decode_moments, encode_moments, join, momentum_bound, split

Weights = Literal["fp32", "residual", "stochastic"]
Moments = Literal["fp32", "bf16", "int8"]
_MOMENT_DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "int8": (torch.int8, torch.uint8),
}
# A parameter; 8-bit moments have a byte for each block beside.
MOMENT_BYTES = {kind: first.itemsize + second.itemsize for kind, (first, second) in _MOMENT_DTYPES.items()}
RESIDUAL_BYTES = {"fp32": 0, "residual": torch.int16.itemsize, "stochastic": 0}
_CHUNK = 1 << 22  # elements unpacked at a time where state is read or written


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return two groups for an optimizer: matrices and embeddings, which decay, and vectors, which do not.

    Parameters that need no gradient are left out; tied ones are in once.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def clip_coefficient(parameters: Iterable[nn.Parameter], max_norm: float) -> tuple[Tensor, Tensor]:
    """Return the global norm of the gradients and what to multiply them by so that it is at most `max_norm`.

    Both fp32 scalars on the device of the gradients, computed in fp32 and not read on the host. Nothing is scaled here:
    the coefficient goes to `AdamW.step`. Where the norm is not finite the coefficient means nothing.
    """
    alike = defaultdict(list)
    for p in parameters:
        if p.grad is not None:
            alike[p.grad.dtype].append(p.grad)  # only gradients of one dtype share a launch
    norms = [norm for grads in alike.values() for norm in torch._foreach_norm(grads, 2, dtype=torch.float32)]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    return norm, (max_norm / (norm + 1e-6)).clamp(max=1.0)


def stored_dtype(parameter: Tensor, weights: Weights = "fp32", dtype: torch.dtype = torch.bfloat16) -> torch.dtype:
    """Return the dtype that an AdamW of such `weights` and `dtype` gives a parameter; only its shape is read."""
    return dtype if parameter.dim() >= 2 and weights != "fp32" else torch.float32


class AdamW(torch.optim.Optimizer):
    """AdamW with decoupled weight decay, one launch for all parameters of a group (Loshchilov and Hutter, 2019).

    weights "fp32": parameters as they are. "residual": matrices become `dtype`, bf16 or fp16, and an int16 residual
    keeps the fp32 weight whole: training is that of fp32 weights bit for bit, with 16-bit matrices for the model
    (fp16: see `kernels.number_formats.split`). "stochastic": matrices become `dtype` and are rounded stochastically.
    Given fp32, the parameters are converted here, in place; do it before the first forward pass.
    moments "fp32"; "bf16"; or "int8", in 8 bits (`kernels.number_formats`); both of the latter are rounded
    stochastically. What is random depends on `seed`, the parameter's place, its step and nothing else.
    Each of these may be set for a group. With fp32 throughout the numbers are torch.optim.AdamW's.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        weights: Weights = "fp32",
        moments: Moments = "fp32",
        dtype: torch.dtype = torch.bfloat16,
        seed: int = 0,
    ) -> None:
        self._places: dict[Tensor, tuple[int, int]] = {}  # parameter -> its number, its group's number
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"weights": weights, "moments": moments, "dtype": dtype, "seed": seed})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group["bound"] = momentum_bound(*group["betas"])  # int8 moments stay what they are if betas change
        for parameter in group["params"]:
            self._places[parameter] = len(self._places), len(self.param_groups) - 1
            if self._weights(parameter) == "fp32":
                continue
            if self._weights(parameter) == "residual":
                self.state[parameter]["residual"] = self._zeros(parameter, parameter.shape, torch.int16)
            if parameter.dtype == torch.float32:
                master, parameter.data = parameter.data, torch.empty_like(parameter, dtype=group["dtype"])
                self._set_master(parameter, master)

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Tensor] | None = None,
        *,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> Tensor | None:
        """Update every parameter that has a gradient.

        grad_scale, fp32 scalar on the device: multiplies the gradients. found_inf, fp32 scalar on the device: 1 where
        the gradients are not finite, and then nothing changes; else 0. The gradients hold nothing of use afterwards.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for number, group in enumerate(self.param_groups):
            alike = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    alike[p.dim() >= 2, p.dtype, p.grad.dtype].append(p)
            for parameters in alike.values():
                self._update(number, parameters, grad_scale, found_inf)
        return loss

    def _update(
        self, group_number: int, parameters: list[Tensor], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        states = [self._state(p) for p in parameters]
        adamw(
            parameters,
            [p.grad for p in parameters],
            *([s[key] for s in states] for key in ("exp_avg", "exp_avg_sq", "step")),
            residuals=[s["residual"] for s in states] if "residual" in states[0] else None,
            exponents=[s["exponents"] for s in states] if "exponents" in states[0] else None,
            keys=[self._key(p) for p in parameters],
            grad_scale=grad_scale,
            found_inf=found_inf,
            **self._numbers(group_number),
        )

    def _numbers(self, group_number: int) -> dict[str, Any]:
        """A group's hyperparameters, as `adamw` takes them."""
        group = self.param_groups[group_number]
        return {key: group[key] for key in ("lr", "betas", "eps", "weight_decay", "bound")}

    def _key(self, parameter: Tensor) -> int:
        """Key of a parameter's random bits, from the seed and its place."""
        number, group_number = self._places[parameter]
        return zlib.crc32(f"{self.param_groups[group_number]['seed']} {number}".encode())

    def _weights(self, parameter: Tensor) -> Weights:
        return self._group(parameter)["weights"] if parameter.dim() >= 2 else "fp32"

    def _moments(self, parameter: Tensor) -> Moments:
        return self._group(parameter)["moments"] if parameter.dim() >= 2 else "fp32"

    def _group(self, parameter: Tensor) -> dict[str, Any]:
        return self.param_groups[self._places[parameter][1]]

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if "step" not in state:
            moments = self._moments(parameter)
            first, second = _MOMENT_DTYPES[moments]
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = self._zeros(parameter, parameter.shape, first)
            state["exp_avg_sq"] = self._zeros(parameter, parameter.shape, second)
            if moments == "int8":
                state["exponents"] = self._zeros(parameter, (-(-parameter.numel() // BLOCK),), torch.uint8)
        return state

    def allocate_states(self) -> None:
        """Make all moments, zero. Left to the first step they would take the places that its activations leave."""
        for parameter in self._places:
            self._state(parameter)

    def _zeros(self, parameter: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a state of a parameter, or a part of it, where states are kept."""
        return torch.zeros(shape, dtype=dtype, device=parameter.device)

    @torch.no_grad()
    def _set_master(self, parameter: Tensor, master: Tensor) -> None:
        if self._weights(parameter) == "fp32":
            parameter.copy_(master)
            return
        residual = self.state[parameter].get("residual")
        for part, _ in _chunks(parameter):
            chunk = master.reshape(-1)[part].to(parameter.device, torch.float32)
            high, low = split(chunk, parameter.dtype)
            parameter.view(-1)[part] = high
            if residual is not None:
                residual.view(-1)[part] = low

    @torch.no_grad()
    def export_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return fp32 "weight" and, where there are moments, "exp_avg" and "exp_avg_sq", in the parameter's shape.

        They are in host memory: a card whose memory is planned to the last has no room for a whole matrix in fp32.
        `import_state` of these into an optimizer of the same formats restores the very same state; into one of other
        formats, the nearest.
        """
        state, weights = self.state[parameter], parameter.view(-1)
        states = {key: value.view(-1) for key, value in state.items() if key != "step"}

        def read(part: slice, blocks: slice) -> dict[str, Tensor]:
            values = {"weight": weights[part]}
            if "residual" in state:
                values["weight"] = join(weights[part], states["residual"][part].to(parameter.device))
            if "step" not in state:
                return values
            moments = states["exp_avg"][part], states["exp_avg_sq"][part]
            if "exponents" in state:
                moments = decode_moments(*moments, states["exponents"][blocks], self._group(parameter)["bound"])
            return values | dict(zip(("exp_avg", "exp_avg_sq"), moments))

        exported: dict[str, Tensor] = {}
        for part, blocks in _chunks(parameter):
            for key, values in read(part, blocks).items():
                if key not in exported:
                    exported[key] = torch.empty(parameter.shape, dtype=torch.float32)
                exported[key].view(-1)[part] = values.cpu()
        return exported

    @torch.no_grad()
    def import_state(
        self,
        parameter: nn.Parameter,
        weight: Tensor,
        exp_avg: Tensor | None = None,
        exp_avg_sq: Tensor | None = None,
        step: int = 0,
    ) -> None:
        """Set a parameter's fp32 weights and, with the number of its updates, its moments; tensors on any device."""
        self._set_master(parameter, weight)
        if exp_avg is None:
            return
        state = self._state(parameter)
        state["step"].fill_(step)
        if "exponents" not in state:
            state["exp_avg"].copy_(exp_avg)
            state["exp_avg_sq"].copy_(exp_avg_sq)
            return
        for part, blocks in _chunks(parameter):
            m, v = (t.reshape(-1)[part].to(parameter.device, torch.float32) for t in (exp_avg, exp_avg_sq))
            places = state["exp_avg"].view(-1)[part], state["exp_avg_sq"].view(-1)[part], state["exponents"][blocks]
            for place, code in zip(places, encode_moments(m, v, self._group(parameter)["bound"], NEAREST)):
                place.copy_(code)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refused: PyTorch's would cast every state to its parameter's dtype. `import_state` takes states over."""
        raise NotImplementedError("states come from another optimizer by export_state and import_state")


class InBackwardAdamW(AdamW):
    """AdamW that updates each parameter inside the backward pass, as soon as its gradient is there, and frees that.

    No more than a layer's gradients exist at any time. So a step is one backward pass, the learning rate is set before
    it, and nothing can depend on all gradients together: no accumulation, no clipping by their norm.
    A parameter whose own gradient is not finite is not updated. `grad_scale`, fp32 scalar on the device or None,
    multiplies the gradients; set it before the backward pass.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.grad_scale: Tensor | None = None
        self._norms: dict[Tensor, Tensor] = {}
        for parameter in self._places:
            parameter.register_post_accumulate_grad_hook(self._on_gradient)

    @torch.no_grad()
    def _on_gradient(self, parameter: Tensor) -> None:
        if parameter in self._norms:
            raise RuntimeError("a second backward pass before step(): gradients used inside it cannot accumulate")
        norm = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)
        self._norms[parameter] = norm
        self._update(self._places[parameter][1], [parameter], self.grad_scale, (~norm.isfinite()).float())
        parameter.grad = None

    def step(self, closure: None = None, **scaling: Tensor | None) -> Tensor:
        """End the step, whose updates are made; return the norm of all gradients as they came, without grad_scale."""
        if closure is not None or scaling:
            raise ValueError("the updates were made inside the backward pass: nothing given to step() can change them")
        norm = torch.linalg.vector_norm(torch.stack(list(self._norms.values())))
        self._norms.clear()
        return norm


def _chunks(parameter: Tensor) -> Iterator[tuple[slice, slice]]:
    """Ranges of elements that cover a parameter, and of its blocks."""
    for start in range(0, parameter.numel(), _CHUNK):
        stop = min(start + _CHUNK, parameter.numel())
        yield slice(start, stop), slice(start // BLOCK, -(-stop // BLOCK))
