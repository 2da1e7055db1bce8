"""LayerNorm over the last dimension, alone or fused with the residual addition in front of it.

Rows that do not fit a tile have kernels of their own, in kernels/layer_norm_wide.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.aot import Case, as_launched
from kernels.custom_op import custom_op, wrap_triton
from kernels.dispatch import CHIPS, backend, chip, tl, triton
from kernels.launch_configs import launch_config
from kernels.layer_norm_wide import (
    WIDE_LAUNCH,
    WIDE_SUMS_TILE,
    backward_wide,
    backward_wide_kernel,
    backward_wide_sums_kernel,
    forward_wide_kernel,
)
from kernels.rows import (
    COLUMN_SUMS_TILE,
    WIDEST_TILE,
    column_sums,
    column_sums_kernel,
    contiguous_rows,
    persistent_programs,
    pipeline_stages,
    row_tile,
    shipped_dtypes,
    tile_case,
    tiles_of_gpt_widths,
)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    """Normalise the last dimension to mean 0 and variance 1, then scale and shift it.

    x (..., C), any strides; weight (C,), bias (C,) or None. Statistics in fp32. Returns (..., C) in x's dtype.
    (Ba, Kiros and Hinton, Layer Normalization, 2016)
    """
    if backend("layer_norm", x.device) == "torch":
        return _layer_norm_torch(x, weight, bias, eps)
    return _layer_norm_op(contiguous_rows(x), None, weight, bias, eps)[0].view(x.shape)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Add a branch to the residual stream and normalise the sum: s = x + residual, y = layer_norm(s).

    x and residual (..., C); weight and bias as in `layer_norm`. Returns (y, s), both differentiable.
    """
    if backend("layer_norm", x.device) == "torch":
        s = x + residual
        return _layer_norm_torch(s, weight, bias, eps), s
    y, s, _, _ = _layer_norm_op(contiguous_rows(x), contiguous_rows(residual), weight, bias, eps)
    return y.view(x.shape), s.view(x.shape)


