"""Where the time of a profiled step goes: operations attributed to parts of the model, forward and backward.

Modules are scoped by `scope`; what an operation's backward pass does belongs to the scope that the operation itself
had, found by autograd's sequence number. On a GPU the time is that of kernels, on a CPU that of operations.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn
from torch._C._profiler import _RecordFunctionFast
from torch.autograd.profiler_util import FunctionEvent

from engine.model import GPT, MLP, ActivatedLinear, Attention, Block, Head, LayerNorm, Linear

PARTS = (
    "embedding",
    "norm",
    "attention",
    "matmul",
    "activation",
    "loss",
    "gradient sums",
    "optimizer",
    "communication",
    "other",
    "idle",
)
SCOPE = "part:"
_BACKWARD = "autograd::engine::evaluate_function: "
_MODULES: dict[type[nn.Module], str] = {
    GPT: "embedding",  # what is left when its blocks, norm and head are taken out
    nn.Embedding: "embedding",
    Block: "other",  # the residual additions of blocks that are recomputed
    LayerNorm: "norm",
    Attention: "attention",
    Linear: "matmul",
    MLP: "activation",
    ActivatedLinear: "activation",  # its matrix product is told by the operation
    Head: "loss",
}
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::addmm_", "aten::matmul", "aten::linear")
_COMMUNICATION = ("c10d::", "nccl:", "gloo:", "record_param_comms")


def scoped(function: Callable[..., Any], part: str) -> Callable[..., Any]:
    """Return `function` with everything that it starts recorded as `part`.

    Not by `torch.profiler.record_function`, to whose scopes the profiler gives no kernels: those of a Triton kernel
    that no operation of torch's launches, as the optimizer's, would be nobody's.
    """

    def run(*arguments: Any, **options: Any) -> Any:
        with _RecordFunctionFast(SCOPE + part):
            return function(*arguments, **options)

    return run


def scope(model: nn.Module) -> None:
    """Record every module of the GPT as its part, from now on."""
    for module in model.modules():
        if type(module) in _MODULES:
            module.forward = scoped(module.forward, _MODULES[type(module)])


@dataclass
class Time:
    """Seconds in the forward pass, the backward pass, and neither (the optimizer, what is between)."""

    forward: float = 0.0
    backward: float = 0.0
    neither: float = 0.0

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.neither


@dataclass
class Operation:
    """What the calls of one operation within one part took and, where its work is known, needed at least."""

    name: str
    part: str
    calls: int = 0
    seconds: float = 0.0
    flops: int = 0
    bytes: int = 0


@dataclass
class Attributed:
    parts: dict[str, Time] = field(default_factory=lambda: defaultdict(Time))
    operations: dict[tuple[str, str], Operation] = field(default_factory=dict)


def attribute(events: Iterable[FunctionEvent], on_gpu: bool, itemsize: int) -> Attributed:
    """Share the time of the profiler's events out to parts. `itemsize`: bytes of a number in the computation."""
    on_cpu = [e for e in events if e.device_type == torch.autograd.DeviceType.CPU and e.name != "[memory]"]
    roots = [e for e in on_cpu if e.cpu_parent is None]
    forward_part: dict[tuple[int, int], str] = {}
    for root in roots:
        _note_forward(root, "other", forward_part)
    result = Attributed()
    for root in roots:
        _share(root, "other", "neither", False, forward_part, on_gpu, itemsize, result)
    return result


def _note_forward(event: FunctionEvent, part: str, found: dict[tuple[int, int], str]) -> None:
    """Note the part of every (thread, sequence number): a number belongs to the last operation that has it."""
    if event.name.startswith(_BACKWARD):
        return
    part = _part(event, part)
    if event.sequence_nr >= 0:
        found[event.thread, event.sequence_nr] = part
    for child in _in_order(event):
        _note_forward(child, part, found)


def _share(
    event: FunctionEvent, part: str, direction: str, counted: bool, forward_part: dict[tuple[int, int], str],
    on_gpu: bool, itemsize: int, result: Attributed,
) -> None:  # fmt: skip
    """Add an event and what it started to `result`. `counted`: an operation around it already stands for its work."""
    if event.name.startswith(_BACKWARD):
        sums = event.name.endswith("AccumulateGrad")
        part = "gradient sums" if sums else forward_part.get((event.fwd_thread, event.sequence_nr), "other")
        direction = "backward"
    elif event.name.startswith(SCOPE):
        part = _part(event, part)
        if direction == "neither" and part != "optimizer":
            direction = "forward"
    else:
        part = _part(event, part)
    own = sum(kernel.duration for kernel in event.kernels) if on_gpu else event.self_cpu_time_total
    time = result.parts[part]
    setattr(time, direction, getattr(time, direction) + own * 1e-6)
    work = None if counted else work_of(event.name, event.input_shapes or [], itemsize)
    if work:
        operation = result.operations.setdefault((event.name, part), Operation(event.name, part))
        operation.calls += 1
        operation.seconds += 1e-6 * (_kernel_time(event) if on_gpu else event.cpu_time_total)
        operation.flops += work[0]
        operation.bytes += work[1]
    for child in _in_order(event):
        _share(child, part, direction, counted or work is not None, forward_part, on_gpu, itemsize, result)


