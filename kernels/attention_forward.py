"""Attention in Triton: the forward pass, and of both passes the registration and the compile cases.

Shapes as in kernels/attention.py. Scores are kept in base 2: scale * log2(e) is folded into one factor and `lse` is the
base-2 log-sum-exp, fp32 (B, H, T), in both passes. Every kernel works on a tile of queries and walks over tiles of keys
(or the other way round) in up to three spans: tiles that a document boundary cuts, tiles that are wholly visible, tiles
on the diagonal or the edge. The first and the last pay for masks; tiles that nothing sees are never visited.
Queries walk over wholly visible keys first: where a masked loop begins with accumulators of zero, ptxas makes each of
Hopper's products wait for the one before.
(Dao, FlashAttention-2, 2023; Dao et al., Flash-Decoding, 2023)
"""

import torch
from torch import Tensor

from kernels.aot import Case, triton_targets
from kernels.attention_backward import (
    attention_backward,
    attention_packed_backward,
    backward_kv_kernel,
    backward_q_kernel,
)
from kernels.attention_tiles import (
    FLOOR,
    element_case,
    key_spans,
    launch_settings,
    load_tile,
    make_differentiable,
    of_head,
    offset,
    store_tile,
    unit_stride,
    visible,
)
from kernels.custom_op import custom_op
from kernels.dispatch import CHIPS, LOG2_E, tl, triton
from kernels.launch_configs import launch_config


