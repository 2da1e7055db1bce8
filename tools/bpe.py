"""GPT-2's byte pair encoding, exactly as tiktoken does it, compiled with Numba."""
import numpy as np
from llvmlite import ir
from numba import int64, njit, types, uint16, uint32, uint64
from numba.extending import intrinsic

from engine.tokenizer import END_OF_TEXT, load_ranks
from tools.bpe_tables import CODE_POINTS, LETTER, NUMBER, OTHER, SPACE, load_code_point_classes

NO_RANK = 0xFFFF  # no pair merges into this id
PAIR_SLOTS_LOG2 = 17
CACHE_SLOTS_LOG2 = 16
CACHED_BYTES = 15  # longest pre-token whose ids are cached
CACHED_IDS = 7
SHORT_BYTES = 64  # longest pre-token that merge_short takes
WINDOW_BYTES = 4096  # longer pre-tokens are merged a window at a time
PADDING = 64  # bytes that may be read past the end of a text

EMPTY = np.uint64(0xFFFFFFFFFFFFFFFF)
HASH = np.uint64(0x9E3779B97F4A7C15)
HASH_2 = np.uint64(0xC2B2AE3D27D4EB4F)


@intrinsic
def load64(typingctx, array, index):
    """Return the eight bytes of a uint8 array from `index` on, any alignment, as a uint64."""

    def codegen(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        pointer = builder.bitcast(builder.gep(data, [args[1]]), ir.IntType(64).as_pointer())
        return builder.load(pointer, align=1)

    return types.uint64(array, types.int64), codegen


@intrinsic
def trailing_zeros(typingctx, value):
    """Return the number of zero bits below the lowest one bit of a uint64; 64 for zero."""

    def codegen(context, builder, signature, args):
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 0))

    return types.uint64(types.uint64), codegen


@intrinsic
def leading_zeros(typingctx, value):
    """Return the number of zero bits above the highest one bit of a uint64; 64 for zero."""

    def codegen(context, builder, signature, args):
        return builder.ctlz(args[0], ir.Constant(ir.IntType(1), 0))

    return types.uint64(types.uint64), codegen


@njit(inline="always", cache=True)
def pair_rank(pairs, left, right):
    """Return the id that two neighbouring ids merge into, which is also the merge's rank; NO_RANK if they do not.

    pairs: uint64 (2**PAIR_SLOTS_LOG2,), each `left << 32 | right << 16 | merged` or EMPTY.
    """
    key = (uint64(left) << uint64(16)) | uint64(right)
    slot = (key * HASH) >> uint64(64 - PAIR_SLOTS_LOG2)
    while True:
        entry = pairs[slot]
        if entry >> uint64(16) == key:
            return uint32(entry & uint64(0xFFFF))
        if entry == EMPTY:
            return uint32(NO_RANK)
        slot = (slot + uint64(1)) & uint64((1 << PAIR_SLOTS_LOG2) - 1)


@njit(nogil=True, cache=True)
def merge_short(text, start, n, byte_ids, pairs, out, at):
    """Write the ids of a pre-token of at most SHORT_BYTES bytes to out[at:]; return their number.

    The parts' first bytes are the one bits of `alive`; keys[i] is `rank << 6 | i` of the part at i with the next one.
    """
    ids = np.empty(SHORT_BYTES, np.uint32)
    keys = np.full(SHORT_BYTES, 0xFFFFFFFF, np.uint32)
    for i in range(n):
        ids[i] = byte_ids[text[start + i]]
    for i in range(n - 1):
        keys[i] = (pair_rank(pairs, ids[i], ids[i + 1]) << uint32(6)) | uint32(i)
    alive = EMPTY >> uint64(64 - n)
    while True:
        best = uint32(0xFFFFFFFF)
        for i in range(n):
            best = min(best, keys[i])
        rank = best >> uint32(6)
        if rank >= NO_RANK:
            break
        i = uint64(best & uint32(63))
        above = alive & ~((uint64(2) << i) - uint64(1))
        j = trailing_zeros(above)
        above &= above - uint64(1)
        alive ^= uint64(1) << j
        keys[j] = uint32(0xFFFFFFFF)
        ids[i] = rank
        if above:
            keys[i] = (pair_rank(pairs, rank, ids[trailing_zeros(above)]) << uint32(6)) | uint32(i)
        else:
            keys[i] = uint32(0xFFFFFFFF)
        below = alive & ((uint64(1) << i) - uint64(1))
        if below:
            h = uint64(63) - leading_zeros(below)
            keys[h] = (pair_rank(pairs, ids[h], rank) << uint32(6)) | uint32(h)
    count = 0
    while alive:
        out[at + count] = uint16(ids[trailing_zeros(alive)])
        alive &= alive - uint64(1)
        count += 1
    return count


