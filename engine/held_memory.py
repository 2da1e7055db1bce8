"""What a process really holds, by part: from the tensors that are there, not from a formula (engine/footprint.py)."""

import gc
from collections.abc import Collection, Iterable

import torch
from torch import Tensor

from engine.device import peak_memory


def storage_bytes(tensors: Iterable[Tensor | None], device: torch.device) -> int:
    """Return the bytes of these tensors' storages on `device`, each counted once."""
    sizes: dict[int, int] = {}
    for t in tensors:
        if t is not None and t.device.type == device.type:
            try:
                sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            except RuntimeError:  # one without memory, such as a compiler leaves behind
                continue
    return sum(sizes.values())


def gradient_bytes(parameters: Iterable[Tensor], device: torch.device) -> int:
    """Return what the gradients take now, before the update; DeepSpeed's lie in buffers of its own."""
    return storage_bytes((p.grad for p in parameters), device)


def by_part(parameters: Collection[Tensor], device: torch.device, gradients: int) -> dict[str, int]:
    """Return the bytes of the peak so far by part; call it right after an update, with what the gradients took before.

    What else is held between updates are optimizer states, master weights and buffers: PyTorch's allocator knows on a
    GPU, Python's collector elsewhere. The rest of the peak came and went within the step, or, on a CPU, is the process.
    """
    weights = storage_bytes(parameters, device)
    if device.type == "cuda":
        held, rest = torch.cuda.memory_allocated(device), "activations and work"
    else:
        # Exactly these types: subclasses may hold no memory of their own, and isinstance() would wake lazy objects.
        tensors = [t for t in gc.get_objects() if type(t) in (Tensor, torch.nn.Parameter)]
        held, rest = storage_bytes(tensors, device), "activations, work and the process"
    left = gradient_bytes(parameters, device)
    parts = {"weights": weights, "gradients": max(gradients, left), "states and buffers": max(0, held - weights - left)}
    return parts | {rest: max(0, peak_memory(device) - sum(parts.values()))}
