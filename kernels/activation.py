"""Bias and GELU or ReLU in one pass, recomputed in the backward pass instead of stored."""

import torch
from torch import Tensor

from kernels.aot import Case, as_launched
from kernels.custom_op import custom_op, wrap_triton
from kernels.dispatch import backend, chip, tl, triton
from kernels.launch_configs import LaunchConfig, launch_config
from kernels.rows import GPT_WIDTHS, column_sums, contiguous_rows, persistent_programs, shipped_dtypes, tile_case

KINDS = ("gelu", "gelu_tanh", "relu")


def bias_activation(x: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """Apply the MLP's activation to x + bias, keeping only x for the backward pass.

    x (..., C), bias (C,) or None; kind: "gelu" (exact, by erf), "gelu_tanh" (GPT-2's) or "relu". Returns (..., C) in
    x's dtype. Raises ValueError for another kind. (Hendrycks and Gimpel, Gaussian Error Linear Units, 2016)
    """
    if kind not in KINDS:
        raise ValueError(f"bias_activation: unknown kind {kind!r}, expected one of {', '.join(KINDS)}")
    if backend("bias_activation", x.device) == "torch":
        return _BiasActivation.apply(x, None if bias is None else bias.to(x.dtype), kind)
    return _bias_activation_op(contiguous_rows(x), bias, KINDS.index(kind)).view(x.shape)


class _BiasActivation(torch.autograd.Function):
    """PyTorch's kernels, in place on x + bias: on a CPU the memory of a fresh tensor costs more than its values."""

    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor | None, kind: str) -> Tensor:
        ctx.save_for_backward(x, bias)
        ctx.kind = kind
        z = x if bias is None else x + bias
        if bias is None or torch.compiler.is_compiling():  # in place, PyTorch 2.11 compiles it to wrong gradients
            return torch.relu(z) if kind == "relu" else torch.ops.aten.gelu(z, approximate=_approximate(kind))
        return z.relu_() if kind == "relu" else torch.ops.aten.gelu_(z, approximate=_approximate(kind))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, bias = ctx.saved_tensors
        z = x if bias is None else x + bias
        grad_x = torch.empty_like(x) if bias is None else z
        if ctx.kind == "relu":
            torch.ops.aten.threshold_backward.grad_input(grad, z, 0, grad_input=grad_x)
        else:
            torch.ops.aten.gelu_backward.grad_input(grad, z, approximate=_approximate(ctx.kind), grad_input=grad_x)
        return grad_x, None if bias is None else grad_x.sum_to_size(bias.shape), None


def _approximate(kind: str) -> str:
    return "tanh" if kind == "gelu_tanh" else "none"


@triton.jit
def _value(z, KIND: tl.constexpr):
    if KIND == 0:
        return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif KIND == 1:
        # z / 2 * (1 + tanh(u)) with tanh(u) = 2 sigmoid(2 u) - 1.
        return z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    else:
        return tl.where(z <= 0.0, 0.0, z)  # this way round, NaN stays NaN


@triton.jit
def _slope(z, KIND: tl.constexpr):
    if KIND == 0:
        return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    elif KIND == 1:
        gate = tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
        return gate + z * gate * (1.0 - gate) * 1.5957691216057308 * (1.0 + 0.134145 * z * z)
    else:
        return tl.where(z <= 0.0, 0.0, 1.0)


