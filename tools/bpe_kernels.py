"""The compiled half of tools/bpe.py: where pre-tokens start, what ids they have, and how bytes merge.

Numba's cache notices a change only in the file of the function that Python calls, so all that is compiled is here but
for bpe_intrinsics.py: after a change there, touch this file.
"""
from typing import NamedTuple

import numpy as np
from numba import int32, int64, njit, uint16, uint32, uint64

from engine.tokenizer import END_OF_TEXT
from tools.bpe_intrinsics import (
    byte_masks,
    copy_bytes,
    leading_zeros,
    load64,
    pointer,
    popcount,
    prefetch,
    store64,
    trailing_zeros,
)
from tools.bpe_tables import LETTER, NUMBER, SPACE

CHUNK_BYTES = 1 << 14  # text looked at at once; with all that is written about it, it stays in the L2 cache
PADDING_BYTES = 128  # after a chunk: one block of 64 and what is read past its end
MASK_WORDS = CHUNK_BYTES // 64 + 2
BATCH = 512  # pre-tokens whose rows of the cache are asked for before the first of them is read
UNROLLED = 24  # starts of a block written without asking whether there are so many
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
MERGE_GROUPS_LOG2, MERGE_SLOTS_LOG2 = 13, 16

NO_RANK = 0xFFFF  # of two tokens that do not merge
EMPTY = np.uint64(0xFFFFFFFFFFFFFFFF)
HASH = np.uint64(0x9E3779B97F4A7C15)
HASH_2 = np.uint64(0xC2B2AE3D27D4EB4F)
HASH_3 = np.uint64(0x165667B19E3779F9)
LOW_MASKS = np.array([(1 << 8 * min(n, 8)) - 1 for n in range(16)], np.uint64)
HIGH_MASKS = np.array([(1 << 8 * max(n - 8, 0)) - 1 for n in range(16)], np.uint64)


class Tables(NamedTuple):
    """What the vocabulary and Unicode say; read-only, shared by all threads. Compiled code has pointers in it."""

    classes: np.ndarray  # uint8 (2**21,): class of each code point, and of whatever else four bytes may decode to
    byte_ids: np.ndarray  # uint16 (256,)
    byte_pairs: np.ndarray  # uint16 (65536,): rank of `first << 8 | second`, or NO_RANK
    shifts: np.ndarray  # uint16 (2**MERGE_GROUPS_LOG2,), see merge_rank
    merges: np.ndarray  # uint64 (2**MERGE_SLOTS_LOG2,): `left << 32 | right << 16 | merged`, or EMPTY
    lengths: np.ndarray  # uint8 (vocab_size,): bytes of each token


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
    masks: np.ndarray  # uint64 (6 * MASK_WORDS,): bits over the chunk, see classify
    positions: np.ndarray  # int32 (CHUNK_BYTES + PADDING_BYTES + UNROLLED,)
    keys: np.ndarray  # uint64 (3 * BATCH,), see make_keys
    parts: np.ndarray  # uint32 (128,), see merge_short


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
    """Return uint64 zeros that begin where a cache line of 64 bytes does, so that no row of the cache lies in two.

    NumPy asks for huge pages where it allocates 4 MiB or more: with small ones, encoding takes a tenth longer.
    """
    room = np.zeros(words + 7, np.uint64)
    first = -room.ctypes.data // 8 % 8
    return room[first : first + words]


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


@njit
def class_at(text, i, classes):
    """Return the class and the bytes of the character at i."""
    b = int64(text[i])
    if b < 0x80:
        return classes[b], 1
    c = int64(text[i + 1]) & 0x3F
    if b < 0xE0:
        return classes[(b & 0x1F) << 6 | c], 2
    c = c << 6 | int64(text[i + 2]) & 0x3F
    if b < 0xF0:
        return classes[(b & 0x0F) << 12 | c], 3
    return classes[(b & 0x07) << 18 | c << 6 | int64(text[i + 3]) & 0x3F], 4


@njit
def contraction_bytes(text, i):
    """Return the bytes of the contraction that starts with the apostrophe at i, 0 if none does."""
    b, c = text[i + 1], text[i + 2]
    if b == 0x73 or b == 0x64 or b == 0x6D or b == 0x74:  # s d m t
        return 2
    if (b == 0x6C and c == 0x6C) or (b == 0x76 and c == 0x65) or (b == 0x72 and c == 0x65):  # ll ve re
        return 3
    return 0


