"""Attention on both paths against its definition in fp64: values, gradients, odd sizes, documents, memory, bits."""

import contextlib

import pytest
import torch
import torch.nn.functional as F

from kernels import attention, attention_decode, attention_packed, attention_tiles, dispatch
from kernels.attention import attention_reference, chunked
from kernels.attention_backward import attention_backward, attention_packed_backward
from kernels.attention_forward import KERNELS, attention_forward, attention_packed_forward
from kernels.attention_tiles import offset
from kernels.dispatch import tl, triton
from kernels.launch_configs import use_launch_config

PATHS = ["torch", "triton"]


def packed(B, T, H, G, D, dtype, seed=0):
    """q, k, v as the views of one projection, as the model has them, and the projection."""
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(B, T, (H + 2 * G) * D, generator=generator).to(dtype).requires_grad_()
    return qkv, *qkv.view(B, T, -1, D).split([H, G, G], 2)


def document_starts(B, T, share, seed=0):
    """Random boundaries, about `share` of the tokens begin a document."""
    begins = torch.rand(B, T, generator=torch.Generator().manual_seed(seed)) < share
    begins[:, 0] = True
    return torch.where(begins, torch.arange(T), 0).cummax(1).values.int()


def with_gradient(run, qkv, H, G, D, grad):
    leaf = qkv.detach().clone().requires_grad_()
    out = run(*leaf.view(*leaf.shape[:2], -1, D).split([H, G, G], 2))
    return out, torch.autograd.grad(out, leaf, grad.to(out.dtype))[0]


def check(path_context, B, T, H, G, D, dtype, *, causal=True, doc_start=None, scale=None):
    """Errors at most 2 (value) and 3 (gradient) times those of PyTorch's own op in the same precision."""
    qkv, *_ = packed(B, T, H, G, D, dtype)
    grad = torch.randn(B, T, H, D, generator=torch.Generator().manual_seed(1)).to(dtype)
    options = {"causal": causal, "doc_start": doc_start, "scale": scale}

    def torchs_own(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        mask = torch.ones(T, T, dtype=torch.bool).tril() if causal else torch.ones(T, T, dtype=torch.bool)
        mask = mask if doc_start is None else mask & (torch.arange(T) >= doc_start[:, None, :, None])
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True).transpose(1, 2)

    with path_context:
        out, gradient = with_gradient(lambda q, k, v: attention(q, k, v, **options), qkv, H, G, D, grad)
    exact, exact_gradient = with_gradient(
        lambda q, k, v: attention_reference(q, k, v, **options), qkv.double(), H, G, D, grad
    )
    own, own_gradient = with_gradient(torchs_own, qkv, H, G, D, grad)
    assert out.dtype == dtype and out.shape == (B, T, H, D)
    slack = 5e-6 if dtype == torch.float32 else 2e-3
    assert (out - exact).abs().max() <= 2 * (own - exact).abs().max() + slack
    assert (gradient - exact_gradient).abs().max() <= 3 * (own_gradient - exact_gradient).abs().max() + slack


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("T", [1, 2, 17, 97, 200, 257])
def test_lengths(path, dtype, T, kernel_path):
    check(kernel_path(path), 1, T, 2, 1, 32, dtype)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("D", [16, 40, 59, 64, 80, 111, 128, 256])
def test_widths(path, D, kernel_path):
    check(kernel_path(path), 1, 49, 2, 2, D, torch.float16)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("T, share", [(1, 1.0), (97, 0.05), (97, 0.5), (200, 0.01), (257, 0.02), (200, 1.0)])
def test_documents(path, T, share, kernel_path):
    B = 2 if T < 100 else 1
    check(kernel_path(path), B, T, 2, 1, 16, torch.float32, doc_start=document_starts(B, T, share))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)])
def test_grouped_heads_scale_and_no_mask(path, heads, kernel_path):
    check(kernel_path(path), 1, 41, *heads, 16, torch.float32, causal=False, scale=0.3)


@pytest.mark.parametrize("path", PATHS)
def test_a_document_is_as_if_alone(path, kernel_path):
    _, q, k, v = packed(1, 150, 2, 2, 16, torch.float32)
    doc_start = torch.zeros(1, 150, dtype=torch.int32)
    doc_start[:, 70:] = 70
    with kernel_path(path):
        together = attention(q, k, v, doc_start=doc_start)
        alone = attention(q[:, 70:], k[:, 70:], v[:, 70:])
    torch.testing.assert_close(together[:, 70:], alone, rtol=1e-5, atol=1e-6)


