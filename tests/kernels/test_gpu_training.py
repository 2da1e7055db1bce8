"""Two hundred steps of GPT-2's shape on our kernels and on PyTorch's: the same curve, within the noise of two seeds."""

import math

import pytest
import torch
import torch.nn.functional as F

from kernels import (
    add_layer_norm,
    attention_packed,
    bias_activation,
    dispatch,
    layer_norm,
    linear_cross_entropy,
    rotary,
)

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
LAYERS, H, D, V, B, T, STEPS = 12, 12, 64, 50304, 4, 256, 200
C = H * D
LOSS_SCALE = 1024.0  # fp16 gradients would vanish without; a power of two changes nothing else


class Model(torch.nn.Module):
    """GPT-2's small shape, of our ops alone; imports go down, so not the engine's model."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        shapes = {"norm1": (C,), "qkv": (3 * C, C), "project": (C, C)}
        shapes |= {"norm2": (C,), "up": (4 * C, C), "shift": (4 * C,), "down": (C, 4 * C)}
        self.embed = torch.nn.Parameter(torch.randn(V, C) * 0.02)
        for i in range(LAYERS):
            for name, shape in shapes.items():
                value = torch.randn(shape) * 0.02 if len(shape) == 2 else torch.full(shape, float("norm" in name))
                self.register_parameter(f"{name}_{i}", torch.nn.Parameter(value))

    def forward(self, tokens, targets, cos, sin):
        dtype = getattr(torch, dispatch.chip(DEVICE).dtype)

        def weight(name):
            return getattr(self, name).to(dtype)

        x = F.embedding(tokens, weight("embed"))
        branch = torch.zeros_like(x)
        for i in range(LAYERS):
            h, x = add_layer_norm(branch, x, weight(f"norm1_{i}"))
            qkv = rotary(F.linear(h, weight(f"qkv_{i}")), cos, sin, n_head=2 * H, head_dim=D)
            mixed = attention_packed(qkv.view(B, T, 3, H, D)).reshape(B, T, C)
            h, x = add_layer_norm(F.linear(mixed, weight(f"project_{i}")), x, weight(f"norm2_{i}"))
            h = bias_activation(F.linear(h, weight(f"up_{i}")), weight(f"shift_{i}"), "gelu_tanh")
            branch = F.linear(h, weight(f"down_{i}"))
        x = layer_norm(x + branch, torch.ones(C, dtype=dtype, device=DEVICE))
        return linear_cross_entropy(x.view(-1, C), weight("embed"), targets.reshape(-1))


def curve(path, seed):
    """Losses of a model that learns sequences of its own: tokens that follow from the one before."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    angles = torch.outer(torch.arange(T), 10_000.0 ** -(torch.arange(0, D, 2) / D)).to(DEVICE)
    losses = []
    with dispatch.use_backend(path):
        model = Model(seed).to(DEVICE)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
        for _ in range(STEPS):
            first = torch.randint(1000, (B, 1), generator=generator, device=DEVICE)
            tokens = (first + 7 * torch.arange(T + 1, device=DEVICE)) % 1000
            loss = model(tokens[:, :-1], tokens[:, 1:], angles.cos(), angles.sin())
            (loss * LOSS_SCALE).backward()
            for parameter in model.parameters():
                parameter.grad /= LOSS_SCALE
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return torch.tensor(losses)


def test_the_same_loss_curve():
    ours, own, other_seed = curve("auto", 0), curve("torch", 0), curve("torch", 1)
    assert math.isfinite(ours[-1]) and ours[-1] < ours[0] - 1
    difference, noise = (x.abs().unfold(0, 20, 20).mean(1) for x in (ours - own, own - other_seed))
    assert (difference <= noise + 0.02).all()
