"""GPT-2's byte pair encoding, id for id as tiktoken does it, many times as fast on each core.

    encoder = Encoder()
    ids = encoder.worker().encode(text, ends)    # many documents, one worker a thread
    encoder.encode_ordinary("one text")

Pre-tokens are found 64 bytes at a time by bit masks, their ids in a cache whose keys are the bytes themselves, so that
nothing rests on a hash being unique; what is not there is merged. The cache has a fixed size: a new pre-token takes the
place of one used longer ago. Compiling takes about ten seconds, once: Numba keeps the result on disk.
"""

import numpy as np

from engine.tokenizer import load_ranks
from tools.bpe import kernels, memory
from tools.bpe.classes import CODE_POINTS, load_code_point_classes


class Encoder:
    """r50k_base for one process: read-only tables, shared by the workers of all its threads."""

    def __init__(self) -> None:
        ranks = load_ranks()
        tokens = sorted(ranks, key=ranks.__getitem__)
        lengths = np.array([len(token) for token in tokens], np.uint8)
        byte_ids = np.array([ranks[bytes([byte])] for byte in range(256)], np.uint16)
        content = np.frombuffer(b"".join(tokens), np.uint8)
        learned = kernels.learn_merges(content, np.cumsum(lengths, dtype=np.int64), byte_ids)
        odd = np.flatnonzero((learned == memory.EMPTY) & (lengths > 1))
        if odd.size:
            raise ValueError(f"token {odd[0]}, {tokens[odd[0]]!r}, does not come from merging two tokens of lower rank")
        classes = np.zeros(1 << 21, np.uint8)
        classes[:CODE_POINTS] = load_code_point_classes()
        byte_pairs = np.full(1 << 16, memory.NO_RANK, np.uint16)
        two_bytes = np.flatnonzero(lengths == 2)
        byte_pairs[[int.from_bytes(tokens[token]) for token in two_bytes]] = two_bytes
        shifts, merges = kernels.place_merges(learned)
        key_shapes = memory.new_key_shapes()
        self.tables = memory.Tables(classes, byte_ids, byte_pairs, shifts, merges, lengths, key_shapes)

    def worker(self) -> "Worker":
        """Return an encoder for one thread, with its own cache."""
        return Worker(self)

    def encode_ordinary(self, text: str) -> list[int]:
        """Return the ids of one text, as tiktoken's method of that name does; for many texts use a worker."""
        content = np.frombuffer(text.encode(), np.uint8)
        return self.worker().encode(content, np.array([content.size]))[:-1].tolist()


class Worker:
    """Encodes documents on one thread, the GIL released; made by Encoder.worker.

    It holds 27 MB, and during a call two bytes for each byte of text at most, whatever the text.
    """

    def __init__(self, encoder: Encoder, window_bytes: int = memory.WINDOW_BYTES) -> None:
        self.tables = encoder.tables
        self.scratch = memory.new_scratch()
        self.window_bytes = window_bytes
        self.merge_scratch = memory.new_merge_scratch(window_bytes)

    def encode(self, text: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Return the ids of documents, uint16, END_OF_TEXT after each.

        text: uint8 (n,), valid UTF-8, the documents end to end; ends: int64 (documents,), where each ends, the last at
        n. The ids of a document equal tiktoken's `encode_ordinary` of it alone. ValueError if `ends` does not fit.
        """
        text = np.ascontiguousarray(text).view()
        text.flags.writeable = False  # one type of array, hence one compiled version
        ends = np.array(ends, np.int64)
        if text.dtype != np.uint8:
            raise ValueError(f"text must be uint8, the bytes of UTF-8, not {text.dtype}")
        if np.any(np.diff(ends, prepend=0) < 0) or (ends[-1] if ends.size else 0) != text.size:
            raise ValueError(f"ends must rise from 0 to the text's {text.size} bytes")
        ids = np.empty(text.size + ends.size + 7, np.uint16)
        merging, place = self.merge_scratch, (0, 0, 0)
        while True:
            place = kernels.encode(text, ends, self.tables, self.scratch, merging, self.window_bytes, ids, *place)
            document, _, count = place
            if document == ends.size:
                ids.resize(count, refcheck=False)
                return ids
            self.window_bytes *= 2  # no text is known that needs it
            merging = self.merge_scratch = memory.new_merge_scratch(self.window_bytes)
