"""Row softmax with a temperature and an optional causal mask."""

import torch
from torch import Tensor


def softmax(x: Tensor, *, causal: bool = False, temperature: float = 1.0) -> Tensor:
    """Softmax of x / temperature over the last dimension.

    x (..., C); with `causal` x is (..., Tq, Tk) and row i keeps the columns up to i + Tk - Tq, the others become 0.
    Computed in fp32, returned in x's dtype. A row without any finite column becomes 0, and so does its gradient.
    """
    if temperature <= 0:
        raise ValueError(f"softmax: temperature must be positive, got {temperature}")
    scores = x / temperature if temperature != 1.0 else x
    if causal:
        queries, keys = x.shape[-2:]
        hidden = torch.ones(queries, keys, dtype=torch.bool, device=x.device).triu(keys - queries + 1)
        scores = scores.masked_fill(hidden, float("-inf"))
    empty = (scores == float("-inf")).all(-1, keepdim=True)
    # A finite stand-in keeps NaN out of the backward pass as well as the forward.
    return torch.softmax(scores.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)