@njit
def clear_bit(mask, base, i):
    mask[base + (i >> 6)] &= ~(uint64(1) << uint64(i & 63))


@njit
def set_bit(mask, base, i):
    mask[base + (i >> 6)] |= uint64(1) << uint64(i & 63)


@njit
def classify(text, blocks, tables, scratch):
    """Fill the first five masks, 64 bytes a word: letters, numbers, white space, blanks, apostrophes.

    All bytes of a character have its class. Returns how many spaces are beyond ASCII; `positions` has where they are.
    """
    masks, positions = scratch.masks, scratch.positions
    letters_over = numbers_over = spaces_over = uint64(0)  # what a character leaves to the next block
    wide_spaces = 0
    for block in range(blocks):
        letters, numbers, spaces, blanks, apostrophes, heads = byte_masks(text, block << 6)
        letters |= letters_over
        numbers |= numbers_over
        spaces |= spaces_over
        letters_over = numbers_over = spaces_over = uint64(0)
        while heads:
            bit = trailing_zeros(heads)
            heads &= heads - uint64(1)
            i = (block << 6) + bit
            kind, width = class_at(text, i, tables.classes)
            mask = (uint64(1) << uint64(width)) - uint64(1)
            over = mask >> uint64(1) >> uint64(63 - bit)
            mask <<= uint64(bit)
            if kind == LETTER:
                letters |= mask
                letters_over = over
            elif kind == NUMBER:
                numbers |= mask
                numbers_over = over
            elif kind == SPACE:
                spaces |= mask
                spaces_over = over
                positions[wide_spaces] = i
                wide_spaces += 1
        masks[block], masks[MASK_WORDS + block], masks[2 * MASK_WORDS + block] = letters, numbers, spaces
        masks[3 * MASK_WORDS + block], masks[4 * MASK_WORDS + block] = blanks, apostrophes
    return wide_spaces


@njit
def find_starts(text, n, tables, scratch):
    """Write to `positions` where the pre-tokens of text[:n] start, in order; return their number.

    text: uint8 (n + PADDING_BYTES,), one document or a part that starts where a pre-token does, blanks after it. That
    makes white space at its end one pre-token, as `\\s++$` does. In the middle of a document, the starts in the last
    eight bytes may be wrong.
    """
    masks, positions = scratch.masks, scratch.positions
    blocks = (n + 64) >> 6
    wide_spaces = classify(text, blocks, tables, scratch)
    masks[2 * MASK_WORDS + blocks] = EMPTY
    last_letter = last_number = last_other = last_space = last_blank = uint64(0)
    contractions = uint64(0)
    one, top = uint64(1), uint64(63)
    for block in range(blocks):
        letters, numbers, spaces = masks[block], masks[MASK_WORDS + block], masks[2 * MASK_WORDS + block]
        blanks = masks[3 * MASK_WORDS + block]
        others = ~(letters | numbers | spaces)
        goes_on = letters & (letters << one | last_letter)
        goes_on |= numbers & (numbers << one | last_number)
        goes_on |= others & (others << one | last_other)
        goes_on |= ~spaces & (blanks << one | last_blank)  # one blank belongs to what follows
        before_space = spaces >> one | masks[2 * MASK_WORDS + block + 1] << top
        goes_on |= spaces & (spaces << one | last_space) & before_space  # the last of several is left to what follows
        masks[5 * MASK_WORDS + block] = ~goes_on
        contractions |= masks[4 * MASK_WORDS + block] & ~goes_on
        last_letter, last_number, last_other = letters >> top, numbers >> top, others >> top
        last_space, last_blank = spaces >> top, blanks >> top
    starts = 5 * MASK_WORDS
    masks[starts] |= one
    for k in range(wide_spaces):  # above, the last byte of such a space was taken for a space of its own
        i = positions[k]
        end = i + 3 if text[i + 2] & 0xC0 == 0x80 else i + 2
        if not masks[2 * MASK_WORDS + (end >> 6)] >> uint64(end & 63) & one:
            clear_bit(masks, starts, end - 1)
            set_bit(masks, starts, i)
    if contractions:
        for block in range(blocks):
            apostrophes = masks[4 * MASK_WORDS + block] & masks[starts + block]
            while apostrophes:
                i = (block << 6) + trailing_zeros(apostrophes)
                apostrophes &= apostrophes - one
                width = contraction_bytes(text, i)
                if width:
                    clear_bit(masks, starts, i + 1)
                    set_bit(masks, starts, i + width)
    count = 0
    for block in range(blocks):
        bits = masks[starts + block]
        begin, written = block << 6, count
        count += popcount(bits)
        while True:
            for k in range(UNROLLED):
                positions[written + k] = begin + trailing_zeros(bits)
                bits &= bits - one
            if not bits:
                break
            written += UNROLLED
    while positions[count - 1] >= n:
        count -= 1
    return count