@triton.jit
def _forward_kernel(
    x_ptr,  # (n_rows, n_cols), rows x_stride apart
    bias_ptr,  # (n_cols,) or None
    y_ptr,  # (n_rows, n_cols)
    x_stride,
    n_rows,
    n_cols,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    col_mask = cols < n_cols
    mask = (rows < n_rows)[:, None] & col_mask[None, :]
    z = tl.load(x_ptr + rows[:, None] * x_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + rows[:, None] * n_cols + cols[None, :], _value(z, KIND).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    grad_y_ptr,  # (n_rows, n_cols), rows grad_y_stride apart
    x_ptr,  # (n_rows, n_cols), rows x_stride apart
    bias_ptr,  # (n_cols,) or None
    grad_x_ptr,  # (n_rows, n_cols)
    partial_ptr,  # fp32 (programs of axis 1, 1, n_cols): sums over this program's rows; None without bias
    grad_y_stride,
    x_stride,
    n_rows,
    n_cols,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A block of columns and every few rows a program."""
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    col_mask = cols < n_cols
    program = tl.program_id(1)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    grad_bias = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(program * ROWS, n_rows, tl.num_programs(1) * ROWS, num_stages=STAGES):
        rows = (start + tl.arange(0, ROWS)).to(tl.int64)
        mask = (rows < n_rows)[:, None] & col_mask[None, :]
        z = tl.load(x_ptr + rows[:, None] * x_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        grad_y = tl.load(grad_y_ptr + rows[:, None] * grad_y_stride + cols[None, :], mask=mask, other=0.0)
        if bias_ptr is not None:
            z += bias
        grad_x = grad_y.to(tl.float32) * _slope(z, KIND)
        if bias_ptr is not None:
            grad_bias += tl.sum(grad_x, axis=0)
        grad_x_pointers = grad_x_ptr + rows[:, None] * n_cols + cols[None, :]
        tl.store(grad_x_pointers, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
    if bias_ptr is not None:
        tl.store(partial_ptr + program.to(tl.int64) * n_cols + cols, grad_bias, mask=col_mask)


# 4 warps of 16-byte loads are as wide as a block, so that a thread keeps its columns and sums over rows in registers.
FORWARD_LAUNCH = {"ROWS": 4, "BLOCK": 1024, "num_warps": 4}
BACKWARD_LAUNCH = {"ROWS": 2, "BLOCK": 1024, "STAGES": 3, "num_warps": 4}


def _launch(kernel: str, x: Tensor, default: LaunchConfig) -> LaunchConfig:
    return launch_config(chip(x.device), kernel, tile_case(x.shape[1], x.element_size()), default)


@custom_op("bias_activation")
def _bias_activation_op(x: Tensor, bias: Tensor | None, kind: int) -> Tensor:
    n_rows, n_cols = x.shape
    y = x.new_empty(x.shape)
    launch = _launch("bias_activation_forward", x, FORWARD_LAUNCH)
    grid = triton.cdiv(n_rows, launch["ROWS"]), triton.cdiv(n_cols, launch["BLOCK"])
    wrap_triton(_forward_kernel)[grid](x, bias, y, x.stride(0), n_rows, n_cols, KIND=kind, **launch)
    return y


@_bias_activation_op.register_fake
def _(x, bias, kind):
    return x.new_empty(x.shape)


@custom_op("bias_activation_backward")
def _bias_activation_backward_op(grad_y: Tensor, x: Tensor, bias: Tensor | None, kind: int) -> tuple[Tensor, Tensor]:
    n_rows, n_cols = x.shape
    grad_x, grad_bias = _gradients(x, bias)
    launch = _launch("bias_activation_backward", x, BACKWARD_LAUNCH)
    blocks = triton.cdiv(n_cols, launch["BLOCK"])
    programs = max(1, persistent_programs(x.device, launch["num_warps"]) // blocks)
    programs = min(programs, triton.cdiv(n_rows, launch["ROWS"]))
    partial = None if bias is None else x.new_empty((programs, 1, n_cols), dtype=torch.float32)
    wrap_triton(_backward_kernel)[(blocks, programs)](
        grad_y,
        x,
        bias,
        grad_x,
        partial,
        grad_y.stride(0),
        x.stride(0),
        n_rows,
        n_cols,
        KIND=kind,
        **launch,
    )
    if bias is not None:
        column_sums(partial, grad_bias)
    return grad_x, grad_bias


@_bias_activation_backward_op.register_fake
def _(grad_y, x, bias, kind):
    return _gradients(x, bias)


def _gradients(x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0) if bias is None else bias.new_empty(bias.shape)


def _setup_context(ctx, inputs, output) -> None:
    x, bias, ctx.kind = inputs
    ctx.save_for_backward(x, bias)


def _backward(ctx, grad_y):
    x, bias = ctx.saved_tensors
    grad_x, grad_bias = _bias_activation_backward_op(contiguous_rows(grad_y), x, bias, ctx.kind)
    return grad_x, None if bias is None else grad_bias, None


_bias_activation_op.register_autograd(_backward, setup_context=_setup_context)


def compile_cases() -> list[Case]:
    """Both passes of every kind with bias. One tile serves every width that is a multiple of 16, as GPT's all are."""
    cases = []
    for dtype, targets in shipped_dtypes("bias_activation"):
        signature = dict.fromkeys(("x_ptr", "bias_ptr", "y_ptr", "grad_y_ptr", "grad_x_ptr"), f"*{dtype}")
        signature |= dict.fromkeys(("n_rows", "n_cols", "x_stride", "grad_y_stride"), "i32") | {"partial_ptr": "*fp32"}
        divisible = ("n_cols", "x_stride", "grad_y_stride")
        common = {"signature": signature, "divisible_by_16": divisible, "targets": targets}
        keys = sorted({tile_case(4 * width, 4 if dtype == "fp32" else 2) for width in GPT_WIDTHS})
        for kind, name in enumerate(KINDS):
            for step, kernel, launch in (
                ("forward", _forward_kernel, FORWARD_LAUNCH),
                ("backward", _backward_kernel, BACKWARD_LAUNCH),
            ):
                label = f"{step}_{name}_{dtype}"
                case = Case(op="bias_activation", label=label, kernel=kernel, constants={"KIND": kind}, **common)
                cases += as_launched(case, f"bias_activation_{step}", keys, launch)
    return cases
