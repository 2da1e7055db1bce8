"""A GPU for machines without one: its tensors lie in host memory and say that they are on cuda:0.

    with pretended_card(monkeypatch, "cuda:75") as card:
        train.main(["--device=cuda", ...])       # the code for GPUs, to the end and with real numbers

What runs is what a card would run: planner, formats, pinned memory, streams, and Triton's kernels in the interpreter.
Errors that only a GPU shows end the test: tensors of two devices in one operation, a host tensor where an address of
the card is wanted; and, when the block ends, what goes wrong on a GPU now and then only:

- a side stream that touches what the main one has not finished with;
- memory freed while a copy is on its way to or from it;
- copies meant to overlap from or to memory that is not pinned.

A side stream's copies are made as late as the waits allow, so whoever does not wait for them computes with old numbers.
`card.waits` counts where Python waited for the card. There is one card, no memory limit, and no time: no speed means
anything. Autograd, which looks beneath, is told the truth, that the tensors are the host's.
"""

import collections
import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import torch._dynamo  # looks at what is replaced below as it is imported
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

from kernels.dispatch import CHIPS
from tests.pretended_streams import Event, Stream

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
MEMORY_BYTES = 80 << 30  # what the card says it has; nothing keeps to it
aten = torch.ops.aten
# Operations that take tensors of both devices: copies, and indices in host memory.
_CROSSING = {aten.copy_.default, aten._to_copy.default}
_INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
_READING = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default}


class OnCard(Tensor):
    """A tensor of the card; `values` is the host's tensor that holds its numbers."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> "OnCard":
        layout = {"strides": values.stride(), "storage_offset": values.storage_offset(), "dtype": values.dtype}
        return Tensor._make_wrapper_subclass(cls, values.shape, **layout, device=CPU)

    def __init__(self, values: Tensor) -> None:
        self.values, self.held = values, _Held(values)

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, other: "OnCard") -> None:
        Tensor.data.__set__(self, other)
        self.values, self.held = other.values, other.held

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _card().run(func, args, kwargs or {})

    def data_ptr(self) -> int:
        _card().addressed.append(_extent(self.values))
        return self.values.data_ptr()

    def record_stream(self, stream: "Stream") -> None:
        """The memory is nobody's before the stream has done what it has been given by now."""
        if not stream.main:
            stream.later(lambda held=self.held: None, [])

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.values.untyped_storage()

    def is_pinned(self, device: Any = None) -> bool:
        return False

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. "
            "Use Tensor.cpu() to copy the tensor to host memory first."
        )

    __array__ = numpy

    def __repr__(self, **_: Any) -> str:
        return f"OnCard({self.values!r})"


class _Held:
    """As long as it is there, somebody holds a piece of memory of the card."""

    def __init__(self, values: Tensor) -> None:
        self.card, self.place = _card(), values.untyped_storage().data_ptr()
        if not self.card.holders[self.place]:
            self.card.owners[self.place] = self.card.current[-1]
            self.card.allocate(self.place, values.untyped_storage().nbytes())
        self.card.holders[self.place] += 1

    def __del__(self) -> None:
        self.card.let_go(self.place)


