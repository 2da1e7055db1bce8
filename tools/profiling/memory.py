"""The memory of a profiled step over time, by the part of the model that asked for it."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch._C._profiler import _EventType

from tools.profiling.parts import SCOPE

HELD = "weights and moments"
MOST_POINTS = 200  # of a timeline that is kept: what a picture can show


@dataclass(frozen=True)
class Timeline:
    """seconds since the step began, the bytes that each part holds from then on, and when the backward pass begins."""

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

    def to_dict(self) -> dict[str, Any]:
        """Return the timeline as JSON, thinned: of neighbouring moments the one that holds the most."""
        totals = self.totals
        width = -(-len(totals) // MOST_POINTS)
        kept = [
            max(range(i, min(i + width, len(totals))), key=totals.__getitem__) for i in range(0, len(totals), width)
        ]
        held = {part: [values[i] for i in kept] for part, values in self.held.items()}
        return {"seconds": [self.seconds[i] for i in kept], "held": held, "backward_s": self.backward_s}


def timeline(profiler: torch.profiler.profile, device_type: str, held_bytes: int) -> Timeline:
    """Return what a profiled step held; `held_bytes` were there before it and not all were kept (gradients, say)."""
    moments: list[float] = []
    series: dict[str, list[int]] = {HELD: []}
    now: dict[str, int] = defaultdict(int, {HELD: held_bytes})
    owners: dict[int, tuple[str, int]] = {}
    began, backward = None, None
    for event in sorted(
        _walk(profiler.profiler.kineto_results.experimental_event_tree()), key=lambda e: e.start_time_ns
    ):
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
    """The innermost scope around an allocation; without one, "gradients" in the backward pass, else "other"."""
    while event is not None:
        if event.name.startswith(SCOPE):
            return event.name.removeprefix(SCOPE)
        if event.name.startswith("autograd::engine::evaluate_function"):
            return "gradients"
        event = event.parent
    return "other"
