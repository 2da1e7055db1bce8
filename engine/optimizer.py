"""AdamW over parameter groups, and what belongs to it: which parameters decay, clipping by the global norm."""
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from kernels.adamw import adamw


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
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads, 2, dtype=torch.float32)))
    return norm, (max_norm / (norm + 1e-6)).clamp(max=1.0)


class AdamW(torch.optim.Optimizer):
    """AdamW with decoupled weight decay, one fused update for a group (Loshchilov and Hutter, 2019).

    The same numbers as torch.optim.AdamW, with the gradients' scale folded into the update.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Tensor] | None = None,
        *,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> Tensor | None:
        """Update every parameter that has a gradient.

        grad_scale, fp32 scalar on the device: multiplies the gradients. found_inf, fp32 scalar on the device: not 0
        where the gradients are not finite, and then nothing changes. The gradients hold nothing of use afterwards.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            states = [self._state(p) for p in parameters]
            if parameters:
                adamw(
                    parameters,
                    [p.grad for p in parameters],
                    [s["exp_avg"] for s in states],
                    [s["exp_avg_sq"] for s in states],
                    [s["step"] for s in states],
                    lr=group["lr"],
                    betas=group["betas"],
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                    grad_scale=grad_scale,
                    found_inf=found_inf,
                )
        return loss

    def _state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state
