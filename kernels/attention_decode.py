"""Attention of the newest tokens against a key/value cache, split over the cache so that few heads still fill a GPU.

Shapes: B batch, Tn new tokens, H query heads, G key/value heads, D head width, S cache entries.
"""

from dataclasses import replace

import torch
from torch import Tensor

from kernels.aot import Case, triton_targets
from kernels.attention import check_heads, sdpa
from kernels.attention_forward import attend_span
from kernels.attention_tiles import FLOOR, element_case, offset, takes
from kernels.custom_op import custom_op, wrap_triton
from kernels.dispatch import LOG2_E, backend, chip, interpreting, processors, tl, triton
from kernels.launch_configs import launch_config

MAX_SPLITS = 64


def attention_decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, length: int) -> Tensor:
    """Attention of the newest tokens over a cache that already holds their keys and values.

    q (B, Tn, H, D) the newest Tn tokens; caches (B, S, G, D), any strides with the last one 1, with `length` valid
    entries, the newest included. Query t sees the entries before length - Tn + t + 1. Returns (B, Tn, H, D) in q's
    dtype; not differentiable. Raises ValueError for shapes that do not fit. (Dao et al., Flash-Decoding, 2023)
    """
    check_heads(q, k_cache, v_cache)
    if not q.shape[1] <= length <= k_cache.shape[1]:
        raise ValueError(f"attention_decode: {q.shape[1]} new tokens, length {length}, cache of {k_cache.shape[1]}")
    # Rows that do not begin at 16 bytes make the kernel spill, and padding here would copy the cache.
    aligned = q.shape[-1] % 16 == 0 or interpreting()
    if aligned and takes(q) and backend("attention_decode", q.device) == "triton":
        return _decode(q, k_cache, v_cache, length)
    k, v = k_cache[:, :length], v_cache[:, :length]
    new, mask = q.shape[1], None
    if 1 < new < length:
        mask = torch.ones(new, length, dtype=torch.bool, device=q.device).tril(length - new)
    return sdpa(q, k, v, q.shape[-1] ** -0.5, causal=new == length, mask=mask)


