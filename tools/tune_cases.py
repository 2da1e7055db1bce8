"""What can be tuned: the kernels that take their launch configuration from kernels/configs/, and how each is judged."""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import attention, attention_decode, dispatch
from kernels.aot import Case, Row, compile_case
from kernels.attention import attention_reference
from kernels.attention_decode import decode_kernel
from kernels.attention_triton import KERNELS, element_case
from kernels.dispatch import CHIPS, Chip, use_backend

Config = dict[str, int | None]
WIDTHS = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Tunable:
    """A kernel with a table of launch configurations.

    kernel: its name there; space: the values that are tried for each of its constants; streamed: the constant that says
    how long the two tiles are that each iteration loads; outputs: which gradients show its work, "out" for the forward
    pass; length: of the cache, where there is one.
    """

    kernel: str
    space: dict[str, tuple[int | None, ...]]
    streamed: str
    outputs: tuple[str, ...]
    cached: int = 0
    new_tokens: int = 1

    def candidates(self) -> list[Config]:
        return [dict(zip(self.space, values)) for values in itertools.product(*self.space.values())]

    def shared_bytes(self, config: Config, width: int) -> int:
        """Return the least shared memory that a configuration can do with: the tiles in flight, in 16 bits."""
        in_flight = max(1, config["num_stages"] - 1)
        return in_flight * 2 * config[self.streamed] * width * 2

    def case(self, config: Config, width: int, target: str) -> Case:
        """Return what to compile for `config`: with documents, the harder variant."""
        chip = CHIPS[target]
        function, docs = (decode_kernel, False) if self.cached else (KERNELS[self.kernel], True)
        with dispatch.use_launch_config(self.kernel, width, config):
            dtype, shared = "bf16" if chip.bf16 else "fp16", 4 if self.cached else 1
            case = element_case(self.kernel, function, target, dtype, width, docs=docs, shared=shared, D=width)
        return replace(case, label=" ".join(f"{k}={v}" for k, v in config.items()))


_TILES = {
    "ROWS": (64, 128),
    "KEYS": (32, 64, 128),
    "num_warps": (4, 8),
    "num_stages": (1, 2, 3, 4),
    "EDGE_STAGES": (None, 1),
}
_DECODE = {"KEYS": (32, 64, 128), "num_warps": (2, 4, 8), "num_stages": (1, 2, 3, 4), "EDGE_STAGES": (None,)}
TUNABLE: dict[str, Tunable] = {
    t.kernel: t
    for t in (
        Tunable("attention_forward", _TILES, "KEYS", ("out",)),
        Tunable("attention_backward_q", _TILES | {"ROWS": (32, 64, 128)}, "KEYS", ("dq",)),
        Tunable("attention_backward_kv", _TILES | {"ROWS": (16, 32, 64), "KEYS": (64, 128)}, "ROWS", ("dk", "dv")),
        Tunable("attention_decode", {"ROWS": (16,)} | _DECODE, "KEYS", ("out",), cached=8192),
        Tunable("attention_decode_many", {"ROWS": (32, 64)} | _DECODE, "KEYS", ("out",), cached=8192, new_tokens=32),
    )
}


def compile_candidate(kernel: str, config: Config, width: int, target: str) -> Row:
    """Compile one configuration for a chip that need not be there; runs in worker processes."""
    return compile_case(TUNABLE[kernel].case(config, width, target), target)


