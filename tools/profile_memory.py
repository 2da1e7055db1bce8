"""The memory of a profiled step over time, by the part of the model that asked for it, and its picture."""
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch._C._profiler import _EventType

from tools.profile_parts import SCOPE

HELD = "weights and moments"
COLOURS = {
    HELD: "#bdbdbd", "embedding": "#fdd0a2", "norm": "#a1d99b", "attention": "#6baed6", "matmul": "#08519c", "activation": "#31a354",
    "loss": "#e6550d", "gradients": "#756bb1", "optimizer": "#636363", "other": "#d9d9d9",
}  # fmt: skip


@dataclass(frozen=True)
class Timeline:
    """seconds since the step began, and the bytes that each part holds from then on; `backward_s`: where that begins."""

    seconds: list[float]
    held: dict[str, list[int]]
    backward_s: float

    @property
    def totals(self) -> list[int]:
        return [sum(values) for values in zip(*self.held.values())]

    @property
    def peak(self) -> tuple[float, int]:
        """When the most is held, and how much that is."""
        totals = self.totals
        most = max(totals)
        return self.seconds[totals.index(most)], most


def timeline(profiler: torch.profiler.profile, device_type: str, held_bytes: int) -> Timeline:
    """Return what a profiled step held; `held_bytes` were there before it and not all were kept (gradients, say)."""
    moments: list[float] = []
    series: dict[str, list[int]] = {HELD: []}
    now: dict[str, int] = defaultdict(int, {HELD: held_bytes})
    owners: dict[int, tuple[str, int]] = {}
    began, backward = None, None
    for event in sorted(_walk(profiler.profiler.kineto_results.experimental_event_tree()), key=lambda e: e.start_time_ns):
        began = event.start_time_ns if began is None else began
        if backward is None and event.name.startswith("autograd::engine::evaluate_function"):
            backward = event.start_time_ns
        if event.tag != _EventType.Allocation or event.extra_fields.device.type != device_type:
            continue
        size, address = event.extra_fields.alloc_size, event.extra_fields.ptr
        if size > 0:
            part = _owner(event)
            owners[address] = part, size
            now[part] += size
        else:
            part, known = owners.pop(address, (HELD, -size))
            now[part] -= known
        moments.append((event.start_time_ns - began) * 1e-9)
        for name in now:
            series.setdefault(name, [0] * (len(moments) - 1)).append(now[name])
    return Timeline(moments, series, ((backward or began or 0) - (began or 0)) * 1e-9)


def _walk(events: list[Any]) -> Iterator[Any]:
    for event in events:
        yield event
        yield from _walk(event.children)


def _owner(event: Any) -> str:
    """The innermost scope around an allocation; in the backward pass all are gradients, recomputed activations apart."""
    while event is not None:
        if event.name.startswith(SCOPE):
            return event.name.removeprefix(SCOPE)
        if event.name.startswith("autograd::engine::evaluate_function"):
            return "gradients"
        event = event.parent
    return "other"


def draw(line: Timeline, title: str, path: Path) -> None:
    """Write the timeline as a PNG."""
    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots()
    names = [name for name in COLOURS if name in line.held] + [name for name in line.held if name not in COLOURS]
    unit, label = (2**30, "GiB") if max(line.totals) > 2**30 else (2**20, "MiB")
    milliseconds = [1e3 * s for s in line.seconds]
    stacks = [[value / unit for value in line.held[name]] for name in names]
    axes.stackplot(milliseconds, stacks, labels=names, colors=[COLOURS.get(name, "#8c6d31") for name in names], step="post", linewidth=0)
    when, most = line.peak
    axes.annotate(
        f"{most / unit:,.1f} {label}", (1e3 * when, most / unit), textcoords="offset points", xytext=(6, 4), fontsize=9,
    )  # fmt: skip
    axes.axvline(1e3 * line.backward_s, color="black", linewidth=0.8, linestyle=":")
    axes.text(1e3 * line.backward_s, 0, " backward", fontsize=8, va="bottom")
    axes.set_xlabel("ms")
    axes.set_ylabel(f"{label} of tensors")
    axes.set_ylim(0, 1.1 * most / unit)
    axes.set_xlim(left=0)
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(path, format="png", dpi=110)