@triton.jit
def attend_span(
    acc, m, l, q, k, v, k_t, v_t, batch, group, rows, row_starts, begin, end, T, scale_log2,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, DOCS: tl.constexpr,
    D: tl.constexpr, KEYS: tl.constexpr, BLOCK_D: tl.constexpr, EDGE_STAGES: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Online softmax over keys begin..end: acc (ROWS, BLOCK_D), maximum m and sum l (ROWS,); k and v of `of_head`."""
    for start in tl.range(begin, end, KEYS, num_stages=EDGE_STAGES if MASK else None):
        start = tl.multiple_of(start, KEYS)
        k_tile = load_tile(k, k_t, batch, start, group, T, KEYS, D, BLOCK_D, MASK, TMA)
        scores = tl.dot(q, k_tile.T, input_precision="ieee")
        if MASK:
            keys = start + tl.arange(0, KEYS)
            seen = visible(rows[:, None], keys[None, :], row_starts[:, None], T, CAUSAL, DOCS)
            scores = tl.where(seen, scores, float("-inf"))
        m_new = tl.maximum(m, tl.max(scores, 1) * scale_log2)
        p = tl.math.exp2(scores * scale_log2 - m_new[:, None])
        shrink = tl.math.exp2(m - m_new)
        l = l * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        v_tile = load_tile(v, v_t, batch, start, group, T, KEYS, D, BLOCK_D, MASK, TMA)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision="ieee")
        m = m_new
    return acc, m, l


@triton.jit
def forward_kernel(
    q, k, v, doc_start, out, lse, T, H, scale_log2,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    SHARED: tl.constexpr, CAUSAL: tl.constexpr, DOCS: tl.constexpr,
    D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCK_D: tl.constexpr, EDGE_STAGES: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """out (B, T, H, D) contiguous and lse (B, H, T) of one tile of queries: grid (tiles, H, B)."""
    # The longest rows of a head start first; heads stay together, so their keys stay in the L2 cache.
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS
    head, batch = tl.program_id(1), tl.program_id(2)
    rows = first + tl.arange(0, ROWS)
    group = head // SHARED
    q = of_head(q, batch, head, q_b, q_t, q_h, TMA)
    k = of_head(k, batch, group, k_b, k_t, k_h, TMA)
    v = of_head(v, batch, group, v_b, v_t, v_h, TMA)
    q_tile = load_tile(q, q_t, batch, first, head, T, ROWS, D, BLOCK_D, True, TMA)
    row_starts = rows
    if DOCS:
        doc_start += tl.cast(batch, tl.int64) * T
        row_starts = tl.load(doc_start + rows, mask=rows < T, other=0)
    begin, full_begin, full_end, end = key_spans(doc_start, first, T, CAUSAL, DOCS, ROWS, KEYS)

    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    m = tl.full((ROWS,), FLOOR, tl.float32)
    l = tl.zeros((ROWS,), tl.float32)
    acc, m, l = attend_span(
        acc, m, l, q_tile, k, v, k_t, v_t, batch, group, rows, row_starts, full_begin, full_end, T, scale_log2,
        False, CAUSAL, DOCS, D, KEYS, BLOCK_D, EDGE_STAGES, TMA,
    )  # fmt: skip
    if DOCS:
        acc, m, l = attend_span(
            acc, m, l, q_tile, k, v, k_t, v_t, batch, group, rows, row_starts, begin, full_begin, T,
            scale_log2, True, CAUSAL, DOCS, D, KEYS, BLOCK_D, EDGE_STAGES, TMA,
        )  # fmt: skip
    acc, m, l = attend_span(
        acc, m, l, q_tile, k, v, k_t, v_t, batch, group, rows, row_starts, full_end, end, T, scale_log2,
        True, CAUSAL, DOCS, D, KEYS, BLOCK_D, EDGE_STAGES, TMA,
    )  # fmt: skip

    l = tl.where(l == 0.0, 1.0, l)
    out += offset(batch, first, head, tl.cast(T, tl.int64) * H * D, H * D, D)
    store_tile(out, H * D, T - first, acc / l[:, None], ROWS, D, BLOCK_D)
    lse += (tl.cast(batch, tl.int64) * H + head) * T
    tl.store(lse + rows, m + tl.math.log2(l), mask=rows < T)


@custom_op("attention", opaque=True)
def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """`attention` and the base-2 log-sum-exp (B, H, T) of its scores; shapes as there, widths up to 256, scale > 0."""
    return _attend(q, k, v, doc_start, causal, scale)


@custom_op("attention_packed", opaque=True)
def attention_packed_forward(
    qkv: Tensor, doc_start: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """The same of qkv (B, T, 3, H, D), so that its gradient is one tensor."""
    return _attend(*qkv.unbind(2), doc_start, causal, scale)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    B, T, H, _ = q.shape
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    out, lse = _outputs(q)
    config, arguments = launch_settings("attention_forward", causal, doc_start, q=q, k=k, v=v)
    forward_kernel[(triton.cdiv(T, config["ROWS"]), H, B)](
        doc_start=doc_start, out=out, lse=lse, T=T, H=H, scale_log2=scale * LOG2_E, **arguments
    )
    return out, lse


@attention_forward.register_fake
def _(q, k, v, doc_start, causal, scale):
    return _outputs(q)


@attention_packed_forward.register_fake
def _(qkv, doc_start, causal, scale):
    return _outputs(qkv[:, :, 0])


def _outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    B, T, H, _ = q.shape
    lse = torch.empty(B, H, T, dtype=torch.float32, device=q.device)
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), lse


make_differentiable(attention_forward, attention_backward)
make_differentiable(attention_packed_forward, attention_packed_backward)


KERNELS = {
    "attention_forward": forward_kernel,
    "attention_backward_q": backward_q_kernel,
    "attention_backward_kv": backward_kv_kernel,
}


def compile_cases() -> list[Case]:
    """Every launch configuration of every chip that runs attention in Triton, with and without documents."""
    return [
        element_case(name, kernel, target, dtype, width, docs=docs, D=D)
        for target in triton_targets("attention")
        for kernel_name, kernel in KERNELS.items()
        for width, D in ((16, 16), (32, 32), (64, 64), (64, 48), (128, 128), (128, 80), (256, 256))
        for name in (kernel_name, f"{kernel_name}_pointers")
        if launch_config(CHIPS[target], name, width, {})
        for dtype, docs in (("bf16", False), ("fp16", True))
        if D == width or docs
    ]
