"""Which documents are for training and which for validation.

The hash of a document's text decides, and nothing else: not its place, its file, what other documents there are, nor
who prepares it. So text that is added later moves none of what was there, and copies of a text are on one side. Each
side is a token file of its own, made in a pass of its own over the inputs, which encodes that side alone.
"""

import zlib
from typing import Literal

import msgspec
import numpy as np

SPREAD = np.uint32(0x9E3779B1)  # odd: the CRC-32s of texts that differ little differ in few ways


class Split(msgspec.Struct, frozen=True, kw_only=True):
    """One side of the documents, of which about `val_fraction` are on the validation's."""

    val_fraction: float
    side: Literal["train", "val"]

    def select(self, text: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the texts of this side, and where each ends, of those in `text`, uint8, that end at `ends`."""
        view, stops = memoryview(text), ends.tolist()
        documents = [view[start:end] for start, end in zip([0, *stops], stops)]
        hashes = np.array([zlib.crc32(document) for document in documents], np.uint32) * SPREAD
        validates = hashes < self.val_fraction * 2**32
        mine = validates if self.side == "val" else ~validates
        if mine.all():  # they may be huge: not to be copied
            return text, ends
        kept = [document for document, is_mine in zip(documents, mine.tolist()) if is_mine]
        return np.frombuffer(b"".join(kept), np.uint8), np.cumsum([len(document) for document in kept], dtype=np.int64)