@njit
def long_pretoken_end(text, i, end, tables):
    """Return where the pre-token that starts at i ends, one of more than three bytes in a document up to `end`."""
    kind, width = class_at(text, i, tables.classes)
    j = i + width
    if text[i] == 0x20:
        following, width = class_at(text, j, tables.classes)
        if following != SPACE:
            kind = following
            j += width
    last = i
    while j < end:
        following, width = class_at(text, j, tables.classes)
        if following != kind:
            return last if kind == SPACE else j
        last = j
        j += width
    return j


@njit
def merge_group(pair):
    return int64(pair * HASH >> uint64(64 - MERGE_GROUPS_LOG2))


@njit
def merge_slot(pair, shift):
    return int64((uint64(shift) << uint64(32) | pair) * HASH_2 >> uint64(64 - MERGE_SLOTS_LOG2))


@njit
def merge_rank(tables, left, right):
    """Return the rank of a merge of two tokens, which is the id of the token that it makes; NO_RANK if there is none.

    A perfect hash: each group of pairs has a shift that gives no two pairs of the vocabulary the same slot.
    """
    pair = uint64(left) << uint64(16) | uint64(right)
    merge = tables.merges[merge_slot(pair, tables.shifts[merge_group(pair)])]
    return uint32(merge & uint64(0xFFFF)) if merge >> uint64(16) == pair else uint32(NO_RANK)


@njit
def byte_pair_rank(tables, text, i):
    return uint32(tables.byte_pairs[int64(text[i]) << 8 | int64(text[i + 1])])


@njit
def merge_short(text, start, n, tables, scratch, out, at):
    """Write the ids of a pre-token of at most 64 bytes to out[at:]; return where they end.

    Always the merge of lowest rank, of several the leftmost. The bits of `alive` are the bytes where a part starts. For
    each such byte i, parts[i] is the part's id and parts[64 + i] is `rank << 6 | i` of the part and the next one.
    """
    parts = scratch.parts
    none = uint32(NO_RANK << 6)
    for i in range(n):
        parts[i] = tables.byte_ids[text[start + i]]
    for i in range(n - 1):
        parts[64 + i] = byte_pair_rank(tables, text, start + i) << uint32(6) | uint32(i)
    parts[64 + n - 1] = none
    alive = EMPTY >> uint64(64 - n)
    while True:
        best = none
        rest = alive
        while rest:
            best = min(best, parts[64 + trailing_zeros(rest)])
            rest &= rest - uint64(1)
        if best >= none:
            break
        rank, i = best >> uint32(6), int64(best & uint32(63))
        above = alive & (~uint64(1) << uint64(i))
        below = alive & ~(EMPTY << uint64(i))
        alive ^= above & (~above + uint64(1))
        above &= above - uint64(1)
        parts[i], parts[64 + i] = rank, none
        if above:
            following = merge_rank(tables, rank, parts[trailing_zeros(above)])
            parts[64 + i] = following << uint32(6) | uint32(i)
        if below:
            h = 63 - leading_zeros(below)
            preceding = merge_rank(tables, parts[h], rank)
            parts[64 + h] = preceding << uint32(6) | uint32(h)
    while alive:
        out[at] = uint16(parts[trailing_zeros(alive)])
        alive &= alive - uint64(1)
        at += 1
    return at


