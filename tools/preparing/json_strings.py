"""Texts out of JSON lines that begin with theirs, `{"text": "..."`, by compiled code, 64 bytes at a time.

What such a line says after its text, and lines of any other form, are for a library to read. Compiling takes a few
seconds, once: Numba keeps the result on disk.
"""

from pathlib import Path

import numpy as np
from llvmlite import ir
from numba import njit, types, uint64
from numba.extending import intrinsic

from tools.bpe import intrinsics
from tools.bpe.digest import digest
from tools.bpe.intrinsics import BYTE, WORD, load64, pointer, trailing_zeros
from tools.preparing import chunks

# What unescape returns in place of where a string ends.
NOT_JSON, NOT_UTF8 = -1, -2

# The columns of read_lines' rows, one a line: where it starts and ends, where it goes on after its text (0 where it is
# for a library, as one with an empty text is), where the text starts and ends, how many halves of surrogate pairs were
# replaced in it, whether chunks.SEPARATOR is in it.
COLUMNS = START, END, REST, TEXT_START, TEXT_END, REPLACED, SEPARATED = range(7)

BLOCK = 64
BLOCK_TYPE = ir.VectorType(BYTE, BLOCK)
QUOTE, BACKSLASH, BLANK, LINE_FEED, BAR, LETTER_U = (np.uint8(ord(c)) for c in '"\\ \n|u')
SEPARATOR_BYTES = len(chunks.SEPARATOR)
SEPARATOR_HEAD, SEPARATOR_TAIL = np.frombuffer(chunks.SEPARATOR[:8] + chunks.SEPARATOR[-8:], np.uint64)
ESCAPES = np.zeros(256, np.uint8)  # what a letter after a backslash stands for, 0 for nothing
ESCAPES[np.frombuffer(b'"\\/bfnrt', np.uint8)] = np.frombuffer(b'"\\/\b\f\n\r\t', np.uint8)
HEX = np.full(256, 1 << 16, np.int64)  # a digit's value; any byte that is none makes a number of more than 16 bits
HEX[np.frombuffer(b"0123456789", np.uint8)] = range(10)
HEX[np.frombuffer(b"abcdef", np.uint8)] = HEX[np.frombuffer(b"ABCDEF", np.uint8)] = range(10, 16)
REPLACEMENT = 0xFFFD


def splat(value: int) -> ir.Constant:
    return ir.Constant(BLOCK_TYPE, [ir.Constant(BYTE, value)] * BLOCK)


@intrinsic
def copy_block(typingctx, target, at, source, i):
    """Copy 64 bytes from source[i] on to target[at:]; return the bits of those that mean something in a JSON string.

    The first byte's bit is the lowest. They are quotes, backslashes, control characters and all bytes beyond ASCII.
    """

    def codegen(context, builder, signature, args):
        target, at, source, i = args
        block = builder.load(builder.bitcast(builder.gep(source, [i]), BLOCK_TYPE.as_pointer()), align=1)
        builder.store(block, builder.bitcast(builder.gep(target, [at]), BLOCK_TYPE.as_pointer()), align=1)
        meant = builder.icmp_signed("<", block, splat(0x20))  # as signed numbers, those beyond ASCII are negative
        for value in (QUOTE, BACKSLASH):
            meant = builder.or_(meant, builder.icmp_unsigned("==", block, splat(value)))
        return builder.bitcast(meant, WORD)

    return types.uint64(target, types.int64, source, types.int64), codegen


