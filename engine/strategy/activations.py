"""What a step keeps of its activations, and what it recomputes in the backward pass."""
import functools

from torch.utils.checkpoint import checkpoint

from engine.model import GPT


def checkpoint_blocks(model: GPT, count: int) -> None:
    """Keep only the inputs of the first `count` blocks and recompute these in the backward pass (Chen et al., 2016)."""
    for block in model.transformer["h"][:count]:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
