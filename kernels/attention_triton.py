"""Attention in Triton: forward, backward in two kernels without atomics, and split decoding against a cache.

Shapes as in kernels/attention.py. Scores are kept in base 2: scale * log2(e) is folded into one factor and `lse` is the
base-2 log-sum-exp, fp32 (B, H, T), in both passes. Every kernel works on a tile of queries and walks over tiles of keys
(or the other way round) in up to three spans: tiles that a document boundary cuts, tiles that are wholly visible, tiles
on the diagonal or the edge. Only the first and the last pay for masks; tiles that nothing sees are never visited.
(Dao, FlashAttention-2, 2023; Dao et al., Flash-Decoding, 2023)
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from kernels.aot import Case, triton_targets
from kernels.dispatch import CHIPS, chip, custom_op, interpreting, launch_config, tl, triton, wrap_triton

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


@triton.jit
def attend_span(
    acc, m, l, q, k, v, k_t, v_t, rows, row_starts, begin, end, T, scale_log2,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, DOCS: tl.constexpr,
    D: tl.constexpr, KEYS: tl.constexpr, BLOCK_D: tl.constexpr, EDGE_STAGES: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys begin..end: acc (ROWS, BLOCK_D), maximum m and sum l (ROWS,)."""
    for start in tl.range(begin, end, KEYS, num_stages=EDGE_STAGES if MASK else None):
        start = tl.multiple_of(start, KEYS)
        k_tile = load_tile(k + tl.cast(start, tl.int64) * k_t, k_t, T - start, KEYS, D, BLOCK_D, MASK)
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
        v_tile = load_tile(v + tl.cast(start, tl.int64) * v_t, v_t, T - start, KEYS, D, BLOCK_D, MASK)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision="ieee")
        m = m_new
    return acc, m, l


