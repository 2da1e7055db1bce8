"""Rotary on both paths against its definition in fp64: values, gradients, what is overwritten and what is not."""

import pytest
import torch

from kernels import rotary
from kernels.rotary import rotary_reference

PATHS = ["torch", "triton"]


def case(B, T, H, G, D, dtype):
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(2, B, T, (H + 2 * G) * D, generator=generator).to(dtype)
    angles = torch.outer(torch.arange(T), 10_000.0 ** -(torch.arange(0, D, 2) / D))
    return x, grad, angles.cos(), angles.sin(), {"n_head": H + G, "head_dim": D}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "B, T, H, G, D", [(2, 17, 2, 2, 16), (1, 97, 4, 1, 64), (2, 1, 3, 3, 6), (1, 5, 2, 1, 80), (1, 2, 40, 40, 2)]
)
@pytest.mark.parametrize("leaf", [True, False])
def test_values_and_gradients(path, dtype, B, T, H, G, D, leaf, kernel_path):
    x, grad, cos, sin, heads = case(B, T, H, G, D, dtype)
    x.requires_grad_()
    with kernel_path(path):
        y = rotary(x if leaf else x * 1, cos, sin, **heads)
        (gradient,) = torch.autograd.grad(y, x, grad)
    exact_x = x.detach().double().requires_grad_()
    exact = rotary_reference(exact_x, cos.double(), sin.double(), **heads)
    (exact_gradient,) = torch.autograd.grad(exact, exact_x, grad.double())
    rounding = 2e-6 if dtype == torch.float32 else 2e-3
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), exact, rtol=rounding, atol=rounding)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=rounding, atol=rounding)
    assert torch.equal(y[..., heads["n_head"] * D :], x[..., heads["n_head"] * D :])


@pytest.mark.parametrize("path", PATHS)
def test_overwrites_activations_but_neither_leaves_nor_gradients(path, kernel_path):
    x, grad, cos, sin, heads = case(1, 5, 2, 2, 8, torch.float32)
    leaf, kept_leaf, kept_grad = x.clone().requires_grad_(), x.clone(), grad.clone()
    with kernel_path(path):
        activation = leaf * 1
        y = rotary(activation, cos, sin, **heads)
        assert y.data_ptr() == activation.data_ptr()
        y.backward(grad)
        rotary(leaf, cos, sin, **heads)
    assert torch.equal(leaf, kept_leaf) and torch.equal(grad, kept_grad)


@pytest.mark.parametrize("path", PATHS)
def test_a_strided_projection(path, kernel_path):
    x, _, cos, sin, heads = case(2, 6, 2, 2, 8, torch.float32)
    wide = torch.cat((x, x), -1)[..., : x.shape[-1]]
    with kernel_path(path):
        assert torch.equal(rotary(wide, cos, sin, **heads), rotary(x, cos, sin, **heads))


def test_scores_depend_on_distance_alone():
    """What the method is for: q at i times k at j depends on i - j (RoFormer, equation 11)."""
    q, k = torch.randn(2, 1, 1, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    angles = torch.outer(torch.arange(12.0, dtype=torch.float64), 10_000.0 ** -(torch.arange(0, 8, 2) / 8).double())
    turned = [rotary(x.expand(1, 12, 8).clone(), angles.cos(), angles.sin(), n_head=1, head_dim=8)[0] for x in (q, k)]
    scores = turned[0] @ turned[1].T
    for distance in range(-4, 5):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-9, atol=1e-9)


def test_bad_sizes_say_so():
    x = torch.zeros(1, 4, 24)
    with pytest.raises(ValueError, match="4 heads of 8"):
        rotary(x, torch.ones(4, 4), torch.ones(4, 4), n_head=4, head_dim=8)
    with pytest.raises(ValueError, match=r"expected \(4, 4\)"):
        rotary(x, torch.ones(3, 4), torch.ones(3, 4), n_head=3, head_dim=8)
