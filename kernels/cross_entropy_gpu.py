"""Losses and gradients of the language-model head on a GPU, in chunks of tokens and bounded memory.

The gradient of the weight adds up over chunks in fp32 while the weight is bf16 or fp16. In full the sum takes 4 V C
bytes: 515 MB at V=50304, C=2560, twice the gradient itself. Three places bound what it takes beyond the gradient: the
gradient's own storage holds the sums of the first V / 2 words until they are rounded, in place; WORKSPACE_BYTES hold
those of the next words; the words left, none of them up to C = 1280, are done last, a block of words at a time for all
tokens, from logits computed again (at C=2560 24% of the words, 8% more operations). Such a block needs no sums: one
matrix product makes its gradient. With 112 MiB of logits that is 0.25 GB beyond the gradients at any N and C.
"""

import torch
from torch import Tensor

from kernels.aot import Case, as_launched
from kernels.dispatch import backend, chip, tl, triton
from kernels.launch_configs import launch_config
from kernels.rows import shipped_dtypes, tile_case

LOGITS_BYTES = 112 << 20
WORKSPACE_BYTES = 128 << 20
SLAB_BYTES = 16 << 20


def losses_and_gradients(
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
    """Losses (N,) and the gradients of (row_scale * losses).sum() for x, weight and bias, those that `needs` names.

    row_scale: () or (N,); gains: what the gradient of x, and those of weight and bias, are to be larger by.
    Nothing here waits for the device.
    """
    n, vocab, need_x, need_weight, need_bias = len(x), len(weight), *needs
    gain, weight_gain = gains
    wide = torch.promote_types(x.dtype, torch.float32)
    losses, lse = x.new_empty(n, dtype=wide), x.new_empty(n, dtype=wide)
    targets = targets.contiguous()  # the kernel steps from one to the next
    grad_x = x.new_empty(x.shape if need_x else 0)
    sums = _WeightSums(weight, WORKSPACE_BYTES) if need_weight else None
    grad_bias = x.new_zeros(vocab if need_bias else 0, dtype=wide)
    in_triton = backend("cross_entropy", x.device) == "triton"
    turn = turn_in_triton if in_triton else _turn_in_torch
    bias = None if bias is None else bias.to(x.dtype)
    # PyTorch's own operations need a copy of the chunk in fp32.
    bytes_per_logit = x.element_size() + (0 if in_triton or x.dtype == wide else 4)
    rows = max(1, LOGITS_BYTES // (vocab * bytes_per_logit))
    rows = min(n, rows // 128 * 128 or rows)
    buffer = _aligned_rows(x, rows, vocab)
    for start in range(0, n, rows):
        here = slice(start, start + rows)
        logits = buffer[: len(x[here])]
        _logits(x[here], weight, bias, logits)
        scale = row_scale if row_scale.ndim == 0 else row_scale[here]
        turn(logits, targets[here], losses[here], lse[here], scale, ignore_index, z_loss, gain, gradient=any(needs))
        if need_x:
            torch.mm(logits, weight, out=grad_x[here])
        if sums is not None:
            sums.add(logits, x[here])
        if need_bias:
            grad_bias += logits.sum(0, dtype=wide)
    grad_bias *= weight_gain / gain
    if sums is None:
        return losses, grad_x, weight.new_empty(0), grad_bias
    buffer = logits = None  # its memory serves the words that are left
    grad_weight = sums.rounded(weight_gain / gain)
    if sums.summed == vocab:
        return losses, grad_x, grad_weight, grad_bias
    words = min(vocab - sums.summed, max(128, LOGITS_BYTES // (n * bytes_per_logit) // 128 * 128))
    buffer = _aligned_rows(x, n, words)
    for first in range(sums.summed, vocab, words):
        some = slice(first, min(first + words, vocab))
        logits = buffer[:, : some.stop - first]
        _logits(x, weight[some], None if bias is None else bias[some], logits)
        turn(logits, targets, losses, lse, row_scale, ignore_index, z_loss, gain, gradient=True, first_word=first)
        out = grad_weight[some]
        torch.addmm(out, logits.t(), x, beta=0, alpha=weight_gain / gain, out=out)
    return losses, grad_x, grad_weight, grad_bias


def _aligned_rows(like: Tensor, rows: int, columns: int) -> Tensor:
    """An uninitialised (rows, columns) whose rows start at multiples of 16 elements, whatever the vocabulary."""
    return like.new_empty(rows, -(-columns // 16) * 16)[:, :columns]


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


class _WeightSums:
    """The gradient of the weight (V, C) summed over chunks in fp32, as far as the memory goes: `summed` words."""

    def __init__(self, weight: Tensor, workspace_bytes: int) -> None:
        self.grad = torch.empty_like(weight, memory_format=torch.contiguous_format)
        vocab, width = weight.shape
        if weight.dtype.itemsize >= 4:
            self.parts = [(0, self.grad)]
            self.summed = vocab
        else:
            half = vocab // 2 // 16 * 16  # a multiple of 16, for the matrix products' sake
            inside = self.grad.view(-1)[: 2 * half * width].view(torch.float32).view(half, width)
            more = min(vocab - half, workspace_bytes // (4 * width))
            outside = inside.new_empty(more, width)
            self.parts = [(first, part) for first, part in ((0, inside), (half, outside)) if len(part)]
            self.summed = half + more
        self.started = False

    def add(self, grad_logits: Tensor, x: Tensor) -> None:
        for first, total in self.parts:
            _add_product(total, grad_logits[:, first : first + len(total)].t(), x, keep=self.started)
        self.started = True

    def rounded(self, factor: float) -> Tensor:
        """The gradient in its own dtype, its first `summed` words times factor; the sums' memory is free."""
        for first, total in self.parts:
            if factor != 1:
                total *= factor
            if total.dtype == self.grad.dtype:
                continue
            # Front to back: a rounded block lies where sums lay that have been rounded before.
            at = first
            for block in total.split(slab_rows(total)):
                self.grad[at : at + len(block)] = block.to(self.grad.dtype)
                at += len(block)
        self.parts = []
        return self.grad


def slab_rows(t: Tensor) -> int:
    """How many rows of t, or of its numbers if it has one dimension, to convert at once."""
    return max(1, SLAB_BYTES // (t[0].numel() * t.element_size()))


def _add_product(total: Tensor, a: Tensor, b: Tensor, keep: bool) -> None:
    """total = a @ b, added to what is there if `keep`; total is fp32 where a and b may be bf16 or fp16."""
    beta = 1 if keep else 0
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, beta=beta, out=total)
    elif a.is_cuda and not torch.version.hip:
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)
    else:
        rows = slab_rows(total)
        for some, block in zip(a.split(rows), total.split(rows), strict=True):
            block.copy_(block + some @ b) if keep else block.copy_(some @ b)


def _turn_in_torch(
    logits: Tensor,
    targets: Tensor,
    losses: Tensor,
    lse: Tensor,
    row_scale: Tensor,
    ignore_index: int,
    z_loss: float,
    gain: float,
    *,
    gradient: bool,
    first_word: int | None = None,
) -> None:
    """Fill losses and lse (rows,) from logits (rows, words) and, for a gradient, turn these into theirs in place.

    first_word: the logits are those of the words from here on, and lse is known from all of them.
    """
    p = logits.to(losses.dtype)
    counts = targets != ignore_index
    target = (targets - (first_word or 0)).unsqueeze(1)
    inside = (target >= 0) & (target < logits.shape[1])
    target = target.clamp(0, logits.shape[1] - 1)
    if first_word is None:
        picked = p.gather(1, target).masked_fill(~inside, float("nan")).squeeze(1)
        base = p.amax(1)
        total = p.sub_(base.unsqueeze(1)).exp_().sum(1)
        lse.copy_(base + total.log())
        losses.copy_((lse - picked + z_loss * lse.square()).masked_fill(~counts, 0))
    else:
        total = torch.ones_like(lse)
        p.sub_(lse.unsqueeze(1)).exp_()
    if gradient:
        scale = torch.where(counts, row_scale * gain, 0).to(p.dtype)
        p.mul_(((1 + 2 * z_loss * lse) * scale / total).unsqueeze(1))
        p.scatter_add_(1, target, torch.where(inside, -scale.unsqueeze(1), 0))
        if p is not logits:
            logits.copy_(p)


@triton.jit
def _turn_kernel(
    logits_ptr,  # (n_rows, n_words), rows row_stride apart; becomes the gradient
    targets_ptr,  # int64 (n_rows,)
    losses_ptr,  # fp32 (n_rows,)
    lse_ptr,  # fp32 (n_rows,)
    row_scale_ptr,  # fp32 (1,) or, with SCALED_ROWS, (n_rows,)
    row_stride,
    n_words,
    first_word,
    ignore_index,
    z_loss,
    gain,
    SCALED_ROWS: tl.constexpr,
    LSE_KNOWN: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program a row: one walk for log-sum-exp, online, and one that turns logits into their gradient in place."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    target = tl.load(targets_ptr + row)
    counts = target != ignore_index
    full = n_words // BLOCK * BLOCK  # blocks that need no mask, so that their loads are wide at any vocabulary
    offsets = tl.arange(0, BLOCK)
    tail = full + offsets < n_words
    log2_e = 1.4426950408889634
    if LSE_KNOWN:
        lse = tl.load(lse_ptr + row)
        base, inverse = lse, 1.0
    else:
        # A target outside the vocabulary makes the loss NaN rather than read what is not there.
        inside = (target >= 0) & (target < n_words)
        picked = tl.load(logits_ptr + target, mask=inside, other=float("nan")).to(tl.float32)
        x = tl.load(logits_ptr + full + offsets, mask=tail, other=float("-inf")).to(tl.float32)
        largest = tl.max(x, axis=0)
        base = tl.where(largest == float("-inf"), 0.0, largest)
        total = tl.exp2((x - base) * log2_e)
        for start in tl.range(0, full, BLOCK, num_stages=STAGES):
            x = tl.load(logits_ptr + start + offsets).to(tl.float32)
            larger = tl.maximum(largest, tl.max(x, axis=0))
            base = tl.where(larger == float("-inf"), 0.0, larger)
            total = total * tl.exp2((largest - base) * log2_e) + tl.exp2((x - base) * log2_e)
            largest = larger
        whole = tl.sum(total, axis=0)
        inverse = 1.0 / whole
        lse = base + tl.log(whole)
        loss = lse - picked + z_loss * lse * lse
        tl.store(lse_ptr + row, lse)
        tl.store(losses_ptr + row, tl.where(counts, loss, 0.0))
    if GRADIENT:
        scale = tl.load(row_scale_ptr + (row if SCALED_ROWS else 0)) * gain
        scale = tl.where(counts, scale, 0.0)
        # From the maximum, whose difference is exact; with large logits the rounding of log-sum-exp would show.
        stretched = (1.0 + 2.0 * z_loss * lse) * scale * inverse
        target -= first_word
        for start in tl.range(0, full, BLOCK, num_stages=STAGES):
            words = start + offsets
            x = tl.load(logits_ptr + words).to(tl.float32)
            grad = tl.exp2((x - base) * log2_e) * stretched - tl.where(words == target, scale, 0.0)
            tl.store(logits_ptr + words, grad.to(logits_ptr.dtype.element_ty))
        words = full + offsets
        x = tl.load(logits_ptr + words, mask=tail, other=0.0).to(tl.float32)
        grad = tl.exp2((x - base) * log2_e) * stretched - tl.where(words == target, scale, 0.0)
        tl.store(logits_ptr + words, grad.to(logits_ptr.dtype.element_ty), mask=tail)


GPT2_WORDS = 50257
TURN_LAUNCH = {"BLOCK": 4096, "STAGES": 3, "num_warps": 8}


def turn_in_triton(
    logits: Tensor,
    targets: Tensor,
    losses: Tensor,
    lse: Tensor,
    row_scale: Tensor,
    ignore_index: int,
    z_loss: float,
    gain: float,
    *,
    gradient: bool,
    first_word: int | None = None,
) -> None:
    """`_turn_in_torch` in one launch."""
    case = tile_case(logits.shape[1], logits.element_size())
    launch = launch_config(chip(logits.device), "cross_entropy", case, TURN_LAUNCH)
    _turn_kernel[(len(logits),)](
        logits,
        targets,
        losses,
        lse,
        row_scale,
        logits.stride(0),
        logits.shape[1],
        first_word or 0,
        ignore_index,
        z_loss,
        gain,
        SCALED_ROWS=row_scale.ndim == 1,
        LSE_KNOWN=first_word is not None,
        GRADIENT=gradient,
        **launch,
    )


def compile_cases() -> list[Case]:
    """Losses and gradients in one go, losses alone, and gradients of some words; any vocabulary."""
    cases = []
    for dtype, targets in shipped_dtypes("cross_entropy"):
        signature = {"logits_ptr": f"*{dtype}", "targets_ptr": "*i64", "row_stride": "i32", "n_words": "i32"}
        signature |= dict.fromkeys(("losses_ptr", "lse_ptr", "row_scale_ptr"), "*fp32")
        signature |= {"first_word": "i32", "ignore_index": "i32", "z_loss": "fp32", "gain": "fp32"}
        for label, lse_known, gradient, divisible in (
            ("both", False, True, ("row_stride", "n_words")),
            ("losses", False, False, ("row_stride", "n_words")),
            ("words", True, True, ("row_stride", "n_words")),
            ("both_50257", False, True, ("row_stride",)),
        ):
            flags = {"SCALED_ROWS": False, "LSE_KNOWN": lse_known, "GRADIENT": gradient}
            case = Case(
                op="cross_entropy", label=f"{label}_{dtype}", kernel=_turn_kernel, signature=signature,
                constants=flags, divisible_by_16=divisible, targets=targets,
            )  # fmt: skip
            keys = [tile_case(GPT2_WORDS, 4 if dtype == "fp32" else 2)]
            cases += as_launched(case, "cross_entropy", keys, TURN_LAUNCH)
    return cases