@njit
def add_node(scratch, node, rank, i):
    """Put position i at the head of a rank's list."""
    word, bit = rank >> 6, uint64(1) << uint64(rank & 63)
    filled = scratch.filled[word]
    scratch.node_positions[node] = i
    scratch.node_nexts[node] = scratch.heads[rank] if filled & bit else int32(-1)
    scratch.heads[rank] = node
    scratch.filled[word] = filled | bit
    scratch.filled_words[word >> 6] |= uint64(1) << uint64(word & 63)
    return node + 1


@njit
def merge_lists(text, start, n, tables, scratch, out, at):
    """Write the ids of n bytes, taken as one pre-token, to out[at:]; return their number. Linear in n.

    The same order as in merge_short, from a list of positions for each rank. A token's two parts have lower ranks
    than the token, so what a merge makes possible has a higher rank than the merge: the ranks are gone through once.
    Within one, the order matters only in a run of equal tokens, which is merged from its left end whichever position of
    it comes first. Positions whose rank changed stay listed, and are skipped.
    """
    ids, ranks, before, after = scratch.ids, scratch.ranks, scratch.before, scratch.after
    filled, filled_words = scratch.filled, scratch.filled_words
    nodes = 0
    for i in range(n):
        ids[i] = tables.byte_ids[text[start + i]]
        before[i], after[i] = i - 1, i + 1
        ranks[i] = byte_pair_rank(tables, text, start + i) if i + 1 < n else uint32(NO_RANK)
        if ranks[i] != NO_RANK:
            nodes = add_node(scratch, nodes, int64(ranks[i]), i)
    for group in range(16):
        while filled_words[group]:
            word = group << 6 | trailing_zeros(filled_words[group])
            while filled[word]:
                rank = uint32(word << 6 | trailing_zeros(filled[word]))
                filled[word] &= filled[word] - uint64(1)
                node = scratch.heads[rank]
                while node >= 0:
                    i = scratch.node_positions[node]
                    node = scratch.node_nexts[node]
                    if ranks[i] != rank:
                        continue
                    h = before[i]
                    while h >= 0 and ranks[h] == rank:
                        i = h
                        h = before[i]
                    while True:
                        j = after[i]
                        k = after[j]
                        ids[i], after[i] = rank, k
                        ranks[i] = ranks[j] = NO_RANK
                        if h >= 0:
                            ranks[h] = merge_rank(tables, ids[h], rank)
                            if ranks[h] != NO_RANK:
                                nodes = add_node(scratch, nodes, int64(ranks[h]), h)
                        if k == n:
                            break
                        before[k] = i
                        if ranks[k] != rank:
                            ranks[i] = merge_rank(tables, rank, ids[k])
                            if ranks[i] != NO_RANK:
                                nodes = add_node(scratch, nodes, int64(ranks[i]), i)
                            break
                        h, i = i, k
            filled_words[group] &= filled_words[group] - uint64(1)
    count = 0
    i = int32(0)
    while i < n:
        out[at + count] = uint16(ids[i])
        i = after[i]
        count += 1
    return count


@njit
def merge_windows(text, start, end, window, tables, scratch, out, at):
    """Write the ids of a pre-token of any length to out[at:]; return their number, -1 if the window is too small.

    A sequence of tokens is the encoding of its bytes exactly if every two neighbours are the encoding of theirs: the
    first merge across a boundary would happen between those two alone as well. So the tokens near a window's end are
    dropped, the next window starts there, and the two tokens at the seam are encoded on their own. Should these not
    come back, a larger window is asked for.
    """
    first = at
    begin = start
    margin = min(window >> 2, 256)  # r50k's longest token has 128 bytes
    while True:
        n = min(window, end - begin)
        count = merge_lists(text, begin, n, tables, scratch, out, at)
        if at > first:
            left, right = int64(tables.lengths[out[at - 1]]), int64(tables.lengths[out[at]])
            pair = merge_lists(text, begin - left, left + right, tables, scratch, scratch.seam, 0)
            if pair != 2 or scratch.seam[0] != out[at - 1]:
                return -1
        if begin + n == end:
            return at + count - first
        limit = begin + n - margin
        kept = at
        while begin + int64(tables.lengths[out[at]]) <= limit:
            begin += int64(tables.lengths[out[at]])
            at += 1
        if at == kept:
            return -1