class Card(TorchDispatchMode):
    """Runs every operation on the host, and keeps account of what a card would have made of it.

    log: (first byte, last byte, whether written) of what the main stream touched, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.faults: list[str] = []
        self.waits: collections.Counter[str] = collections.Counter()
        self.log: list[tuple[int, int, bool]] = []
        self.sides: list[Stream] = []
        self.addressed: list[tuple[int, int]] = []
        self.pinned: dict[int, torch.UntypedStorage] = {}  # by address; kept, so that no other memory gets it
        self.main = Stream(self, main=True)
        self.current = [self.main]
        self.holders: collections.Counter[int] = collections.Counter()  # by address, of tensors
        self.sizes: dict[int, int] = {}  # by address, bytes
        self.allocated = self.peak = 0
        self.owners: dict[int, Stream] = {}  # by address, the stream that memory was asked for on
        self._leaving = False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if func.namespace == "pilesmith":  # ours look at the device of what they are given
            with self:
                return torch._library.custom_ops.OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        here = [t for t in tensors if isinstance(t, OnCard)]
        asked = kwargs.get("device")
        if asked is not None and asked.type == "cpu" and here and not self._leaving:
            asked = None  # autograd's, which looked beneath
        to_card = bool(here) if asked is None else asked.type == "cuda"
        if func is aten.copy_.default:
            to_card = isinstance(args[0], OnCard)
        self._check_devices(func, args, tensors, here)
        if func in _READING and here:
            self.waits[str(func)] += 1
        if func in _CROSSING and (to_card != bool(here) or 0 < len(here) < len(tensors)):
            self._cross(func, args, kwargs, tensors)
        beneath, stream = self._on_host(func, args, kwargs, asked), self.current[-1]
        if not stream.main and func is aten.copy_.default:
            self._check_order(stream, args[0], args[1])
            stream.later(beneath, [t.values for t in here])
            return args[0]
        if not stream.main and (here or to_card) and not func.is_view:
            stream.synchronize()  # only copies are made late; what uses them comes after them
        result = self._wrapped(func, args, kwargs, beneath(), to_card, here)
        if stream.main and not func.is_view:
            self._note(func, args, kwargs, result)
        return result

    def _cross(self, func: Any, args: tuple, kwargs: dict[str, Any], tensors: list[Tensor]) -> None:
        """Account for a copy between host and card: Python waits for it, or it overlaps, from or to pinned memory."""
        if not kwargs.get("non_blocking", func is aten.copy_.default and len(args) > 2 and args[2]):
            self.waits[str(func)] += 1
        elif not all(isinstance(t, OnCard) or t.is_pinned() for t in tensors):
            self.faults.append(f"{func} is to overlap and its host memory is not pinned")

    def pin(self, host: Tensor) -> None:
        self.pinned[host.untyped_storage().data_ptr()] = host.untyped_storage()

    def allocate(self, place: int, size: int) -> None:
        """Count memory as PyTorch's allocator does."""
        self.sizes[place] = -(-size // 512) * 512
        self.allocated += self.sizes[place]
        self.peak = max(self.peak, self.allocated)

    def let_go(self, place: int) -> None:
        """One holder of a piece of memory less; without any, whoever asks for memory next on its stream gets it."""
        self.holders[place] -= 1
        if self.holders[place]:
            return
        del self.holders[place]
        self.allocated -= self.sizes.pop(place)
        owner = self.owners.pop(place)
        for side in self.sides:
            if side is not owner and any(
                t.untyped_storage().data_ptr() == place for _, tensors in side.pending for t in tensors
            ):
                self.faults.append("memory was freed while a side stream's copy used it")

    def _check_devices(self, func: Any, args: tuple, tensors: list[Tensor], here: list[OnCard]) -> None:
        if not here or func in _CROSSING:
            return
        strangers = [t for t in tensors if not isinstance(t, OnCard) and t.dim()]
        if strangers and not (func in _INDEXING and isinstance(args[0], OnCard)):
            found = ", ".join(f"{t.device} {tuple(t.shape)}" for t in tensors)
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, found {found}")

    def _on_host(self, func: Any, args: tuple, kwargs: dict[str, Any], asked: torch.device | None) -> Callable[[], Any]:
        """Return what does the operation's work in host memory."""
        plain_args, plain = tree_map_only(OnCard, lambda t: t.values, (args, kwargs))
        pin = plain.pop("pin_memory", None)
        if asked is not None and asked.type == "cuda":
            plain["device"] = CPU
        if func in (aten.addmm.dtype, aten.addmm.dtype_out):
            return lambda: _addmm_in_fp32(*plain_args, **plain)
        if not pin:
            return lambda: func(*plain_args, **plain)

        def pinned() -> Tensor:
            out = func(*plain_args, **plain)
            self.pin(out)
            return out

        return pinned

    def _wrapped(
        self, func: Any, args: tuple, kwargs: dict[str, Any], out: Any, to_card: bool, here: list[OnCard]
    ) -> Any:
        if not to_card:
            return out
        out = tree_map_only(Tensor, OnCard, out)
        return return_and_correct_aliasing(func, args, kwargs, out) if here else out

    def _note(self, func: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> None:
        """Write down what the main stream read and wrote."""
        if not self.sides:
            return
        named = dict(zip((a.name for a in func._schema.arguments), args)) | kwargs
        for argument in func._schema.arguments:
            written = argument.alias_info is not None and argument.alias_info.is_write
            self._touch(named.get(argument.name), written)
        self._touch(result, True)

    def _touch(self, tensors: Any, written: bool) -> None:
        for t in tree_leaves(tensors):
            if isinstance(t, OnCard) and t.numel():
                self.log.append((*_extent(t.values), written))

    def launched(self, tensors: Any) -> None:
        """Write down a kernel's launch, and the tensors whose addresses were asked for: in a table, likely."""
        self._touch(tensors, True)
        self.log += [(*extent, True) for extent in self.addressed]
        self.addressed.clear()

    def _check_order(self, side: Stream, to: Tensor, source: Tensor) -> None:
        for tensor, writes in ((to, True), (source, False)):
            if not isinstance(tensor, OnCard):
                continue
            first, last = _extent(tensor.values)
            for begin, end, written in self.log[side.seen :]:
                if begin <= last and first <= end and (writes or written):
                    self.faults.append(
                        f"a side stream {'writes' if writes else 'reads'} what the main one may not be done with"
                    )
                    return

    def move(self, tensor: Tensor, **how: Any) -> Tensor:
        self._leaving = how["device"].type == "cpu"
        try:
            return aten._to_copy(tensor, **how)
        finally:
            self._leaving = False


_cards: list[Card] = []


def _card() -> Card:
    return _cards[-1]


def _extent(t: Tensor) -> tuple[int, int]:
    """The addresses of a tensor's first and last byte."""
    first = t.data_ptr()
    return first, first + t.itemsize * (1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride()))) - 1