def _layer_norm_torch(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    bias = None if bias is None else bias.to(x.dtype)
    return F.layer_norm(x, weight.shape, weight.to(x.dtype), bias, eps)


@triton.jit
def _forward_kernel(
    x_ptr,  # (n_rows, n_cols), rows x_stride apart
    residual_ptr,  # the same, or None
    weight_ptr,  # (n_cols,)
    bias_ptr,  # (n_cols,) or None
    y_ptr,  # (n_rows, n_cols)
    sum_ptr,  # (n_rows, n_cols), x + residual; None without a residual
    mean_ptr,  # fp32 (n_rows,)
    rstd_ptr,  # fp32 (n_rows,)
    x_stride,
    residual_stride,
    n_rows,
    n_cols,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    row_mask, col_mask = rows < n_rows, cols < n_cols
    mask = row_mask[:, None] & col_mask[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + rows[:, None] * residual_stride + cols[None, :], mask=mask, other=0.0)
        total = (x + residual.to(tl.float32)).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + rows[:, None] * n_cols + cols[None, :], total, mask=mask)
        # What the backward pass will read, rounding included.
        x = total.to(tl.float32)
    mean = tl.sum(x, axis=1) / n_cols
    centred = tl.where(mask, x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / n_cols + eps)
    tl.store(mean_ptr + rows, mean, mask=row_mask)
    tl.store(rstd_ptr + rows, rstd, mask=row_mask)
    y = centred * rstd[:, None] * tl.load(weight_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + rows[:, None] * n_cols + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    grad_y_ptr,  # (n_rows, n_cols), rows grad_y_stride apart
    grad_sum_ptr,  # the same, or None: the gradient that reaches the sum directly
    x_ptr,  # (n_rows, n_cols), rows x_stride apart: what was normalised
    weight_ptr,  # (n_cols,)
    mean_ptr,  # fp32 (n_rows,)
    rstd_ptr,  # fp32 (n_rows,)
    grad_x_ptr,  # (n_rows, n_cols)
    partial_ptr,  # fp32 (programs, 1 or 2, n_cols): sums of this program's rows for weight and, if SUMS is 2, bias
    grad_y_stride,
    grad_sum_stride,
    x_stride,
    n_rows,
    n_cols,
    SUMS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    col_mask = cols < n_cols
    weight = tl.load(weight_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    grad_weight = tl.zeros((BLOCK,), tl.float32)
    grad_bias = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(program * ROWS, n_rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        rows = (start + tl.arange(0, ROWS)).to(tl.int64)
        row_mask = rows < n_rows
        mask = row_mask[:, None] & col_mask[None, :]
        x = tl.load(x_ptr + rows[:, None] * x_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        grad_y = tl.load(grad_y_ptr + rows[:, None] * grad_y_stride + cols[None, :], mask=mask, other=0.0)
        grad_y = grad_y.to(tl.float32)
        mean = tl.load(mean_ptr + rows, mask=row_mask, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + rows, mask=row_mask, other=0.0)[:, None]
        normal = tl.where(mask, (x - mean) * rstd, 0.0)
        grad_weight += tl.sum(grad_y * normal, axis=0)
        if SUMS == 2:
            grad_bias += tl.sum(grad_y, axis=0)
        grad_normal = grad_y * weight
        along = tl.sum(grad_normal * normal, axis=1) / n_cols
        average = tl.sum(grad_normal, axis=1) / n_cols
        grad_x = (grad_normal - normal * along[:, None] - average[:, None]) * rstd
        if grad_sum_ptr is not None:
            grad_sum = tl.load(grad_sum_ptr + rows[:, None] * grad_sum_stride + cols[None, :], mask=mask, other=0.0)
            grad_x += grad_sum.to(tl.float32)
        grad_x_pointers = grad_x_ptr + rows[:, None] * n_cols + cols[None, :]
        tl.store(grad_x_pointers, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
    partial_ptr += program.to(tl.int64) * SUMS * n_cols
    tl.store(partial_ptr + cols, grad_weight, mask=col_mask)
    if SUMS == 2:
        tl.store(partial_ptr + n_cols + cols, grad_bias, mask=col_mask)


@custom_op("layer_norm")
def _layer_norm_op(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n_rows, n_cols = x.shape
    y, s, mean, rstd = _outputs(x, residual)
    wide = n_cols > WIDEST_TILE
    kernel = forward_wide_kernel if wide else _forward_kernel  # so that torch.compile sees which kernels there are
    if wide:
        launch = WIDE_LAUNCH
    else:
        rows, block, num_warps = row_tile(n_cols)
        default = {"ROWS": rows, "num_warps": num_warps}
        case = tile_case(block, y.element_size())
        launch = {"BLOCK": block} | launch_config(chip(x.device), "layer_norm_forward", case, default)
    wrap_triton(kernel)[(triton.cdiv(n_rows, launch.get("ROWS", 1)),)](
        x,
        residual,
        weight,
        bias,
        y,
        s if residual is not None else None,
        mean,
        rstd,
        x.stride(0),
        residual.stride(0) if residual is not None else 0,
        n_rows,
        n_cols,
        eps,
        **launch,
    )
    return y, s, mean, rstd


@_layer_norm_op.register_fake
def _(x, residual, weight, bias, eps):
    return _outputs(x, residual)


def _outputs(x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, the sum (empty without a residual, for an op returns tensors only), mean and rstd."""
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    y = x.new_empty(x.shape, dtype=dtype)
    s = x.new_empty(0 if residual is None else x.shape, dtype=dtype)
    return y, s, x.new_empty(x.shape[0], dtype=torch.float32), x.new_empty(x.shape[0], dtype=torch.float32)


@custom_op("layer_norm_backward")
def _layer_norm_backward_op(
    grad_y: Tensor, grad_sum: Tensor | None, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    n_rows, n_cols = x.shape
    grad_x, grad_weight, grad_bias = _gradients(x, weight, has_bias)
    grad_sum_stride = grad_sum.stride(0) if grad_sum is not None else 0
    sums = 2 if has_bias else 1
    if n_cols <= WIDEST_TILE:
        rows, block, num_warps = row_tile(n_cols)
        streams = 2 if grad_sum is None else 3
        bytes_per_stage = streams * rows * block * x.element_size()
        stages = pipeline_stages(chip(x.device).shared_bytes, bytes_per_stage, num_warps)
        default = {"ROWS": rows, "STAGES": stages, "num_warps": num_warps}
        case = tile_case(block, x.element_size())
        launch = launch_config(chip(x.device), "layer_norm_backward", case, default)
        programs = min(persistent_programs(x.device, launch["num_warps"]), triton.cdiv(n_rows, launch["ROWS"]))
        partial = x.new_empty((programs, sums, n_cols), dtype=torch.float32)
        wrap_triton(_backward_kernel)[(programs,)](
            grad_y,
            grad_sum,
            x,
            weight,
            mean,
            rstd,
            grad_x,
            partial,
            grad_y.stride(0),
            grad_sum_stride,
            x.stride(0),
            n_rows,
            n_cols,
            SUMS=sums,
            BLOCK=block,
            **launch,
        )
    else:
        partial = backward_wide(grad_y, grad_sum, x, weight, mean, rstd, grad_x, sums)
    column_sums(partial, grad_weight, grad_bias if has_bias else None)
    return grad_x, grad_weight, grad_bias


@_layer_norm_backward_op.register_fake
def _(grad_y, grad_sum, x, weight, mean, rstd, has_bias):
    return _gradients(x, weight, has_bias)


def _gradients(x: Tensor, weight: Tensor, has_bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    grad_bias = weight.new_empty(weight.shape if has_bias else 0)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), grad_bias


def _setup_context(ctx, inputs, output) -> None:
    x, residual, weight, bias, _ = inputs
    _, s, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x if residual is None else s, weight, mean, rstd)
    ctx.dtypes = x.dtype, None if residual is None else residual.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, grad_y, grad_sum, _mean, _rstd):
    x, weight, mean, rstd = ctx.saved_tensors
    x_dtype, residual_dtype = ctx.dtypes
    grad_sum = None if residual_dtype is None else grad_sum
    grad_weight = grad_bias = None
    if grad_y is None:
        grad_x = grad_sum
    else:
        grad_sum = None if grad_sum is None else contiguous_rows(grad_sum)
        grad_x, grad_weight, grad_bias = _layer_norm_backward_op(
            contiguous_rows(grad_y), grad_sum, x, weight, mean, rstd, ctx.bias_dtype is not None
        )
    if grad_x is None:
        return None, None, None, None, None
    grad_residual = None if residual_dtype is None else grad_x.to(residual_dtype)
    grad_bias = None if ctx.bias_dtype is None or grad_bias is None else grad_bias.to(ctx.bias_dtype)
    return grad_x.to(x_dtype), grad_residual, grad_weight, grad_bias, None


_layer_norm_op.register_autograd(_backward, setup_context=_setup_context)


def compile_cases() -> list[Case]:
    """Both passes with residual and bias, at the tiles of GPT's widths and beyond the widest tile."""
    cases = []
    for dtype, targets in shipped_dtypes("layer_norm"):
        tensor, sizes = f"*{dtype}", {"n_rows": "i32", "n_cols": "i32"}
        strides = dict.fromkeys(("x_stride", "residual_stride", "grad_y_stride", "grad_sum_stride"), "i32")
        tensors = dict.fromkeys(("x_ptr", "residual_ptr", "weight_ptr", "bias_ptr", "y_ptr", "sum_ptr"), tensor)
        tensors |= dict.fromkeys(("grad_y_ptr", "grad_sum_ptr", "grad_x_ptr", "first_ptr", "second_ptr"), tensor)
        tensors |= dict.fromkeys(("mean_ptr", "rstd_ptr", "partial_ptr"), "*fp32")
        signature = tensors | strides | sizes | {"eps": "fp32"}
        common = {"op": "layer_norm", "signature": signature, "divisible_by_16": ("n_cols", *strides)}
        for (rows, block, num_warps), widths in tiles_of_gpt_widths().items():
            name, itemsize = "_".join(map(str, widths)), 4 if dtype == "fp32" else 2
            keys, tile = [tile_case(block, itemsize)], {"BLOCK": block}
            launch = {"ROWS": rows, "num_warps": num_warps}
            forward = Case(
                label=f"forward_{name}_{dtype}", kernel=_forward_kernel, constants=tile, targets=targets, **common
            )
            cases += as_launched(forward, "layer_norm_forward", keys, launch)
            by_stages: dict[int, list[str]] = {}
            for target in targets:
                stages = pipeline_stages(CHIPS[target].shared_bytes, 3 * rows * block * itemsize, num_warps)
                by_stages.setdefault(stages, []).append(target)
            for stages, some in by_stages.items():
                backward = Case(
                    label=f"backward_{name}_{dtype}_{stages}_stages", kernel=_backward_kernel,
                    constants=tile | {"SUMS": 2}, targets=tuple(some), **common,
                )  # fmt: skip
                cases += as_launched(backward, "layer_norm_backward", keys, launch | {"STAGES": stages})
        for kernel, constants, num_warps in (
            (forward_wide_kernel, {"BLOCK": WIDE_LAUNCH["BLOCK"]}, WIDE_LAUNCH["num_warps"]),
            (backward_wide_kernel, {"BLOCK": WIDE_LAUNCH["BLOCK"]}, WIDE_LAUNCH["num_warps"]),
            (backward_wide_sums_kernel, {"SUMS": 2, **WIDE_SUMS_TILE}, 4),
            (column_sums_kernel, COLUMN_SUMS_TILE, 4),
        ):
            label = f"{kernel.__name__.removeprefix('_').removesuffix('_kernel')}_{dtype}"
            launch = {"constants": constants, "num_warps": num_warps, "targets": targets}
            cases.append(Case(label=label, kernel=kernel, **launch, **common))
    return cases
