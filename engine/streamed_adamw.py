"""AdamW whose states lie in host memory and pass through the card's own update, a portion at a time.

The card needs room for three portions, the host neither cores nor a compiler. While one portion is updated, the next is
on its way in and the last on its way out, each on a stream of its own; Python never waits.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from engine.optimizer import AdamW
from kernels.adamw import adamw
from kernels.number_formats import BLOCK, GROUP

PORTION = 1 << 24  # elements, a multiple of GROUP * BLOCK: 16 to 64 MiB of each state, which PCIe moves at full speed
SLOTS = 3  # portions on the card at a time: one on its way in, one being updated, one on its way out
HOST_SLAB_BYTES = 1 << 30  # a power of two, which torch pins without rounding
_STATES = ("residual", "exp_avg", "exp_avg_sq", "exponents")


class HostMemory:
    """Zeroed tensors in host memory, cut from few large blocks: torch rounds each pinned tensor to a power of two."""

    def __init__(self, pinned: bool) -> None:
        self.pinned = pinned
        self.bytes = 0
        self._slabs: list[tuple[Tensor, int]] = []  # uint8, how much of it is taken

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a tensor of zeros that begins at a multiple of 256 bytes; a slab grows with what there is, to 1 GiB.

        MemoryError where the system gives no more.
        """
        size = -(-torch.Size(shape).numel() * dtype.itemsize // 256) * 256
        for number, (slab, taken) in enumerate(self._slabs):
            if slab.numel() - taken >= size:
                break
        else:
            least = max(size, min(HOST_SLAB_BYTES, self.bytes), 1 << 16)
            slab, taken, number = self._slab(1 << (least - 1).bit_length()), 0, len(self._slabs)
            self._slabs.append((slab, 0))
            self.bytes += slab.numel()
        self._slabs[number] = slab, taken + size
        return slab[taken : taken + torch.Size(shape).numel() * dtype.itemsize].view(dtype).view(shape)

    def _slab(self, size: int) -> Tensor:
        try:
            return torch.zeros(size, dtype=torch.uint8, pin_memory=self.pinned)
        except RuntimeError as error:
            kind, said = "pinned host memory" if self.pinned else "host memory", str(error).splitlines()[0]
            raise MemoryError(f"no {size >> 20} MiB of {kind} beside {self.bytes >> 20} MiB: {said}") from None


@dataclass(frozen=True)
class Piece:
    """Elements [start, stop) of a parameter, laid at `offset` in a slot; `last`: no more of it comes after."""

    parameter: Tensor
    start: int
    stop: int
    offset: int
    last: bool

    def of(self, name: str, whole: Tensor) -> Tensor:
        """The piece of a state, or of the parameter or its gradient."""
        width = BLOCK if name == "exponents" else 1
        return whole.view(-1)[self.start // width : -(-self.stop // width)]

    def within(self, name: str, buffer: Tensor) -> Tensor:
        """Its place in a slot's buffer."""
        width = BLOCK if name == "exponents" else 1
        return buffer[self.offset // width :][: -(-(self.stop - self.start) // width)]


def portions(parameters: list[Tensor], size: int = PORTION) -> Iterator[list[Piece]]:
    """Cut parameters into pieces and gather these into portions of at most `size` elements, in order."""
    portion: list[Piece] = []
    offset = 0
    for parameter in parameters:
        start, numel = 0, parameter.numel()
        while start < numel:
            # A piece begins at a group of blocks, where a parameter's random bits can begin as well.
            room = (size - offset) // (GROUP * BLOCK) * (GROUP * BLOCK)
            if not room or (room < numel - start and offset and numel - start <= size):
                yield portion
                portion, offset = [], 0
                continue
            stop = min(start + room, numel)
            portion.append(Piece(parameter, start, stop, offset, stop == numel))
            offset += -(-(stop - start) // BLOCK) * BLOCK
            start = stop
    if portion:
        yield portion


@dataclass
class _Slot:
    """Buffers on the card through which portions pass; `free`: when the last one has been copied out."""

    buffers: dict[str, Tensor] = field(default_factory=dict)
    free: torch.cuda.Event | None = None


class StreamedAdamW(AdamW):
    """AdamW with the residuals and moments of matrices in host memory; weights, gradients and vectors on the device.

    The numbers are AdamW's, bit for bit. The states of a step are in host memory once the device has come to the end of
    what `step` gave it; `synchronize` waits for that, and reading or setting states does.
    """

    def __init__(self, *args: Any, portion: int = PORTION, **options: Any) -> None:
        if portion % (GROUP * BLOCK):
            raise ValueError(f"a portion must be a multiple of {GROUP * BLOCK} elements, got {portion}")
        self.portion = portion
        self.host: HostMemory | None = None
        self._slots = [_Slot() for _ in range(SLOTS)]
        self._inbound: torch.cuda.Stream | None = None
        self._outbound: torch.cuda.Stream | None = None
        super().__init__(*args, **options)

    def _zeros(self, parameter: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if parameter.dim() < 2:
            return super()._zeros(parameter, shape, dtype)
        self.host = self.host or HostMemory(pinned=parameter.is_cuda)
        return self.host.zeros(tuple(shape), dtype)

    def _update(
        self, group_number: int, parameters: list[Tensor], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        if parameters[0].dim() < 2:
            super()._update(group_number, parameters, grad_scale, found_inf)
            return
        states = {p: self._state(p) for p in parameters}
        names = [name for name in _STATES if name in states[parameters[0]]]
        device = parameters[0].device
        if device.type == "cuda" and self._inbound is None:
            self._inbound, self._outbound = torch.cuda.Stream(device), torch.cuda.Stream(device)
        if self._inbound:
            self._inbound.wait_stream(self._outbound)  # what the last step sent back must be there
        cut = list(portions(parameters, self.portion))
        size = max(pieces[-1].offset + pieces[-1].stop - pieces[-1].start for pieces in cut)
        for turn, pieces in enumerate(cut):
            slot = self._slots[turn % SLOTS]
            self._buffers(slot, names, states[parameters[0]], size, device)
            arrived = self._copy(slot, pieces, names, states, inward=True)
            if arrived:
                arrived.wait()  # the computation waits, as below; the host never does
            self._update_portion(slot, group_number, pieces, names, states, grad_scale, found_inf)
            slot.free = self._copy(slot, pieces, names, states, inward=False)

    def _buffers(self, slot: _Slot, names: list[str], like: dict[str, Tensor], size: int, device: torch.device) -> None:
        """Make a slot's buffers in the first step: they stay, so that the allocator never passes their memory on."""
        for name in names:
            length, buffer = -(-size // BLOCK) if name == "exponents" else size, slot.buffers.get(name)
            if buffer is None or buffer.dtype != like[name].dtype or len(buffer) < length:
                self.synchronize()
                slot.buffers[name] = torch.empty(length, dtype=like[name].dtype, device=device)
                if self._inbound:  # what this memory was used for before may not be finished
                    self._inbound.wait_stream(torch.cuda.current_stream(device))

    def _copy(
        self, slot: _Slot, pieces: list[Piece], names: list[str], states: dict[Tensor, dict[str, Tensor]], inward: bool
    ) -> torch.cuda.Event | None:
        """Copy states between host and slot; return the event of the end, None where it is done already.

        Inward it waits until the slot is free, outward for the update.
        """
        stream = self._inbound if inward else self._outbound
        if stream and inward and slot.free:
            stream.wait_event(slot.free)
        elif stream and not inward:
            stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream) if stream else nullcontext():
            for piece in pieces:
                for name in names:
                    there, here = piece.of(name, states[piece.parameter][name]), piece.within(name, slot.buffers[name])
                    source, to = (there, here) if inward else (here, there)
                    to.copy_(source, non_blocking=True)
            return stream.record_event() if stream else None

    def _update_portion(
        self,
        slot: _Slot,
        group_number: int,
        pieces: list[Piece],
        names: list[str],
        states: dict[Tensor, dict[str, Tensor]],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        here = {name: [piece.within(name, slot.buffers[name]) for piece in pieces] for name in names}
        steps = [states[piece.parameter]["step"] for piece in pieces]
        adamw(
            [piece.of("weight", piece.parameter.detach()) for piece in pieces],
            [piece.of("grad", piece.parameter.grad.contiguous()) for piece in pieces],
            here["exp_avg"],
            here["exp_avg_sq"],
            # Each call counts a step; only a parameter's last piece may count it for good.
            [step if piece.last else step.clone() for piece, step in zip(pieces, steps)],
            residuals=here.get("residual"),
            exponents=here.get("exponents"),
            keys=[self._key(piece.parameter) for piece in pieces],
            first_blocks=[piece.start // BLOCK for piece in pieces],
            grad_scale=grad_scale,
            found_inf=found_inf,
            **self._numbers(group_number),
        )

    def synchronize(self) -> None:
        """Wait until all states are in host memory."""
        if self._outbound:
            self._outbound.synchronize()

    def export_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        self.synchronize()
        return super().export_state(parameter)

    def import_state(self, parameter: nn.Parameter, *args: Any, **options: Any) -> None:
        self.synchronize()
        super().import_state(parameter, *args, **options)
