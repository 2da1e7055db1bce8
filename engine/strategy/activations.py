"""What a step keeps of its activations: all, or of some blocks only what it takes to compute the rest again.

A recomputed block keeps its input ("blocks"; Chen et al., 2016); its input and what attention returns ("selective";
Korthikanti et al., 2022); or its input in host memory ("offloaded"), so that what the card holds does not grow with
depth.
"""

import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from engine.model import GPT, Attention
from kernels import attention_packed
from kernels.attention import chunked
from kernels.attention_forward import attention_forward, attention_packed_forward

# What computes attention's output and log-sum-exp: ours, and what F.scaled_dot_product_attention becomes.
ATTENTION_OPS = (
    attention_forward.overload,
    attention_packed_forward.overload,
    chunked.overload,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
)
ON_DEVICE = 2  # inputs of offloaded blocks that are on the device at a time


def recompute_blocks(model: GPT, kind: str, count: int, *, compiled: bool = False) -> "HostInputs | None":
    """Have the first `count` blocks recomputed in the backward pass, in one of the ways above; "none" does nothing.

    compiled: torch.compile will see the model, which cannot be with "offloaded". Returns the keeper of its inputs.
    """
    inputs = HostInputs(count) if kind == "offloaded" else None
    for layer, block in enumerate(model.transformer["h"][: count if kind != "none" else 0]):
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
        if kind == "selective":
            # torch's own contexts watch every op of the block, which a compiler does once and Python in every step.
            watching = functools.partial(create_selective_checkpoint_contexts, list(ATTENTION_OPS))
            options["context_fn"] = watching if compiled else functools.partial(_keeping_attention, block.attn)
        again = functools.partial(checkpoint, block.forward, **options)
        block.forward = _summed(inputs.keeping(layer, again) if inputs else again)
    return inputs


