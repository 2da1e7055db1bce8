"""Row softmax with a temperature and an optional causal mask."""

import torch
from torch import Tensor

from kernels.aot import Case, as_launched
from kernels.custom_op import custom_op, wrap_triton
from kernels.dispatch import LOG2_E, backend, chip, tl, triton
from kernels.launch_configs import launch_config
from kernels.rows import (
    WIDEST_TILE,
    contiguous_rows,
    row_tile,
    shipped_dtypes,
    tile_case,
    tiles_of_gpt_widths,
)


def softmax(x: Tensor, *, causal: bool = False, temperature: float = 1.0) -> Tensor:
    """Softmax of x / temperature over the last dimension.

    x (..., C); with `causal` x is (..., Tq, Tk) and row i keeps the columns up to i + Tk - Tq, the others become 0.
    Computed in fp32 at least, returned in x's dtype. A row without any column above -inf becomes 0, and so does its
    gradient. Raises ValueError unless temperature > 0.
    """
    if not temperature > 0:
        raise ValueError(f"softmax: temperature must be above 0, got {temperature}")
    if backend("softmax", x.device) == "torch":
        return _softmax_torch(x, causal, temperature)
    queries = x.shape[-2] if causal else 0  # 0: no mask
    return _softmax_op(contiguous_rows(x), queries, 1 / temperature).view(x.shape)


def _softmax_torch(x: Tensor, causal: bool, temperature: float) -> Tensor:
    scores = x
    if temperature != 1.0:
        scores = x.to(torch.promote_types(x.dtype, torch.float32)) / temperature
    if causal:
        queries, keys = x.shape[-2:]
        hidden = torch.ones(queries, keys, dtype=torch.bool, device=x.device).triu(keys - queries + 1)
        scores = scores.masked_fill(hidden, float("-inf"))
    if x.is_cpu and not torch.compiler.is_compiling():
        p = torch.softmax(scores, -1)
        # One look at a column instead of three more passes, which take four times as long as the softmax.
        if not p[..., :1].isnan().any():
            return p.to(x.dtype)
    empty = scores.amax(-1, keepdim=True) == float("-inf")
    # A finite stand-in keeps NaN out of the backward pass as well as out of the forward.
    return torch.softmax(scores.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0).to(x.dtype)


@triton.jit
def _visible(rows, n_cols, n_queries):
    """How many columns each row keeps behind the causal mask."""
    return tl.maximum(tl.minimum(rows % n_queries + 1 + n_cols - n_queries, n_cols), 0).to(tl.int32)


@triton.jit
def _read(cols, n_cols, visible):
    """The mask of loads: columns that no row sees are not read, but for the rest of 16, which loads take at once."""
    return (cols < n_cols) & (cols < tl.cdiv(visible, 16) * 16)