@njit(nogil=True, cache=True)
def learn_merges(tokens, ends, byte_ids):
    """Return each token's merge as `left << 16 | right`, uint64 (vocab_size,); EMPTY for a token that no merge makes.

    tokens: uint8, the bytes of all tokens in the order of their ids; ends: int64 (vocab_size,). With only the merges of
    lower rank known, a token's bytes end as the two parts that its own merge joins.
    """
    learned = np.full(ends.size, EMPTY)
    places = np.full(1 << 18, -1)  # open addressing: ids by pair
    parts = np.empty(256, np.uint64)

    def place_of(pair):
        place = int64(pair * HASH >> uint64(64 - 18))
        while places[place] >= 0 and learned[places[place]] != pair:
            place = (place + 1) & (places.size - 1)
        return place

    start = int64(0)
    for token in range(ends.size):
        n = ends[token] - start
        for i in range(n):
            parts[i] = byte_ids[tokens[start + i]]
        while n > 2:
            best, at = int64(NO_RANK), 0
            for i in range(n - 1):
                rank = places[place_of(parts[i] << uint64(16) | parts[i + 1])]
                if 0 <= rank < best:
                    best, at = rank, i
            if best == NO_RANK:
                break
            parts[at] = best
            n -= 1
            for i in range(at + 1, n):
                parts[i] = parts[i + 1]
        if n == 2:
            pair = parts[0] << uint64(16) | parts[1]
            places[place_of(pair)] = token
            learned[token] = pair
        start = ends[token]
    return learned


@njit(nogil=True, cache=True)
def place_merges(learned):
    """Return `shifts` and `merges` of Tables for what learn_merges returned."""
    groups = 1 << MERGE_GROUPS_LOG2
    sizes = np.zeros(groups, np.int64)
    for pair in learned:
        if pair != EMPTY:
            sizes[merge_group(pair)] += 1
    ends = np.cumsum(sizes) - sizes
    tokens = np.empty(learned.size, np.int64)  # by group
    for token in range(learned.size):
        if learned[token] != EMPTY:
            group = merge_group(learned[token])
            tokens[ends[group]] = token
            ends[group] += 1
    shifts, merges = np.zeros(groups, np.uint16), np.full(1 << MERGE_SLOTS_LOG2, EMPTY)
    for group in np.argsort(-sizes, kind="mergesort"):  # the largest first, while most slots are free
        members = tokens[ends[group] - sizes[group] : ends[group]]
        shift = placed = 0
        while placed < members.size:
            pair = learned[members[placed]]
            slot = merge_slot(pair, shift)
            if merges[slot] == EMPTY:
                merges[slot] = pair << uint64(16) | uint64(members[placed])
                placed += 1
                continue
            for token in members[:placed]:
                merges[merge_slot(learned[token], shift)] = EMPTY
            placed = 0
            shift += 1
        shifts[group] = shift
    return shifts, merges


@njit
def make_keys(text, first, count, scratch):
    """Fill `keys` for `count` pre-tokens from number `first` on, and have their rows of the cache fetched.

    keys: BATCH words each: of a pre-token of at most SHORT_BYTES bytes, its bytes and, in the top byte, their number;
    of any, where its row is.
    """
    positions, keys, cache = scratch.positions, scratch.keys, scratch.cache
    for k in range(count):
        i = positions[first + k]
        n = positions[first + k + 1] - i
        low, high = load64(text, i), load64(text, i + 8)
        if n <= SHORT_BYTES:
            low, high = low & LOW_MASKS[n], high & HIGH_MASKS[n] | uint64(n) << uint64(56)
            row = (low * HASH + high * HASH_2) >> uint64(64 - SHORT_ROWS_LOG2) << uint64(SHORT_ROW_WORDS_LOG2)
        else:
            hashed = low * HASH + high * HASH_2 + (load64(text, i + n - 8) + uint64(n)) * HASH_3
            if n <= MEDIUM_BYTES:
                row = hashed >> uint64(64 - MEDIUM_ROWS_LOG2) << uint64(MEDIUM_ROW_WORDS_LOG2)
                row += uint64(MEDIUM_ROWS)
            else:
                row = hashed >> uint64(64 - LONG_ROWS_LOG2) << uint64(LONG_ROW_WORDS_LOG2)
                row += uint64(LONG_ROWS)
                prefetch(cache, row + uint64(16))
            prefetch(cache, row + uint64(8))
        prefetch(cache, row)
        keys[k], keys[BATCH + k], keys[2 * BATCH + k] = low, high, row