def test_boundaries_that_change_in_place_are_seen():
    """Lengths of documents are remembered with their tensor; writing other boundaries into it must not fool them."""
    _, q, k, v = packed(1, 300, 2, 2, 16, torch.float32)
    doc_start = document_starts(1, 300, 0.02)
    for _ in range(2):
        exact = attention_reference(q, k, v, doc_start=doc_start)
        torch.testing.assert_close(attention(q, k, v, doc_start=doc_start), exact, rtol=1e-4, atol=1e-5)
        doc_start.copy_(document_starts(1, 300, 0.02, seed=1))
    with torch.inference_mode():
        doc_start = document_starts(1, 300, 0.02)
        out = attention(q, k, v, doc_start=doc_start)
    torch.testing.assert_close(out, attention_reference(q, k, v, doc_start=doc_start), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_any_strides(path, kernel_path):
    """Heads before tokens, a last stride that is not 1, an expanded gradient: all as the contiguous tensors."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 33, 16, generator=generator).transpose(1, 2) for _ in range(3))
    odd = torch.randn(2, 33, 2, 32, generator=generator)[..., ::2]
    with kernel_path(path):
        for inputs in ((q, k, v), (odd, k, odd)):
            inputs = [x.detach().requires_grad_() for x in inputs]
            plain = [x.detach().contiguous().requires_grad_() for x in inputs]
            out, expected = attention(*inputs), attention(*plain)
            torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
            for a, b in zip(torch.autograd.grad(out.sum(), inputs), torch.autograd.grad(expected.sum(), plain)):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.fixture
def through_descriptors(triton_path, monkeypatch):
    """through_descriptors(width): kernels load tiles of that width by descriptors; returns whom these were made of."""
    described, describe = [], attention_tiles.describe
    monkeypatch.setattr(attention_tiles, "describe", lambda *of: described.append(of[0].shape) or describe(*of))
    config = {"ROWS": 32, "KEYS": 16, "num_warps": 4, "num_stages": 2, "EDGE_STAGES": None, "TMA": 1}
    with contextlib.ExitStack() as stack:

        def launch(width):
            for kernel in KERNELS:
                stack.enter_context(use_launch_config(kernel, width, config))
                stack.enter_context(use_launch_config(f"{kernel}_pointers", width, config | {"TMA": 0}))
            return described

        yield launch


@pytest.mark.parametrize(
    "T, H, G, D, share", [(97, 2, 1, 16, None), (52, 2, 2, 40, 0.1), (4, 1, 1, 64, None), (36, 3, 1, 32, 0.0)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_tiles_through_descriptors(through_descriptors, T, H, G, D, share, dtype):
    described = through_descriptors(max(16, triton.next_power_of_2(D)))
    documents = None if share is None else document_starts(2, T, share)
    check(contextlib.nullcontext(), 2, T, H, G, D, dtype, doc_start=documents)
    assert len(described) == 3 + 4 + (6 if T % 4 == 0 else 0)  # numbers of rows have to begin at 16 bytes, too


def test_what_no_descriptor_can_describe_goes_through_pointers(through_descriptors):
    """Keys expanded over a batch, rows that do not begin at 16 bytes, nothing at all."""
    described = through_descriptors(16)
    _, q, k, v = packed(2, 33, 2, 2, 16, torch.float32)
    shared, odd = k[:1].expand(2, -1, -1, -1), torch.randn(2, 33, 2, 17)[..., :16]
    for inputs in ((q, shared, v), (odd, k, v), (q[:0], k[:0], v[:0])):
        torch.testing.assert_close(attention(*inputs), attention_reference(*inputs), rtol=1e-4, atol=1e-5)
    assert not described
    attention(q, k, v)
    assert len(described) == 3


def test_without_a_tile_of_their_own_pointers_take_the_descriptors(triton_path):
    """As a candidate of the tuner at an odd length, where the table has none."""
    config = {"ROWS": 16, "KEYS": 32, "num_warps": 4, "num_stages": 2, "EDGE_STAGES": None, "TMA": 1}
    with use_launch_config("attention_backward_kv", 16, config):
        check(contextlib.nullcontext(), 2, 33, 2, 1, 16, torch.float16)


@pytest.mark.parametrize("documents", [False, True])
def test_same_bits_every_time(documents, triton_path):
    qkv, q, k, v = packed(1, 97, 2, 1, 32, torch.float16)
    doc_start = document_starts(1, 97, 0.05) if documents else None
    first, second = (torch.autograd.grad(attention(q, k, v, doc_start=doc_start).sum(), qkv)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("documents", [False, True])
def test_kept_memory_is_linear_in_length(path, documents, kernel_path):
    def kept_bytes(T):
        seen = {}

        def pack(x):
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        _, q, k, v = packed(1, T, 2, 2, 16, torch.float32)
        doc_start = document_starts(1, T, 0.01) if documents else None
        with kernel_path(path), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            attention(q, k, v, doc_start=doc_start)
        return sum(seen.values())

    short, long = (128, 256) if path == "triton" else (1024, 4096)
    assert kept_bytes(long) <= 1.1 * long / short * kept_bytes(short)


def test_chip_without_a_fused_attention(kernel_path):
    """The chunked products that such a chip gets, with chunks smaller than the sequence."""
    dispatch.force_chip("hip:gfx906")
    try:
        for doc_start in (None, document_starts(2, 97, 0.05)):
            check(kernel_path("torch"), 2, 97, 4, 2, 16, torch.float32, doc_start=doc_start)
    finally:
        dispatch.force_chip(None)


def test_offsets_pass_two_to_the_31(triton_path):
    @triton.jit
    def kernel(out, batch, row, head, stride_b, stride_t, stride_h):
        tl.store(out, offset(batch, row, head, stride_b, stride_t, stride_h))

    out = torch.zeros(1, dtype=torch.int64)
    kernel[(1,)](out, 3, 100_000, 7, 2_000_000_000, 40_000, 64)
    assert out.item() == 3 * 2_000_000_000 + 100_000 * 40_000 + 7 * 64


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "new, length, size, H, G, D",
    [(1, 1, 8, 2, 2, 16), (1, 97, 128, 4, 2, 16), (5, 200, 256, 4, 1, 40), (17, 17, 17, 2, 2, 59),
     (40, 300, 300, 2, 1, 64), (1, 1025, 1100, 2, 1, 128)],
)  # fmt: skip
def test_decode(path, dtype, new, length, size, H, G, D, kernel_path):
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, size, 2 * G, D, generator=generator).to(dtype).split(G, 2)
    q = torch.randn(2, new, H, D, generator=generator).to(dtype)
    with kernel_path(path):
        out = attention_decode(q, k, v, length)
    before = torch.zeros(2, length - new, H, D, dtype=torch.float64)
    exact = attention_reference(torch.cat((before, q), 1), k[:, :length].double(), v[:, :length].double())
    assert out.dtype == dtype
    assert (out - exact[:, length - new :]).abs().max() <= (5e-6 if dtype == torch.float32 else 2e-3)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("D", [16, 24])
def test_packed_is_the_same_with_its_gradient_in_one_piece(path, documents, D, kernel_path):
    doc_start = document_starts(2, 37, 0.1) if documents else None
    qkv = torch.randn(2, 37, 3, 2, D, generator=torch.Generator().manual_seed(0)).requires_grad_()
    grad = torch.randn(2, 37, 2, D, generator=torch.Generator().manual_seed(1))
    with kernel_path(path), torch.profiler.profile() as profiled:
        out = attention_packed(qkv, doc_start=doc_start)
        gradient = torch.autograd.grad(out, qkv, grad)[0]
    with kernel_path(path):
        apart = attention(*qkv.unbind(2), doc_start=doc_start)
        theirs = torch.autograd.grad(apart, qkv, grad)[0]
    assert torch.equal(out, apart) and torch.equal(gradient, theirs)
    stacked = any(event.key == "aten::stack" for event in profiled.key_averages())
    assert stacked == (path == "torch" or D == 24)  # there PyTorch puts three gradients together


def test_operators_keep_their_contract(triton_path):
    for doc_start in (None, document_starts(1, 17, 0.1)):
        _, q, k, v = packed(1, 17, 2, 1, 16, torch.float32)
        torch.library.opcheck(attention_forward.overload, (q, k, v, doc_start, True, 0.25))
        torch.library.opcheck(chunked.overload, (q, k, v, doc_start, True, 0.25))
        q, k, v = q.detach(), k.detach(), v.detach()
        out, lse = attention_forward(q, k, v, doc_start, True, 0.25)
        torch.library.opcheck(attention_backward.overload, (out, q, k, v, doc_start, out, lse, True, 0.25))
        qkv = torch.randn(1, 17, 3, 2, 16, requires_grad=True)
        torch.library.opcheck(attention_packed_forward.overload, (qkv, doc_start, True, 0.25))
        packed_backward = attention_packed_backward.overload
        torch.library.opcheck(packed_backward, (out, qkv.detach(), doc_start, out, lse, True, 0.25))


def test_bad_shapes_say_so():
    x = torch.zeros(1, 4, 3, 16)
    with pytest.raises(ValueError, match="H a multiple of G"):
        attention(x, x[:, :, :2], x[:, :, :2])
    with pytest.raises(ValueError, match="one dtype"):
        attention(x, x.half(), x.half())
    with pytest.raises(ValueError, match="k has"):
        attention(x, x[:, :2], x[:, :2])
    with pytest.raises(ValueError, match="doc_start"):
        attention(x, x, x, causal=False, doc_start=torch.zeros(1, 4, dtype=torch.int32))
    with pytest.raises(ValueError, match="length 9"):
        attention_decode(x, x, x, 9)
