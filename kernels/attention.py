"""Attention: causal, grouped-query, documents kept apart, in memory linear in the length.

Shapes: B batch, T tokens, H query heads, G key/value heads (H a multiple of G), D head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from kernels.attention_forward import attention_forward, attention_packed_forward
from kernels.attention_tiles import make_differentiable, takes
from kernels.custom_op import custom_op
from kernels.dispatch import backend, chip

# Up to these lengths one boolean mask (B, 1, T, T) for all heads beats a call for each document, and, in a compiled
# graph, which cannot depend on where documents end, the chunked products; it is then smaller than the activations.
_DENSE_MASK_LENGTH = 128
_DENSE_MASK_LENGTH_COMPILED = 1024


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, scale: float | None = None, doc_start: Tensor | None = None
) -> Tensor:
    """Softmax attention of every query over the keys that it may see.

    q (B, T, H, D); k and v (B, T, G, D), heads h share the key head h // (H / G); any strides with the last one 1, so
    views of a packed projection need no copy. scale defaults to D^-0.5. doc_start int32 (B, T) gives each token the
    position of its document's first token: query i then sees keys doc_start[i] <= j <= i. Returns (B, T, H, D) in q's
    dtype, statistics in fp32. The backward pass is deterministic in Triton and on a CPU. Raises ValueError for shapes
    that do not fit.
    (Dao, FlashAttention-2, 2023; Ainslie et al., GQA, 2023)
    """
    check_heads(q, k, v)
    if q.shape[:2] != k.shape[:2]:
        raise ValueError(f"attention: q has (B, T) = {tuple(q.shape[:2])}, k has {tuple(k.shape[:2])}")
    _check_documents(doc_start, q, causal)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if _in_triton(q) and scale > 0:
        return _attention_triton(q, k, v, doc_start, causal, scale)
    if doc_start is None:
        return _attention_plain(q, k, v, causal, scale)
    return _attention_documents(q, k, v, doc_start, scale)


def attention_packed(qkv: Tensor, *, doc_start: Tensor | None = None) -> Tensor:
    """Causal `attention` of qkv (B, T, 3, H, D), its queries, keys and values as a projection leaves them.

    Returns (B, T, H, D). In Triton the gradient is made in one piece as well, which saves the copy of three into one.
    Raises ValueError for shapes that do not fit.
    """
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(f"attention_packed: qkv {tuple(qkv.shape)} is not (B, T, 3, H, D)")
    q, k, v = qkv.unbind(2)
    if q.shape[-1] % 16 or not _in_triton(q):
        return attention(q, k, v, doc_start=doc_start)
    _check_documents(doc_start, q)
    doc_start = None if doc_start is None else doc_start.contiguous()
    return attention_packed_forward(qkv, doc_start, True, q.shape[-1] ** -0.5)[0]


def check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises ValueError unless q, k and v have one dtype and heads that fit each other."""
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"attention: q, k, v are {q.dtype}, {k.dtype}, {v.dtype}: one dtype for all")
    if k.shape != v.shape or q.shape[-1] != k.shape[-1] or q.shape[2] % k.shape[2]:
        shapes = ", ".join(str(tuple(t.shape)) for t in (q, k, v))
        raise ValueError(f"attention: q, k, v {shapes} are not (B, T, H, D), (B, T, G, D) twice with H a multiple of G")


def _check_documents(doc_start: Tensor | None, q: Tensor, causal: bool = True) -> None:
    if doc_start is not None and (not causal or doc_start.shape != q.shape[:2]):
        raise ValueError(f"attention: doc_start {tuple(doc_start.shape)} needs causal and shape {tuple(q.shape[:2])}")


