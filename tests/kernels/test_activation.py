"""Bias and activation on both paths against fp64, and what they keep for the backward pass."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

from kernels import bias_activation
from kernels.activation import KINDS, _bias_activation_backward_op, _bias_activation_op

PATHS = ["torch", "triton"]
DTYPES = [torch.float32, torch.float16]


def plain(x, bias, kind):
    z = x if bias is None else x + bias
    if kind == "relu":
        return F.relu(z)
    return F.gelu(z, approximate="tanh" if kind == "gelu_tanh" else "none")


def results(run, x, bias, kind, grad):
    tensors = (x,) if bias is None else (x, bias)
    y = run(x, bias, kind)
    return y, *torch.autograd.grad(y, tensors, grad.to(y.dtype))


def check(context, shape, kind, dtype, with_bias, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    # Rows apart, as a slice of a wider tensor has them; values on all branches of the functions.
    x = (2 * torch.randn(*shape[:-1], shape[-1] + 5, generator=generator)).to(device, dtype)[..., :-5].requires_grad_()
    bias = torch.randn(shape[-1], generator=generator).to(device, dtype).requires_grad_() if with_bias else None
    grad = torch.randn(shape, generator=generator).to(device, dtype)
    with context:
        ours = results(bias_activation, x, bias, kind, grad)
    double = None if bias is None else bias.detach().double().requires_grad_()
    exact = results(plain, x.detach().double().requires_grad_(), double, kind, grad)
    own = results(plain, x, bias, kind, grad)
    for i, (a, b, e) in enumerate(zip(ours, own, exact, strict=True)):
        assert a.dtype == dtype and a.shape == e.shape
        slack = 1e-6 if dtype == torch.float32 else 1e-3
        assert (a - e).abs().max() <= (3 if i else 2) * (b - e).abs().max() + slack * e.abs().max()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(5, 40), (131, 59), (2, 3, 1023), (9, 3072)])
def test_values_and_gradients(path, dtype, kind, shape, kernel_path):
    check(kernel_path(path), shape, kind, dtype, True)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", KINDS)
def test_without_bias(path, kind, kernel_path):
    check(kernel_path(path), (7, 111), kind, torch.float32, False)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", KINDS)
def test_far_values_and_nan(path, kind, kernel_path):
    x = torch.tensor([[-1e4, -30.0, 0.0, 30.0, 1e4, float("nan")]], requires_grad=True)
    with kernel_path(path):
        y = bias_activation(x, None, kind)
        (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    torch.testing.assert_close(y, torch.tensor([[0.0, 0.0, 0.0, 30.0, 1e4, float("nan")]]), equal_nan=True)
    middle = 0.0 if kind == "relu" else 0.5
    torch.testing.assert_close(grad[0, :5], torch.tensor([0.0, 0.0, middle, 1.0, 1.0]))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", KINDS)
def test_keeps_only_its_inputs(path, kind, kernel_path):
    x, bias = torch.randn(8, 40, requires_grad=True), torch.randn(40, requires_grad=True)
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t)
    with kernel_path(path), hooks:
        bias_activation(x, bias, kind)
    assert sorted(kept) == sorted([x.data_ptr(), bias.data_ptr()])


def test_bias_gradient_is_the_same_bits_every_time(triton_path):
    x, bias = torch.randn(131, 59), torch.randn(59, requires_grad=True)
    first, second = (torch.autograd.grad(bias_activation(x, bias, "gelu").sum(), bias)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_refuses_an_unknown_kind():
    with pytest.raises(ValueError, match="'swish', expected one of gelu"):
        bias_activation(torch.randn(3), None, "swish")


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind, kernel_path):
    x, bias = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 5), (5,)))
    with kernel_path("torch"):
        assert torch.autograd.gradcheck(lambda x, bias: bias_activation(x, bias, kind), (x, bias))


def test_ops_are_registered_right(triton_path):
    x, bias = torch.randn(6, 40, requires_grad=True), torch.randn(40, requires_grad=True)
    torch.library.opcheck(_bias_activation_op.overload, (x, bias, 0))
    torch.library.opcheck(_bias_activation_op.overload, (x, None, 1))
    torch.library.opcheck(_bias_activation_backward_op.overload, (x.detach(), x.detach(), bias.detach(), 2))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [1023, 3072, 6400, 10240])
def test_on_a_gpu(dtype, kind, width):
    check(nullcontext(), (4099, width), kind, dtype, True, "cuda")
