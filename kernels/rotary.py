"""Rotary position embedding of a packed projection, in place."""

import torch
from torch import Tensor

from kernels.aot import Case, as_launched
from kernels.dispatch import backend, chip, tl, triton
from kernels.launch_configs import launch_config
from kernels.rows import shipped_dtypes, tile_case


def rotary(qkv: Tensor, cos: Tensor, sin: Tensor, *, n_head: int, head_dim: int) -> Tensor:
    """Rotate the first `n_head` heads of each token by the angles of its position.

    qkv (B, T, heads * head_dim), heads packed [queries | keys | values]; n_head counts those to rotate (queries and
    keys); cos and sin fp32 (T, head_dim / 2). Halves convention: element i of a head turns with element
    i + head_dim / 2. Computed in fp32. Returns qkv's shape and dtype; overwrites qkv, except for a leaf that wants a
    gradient and under torch.compile, which fuses the rotation by itself. Raises ValueError for shapes that do not fit.
    (Su et al., RoFormer, 2021; the halves of GPT-NeoX)
    """
    B, T, width = qkv.shape
    if head_dim % 2 or width % head_dim or n_head * head_dim > width:
        raise ValueError(f"rotary: {n_head} heads of {head_dim} (even) do not fit in a width of {width}")
    if cos.shape != (T, head_dim // 2) or sin.shape != cos.shape:
        raise ValueError(f"rotary: cos and sin are {tuple(cos.shape)}, expected {(T, head_dim // 2)}")
    if torch.compiler.is_compiling():
        return rotary_reference(qkv, cos, sin, n_head=n_head, head_dim=head_dim)
    return _Rotary.apply(qkv.contiguous(), cos.contiguous(), sin.contiguous(), n_head, head_dim)


def rotary_reference(qkv: Tensor, cos: Tensor, sin: Tensor, *, n_head: int, head_dim: int) -> Tensor:
    """`rotary` by its definition, out of place; the angles' precision decides, the result has qkv's dtype."""
    heads = qkv.unflatten(2, (-1, head_dim))
    x1, x2 = heads[:, :, :n_head].chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]  # (T, 1, D / 2)
    turned = torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1).to(qkv.dtype)
    return torch.cat((turned, heads[:, :, n_head:]), 2).flatten(2)


def _rotate_torch(x: Tensor, out: Tensor, cos: Tensor, sin: Tensor, n_head: int, head_dim: int) -> None:
    if out is not x:
        out.copy_(x)
    x1, x2 = out.unflatten(2, (-1, head_dim))[:, :, :n_head].chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]  # (T, 1, D / 2)
    wide = torch.promote_types(x.dtype, torch.float32)
    y1, y2 = x1.to(wide), x2.to(wide)  # x1 and x2 themselves where they are wide
    turned = (y1 * cos).addcmul_(y2, sin, value=-1)
    y2.mul_(cos).addcmul_(y1, sin)
    x1.copy_(turned)
    if y2 is not x2:
        x2.copy_(y2)


@triton.jit
def rotary_kernel(
    x, out, cos, sin, T, heads, written, n_head, sign,
    D: tl.constexpr, HEADS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Turns x (B * T, heads, D) into out, which may be x: grid (B * T, head blocks).

    The first n_head heads turn, those up to `written` are copied, the others stay as they are in out.
    cos and sin (T, D / 2); sign -1 turns back, for the gradient; BLOCK_D covers D / 2.
    """
    token, block = tl.program_id(0), tl.program_id(1)
    head = block * HEADS + tl.arange(0, HEADS)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    inside = (head < written) & (d < D // 2)
    where = tl.cast(token, tl.int64) * heads * D + head * D + d
    x1 = tl.load(x + where, mask=inside)
    x2 = tl.load(x + where + D // 2, mask=inside)
    angle = (token % T) * (D // 2) + d
    turning = (head < n_head) & (d < D // 2)
    c = tl.load(cos + angle, mask=d < D // 2)
    s = tl.load(sin + angle, mask=d < D // 2) * sign
    y1 = x1.to(tl.float32) * c - x2.to(tl.float32) * s
    y2 = x2.to(tl.float32) * c + x1.to(tl.float32) * s
    tl.store(out + where, tl.where(turning, y1.to(x1.dtype), x1), mask=inside)
    tl.store(out + where + D // 2, tl.where(turning, y2.to(x2.dtype), x2), mask=inside)


def _rotate_triton(x: Tensor, out: Tensor, cos: Tensor, sin: Tensor, n_head: int, head_dim: int, sign: float) -> None:
    B, T, width = x.shape
    heads = width // head_dim
    written = n_head if out is x else heads
    half = triton.next_power_of_2(head_dim // 2)
    default = {"HEADS": min(triton.next_power_of_2(written), max(1, 1024 // half)), "num_warps": 4}
    launch = launch_config(chip(x.device), "rotary", tile_case(head_dim, x.element_size()), default)
    rotary_kernel[(B * T, triton.cdiv(written, launch["HEADS"]))](
        x, out, cos, sin, T, heads, written, n_head, sign, D=head_dim, BLOCK_D=half, **launch
    )


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, cos, sin, n_head, head_dim):
        ctx.save_for_backward(cos, sin)
        ctx.heads = n_head, head_dim
        out = qkv
        if qkv.is_leaf and qkv.requires_grad:
            out = torch.empty_like(qkv)
        else:
            ctx.mark_dirty(qkv)
        _rotate(qkv, out, cos, sin, n_head, head_dim, 1.0)
        return out

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        out = torch.empty_like(grad)  # others may hold the incoming one
        _rotate(grad, out, *ctx.saved_tensors, *ctx.heads, -1.0)
        return out, None, None, None, None


def _rotate(x: Tensor, out: Tensor, cos: Tensor, sin: Tensor, n_head: int, head_dim: int, sign: float) -> None:
    if backend("rotary", x.device) == "triton":
        _rotate_triton(x, out, cos, sin, n_head, head_dim, sign)
    else:
        _rotate_torch(x, out, cos, sin if sign > 0 else -sin, n_head, head_dim)


def compile_cases() -> list[Case]:
    """Head widths of the presets, in the formats that each chip trains in."""
    cases = []
    for dtype, targets in shipped_dtypes("rotary"):
        itemsize = 4 if dtype == "fp32" else 2
        for D, half in ((16, 8), (64, 32), (80, 64), (128, 64), (256, 128)):
            case = Case(
                op="rotary",
                label=f"rotary {dtype} d{D}",
                kernel=rotary_kernel,
                signature={
                    "x": f"*{dtype}", "out": f"*{dtype}", "cos": "*fp32", "sin": "*fp32",
                    "T": "i32", "heads": "i32", "written": "i32", "n_head": "i32", "sign": "fp32",
                },
                constants={"D": D, "BLOCK_D": half},
                divisible_by_16=("T",),
                targets=targets,
            )  # fmt: skip
            launch = {"HEADS": max(1, min(32, 1024 // half)), "num_warps": 4}
            cases += as_launched(case, "rotary", [tile_case(D, itemsize)], launch)
    return cases