def _in_triton(q: Tensor) -> bool:
    return backend("attention", q.device) == "triton" and takes(q)


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, scale: float | None = None, doc_start: Tensor | None = None
) -> Tensor:
    """`attention` by its definition, in the inputs' precision, holding every (T, T) score: the one to compare with."""
    B, T, H, D = q.shape
    k, v = (x.repeat_interleave(H // k.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * (D**-0.5 if scale is None else scale)
    if causal:
        scores = scores.masked_fill(~_visible(doc_start, 0, T, q.device), float("-inf"))
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)


def _visible(doc_start: Tensor | None, first: int, end: int, device: torch.device) -> Tensor:
    """Which keys before `end` the queries first..end see: bool (B or 1, 1, end - first, end)."""
    i, j = torch.arange(first, end, device=device)[:, None], torch.arange(end, device=device)
    mask = (j <= i)[None, None]
    return mask if doc_start is None else mask & (j >= doc_start[:, None, first:end, None])


def _attention_triton(q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor | None, causal: bool, scale: float) -> Tensor:
    D = q.shape[-1]
    if D % 16:  # rows that do not begin at 16 bytes are loaded one element at a time, and the kernels spill
        q, k, v = (F.pad(x, (0, -D % 16)) for x in (q, k, v))
    doc_start = None if doc_start is None else doc_start.contiguous()
    return attention_forward(q, k, v, doc_start, causal, scale)[0][..., :D]


def _attention_plain(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    if chip(q.device).sdpa == "none":
        return chunked(q, k, v, None, causal, scale)[0]
    return sdpa(q, k, v, scale, causal=causal)


def _attention_documents(q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor, scale: float) -> Tensor:
    """Three ways to keep documents apart without a (T, T) score per head."""
    B, T = q.shape[:2]
    if chip(q.device).sdpa == "none":
        return chunked(q, k, v, doc_start, True, scale)[0]
    compiling = torch.compiler.is_compiling()
    if T <= (_DENSE_MASK_LENGTH_COMPILED if compiling else _DENSE_MASK_LENGTH):
        return sdpa(q, k, v, scale, mask=_visible(doc_start, 0, T, q.device))
    if compiling:
        return chunked(q, k, v, doc_start, True, scale)[0]
    lengths = _document_lengths(doc_start)
    if len(lengths) == B:
        return sdpa(q, k, v, scale, causal=True)
    # One split for each of q, k, v: its backward pass is one concatenation, where slices would each add a full tensor.
    parts = (x.flatten(0, 1).split(lengths) for x in (q, k, v))
    outs = [sdpa(qd[None], kd[None], vd[None], scale, causal=True)[0] for qd, kd, vd in zip(*parts)]
    return torch.cat(outs).view(q.shape)


_lengths_seen = WeakIdKeyDictionary()  # every layer asks about the same tensor, and on a GPU each answer is a sync


def _document_lengths(doc_start: Tensor) -> list[int]:
    """Lengths of the documents, row after row; rows end documents."""
    version = None if doc_start.is_inference() else doc_start._version
    seen_version, lengths = _lengths_seen.get(doc_start, (None, []))
    if version is None or version != seen_version:
        B, T = doc_start.shape
        begins = (doc_start == torch.arange(T, device=doc_start.device)).flatten().nonzero().flatten()
        lengths = begins.diff(append=begins.new_tensor([B * T])).tolist()
        _lengths_seen[doc_start] = version, lengths
    return lengths


def sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool = False, mask: Tensor | None = None) -> Tensor:
    """F.scaled_dot_product_attention in our layout, with the inputs made such that a fused backend takes them."""
    D, shared = q.shape[-1], q.shape[2] // k.shape[2]
    if q.device.type == "cuda":
        if D % 8:  # no fused backend takes odd widths; zeros change nothing
            q, k, v = (F.pad(x, (0, -D % 8)) for x in (q, k, v))
        # Only flash attention shares key heads by itself, and it has no mask, no fp32 and no width above 256.
        flash = chip(q.device).sdpa == "flash" and mask is None and q.dtype != torch.float32 and D <= 256
        if shared > 1 and not flash:
            k, v = (x.repeat_interleave(shared, 2) for x in (k, v))
            shared = 1
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = {"enable_gqa": True} if shared > 1 else {}  # a branch, since torch.compile may make the ratio symbolic
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, **grouped)
    return out.transpose(1, 2)[..., :D]