@intrinsic
def matches(typingctx, source, i, value):
    """Return the bits of those of the 64 bytes from source[i] on that are `value`, the first byte's the lowest."""

    def codegen(context, builder, signature, args):
        source, i, value = args
        block = builder.load(builder.bitcast(builder.gep(source, [i]), BLOCK_TYPE.as_pointer()), align=1)
        one = builder.insert_element(ir.Constant(BLOCK_TYPE, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
        all_lanes = ir.Constant(ir.VectorType(ir.IntType(32), BLOCK), [0] * BLOCK)
        values = builder.shuffle_vector(one, one, all_lanes)
        return builder.bitcast(builder.icmp_unsigned("==", block, values), WORD)

    return types.uint64(source, types.int64, types.uint8), codegen


@njit
def character_bytes(source, i, end):
    """Return the bytes of the character at source[i], one beyond ASCII; 0 where it is no UTF-8 (RFC 3629)."""
    b = source[i]
    if b < 0xC2 or b > 0xF4:
        return 0
    width = 2 if b < 0xE0 else 3 if b < 0xF0 else 4
    low = 0xA0 if b == 0xE0 else 0x90 if b == 0xF0 else 0x80
    high = 0x9F if b == 0xED else 0x8F if b == 0xF4 else 0xBF
    if i + width > end or source[i + 1] < low or source[i + 1] > high:
        return 0
    for k in range(2, width):
        if source[i + k] & 0xC0 != 0x80:
            return 0
    return width


@njit
def code_unit(source, i):
    """Return the value of the four hexadecimal digits at source[i], more than 16 bits where they are none."""
    return HEX[source[i]] << 12 | HEX[source[i + 1]] << 8 | HEX[source[i + 2]] << 4 | HEX[source[i + 3]]


@njit
def write_character(out, at, code_point):
    """Write a character to out[at:] as UTF-8; return where it ends."""
    if code_point < 0x80:
        out[at] = code_point
        return at + 1
    if code_point < 0x800:
        out[at] = 0xC0 | code_point >> 6
        out[at + 1] = 0x80 | code_point & 0x3F
        return at + 2
    if code_point < 0x10000:
        out[at] = 0xE0 | code_point >> 12
        out[at + 1] = 0x80 | code_point >> 6 & 0x3F
        out[at + 2] = 0x80 | code_point & 0x3F
        return at + 3
    out[at] = 0xF0 | code_point >> 18
    out[at + 1] = 0x80 | code_point >> 12 & 0x3F
    out[at + 2] = 0x80 | code_point >> 6 & 0x3F
    out[at + 3] = 0x80 | code_point & 0x3F
    return at + 4


@njit
def is_unit(source, i, end):
    """Say whether `\\u` and room for four digits are at source[i]."""
    return i + 6 <= end and source[i] == BACKSLASH and source[i + 1] == LETTER_U


@njit
def unescape(source, i, end, room, out, at):
    """Write what a JSON string stands for to out[at:] as UTF-8: the one that goes on at source[i], before `end`.

    Returns the place behind its closing quote, or NOT_JSON or NOT_UTF8; where the text ends; and how many halves of
    surrogate pairs without the other have become U+FFFD. source can be read up to `room`; as many bytes as there are
    from i to `room` may be written.
    """
    replaced = 0
    while True:
        if i + BLOCK <= room:
            special = copy_block(out, at, source, i)
            if special == 0:
                i += BLOCK
                at += BLOCK
                continue
            plain = trailing_zeros(special)
            i += plain
            at += plain
        if i >= end:
            return NOT_JSON, at, replaced
        b = source[i]
        while b == BACKSLASH:
            if is_unit(source, i, end):
                unit = code_unit(source, i + 2)
                if unit > 0xFFFF:
                    return NOT_JSON, at, replaced
                i += 6
                if unit & 0xF800 == 0xD800:
                    second = code_unit(source, i + 2) if unit < 0xDC00 and is_unit(source, i, end) else 0
                    if second & ~0x3FF == 0xDC00:
                        unit = 0x10000 + ((unit & 0x3FF) << 10 | second & 0x3FF)
                        i += 6
                    else:
                        unit = REPLACEMENT
                        replaced += 1
                at = write_character(out, at, unit)
            else:
                if i + 2 > end or ESCAPES[source[i + 1]] == 0:
                    return NOT_JSON, at, replaced
                out[at] = ESCAPES[source[i + 1]]
                at += 1
                i += 2
            if i >= end:
                return NOT_JSON, at, replaced
            b = source[i]
        while b >= 0x80:
            width = character_bytes(source, i, end)
            if width == 0:
                return NOT_UTF8, at, replaced
            for k in range(width):
                out[at + k] = source[i + k]
            at += width
            i += width
            if i >= end:
                return NOT_JSON, at, replaced
            b = source[i]
        if b == QUOTE:
            return i + 1, at, replaced
        if b < 0x20:
            return NOT_JSON, at, replaced
        if b != BACKSLASH:
            out[at] = b
            at += 1
            i += 1


@njit
def line_end(source, i, end, room):
    """Return the place behind the line feed that is next from source[i] on, `end` where there is none."""
    while i + BLOCK <= room and i < end:
        feeds = matches(source, i, LINE_FEED)
        if feeds:
            return min(end, i + trailing_zeros(feeds) + 1)
        i += BLOCK
    while i < end:
        i += 1
        if source[i - 1] == LINE_FEED:
            return i
    return end


@njit
def has_separator(text, start, end, room):
    """Say whether chunks.SEPARATOR is in text[start:end]; text can be read up to `room`."""
    i = start + 1
    while i < end:
        bars = matches(text, i, BAR) if i + BLOCK <= room else uint64(text[i] == BAR)  # fewer than of what comes before
        while bars:
            at = i + trailing_zeros(bars) - 1
            bars &= bars - uint64(1)
            if at + SEPARATOR_BYTES <= end and load64(text, at) == SEPARATOR_HEAD:
                if load64(text, at + SEPARATOR_BYTES - 8) == SEPARATOR_TAIL:
                    return True
        i += BLOCK if i + BLOCK <= room else 1
    return False


@njit
def read_string(source, i, end, room, out, at, row):
    """Undo the string that goes on at source[i], as `unescape` does, and fill a row from REST on with what it gave."""
    row[TEXT_START] = at
    row[REST], row[TEXT_END], row[REPLACED] = unescape(source, i, end, room, out, at)
    row[SEPARATED] = has_separator(out, at, row[TEXT_END], room)


@njit
def begins(source, i, what):
    """Say whether source[i:] begins with `what`, uint8 (n,)."""
    for k in range(what.size):
        if source[i + k] != what[k]:
            return False
    return True


def compiled(sources: str):
    """Return `read_lines` and `undo` for Python to call, the GIL released.

    sources: what their machine code is kept for.
    """

    @njit(nogil=True, cache=True)
    def read_lines(data, start, end, texts, at, rows, head):
        """Read lines from data[start] on, as many as `rows` has room for; return their number.

        data: uint8, whole lines up to `end`; texts: uint8, as long as data, filled from texts[at] on; rows: int64
        (lines, columns), see COLUMNS; head: uint8, what a line has before its text, as `{"text":`.
        """
        sources
        source, out, room = pointer(data), pointer(texts), data.size
        count = 0
        while start < end and count < rows.shape[0]:
            row = rows[count]
            row[:] = 0
            i = start + head.size
            if i + 4 <= end and begins(source, start, head):
                i += source[i] == BLANK
                if source[i] == QUOTE:
                    read_string(source, i + 1, end, room, out, at, row)
            if row[REST] > 0 and row[TEXT_END] > at:
                at = row[TEXT_END]
            else:
                row[REST] = 0
            row[START], row[END] = start, line_end(source, max(start, row[REST]), end, room)
            start = row[END]
            count += 1
        return count

    @njit(nogil=True, cache=True)
    def undo(literal, text, row):
        """Undo a JSON string with its quotes, uint8 (n,), into `text`, uint8 (n,); fill a row from REST on."""
        sources
        read_string(pointer(literal), 1, literal.size, literal.size, pointer(text), 0, row)

    return read_lines, undo


read_lines, undo = compiled(digest(Path(module) for module in (__file__, intrinsics.__file__, chunks.__file__)))