def _addmm_in_fp32(
    total: Tensor, a: Tensor, b: Tensor, out_dtype: torch.dtype, *, beta: float = 1, alpha: float = 1, out: Tensor
) -> Tensor:
    """cuBLAS's product of 16-bit matrices in fp32, which a CPU does not have."""
    assert a.dtype == b.dtype and a.itemsize == 2 and out_dtype == out.dtype == total.dtype == torch.float32
    product = alpha * (a.float() @ b.float())
    return out.copy_(product if beta == 0 else beta * total + product)


_to, _tensor = Tensor.to, torch.tensor


def _moved(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Tensor.to."""
    copy = kwargs.pop("copy", False)
    if args and isinstance(args[0], Tensor):
        args = (args[0].device, args[0].dtype, *args[1:])
    device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    device, dtype = device or self.device, dtype or self.dtype
    if device.type == self.device.type and not isinstance(self, OnCard):
        return _to(self, *args, copy=copy, **kwargs)
    if device.type == self.device.type and dtype == self.dtype and not copy and memory_format is None:
        return self
    return _card().move(self, dtype=dtype, device=device, non_blocking=non_blocking, memory_format=memory_format)


def _pinned(self: Tensor, device: Any = None) -> Tensor:
    """Tensor.pin_memory; in whatever thread."""
    if isinstance(self, OnCard):
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
    copy = self.clone()
    _card().pin(copy)
    return copy


class _Generator(torch.Generator):
    def __new__(cls, device: Any = "cpu") -> "_Generator":
        return super().__new__(cls)


@contextmanager
def pretended_card(monkeypatch: Any, chip: str) -> Iterator[Card]:
    """Have one card for the length of a with block; AssertionError at its end for faults found in it.

    chip: as kernels/dispatch.py names them; "hip:" ones come with a PyTorch for AMD.
    """
    from triton.runtime import interpreter  # in the interpreter alone can kernels run

    family, number = chip.split(":")
    capability = divmod(int(number), 10) if family == "cuda" else (9, 4)  # which PyTorch for AMD makes up, too
    properties = SimpleNamespace(
        name=CHIPS[chip].name, major=capability[0], minor=capability[1], gcnArchName=f"{number}:sramecc+:xnack-",
        total_memory=MEMORY_BYTES, multi_processor_count=4, shared_memory_per_block_optin=CHIPS[chip].shared_bytes,
        uuid="0",
    )  # fmt: skip
    answers = {
        "_lazy_init": None, "is_available": True, "is_initialized": True,
        "device_count": 1, "current_device": 0, "set_device": None,
        "get_device_name": CHIPS[chip].name, "get_device_capability": capability,
        "get_device_properties": properties, "get_arch_list": ["sm_60", "sm_90"],
        "mem_get_info": (MEMORY_BYTES, MEMORY_BYTES),
        "get_per_process_memory_fraction": 1.0, "set_per_process_memory_fraction": None,
        "memory_reserved": 0, "max_memory_reserved": 0, "empty_cache": None, "is_bf16_supported": CHIPS[chip].bf16,
    }  # fmt: skip
    for key, value in answers.items():
        monkeypatch.setattr(torch.cuda, key, lambda *_, value=value, **__: value)
    monkeypatch.setattr(torch.version, "hip", "7.0" if family == "hip" else None)
    card = Card()
    _cards.append(card)

    @contextmanager
    def stream(which: Stream | None) -> Iterator[None]:
        card.current.append(which or card.current[-1])
        try:
            yield
        finally:
            card.current.pop()

    def synchronize(device: Any = None) -> None:
        for side in card.sides:
            side.synchronize()

    def forget_peak(device: Any = None) -> None:
        card.peak = card.allocated

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device=None: card.allocated)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: card.peak)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", forget_peak)
    streams = {"current_stream": lambda device=None: card.current[-1], "default_stream": lambda device=None: card.main}
    for key, value in {"Stream": functools.partial(Stream, card), "Event": Event, "stream": stream, **streams}.items():
        monkeypatch.setattr(torch.cuda, key, value)
    for key in ("range_push", "range_pop"):
        monkeypatch.setattr(torch.cuda.nvtx, key, lambda *_: None)
    monkeypatch.setattr(torch, "Generator", _Generator)
    monkeypatch.setattr(
        torch,
        "tensor",
        lambda *a, device=CPU, pin_memory=False, **k: _moved(
            _pinned(_tensor(*a, **k)) if pin_memory else _tensor(*a, **k), device
        ),
    )
    monkeypatch.setattr(Tensor, "is_pinned", lambda t, device=None: t.untyped_storage().data_ptr() in card.pinned)
    for key, value in {
        "to": _moved,
        "pin_memory": _pinned,
        "cpu": lambda t: _moved(t, CPU),
        "cuda": lambda t, device=None: _moved(t, CUDA),
    }.items():
        monkeypatch.setattr(Tensor, key, value)
    monkeypatch.setattr(torch, "_has_compatible_shallow_copy_type", lambda a, b: type(a) is type(b))  # for Module.to
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", lambda settings: None, raising=False)
    connect = dist.init_process_group
    monkeypatch.setattr(
        dist, "init_process_group", lambda backend, **options: connect({"nccl": "gloo"}[backend], **options)
    )
    launch = interpreter.GridExecutor.__call__

    def on_host(self: Any, *args: Any, **kwargs: Any) -> Any:
        plain = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and not isinstance(a, OnCard)]
        if plain:
            raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
        card.launched((args, kwargs))
        args, kwargs = tree_map_only(OnCard, lambda t: t.values, (args, kwargs))
        with _disable_current_modes():
            return launch(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", on_host)
    try:
        with card:
            yield card
    finally:
        _cards.remove(card)
    assert not card.faults, collections.Counter(card.faults)


def main(chip: str, *flags: str) -> None:
    """Run engine/train.py on a pretended card; each of several processes has one of its own, and gloo is their nccl."""
    import pytest

    from engine import train

    os.environ |= {"LOCAL_RANK": "0", "DS_ACCELERATOR": "cuda"}  # whatever earlier runs have left there
    with pytest.MonkeyPatch.context() as monkeypatch, pretended_card(monkeypatch, chip):
        code = train.main([*flags, "--device=cuda"])
    sys.stdout.flush()
    os._exit(code)  # as the program itself ends where DeepSpeed is loaded


if __name__ == "__main__":
    main(*sys.argv[1:])