@njit
def pack(out, at, count):
    """Return up to four ids as one word, the first one lowest."""
    word = uint64(0)
    for k in range(min(count, 4)):
        word |= uint64(out[at + k]) << uint64(16 * k)
    return word


@njit
def keep_short(cache, row, low, high, out, at, count):
    """Cache the ids of a pre-token of at most SHORT_BYTES bytes, whose key is (low, high).

    A row of eight words has two halves: two words of key; seven ids and, above them, their number. More ids go where
    the second half's would be, and its key is zero. What was in the first half moves to the second, what was there is
    forgotten.
    """
    if cache[row + 3] >> uint64(48) <= SHORT_IDS:
        for word in range(row, row + 4):
            cache[word + 4] = cache[word]
    cache[row], cache[row + 1] = low, high
    cache[row + 2] = pack(out, at, count)
    cache[row + 3] = pack(out, at + 4, min(count - 4, 3)) | uint64(count) << uint64(48)
    if count > SHORT_IDS:
        cache[row + 4] = cache[row + 5] = uint64(0)
        cache[row + 6] = pack(out, at + 7, count - 7)
        cache[row + 7] = pack(out, at + 11, count - 11)


@njit
def row_holds(text, i, n, cache, row):
    """Say whether a medium or long row is that of text[i : i + n]."""
    full = n >> 3
    same = cache[row] & uint64(0xFF) == uint64(n)
    same &= cache[row + 1 + full] == load64(text, i + 8 * full) & LOW_MASKS[n & 7]
    for k in range(full):
        same &= cache[row + 1 + k] == load64(text, i + 8 * k)
    return same


@njit
def keep(cache, row, text, i, n, out, at, count):
    """Cache the ids of a pre-token of SHORT_BYTES + 1 to LONG_BYTES bytes, if its row has room for them.

    A medium or long row has the numbers of bytes and of ids, then the bytes, then the ids, each in whole words.
    """
    full = n >> 3
    words = 1 << MEDIUM_ROW_WORDS_LOG2 if n <= MEDIUM_BYTES else 1 << LONG_ROW_WORDS_LOG2
    if 2 + full + (count + 3 >> 2) > words:  # bytes of no language
        return
    cache[row] = uint64(n) | uint64(count) << uint64(8)
    for k in range(full):
        cache[row + 1 + k] = load64(text, i + 8 * k)
    cache[row + 1 + full] = load64(text, i + 8 * full) & LOW_MASKS[n & 7]
    for k in range(0, count, 4):
        cache[row + 2 + full + (k >> 2)] = pack(out, at + k, count - k)


@njit
def encode_short(text, i, n, row, low, high, tables, scratch, out, at):
    """Write the ids of a pre-token of at most SHORT_BYTES bytes to out[at:], and cache them; return where they end."""
    end = merge_short(text, i, n, tables, scratch, out, at)
    keep_short(scratch.cache, row, low, high, out, at, end - at)
    return end


@njit
def encode_longer(text, i, n, row, tables, scratch, merging, out, at):
    """Write the ids of a pre-token of SHORT_BYTES + 1 to LONG_BYTES bytes to out[at:]; return where they end."""
    cache = scratch.cache
    if row_holds(text, i, n, cache, row):
        count = int64(cache[row] >> uint64(8))
        first = row + 2 + (n >> 3)
        for k in range(0, count, 4):
            store64(out, at + k, cache[first + (k >> 2)])
        return at + count
    if n <= 64:
        end = merge_short(text, i, n, tables, scratch, out, at)
    else:
        end = at + merge_lists(text, i, n, tables, merging, out, at)
    keep(cache, row, text, i, n, out, at, end - at)
    return end


