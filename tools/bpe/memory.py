"""What encoding reads and writes: the vocabulary's tables, and what each thread has for itself."""

from typing import NamedTuple

import numpy as np

CHUNK_BYTES = 1 << 14  # text looked at at once; with all that is written about it, it stays in the L2 cache
PADDING_BYTES = 128  # after a chunk: one block of 64 and what is read past its end
MASK_WORDS = CHUNK_BYTES // 64 + 2
UNROLLED = 24  # starts of a block written without asking whether there are so many
BATCH = 512  # pre-tokens whose rows of the cache are asked for before the first of them is read
WINDOW_BYTES = 8192  # longer pre-tokens are merged a window at a time

# The cache has rows for short, medium and long pre-tokens, so many that it forgets few words of a language.
SHORT_BYTES, SHORT_IDS = 15, 7  # what half a short row has room for
MEDIUM_BYTES, LONG_BYTES = 40, 127  # the longest pre-tokens that the other rows are for
SHORT_ROWS_LOG2, SHORT_ROW_WORDS_LOG2 = 18, 3
MEDIUM_ROWS_LOG2, MEDIUM_ROW_WORDS_LOG2 = 16, 4
LONG_ROWS_LOG2, LONG_ROW_WORDS_LOG2 = 13, 5
MEDIUM_ROWS = 1 << SHORT_ROWS_LOG2 + SHORT_ROW_WORDS_LOG2  # the word of the cache where they begin
LONG_ROWS = MEDIUM_ROWS + (1 << MEDIUM_ROWS_LOG2 + MEDIUM_ROW_WORDS_LOG2)
CACHE_WORDS = LONG_ROWS + (1 << LONG_ROWS_LOG2 + LONG_ROW_WORDS_LOG2)

NO_RANK = 0xFFFF  # of two tokens that do not merge
EMPTY = np.uint64(0xFFFFFFFFFFFFFFFF)
HASH, HASH_2, HASH_3 = map(np.uint64, (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9))  # factors


class Tables(NamedTuple):
    """What is only read, shared by all threads: what vocabulary and Unicode say. Compiled code has pointers in it."""

    classes: np.ndarray  # uint8 (2**21,): class of each code point, and of whatever else four bytes may decode to
    byte_ids: np.ndarray  # uint16 (256,)
    byte_pairs: np.ndarray  # uint16 (65536,): rank of `first << 8 | second`, or NO_RANK
    shifts: np.ndarray  # uint16 (2**13,), see merges.merge_rank
    merges: np.ndarray  # uint64 (2**16,): `left << 32 | right << 16 | merged`, or EMPTY
    lengths: np.ndarray  # uint8 (vocab_size,): bytes of each token
    key_shapes: np.ndarray  # uint64 (4 * (SHORT_BYTES + 1),), see new_key_shapes


class MergeScratch(NamedTuple):
    """Room to merge n bytes; `heads`, `filled` and `filled_words` are for ranks, whatever n is."""

    ids: np.ndarray  # uint32 (n,)
    ranks: np.ndarray  # uint32 (n,)
    before: np.ndarray  # int32 (n,)
    after: np.ndarray  # int32 (n,)
    node_positions: np.ndarray  # int32 (3n,)
    node_nexts: np.ndarray  # int32 (3n,)
    heads: np.ndarray  # int32 (65536,)
    filled: np.ndarray  # uint64 (1024,): a bit per rank
    filled_words: np.ndarray  # uint64 (16,): a bit per word of `filled`
    seam: np.ndarray  # uint16 (256,): ids of two tokens' bytes


class Scratch(NamedTuple):
    """What one thread writes to."""

    cache: np.ndarray  # uint64 (CACHE_WORDS,)
    text: np.ndarray  # uint8 (CHUNK_BYTES + PADDING_BYTES,)
    masks: np.ndarray  # uint64 (6 * MASK_WORDS,): bits over the chunk, see pretokens.classify
    positions: np.ndarray  # int32 (CHUNK_BYTES + PADDING_BYTES + UNROLLED,)
    keys: np.ndarray  # uint64 (3 * BATCH,), see cache.make_keys
    parts: np.ndarray  # uint32 (128,), see merges.merge_short


def new_merge_scratch(n: int) -> MergeScratch:
    """Return room to merge n bytes."""
    n = max(n, 256)  # two tokens at a seam
    return MergeScratch(
        ids=np.empty(n, np.uint32),
        ranks=np.empty(n, np.uint32),
        before=np.empty(n, np.int32),
        after=np.empty(n, np.int32),
        node_positions=np.empty(3 * n, np.int32),
        node_nexts=np.empty(3 * n, np.int32),
        heads=np.empty(1 << 16, np.int32),
        filled=np.zeros(1 << 10, np.uint64),
        filled_words=np.zeros(1 << 4, np.uint64),
        seam=np.empty(256, np.uint16),
    )


def zeros_by_line(words: int) -> np.ndarray:
    """Return uint64 zeros that begin where a cache line of 64 bytes does, so that no row lies in two.

    NumPy asks for huge pages where it allocates 4 MiB or more: with small ones, encoding takes a tenth longer.
    """
    room = np.zeros(words + 7, np.uint64)
    first = -room.ctypes.data // 8 % 8
    return room[first : first + words]


def new_key_shapes() -> np.ndarray:
    """Return four words for each n up to SHORT_BYTES: masks of a key's n bytes, and n in its top byte."""
    shapes = zeros_by_line(4 * (SHORT_BYTES + 1))
    for n in range(SHORT_BYTES + 1):
        mask = (1 << 8 * n) - 1
        shapes[4 * n : 4 * n + 4] = mask & int(EMPTY), mask >> 64, 0, n << 56
    return shapes


def new_scratch() -> Scratch:
    """Return what one thread needs, 27 MB, the cache empty."""
    return Scratch(
        cache=zeros_by_line(CACHE_WORDS),
        text=np.empty(CHUNK_BYTES + PADDING_BYTES, np.uint8),
        masks=np.empty(6 * MASK_WORDS, np.uint64),
        positions=np.empty(CHUNK_BYTES + PADDING_BYTES + UNROLLED, np.int32),
        keys=np.empty(3 * BATCH, np.uint64),
        parts=np.empty(128, np.uint32),
    )
