"""Row softmax on both paths against fp64: values, gradients, masks, empty rows."""

from contextlib import nullcontext

import pytest
import torch

from kernels import softmax
from kernels.softmax import _softmax_backward_op, _softmax_op

PATHS = ["torch", "triton"]
DTYPES = [torch.float32, torch.float16]


def hidden(x, causal):
    if not causal:
        return x
    rows, columns = (torch.arange(size, device=x.device) for size in x.shape[-2:])
    return x.masked_fill(columns > rows[:, None] + x.shape[-1] - x.shape[-2], float("-inf"))


def definition(x, causal=False, temperature=1.0):
    """exp(x / temperature), masked, over its sum; rows of -inf become 0."""
    z = hidden(x, causal).double() / temperature
    e = (z - z.amax(-1, keepdim=True).clamp(min=-1e300)).exp()
    return e / e.sum(-1, keepdim=True).clamp(min=1e-300)


def definition_gradient(p, grad, temperature):
    return p * (grad - (p * grad).sum(-1, keepdim=True)) / temperature


def check(context, x, causal, temperature):
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x)
    x.requires_grad_()
    with context:
        p = softmax(x, causal=causal, temperature=temperature)
        (grad_x,) = torch.autograd.grad(p, x, grad)
    exact = definition(x.detach(), causal, temperature)
    exact_grad = definition_gradient(exact, grad.double(), temperature)
    assert p.dtype == grad_x.dtype == x.dtype
    own = torch.softmax(hidden(x, causal) / temperature, -1).nan_to_num(0)
    (own_grad,) = torch.autograd.grad(own, x, grad)
    slack = 1e-6 if x.dtype == torch.float32 else 1e-4
    assert (p - exact).abs().max() <= 2 * (own - exact).abs().max() + slack * exact.abs().max()
    largest = exact_grad.abs().max()
    assert (grad_x - exact_grad).abs().max() <= 3 * (own_grad.nan_to_num(0) - exact_grad).abs().max() + slack * largest


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7,), (5, 1), (130, 40), (2, 3, 59), (9, 111), (3, 1023), (2, 2560), (2, 9001)])
def test_values_and_gradients(path, dtype, shape, kernel_path):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3
    check(kernel_path(path), x.to(dtype), False, 0.7)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries, keys", [(1, 1), (17, 17), (1, 33), (5, 40), (9, 4), (97, 97), (3, 8300)])
def test_causal(path, dtype, queries, keys, kernel_path):
    x = torch.randn(2, 3, queries, keys, generator=torch.Generator().manual_seed(0))
    check(kernel_path(path), x.to(dtype), True, 1.3)
    with kernel_path(path):
        p = softmax(x, causal=True)
    visible = torch.ones(queries, keys).tril(keys - queries)
    assert torch.equal(p != 0, visible.bool().expand(p.shape))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("width", [40, 9001])
def test_rows_of_minus_infinity_are_zero(path, width, kernel_path):
    x = torch.randn(4, width)
    x[1], x[2, 1:] = float("-inf"), float("-inf")
    x.requires_grad_()
    with kernel_path(path):
        p = softmax(x)
        (grad,) = torch.autograd.grad(p, x, torch.randn(4, width))
    assert (p[1] == 0).all() and p[2, 0] == 1 and torch.isfinite(p).all()
    assert (grad[1] == 0).all() and torch.isfinite(grad).all()


def test_not_a_number_is_not_hidden(kernel_path):
    """Only rows of -inf become 0: one that holds NaN is NaN, whichever way the empty ones are looked for."""
    x = torch.randn(3, 8)
    x[0, 5], x[2] = float("nan"), float("-inf")
    with kernel_path("torch"):
        for rows in (x, x[:2]):
            p = softmax(rows)
            assert p[0].isnan().all() and torch.equal(p[1], torch.softmax(x[1], -1)) and (p[2:] == 0).all()


@pytest.mark.parametrize("path", PATHS)
def test_large_scores_and_strides(path, kernel_path):
    x = torch.randn(6, 80)[:, ::2] * 1e4
    with kernel_path(path):
        torch.testing.assert_close(softmax(x).double(), definition(x))
        torch.testing.assert_close(softmax(x.t()).double(), definition(x.t()))


def test_refuses_a_temperature_of_zero():
    with pytest.raises(ValueError, match="temperature"):
        softmax(torch.randn(3), temperature=0.0)


def test_gradcheck(kernel_path):
    x = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    with kernel_path("torch"):
        assert torch.autograd.gradcheck(lambda x: softmax(x, causal=True, temperature=0.7), x)


def test_ops_are_registered_right(triton_path):
    x = torch.randn(6, 40, requires_grad=True)
    torch.library.opcheck(_softmax_op.overload, (x, 3, 0.5))
    torch.library.opcheck(_softmax_backward_op.overload, (x.detach(), x.detach().softmax(1), 3, 0.5))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "queries, keys, causal", [(1024, 1024, True), (2048, 2560, True), (777, 1023, False), (64, 50257, False)]
)
def test_on_a_gpu(dtype, queries, keys, causal):
    x = torch.randn(2, 3, queries, keys, generator=torch.Generator().manual_seed(0))
    check(nullcontext(), x.cuda().to(dtype), causal, 0.7)