@njit(inline="always", cache=True)
def sift_up(heap, i):
    """Move heap[i] towards the root of a binary min-heap."""
    item = heap[i]
    while i > 0 and item < heap[(i - 1) >> 1]:
        heap[i] = heap[(i - 1) >> 1]
        i = (i - 1) >> 1
    heap[i] = item


@njit(inline="always", cache=True)
def sift_down(heap, i, size):
    """Move heap[i] away from the root of a binary min-heap of `size` items."""
    item = heap[i]
    while True:
        child = 2 * i + 1
        if child >= size:
            break
        if child + 1 < size and heap[child + 1] < heap[child]:
            child += 1
        if item <= heap[child]:
            break
        heap[i] = heap[child]
        i = child
    heap[i] = item


@njit(nogil=True, cache=True)
def merge_heap(text, start, n, byte_ids, pairs, out, at):
    """Write the ids of n bytes from `start` on, taken as one pre-token, to out[at:]; return their number.

    O(n log n) time and 26 n bytes of scratch. The heap holds `rank << 32 | position`, lowest rank first, then leftmost;
    an item is stale once ranks[position] has changed.
    """
    ids = np.empty(n, np.uint16)
    ranks = np.empty(n, np.uint32)
    before = np.empty(n, np.int32)
    after = np.empty(n, np.int32)
    heap = np.empty(2 * n, np.int64)
    for i in range(n):
        ids[i] = byte_ids[text[start + i]]
        before[i], after[i] = i - 1, i + 1
    size = 0
    for i in range(n):
        ranks[i] = pair_rank(pairs, ids[i], ids[i + 1]) if i + 1 < n else uint32(NO_RANK)
        if ranks[i] != NO_RANK:
            heap[size] = (int64(ranks[i]) << 32) | i
            size += 1
    for i in range(size // 2 - 1, -1, -1):
        sift_down(heap, i, size)
    while size:
        rank, i = uint32(heap[0] >> 32), heap[0] & 0xFFFFFFFF
        size -= 1
        heap[0] = heap[size]
        sift_down(heap, 0, size)
        if ranks[i] != rank:
            continue
        j = after[i]
        k = after[j]
        ids[i] = rank
        after[i] = k
        ranks[j] = NO_RANK
        ranks[i] = NO_RANK
        if k < n:
            before[k] = i
            ranks[i] = pair_rank(pairs, rank, ids[k])
            if ranks[i] != NO_RANK:
                heap[size] = (int64(ranks[i]) << 32) | i
                sift_up(heap, size)
                size += 1
        h = before[i]
        if h >= 0:
            ranks[h] = pair_rank(pairs, ids[h], rank)
            if ranks[h] != NO_RANK:
                heap[size] = (int64(ranks[h]) << 32) | h
                sift_up(heap, size)
                size += 1
    count = 0
    i = 0
    while i < n:
        out[at + count] = ids[i]
        count += 1
        i = after[i]
    return count


@njit(nogil=True, cache=True)
def merge_long(text, start, end, window, byte_ids, pairs, lengths, out, at):
    """Write the ids of a pre-token of any length to out[at:]; return their number.

    Scratch memory is that of one window. A sequence of tokens is the encoding of its bytes exactly if every two
    neighbours are the encoding of theirs: the first merge across any boundary would happen within those two alone as
    well. So the last quarter of a window's tokens is dropped, the next window starts there, and the two tokens at the
    seam are encoded on their own; where that gives something else, all starts again with a window of twice the size.

    lengths: uint8 (vocab_size,), bytes of each token.
    """
    pair_ids = np.empty(512, np.uint16)
    first = at
    begin = start
    while True:
        n = min(window, end - begin)
        count = merge_heap(text, begin, n, byte_ids, pairs, out, at)
        joined = True
        if at > first:
            left = int64(lengths[out[at - 1]])
            both = left + int64(lengths[out[at]])
            joined = merge_heap(text, begin - left, both, byte_ids, pairs, pair_ids, 0) == 2
        if joined and begin + n == end:
            return at + count - first
        kept = 0
        if joined:
            covered = int64(lengths[out[at]])
            while covered <= window - window // 4:
                kept += 1
                begin += int64(lengths[out[at + kept - 1]])
                covered += int64(lengths[out[at + kept]])
        at += kept
        if kept == 0:
            window *= 2
            at, begin = first, start


@njit(nogil=True, cache=True)
def learn_pairs(tokens, ends, byte_ids, pairs):
    """Fill `pairs` from the vocabulary; return the index of a token that no merge makes, or -1.

    tokens: uint8, the tokens' bytes in the order of their ids; ends: int64 (vocab_size,). With only the merges of lower
    rank in the table, a token's bytes end as the two parts that its own merge joins.
    """
    parts = np.empty(256, np.uint16)
    start = int64(0)
    for token in range(ends.size):
        n = ends[token] - start
        if n > 1:
            if n <= SHORT_BYTES:
                count = merge_short(tokens, start, n, byte_ids, pairs, parts, 0)
            else:
                count = merge_heap(tokens, start, n, byte_ids, pairs, parts, 0)
            if count != 2:
                return token
            key = (uint64(parts[0]) << uint64(16)) | uint64(parts[1])
            slot = (key * HASH) >> uint64(64 - PAIR_SLOTS_LOG2)
            while pairs[slot] != EMPTY:
                slot = (slot + uint64(1)) & uint64((1 << PAIR_SLOTS_LOG2) - 1)
            pairs[slot] = (key << uint64(16)) | uint64(token)
        start = ends[token]
    return -1


@njit(inline="always", cache=True)
def class_at(text, i, classes):
    """Return the class and the width in bytes of the character at i."""
    b = int64(text[i])
    if b < 0x80:
        return classes[b], 1
    c = int64(text[i + 1]) & 0x3F
    if b < 0xE0:
        return classes[((b & 0x1F) << 6) | c], 2
    d = int64(text[i + 2]) & 0x3F
    if b < 0xF0:
        return classes[((b & 0x0F) << 12) | (c << 6) | d], 3
    return classes[((b & 0x07) << 18) | (c << 12) | (d << 6) | (int64(text[i + 3]) & 0x3F)], 4


@njit(nogil=True, cache=True)
def next_pretoken(text, i, end, classes):
    """Return the end of the pre-token that starts at i, in a document that ends at `end`."""
    b = text[i]
    if b == 0x27:  # an apostrophe, then s d m t ll ve re
        c = text[i + 1] if i + 1 < end else 0
        if c == 0x73 or c == 0x64 or c == 0x6D or c == 0x74:
            return i + 2
        d = text[i + 2] if i + 2 < end else 0
        if (c == 0x6C and d == 0x6C) or (c == 0x76 and d == 0x65) or (c == 0x72 and d == 0x65):
            return i + 3
    kind, width = class_at(text, i, classes)
    j = i + width
    if b == 0x20 and j < end:
        kind_2, width_2 = class_at(text, j, classes)
        if kind_2 != SPACE:
            kind = kind_2
            j += width_2
    last = i
    while j < end:
        kind_2, width = class_at(text, j, classes)
        if kind_2 != kind:
            break
        last = j
        j += width
    if kind == SPACE and j < end and last > i:
        return last  # the last space of several belongs to what follows
    return j


@njit(nogil=True, cache=True)
def encode(text, ends, classes, byte_ids, pairs, lengths, cache, out):
    """Encode documents; return the number of ids written to `out`. See Worker.encode."""
    at = 0
    i = int64(0)
    for document in range(ends.size):
        end = ends[document]
        while i < end:
            j = next_pretoken(text, i, end, classes)
            n = j - i
            if n > CACHED_BYTES:
                if n <= SHORT_BYTES:
                    at += merge_short(text, i, n, byte_ids, pairs, out, at)
                else:
                    at += merge_long(text, i, j, WINDOW_BYTES, byte_ids, pairs, lengths, out, at)
                i = j
                continue
            low, high = load64(text, i), load64(text, i + 8)
            if n < 8:
                low &= (uint64(1) << uint64(8 * n)) - uint64(1)
                high = uint64(0)
            else:
                high &= (uint64(1) << uint64(8 * (n - 8))) - uint64(1)
            high |= uint64(n) << uint64(56)
            hashed = (low * HASH) ^ (high * HASH_2)
            hashed ^= hashed >> uint64(32)
            slot = ((hashed * HASH) >> uint64(64 - CACHE_SLOTS_LOG2)) << uint64(2)
            if cache[slot] != low or cache[slot + uint64(1)] != high:
                count = merge_short(text, i, n, byte_ids, pairs, out, at)
                if count <= CACHED_IDS:
                    cache[slot], cache[slot + uint64(1)] = low, high
                    low = high = uint64(0)
                    for k in range(min(count, 4)):
                        low |= uint64(out[at + k]) << uint64(16 * k)
                    for k in range(4, count):
                        high |= uint64(out[at + k]) << uint64(16 * (k - 4))
                    cache[slot + uint64(2)] = low
                    cache[slot + uint64(3)] = high | (uint64(count) << uint64(48))
            else:
                low, high = cache[slot + uint64(2)], cache[slot + uint64(3)]
                count = int64(high >> uint64(48))
                for k in range(min(count, 4)):
                    out[at + k] = uint16(low >> uint64(16 * k))
                for k in range(4, count):
                    out[at + k] = uint16(high >> uint64(16 * (k - 4)))
            at += count
            i = j
        out[at] = END_OF_TEXT
        at += 1
    return at


class Encoder:
    """r50k_base for one process: read-only tables, shared by the workers of all its threads."""

    def __init__(self) -> None:
        ranks = load_ranks()
        tokens = sorted(ranks, key=ranks.__getitem__)
        self.byte_ids = np.array([ranks[bytes([byte])] for byte in range(256)], np.uint16)
        self.lengths = np.array([len(token) for token in tokens], np.uint8)
        self.classes = np.zeros(1 << 21, np.uint8)  # whatever four bytes decode to has a place
        self.classes[:CODE_POINTS] = load_code_point_classes()
        self.pairs = np.full(1 << PAIR_SLOTS_LOG2, EMPTY, np.uint64)
        text = np.frombuffer(b"".join(tokens), np.uint8)
        odd = learn_pairs(text, np.cumsum(self.lengths, dtype=np.int64), self.byte_ids, self.pairs)
        if odd >= 0:
            raise ValueError(f"token {odd} ({tokens[odd]!r}) does not come from merging two tokens of lower rank")

    def worker(self) -> "Worker":
        """Return an encoder for one thread, with its own cache."""
        return Worker(self)

    def encode_ordinary(self, text: str) -> list[int]:
        """Return the ids of one text, as tiktoken's method of that name does; for many texts use a worker."""
        content = np.frombuffer(text.encode(), np.uint8)
        return self.worker().encode(content, np.array([content.size]))[:-1].tolist()


class Worker:
    """Encodes documents on one thread, with the GIL released; made by Encoder.worker."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.cache = np.zeros(4 << CACHE_SLOTS_LOG2, np.uint64)

    def encode(self, text: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Return the ids of documents, uint16, END_OF_TEXT after each.

        text: uint8 (n,), valid UTF-8, the documents end to end; ends: int64 (documents,), where each ends, the last at
        n. The ids of a document equal tiktoken's `encode_ordinary` of it alone.
        """
        encoder = self.encoder
        padded = np.concatenate([text, np.zeros(PADDING, np.uint8)])
        out = np.empty(text.size + ends.size, np.uint16)
        count = encode(
            padded,
            ends.astype(np.int64, copy=False),
            encoder.classes,
            encoder.byte_ids,
            encoder.pairs,
            encoder.lengths,
            self.cache,
            out,
        )
        return out[:count].copy()
