"""The language-model head and its loss in one operation that never holds the logits of all tokens.

Gradients are made in the forward pass, where the logits are, and scaled in the backward pass; so each chunk of logits
is made once, turned into its own gradient in place and multiplied away. N tokens, C wide, V words: 6 N V C operations,
as without chunks.

What differs by device: kernels/cross_entropy_gpu.py bounds the memory of the weight's gradient in low precision; on a
CPU, here, everything is fp32.
"""

import math

import torch
from torch import Tensor

from kernels.cross_entropy_gpu import compile_cases, losses_and_gradients, slab_rows
from kernels.dispatch import backend

__all__ = ["compile_cases", "linear_cross_entropy"]

CPU_LOGITS_BYTES = 64 << 20


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
    """Cross-entropy of x @ weight.T + bias against the targets, in chunks.

    x (N, C) and weight (V, C) of one dtype, targets int64 (N,), bias (V,) or None. `z_loss` adds
    z_loss * logsumexp(logits)^2 to every token's loss (PaLM, 2022). Targets equal to `ignore_index` have loss 0 and no
    gradient. reduction: "mean" over the targets that count (0 if none does), "sum", or "none" for the loss of every
    token, whose backward pass computes the logits again. Returns fp32 (fp64 for fp64), () or (N,).
    Raises ValueError for another reduction, IndexError or a NaN loss (on a GPU) for a target outside the vocabulary.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"linear_cross_entropy: unknown reduction {reduction!r}, expected mean, sum or none")
    grad = torch.is_grad_enabled() and reduction != "none"
    needs = [grad and x.requires_grad, grad and weight.requires_grad, grad and bias is not None and bias.requires_grad]
    return _op(x, weight, targets, bias, None, ignore_index, z_loss, reduction, needs)[0]


def _on_cpu(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    row_scale: Tensor,
    ignore_index: int,
    z_loss: float,
    needs: list[bool],
    gains: tuple[float, float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`losses_and_gradients` in fp32 at least.

    Scales are applied to the narrow side of each product, never to the logits: these are passed over by three matrix
    products, softmax in place, and two maxima.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    need_x, need_weight, need_bias = needs
    gain, weight_gain = gains
    vocab, width = weight.shape
    kept = (targets != ignore_index).nonzero().squeeze(1)
    hidden, targets = x.index_select(0, kept).to(wide), targets.index_select(0, kept).unsqueeze(1)
    row_scale = row_scale.expand(len(x)).index_select(0, kept).to(wide).unsqueeze(1) * weight_gain
    wide_weight = weight.to(wide)
    losses = hidden.new_empty(len(kept))
    grad_hidden = hidden.new_empty(hidden.shape if need_x else 0)
    grad_weight = wide_weight.new_zeros((vocab, width) if need_weight else 0)
    grad_bias = wide_weight.new_zeros(vocab if need_bias else 0)
    rows = _even_chunk(len(kept), CPU_LOGITS_BYTES // (vocab * wide_weight.element_size()))
    buffer = hidden.new_empty(rows, vocab)
    for start in range(0, len(kept), rows):
        here = slice(start, start + rows)
        target, some = targets[here], hidden[here]
        p = buffer[: len(some)]
        if bias is None:
            torch.mm(some, wide_weight.t(), out=p)
        else:
            torch.addmm(bias.to(wide), some, wide_weight.t(), out=p)
        picked, largest = p.gather(1, target), p.amax(1, keepdim=True)
        torch.softmax(p, 1, out=p)
        # The largest probability is at least 1 / V, so its logarithm is exact where the target's might have underflown.
        lse = largest - p.amax(1, keepdim=True).log()
        losses[here] = (lse - picked + z_loss * lse.square()).squeeze(1)
        if not any(needs):
            continue
        # The gradient of a loss is stretch * p - onehot = stretch * (p - onehot / stretch).
        stretch = 1 + 2 * z_loss * lse
        p.scatter_add_(1, target, -1 / stretch)
        scale = stretch * row_scale[here]
        if need_x:
            torch.mm(p, wide_weight, out=grad_hidden[here]).mul_(scale * (gain / weight_gain))
        if need_weight:
            grad_weight.addmm_(p.t(), some * scale)
        if need_bias:
            grad_bias.addmv_(p.t(), scale.squeeze(1))
    all_losses = losses.new_zeros(len(x)).index_copy_(0, kept, losses)
    grad_x = x.new_zeros(x.shape if need_x else 0)
    if need_x:
        grad_x.index_copy_(0, kept, grad_hidden.to(x.dtype))
    return all_losses, grad_x, grad_weight.to(weight.dtype), grad_bias


def _even_chunk(total: int, most: int) -> int:
    """The size of the fewest chunks of at most `most` that make `total`, all of about one size."""
    most = max(1, most)
    return max(1, -(-total // max(1, -(-total // most))))


# Opaque to the compiler on every device: there is nothing to fuse with, and a loop over chunks would only be unrolled.
@torch.library.custom_op("pilesmith::linear_cross_entropy", mutates_args=())
def _op(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    row_scale: Tensor | None,
    ignore_index: int,
    z_loss: float,
    reduction: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss and, where `needs` says so for x, weight, bias, gradients that carry `_gains` (else empty tensors).

    row_scale (N,): what the loss of each token is multiplied by before the gradients, for reduction "none".
    """
    if x.shape[0] == 0:
        return tuple(t.zero_() for t in _outputs(x, weight, bias, reduction, needs))
    if row_scale is None:
        row_scale = x.new_ones((), dtype=torch.promote_types(x.dtype, torch.float32))
        if reduction == "mean":
            row_scale = row_scale / (targets != ignore_index).sum().clamp(min=1)
    on_cpu = x.device.type == "cpu" and backend("cross_entropy", x.device) == "torch"
    losses, grad_x, grad_weight, grad_bias = (_on_cpu if on_cpu else losses_and_gradients)(
        x, weight, targets, bias, row_scale, ignore_index, z_loss, needs, _gains(x, reduction)
    )
    loss = losses if reduction == "none" else losses.sum() * row_scale
    return loss, grad_x, grad_weight, grad_bias.to(weight.dtype if bias is None else bias.dtype)


