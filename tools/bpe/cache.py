"""Pre-tokens to ids through a cache, whose keys are their bytes; what is not there is merged."""

import numpy as np
from numba import int64, njit, uint64

from tools.bpe.intrinsics import load64, prefetch, store64, store_key
from tools.bpe.memory import (
    BATCH,
    HASH,
    HASH_2,
    HASH_3,
    LONG_BYTES,
    LONG_ROW_WORDS_LOG2,
    LONG_ROWS,
    LONG_ROWS_LOG2,
    MEDIUM_BYTES,
    MEDIUM_ROW_WORDS_LOG2,
    MEDIUM_ROWS,
    MEDIUM_ROWS_LOG2,
    SHORT_BYTES,
    SHORT_IDS,
    SHORT_ROW_WORDS_LOG2,
    SHORT_ROWS_LOG2,
)
from tools.bpe.merges import merge_lists, merge_short

LOW_MASKS = np.array([(1 << 8 * n) - 1 for n in range(8)], np.uint64)


@njit
def make_keys(text, first, count, tables, scratch):
    """Fill `keys` for `count` pre-tokens from number `first` on, and have their rows of the cache fetched.

    keys: of each pre-token of at most SHORT_BYTES bytes two words, its bytes and, in the top byte, their number; then,
    from 2 * BATCH on, where its row is, of any.
    """
    positions, keys, cache = scratch.positions, scratch.keys, scratch.cache
    for k in range(count):
        i = positions[first + k]
        n = positions[first + k + 1] - i
        if n <= SHORT_BYTES:
            hashed = store_key(text, i, n, tables.key_shapes, keys, 2 * k)
            row = hashed >> uint64(64 - SHORT_ROWS_LOG2) << uint64(SHORT_ROW_WORDS_LOG2)
        else:
            hashed = load64(text, i) * HASH + load64(text, i + 8) * HASH_2
            hashed += (load64(text, i + n - 8) + uint64(n)) * HASH_3
            if n <= MEDIUM_BYTES:
                row = hashed >> uint64(64 - MEDIUM_ROWS_LOG2) << uint64(MEDIUM_ROW_WORDS_LOG2)
                row += uint64(MEDIUM_ROWS)
            else:
                row = hashed >> uint64(64 - LONG_ROWS_LOG2) << uint64(LONG_ROW_WORDS_LOG2)
                row += uint64(LONG_ROWS)
                prefetch(cache, row + uint64(16))
            prefetch(cache, row + uint64(8))
        prefetch(cache, row)
        keys[2 * BATCH + k] = row


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
    if 2 + full + (count + 3 >> 2) > words:  # as a long run of a rare script may want
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
        make_keys(text, first, batch, tables, scratch)
        for k in range(batch):
            low, high, row = keys[2 * k], keys[2 * k + 1], int64(keys[2 * BATCH + k])
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
