"""Safetensors files that are written a tensor at a time, so that what a model holds is never copied as a whole."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor


class TensorFile:
    """A safetensors file of fp32 tensors, whose names and shapes are known before and whose numbers come in that order.

    Its header is there from the beginning, so a file that some of the tensors have not reached is seen to be cut off.
    """

    def __init__(
        self, path: Path, shapes: Mapping[str, Sequence[int]], metadata: Mapping[str, str] | None = None
    ) -> None:
        self.path, self._coming = path, iter(shapes.items())
        header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
        end = 0
        for name, shape in shapes.items():
            begin, end = end, end + 4 * math.prod(shape)
            header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # numbers begin at a multiple of their size
        path.write_bytes(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: Tensor) -> None:
        """Add the next tensor, of any dtype and device; ValueError where another is due."""
        due, shape = next(self._coming, (None, ()))
        if name != due or tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"{self.path}: {name} {tuple(tensor.shape)} comes where {due} {tuple(shape)} is due")
        with open(self.path, "ab") as file:
            file.write(tensor.detach().to("cpu", torch.float32).contiguous().numpy())

    def finish(self) -> None:
        """ValueError where a tensor that the header promises never came."""
        missing = next(self._coming, None)
        if missing is not None:
            raise ValueError(f"{self.path}: {missing[0]} never came")
