"""Size, memory and energy of a step that is measured, on a GPU or a CPU."""

import copy
import ctypes
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from engine.config import Config, from_dict, preset, require
from engine.device import peak_memory
from kernels import dispatch
from kernels.dispatch import Chip

CPU_STEP_TOKENS = 8192
STATUS = Path("/proc/self/status")


def kernels_in_use(device: torch.device) -> dict[str, str]:
    """Return op -> backend. ConfigError where it is Triton's interpreter, whose times mean nothing."""
    decided = {op: backend for op, backend, _ in dispatch.decisions(device)}
    interpreted = dispatch.interpreting() and "triton" in decided.values()
    require(not interpreted, "TRITON_INTERPRET=1 with Triton's kernels: the interpreter's times mean nothing; unset it")
    return decided


def within_minutes(config: Config, device: torch.device, processes: int = 1) -> Config:
    """Return `config`, on a CPU with CPU_STEP_TOKENS tokens a step where it has its preset's and these are more.

    Half a million tokens, as the larger presets have, take a CPU an hour.
    """
    usual = from_dict(preset(config.preset)).optimizer.batch_tokens
    unit = config.model.block_size * (config.optimizer.micro_batch_size or 1) * processes
    tokens = max(unit, CPU_STEP_TOKENS // unit * unit)
    if device.type != "cpu" or config.optimizer.batch_tokens != usual or usual <= tokens:
        return config
    print(
        f"a step has {tokens:,} tokens, not {usual:,}: this is a CPU; any other --batch_tokens is kept", file=sys.stderr
    )
    config = copy.deepcopy(config)
    config.optimizer.batch_tokens = tokens
    return config


def limit_memory(device: torch.device, limit_bytes: int | None, context_counts: bool = False) -> None:
    """Keep this process within `limit_bytes` of a GPU's memory, so that PyTorch raises OutOfMemoryError beyond it.

    None: no limit. `context_counts`: what CUDA itself holds by now is part of the limit, as on a card that has no more.
    """
    if limit_bytes is None:
        return
    free, total = torch.cuda.mem_get_info(device)
    context = total - free - torch.cuda.memory_reserved(device) if context_counts else 0
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0, limit_bytes - context) / total), device)


def limit_attention(chip: Chip) -> None:
    """Keep PyTorch's fused attention in this process to what `chip` has, whose work a larger card does."""
    torch.backends.cuda.enable_flash_sdp(chip.sdpa == "flash")
    torch.backends.cuda.enable_cudnn_sdp(chip.sdpa == "flash")
    torch.backends.cuda.enable_mem_efficient_sdp(chip.sdpa != "none")


def forget_peak(device: torch.device) -> int:
    """Forget the peak so far and return the bytes held now; on a CPU, free memory goes back to the system first."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if not STATUS.exists():  # not Linux: a peak that cannot be forgotten, so only growth beyond it is seen
        return peak_memory(device)
    # The C library keeps freed memory for itself, where a step would find it again without a trace in the peak.
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins again at VmRSS
    return status_bytes("VmRSS")


def peak_bytes(device: torch.device) -> dict[str, int]:
    """Return the peak since `forget_peak`: that of tensors on a GPU, of the process on a CPU, and what was reserved."""
    if device.type == "cuda":
        reserved = torch.cuda.max_memory_reserved(device)
        return {"peak_bytes": torch.cuda.max_memory_allocated(device), "reserved_bytes": reserved}
    resident = peak_memory(device)
    return {"peak_bytes": resident, "reserved_bytes": resident}


def step_bytes(step: Callable[[], Any], device: torch.device) -> int:
    """Return how many bytes `step()` needs at its peak beyond those held before it."""
    held = forget_peak(device)
    step()
    return peak_bytes(device)["peak_bytes"] - held


def alloc_retries(device: torch.device) -> int:
    """Return how often the allocator has given its free memory back to a GPU to find more."""
    return torch.cuda.memory_stats(device)["num_alloc_retries"] if device.type == "cuda" else 0


def energy_j(device: torch.device) -> float | None:
    """Return the joules that the GPU has used since its driver was loaded; None without NVML or on other devices."""
    handle = _nvml_handle(device) if device.type == "cuda" and not torch.version.hip else None
    if handle is None:
        return None
    import pynvml

    try:
        return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
    except pynvml.NVMLError:  # cards before Volta do not count
        return None


@functools.cache
def _nvml_handle(device: torch.device) -> Any:
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"  # NVML numbers GPUs in an order of its own
        return pynvml.nvmlDeviceGetHandleByUUID(uuid)
    except pynvml.NVMLError:
        return None


def status_bytes(field: str) -> int:
    """Return the bytes of a line of /proc/self/status, such as "VmRSS"."""
    line = next(x for x in STATUS.read_text().splitlines() if x.startswith(field + ":"))
    return int(line.split()[1]) * 1024
