"""What the attention kernels share: tiles, the spans of keys they walk over, their launch and their compile cases."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.library import CustomOpDef

from kernels.aot import Case
from kernels.dispatch import CHIPS, chip, interpreting, tl, triton
from kernels.launch_configs import launch_config

LOG2_E = math.log2(math.e)
# The running maximum starts here instead of at -inf, so that a row that sees nothing yet gives exp2(-inf) = 0, not NaN.
FLOOR = tl.constexpr(-1.0e30)


@triton.jit
def offset(batch, row, head, stride_b, stride_t, stride_h):
    """Offset of a row in elements, in 64 bits: a tensor may have more than 2^31 elements."""
    return tl.cast(batch, tl.int64) * stride_b + tl.cast(row, tl.int64) * stride_t + tl.cast(head, tl.int64) * stride_h


@triton.jit
def load_tile(base, stride, rows_left, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, MASK: tl.constexpr):
    """ROWS rows of D elements from `base`, as (ROWS, BLOCK_D) with zeros beyond `rows_left` rows (if MASK) and D."""
    i, d = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_D)[None, :]
    where = base + i * stride + d
    if MASK and BLOCK_D != D:
        return tl.load(where, mask=(i < rows_left) & (d < D), other=0.0)
    if MASK:
        return tl.load(where, mask=i < rows_left, other=0.0)
    if BLOCK_D != D:
        return tl.load(where, mask=d < D, other=0.0)
    return tl.load(where)


@triton.jit
def store_tile(base, stride, rows_left, x, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Stores the D columns of the first `rows_left` rows of x (ROWS, BLOCK_D)."""
    i, d = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_D)[None, :]
    tl.store(base + i * stride + d, x.to(base.dtype.element_ty), mask=(i < rows_left) & (d < D))


@triton.jit
def key_spans(doc_start, first, T, CAUSAL: tl.constexpr, DOCS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """Where the keys of the queries first..first + ROWS begin, are all visible from, to, and end; multiples of KEYS.

    doc_start of a row never falls, so its first and last queries bound the tile.
    """
    begin, full_begin = 0, 0
    if CAUSAL:
        full_end = first // KEYS * KEYS
        end = tl.minimum(first + ROWS, T)
    else:
        full_end = T // KEYS * KEYS
        end = T
    if DOCS:
        begin = tl.load(doc_start + first) // KEYS * KEYS
        last = tl.load(doc_start + tl.minimum(first + ROWS, T) - 1)
        full_begin = tl.minimum(tl.cdiv(last, KEYS) * KEYS, full_end)
    return begin, full_begin, full_end, end


@triton.jit
def visible(rows, keys, row_starts, T, CAUSAL: tl.constexpr, DOCS: tl.constexpr):
    """Which keys each query sees; rows, keys and row_starts broadcast against each other."""
    seen = keys < T
    if CAUSAL:
        seen = seen & (keys <= rows)
    if DOCS:
        seen = seen & (keys >= row_starts)
    return seen


def make_differentiable(attend: CustomOpDef, backward: CustomOpDef) -> None:
    """Give `attend`, (q, k, v, doc_start, causal, scale) -> (out, lse), the gradients that `backward` makes."""

    def context(ctx, inputs, output):
        q, k, v, doc_start, ctx.causal, ctx.scale = inputs
        ctx.save_for_backward(q, k, v, doc_start, *output)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    def gradients(ctx, grad, _):
        return *backward(grad, *ctx.saved_tensors, ctx.causal, ctx.scale), None, None, None

    attend.register_autograd(gradients, setup_context=context)


def takes(q: Tensor) -> bool:
    """Whether the kernels serve these queries: widths up to 256, and 16 bits, except under the interpreter.

    fp32 on a GPU stays with PyTorch: exact fp32 products in registers spill at every useful tile.
    """
    return q.shape[-1] <= 256 and (q.dtype in (torch.float16, torch.bfloat16) or interpreting())


def unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def launch_settings(kernel: str, q: Tensor, k: Tensor, causal: bool, doc_start: Tensor | None) -> tuple[dict, dict]:
    """The chip's launch configuration and the constants of one kernel."""
    D = q.shape[-1]
    width = max(16, triton.next_power_of_2(D))
    config = launch_config(chip(q.device), kernel, width)
    constants = {
        "SHARED": q.shape[2] // k.shape[2],
        "CAUSAL": causal,
        "DOCS": doc_start is not None,
        "D": D,
        "BLOCK_D": width,
    }
    return config, constants


def element_case(
    name: str, kernel: Callable, target: str, dtype: str, width: int, *, docs: bool = False, shared: int = 1, D: int
) -> Case:
    """The case of one attention kernel with its launch configuration on one chip, for heads of D in a tile of width."""
    config = dict(launch_config(CHIPS[target], name, width))
    options = {k: config.pop(k) for k in ("num_warps", "num_stages")}
    constants = config | {"SHARED": shared, "CAUSAL": True, "DOCS": docs, "D": D, "BLOCK_D": width}
    if not docs:
        constants |= {"doc_start": None, "doc_end": None}
    signature = {a: _type_of(a, dtype) for a in kernel.arg_names if a not in constants}
    strides = [a for a in signature if a[-2:] in ("_b", "_t", "_h")]
    return Case(
        op=name.removesuffix("_many") if "decode" in name else "attention",
        label=f"{name} {dtype} d{D}{' docs' if docs else ''} {target}",
        kernel=kernel,
        signature=signature,
        constants={k: v for k, v in constants.items() if k in kernel.arg_names},
        divisible_by_16=tuple(strides) if D % 16 == 0 else (),
        targets=(target,),
        **options,
    )


def _type_of(argument: str, dtype: str) -> str:
    if argument in ("q", "k", "v", "out", "grad", "dq", "dk", "dv"):
        return f"*{dtype}"
    if argument in ("lse", "delta", "parts", "parts_lse"):
        return "*fp32"
    if argument in ("doc_start", "doc_end"):
        return "*i32"
    return "fp32" if argument.startswith("scale") else "i32"