@triton.jit
def forward_kernel(
    q, k, v, doc_start, out, lse, T, H, scale_log2,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    SHARED: tl.constexpr, CAUSAL: tl.constexpr, DOCS: tl.constexpr,
    D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCK_D: tl.constexpr, EDGE_STAGES: tl.constexpr,
):  # fmt: skip
    """out (B, T, H, D) contiguous and lse (B, H, T) of one tile of queries: grid (tiles, H, B)."""
    # The longest rows of a head start first; heads stay together, so their keys stay in the L2 cache.
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS
    head, batch = tl.program_id(1), tl.program_id(2)
    rows = first + tl.arange(0, ROWS)
    q_tile = load_tile(q + offset(batch, first, head, q_b, q_t, q_h), q_t, T - first, ROWS, D, BLOCK_D, True)
    k += offset(batch, 0, head // SHARED, k_b, k_t, k_h)
    v += offset(batch, 0, head // SHARED, v_b, v_t, v_h)
    row_starts = rows
    if DOCS:
        doc_start += tl.cast(batch, tl.int64) * T
        row_starts = tl.load(doc_start + rows, mask=rows < T, other=0)
    begin, full_begin, full_end, end = key_spans(doc_start, first, T, CAUSAL, DOCS, ROWS, KEYS)

    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    m = tl.full((ROWS,), FLOOR, tl.float32)
    l = tl.zeros((ROWS,), tl.float32)
    if DOCS:
        acc, m, l = attend_span(
            acc, m, l, q_tile, k, v, k_t, v_t, rows, row_starts, begin, full_begin, T, scale_log2,
            True, CAUSAL, DOCS, D, KEYS, BLOCK_D, EDGE_STAGES,
        )  # fmt: skip
    acc, m, l = attend_span(
        acc, m, l, q_tile, k, v, k_t, v_t, rows, row_starts, full_begin, full_end, T, scale_log2,
        False, CAUSAL, DOCS, D, KEYS, BLOCK_D, EDGE_STAGES,
    )  # fmt: skip
    acc, m, l = attend_span(
        acc, m, l, q_tile, k, v, k_t, v_t, rows, row_starts, full_end, end, T, scale_log2,
        True, CAUSAL, DOCS, D, KEYS, BLOCK_D, EDGE_STAGES,
    )  # fmt: skip

    l = tl.where(l == 0.0, 1.0, l)
    out += offset(batch, first, head, tl.cast(T, tl.int64) * H * D, H * D, D)
    store_tile(out, H * D, T - first, acc / l[:, None], ROWS, D, BLOCK_D)
    lse += (tl.cast(batch, tl.int64) * H + head) * T
    tl.store(lse + rows, m + tl.math.log2(l), mask=rows < T)


@triton.jit
def _backward_q_span(
    dq, q, grad, lse, delta, k, v, k_t, v_t, rows, row_starts, begin, end, T, scale_log2,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, DOCS: tl.constexpr,
    D: tl.constexpr, KEYS: tl.constexpr, BLOCK_D: tl.constexpr, EDGE_STAGES: tl.constexpr,
):  # fmt: skip
    """Adds the share of the keys begin..end to dq (ROWS, BLOCK_D), still without the scale."""
    for start in tl.range(begin, end, KEYS, num_stages=EDGE_STAGES if MASK else None):
        start = tl.multiple_of(start, KEYS)
        k_tile = load_tile(k + tl.cast(start, tl.int64) * k_t, k_t, T - start, KEYS, D, BLOCK_D, MASK)
        v_tile = load_tile(v + tl.cast(start, tl.int64) * v_t, v_t, T - start, KEYS, D, BLOCK_D, MASK)
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
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, grad_b, grad_t, grad_h,
    SHARED: tl.constexpr, CAUSAL: tl.constexpr, DOCS: tl.constexpr,
    D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCK_D: tl.constexpr, EDGE_STAGES: tl.constexpr,
):  # fmt: skip
    """dq (B, T, H, D) of one tile of queries, and delta (B, H, T), the row sums of out * grad: grid (tiles, H, B)."""
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS
    head, batch = tl.program_id(1), tl.program_id(2)
    rows = first + tl.arange(0, ROWS)
    q_tile = load_tile(q + offset(batch, first, head, q_b, q_t, q_h), q_t, T - first, ROWS, D, BLOCK_D, True)
    grad += offset(batch, first, head, grad_b, grad_t, grad_h)
    grad_tile = load_tile(grad, grad_t, T - first, ROWS, D, BLOCK_D, True)
    dense = offset(batch, first, head, tl.cast(T, tl.int64) * H * D, H * D, D)
    out_tile = load_tile(out + dense, H * D, T - first, ROWS, D, BLOCK_D, True)
    row_sum = tl.sum(grad_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    statistics = (tl.cast(batch, tl.int64) * H + head) * T
    tl.store(delta + statistics + rows, row_sum, mask=rows < T)
    row_lse = tl.load(lse + statistics + rows, mask=rows < T, other=float("inf"))

    k += offset(batch, 0, head // SHARED, k_b, k_t, k_h)
    v += offset(batch, 0, head // SHARED, v_b, v_t, v_h)
    row_starts = rows
    if DOCS:
        doc_start += tl.cast(batch, tl.int64) * T
        row_starts = tl.load(doc_start + rows, mask=rows < T, other=0)
    begin, full_begin, full_end, end = key_spans(doc_start, first, T, CAUSAL, DOCS, ROWS, KEYS)

    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    if DOCS:
        acc = _backward_q_span(
            acc, q_tile, grad_tile, row_lse, row_sum, k, v, k_t, v_t, rows, row_starts, begin, full_begin, T,
            scale_log2, True, CAUSAL, DOCS, D, KEYS, BLOCK_D, EDGE_STAGES,
        )  # fmt: skip
    acc = _backward_q_span(
        acc, q_tile, grad_tile, row_lse, row_sum, k, v, k_t, v_t, rows, row_starts, full_begin, full_end, T,
        scale_log2, False, CAUSAL, DOCS, D, KEYS, BLOCK_D, EDGE_STAGES,
    )  # fmt: skip
    acc = _backward_q_span(
        acc, q_tile, grad_tile, row_lse, row_sum, k, v, k_t, v_t, rows, row_starts, full_end, end, T,
        scale_log2, True, CAUSAL, DOCS, D, KEYS, BLOCK_D, EDGE_STAGES,
    )  # fmt: skip
    store_tile(dq + dense, H * D, T - first, acc * scale, ROWS, D, BLOCK_D)


@triton.jit
def _backward_kv_span(
    dk, dv, k, v, q, grad, lse, delta, doc_start, q_t, grad_t, keys, begin, end, T, scale_log2,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, DOCS: tl.constexpr,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, EDGE_STAGES: tl.constexpr,
):  # fmt: skip
    """Adds the share of the queries begin..end to dk (still without the scale) and dv, both (KEYS, BLOCK_D)."""
    for start in tl.range(begin, end, ROWS, num_stages=EDGE_STAGES if MASK else None):
        start = tl.multiple_of(start, ROWS)
        rows = start + tl.arange(0, ROWS)
        q_tile = load_tile(q + tl.cast(start, tl.int64) * q_t, q_t, T - start, ROWS, D, BLOCK_D, MASK)
        if MASK:  # rows beyond T get an infinite log-sum-exp, so a probability of zero
            row_lse = tl.load(lse + rows, mask=rows < T, other=float("inf"))
            row_sum = tl.load(delta + rows, mask=rows < T, other=0.0)
        else:
            row_lse, row_sum = tl.load(lse + rows), tl.load(delta + rows)
        # Transposed, (KEYS, ROWS): the products with q and grad then read their tiles as they lie.
        p = tl.math.exp2(tl.dot(k, q_tile.T, input_precision="ieee") * scale_log2 - row_lse[None, :])
        if MASK:
            row_starts = rows
            if DOCS:
                row_starts = tl.load(doc_start + rows, mask=rows < T, other=0)
            p = tl.where(visible(rows[None, :], keys[:, None], row_starts[None, :], T, CAUSAL, DOCS), p, 0.0)
        grad_tile = load_tile(grad + tl.cast(start, tl.int64) * grad_t, grad_t, T - start, ROWS, D, BLOCK_D, MASK)
        dv = tl.dot(p.to(grad_tile.dtype), grad_tile, dv, input_precision="ieee")
        ds = p * (tl.dot(v, grad_tile.T, input_precision="ieee") - row_sum[None, :])
        dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def backward_kv_kernel(
    q, k, v, doc_start, doc_end, lse, grad, delta, dk, dv, T, H, scale, scale_log2,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, grad_b, grad_t, grad_h,
    SHARED: tl.constexpr, CAUSAL: tl.constexpr, DOCS: tl.constexpr,
    D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCK_D: tl.constexpr, EDGE_STAGES: tl.constexpr,
):  # fmt: skip
    """dk and dv (B, T, G, D) of one tile of keys, summed over the heads that share them: grid (tiles, G, B).

    doc_end (B, T): for each key the first query of a later document.
    """
    first = tl.program_id(0) * KEYS  # early keys are seen by most queries, so the longest start first here too
    group, batch = tl.program_id(1), tl.program_id(2)
    keys = first + tl.arange(0, KEYS)
    k_tile = load_tile(k + offset(batch, first, group, k_b, k_t, k_h), k_t, T - first, KEYS, D, BLOCK_D, True)
    v_tile = load_tile(v + offset(batch, first, group, v_b, v_t, v_h), v_t, T - first, KEYS, D, BLOCK_D, True)

    begin, full_begin, end = 0, 0, T
    full_end = T // ROWS * ROWS
    if CAUSAL:
        begin = first // ROWS * ROWS
        full_begin = tl.minimum(tl.cdiv(first + KEYS, ROWS) * ROWS, tl.cdiv(T, ROWS) * ROWS)
    if DOCS:
        doc_start += tl.cast(batch, tl.int64) * T
        doc_end += tl.cast(batch, tl.int64) * T
        full_end = tl.load(doc_end + first) // ROWS * ROWS
        end = tl.load(doc_end + tl.minimum(first + KEYS, T) - 1)
    full_end = tl.maximum(full_end, full_begin)

    acc_k = tl.zeros((KEYS, BLOCK_D), tl.float32)
    acc_v = tl.zeros((KEYS, BLOCK_D), tl.float32)
    for head in range(group * SHARED, group * SHARED + SHARED):
        q_head = q + offset(batch, 0, head, q_b, q_t, q_h)
        grad_head = grad + offset(batch, 0, head, grad_b, grad_t, grad_h)
        statistics = (tl.cast(batch, tl.int64) * H + head) * T
        if CAUSAL:
            acc_k, acc_v = _backward_kv_span(
                acc_k, acc_v, k_tile, v_tile, q_head, grad_head, lse + statistics, delta + statistics, doc_start,
                q_t, grad_t, keys, begin, tl.minimum(full_begin, end), T, scale_log2,
                True, CAUSAL, DOCS, D, ROWS, BLOCK_D, EDGE_STAGES,
            )  # fmt: skip
        acc_k, acc_v = _backward_kv_span(
            acc_k, acc_v, k_tile, v_tile, q_head, grad_head, lse + statistics, delta + statistics, doc_start,
            q_t, grad_t, keys, full_begin, full_end, T, scale_log2,
            False, CAUSAL, DOCS, D, ROWS, BLOCK_D, EDGE_STAGES,
        )  # fmt: skip
        acc_k, acc_v = _backward_kv_span(
            acc_k, acc_v, k_tile, v_tile, q_head, grad_head, lse + statistics, delta + statistics, doc_start,
            q_t, grad_t, keys, full_end, end, T, scale_log2,
            True, CAUSAL, DOCS, D, ROWS, BLOCK_D, EDGE_STAGES,
        )  # fmt: skip

    groups = H // SHARED
    dense = offset(batch, first, group, tl.cast(T, tl.int64) * groups * D, groups * D, D)
    store_tile(dk + dense, groups * D, T - first, acc_k * scale, KEYS, D, BLOCK_D)
    store_tile(dv + dense, groups * D, T - first, acc_v, KEYS, D, BLOCK_D)


@custom_op("attention")
def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """`attention` and the base-2 log-sum-exp (B, H, T) of its scores; shapes as there, widths up to 256, scale > 0."""
    B, T, H, D = q.shape
    q, k, v = _unit_stride(q), _unit_stride(k), _unit_stride(v)
    out = torch.empty(B, T, H, D, dtype=q.dtype, device=q.device)
    lse = torch.empty(B, H, T, dtype=torch.float32, device=q.device)
    config, constants = _launch("attention_forward", q, k, causal, doc_start)
    wrap_triton(forward_kernel)[(triton.cdiv(T, config["ROWS"]), H, B)](
        q, k, v, doc_start, out, lse, T, H, scale * LOG2_E,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], **constants, **config,
    )  # fmt: skip
    return out, lse


@attention_forward.register_fake
def _(q, k, v, doc_start, causal, scale):
    B, T, H, _ = q.shape
    lse = torch.empty(B, H, T, dtype=torch.float32, device=q.device)
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), lse


@custom_op("attention_backward")
def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor | None, out: Tensor, lse: Tensor,
    causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v, contiguous; the same bits every time."""
    B, T, H, D = q.shape
    G = k.shape[2]
    grad, q, k, v = (_unit_stride(x) for x in (grad, q, k, v))
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    delta = torch.empty_like(lse)
    strides = *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad.stride()[:3]
    config, constants = _launch("attention_backward_q", q, k, causal, doc_start)
    wrap_triton(backward_q_kernel)[(triton.cdiv(T, config["ROWS"]), H, B)](
        q, k, v, doc_start, out, lse, grad, delta, dq, T, H, scale, scale * LOG2_E, *strides, **constants, **config
    )
    doc_end = None
    if doc_start is not None:
        keys = torch.arange(T, dtype=doc_start.dtype, device=q.device).expand(B, T).contiguous()
        doc_end = torch.searchsorted(doc_start.contiguous(), keys, right=True, out_int32=True)
    config, constants = _launch("attention_backward_kv", q, k, causal, doc_start)
    wrap_triton(backward_kv_kernel)[(triton.cdiv(T, config["KEYS"]), G, B)](
        q, k, v, doc_start, doc_end, lse, grad, delta, dk, dv, T, H, scale, scale * LOG2_E, *strides,
        **constants, **config,
    )  # fmt: skip
    return dq, dk, dv


@attention_backward.register_fake
def _(grad, q, k, v, doc_start, out, lse, causal, scale):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))


def _context(ctx, inputs, output):
    q, k, v, doc_start, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, doc_start, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad, _):
    return *attention_backward(grad, *ctx.saved_tensors, ctx.causal, ctx.scale), None, None, None


attention_forward.register_autograd(_gradients, setup_context=_context)


def takes(q: Tensor) -> bool:
    """Whether the kernels serve these queries: widths up to 256, and 16 bits, except under the interpreter.

    fp32 on a GPU stays with PyTorch: exact fp32 products in registers spill at every useful tile.
    """
    return q.shape[-1] <= 256 and (q.dtype in (torch.float16, torch.bfloat16) or interpreting())


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _launch(kernel: str, q: Tensor, k: Tensor, causal: bool, doc_start: Tensor | None) -> tuple[dict, dict]:
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


KERNELS = {
    "attention_forward": forward_kernel,
    "attention_backward_q": backward_q_kernel,
    "attention_backward_kv": backward_kv_kernel,
}


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


def compile_cases() -> list[Case]:
    """Every launch configuration of every chip that runs attention in Triton, with and without documents."""
    return [
        element_case(name, kernel, target, dtype, width, docs=docs, D=D)
        for target in triton_targets("attention")
        for name, kernel in KERNELS.items()
        for width, D in ((16, 16), (32, 32), (64, 64), (64, 48), (128, 128), (128, 80), (256, 256))
        for dtype, docs in (("bf16", False), ("fp16", True))
        if D == width or docs
    ]
