"""What the attention kernels share: tiles, the spans of keys they walk over, their launch and their compile cases."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels.aot import Case
from kernels.custom_op import Op
from kernels.dispatch import CHIPS, TensorDescriptor, chip, interpreting, tl, triton
from kernels.launch_configs import LaunchConfig, launch_config

# The running maximum starts here instead of at -inf, so that a row that sees nothing yet gives exp2(-inf) = 0, not NaN.
FLOOR = tl.constexpr(-1.0e30)
# How many rows of each tensor a kernel loads at once: vectors (B, T, heads, D), and numbers (B, H, T).
TILE_OF = {"q": "ROWS", "k": "KEYS", "v": "KEYS", "grad": "ROWS", "lse": "ROWS", "delta": "ROWS"}


@triton.jit
def offset(batch, row, head, stride_b, stride_t, stride_h):
    """Offset of a row in elements, in 64 bits: a tensor may have more than 2^31 elements."""
    return tl.cast(batch, tl.int64) * stride_b + tl.cast(row, tl.int64) * stride_t + tl.cast(head, tl.int64) * stride_h


@triton.jit
def of_head(x, batch, head, stride_b, stride_t, stride_h, TMA: tl.constexpr):
    """What load_tile takes of a tensor: a pointer to a head's first row, or the descriptor as it is."""
    return x if TMA else x + offset(batch, 0, head, stride_b, stride_t, stride_h)


@triton.jit
def load_tile(
    x, stride_t, batch, row, head, T,
    ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, MASK: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """The rows row..row + ROWS of `of_head`, as (ROWS, BLOCK_D) with zeros from T (if MASK or TMA) and D on.

    Hopper's copy engine (TMA) takes a descriptor of the whole tensor (B, H, T, D): no thread computes addresses, and
    the registers that these took are free for larger tiles.
    """
    if TMA:
        tile = x.load([batch, head, row, 0]).reshape(ROWS, BLOCK_D)
    else:
        i, d = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_D)[None, :]
        where = x + tl.cast(row, tl.int64) * stride_t + i * stride_t + d
        if MASK and BLOCK_D != D:
            tile = tl.load(where, mask=(i < T - row) & (d < D), other=0.0)
        elif MASK:
            tile = tl.load(where, mask=i < T - row, other=0.0)
        elif BLOCK_D != D:
            tile = tl.load(where, mask=d < D, other=0.0)
        else:
            tile = tl.load(where)
    return tile


@triton.jit
def load_row_numbers(x, batch, row, head, T, ROWS: tl.constexpr, MASK: tl.constexpr, TMA: tl.constexpr):
    """A number of each of the rows row..row + ROWS of `of_head`, with zeros from T on (if MASK or TMA)."""
    if TMA:
        numbers = x.load([batch, head, row]).reshape(ROWS)
    elif MASK:
        rows = row + tl.arange(0, ROWS)
        numbers = tl.load(x + rows, mask=rows < T, other=0.0)
    else:
        numbers = tl.load(x + row + tl.arange(0, ROWS))
    return numbers


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


def make_differentiable(attend: Op, backward: Op) -> None:
    """Give `attend`, (q, k, v or qkv, doc_start, causal, scale) -> (out, lse), the gradients that `backward` makes."""

    def context(ctx, inputs, output):
        *tensors, ctx.causal, ctx.scale = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    def gradients(ctx, grad, _):
        made = backward(grad, *ctx.saved_tensors, ctx.causal, ctx.scale)
        return *(made if isinstance(made, tuple) else (made,)), None, None, None

    attend.register_autograd(gradients, setup_context=context)


def takes(q: Tensor) -> bool:
    """Whether the kernels serve these queries: widths up to 256, and 16 bits, except under the interpreter.

    fp32 on a GPU stays with PyTorch: exact fp32 products in registers spill at every useful tile.
    """
    return q.shape[-1] <= 256 and (q.dtype in (torch.float16, torch.bfloat16) or interpreting())


def unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def launch_settings(
    kernel: str, causal: bool, doc_start: Tensor | None, **tensors: Tensor
) -> tuple[LaunchConfig, dict[str, Any]]:
    """The chip's launch configuration of one kernel; and that with the kernel's constants and its tensors and strides.

    tensors: q, k, v and perhaps grad, (B, T, heads, D), and lse and delta, (B, H, T); they become descriptors where the
    configuration says so.
    """
    q, k = tensors["q"], tensors["k"]
    D = q.shape[-1]
    width = max(16, triton.next_power_of_2(D))
    config = {"TMA": 0} | launch_config(chip(q.device), kernel, width)
    if config["TMA"] and not all(map(describable, tensors.values())):
        config = launch_config(chip(q.device), f"{kernel}_pointers", width, config) | {"TMA": 0}
    vectors = {name: x for name, x in tensors.items() if x.ndim == 4}
    strides = {f"{name}_{axis}": x.stride(i) for name, x in vectors.items() for i, axis in enumerate("bth")}
    if config["TMA"]:
        tensors = {name: describe(x, config[TILE_OF[name]], width) for name, x in tensors.items()}
    constants = {
        "SHARED": q.shape[2] // k.shape[2],
        "CAUSAL": causal,
        "DOCS": doc_start is not None,
        "D": D,
        "BLOCK_D": width,
    }
    return config, tensors | strides | constants | config


def describable(x: Tensor) -> bool:
    """Whether a descriptor can be made: of something, at an address and with rows at multiples of 16 bytes."""
    steps = (stride * x.element_size() for stride in x.stride()[:-1])
    return x.numel() > 0 and x.data_ptr() % 16 == 0 and all(step > 0 and step % 16 == 0 for step in steps)


def describe(x: Tensor, rows: int, width: int) -> TensorDescriptor:
    """The descriptor of x (B, T, H, D) or numbers (B, H, T) that gives `rows` rows of a head, zeros beyond T and D."""
    tile = [1, 1, rows, width][: x.ndim]
    x = x.transpose(1, 2) if x.ndim == 4 else x
    return TensorDescriptor(x, list(x.shape), list(x.stride()), tile)


def element_case(
    name: str, kernel: Callable, target: str, dtype: str, width: int, *, docs: bool = False, shared: int = 1, D: int
) -> Case:
    """The case of one attention kernel with its launch configuration on one chip, for heads of D in a tile of width."""
    config = {"TMA": 0} | launch_config(CHIPS[target], name, width)
    options = {k: config.pop(k) for k in ("num_warps", "num_stages")}
    constants = config | {"SHARED": shared, "CAUSAL": True, "DOCS": docs, "D": D, "BLOCK_D": width}
    if not docs:
        constants |= {"doc_start": None, "doc_end": None}
    signature = {a: _type_of(a, dtype) for a in kernel.arg_names if a not in constants}
    if config["TMA"]:
        vectors = {a for a in TILE_OF if f"{a}_t" in signature}
        numbers = {"lse", "delta"} if "backward_kv" in name else set()
        signature |= {a: f"tensordesc<{dtype}[1,1,{config[TILE_OF[a]]},{width}]>" for a in vectors}
        signature |= {a: f"tensordesc<fp32[1,1,{config[TILE_OF[a]]}]>" for a in numbers}
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
