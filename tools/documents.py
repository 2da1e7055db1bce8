"""Documents out of shards: `.jsonl.zst`, `.jsonl.gz` and `.jsonl`, one JSON object with a `text` a line.

A shard is cut into chunks of whole lines, and a chunk is parsed on its own, so that several can be at once. What a shard
should not contain becomes a `Problem` with its line. Lines of white space are passed over; they count as lines, no more.
"""
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from tools.shard_stream import ShardStream
from tools.shards import SHARD_PATTERNS

INPUT_PATTERNS = (*SHARD_PATTERNS, "*.jsonl.gz")
CHUNK_BYTES = 4 << 20
MAX_LINE_BYTES = 640 << 20  # 200 MB of emoji are 600 MB where each is written \ud83d\ude00
SEPARATOR = b"<|endoftext|>"

# What is lost: a line, or the rest of a file.
LOSSES = {
    "truncated_file": "the file is cut off in this line, which is left out",
    "corrupt_file": "the compressed data are damaged: this line and all that follow are left out",
    "line_too_long": f"the line has more than {MAX_LINE_BYTES >> 20} MiB",
    "not_utf8": "not UTF-8",
    "not_json": "not JSON",
    "no_text": "no object with a `text`",
    "text_not_string": "the `text` is no string",
    "empty_text": "the `text` is empty",
}
# What is kept, but not as it was.
CHANGES = {"lone_surrogate": "half a surrogate pair in the text, replaced by U+FFFD"}
# What is kept as it is.
REMARKS = {"separator_in_text": f"{SEPARATOR.decode()} in the text, encoded as the characters it is written with"}
KINDS = LOSSES | CHANGES | REMARKS
OF_A_FILE = ("truncated_file", "corrupt_file")  # not a whole line

_SURROGATE = re.compile("[\ud800-\udfff]")