def _part(event: FunctionEvent, part: str) -> str:
    if event.name.startswith(SCOPE):
        return event.name.removeprefix(SCOPE)
    if event.name.startswith(_COMMUNICATION):
        return "communication"
    if event.name in _PRODUCTS and part not in ("loss", "optimizer", "attention"):
        return "matmul"
    return part


def _in_order(event: FunctionEvent) -> list[FunctionEvent]:
    children = (child for child in event.cpu_children if child.name != "[memory]")
    return sorted(children, key=lambda child: child.time_range.start)


def _kernel_time(event: FunctionEvent) -> float:
    return sum(kernel.duration for kernel in event.kernels) + sum(map(_kernel_time, event.cpu_children))


def busy_seconds(events: Iterable[FunctionEvent]) -> float:
    """Return how long the GPU had anything to do: the union of its kernels' and copies' times."""
    ranges = sorted(
        (e.time_range.start, e.time_range.end)
        for e in events
        if e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation
    )
    busy, end = 0.0, float("-inf")
    for start, stop in ranges:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return busy * 1e-6


def work_of(name: str, shapes: list[list[int]], itemsize: int) -> tuple[int, int] | None:
    """Return the FLOPs and bytes that an operation needs at least, inputs read and outputs written once, or None."""
    known = _WORK.get(name)
    return known([s for s in shapes if s], itemsize) if known else None


def _size(shape: list[int]) -> int:
    return torch.Size(shape).numel()


def _product(shapes: list[list[int]], itemsize: int) -> tuple[int, int]:
    *batch, m, k = shapes[-2]
    n = shapes[-1][-1]
    many = _size(batch)
    return 2 * many * m * n * k, itemsize * many * (m * k + k * n + m * n)


def _attention(shapes: list[list[int]], itemsize: int, layout: str, backward: bool = False) -> tuple[int, int]:
    """Causal: half of the square. layout: of the first tensor, which is as the queries or all three of them packed."""
    size = dict(zip(layout, shapes[0]))
    B, T, H, D = (size[axis] for axis in "BTHD")
    flops, q_bytes = 2 * B * H * T * T * D, B * T * H * D * itemsize
    return (flops * 5 // 2, 8 * q_bytes) if backward else (flops, 4 * q_bytes)


def _moves(count: int) -> Callable[[list[list[int]], int], tuple[int, int]]:
    """An operation that moves `count` tensors of its first input's shape and does next to nothing with them."""
    return lambda shapes, itemsize: (0, count * _size(shapes[0]) * itemsize)


def _loss(shapes: list[list[int]], itemsize: int) -> tuple[int, int]:
    (n, c), (v, _) = shapes[:2]
    return 6 * n * c * v, itemsize * (2 * n * c + 2 * v * c)


_WORK: dict[str, Callable[[list[list[int]], int], tuple[int, int]]] = {
    "aten::mm": _product,
    "aten::addmm": _product,
    "aten::bmm": _product,
    "aten::_scaled_dot_product_flash_attention_for_cpu": lambda s, i: _attention(s, i, "BHTD"),
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": lambda s, i: _attention(s, i, "BHTD", True),
    "aten::_scaled_dot_product_flash_attention": lambda s, i: _attention(s, i, "BHTD"),
    "aten::_scaled_dot_product_flash_attention_backward": lambda s, i: _attention(s, i, "BHTD", True),
    "aten::_scaled_dot_product_efficient_attention": lambda s, i: _attention(s, i, "BHTD"),
    "aten::_scaled_dot_product_efficient_attention_backward": lambda s, i: _attention(s, i, "BHTD", True),
    "aten::_scaled_dot_product_cudnn_attention": lambda s, i: _attention(s, i, "BHTD"),
    "aten::_scaled_dot_product_cudnn_attention_backward": lambda s, i: _attention(s, i, "BHTD", True),
    "pilesmith::attention": lambda s, i: _attention(s, i, "BTHD"),
    "pilesmith::attention_backward": lambda s, i: _attention(s, i, "BTHD", True),
    "pilesmith::attention_packed": lambda s, i: _attention(s, i, "BT3HD"),
    "pilesmith::attention_packed_backward": lambda s, i: _attention(s, i, "BTHD", True),
    "aten::native_layer_norm": _moves(2),
    "aten::native_layer_norm_backward": _moves(3),
    "pilesmith::layer_norm": lambda s, i: _moves(2 * s.count(s[0]))(s, i),  # with a branch, two go in and two come out
    "pilesmith::layer_norm_backward": lambda s, i: _moves(s.count(s[0]) + 1)(s, i),
    "_BiasActivation": _moves(2),
    "_BiasActivationBackward": _moves(3),
    "pilesmith::bias_activation": _moves(2),
    "pilesmith::bias_activation_backward": _moves(3),
    "pilesmith::linear_cross_entropy": _loss,
}
