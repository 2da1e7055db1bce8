"""Bias and GELU or ReLU in one pass, recomputed in the backward pass instead of stored."""

import torch
import torch.nn.functional as F
from torch import Tensor

KINDS = ("gelu", "gelu_tanh", "relu")


def bias_activation(x: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """Apply the MLP's activation to x + bias, keeping only x for the backward pass.

    x (..., C), bias (C,) or None; kind is "gelu" (exact, by erf), "gelu_tanh" (GPT-2's) or "relu".
    Returns (..., C) in x's dtype. (Hendrycks and Gimpel, Gaussian Error Linear Units, 2016)
    """
    if kind not in KINDS:
        raise ValueError(f"bias_activation: unknown kind {kind!r}, expected one of {', '.join(KINDS)}")
    return _BiasActivation.apply(x, bias, kind)


def _activate(x: Tensor, kind: str) -> Tensor:
    if kind == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


class _BiasActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, kind):
        ctx.save_for_backward(x, bias)
        ctx.kind = kind
        return _activate(x if bias is None else x + bias, kind)

    @staticmethod
    def backward(ctx, grad):
        x, bias = ctx.saved_tensors
        z = x if bias is None else x + bias
        if ctx.kind == "relu":
            grad_x = torch.ops.aten.threshold_backward(grad, z, 0)
        else:
            approximate = "tanh" if ctx.kind == "gelu_tanh" else "none"
            grad_x = torch.ops.aten.gelu_backward(grad, z, approximate=approximate)
        return grad_x, None if bias is None else grad_x.sum_to_size(bias.shape), None
