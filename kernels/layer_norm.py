"""LayerNorm over the last dimension, alone or fused with the residual addition in front of it."""

import torch
import torch.nn.functional as F
from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    """Normalise the last dimension to mean 0 and variance 1, then scale and shift it.

    x (..., C), any strides; weight (C,), bias (C,) or None. Statistics in fp32. Returns (..., C) in x's dtype.
    (Ba, Kiros and Hinton, Layer Normalization, 2016)
    """
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Add a branch to the residual stream and normalise the sum: s = x + residual, y = layer_norm(s).

    x and residual (..., C); weight and bias as in `layer_norm`. Returns (y, s), both differentiable.
    """
    s = x + residual
    return F.layer_norm(s, weight.shape, weight, bias, eps), s
