"""Several processes, each with the whole model and all states: they share a step's tokens and average gradients."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def data_parallel(model: nn.Module) -> DistributedDataParallel:
    """Return `model` so that its backward pass averages the gradients over the processes, in buckets, overlapped.

    The gradients live in the buckets, in the parameters' dtypes: for as long as the model trains, and only once.
    Within `no_sync()` they only accumulate.
    """
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def average_in_backward(parameters: Iterable[nn.Parameter]) -> None:
    """Average each gradient over the processes as soon as it is there, before the hooks that are registered later."""
    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(_average)


@torch.no_grad()
def _average(parameter: Tensor) -> None:
    # Divided first, as DistributedDataParallel does: the sum of 16-bit gradients could overflow.
    parameter.grad /= dist.get_world_size()
    dist.all_reduce(parameter.grad)
