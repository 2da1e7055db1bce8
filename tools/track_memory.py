"""Count the memory of a training step without running it, and compare it with the planner's formulas.

    python tools/track_memory.py --preset 2b --micro_batch_size 4 --recompute 24
    python tools/track_memory.py --preset 2b --micro_batch_size 4 --recompute 24 --keep selective
    python tools/track_memory.py --preset gpt2 --micro_batch_size 8 --dtype fp32

torch's memory tracker follows two micro-batches of the real model and loss on fake tensors, which have shapes and no
memory: a step of two billion parameters takes seconds and nothing. What it cannot see is left out on both sides: memory
inside ops, the optimizer's states, the context, fragmentation.
"""

import dataclasses
import sys
import time
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

import kernels.cross_entropy
from engine.command_line import CommandLine, ends_on_ctrl_c, positive
from engine.config import PRESETS, ModelConfig
from engine.device import DTYPES
from engine.footprint import METHODS, Footprint, Recompute, predict
from engine.model import GPT
from engine.strategy.activations import recompute_blocks

MiB = 2**20
# Activations, gradients and weights are what the tracker sees; which states belong to them does not matter to it.
METHOD_OF_WEIGHTS = {"fp32": "resident", "bf16": "stochastic", "fp16": "stochastic"}


def track(
    model: ModelConfig,
    *,
    dtype: str,
    weights: str = "fp32",
    micro_batch_size: int,
    recompute: Recompute = Recompute(),
    accumulates: bool = True,
) -> dict[str, int]:
    """Return the bytes at the fullest moment of a training step, in all and as torch's tracker classifies them.

    dtype, weights: "fp32", "bf16" or "fp16", of the computation and of the stored weights. accumulates: the gradients
    of a micro-batch before it exist. What lies in host memory is left out.
    """
    with FakeTensorMode(), mock.patch.object(kernels.cross_entropy, "_scaled", _scaled_in_place):
        default = torch.get_default_dtype()
        torch.set_default_dtype(DTYPES[weights])  # a fake parameter cannot be cast afterwards
        try:
            gpt = GPT(model, DTYPES[dtype])
        finally:
            torch.set_default_dtype(default)
        inputs = recompute_blocks(gpt, recompute.kind, recompute.layers)
        tokens = torch.zeros(micro_batch_size, model.block_size, dtype=torch.int64)
        tracker = MemTracker()
        tracker.track_external(gpt, tokens)
        with tracker:
            gpt(tokens, tokens).backward()
            if accumulates:
                tracker.reset_mod_stats()
                gpt(tokens, tokens).backward()
        peak = next(iter(tracker.get_tracker_snapshot("peak").values()))
    seen = {str(kind).split(".")[-1].lower(): size for kind, size in peak.items()}
    return seen | {"total": seen["total"] - inputs.host_bytes} if inputs else seen


def _scaled_in_place(t: Tensor, factor: Tensor) -> Tensor:
    """What the loss does to its gradients on a real device; on fake tensors it leaves that to a compiler."""
    if t.dtype == factor.dtype:
        return t.mul_(factor)
    if t.numel():
        for block in t.split(kernels.cross_entropy.slab_rows(t)):
            block.copy_(block.to(factor.dtype) * factor)
    return t


def predict_tracked(
    model: ModelConfig, *, dtype: str, weights: str = "fp32", recompute: Recompute = Recompute(), **asked: int | bool
) -> Footprint:
    """Return the planner's formulas for what `track` counts of the same arguments."""
    method = next(m for m in METHODS if m.name == METHOD_OF_WEIGHTS[weights])
    footprint = predict(model, method, dtype=dtype, recompute=recompute, traced=True, **asked)
    unseen = dict.fromkeys(("master_weights", "optimizer_states"), 0)
    return dataclasses.replace(footprint, card=footprint.card | unseen)


@ends_on_ctrl_c()
def main(arguments: list[str] | None = None) -> int:
    parser = CommandLine(__doc__)
    add = parser.add_argument
    add("--preset", required=True, choices=list(PRESETS))
    add("--micro_batch_size", type=positive, default=1, metavar="N", help="sequences [1]")
    add("--block_size", type=positive, metavar="N", help="tokens of a sequence; without it the preset's")
    add("--dtype", choices=list(DTYPES), default="bf16", help="of the computation [bf16]")
    add("--weights", choices=list(DTYPES), default="bf16", help="of the stored weights [bf16]")
    add("--recompute", type=int, default=0, metavar="N", help="blocks whose activations are not kept [0]")
    add("--keep", choices=["blocks", "selective", "offloaded"], default="blocks", help="what of them is kept [blocks]")
    options = parser.parse_args(arguments)
    settings = PRESETS[options.preset]["model"]
    model = ModelConfig(**(settings | ({"block_size": options.block_size} if options.block_size else {})))
    asked = {key: getattr(options, key) for key in ("dtype", "weights", "micro_batch_size")}
    if not 0 <= options.recompute <= model.n_layer:
        parser.error(f"--recompute must be 0 to {model.n_layer}, {options.preset}'s blocks; got {options.recompute}")
    asked["recompute"] = Recompute(options.keep, options.recompute) if options.recompute else Recompute()
    began = time.perf_counter()
    seen = track(model, **asked)
    predicted = predict_tracked(model, **asked)
    for kind, size in seen.items():
        if size and kind != "total":
            print(f"{kind:>24} {size / MiB:10,.0f} MiB")
    print(f"{'tracked':>24} {seen['total'] / MiB:10,.0f} MiB in {time.perf_counter() - began:.0f} s")
    error = predicted.card_bytes / seen["total"] - 1
    print(f"{'planned':>24} {predicted.card_bytes / MiB:10,.0f} MiB, {error:+.1%}; fullest: {predicted.phase}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