@dataclass(frozen=True)
class Inputs:
    """q, k, v, the gradient of the output, where documents begin, and a cache's valid length (0: none)."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    doc_start: Tensor | None
    length: int

    @classmethod
    def draw(
        cls,
        shape: tuple[int, int, int, int, int],
        new: int,
        width: int,
        device: torch.device,
        dtype: torch.dtype,
        docs: bool,
    ) -> "Inputs":
        """shape: B, T, H, G, and a cache's length, 0 for none."""
        B, T, H, G, length = shape
        generator = torch.Generator(device).manual_seed(0)

        def random(tokens: int, heads: int) -> Tensor:
            return torch.randn(B, tokens, heads, width, device=device, generator=generator).to(dtype)

        q, k, v = random(new if length else T, H), random(length or T, G), random(length or T, G)
        starts = None
        if docs and not length:
            begins = torch.rand(B, T, device=device, generator=generator) < 0.02
            positions = torch.arange(T, dtype=torch.int32, device=device).expand(B, T)
            starts = torch.where(begins, positions, 0).cummax(1).values
        return cls(q, k, v, random(q.shape[1], H), starts, length)

    def run(self, attend: Callable[..., Tensor]) -> dict[str, Tensor]:
        """Return the output and, but for a cache, the gradients of `attend(q, k, v)`."""
        if self.length:
            return {"out": attend(self.q, self.k, self.v)}
        leaves = [x.detach().requires_grad_() for x in (self.q, self.k, self.v)]
        out = attend(*leaves)
        return {"out": out.detach()} | dict(
            zip(("dq", "dk", "dv"), torch.autograd.grad(out, leaves, self.grad.to(out.dtype)))
        )

    def ours(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with use_backend("triton"):
            return (
                attention_decode(q, k, v, self.length) if self.length else attention(q, k, v, doc_start=self.doc_start)
            )

    def exact(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """By the definition in fp64; PyTorch's own in the inputs' dtype goes the same way, for comparison."""
        if not self.length:
            return attention_reference(q, k, v, doc_start=self.doc_start)
        k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
        mask = torch.ones(q.shape[1], self.length, dtype=torch.bool, device=q.device).tril(self.length - q.shape[1])
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)

    def wide(self) -> "Inputs":
        return replace(self, q=self.q.double(), k=self.k.double(), v=self.v.double(), grad=self.grad.double())


def wrong(
    tunable: Tunable, width: int, device: torch.device, dtype: torch.dtype, lengths: tuple[int, ...] = (97, 333, 1024)
) -> str:
    """Return how the configuration in force is wrong, or nothing: odd lengths, shared heads, documents, full tiles.

    The error against fp64 may be twice that of PyTorch's operations in the same dtype, a gradient's three times.
    """
    for length in lengths:
        for docs in (False, True):
            cached = length if tunable.cached else 0
            inputs = Inputs.draw((2, length, 4, 2, cached), min(tunable.new_tokens, length), width, device, dtype, docs)
            exact, theirs = _references(inputs)
            ours = inputs.run(inputs.ours)
            for name in tunable.outputs:
                error = _error(ours[name], exact[name])
                allowed = 1e-5 + _error(theirs[name], exact[name]) * (2 if name == "out" else 3)
                if not error <= allowed:
                    where = f"at length {length}{' with documents' if docs else ''}"
                    return f"{name} is off by {error:.2g} {where}, allowed {allowed:.2g}"
    return ""


def _references(inputs: Inputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return inputs.wide().run(inputs.wide().exact), inputs.run(inputs.exact)


def _error(values: Tensor, exact: Tensor) -> float:
    return (values.double() - exact).abs().max().item()


def speed(
    tunable: Tunable, width: int, device: torch.device, dtype: torch.dtype, tokens: int
) -> tuple[Callable[[], object], dict[str, int]]:
    """Return what to time, and its shape: 16,384 tokens in sequences of `tokens`, heads that fill a width of 2048."""
    H = max(1, 2048 // width)
    B = max(1, 16384 // tokens)
    if tunable.cached:
        inputs = Inputs.draw((B, tokens, H, max(1, H // 4), tokens), tunable.new_tokens, width, device, dtype, False)
        return lambda: inputs.run(inputs.ours), {"B": B, "T": tokens, "H": H, "D": width}
    inputs = Inputs.draw((B, tokens, H, H, 0), 1, width, device, dtype, False)
    shape = {"B": B, "T": tokens, "H": H, "D": width}
    if tunable.outputs == ("out",):
        return functools.partial(_no_grad, inputs), shape
    leaves = [x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    out = inputs.ours(*leaves)
    return lambda: torch.autograd.grad(out, leaves, inputs.grad, retain_graph=True), shape


@torch.no_grad()
def _no_grad(inputs: Inputs) -> Tensor:
    return inputs.ours(inputs.q, inputs.k, inputs.v)
