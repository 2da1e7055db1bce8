"""Ops are called without the dispatcher where nobody watches, and by it where somebody does, with the same results."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.custom_op import custom_op
from kernels.dispatch import constant_to_compilers


@custom_op("test_scaled", opaque=True)
def scaled(x: Tensor, weight: Tensor, bias: Tensor | None, factor: float) -> tuple[Tensor, Tensor]:
    return x * weight * factor + (0 if bias is None else bias), x.sum(-1)


@scaled.register_fake
def _(x, weight, bias, factor):
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1])


def _context(ctx, inputs, output):
    x, weight, bias, ctx.factor = inputs
    ctx.has_bias = bias is not None
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight)


def _backward(ctx, grad, _):
    x, weight = ctx.saved_tensors
    return grad * weight * ctx.factor, (grad * x).sum(0) * ctx.factor, grad.sum(0) if ctx.has_bias else None, None


scaled.register_autograd(_backward, setup_context=_context)


class Names(TorchDispatchMode):
    """Notes the ops that it sees."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def inputs(bias=True):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator).requires_grad_() for shape in ((3, 4), (4,), (4,))]
    return [*tensors[:2], tensors[2] if bias else None, 1.5]


def gradients(call, values):
    leaves = [x for x in values if isinstance(x, Tensor)]
    out, rest = call(*values)
    assert not rest.requires_grad
    return out, *torch.autograd.grad(out.square().sum(), leaves)


@pytest.mark.parametrize("bias", [True, False])
def test_both_ways_have_the_same_results(bias):
    values = inputs(bias)
    torch.testing.assert_close(gradients(scaled, values), gradients(scaled.overload, values), rtol=0, atol=0)


def test_nobody_watching_the_dispatcher_is_left_out(monkeypatch):
    def dispatched(*_):
        raise AssertionError("through the dispatcher")

    monkeypatch.setattr(scaled, "overload", dispatched)
    out, _ = scaled(*inputs())
    assert "Differentiable" in type(out.grad_fn).__name__
    with torch.no_grad():
        assert scaled(*inputs())[0].grad_fn is None
    x, weight, bias, factor = inputs()
    assert torch.equal(scaled(Parameter(x.detach()), weight, bias, factor)[0], out)


def test_who_watches_sees_the_op():
    with Names() as names:
        scaled(*inputs())
    assert "pilesmith::test_scaled" in names.seen
    with torch.profiler.profile() as profiled:
        scaled(*inputs())
    assert "pilesmith::test_scaled" in {event.key for event in profiled.key_averages()}
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) if isinstance(x, Tensor) else x for x in inputs()]
    assert isinstance(scaled(*fakes)[0], torch._subclasses.FakeTensor)  # outside of the mode, too
    compiled = torch.compile(lambda *values: scaled(*values)[0], fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs()), scaled(*inputs())[0])


def test_a_second_derivative_is_refused():
    values = inputs()
    out, _ = scaled(*values)
    (first,) = torch.autograd.grad(out.square().sum(), values[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


PROGRAM = """
import sys
import engine.train, tools.plan
from engine.config import ModelConfig
from engine.model import GPT
GPT.outline(ModelConfig())
print({"torch._dynamo", "torch._inductor"} & sys.modules.keys())
"""


def test_programs_start_without_the_compiler():
    """Importing it takes as long as all the rest."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}  # only without it a triton_op
    assert subprocess.check_output([sys.executable, "-c", PROGRAM], text=True, env=environment) == "set()\n"


def test_constants_are_marked_as_torch_marks_them():
    ours, torchs = (mark(lambda: 1) for mark in (constant_to_compilers, torch.compiler.assume_constant_result))
    assert vars(ours) == vars(torchs) != {}
