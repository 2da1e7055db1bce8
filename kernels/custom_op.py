"""Functions that launch kernels, as ops: what a compiler, a dispatch mode or a profiler sees, and nobody else pays for.

The way through torch.library and the dispatcher costs more of Python's time than all else that an op does beside its
kernels (kernels/LOG.md), and small models and decoding wait for Python; so where nobody watches, an op is its function
and, under autograd, a torch.autograd.Function around it.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Parameter

from kernels.dispatch import TRITON_PRESENT, constant_to_compilers, interpreting


class Op:
    """The op pilesmith::`name` in torch.library, called on plain tensors without it; outputs must not alias inputs.

    Give each a `register_fake`, as torch.library has it, and what is differentiable a `register_autograd`. It enters
    torch.library when somebody watches first: a `triton_op` imports Inductor, which takes a program longer than torch
    itself, and few programs compile anything.
    """

    def __init__(self, name: str, function: Callable, make: Callable[..., torch.library.CustomOpDef]) -> None:
        self.name = name
        self._function, self._make = function, make
        self._fake: Callable | None = None
        self._gradients: tuple[Callable, Callable] | None = None
        self._apply: Callable | None = None
        _ops[name] = self

    @functools.cached_property
    def overload(self) -> torch._ops.OpOverload:
        """The op as torch.library has it, which it enters here."""
        definition = self._make(f"pilesmith::{self.name}", self._function, mutates_args=())
        if self._fake:
            definition.register_fake(self._fake)
        if self._gradients:
            backward, setup_context = self._gradients
            definition.register_autograd(backward, setup_context=setup_context)
        return getattr(torch.ops.pilesmith, self.name).default

    def register_fake(self, fake: Callable) -> Callable:
        """As torch.library's: what the function returns, of shapes alone."""
        self._fake = fake
        return fake

    def register_autograd(self, backward: Callable, *, setup_context: Callable) -> None:
        """As torch.library's; the gradients have no gradients themselves."""
        self._gradients = backward, setup_context
        function = self._function

        class Differentiable(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *inputs: Any) -> Any:
                output = function(*inputs)
                setup_context(ctx, inputs, output)
                return output

        Differentiable.backward = staticmethod(once_differentiable(backward))
        self._apply = Differentiable.apply

    def __call__(self, *inputs: Any) -> Any:
        if torch.compiler.is_compiling():
            _define(self.name)
            return getattr(torch.ops.pilesmith, self.name).default(*inputs)
        if _watched() or not all(map(_plain, inputs)):
            return self.overload(*inputs)
        return (self._apply if self._apply and torch.is_grad_enabled() else self._function)(*inputs)


_ops: dict[str, Op] = {}


@constant_to_compilers
def _define(name: str) -> None:
    """Enter an op into torch.library: a function of a name, since a compiler runs no methods while it traces."""
    _ops[name].overload  # noqa: B018


def custom_op(name: str, *, opaque: bool = False) -> Callable[[Callable], Op]:
    """Makes a function that launches Triton kernels the op pilesmith::`name`.

    The function's type hints are the schema; kernels inside are launched as `wrap_triton(kernel)[grid](...)`, those of
    an opaque one as they are. On a GPU the op is a `triton_op`, so that Inductor sees the kernels; under the
    interpreter, where that cannot work, and where the function must see real tensors with real addresses (`opaque`), a
    `custom_op`. Neither breaks a `fullgraph` compile.
    """
    hidden = opaque or interpreting() or not TRITON_PRESENT
    make = torch.library.custom_op if hidden else torch.library.triton_op
    return functools.partial(Op, name, make=make)


def wrap_triton(kernel: Callable) -> Callable:
    """`torch.library.wrap_triton` where something traces, else the kernel itself.

    The name is torch's own on purpose: it looks for calls of this name to know which kernels an op depends on.
    """
    return torch.library.wrap_triton(kernel) if _watched() and not interpreting() else kernel


def _watched() -> bool:
    """Whether a dispatch mode, a transform of torch.func or a profiler wants to see ops."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch.autograd._profiler_enabled()
    )


def _plain(x: Any) -> bool:
    return type(x) in (Tensor, Parameter) or not isinstance(x, Tensor)
