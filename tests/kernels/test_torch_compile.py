"""A small GPT block of all our ops compiles as one graph, on both paths, with the same loss and gradients."""

import math

import pytest
import torch
import torch.nn.functional as F

from kernels import add_layer_norm, attention, bias_activation, layer_norm, linear_cross_entropy, rotary, softmax

B, T, H, D, V = 2, 24, 2, 16, 50
C = H * D


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        shapes = {
            "embed": (V, C), "norm": (C,), "shift": (C,), "qkv": (3 * C, C), "project": (C, C), "up": (4 * C, C),
            "up_bias": (4 * C,), "down": (C, 4 * C), "gate": (C, C),
        }  # fmt: skip
        for name, shape in shapes.items():
            self.register_parameter(name, torch.nn.Parameter(torch.randn(shape) / math.sqrt(shape[-1])))

    def forward(self, tokens, targets, cos, sin, doc_start):
        x = F.embedding(tokens, self.embed)
        qkv = F.linear(layer_norm(x, self.norm, self.shift), self.qkv)
        q, k, v = rotary(qkv, cos, sin, n_head=2 * H, head_dim=D).view(B, T, 3, H, D).unbind(2)
        mixed = attention(q, k, v) + attention(q, k, v, doc_start=doc_start)
        y, x = add_layer_norm(F.linear(mixed.reshape(B, T, C), self.project), x, self.norm, self.shift)
        x = x + F.linear(bias_activation(F.linear(y, self.up), self.up_bias, "gelu_tanh"), self.down)
        x = x * softmax(F.linear(x, self.gate), temperature=2.0)
        return linear_cross_entropy(x.view(-1, C), self.embed, targets.view(-1), z_loss=1e-4)


def inputs():
    generator = torch.Generator().manual_seed(0)
    tokens, targets = torch.randint(V, (2, B, T), generator=generator)
    angles = torch.outer(torch.arange(T), 10_000.0 ** -(torch.arange(0, D, 2) / D))
    doc_start = torch.zeros(B, T, dtype=torch.int32)
    doc_start[:, 9:] = 9
    return tokens, targets, angles.cos(), angles.sin(), doc_start


def loss_and_gradients(block, run):
    loss = run(*inputs())
    return loss, torch.autograd.grad(loss, list(block.parameters()))


@pytest.mark.parametrize("path", ["torch", "triton"])
def test_one_graph_same_loss(path, kernel_path):
    torch._dynamo.reset()
    with kernel_path(path):
        block = Block()
        loss, gradients = loss_and_gradients(block, block)
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        compiled_loss, compiled_gradients = loss_and_gradients(block, compiled)
    torch.testing.assert_close(compiled_loss, loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(compiled_gradients, gradients, rtol=1e-4, atol=1e-5)


def test_both_paths_have_the_same_loss(kernel_path):
    results = []
    for path in ("torch", "triton"):
        with kernel_path(path):
            block = Block()
            results.append(loss_and_gradients(block, block))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_inductor_same_loss(kernel_path):
    torch._dynamo.reset()
    with kernel_path("torch"):
        block = Block()
        loss, gradients = loss_and_gradients(block, block)
        compiled_loss, compiled_gradients = loss_and_gradients(block, torch.compile(block, fullgraph=True))
    torch.testing.assert_close(compiled_loss, loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(compiled_gradients, gradients, rtol=1e-3, atol=1e-4)
