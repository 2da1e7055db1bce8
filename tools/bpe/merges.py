"""The ids of a pre-token by merging its bytes, and the table of merges that the vocabulary implies."""

import numpy as np
from numba import int32, int64, njit, uint16, uint32, uint64

from tools.bpe.intrinsics import leading_zeros, trailing_zeros
from tools.bpe.memory import EMPTY, HASH, HASH_2, NO_RANK

GROUPS_LOG2, SLOTS_LOG2 = 13, 16


@njit
def merge_group(pair):
    return int64(pair * HASH >> uint64(64 - GROUPS_LOG2))


@njit
def merge_slot(pair, shift):
    return int64((uint64(shift) << uint64(32) | pair) * HASH_2 >> uint64(64 - SLOTS_LOG2))


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
    for i in range(n - 1, -1, -1):  # the leftmost becomes the first of each list, and so of each run
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


@njit
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


@njit
def place_merges(learned):
    """Return `shifts` and `merges` of Tables for what learn_merges returned."""
    groups = 1 << GROUPS_LOG2
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
    shifts, merges = np.zeros(groups, np.uint16), np.full(1 << SLOTS_LOG2, EMPTY)
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
