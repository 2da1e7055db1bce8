"""Attention on a GPU, at real sizes, in the formats that models train in. Run with `pytest -m gpu`."""

import pytest
import torch
import torch.nn.functional as F

from kernels import attention, attention_decode, attention_packed, dispatch
from kernels.attention import attention_reference

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")


@pytest.fixture(autouse=True)
def triton_path():
    torch.manual_seed(0)
    if dispatch.backend("attention", DEVICE) != "triton":
        pytest.skip({op: why for op, _, why in dispatch.decisions(DEVICE)}["attention"])


def training_dtype():
    return getattr(torch, dispatch.chip(DEVICE).dtype)


def dtypes():
    return [pytest.param(d, id=str(d)) for d in (torch.bfloat16, torch.float16)]


def document_starts(B, T, share):
    begins = torch.rand(B, T, device=DEVICE) < share
    begins[:, 0] = True
    return torch.where(begins, torch.arange(T, device=DEVICE), 0).cummax(1).values.int()


def gradients(run, qkv, H, G, D, grad):
    leaf = qkv.detach().clone().requires_grad_()
    out = run(*leaf.view(*leaf.shape[:2], -1, D).split([H, G, G], 2))
    return out.detach(), torch.autograd.grad(out, leaf, grad.to(out.dtype))[0]


def torchs_own(q, k, v, doc_start):
    T = q.shape[1]
    mask = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
    if doc_start is not None:
        mask = mask & (torch.arange(T, device=q.device) >= doc_start[:, None, :, None])
    shared = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(shared, 2) for x in (k, v))
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), mask).transpose(1, 2)


@pytest.mark.parametrize("dtype", dtypes())
@pytest.mark.parametrize("documents", [False, True], ids=["plain", "documents"])
@pytest.mark.parametrize(
    "B, T, H, G, D",
    [(2, 2048, 12, 12, 64), (2, 2048, 8, 8, 128), (1, 1025, 8, 2, 64), (2, 200, 4, 1, 256), (1, 1000, 4, 4, 80),
     (2, 257, 3, 3, 40), (2, 97, 2, 1, 59), (3, 17, 2, 2, 16), (2, 2, 2, 2, 32), (1, 1, 2, 1, 111)],
)  # fmt: skip
def test_errors_are_those_of_the_precision(B, T, H, G, D, dtype, documents):
    qkv = torch.randn(B, T, (H + 2 * G) * D, device=DEVICE).to(dtype)
    grad = torch.randn(B, T, H, D, device=DEVICE).to(dtype)
    doc_start = document_starts(B, T, 4 / T) if documents else None
    out, gradient = gradients(lambda q, k, v: attention(q, k, v, doc_start=doc_start), qkv, H, G, D, grad)
    exact, exact_gradient = gradients(
        lambda q, k, v: attention_reference(q, k, v, doc_start=doc_start), qkv.double(), H, G, D, grad
    )
    own, own_gradient = gradients(lambda q, k, v: torchs_own(q, k, v, doc_start), qkv, H, G, D, grad)
    assert (out - exact).abs().max() <= 2 * (own - exact).abs().max() + 2e-3
    assert (gradient - exact_gradient).abs().max() <= 3 * (own_gradient - exact_gradient).abs().max() + 2e-3


@pytest.mark.parametrize("dtype", dtypes())
@pytest.mark.parametrize(
    "B, new, length, H, G, D", [(1, 1, 4001, 12, 12, 64), (8, 1, 1024, 32, 8, 128), (2, 70, 500, 8, 1, 80)]
)
def test_decode(B, new, length, H, G, D, dtype):
    k, v = torch.randn(2, B, length + 24, G, D, device=DEVICE).to(dtype)
    q = torch.randn(B, new, H, D, device=DEVICE).to(dtype)
    before = torch.zeros(B, length - new, H, D, device=DEVICE, dtype=torch.float64)
    exact = attention_reference(torch.cat((before, q), 1), k[:, :length].double(), v[:, :length].double())
    with dispatch.use_backend("torch"):
        own = attention_decode(q, k, v, length)
    exact = exact[:, length - new :]
    assert (attention_decode(q, k, v, length) - exact).abs().max() <= 2 * (own - exact).abs().max() + 1e-3


@pytest.mark.parametrize("documents", [False, True])
def test_a_hundred_backward_passes_have_the_same_bits(documents):
    qkv = torch.randn(4, 1024, 3 * 12 * 64, device=DEVICE, dtype=training_dtype(), requires_grad=True)
    doc_start = document_starts(4, 1024, 0.003) if documents else None
    grad = torch.randn(4, 1024, 12, 64, device=DEVICE, dtype=qkv.dtype)

    def once():
        out = attention_packed(qkv.view(4, 1024, 3, 12, 64), doc_start=doc_start)
        return torch.autograd.grad(out, qkv, grad)[0]

    first = once()
    assert all(torch.equal(once(), first) for _ in range(100))


def test_more_elements_than_32_bits_count():
    """A batch whose last sequence begins past element 2^31."""
    B, T, D = 2**14 + 1, 2048, 64
    free, _ = torch.cuda.mem_get_info()
    if free < 3 * B * T * D * 2 * 1.5:
        pytest.skip("needs 19 GB of GPU memory")
    q = torch.empty(B, T, 1, D, device=DEVICE, dtype=training_dtype())
    q[-1] = torch.randn(T, 1, D, device=DEVICE)
    with torch.no_grad():
        torch.testing.assert_close(attention(q, q, q)[-1:], attention(q[-1:].clone(), q[-1:], q[-1:]), rtol=0, atol=0)


def test_memory_is_linear_in_length():
    def peak_bytes(T):
        qkv = torch.randn(1, T, 3, 8, 64, device=DEVICE, dtype=training_dtype(), requires_grad=True)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        attention_packed(qkv).sum().backward()
        return torch.cuda.max_memory_allocated() - before

    assert peak_bytes(32768) <= 4.2 * peak_bytes(8192)


def test_inductor_takes_it_in_one_graph():
    def step(qkv, doc_start):
        return attention_packed(qkv.view(2, 512, 3, 4, 64), doc_start=doc_start)

    qkv = torch.randn(2, 512, 768, device=DEVICE, dtype=training_dtype(), requires_grad=True)
    doc_start = document_starts(2, 512, 0.01)
    out, compiled = step(qkv, doc_start), torch.compile(step, fullgraph=True)(qkv, doc_start)
    assert torch.equal(out, compiled)
    for a, b in zip(*(torch.autograd.grad(x, qkv, torch.ones_like(x)) for x in (out, compiled))):
        assert torch.equal(a, b)