@_op.register_fake
def _(x, weight, targets, bias, row_scale, ignore_index, z_loss, reduction, needs):
    return _outputs(x, weight, bias, reduction, needs)


def _outputs(
    x: Tensor, weight: Tensor, bias: Tensor | None, reduction: str, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    need_x, need_weight, need_bias = needs
    return (
        x.new_empty(x.shape[0] if reduction == "none" else (), dtype=torch.promote_types(x.dtype, torch.float32)),
        x.new_empty(x.shape if need_x else 0),
        weight.new_empty(weight.shape if need_weight else 0),
        (weight if bias is None else bias).new_empty(weight.shape[0] if need_bias else 0),
    )


def _gains(x: Tensor, reduction: str) -> tuple[float, float]:
    """Factors by which the op scales up gradients of x, and of weight and bias, that it keeps for the backward pass.

    In fp16 the gradient of a mean over thousands of tokens would underflow before the loss scale, which comes with the
    backward pass, could lift it: so it is made about as large as that of one token, and the weight's, a sum over
    tokens, 1024 times the mean's.
    """
    if x.dtype != torch.float16 or reduction != "mean":
        return 1.0, 1.0
    gain = 2.0 ** int(math.log2(max(1, x.shape[0])))
    return gain, min(gain, 1024.0)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, targets, bias, _, ctx.ignore_index, ctx.z_loss, ctx.reduction, _ = inputs
    _, *grads = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*grads)
    if ctx.reduction == "none":
        ctx.save_for_backward(x, weight, targets, bias)
    else:
        ctx.gains = _gains(x, ctx.reduction)
        ctx.save_for_backward(*grads)


def _backward(ctx, grad, *_):
    if torch.is_grad_enabled():
        raise RuntimeError("linear_cross_entropy has no second derivative: call backward without create_graph")
    need_x, need_weight, _, need_bias, *_ = ctx.needs_input_grad
    needs = [need_x, need_weight, need_bias]
    grads = [None, None, None]
    if grad is not None and ctx.reduction == "none":
        x, weight, targets, bias = ctx.saved_tensors
        _, *grads = _op(x, weight, targets, bias, grad.contiguous(), ctx.ignore_index, ctx.z_loss, "none", needs)
    elif grad is not None:
        gain, weight_gain = ctx.gains
        factors = grad / gain, grad / weight_gain, grad / weight_gain
        grads = [_scaled(g, factor) for g, factor in zip(ctx.saved_tensors, factors, strict=True)]
    grad_x, grad_weight, grad_bias = (g if need else None for g, need in zip(grads, needs, strict=True))
    return grad_x, grad_weight, None, grad_bias, None, None, None, None, None


def _scaled(t: Tensor, factor: Tensor) -> Tensor:
    """t times a scalar tensor of fp32 or more, rounded once; in t's own memory unless it will be asked for again.

    A product with the scalar itself would be taken in t's dtype, where the factor may not fit.
    """
    if type(factor) is not Tensor:  # a compiler traces this, and plans the memory itself
        return (t.to(factor.dtype) * factor).to(t.dtype)
    if torch._C._autograd._get_current_graph_task_keep_graph():
        t = t.clone()
    if t.dtype == factor.dtype:
        t *= factor
    elif t.numel():
        for block in t.split(slab_rows(t)):
            block.copy_(block.to(factor.dtype) * factor)
    return t


_op.register_autograd(_backward, setup_context=_setup_context)
