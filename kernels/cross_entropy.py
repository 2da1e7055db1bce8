"""The language-model head and its loss in one operation that never holds the logits of all tokens."""

import torch
from torch import Tensor


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of x @ weight.T + bias against the targets, in chunks of rows.

    x (N, C), weight (V, C), targets int64 (N,), bias (V,) or None. `z_loss` adds z_loss * logsumexp(logits)^2 to every
    token's loss. Targets equal to `ignore_index` have loss 0 and no gradient. reduction: "mean" over the targets that
    count (0 if none does), "sum", or "none" for the loss of every token. Returns fp32 (fp64 for fp64), () or (N,).
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"linear_cross_entropy: unknown reduction {reduction!r}, expected mean, sum or none")
    inputs = (x, weight) if bias is None else (x, weight, bias)
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    if reduction == "none":
        return _PerToken.apply(x, weight, targets, bias, ignore_index, z_loss)
    return _Reduced.apply(x, weight, targets, bias, ignore_index, z_loss, reduction, wanted)


def _chunk_rows(n: int, vocab: int, itemsize: int) -> int:
    """Rows of logits held at once: 64 MiB of them."""
    return max(1, min(n, (64 << 20) // (vocab * itemsize)))


def _losses_and_gradients(x, weight, targets, bias, ignore_index, z_loss, row_scale, wanted):
    """Losses (N,) and, if wanted, the gradients of (row_scale * losses).sum() for x, weight and bias.

    The scale, the same for all rows or one a row, is applied to x and to the gradient of x, which are narrow, never to
    the logits: the only passes over these are two by softmax, and one by each of the three matrix products.
    """
    n, vocab = x.shape[0], weight.shape[0]
    wide = torch.promote_types(x.dtype, torch.float32)
    losses = x.new_zeros(n, dtype=wide)
    if wanted:
        grad_x = torch.zeros_like(x, memory_format=torch.contiguous_format)
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=x.device)
        grad_bias = None if bias is None else torch.zeros(vocab, dtype=wide, device=x.device)
    wide_weight = weight.to(wide)
    kept = (targets != ignore_index).nonzero().squeeze(1)
    rows = _chunk_rows(n, vocab, wide_weight.element_size())
    buffer = torch.empty(min(rows, len(kept)), vocab, dtype=wide, device=x.device)
    for index in kept.split(rows):
        hidden, target = x[index].to(wide), targets[index].unsqueeze(1)
        p = buffer[: len(index)]
        torch.mm(hidden, wide_weight.t(), out=p)
        if bias is not None:
            p += bias
        picked = p.gather(1, target)
        if not wanted:
            lse = p.logsumexp(1, keepdim=True)
        else:
            largest = p.amax(1, keepdim=True)
            torch.softmax(p, 1, out=p)
            lse = largest - p.amax(1, keepdim=True).log()
        losses[index] = (lse - picked + z_loss * lse.square()).squeeze(1)
        if not wanted:
            continue
        # d loss / d logits = stretch * p - onehot, as stretch * (p - onehot / stretch).
        stretch = 1 + 2 * z_loss * lse
        p.scatter_add_(1, target, -1 / stretch)
        scale = stretch * (row_scale if row_scale.ndim == 0 else row_scale[index].unsqueeze(1))
        grad_x[index] = (torch.mm(p, wide_weight) * scale).to(x.dtype)
        grad_weight.addmm_(p.t(), hidden * scale)
        if bias is not None:
            grad_bias += (p * scale).sum(0)
    if not wanted:
        return losses, None, None, None
    return losses, grad_x, grad_weight.to(weight.dtype), None if bias is None else grad_bias.to(bias.dtype)


class _Reduced(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets, bias, ignore_index, z_loss, reduction, wanted):
        wide = torch.promote_types(x.dtype, torch.float32)
        scale = torch.ones((), dtype=wide, device=x.device)
        if reduction == "mean":
            scale = scale / (targets != ignore_index).sum().clamp(min=1)
        losses, *grads = _losses_and_gradients(x, weight, targets, bias, ignore_index, z_loss, scale, wanted)
        ctx.save_for_backward(*grads)
        return losses.sum() * scale

    @staticmethod
    def backward(ctx, grad):
        grad_x, grad_weight, grad_bias = (None if g is None else (g * grad).to(g.dtype) for g in ctx.saved_tensors)
        return grad_x, grad_weight, None, grad_bias, None, None, None, None


class _PerToken(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets, bias, ignore_index, z_loss):
        ctx.save_for_backward(x, weight, targets, bias)
        ctx.settings = ignore_index, z_loss
        return _losses_and_gradients(x, weight, targets, bias, *ctx.settings, None, False)[0]

    @staticmethod
    def backward(ctx, grad):
        x, weight, targets, bias = ctx.saved_tensors
        _, *grads = _losses_and_gradients(x, weight, targets, bias, *ctx.settings, grad, True)
        return grads[0], grads[1], None, grads[2], None, None
