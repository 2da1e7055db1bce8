"""What a step keeps of its activations, and what it recomputes in the backward pass."""
import functools

from torch.utils.checkpoint import checkpoint

from engine.model import GPT


def checkpoint_blocks(model: GPT) -> None:
    """Keep only each block's input and recompute the block in the backward pass (Chen et al., 2016)."""
    for block in model.transformer["h"]:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