@njit
def encode_pretokens(text, first, count, tables, scratch, merging, out, at):
    """Write the ids of pre-tokens number `first` to `count` to out[at:], up to one that is longer than LONG_BYTES.

    Returns the number of that one, or `count`, and where the ids end; up to seven places further may be written to. A
    row of the cache is found by a hash and verified by the bytes that it holds.
    """
    cache, keys, positions = scratch.cache, scratch.keys, scratch.positions
    while first < count:
        batch = min(BATCH, count - first)
        make_keys(text, first, batch, scratch)
        for k in range(batch):
            low, high, row = keys[k], keys[BATCH + k], int64(keys[2 * BATCH + k])
            if row >= MEDIUM_ROWS:
                i = positions[first + k]
                n = positions[first + k + 1] - i
                if n > LONG_BYTES:
                    return first + k, at
                at = encode_longer(text, i, n, row, tables, scratch, merging, out, at)
                continue
            if cache[row] != low or cache[row + 1] != high:
                if cache[row + 4] != low or cache[row + 5] != high:
                    i, n = positions[first + k], int64(high >> uint64(56))
                    at = encode_short(text, i, n, row, low, high, tables, scratch, out, at)
                    continue
                for word in range(row, row + 4):  # what was used last is what stays
                    cache[word], cache[word + 4] = cache[word + 4], cache[word]
            rest = cache[row + 3]
            ids = int64(rest >> uint64(48))
            store64(out, at, cache[row + 2])
            store64(out, at + 4, rest)
            if ids > SHORT_IDS:
                store64(out, at + 7, cache[row + 6])
                store64(out, at + 11, cache[row + 7])
            at += ids
        first += batch
    return first, at


@njit(nogil=True, cache=True)
def encode(text, ends, table_arrays, scratch_arrays, merge_arrays, window, out, document, start, at):
    """Write the ids of documents to `out`, END_OF_TEXT after each, from what an earlier call returned or (0, 0, 0).

    text: uint8, the documents end to end; ends: int64 (documents,); out: uint16 (text.size + documents + 7,).
    Returns (document, start, at): the document it stopped in, the byte it stopped at, and the number of ids; all is
    done where `document` is the number of documents. Otherwise the pre-token at `start` wants a larger window.
    """
    t, s, m = table_arrays, scratch_arrays, merge_arrays
    tables = Tables(
        pointer(t.classes),
        pointer(t.byte_ids),
        pointer(t.byte_pairs),
        pointer(t.shifts),
        pointer(t.merges),
        pointer(t.lengths),
    )
    scratch = Scratch(
        pointer(s.cache),
        pointer(s.text),
        pointer(s.masks),
        pointer(s.positions),
        pointer(s.keys),
        pointer(s.parts),
    )
    merging = MergeScratch(
        pointer(m.ids),
        pointer(m.ranks),
        pointer(m.before),
        pointer(m.after),
        pointer(m.node_positions),
        pointer(m.node_nexts),
        pointer(m.heads),
        pointer(m.filled),
        pointer(m.filled_words),
        pointer(m.seam),
    )
    ids, whole, chunk, positions = pointer(out), pointer(text), scratch.text, scratch.positions
    while document < ends.size:
        end = ends[document]
        while start < end:
            n = min(CHUNK_BYTES, end - start)
            copy_bytes(chunk, whole, start, n)
            s.text[n : n + PADDING_BYTES] = 0x20
            count = find_starts(chunk, n, tables, scratch)
            if start + n == end:
                positions[count] = n
            else:
                count -= 1
                while count and positions[count] > n - 8:
                    count -= 1
            if count == 0:  # one pre-token fills the chunk
                stop = long_pretoken_end(whole, start, end, tables)
                written = merge_windows(whole, start, stop, window, tables, merging, ids, at)
                if written < 0:
                    return document, start, at
                at += written
                start = stop
                continue
            done = 0
            while True:
                done, at = encode_pretokens(chunk, done, count, tables, scratch, merging, ids, at)
                if done == count:
                    break
                written = merge_windows(chunk, positions[done], positions[done + 1], window, tables, merging, ids, at)
                if written < 0:
                    return document, start + positions[done], at
                at += written
                done += 1
            start += positions[count]
        out[at] = END_OF_TEXT
        at += 1
        document += 1
    return document, start, at
