"""Layer norm on both paths against fp64: values, gradients, odd widths, strides, bits."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

from kernels import add_layer_norm, layer_norm
from kernels.layer_norm import _layer_norm_backward_op, _layer_norm_op

PATHS = ["torch", "triton"]
DTYPES = [torch.float32, torch.float16]


def leaves(n_rows, width, dtype, bias=True, seed=0):
    """x, residual (a slice, so rows are apart), weight and, if asked for, bias."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n_rows, width, generator=generator).to(dtype)
    residual = torch.randn(n_rows, width + 3, generator=generator).to(dtype)[:, :width]
    weight = 1 + 0.1 * torch.randn(width, generator=generator)
    tensors = [x, residual, weight.to(dtype)]
    if bias:
        tensors.append(torch.randn(width, generator=generator).to(dtype))
    return [t.requires_grad_() for t in tensors]


def plain(x, residual, weight, bias=None, *, eps=1e-5):
    s = x + residual
    return F.layer_norm(s, weight.shape, weight, bias, eps), s


def results(run, tensors, grads):
    """Outputs and the gradients of all tensors."""
    outputs = run(*tensors)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return *outputs, *torch.autograd.grad(outputs, tensors, [g.to(o) for g, o in zip(grads, outputs)])


def assert_close(ours, own, exact, n_outputs):
    """Errors at most 2 (outputs) and 3 (gradients) times those of PyTorch's op in the same precision."""
    for i, (a, b, e) in enumerate(zip(ours, own, exact, strict=True)):
        assert a.dtype == b.dtype and a.shape == e.shape
        slack = 1e-6 if a.dtype == torch.float32 else 1e-4
        bound = (2 if i < n_outputs else 3) * (b - e).abs().max() + slack * e.abs().max()
        assert (a - e).abs().max() <= bound


def check(context, tensors, run, own):
    grads = [torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    with context:
        ours = results(run, tensors, grads)
    exact = results(own, [t.detach().double().requires_grad_() for t in tensors], grads)
    own = results(own, tensors, grads)
    assert_close(ours, own, exact, len(ours) - len(tensors))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "n_rows, width",
    [(5, 1), (5, 40), (130, 59), (9, 111), (7, 1023), (17, 768), (1, 1024), (5, 1600), (3, 2560), (2, 9001)],
)
def test_with_residual(path, dtype, n_rows, width, kernel_path):
    check(kernel_path(path), leaves(n_rows, width, dtype), add_layer_norm, plain)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("n_rows, width", [(33, 40), (3, 768), (2, 8200)])
def test_alone(path, bias, n_rows, width, kernel_path):
    x, _, *rest = leaves(n_rows, width, torch.float32, bias)

    def own(x, weight, bias=None):
        return F.layer_norm(x, weight.shape, weight, bias)

    check(kernel_path(path), [x, *rest], layer_norm, own)


@pytest.mark.parametrize("path", PATHS)
def test_any_strides_and_leading_dimensions(path, kernel_path):
    x, residual = torch.randn(2, 24, 5).transpose(1, 2), torch.randn(2, 5, 48)[..., ::2]
    weight = torch.randn(24)
    grad = torch.randn(2, 24, 5).transpose(1, 2)
    tensors = [t.requires_grad_() for t in (x, residual, weight)]
    with kernel_path(path):
        y, s = add_layer_norm(*tensors)
        ours = torch.autograd.grad((y, s), tensors, (grad, grad))
    expected_y, expected_s = plain(*tensors)
    torch.testing.assert_close((y, s), (expected_y, expected_s))
    torch.testing.assert_close(ours, torch.autograd.grad((expected_y, expected_s), tensors, (grad, grad)))


@pytest.mark.parametrize("path", PATHS)
def test_either_output_alone_has_its_gradient(path, kernel_path):
    tensors = leaves(6, 40, torch.float32)
    grad = torch.randn(6, 40)
    for chosen in (0, 1):
        with kernel_path(path):
            ours = torch.autograd.grad(add_layer_norm(*tensors)[chosen], tensors, grad, allow_unused=True)
        expected = torch.autograd.grad(plain(*tensors)[chosen], tensors, grad, allow_unused=True)
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("path", PATHS)
def test_half_activations_with_full_weights(path, kernel_path):
    x, residual, weight, bias = leaves(9, 40, torch.float16)
    weight, bias = (t.detach().float().requires_grad_() for t in (weight, bias))
    with kernel_path(path):
        y, s = add_layer_norm(x, residual, weight, bias)
        grads = torch.autograd.grad(y.sum() + s.square().sum(), (x, weight, bias))
    assert (y.dtype, s.dtype, *(g.dtype for g in grads)) == (torch.float16,) * 3 + (torch.float32,) * 2


def test_statistics_survive_a_large_mean(triton_path):
    x = torch.randn(4, 768) + 3000
    exact = F.layer_norm(x.double(), (768,))
    assert (layer_norm(x, torch.ones(768)) - exact).abs().max() < 2e-3


def test_gradients_are_the_same_bits_every_time(triton_path):
    tensors = leaves(130, 59, torch.float32)
    first, second = (torch.autograd.grad(add_layer_norm(*tensors)[0].square().sum(), tensors) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(bias, kernel_path):
    tensors = [t.detach().double().requires_grad_() for t in leaves(3, 5, torch.float32, bias)]
    with kernel_path("torch"):
        assert torch.autograd.gradcheck(add_layer_norm, tensors)


def test_ops_are_registered_right(triton_path):
    x, residual, weight, bias = leaves(6, 40, torch.float32)
    torch.library.opcheck(_layer_norm_op.overload, (x, residual, weight, bias, 1e-5))
    torch.library.opcheck(_layer_norm_op.overload, (x, None, weight, None, 1e-5))
    x, residual, weight = x.detach(), residual.detach(), weight.detach()
    rstd = torch.rand(6)
    torch.library.opcheck(_layer_norm_backward_op.overload, (x, residual, x, weight, rstd, rstd, True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [768, 1023, 1024, 1280, 1600, 2048, 2560, 9001])
def test_on_a_gpu(dtype, width):
    tensors = [t.detach().cuda().requires_grad_() for t in leaves(4099, width, dtype)]
    check(nullcontext(), tensors, add_layer_norm, plain)
    first, *others = (torch.autograd.grad(add_layer_norm(*tensors)[0].sum(), tensors) for _ in range(100))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
