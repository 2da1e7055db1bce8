"""Attention in Triton, the backward pass: two kernels without atomics, so the same bits every time.

Spans, base-2 scores and `lse` as in kernels/attention_forward.py. The first kernel makes dq and `delta`, the row sums
of out * grad, which the second needs too; that makes dk and dv. (Dao, FlashAttention-2, 2023)
"""

import torch
from torch import Tensor

from kernels.attention_tiles import (
    key_spans,
    launch_settings,
    load_row_numbers,
    load_tile,
    of_head,
    offset,
    store_tile,
    unit_stride,
    visible,
)
from kernels.custom_op import custom_op
from kernels.dispatch import LOG2_E, tl, triton


@triton.jit
def _backward_q_span(
    dq, q, grad, lse, delta, k, v, k_t, v_t, batch, group, rows, row_starts, begin, end, T, scale_log2,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, DOCS: tl.constexpr,
    D: tl.constexpr, KEYS: tl.constexpr, BLOCK_D: tl.constexpr, EDGE_STAGES: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Adds the share of the keys begin..end to dq (ROWS, BLOCK_D), still without the scale."""
    for start in tl.range(begin, end, KEYS, num_stages=EDGE_STAGES if MASK else None):
        start = tl.multiple_of(start, KEYS)
        k_tile = load_tile(k, k_t, batch, start, group, T, KEYS, D, BLOCK_D, MASK, TMA)
        v_tile = load_tile(v, v_t, batch, start, group, T, KEYS, D, BLOCK_D, MASK, TMA)
        p = tl.math.exp2(tl.dot(q, k_tile.T, input_precision="ieee") * scale_log2 - lse[:, None])
        if MASK:
            keys = start + tl.arange(0, KEYS)
            p = tl.where(visible(rows[:, None], keys[None, :], row_starts[:, None], T, CAUSAL, DOCS), p, 0.0)
        ds = p * (tl.dot(grad, v_tile.T, input_precision="ieee") - delta[:, None])
        dq = tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision="ieee")
    return dq


@triton.jit
def backward_q_kernel(
    q, k, v, doc_start, out, lse, grad, delta, dq, T, H, scale, scale_log2,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, grad_b, grad_t, grad_h, dq_t,
    SHARED: tl.constexpr, CAUSAL: tl.constexpr, DOCS: tl.constexpr,
    D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCK_D: tl.constexpr, EDGE_STAGES: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """dq of one tile of queries, and delta (B, H, T), the row sums of out * grad: grid (tiles, H, B).

    dq (B, T, H, D) has its heads side by side and tokens dq_t apart.
    """
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS
    head, batch = tl.program_id(1), tl.program_id(2)
    rows = first + tl.arange(0, ROWS)
    group = head // SHARED
    q = of_head(q, batch, head, q_b, q_t, q_h, TMA)
    grad = of_head(grad, batch, head, grad_b, grad_t, grad_h, TMA)
    k = of_head(k, batch, group, k_b, k_t, k_h, TMA)
    v = of_head(v, batch, group, v_b, v_t, v_h, TMA)
    q_tile = load_tile(q, q_t, batch, first, head, T, ROWS, D, BLOCK_D, True, TMA)
    grad_tile = load_tile(grad, grad_t, batch, first, head, T, ROWS, D, BLOCK_D, True, TMA)
    dense_b = tl.cast(T, tl.int64) * H * D
    out = of_head(out, batch, head, dense_b, H * D, D, False)
    out_tile = load_tile(out, H * D, batch, first, head, T, ROWS, D, BLOCK_D, True, False)
    row_sum = tl.sum(grad_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    statistics = (tl.cast(batch, tl.int64) * H + head) * T
    tl.store(delta + statistics + rows, row_sum, mask=rows < T)
    row_lse = tl.load(lse + statistics + rows, mask=rows < T, other=float("inf"))

    row_starts = rows
    if DOCS:
        doc_start += tl.cast(batch, tl.int64) * T
        row_starts = tl.load(doc_start + rows, mask=rows < T, other=0)
    begin, full_begin, full_end, end = key_spans(doc_start, first, T, CAUSAL, DOCS, ROWS, KEYS)

    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    acc = _backward_q_span(
        acc, q_tile, grad_tile, row_lse, row_sum, k, v, k_t, v_t, batch, group, rows, row_starts,
        full_begin, full_end, T, scale_log2, False, CAUSAL, DOCS, D, KEYS, BLOCK_D, EDGE_STAGES, TMA,
    )  # fmt: skip
    if DOCS:
        acc = _backward_q_span(
            acc, q_tile, grad_tile, row_lse, row_sum, k, v, k_t, v_t, batch, group, rows, row_starts,
            begin, full_begin, T, scale_log2, True, CAUSAL, DOCS, D, KEYS, BLOCK_D, EDGE_STAGES, TMA,
        )  # fmt: skip
    acc = _backward_q_span(
        acc, q_tile, grad_tile, row_lse, row_sum, k, v, k_t, v_t, batch, group, rows, row_starts,
        full_end, end, T, scale_log2, True, CAUSAL, DOCS, D, KEYS, BLOCK_D, EDGE_STAGES, TMA,
    )  # fmt: skip
    dq += offset(batch, first, head, tl.cast(T, tl.int64) * dq_t, dq_t, D)
    store_tile(dq, dq_t, T - first, acc * scale, ROWS, D, BLOCK_D)


@triton.jit
def _backward_kv_span(
    dk, dv, k, v, q, grad, lse, delta, doc_end, q_t, grad_t, batch, head, first, begin, end, T, scale_log2,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, DOCS: tl.constexpr,
    D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCK_D: tl.constexpr, EDGE_STAGES: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """Adds the share of the queries begin..end to dk (still without the scale) and dv, both (KEYS, BLOCK_D).

    Queries from T on have gradients of zero, and so add nothing.
    """
    for start in tl.range(begin, end, ROWS, num_stages=EDGE_STAGES if MASK else None):
        start = tl.multiple_of(start, ROWS)
        q_tile = load_tile(q, q_t, batch, start, head, T, ROWS, D, BLOCK_D, MASK, TMA)
        row_lse = load_row_numbers(lse, batch, start, head, T, ROWS, MASK, TMA)
        row_sum = load_row_numbers(delta, batch, start, head, T, ROWS, MASK, TMA)
        # Transposed, (KEYS, ROWS): the products with q and grad then read their tiles as they lie.
        p = tl.math.exp2(tl.dot(k, q_tile.T, input_precision="ieee") * scale_log2 - row_lse[None, :])
        if MASK:  # what only masks need is made here: beside whole tiles there are no registers left for it
            rows, keys = start + tl.arange(0, ROWS), first + tl.arange(0, KEYS)
            if CAUSAL:
                p = tl.where(keys[:, None] <= rows[None, :], p, 0.0)
            if DOCS:
                key_ends = tl.load(doc_end + keys, mask=keys < T, other=0)
                p = tl.where(rows[None, :] < key_ends[:, None], p, 0.0)
        grad_tile = load_tile(grad, grad_t, batch, start, head, T, ROWS, D, BLOCK_D, MASK, TMA)
        dv = tl.dot(p.to(grad_tile.dtype), grad_tile, dv, input_precision="ieee")
        ds = p * (tl.dot(v, grad_tile.T, input_precision="ieee") - row_sum[None, :])
        dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def backward_kv_kernel(
    q, k, v, doc_end, lse, grad, delta, dk, dv, T, H, scale, scale_log2,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, grad_b, grad_t, grad_h, dk_t,
    SHARED: tl.constexpr, CAUSAL: tl.constexpr, DOCS: tl.constexpr,
    D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCK_D: tl.constexpr, EDGE_STAGES: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of keys, summed over the heads that share them: grid (tiles, G, B).

    dk and dv (B, T, G, D) have their heads side by side and tokens dk_t apart.
    doc_end (B, T): for each key the first query of a later document.
    """
    first = tl.program_id(0) * KEYS  # early keys are seen by most queries, so the longest start first here too
    group, batch = tl.program_id(1), tl.program_id(2)
    k = of_head(k, batch, group, k_b, k_t, k_h, TMA)
    v = of_head(v, batch, group, v_b, v_t, v_h, TMA)
    k_tile = load_tile(k, k_t, batch, first, group, T, KEYS, D, BLOCK_D, True, TMA)
    v_tile = load_tile(v, v_t, batch, first, group, T, KEYS, D, BLOCK_D, True, TMA)

    begin, full_begin, end = 0, 0, T
    full_end = T // ROWS * ROWS
    if CAUSAL:
        begin = first // ROWS * ROWS
        full_begin = tl.minimum(tl.cdiv(first + KEYS, ROWS) * ROWS, tl.cdiv(T, ROWS) * ROWS)
    if DOCS:
        doc_end += tl.cast(batch, tl.int64) * T
        full_end = tl.load(doc_end + first) // ROWS * ROWS
        end = tl.load(doc_end + tl.minimum(first + KEYS, T) - 1)
    full_end = tl.maximum(full_end, full_begin)

    acc_k = tl.zeros((KEYS, BLOCK_D), tl.float32)
    acc_v = tl.zeros((KEYS, BLOCK_D), tl.float32)
    for shared in range(SHARED):
        head = group * SHARED + shared
        q_head = of_head(q, batch, head, q_b, q_t, q_h, TMA)
        grad_head = of_head(grad, batch, head, grad_b, grad_t, grad_h, TMA)
        lse_head = of_head(lse, batch, head, tl.cast(T, tl.int64) * H, 1, T, TMA)
        delta_head = of_head(delta, batch, head, tl.cast(T, tl.int64) * H, 1, T, TMA)
        if CAUSAL:
            acc_k, acc_v = _backward_kv_span(
                acc_k, acc_v, k_tile, v_tile, q_head, grad_head, lse_head, delta_head, doc_end,
                q_t, grad_t, batch, head, first, begin, tl.minimum(full_begin, end), T, scale_log2,
                True, CAUSAL, DOCS, D, ROWS, KEYS, BLOCK_D, EDGE_STAGES, TMA,
            )  # fmt: skip
        acc_k, acc_v = _backward_kv_span(
            acc_k, acc_v, k_tile, v_tile, q_head, grad_head, lse_head, delta_head, doc_end,
            q_t, grad_t, batch, head, first, full_begin, full_end, T, scale_log2,
            False, CAUSAL, DOCS, D, ROWS, KEYS, BLOCK_D, EDGE_STAGES, TMA,
        )  # fmt: skip
        acc_k, acc_v = _backward_kv_span(
            acc_k, acc_v, k_tile, v_tile, q_head, grad_head, lse_head, delta_head, doc_end,
            q_t, grad_t, batch, head, first, full_end, end, T, scale_log2,
            True, CAUSAL, DOCS, D, ROWS, KEYS, BLOCK_D, EDGE_STAGES, TMA,
        )  # fmt: skip

    tile = offset(batch, first, group, tl.cast(T, tl.int64) * dk_t, dk_t, D)
    store_tile(dk + tile, dk_t, T - first, acc_k * scale, KEYS, D, BLOCK_D)
    store_tile(dv + tile, dk_t, T - first, acc_v, KEYS, D, BLOCK_D)


@custom_op("attention_backward", opaque=True)
def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor | None, out: Tensor, lse: Tensor,
    causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v, contiguous; the same bits every time."""
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    _write_gradients(dq, dk, dv, grad, q, k, v, doc_start, out, lse, causal, scale)
    return dq, dk, dv


@attention_backward.register_fake
def _(grad, q, k, v, doc_start, out, lse, causal, scale):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))


@custom_op("attention_packed_backward", opaque=True)
def attention_packed_backward(
    grad: Tensor, qkv: Tensor, doc_start: Tensor | None, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> Tensor:
    """The gradient of qkv (B, T, 3, H, D), written where it belongs: three apart would be copied together."""
    packed = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    _write_gradients(*packed.unbind(2), grad, *qkv.unbind(2), doc_start, out, lse, causal, scale)
    return packed


@attention_packed_backward.register_fake
def _(grad, qkv, doc_start, out, lse, causal, scale):
    return torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)


def _write_gradients(
    dq: Tensor, dk: Tensor, dv: Tensor, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor | None,
    out: Tensor, lse: Tensor, causal: bool, scale: float,
) -> None:  # fmt: skip
    """Fill dq, dk and dv, whose heads lie side by side and whose batches follow each other."""
    B, T, H, _ = q.shape
    G = k.shape[2]
    grad, q, k, v = (unit_stride(x) for x in (grad, q, k, v))
    delta = torch.empty_like(lse)
    tensors = {"q": q, "k": k, "v": v, "grad": grad}
    numbers = {"T": T, "H": H, "scale": scale, "scale_log2": scale * LOG2_E}
    config, arguments = launch_settings("attention_backward_q", causal, doc_start, **tensors)
    backward_q_kernel[(triton.cdiv(T, config["ROWS"]), H, B)](
        doc_start=doc_start, out=out, lse=lse, delta=delta, dq=dq, dq_t=dq.stride(1), **numbers, **arguments
    )
    doc_end = None
    if doc_start is not None:
        keys = torch.arange(T, dtype=doc_start.dtype, device=q.device).expand(B, T).contiguous()
        doc_end = torch.searchsorted(doc_start.contiguous(), keys, right=True, out_int32=True)
    config, arguments = launch_settings("attention_backward_kv", causal, doc_start, **tensors, lse=lse, delta=delta)
    backward_kv_kernel[(triton.cdiv(T, config["KEYS"]), G, B)](
        doc_end=doc_end, dk=dk, dv=dv, dk_t=dk.stride(1), **numbers, **arguments
    )
