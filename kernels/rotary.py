"""Rotary position embedding of a packed projection, in place where autograd lets it."""

import torch
from torch import Tensor


def rotary(qkv: Tensor, cos: Tensor, sin: Tensor, *, n_head: int, head_dim: int) -> Tensor:
    """Rotate the first `n_head` heads of each token by the angles of its position.

    qkv (B, T, heads * head_dim), heads packed [queries | keys | values], contiguous; n_head counts those to rotate
    (queries and keys); cos and sin fp32 (T, head_dim / 2). Halves convention: element i of a head turns with element
    i + head_dim / 2. Returns qkv's shape and dtype; overwrites qkv unless it is a leaf that wants a gradient.
    (Su et al., RoFormer, 2021; the halves of GPT-NeoX)
    """
    B, T, width = qkv.shape
    if head_dim % 2 or width % head_dim or n_head * head_dim > width:
        raise ValueError(f"rotary: {n_head} heads of {head_dim} (even) do not fit in a width of {width}")
    if cos.shape != (T, head_dim // 2) or sin.shape != cos.shape:
        raise ValueError(f"rotary: cos and sin are {tuple(cos.shape)}, expected {(T, head_dim // 2)}")
    if torch.compiler.is_compiling():
        return rotary_reference(qkv, cos, sin, n_head=n_head, head_dim=head_dim)
    return _Rotary.apply(qkv, cos, sin, n_head, head_dim)


def rotary_reference(qkv: Tensor, cos: Tensor, sin: Tensor, *, n_head: int, head_dim: int) -> Tensor:
    """`rotary` by its definition, out of place; the angles' precision decides, the result has qkv's dtype."""
    heads = qkv.unflatten(2, (-1, head_dim))
    x1, x2 = heads[:, :, :n_head].chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]  # (T, 1, D / 2)
    turned = torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1).to(qkv.dtype)
    return torch.cat((turned, heads[:, :, n_head:]), 2).flatten(2)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, cos, sin, n_head, head_dim):
        ctx.save_for_backward(cos, sin)
        ctx.heads = n_head, head_dim
        if qkv.is_leaf and qkv.requires_grad:
            out = qkv.clone()
        else:
            out = qkv
            ctx.mark_dirty(qkv)
        _rotate(out, cos, sin, n_head, head_dim)
        return out

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        grad = grad.clone(memory_format=torch.contiguous_format)  # others may hold the incoming one
        _rotate(grad, cos, -sin, *ctx.heads)
        return grad, None, None, None, None


def _rotate(qkv: Tensor, cos: Tensor, sin: Tensor, n_head: int, head_dim: int) -> None:
    """Turns the first heads where they lie."""
    x1, x2 = qkv.unflatten(2, (-1, head_dim))[:, :, :n_head].chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]  # (T, 1, D / 2)
    y1 = (x1 * cos).sub_(x2 * sin)  # fp32 where x is shorter
    y2 = (x2 * cos).add_(x1 * sin)
    x1.copy_(y1)
    x2.copy_(y2)
