"""Where pre-tokens start and end: GPT-2's pattern by bit masks, 64 bytes at a time."""

from numba import int64, njit, uint64

from tools.bpe.classes import LETTER, NUMBER, SPACE
from tools.bpe.intrinsics import byte_masks, popcount, trailing_zeros
from tools.bpe.memory import EMPTY, MASK_WORDS, UNROLLED


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