class Problem(msgspec.Struct, frozen=True):
    """Something in a shard worth telling: a key of KINDS, the line (from 1), and what a library said of it."""

    kind: str
    line: int
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Whole lines of a shard, data[:size], and what was found where lines should have been."""

    data: bytearray
    size: int
    first_line: int  # number of the first line in `data`
    end: int  # uncompressed bytes of the shard up to the end of this chunk
    next_line: int  # number of the line that begins there
    consumed: int  # bytes of the file on disk read so far
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True, slots=True)
class Documents:
    """The texts of a chunk in their order, UTF-8, none empty; and all problems of the chunk, in the order of lines."""

    texts: list[bytes]
    problems: list[Problem]


def read_chunks(
    stream: ShardStream, *, start: int = 0, first_line: int = 1, max_objects: int | None = None
) -> Iterator[Chunk]:
    """Yield a shard in chunks, from uncompressed byte `start` on, where line `first_line` begins.

    `start` is 0 or the `end` of a chunk; where chunks end does not depend on it. `max_objects` limits the lines that are
    not white space. Damage ends the iteration, the last chunk saying so. OSError where the disk fails.
    """
    stream.skip(start)
    end, line = start, first_line
    data, filled, searched = bytearray(CHUNK_BYTES), 0, 0
    ended = False
    while not ended and max_objects != 0:
        filled = _fill(stream, data, filled)
        ended = filled < len(data)
        size = filled if ended and not stream.fault else data.rfind(b"\n", searched, filled) + 1
        if not (size or ended):
            if len(data) < MAX_LINE_BYTES:
                searched = filled
                data.extend(bytes(CHUNK_BYTES))
                continue
            passed, data, filled = _pass_line(stream, data)
            end, line, searched = end + passed, line + 1, 0
            max_objects = max_objects and max_objects - 1
            yield Chunk(bytearray(), 0, line - 1, end, line, stream.consumed, (Problem("line_too_long", line - 1),))
            continue
        if max_objects is not None:
            size, max_objects = _cut(data, size, max_objects)
        rest = data[size:filled]
        lines = data.count(b"\n", 0, size) + (size > 0 and data[size - 1] != 0x0A)
        end, line = end + size, line + lines
        fault = (Problem(stream.fault[0], line, stream.fault[1]),) if stream.fault and max_objects != 0 else ()
        yield Chunk(data, size, line - lines, end, line, stream.consumed, fault)
        data, filled, searched = rest.ljust(CHUNK_BYTES, b"\0"), len(rest), 0


def _fill(stream: ShardStream, data: bytearray, filled: int) -> int:
    """Read until `data` is full or the stream ends; return the bytes in it."""
    with memoryview(data) as view:
        while filled < len(view) and (count := stream.readinto(view[filled:])):
            filled += count
    return filled


def _pass_line(stream: ShardStream, data: bytearray) -> tuple[int, bytearray, int]:
    """Read on to the end of the line that fills `data`; return its bytes, and a new buffer with what follows it."""
    passed = len(data)
    data = bytearray(CHUNK_BYTES)
    while True:
        filled = _fill(stream, data, 0)
        size = data.find(b"\n", 0, filled) + 1
        if size or filled < len(data):
            size = size or filled
            return passed + size, data[size:filled].ljust(CHUNK_BYTES, b"\0"), filled - size
        passed += filled


def _cut(data: bytearray, size: int, max_objects: int) -> tuple[int, int]:
    """Return the size of the lines up to the `max_objects`-th that is not white space, and how many are still wanted."""
    at = 0
    while max_objects and at < size:
        after = data.find(b"\n", at, size) + 1 or size
        max_objects -= not data[at:after].isspace()
        at = after
    return at, max_objects


class _Record(msgspec.Struct):
    text: str


_decoder = msgspec.json.Decoder(_Record)


def parse(chunk: Chunk) -> Documents:
    """Return the texts of a chunk, and its problems.

    All lines at once where each is a JSON object with a `text` and nothing is to be told of any; else one by one.
    """
    with memoryview(chunk.data) as view:
        lines = chunk.next_line - chunk.first_line - len(chunk.problems)
        try:
            texts = [record.text.encode() for record in _decoder.decode_lines(view[: chunk.size])]
        except (msgspec.MsgspecError, ValueError, RecursionError):
            texts = []
    # Two objects on a line, or one on two lines, are not what decode_lines is for, but it takes them.
    if len(texts) != lines or not all(texts) or any(SEPARATOR in text for text in texts):
        return _parse_line_by_line(chunk)
    return Documents(texts, list(chunk.problems))


def _parse_line_by_line(chunk: Chunk) -> Documents:
    texts, problems = [], []
    with memoryview(chunk.data) as view:
        after, number = 0, chunk.first_line - 1
        while after < chunk.size:
            start, after, number = after, chunk.data.find(b"\n", after, chunk.size) + 1 or chunk.size, number + 1
            text, problem = _parse_line(view[start:after])
            if text:
                texts.append(text)
            if problem:
                problems.append(Problem(problem[0], number, problem[1]))
    return Documents(texts, [*problems, *chunk.problems])


def _parse_line(line: memoryview) -> tuple[bytes, tuple[str, str] | None]:
    """Return the text of a line, empty if it has none, and (kind, detail) of the problem, if there is one."""
    try:
        text, problem = _decoder.decode(line).text.encode(), None
    except (msgspec.MsgspecError, ValueError, RecursionError):
        copy = bytes(line)
        if copy.isspace():
            return b"", None
        text, problem = _parse_leniently(copy)
    if problem is None and not text:
        problem = "empty_text", ""
    elif problem is None and SEPARATOR in text:
        problem = "separator_in_text", ""
    return text, problem


def _parse_leniently(line: bytes) -> tuple[bytes, tuple[str, str] | None]:
    """Return the text of a line that msgspec refuses, empty if it has none, and (kind, detail) of the problem.

    Python's parser accepts what harms no text: NaN in another field, a byte order mark, half a surrogate pair.
    """
    try:
        value = json.loads(line.decode("utf-8-sig", "surrogatepass"))
    except UnicodeDecodeError as error:
        return b"", ("not_utf8", f"byte {error.start + 1}: {error.reason}")
    except RecursionError:
        return b"", ("not_json", "nested too deep")
    except ValueError as error:
        return b"", ("not_json", str(error))
    if not isinstance(value, dict) or "text" not in value:
        return b"", ("no_text", "" if isinstance(value, dict) else f"the line is a {type(value).__name__}")
    text = value["text"]
    if not isinstance(text, str):
        return b"", ("text_not_string", f"it is {json.dumps(text)[:40]}")
    text, replaced = _SURROGATE.subn("\ufffd", text)
    return text.encode(), ("lone_surrogate", f"{replaced} in this text") if replaced else None
