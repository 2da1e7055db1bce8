"""The texts of a chunk, whose lines are each a JSON object with a text under a key, `text` unless another is named.

Most lines begin with their text. Compiled code takes it out of them, and msgspec reads what follows it, as it reads
lines of any other form. What msgspec refuses, Python's own parser may know how to keep.
"""

import functools
import json
import re
from dataclasses import dataclass

import msgspec
import numpy as np

from tools.preparing.chunks import MAX_TEXT_BYTES, OF_A_FILE, SEPARATOR, TEXT_KEY, Chunk, Problem
from tools.preparing.json_strings import COLUMNS, NOT_JSON, NOT_UTF8, QUOTE, read_lines, undo

LINES = 1024  # that compiled code reads at once
LONG_LINE_BYTES = 16 << 20  # of a longer one no str is made
SHORT_REST_BYTES = 256
MAX_DETAIL = 100  # characters

_SURROGATE = re.compile("[\ud800-\udfff]")
_REFUSALS = (msgspec.MsgspecError, ValueError, RecursionError)  # what a parser raises where a line is wrong
_UNDONE = {NOT_JSON: ("not_json", "the text is no JSON string"), NOT_UTF8: ("not_utf8", "in the text")}


@dataclass(frozen=True, slots=True)
class Documents:
    """The texts of a chunk, how many lines it has, and its problems.

    text: uint8 (n,), the texts as UTF-8 end to end, none empty; ends: int64 (documents,), where each ends.
    """

    text: np.ndarray
    ends: np.ndarray
    lines: int
    problems: list[Problem]


class _Object(msgspec.Struct):
    pass


