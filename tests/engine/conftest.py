"""What the tests of engine share: small models with weights that differ everywhere, and their files.

No kernel is imported here at the top: conftest files load before the interpreter is turned on.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn as nn

if TYPE_CHECKING:
    from engine.model import GPT

CLASSIC = dict(positions="learned", activation="relu", qkv_bias=False, head_bias=True, tie_head=False)


def randomise(model: nn.Module, std: float = 0.2) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=std, generator=generator)
    return model.eval()


def gpt(**changes) -> "GPT":
    """2 layers of 3 heads, 24 wide, unless changed."""
    from engine.config import ModelConfig
    from engine.model import GPT

    config = dict(n_layer=2, n_head=3, n_embd=24, block_size=16, vocab_size=64)
    return randomise(GPT(ModelConfig(**config | changes)))


def draw_weights(model: "GPT", seed: int = 0) -> "GPT":
    """Give a model the weights that training starts from."""
    with torch.no_grad():
        for parameter, (_, weight) in zip(
            model.parameters(), model.initial_weights(torch.Generator().manual_seed(seed)), strict=True
        ):
            parameter.copy_(weight)
    return model


def state_bytes(parameters: Iterable[torch.Tensor], weights: str = "fp32", moments: str = "fp32") -> dict[str, int]:
    """Bytes of "weights", "residuals" and "moments" that an AdamW of parameters of these shapes holds."""
    from engine.optimizer import AdamW

    shapes = [nn.Parameter(torch.empty(p.shape, device="meta")) for p in parameters]
    optimizer = AdamW(shapes, weights=weights, moments=moments)
    optimizer.allocate_states()
    states = [optimizer.state[p] for p in shapes]
    return {
        "weights": sum(p.nbytes for p in shapes),
        "residuals": sum(s["residual"].nbytes for s in states if "residual" in s),
        "moments": sum(tensor.nbytes for s in states for key, tensor in s.items() if key != "residual"),
    }


def tokens(seed: int = 0, below: int = 61) -> torch.Tensor:
    return torch.randint(below, (2, 16), generator=torch.Generator().manual_seed(seed))


def save_model(path: Path, model: "GPT") -> Path:
    from engine.weights import write_weights

    return write_weights(path, model.config, model.state_dict())
