"""Which device and number format a run uses, each with its reason."""

import os
from pathlib import Path
from typing import Literal

import torch

from engine.config import ConfigError, require
from kernels import dispatch

_STATUS = Path("/proc/self/status")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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
        if not (torch.version.hip or os.environ.keys() & {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"}):
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