@custom_op("attention_chunked", opaque=True)
def chunked(
    q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention by matrix products over chunks of queries, for chips without a fused one and for masks in a graph.

    Returns out (B, T, H, D) and the natural log-sum-exp fp32 (B, G, H / G, T), from which the backward pass computes
    the probabilities again.
    """
    B, T, H, D = q.shape
    out = torch.empty(B, T, H, D, dtype=q.dtype, device=q.device)
    lse = torch.empty(B, k.shape[2], H // k.shape[2], T, dtype=torch.float32, device=q.device)
    grouped_out = _grouped(out, k)
    for rows, seen in _chunks(q, k, causal):
        scores = _scores(q, k, doc_start, causal, scale, rows, seen)
        lse[..., rows] = scores.logsumexp(-1)
        p = scores.sub_(lse[..., rows, None]).exp_().to(q.dtype)
        grouped_out[..., rows, :] = p @ _keys(v, seen)
    return out, lse


@chunked.register_fake
def _(q, k, v, doc_start, causal, scale):
    B, T, H, _ = q.shape
    lse = torch.empty(B, k.shape[2], H // k.shape[2], T, dtype=torch.float32, device=q.device)
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), lse


@custom_op("attention_chunked_backward", opaque=True)
def _chunked_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor | None, out: Tensor, lse: Tensor, causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = (torch.zeros(k.shape, dtype=torch.float32, device=k.device) for _ in range(2))
    delta = _grouped((grad.float() * out.float()).sum(-1, keepdim=True), k)
    grad, grouped_q, grouped_dq = _grouped(grad, k), _grouped(q, k), _grouped(dq, k)
    for rows, seen in _chunks(q, k, causal):
        p = _scores(q, k, doc_start, causal, scale, rows, seen).sub_(lse[..., rows, None]).exp_()
        dp = (grad[..., rows, :] @ _keys(v, seen).mT).float()
        ds = (dp.sub_(delta[..., rows, :]).mul_(p) * scale).to(q.dtype)
        grouped_dq[..., rows, :] = ds @ _keys(k, seen)
        # The heads that share keys add up here; (B, G, R, keys, D) -> (B, keys, G, D)
        dk[:, seen] += (ds.mT @ grouped_q[..., rows, :]).sum(2, dtype=torch.float32).transpose(1, 2)
        dv[:, seen] += (p.to(q.dtype).mT @ grad[..., rows, :]).sum(2, dtype=torch.float32).transpose(1, 2)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


@_chunked_backward.register_fake
def _(grad, q, k, v, doc_start, out, lse, causal, scale):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))


make_differentiable(chunked, _chunked_backward)


def _chunks(q: Tensor, k: Tensor, causal: bool) -> list[tuple[slice, slice]]:
    """Queries of each chunk and the keys that it may see; about 64 MB of fp32 scores a chunk."""
    B, T, H, _ = q.shape
    size = max(16, 2**24 // (B * H * T))
    return [(slice(i, min(i + size, T)), slice(0, min(i + size, T) if causal else T)) for i in range(0, T, size)]


def _grouped(x: Tensor, k: Tensor) -> Tensor:
    """(B, T, H, D) -> (B, G, H / G, T, D), a view."""
    return x.unflatten(2, (k.shape[2], -1)).permute(0, 2, 3, 1, 4)


def _keys(x: Tensor, seen: slice) -> Tensor:
    """(B, T, G, D) -> (B, G, 1, keys, D), a view."""
    return x[:, seen].transpose(1, 2)[:, :, None]


def _scores(
    q: Tensor, k: Tensor, doc_start: Tensor | None, causal: bool, scale: float, rows: slice, seen: slice
) -> Tensor:
    """Masked scores of one chunk, fp32 (B, G, H / G, rows, keys)."""
    scores = (_grouped(q, k)[..., rows, :] @ _keys(k, seen).mT).float().mul_(scale)
    if causal:
        visible = _visible(doc_start, rows.start, rows.stop, q.device)
        scores.masked_fill_(~visible[:, :, None], float("-inf"))
    return scores
