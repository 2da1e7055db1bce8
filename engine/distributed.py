"""The processes of a run: who this one is, and the few things all of them agree on."""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Processes:
    """This process among `world_size`; rank 0 writes and speaks."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls) -> "Processes":
        """Read what `deepspeed` or `torchrun` set; without them there is one process."""
        return cls(
            *(
                int(os.environ.get(name, default))
                for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
            )
        )

    @property
    def main(self) -> bool:
        return self.rank == 0

    def connect(self, device: torch.device) -> None:
        """Join the others (nccl between GPUs, gloo between CPUs); a lone process only where a backend is needed."""
        for name, value in (
            ("RANK", 0),
            ("WORLD_SIZE", 1),
            ("LOCAL_RANK", device.index or 0),
            ("MASTER_ADDR", "127.0.0.1"),
            ("MASTER_PORT", 0),
        ):
            os.environ.setdefault(name, str(value))
        if not dist.is_initialized():
            # The others wait while the first writes a checkpoint or prepares data, longer than the ten minutes of nccl.
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2))

    def mean(self, values: Tensor) -> Tensor:
        """Average `values` over the processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
            values /= self.world_size
        return values

    def gather(self, value: Any) -> list[Any]:
        """Return every process's `value`, which pickle takes, in the order of their ranks; all processes call it."""
        values = [value]
        if self.world_size > 1:
            values *= self.world_size
            dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
