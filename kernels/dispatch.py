"""Which implementation of each op runs on which chip: one table, one decision per op, made once and with its reason.

    PILESMITH_KERNELS=triton|torch   overrides every decision (and the config field of the same meaning)
    PILESMITH_CHIP=cuda:75           decides as if the device were that chip; it still runs on the one that is there

Kernel files take `triton`, `tl` and `TensorDescriptor` from here, so that they import and work without Triton.
"""

import functools
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:

    class _Absent:
        """Stands in for `triton` and `tl` at import: kernels stay plain functions that nothing calls."""

        @staticmethod
        def constexpr(value: object) -> object:
            return value

        @staticmethod
        def jit(function: Callable | None = None, **_options) -> Callable:
            return function if function is not None else _Absent.jit

    triton = tl = TensorDescriptor = _Absent()  # type: ignore[assignment]

LOG2_E = math.log2(math.e)  # kernels compute powers of 2: exp(x) is 2^(x log2(e))
TRITON_PRESENT = hasattr(triton, "__version__")
# What `@triton.jit` sees at import decides what kernels are, so this is read at the same moment, and a constant after.
_INTERPRETING = TRITON_PRESENT and triton.knobs.runtime.interpret


@dataclass(frozen=True, kw_only=True)
class Chip:
    """What a chip can do, as far as our kernels care.

    name: what people call it; target: the compile target, or "cpu"; dtype: the number format to train in;
    tensor_cores: reached through `tl.dot`; shared_bytes: shared memory that one block may have;
    triton: Triton compiles for it and is worth using there; sdpa: PyTorch's best fused attention there ("flash",
    "efficient" or "none").
    """

    name: str
    target: str
    dtype: str
    tensor_cores: bool
    shared_bytes: int
    triton: bool = True
    sdpa: str = "flash"

    @property
    def bf16(self) -> bool:
        """Whether bf16 is native, as `torch.cuda.is_bf16_supported(including_emulation=False)` has it."""
        return self.dtype == "bfloat16"

    @property
    def warp_size(self) -> int:
        """Threads of a warp: 64 on AMD up to gfx9, else 32."""
        return 64 if self.target.startswith("hip:gfx9") else 32

    @property
    def tma(self) -> bool:
        """Whether a separate engine copies tiles into shared memory, by tensor descriptors: NVIDIA's since Hopper."""
        return self.target == "cuda:90"


def _chip(target: str, name: str, dtype: str, tensor_cores: bool, shared_kib: int, **more) -> Chip:
    return Chip(target=target, name=name, dtype=dtype, tensor_cores=tensor_cores, shared_bytes=shared_kib << 10, **more)


CHIPS: dict[str, Chip] = {
    c.target: c
    for c in (
        _chip("cuda:90", "H100", "bfloat16", True, 227),
        _chip("cuda:89", "RTX 4090", "bfloat16", True, 99),
        _chip("cuda:86", "RTX 3090", "bfloat16", True, 99),
        _chip("cuda:80", "A100", "bfloat16", True, 163),
        _chip("cuda:75", "T4", "float16", False, 64, sdpa="efficient"),
        _chip("cuda:70", "V100", "float16", False, 96, sdpa="efficient"),
        _chip("cuda:61", "GTX 1080 Ti", "float16", False, 48, triton=False, sdpa="efficient"),
        _chip("cuda:60", "P100", "float16", False, 48, triton=False, sdpa="efficient"),
        _chip("hip:gfx942", "MI300X", "bfloat16", True, 64),
        _chip("hip:gfx90a", "MI250", "bfloat16", True, 64),
        _chip("hip:gfx1030", "RX 6900 XT", "float16", False, 64, sdpa="none"),
        _chip("hip:gfx906", "Radeon VII", "float16", False, 64, triton=False, sdpa="none"),
        # bf16 on a CPU is right and many times slower than fp32.
        _chip("cpu", "CPU", "float32", False, 0, triton=False),
    )
}

# Ops whose Triton kernels are worth having only where tl.dot reaches matrix cores; every other op is bound by memory.
OPS: dict[str, bool] = {
    "attention": True,
    "attention_decode": True,
    "rotary": False,
    "layer_norm": False,
    "softmax": False,
    "cross_entropy": False,
    "bias_activation": False,
    "adamw": False,
}