def _summed(forward: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return `forward` of a block such that it gets the stream with the branch added: one tensor to keep, not two."""

    def run(x: Tensor, branch: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
        return forward(x if branch is None else x + branch, None, *rest)

    return run


def in_words(kind: str, count: int) -> str:
    """Return what `recompute_blocks` does, for a run's first lines; "" where it does nothing."""
    how = {
        "none": "",
        "blocks": "recomputed in the backward pass",
        "selective": "recomputed in the backward pass, all but attention",
        "offloaded": "recomputed in the backward pass from inputs kept in host memory",
    }[kind]
    return how and f"{count} blocks {how}"


class _KeptAttention(TorchDispatchMode):
    """Runs attention once: keeps what its ops return in the forward pass, and returns that when they are repeated.

    It works below autograd, which meets the same op with the same output twice and saves what it always does.
    """

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[Any] = []
        self.repeated: Iterator[Any] | None = None

    def attend(self, qkv: Tensor, *, doc_start: Tensor | None = None) -> Tensor:
        with self:
            return attention_packed(qkv, doc_start=doc_start)

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func not in ATTENTION_OPS:
            return func(*args, **(kwargs or {}))
        if self.repeated is None:
            output = func(*args, **(kwargs or {}))
            self.outputs.append(output)
        else:
            output = next(self.repeated)
        # Autograd writes its node into the tensors that it gets; kept ones would then hold the graph that holds them.
        return tree_map_only(Tensor, Tensor.detach, output)


class _Attending:
    """Within it the attention of a block goes through `kept`."""

    def __init__(self, module: Attention, kept: _KeptAttention, repeat: bool) -> None:
        self.module, self.kept, self.repeat = module, kept, repeat

    def __enter__(self) -> None:
        self.kept.repeated = iter(self.kept.outputs) if self.repeat else None
        self.module.attend = self.kept.attend

    def __exit__(self, *_: object) -> None:
        del self.module.attend


def _keeping_attention(module: Attention) -> tuple[_Attending, _Attending]:
    """Return the contexts of one run of a block: of its forward pass, and of its repetition."""
    kept = _KeptAttention()
    return _Attending(module, kept, False), _Attending(module, kept, True)


class _Input:
    """A block's input: on the device while `tensor` is there, in host memory if it has a `slot`.

    copied: the last copy out of or into `tensor`; the computation waits for it before it uses or frees `tensor`.
    before: the input of the block before, which the backward pass wants next.
    """

    __slots__ = ("tensor", "device", "shape", "slot", "pool", "copied", "before", "__weakref__")

    def __init__(self, tensor: Tensor, before: "weakref.ref[_Input] | None") -> None:
        self.tensor: Tensor | None = tensor
        self.device, self.shape, self.before = tensor.device, tensor.shape, before
        self.slot: Tensor | None = None
        self.pool: list[Tensor] = []
        self.copied: torch.cuda.Event | None = None

    @property
    def host(self) -> Tensor:
        return self.slot[: self.shape.numel()].view(self.shape)

    def settle(self) -> None:
        if self.copied is not None:
            self.copied.wait()  # makes the computation wait, not the host
            self.copied = None

    def __del__(self) -> None:
        self.settle()  # of a backward pass that broke off: nobody has waited for what is on its way to `tensor`
        if self.slot is not None:
            self.pool.append(self.slot)


class HostInputs:
    """Keeps the inputs of the first `count` blocks in host memory from forward to backward pass, all but the last two.

    Copies run on a stream of their own: out while the following blocks compute, and back one block ahead of their use.
    No device tensor belongs to that stream: the computation's allocates, uses and frees each, and memory is never
    reused too early, because a copy waits for all that the computation was given before it, which may use the memory
    copied to, and the computation waits for the copy before it uses or frees what was copied. All waiting is the
    device's, never the host's. So at most two inputs are there at a time however far ahead Python is, which
    `record_stream` would not give: it holds memory until the host sees that a copy is done. Host buffers are pinned,
    allocated once, and read and written by that one stream, in order.
    """

    def __init__(self, count: int) -> None:
        self.sent = max(0, count - ON_DEVICE)
        self.host_bytes = 0
        self._pool: list[Tensor] = []  # host buffers that no input lies in
        self._slot_elements = 0
        self._stream: torch.cuda.Stream | None = None
        self._newest: weakref.ref[_Input] | None = None

    def keeping(
        self, layer: int, forward: Callable[..., tuple[Tensor, Tensor]]
    ) -> Callable[..., tuple[Tensor, Tensor]]:
        """Return `forward`, a checkpointed block, such that its input is kept here."""

        def run(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
            # A checkpoint saves nothing but its arguments; the others say where documents begin and what is where.
            shape = x.shape  # the graph holds the hooks, and they must not hold x
            with saved_tensors_hooks(lambda t: self._pack(layer, t) if t.shape == shape else t, self._unpack):
                return forward(x, *rest)

        return run

    def _pack(self, layer: int, x: Tensor) -> _Input:
        item = _Input(x.detach().contiguous(), self._newest if layer else None)
        self._newest = weakref.ref(item)  # the graph alone keeps inputs alive
        if layer < self.sent:
            item.slot, item.pool = self._take_slot(x), self._pool
            item.copied = self._copy(item.tensor, item.host)
        before = _alive(item.before)
        gone = _alive(before.before) if before else None
        if gone:  # two blocks have been computed meanwhile: the wait is short
            gone.settle()
            gone.tensor = None
        return item

    def _unpack(self, item: _Input | Tensor) -> Tensor:
        if isinstance(item, Tensor):
            return item
        self._fetch(item)
        if before := _alive(item.before):
            self._fetch(before)
        item.settle()
        tensor = item.tensor
        if item.slot is not None:
            item.tensor = None  # it goes when the block's backward pass has used it
        return tensor

    def _fetch(self, item: _Input) -> None:
        if item.tensor is None:
            item.tensor = torch.empty(item.shape, dtype=item.slot.dtype, device=item.device)
            item.copied = self._copy(item.host, item.tensor)

    def _copy(self, source: Tensor, to: Tensor) -> torch.cuda.Event | None:
        """Copy between device and host; return the event of its end, or None where it is done already."""
        device = to.device if to.is_cuda else source.device
        if device.type == "cpu":
            to.copy_(source)
            return None
        self._stream = self._stream or torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            to.copy_(source, non_blocking=True)
            return self._stream.record_event()

    def _take_slot(self, x: Tensor) -> Tensor:
        """Return a host buffer that holds x: of the first step, but for longer sequences or a second graph.

        MemoryError where the system gives no more.
        """
        if x.numel() > self._slot_elements or not self._pool:
            self._slot_elements = max(x.numel(), self._slot_elements)
            try:
                made = torch.empty(self.sent, self._slot_elements, dtype=x.dtype, pin_memory=x.is_cuda)
            except RuntimeError as error:
                size, said = self.sent * self._slot_elements * x.itemsize >> 20, str(error).splitlines()[0]
                raise MemoryError(f"no {size} MiB of host memory for the inputs of blocks: {said}") from None
            # One allocation, since pinned memory comes in powers of two. Smaller buffers go with the inputs in them.
            self._pool = list(made)
            self.host_bytes = made.nbytes
        return self._pool.pop()


def _alive(reference: "weakref.ref[_Input] | None") -> _Input | None:
    return reference() if reference else None
