"""LayerNorm of rows that do not fit a tile: kernels that walk over a row a block of columns at a time.

Arguments, shapes and numbers as in kernels/layer_norm.py.
"""

import torch
from torch import Tensor

from kernels.custom_op import wrap_triton
from kernels.dispatch import tl, triton

WIDE_LAUNCH = {"BLOCK": 4096, "num_warps": 8}  # one program a row
WIDE_SUMS_TILE = {"ROWS": 8, "BLOCK": 512}


@triton.jit
def _load_sum(x_ptr, residual_ptr, sum_ptr, cols, n_cols):
    """fp32 values of a row, with the residual added and rounded as it is stored; 0 beyond the row."""
    x = tl.load(x_ptr + cols, mask=cols < n_cols, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + cols, mask=cols < n_cols, other=0.0).to(tl.float32)
        x = (x + residual).to(sum_ptr.dtype.element_ty).to(tl.float32)
    return x


@triton.jit
def forward_wide_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    sum_ptr,
    mean_ptr,
    rstd_ptr,
    x_stride,
    residual_stride,
    n_rows,
    n_cols,
    eps,
    BLOCK: tl.constexpr,
):
    """`layer_norm._forward_kernel` for rows that do not fit a tile: one program a row, three walks over it.

    Each walk adds the residual anew: a sum that other threads have stored is not sure to be there for a load (on AMD a
    barrier does not wait for stores to global memory).
    """
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    y_ptr += row * n_cols
    if residual_ptr is not None:
        residual_ptr += row * residual_stride
        sum_ptr += row * n_cols
    partial = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n_cols, BLOCK):
        partial += _load_sum(x_ptr, residual_ptr, sum_ptr, start + tl.arange(0, BLOCK), n_cols)
    mean = tl.sum(partial, axis=0) / n_cols
    partial = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n_cols, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = _load_sum(x_ptr, residual_ptr, sum_ptr, cols, n_cols)
        centred = tl.where(cols < n_cols, x - mean, 0.0)
        partial += centred * centred
    rstd = tl.rsqrt(tl.sum(partial, axis=0) / n_cols + eps)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)
    for start in range(0, n_cols, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        mask = cols < n_cols
        x = _load_sum(x_ptr, residual_ptr, sum_ptr, cols, n_cols)
        y = (x - mean) * rstd * tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + cols, y.to(y_ptr.dtype.element_ty), mask=mask)
        if residual_ptr is not None:
            tl.store(sum_ptr + cols, x.to(sum_ptr.dtype.element_ty), mask=mask)


@triton.jit
def backward_wide_kernel(
    grad_y_ptr,
    grad_sum_ptr,
    x_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    grad_x_ptr,
    grad_y_stride,
    grad_sum_stride,
    x_stride,
    n_cols,
    BLOCK: tl.constexpr,
):
    """The gradient of the input for rows that do not fit a tile: one program a row."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    grad_y_ptr += row * grad_y_stride
    mean, rstd = tl.load(mean_ptr + row), tl.load(rstd_ptr + row)
    along = tl.zeros((BLOCK,), tl.float32)
    average = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n_cols, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        mask = cols < n_cols
        normal = (tl.load(x_ptr + cols, mask=mask, other=0.0).to(tl.float32) - mean) * rstd
        grad_normal = tl.load(grad_y_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        grad_normal *= tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        along += grad_normal * normal
        average += grad_normal
    along_row = tl.sum(along, axis=0) / n_cols
    average_row = tl.sum(average, axis=0) / n_cols
    for start in range(0, n_cols, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        mask = cols < n_cols
        normal = (tl.load(x_ptr + cols, mask=mask, other=0.0).to(tl.float32) - mean) * rstd
        grad_normal = tl.load(grad_y_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        grad_normal *= tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        grad_x = (grad_normal - normal * along_row - average_row) * rstd
        if grad_sum_ptr is not None:
            grad_sum = tl.load(grad_sum_ptr + row * grad_sum_stride + cols, mask=mask, other=0.0)
            grad_x += grad_sum.to(tl.float32)
        tl.store(grad_x_ptr + row * n_cols + cols, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def backward_wide_sums_kernel(
    grad_y_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    partial_ptr,  # fp32 (programs of axis 1, SUMS, n_cols)
    grad_y_stride,
    x_stride,
    n_rows,
    n_cols,
    SUMS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sums over rows for weight and bias, a block of columns and every few rows a program."""
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    program = tl.program_id(1)
    # Added up over the rows of a tile only at the end: inside the loop each sum would wait for its loads.
    grad_weight = tl.zeros((ROWS, BLOCK), tl.float32)
    grad_bias = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in tl.range(program * ROWS, n_rows, tl.num_programs(1) * ROWS):
        rows = (start + tl.arange(0, ROWS)).to(tl.int64)
        mask = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
        x = tl.load(x_ptr + rows[:, None] * x_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        grad_y = tl.load(grad_y_ptr + rows[:, None] * grad_y_stride + cols[None, :], mask=mask, other=0.0)
        grad_y = grad_y.to(tl.float32)
        mean = tl.load(mean_ptr + rows, mask=rows < n_rows, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + rows, mask=rows < n_rows, other=0.0)[:, None]
        grad_weight += grad_y * (x - mean) * rstd
        if SUMS == 2:
            grad_bias += grad_y
    partial_ptr += program.to(tl.int64) * SUMS * n_cols
    tl.store(partial_ptr + cols, tl.sum(grad_weight, axis=0), mask=cols < n_cols)
    if SUMS == 2:
        tl.store(partial_ptr + n_cols + cols, tl.sum(grad_bias, axis=0), mask=cols < n_cols)


def backward_wide(
    grad_y: Tensor,
    grad_sum: Tensor | None,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    grad_x: Tensor,
    sums: int,
) -> Tensor:
    """Write the gradient of the input to grad_x; return sums of groups of rows, fp32 (programs, `sums`, C)."""
    n_rows, n_cols = x.shape
    wrap_triton(backward_wide_kernel)[(n_rows,)](
        grad_y,
        grad_sum,
        x,
        weight,
        mean,
        rstd,
        grad_x,
        grad_y.stride(0),
        grad_sum.stride(0) if grad_sum is not None else 0,
        x.stride(0),
        n_cols,
        **WIDE_LAUNCH,
    )
    programs = min(32, triton.cdiv(n_rows, WIDE_SUMS_TILE["ROWS"]))
    partial = x.new_empty((programs, sums, n_cols), dtype=torch.float32)
    wrap_triton(backward_wide_sums_kernel)[(triton.cdiv(n_cols, WIDE_SUMS_TILE["BLOCK"]), programs)](
        grad_y,
        x,
        mean,
        rstd,
        partial,
        grad_y.stride(0),
        x.stride(0),
        n_rows,
        n_cols,
        SUMS=sums,
        **WIDE_SUMS_TILE,
        num_warps=4,
    )
    return partial