_preference = "auto"
_forced: Chip | None = None
_chips: dict[torch.device, Chip] = {}
_decisions: dict[tuple[str, torch.device], tuple[str, str]] = {}


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter: TRITON_INTERPRET as it was when the first of them was imported."""
    return _INTERPRETING


def set_backend(preference: str) -> None:
    """Prefers "triton" or "torch" for every op where it can run; "auto" lets the table decide.

    Raises ValueError for anything else. The environment variable PILESMITH_KERNELS goes before it.
    """
    global _preference
    _check_preference(preference, "backend")
    _preference = preference
    _decisions.clear()


@contextmanager
def use_backend(preference: str) -> Iterator[None]:
    """`set_backend` for the length of a with block."""
    before = _preference
    set_backend(preference)
    try:
        yield
    finally:
        set_backend(before)


def check_environment() -> None:
    """ValueError where PILESMITH_KERNELS or PILESMITH_CHIP is set to what does not exist."""
    _check_preference(os.environ.get("PILESMITH_KERNELS") or "auto", "PILESMITH_KERNELS")
    _check_chip(os.environ.get("PILESMITH_CHIP") or "cpu")


def _check_chip(target: str) -> None:
    if target not in CHIPS:
        raise ValueError(f"PILESMITH_CHIP={target}: no such chip; the table has {', '.join(CHIPS)}")


def force_chip(chip: Chip | str | None) -> None:
    """Decides as if every device were this chip: a key of CHIPS, or a row as `row_of` gives; None: as the device is.

    Raises ValueError for a key that the table does not have. The same as the environment variable PILESMITH_CHIP.
    """
    global _forced
    if isinstance(chip, str):
        _check_chip(chip)
        chip = CHIPS[chip]
    _forced = chip
    _chips.clear()
    _decisions.clear()


def constant_to_compilers(function: Callable) -> Callable:
    """What `torch.compiler.assume_constant_result` does, which imports all of torch._dynamo to do it."""
    function._dynamo_marked_constant = True
    return function


@constant_to_compilers
def chip(device: torch.device) -> Chip:
    """The row of the table for a device; an unlisted GPU gets the nearest older row with its own shared memory."""
    if device not in _chips:
        if _forced is None and os.environ.get("PILESMITH_CHIP"):
            force_chip(os.environ["PILESMITH_CHIP"])
        _chips[device] = _forced or _look_up(device)
    return _chips[device]


@constant_to_compilers
def backend(op: str, device: torch.device) -> str:
    """ "triton" or "torch": what runs `op` on `device`, decided at the first call."""
    key = op, device
    if key not in _decisions:
        _decisions[key] = _decide(op, device)
    return _decisions[key][0]


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors (NVIDIA) or compute units (AMD) of a GPU; 4 elsewhere."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def decisions(device: torch.device) -> list[tuple[str, str, str]]:
    """(op, backend, reason) for every op, to be printed once at start."""
    return [(op, backend(op, device), _decisions[op, device][1]) for op in OPS]


def _check_preference(preference: str, what: str) -> None:
    if preference not in ("auto", "triton", "torch"):
        raise ValueError(f"{what}={preference}: should be auto, triton or torch")


def row_of(target: str, bf16: bool) -> Chip:
    """The row of the table that serves a compile target; `bf16`, whether it is native, matters for AMD's unlisted ones.

    An unlisted NVIDIA chip gets the nearest older row, or the oldest; but never Hopper's, whose tiles are made for
    matrix instructions that no later chip has (on sm_100 they spill). An AMD chip outside the table keeps PyTorch's
    kernels: nothing of ours was compiled for it.
    """
    if target in CHIPS:
        return CHIPS[target]
    if target.startswith("hip:"):
        dtype = "bfloat16" if bf16 else "float16"
        return replace(CHIPS["hip:gfx906"], target=target, name=target, dtype=dtype, sdpa="flash")
    capability = int(target.removeprefix("cuda:"))
    known = [int(key.removeprefix("cuda:")) for key in CHIPS if key.startswith("cuda:") and key != "cuda:90"]
    return CHIPS[f"cuda:{max((n for n in known if n <= capability), default=min(known))}"]


def _look_up(device: torch.device) -> Chip:
    if device.type != "cuda":
        return CHIPS["cpu"]
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        target = "hip:" + properties.gcnArchName.split(":")[0]
    else:
        target = f"cuda:{properties.major * 10 + properties.minor}"
    bf16 = bool(torch.version.hip) and torch.cuda.is_bf16_supported(including_emulation=False)
    row = replace(row_of(target, bf16), name=properties.name)
    optin_bytes = getattr(properties, "shared_memory_per_block_optin", row.shared_bytes)
    return row if row.target == target else replace(row, shared_bytes=min(row.shared_bytes, optin_bytes))


def _decide(op: str, device: torch.device) -> tuple[str, str]:
    preference, who = _preference, "the config"
    if os.environ.get("PILESMITH_KERNELS"):
        preference, who = os.environ["PILESMITH_KERNELS"], "PILESMITH_KERNELS"
        _check_preference(preference, who)
    here = chip(device)
    if preference == "torch":
        return "torch", f"{who} says torch"
    if not TRITON_PRESENT:
        return "torch", "Triton is not installed"
    if device.type != "cuda":
        if not interpreting():
            return "torch", f"{device.type} has no Triton"
        if preference != "triton":
            return "torch", "the interpreter runs only when asked for"
        return "triton", f"{who} says triton, interpreted"
    if preference == "triton":
        return "triton", f"{who} says triton"
    if not here.triton:
        return "torch", f"{here.name} ({here.target}): Triton does not serve this chip"
    if OPS[op] and not here.tensor_cores:
        return "torch", f"{here.name} ({here.target}): no tensor cores through Triton"
    return "triton", f"Triton {triton.__version__} on {here.name} ({here.target})"
