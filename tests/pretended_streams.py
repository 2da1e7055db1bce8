"""Streams and events of a pretended card (tests/pretended_card.py): what is given to a side stream is done late."""

import collections
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

if TYPE_CHECKING:
    from tests.pretended_card import Card


class Stream:
    """The main stream runs at once. Others keep what they are given until somebody waits for it."""

    def __init__(self, card: "Card", device: Any = None, *, main: bool = False) -> None:
        self.card, self.device, self.main = card, torch.device("cuda", 0), main
        self.given = self.done = 0
        self.pending: collections.deque[tuple[Callable, list[Tensor]]] = collections.deque()
        self.seen = 0  # of a side stream: how much of the main one's work is finished when its next work begins
        if not main:
            card.sides.append(self)

    def later(self, work: Callable, tensors: list[Tensor]) -> None:
        self.pending.append((work, tensors))
        self.given += 1

    def run_to(self, position: int) -> None:
        while self.done < position:
            self.done += 1
            work, _ = self.pending.popleft()
            with _disable_current_modes():
                work()

    def wait_event(self, event: "Event") -> None:
        if event.stream is None or event.stream is self:
            return
        self.seen = max(self.seen, event.seen)
        if self.main:
            event.stream.run_to(event.position)
        elif not event.stream.main:
            self.later(lambda: event.stream.run_to(event.position), [])

    def wait_stream(self, other: "Stream") -> None:
        self.wait_event(other.record_event())

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event()
        event.stream, event.position = self, self.given
        event.seen = len(self.card.log) if self.main else self.seen
        return event

    def synchronize(self) -> None:
        self.run_to(self.given)


class Event:
    """A place in a stream's work, which knows how much of the main stream's was finished there."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.stream: Stream | None = None
        self.position = self.seen = 0

    def record(self, stream: Stream | None = None) -> None:
        (stream or torch.cuda.current_stream()).record_event(self)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or torch.cuda.current_stream()).wait_event(self)

    def synchronize(self) -> None:
        if self.stream:
            self.stream.run_to(self.position)

    def query(self) -> bool:
        return self.stream is None or self.stream.main or self.stream.done >= self.position