@triton.jit
def _forward_kernel(
    x_ptr,  # (n_rows, n_cols), rows x_stride apart
    p_ptr,  # (n_rows, n_cols)
    x_stride,
    n_rows,
    n_cols,
    n_queries,
    scale,  # log2(e) / temperature
    CAUSAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    mask = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
    read = mask
    if CAUSAL:
        visible = _visible(rows, n_cols, n_queries)
        read = mask & _read(cols, n_cols, tl.max(visible, axis=0))[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_stride + cols[None, :], mask=read, other=float("-inf")).to(tl.float32)
    if CAUSAL:
        x = tl.where(cols[None, :] < visible[:, None], x, float("-inf"))
    x *= scale
    largest = tl.max(x, axis=1)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    p = tl.exp2(x - largest[:, None])
    total = tl.sum(p, axis=1)
    p = p * (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
    tl.store(p_ptr + rows[:, None] * n_cols + cols[None, :], p.to(p_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _scores(x_ptr, cols, n_cols, visible, CAUSAL: tl.constexpr):
    """fp32 values of a row, -inf from `visible` on."""
    read = cols < n_cols
    if CAUSAL:
        read = _read(cols, n_cols, visible)
    x = tl.load(x_ptr + cols, mask=read, other=float("-inf")).to(tl.float32)
    if CAUSAL:
        x = tl.where(cols < visible, x, float("-inf"))
    return x


@triton.jit
def _forward_wide_kernel(
    x_ptr,
    p_ptr,
    x_stride,
    n_rows,
    n_cols,
    n_queries,
    scale,
    CAUSAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`_forward_kernel` for rows that do not fit a tile: one program a row, two walks over it."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    p_ptr += row * n_cols
    visible = n_cols
    if CAUSAL:
        visible = _visible(row, n_cols, n_queries)
    largest = -float("inf")
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n_cols, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = _scores(x_ptr, cols, n_cols, visible, CAUSAL) * scale
        larger = tl.maximum(largest, tl.max(x, axis=0))
        base = tl.where(larger == float("-inf"), 0.0, larger)
        total = total * tl.exp2(largest - base) + tl.exp2(x - base)
        largest = larger
    base = tl.where(largest == float("-inf"), 0.0, largest)
    whole = tl.sum(total, axis=0)
    inverse = 1.0 / tl.where(whole == 0.0, 1.0, whole)
    for start in range(0, n_cols, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = _scores(x_ptr, cols, n_cols, visible, CAUSAL) * scale
        tl.store(p_ptr + cols, (tl.exp2(x - base) * inverse).to(p_ptr.dtype.element_ty), mask=cols < n_cols)


@triton.jit
def _backward_kernel(
    grad_p_ptr,  # (n_rows, n_cols), rows grad_p_stride apart
    p_ptr,  # (n_rows, n_cols)
    grad_x_ptr,  # (n_rows, n_cols)
    grad_p_stride,
    n_rows,
    n_cols,
    n_queries,
    scale,  # 1 / temperature
    CAUSAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    mask = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
    read = mask
    if CAUSAL:
        visible = _visible(rows, n_cols, n_queries)
        read = mask & _read(cols, n_cols, tl.max(visible, axis=0))[None, :]
    p = tl.load(p_ptr + rows[:, None] * n_cols + cols[None, :], mask=read, other=0.0).to(tl.float32)
    grad_p = tl.load(grad_p_ptr + rows[:, None] * grad_p_stride + cols[None, :], mask=read, other=0.0).to(tl.float32)
    if CAUSAL:  # where p is 0, which does not silence a NaN
        grad_p = tl.where(cols[None, :] < visible[:, None], grad_p, 0.0)
    grad_x = p * (grad_p - tl.sum(p * grad_p, axis=1)[:, None]) * scale
    tl.store(grad_x_ptr + rows[:, None] * n_cols + cols[None, :], grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _pair(p_ptr, grad_p_ptr, cols, n_cols, visible, CAUSAL: tl.constexpr):
    """fp32 probabilities of a row and their gradients, 0 from `visible` on."""
    read = cols < n_cols
    if CAUSAL:
        read = _read(cols, n_cols, visible)
    p = tl.load(p_ptr + cols, mask=read, other=0.0).to(tl.float32)
    grad_p = tl.load(grad_p_ptr + cols, mask=read, other=0.0).to(tl.float32)
    if CAUSAL:
        grad_p = tl.where(cols < visible, grad_p, 0.0)
    return p, grad_p


@triton.jit
def _backward_wide_kernel(
    grad_p_ptr,
    p_ptr,
    grad_x_ptr,
    grad_p_stride,
    n_rows,
    n_cols,
    n_queries,
    scale,
    CAUSAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`_backward_kernel` for rows that do not fit a tile: one program a row, two walks over it."""
    row = tl.program_id(0).to(tl.int64)
    grad_p_ptr += row * grad_p_stride
    p_ptr += row * n_cols
    grad_x_ptr += row * n_cols
    visible = n_cols
    if CAUSAL:
        visible = _visible(row, n_cols, n_queries)
    along = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n_cols, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        p, grad_p = _pair(p_ptr, grad_p_ptr, cols, n_cols, visible, CAUSAL)
        along += p * grad_p
    average = tl.sum(along, axis=0)
    for start in range(0, n_cols, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        p, grad_p = _pair(p_ptr, grad_p_ptr, cols, n_cols, visible, CAUSAL)
        grad_x = p * (grad_p - average) * scale
        tl.store(grad_x_ptr + cols, grad_x.to(grad_x_ptr.dtype.element_ty), mask=cols < n_cols)


WIDE_LAUNCH = {"BLOCK": 2048, "num_warps": 8}  # of rows that do not fit a tile: one program a row


def _launch(kernel: str, p: Tensor) -> tuple[bool, dict[str, int]]:
    """Whether a row of p is too wide for one tile, and the launch's constants; one row a program without ROWS."""
    if p.shape[1] > WIDEST_TILE:
        return True, WIDE_LAUNCH
    rows, block, num_warps = row_tile(p.shape[1])
    default = {"ROWS": rows, "num_warps": num_warps}
    tuned = launch_config(chip(p.device), kernel, tile_case(block, p.element_size()), default)
    return False, {"BLOCK": block} | tuned


@custom_op("softmax")
def _softmax_op(x: Tensor, n_queries: int, scale: float) -> Tensor:
    n_rows, n_cols = x.shape
    p = x.new_empty(x.shape)
    wide, launch = _launch("softmax_forward", p)
    kernel = _forward_wide_kernel if wide else _forward_kernel
    grid = (triton.cdiv(n_rows, launch.get("ROWS", 1)),)
    numbers = n_rows, n_cols, n_queries, scale * LOG2_E
    wrap_triton(kernel)[grid](x, p, x.stride(0), *numbers, CAUSAL=n_queries > 0, **launch)
    return p


@_softmax_op.register_fake
def _(x, n_queries, scale):
    return x.new_empty(x.shape)


@custom_op("softmax_backward")
def _softmax_backward_op(grad_p: Tensor, p: Tensor, n_queries: int, scale: float) -> Tensor:
    n_rows, n_cols = p.shape
    grad_x = p.new_empty(p.shape)
    wide, launch = _launch("softmax_backward", p)
    kernel = _backward_wide_kernel if wide else _backward_kernel
    grid = (triton.cdiv(n_rows, launch.get("ROWS", 1)),)
    numbers = n_rows, n_cols, n_queries, scale
    wrap_triton(kernel)[grid](grad_p, p, grad_x, grad_p.stride(0), *numbers, CAUSAL=n_queries > 0, **launch)
    return grad_x


@_softmax_backward_op.register_fake
def _(grad_p, p, n_queries, scale):
    return p.new_empty(p.shape)


def _setup_context(ctx, inputs, output) -> None:
    _, ctx.n_queries, ctx.scale = inputs
    ctx.save_for_backward(output)


def _backward(ctx, grad_p):
    (p,) = ctx.saved_tensors
    return _softmax_backward_op(contiguous_rows(grad_p), p, ctx.n_queries, ctx.scale), None, None


_softmax_op.register_autograd(_backward, setup_context=_setup_context)


def compile_cases() -> list[Case]:
    """Both passes at the tiles of GPT's widths, as attention scores have them, and beyond the widest tile."""
    cases = []
    for dtype, targets in shipped_dtypes("softmax"):
        signature = dict.fromkeys(("x_ptr", "p_ptr", "grad_p_ptr", "grad_x_ptr"), f"*{dtype}")
        signature |= dict.fromkeys(("x_stride", "grad_p_stride", "n_rows", "n_cols", "n_queries"), "i32")
        common = {
            "op": "softmax",
            "signature": signature | {"scale": "fp32"},
            "divisible_by_16": ("n_cols", "x_stride", "grad_p_stride"),
            "targets": targets,
        }
        for mask, causal in (("", False), ("_causal", True)):
            for (rows, block, num_warps), widths in tiles_of_gpt_widths().items():
                name = "_".join(map(str, widths))
                keys, launch = [tile_case(block, 4 if dtype == "fp32" else 2)], {"ROWS": rows, "num_warps": num_warps}
                constants = {"BLOCK": block, "CAUSAL": causal}
                for step, kernel in (("forward", _forward_kernel), ("backward", _backward_kernel)):
                    case = Case(label=f"{step}{mask}_{name}_{dtype}", kernel=kernel, constants=constants, **common)
                    cases += as_launched(case, f"softmax_{step}", keys, launch)
            for step, kernel in (("forward", _forward_wide_kernel), ("backward", _backward_wide_kernel)):
                label, launch = f"{step}{mask}_wide_{dtype}", dict(WIDE_LAUNCH)
                constants = {"BLOCK": launch.pop("BLOCK"), "CAUSAL": causal}
                cases.append(Case(label=label, kernel=kernel, constants=constants, **launch, **common))
    return cases
