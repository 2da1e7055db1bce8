"""Which device and number format a run uses, each with its reason, and what memory is there."""

import os
import platform
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Literal

import psutil
import torch

from engine.cards import CARDS, DTYPES, Card, find, parse_memory
from engine.config import ConfigError, require
from engine.footprint import CONTEXT_BYTES
from kernels import dispatch

_STATUS = Path("/proc/self/status")
_CGROUPS, _OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def choose_device(wanted: str, local_rank: int = 0) -> tuple[torch.device, str]:
    """Return what `find_device` does; a GPU is this process's current one from now on, and some of its memory taken.

    ConfigError as there, and where the environment asks for kernels or a chip that do not exist.
    """
    try:
        dispatch.check_environment()
    except ValueError as error:
        raise ConfigError(str(error)) from None
    device, reason = find_device(wanted, local_rank)
    if device.type == "cuda":
        # States stay while activations come and go: in segments of a fixed size one would keep the other's from use.
        # But Windows' driver under Linux fails in the first allocation, or a later one (pytorch/pytorch#192330).
        wsl = "microsoft" in platform.release().lower()
        if not (torch.version.hip or wsl or os.environ.keys() & {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"}):
            torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
        torch.cuda.set_device(device)  # the one that Triton launches on, whatever device its tensors are on
    return device, reason


def find_device(wanted: str, local_rank: int = 0) -> tuple[torch.device, str]:
    """Return the device for "auto", "cpu", "cuda" or "cuda:N", and why.

    ConfigError where it is not there, or where this PyTorch was not built for it.
    """
    if wanted == "auto" and not torch.cuda.is_available():
        return torch.device("cpu"), f"no GPU found; {torch.get_num_threads()} threads"
    try:
        device = torch.device("cuda" if wanted == "auto" else wanted)
    except RuntimeError:
        device = None
    require(
        device is not None and device.type in ("cpu", "cuda"),
        f"--device must be auto, cpu, cuda or cuda:N, got {wanted!r}",
    )
    if device.type == "cpu":
        return device, f"asked for; {torch.get_num_threads()} threads"
    require(
        torch.cuda.is_available(),
        f"--device {wanted}: this PyTorch ({torch.__version__}) sees no GPU; try --device cpu",
    )
    count = torch.cuda.device_count()
    if device.index is None:
        require(
            local_rank < count,
            f"--device {wanted}: this machine has {count} GPUs and at least {local_rank + 1} processes: "
            f"start no more than {count}, or --device cpu",
        )
        device = torch.device("cuda", local_rank)
    require(device.index < count, f"--device {wanted}: there are {count} GPUs, numbered from 0")
    return _supported(device), torch.cuda.get_device_name(device.index) + ("" if wanted == "auto" else ", asked for")


def _supported(device: torch.device) -> torch.device:
    """Return a GPU that this PyTorch has machine code for; ConfigError for others."""
    major, minor = torch.cuda.get_device_capability(device)
    built = [int(arch[3:]) for arch in torch.cuda.get_arch_list() if arch.startswith("sm_") and arch[3:].isdigit()]
    require(
        not built or 10 * major + minor >= min(built),
        f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}, "
        f"and this PyTorch ({torch.__version__}) begins at {min(built, default=0) / 10}: "
        "install a build for CUDA 12.6, whose names end in +cu126",
    )
    return device


def choose_dtype(wanted: Literal["auto", "fp32", "bf16", "fp16"], device: torch.device) -> tuple[torch.dtype, str]:
    """Return the dtype of the computation and why, from what the chip can really do (emulated bf16 does not count)."""
    if wanted != "auto":
        return DTYPES[wanted], "asked for"
    chip = dispatch.chip(device)
    reason = {
        "bfloat16": f"{chip.name} multiplies bf16",
        "float16": f"{chip.name} has no bf16 of its own: fp16 with loss scaling",
        "float32": "16-bit numbers are slower here",
    }
    return getattr(torch, chip.dtype), reason[chip.dtype]


def card_of(device: torch.device) -> Card:
    """Return the card of a CUDA device with the memory that it really has and that this process may use.

    What other programs hold of it, a desktop for one, is not there for us. A card that the table does not have gets
    the speeds of a listed one of its kind: enough to choose, not to promise.
    """
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    others = max(0, total - free - torch.cuda.memory_reserved(device) - CONTEXT_BYTES)
    memory = int(properties.total_memory * torch.cuda.get_per_process_memory_fraction(device)) - others
    target = dispatch.chip(device).target
    kin = next((card for card in CARDS if card.target == target), CARDS[0])
    known = find(properties.name)
    return replace(known or replace(kin, name=properties.name), memory_bytes=memory)


def host_memory(asked: str = "") -> int:
    """Return the bytes of host memory to plan with: what is asked for, as "32GB", or what the machine or container has.

    ConfigError where `asked` is no size of memory.
    """
    if not asked:
        return min([psutil.virtual_memory().total, *_memory_limits()])
    try:
        return parse_memory(asked)
    except ValueError as error:
        raise ConfigError(f"--host_memory: {error}") from None


def _memory_limits() -> Iterator[int]:
    """The limits of the control groups that this process is in, of either version of them; none outside Linux."""
    lines = _OWN_CGROUPS.read_text().splitlines() if _OWN_CGROUPS.exists() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, file = (_CGROUPS / "memory", "memory.limit_in_bytes") if controllers else (_CGROUPS, "memory.max")
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):  # a group has no more than those that it is in
            if folder.is_relative_to(root):
                with suppress(OSError, ValueError):  # not seen from inside a container; "max"
                    yield int((folder / file).read_text())


def peak_memory(device: torch.device) -> int:
    """Return the most bytes held so far: PyTorch's allocator on a GPU, the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.exists():
        # Linux's ru_maxrss begins, even after exec, at what the parent held; VmHWM is this program's own.
        peak = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(peak.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if os.uname().sysname == "Darwin" else 1024)
