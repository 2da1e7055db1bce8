"""A small GPT block of all our ops compiles as one graph, on both paths, with the same loss and gradients."""

import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from kernels import (
    add_layer_norm,
    attention,
    attention_packed,
    bias_activation,
    layer_norm,
    linear_cross_entropy,
    rotary,
    softmax,
)

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
        qkv = rotary(qkv, cos, sin, n_head=2 * H, head_dim=D).view(B, T, 3, H, D)
        mixed = attention(*qkv.unbind(2)) + attention_packed(qkv, doc_start=doc_start)
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


GPU_TRACE = """
import importlib.util, sys, types
import torch, triton
from torch._dynamo.backends.common import aot_autograd
from functorch.compile import make_boxed_func
from triton.backends.compiler import GPUTarget
from kernels import dispatch

class Driver:  # what the tracer asks about the GPU
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 80, 32))
    get_current_device = staticmethod(lambda: 0)

triton.runtime.driver.set_active(Driver())
torch.cuda.get_device_properties = lambda device: types.SimpleNamespace(multi_processor_count=108)
dispatch.force_chip("cuda:80")
dispatch._decide = lambda op, device: ("triton", "for the test")

def capture(graph, example):
    for node in graph.graph.nodes:
        if "triton_kernel" in str(node.target):
            print("kernel", *sorted(node.kwargs["tensors_to_clone"]))
        elif "pilesmith" in str(node.target):
            print("opaque", node.target)
    outs = [n.meta["val"] if n is not None else None for n in list(graph.graph.nodes)[-1].args[0]]
    return make_boxed_func(lambda *a: [torch.zeros(o.shape, dtype=o.dtype) if torch.is_tensor(o) else o for o in outs])

spec = importlib.util.spec_from_file_location("block", sys.argv[1])
block = importlib.util.module_from_spec(spec)
spec.loader.exec_module(block)
backend = aot_autograd(fw_compiler=capture, bw_compiler=capture)
compiled = torch.compile(block.Block().bfloat16(), fullgraph=True, backend=backend)
compiled(*block.inputs()).backward()

from kernels.attention_decode import _decode
from torch._library.triton import triton_ops_to_kernels

_decode.overload  # which training does not call
for name, found in triton_ops_to_kernels.items():
    print("op", name, len(found))
"""


def test_on_a_gpu_the_compiler_sees_every_kernel():
    """With a made-up A100 as target, tracing needs no GPU: kernels are in the graph, with what they write known."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", GPU_TRACE, __file__], env=environment, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    # The loss chooses its chunks at run time, attention describes real addresses; every other op is open.
    opaque = {line.removeprefix("opaque pilesmith.") for line in lines if line.startswith("opaque")}
    whole = ("linear_cross_entropy", "attention", "attention_backward", "attention_packed", "attention_packed_backward")
    assert opaque == {f"{op}.default" for op in whole}
    assert "assuming every input is mutated" not in done.stderr
    # By their sources a compiled graph on disk is known to be stale.
    kernels_by_op = dict(line.split()[1:] for line in lines if line.startswith("op "))
    assert len(kernels_by_op) == 7 and "0" not in kernels_by_op.values(), kernels_by_op
