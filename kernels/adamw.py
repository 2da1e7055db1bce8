"""AdamW for a whole group of parameters at once."""

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def adamw(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Update weights and moments in place by one step of AdamW with decoupled weight decay.

    All lists run over the same parameters, each of any shape: weights, grads, first and second moments, fp32; steps,
    fp32 scalars that count the updates. grad_scale, fp32 scalar: multiplies the gradients (clipping and loss scale).
    found_inf, fp32 scalar: where it is not 0 nothing changes, steps included. Neither is read on the host. The
    gradients are consumed: afterwards they hold nothing of use. (Loshchilov and Hutter, 2019)
    """
    torch._foreach_add_(steps, 1)
    torch._fused_adamw_(
        weights,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        steps,
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
        grad_scale=None if grad_scale is None else grad_scale.reciprocal(),  # it divides
        found_inf=found_inf,
    )
    if found_inf is not None:
        torch._foreach_sub_(steps, found_inf)