@triton.jit(do_not_specialize=["length", "keys_per_split"])
def decode_kernel(
    q, k, v, parts, parts_lse, length, keys_per_split, B, NEW, H, scale_log2,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    SHARED: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCK_D: tl.constexpr, EDGE_STAGES: tl.constexpr,
):  # fmt: skip
    """Attention over one stretch of the cache: parts fp32 (splits, B, Tn, H, D), parts_lse (splits, B, Tn, H).

    Where the stretch is all, parts is the result itself, in its dtype, and parts_lse None.
    A tile's rows are the (token, head) pairs that read the same key head: grid (splits, row tiles * G, B).
    """
    split, batch = tl.program_id(0), tl.program_id(2)
    group, tile = tl.program_id(1) % (H // SHARED), tl.program_id(1) // (H // SHARED)
    pair = tile * ROWS + tl.arange(0, ROWS)
    token, head = pair // SHARED, group * SHARED + pair % SHARED
    inside = token < NEW
    d = tl.arange(0, BLOCK_D)
    where = offset(batch, token, head, q_b, q_t, q_h)
    q_tile = tl.load(q + where[:, None] + d[None, :], mask=inside[:, None] & (d[None, :] < D), other=0.0)

    begin = split * keys_per_split
    end = tl.minimum(begin + keys_per_split, length)
    last_seen = length - NEW + token
    acc, m, l = attend_span(
        tl.zeros((ROWS, BLOCK_D), tl.float32), tl.full((ROWS,), FLOOR, tl.float32), tl.zeros((ROWS,), tl.float32),
        q_tile, k + offset(batch, 0, group, k_b, k_t, k_h), v + offset(batch, 0, group, v_b, v_t, v_h), k_t, v_t,
        batch, group, last_seen, last_seen, begin, end, length, scale_log2,
        True, True, False, D, KEYS, BLOCK_D, EDGE_STAGES, False,
    )  # fmt: skip
    l = tl.where(l == 0.0, 1.0, l)  # a stretch that no query of the tile sees: its weight becomes 0
    row = ((tl.cast(split, tl.int64) * B + batch) * NEW + token) * H + head
    part = (acc / l[:, None]).to(parts.dtype.element_ty)
    tl.store(parts + row[:, None] * D + d[None, :], part, mask=inside[:, None] & (d[None, :] < D))
    if parts_lse is not None:
        tl.store(parts_lse + row, m + tl.math.log2(l), mask=inside)


@triton.jit(do_not_specialize=["splits"])
def combine_kernel(parts, parts_lse, out, splits, rows, D: tl.constexpr, SPLITS: tl.constexpr, BLOCK_D: tl.constexpr):
    """out (rows, D), the mean of parts (splits, rows, D) weighted by 2^lse: grid (rows,)."""
    row = tl.cast(tl.program_id(0), tl.int64)
    s, d = tl.arange(0, SPLITS), tl.arange(0, BLOCK_D)
    lse = tl.load(parts_lse + s * tl.cast(rows, tl.int64) + row, mask=s < splits, other=float("-inf"))
    weight = tl.math.exp2(lse - tl.max(lse, 0))
    where = (s[:, None] * tl.cast(rows, tl.int64) + row) * D + d[None, :]
    part = tl.load(parts + where, mask=(s[:, None] < splits) & (d[None, :] < D), other=0.0)
    mean = tl.sum(part * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(out + row * D + d, mean.to(out.dtype.element_ty), mask=d < D)


@custom_op("attention_decode")
def _decode(q: Tensor, k: Tensor, v: Tensor, length: int) -> Tensor:
    B, new, H, D = q.shape
    G = k.shape[2]
    shared, width = H // G, max(16, triton.next_power_of_2(D))
    kernel = "attention_decode" if new * shared <= 16 else "attention_decode_many"
    config = launch_config(chip(q.device), kernel, width)
    tiles = triton.cdiv(new * shared, config["ROWS"])
    keys_per_split = _keys_per_split(length, config["KEYS"], B * G * tiles, processors(q.device))
    splits = triton.cdiv(length, keys_per_split)
    out = torch.empty(B, new, H, D, dtype=q.dtype, device=q.device)
    parts, parts_lse = out, None
    if splits > 1:
        parts = torch.empty(splits, B, new, H, D, dtype=torch.float32, device=q.device)
        parts_lse = torch.empty(splits, B, new, H, dtype=torch.float32, device=q.device)
    wrap_triton(decode_kernel)[(splits, tiles * G, B)](
        q, k, v, parts, parts_lse, length, keys_per_split, B, new, H, D**-0.5 * LOG2_E,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        SHARED=shared, D=D, BLOCK_D=width, **config,
    )  # fmt: skip
    if splits > 1:
        rows = B * new * H
        wrap_triton(combine_kernel)[(rows,)](
            parts, parts_lse, out, splits, rows, D=D, SPLITS=triton.next_power_of_2(splits), BLOCK_D=width
        )
    return out


@_decode.register_fake
def _(q, k, v, length):
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def _keys_per_split(length: int, keys: int, programs: int, processors: int) -> int:
    """Entries that one program reads, a multiple of `keys`: two programs a processor, at least four tiles each."""
    splits = min(MAX_SPLITS, max(1, 2 * processors // programs), max(1, length // (4 * keys)))
    return triton.cdiv(triton.cdiv(length, splits), keys) * keys


def compile_cases() -> list[Case]:
    """Both tile heights at every width on every chip that decodes in Triton, of parts and of all; the combination."""
    cases = []
    for target in triton_targets("attention_decode"):
        for name in ("attention_decode", "attention_decode_many"):
            for width in (16, 32, 64, 128, 256):
                parts = element_case(name, decode_kernel, target, "bf16", width, shared=4, D=width)
                signature, constants = parts.signature | {"parts": "*bf16"}, parts.constants | {"parts_lse": None}
                label = f"{parts.label} in one stretch"
                cases += [parts, replace(parts, label=label, signature=signature, constants=constants)]
        for width in (64, 256):
            cases.append(
                Case(
                    op="attention_decode",
                    label=f"combine w{width} {target}",
                    kernel=combine_kernel,
                    signature={"parts": "*fp32", "parts_lse": "*fp32", "out": "*bf16", "splits": "i32", "rows": "i32"},
                    constants={"D": width, "SPLITS": MAX_SPLITS, "BLOCK_D": width},
                    targets=(target,),
                )
            )
    return cases