class _Key:
    """The key of the texts: as a line has it, what a line with its text first begins with, and readers of lines."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.literal = json.dumps(name, ensure_ascii=False).encode()
        self.head = np.frombuffer(b"{" + self.literal + b":", np.uint8)
        self.decoder, self.raw_decoder = (
            msgspec.json.Decoder(msgspec.defstruct("Record", [("text", kind)], rename={"text": name}))
            for kind in (str, msgspec.Raw)
        )


_key = functools.cache(_Key)
_object_decoder = msgspec.json.Decoder(_Object)

Telling = tuple[str, str]  # kind and detail of a problem


def parse(chunk: Chunk, text_key: str = TEXT_KEY) -> Documents:
    """Return the texts of a chunk, and its problems."""
    key = _key(text_key)
    data = np.frombuffer(chunk.data, np.uint8)
    room, rows = np.empty_like(data), np.empty((LINES, len(COLUMNS)), np.int64)
    line_view, text_view = memoryview(data), memoryview(room)
    pieces, sizes, problems, lines = [], [], [], 0
    end = first = filled = 0  # room[first:filled] follows the pieces
    complete = set()
    while end < chunk.size:
        for row in rows[: read_lines(data, end, chunk.size, room, filled, rows, key.head)].tolist():
            start, end, rest, text_start, text_end, replaced, separated = row
            lines += 1
            problem = None
            if rest and _completes(line_view[rest:end], key, complete):
                size = text_end - text_start
                if replaced or separated or size > MAX_TEXT_BYTES:
                    size, problem = judge(size, replaced, separated)
                if size:
                    if text_start != filled:
                        pieces.append(text_view[first:filled])
                        first = text_start
                    filled = text_end
                    sizes.append(size)
            else:
                text, problem = _parse_line(line_view[start:end], key)
                if text:
                    if first != filled:
                        pieces.append(text_view[first:filled])
                        first = filled
                    pieces.append(text)
                    sizes.append(len(text))
            if problem:
                problems.append(Problem(problem[0], lines, problem[1]))
    if chunk.fault:
        problems.append(Problem(chunk.fault[0], lines + 1, chunk.fault[1]))
        lines += chunk.fault[0] not in OF_A_FILE
    text = room[:filled]
    if pieces:
        text = np.frombuffer(b"".join([*pieces, text_view[first:filled]]), np.uint8)
    return Documents(text, np.cumsum(sizes, dtype=np.int64), lines, problems)


def _completes(rest: memoryview, key: _Key, complete: set[bytes]) -> bool:
    """Whether what follows a text on its line ends the object, and cannot have the key again.

    complete: what has been found to do so; many lines end the same.
    """
    if len(rest) > LONG_LINE_BYTES:
        return False
    content = rest.tobytes()
    if content in complete:
        return True
    if key.literal in content or b"\\u" in content:
        return False
    try:
        _object_decoder.decode(b'{"":""' + content)
    except _REFUSALS:
        return False
    if len(content) <= SHORT_REST_BYTES:
        complete.add(content)
    return True


def judge(size: int, replaced: int, separated: bool) -> tuple[int, Telling | None]:
    """Return how much of a text is kept, all or nothing, and what is worth telling of it."""
    if size > MAX_TEXT_BYTES:
        return 0, ("line_too_long", f"{size} bytes of text, more than {MAX_TEXT_BYTES}")
    if replaced:
        return size, ("lone_surrogate", f"{replaced} in this text")
    return size, ("separator_in_text", "") if separated else None


def _parse_line(line: memoryview, key: _Key) -> tuple[bytes | memoryview, Telling | None]:
    """Return the text of a line of any form, empty for none, and what is worth telling of it."""
    if len(line) > LONG_LINE_BYTES:
        return _parse_long_line(line, key)
    try:
        text = key.decoder.decode(line).text.encode()
    except _REFUSALS:
        text = b""
    if not text:
        content = line.tobytes()
        return (b"", None) if content.isspace() else _parse_leniently(content, key.name)
    size, telling = judge(len(text), 0, SEPARATOR in text)
    return text[:size], telling


def _parse_long_line(line: memoryview, key: _Key) -> tuple[memoryview, Telling | None]:
    """The same without a str, of which one emoji makes four bytes a character."""
    nothing = line[:0]
    try:
        literal = np.frombuffer(key.raw_decoder.decode(line).text, np.uint8)
    except _REFUSALS as error:
        return nothing, None if line.tobytes().isspace() else _refusal(error)
    if literal[0] != QUOTE:
        return nothing, ("text_not_string", f"it is {literal[:40].tobytes().decode(errors='replace')}")
    room, row = np.empty_like(literal), np.zeros(len(COLUMNS), np.int64)
    undo(literal, room, row)
    _, _, rest, _, size, replaced, separated = row.tolist()
    if rest < 0:
        return nothing, _UNDONE[rest]
    size, telling = judge(size, replaced, separated) if size else (0, ("empty_text", ""))
    return memoryview(room)[:size], telling


def _parse_leniently(line: bytes, key: str) -> tuple[bytes, Telling | None]:
    """Return the text of a line that msgspec refuses.

    Python's parser accepts what harms no text: NaN in another field, a byte order mark, a surrogate in UTF-8.
    """
    try:
        value = json.loads(line.decode("utf-8-sig", "surrogatepass"))
    except (ValueError, RecursionError) as error:
        return b"", _refusal(error)
    if not isinstance(value, dict):
        return b"", ("no_text", f"the line is a {type(value).__name__}")
    if key not in value:
        return b"", ("no_text", f"its keys are {', '.join(map(repr, value))}"[:MAX_DETAIL] if value else "it is empty")
    text = value[key]
    if not isinstance(text, str):
        return b"", ("text_not_string", f"it is {json.dumps(text)[:40]}")
    if not text:
        return b"", ("empty_text", "")
    text, replaced = _SURROGATE.subn("\ufffd", text)
    content = text.encode()
    size, telling = judge(len(content), replaced, SEPARATOR in content)
    return content[:size], telling


def _refusal(error: Exception) -> Telling:
    if isinstance(error, UnicodeDecodeError):
        return "not_utf8", f"byte {error.start + 1}: {error.reason}"
    if isinstance(error, RecursionError):
        return "not_json", "nested too deep"
    if isinstance(error, msgspec.ValidationError):
        return "no_text", str(error)
    return "not_json", str(error)
