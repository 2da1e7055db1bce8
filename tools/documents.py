"""Documents out of shards: `.jsonl.zst`, `.jsonl.gz` and `.jsonl`, one JSON object with a `text` a line.

A shard is cut into chunks of whole lines, and a chunk is parsed on its own, so that several can be at once. What a
shard should not contain becomes a `Problem` with its line. Lines of white space are passed over: they count as lines,
no more.
"""
import json
import re
from dataclasses import dataclass

import msgspec

from tools.shard_stream import ShardStream
from tools.shards import SHARD_PATTERNS

INPUT_PATTERNS = (*SHARD_PATTERNS, "*.jsonl.gz")
CHUNK_BYTES = 4 << 20
# Memory decides these: 200 MB of emoji are a line of 600 MB where each is written \ud83d\ude00.
MAX_LINE_BYTES = 640 << 20
MAX_TEXT_BYTES = 384 << 20
LONG_LINE_BYTES = 16 << 20  # longer ones are decoded in pieces
PIECE_BYTES = 1 << 20
SEPARATOR = b"<|endoftext|>"

# What is lost: a line, or the rest of a file.
LOSSES = {
    "truncated_file": "the file is cut off in this line, which is left out",
    "corrupt_file": "the compressed data are damaged: this line and all that follow are left out",
    "line_too_long": "the line is too long",
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
# Where a JSON string can be cut in two: before a character beyond ASCII, after one that no escape contains, and before
# an escape that is not the second half of a surrogate pair.
_SAFE_CUT = re.compile(
    rb"(?=[\xc0-\xff])|(?<=[ !#-.:-@G-Z\[\]-`g-mo-qsv-~])|(?<=[^\\])(?=\\(?:[^u]|u(?:[^dD]|[dD][^c-fC-F])))"
)


class Problem(msgspec.Struct, frozen=True):
    """Something in a shard worth telling: a key of KINDS, the line, and what a library said of it.

    Lines are numbered from 1, from the beginning of the chunk, segment or shard that the problem is told of.
    """

    kind: str
    line: int
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Whole lines of a shard, data[:size], and what is in the way after them: (kind, what a library said), or None."""

    data: bytearray
    size: int
    fault: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Documents:
    """The texts of a chunk, UTF-8, none empty; how many lines it has; its problems; all in their order."""

    texts: list[bytes]
    lines: int
    problems: list[Problem]


class ChunkReader:
    """Cuts a shard into chunks. Where they end depends on the shard and `chunk_bytes` alone.

    max_objects limits the lines that are not white space. position: uncompressed bytes up to the end of the last
    chunk; objects: lines so far that are not white space, counted only where they are limited; ended: there are no more
    chunks; spare: a place for the `data` of chunks that nobody needs any more, to be used again.
    """

    def __init__(self, stream: ShardStream, chunk_bytes: int = CHUNK_BYTES, max_objects: int | None = None) -> None:
        self._stream, self._chunk_bytes, self._max_objects = stream, chunk_bytes, max_objects
        self.position = self.objects = 0
        self.ended = False
        self.spare: list[bytearray] = []
        self._data, self._filled = bytearray(chunk_bytes), 0  # what is read and not yet in a chunk

    def next_chunk(self) -> Chunk:
        """Return the next chunk; damage ends the shard, its last chunk saying so. OSError where the disk fails."""
        data, searched = self._data, 0
        while True:
            self._fill()
            at_end = self._filled < len(data)
            size = data.rfind(b"\n", searched, self._filled) + 1
            if size or at_end:
                break
            if len(data) >= MAX_LINE_BYTES:
                return self._pass_line()
            searched = self._filled
            data.extend(bytes(self._chunk_bytes))  # by no more: what is left after a chunk must fit into the next
        fault = self._stream.fault
        if at_end and not fault:
            size = self._filled  # the last line needs no line feed
        self.ended = at_end
        if self._max_objects is not None:
            wanted = self._limit(size)
            if self.objects == self._max_objects:
                self.ended, fault = True, None
            size = wanted
        self._advance(size)
        return Chunk(data, size, fault)

    def skip_to(self, position: int, objects: int) -> None:
        """Go on after the chunk that ended at `position`."""
        if size := position - self.position:
            self._stream.skip(max(0, size - self._filled))
            self._advance(size)
            self.objects = objects

    def _fill(self) -> None:
        with memoryview(self._data) as view:
            while self._filled < len(view) and (count := self._stream.readinto(view[self._filled :])):
                self._filled += count

    def _advance(self, size: int) -> None:
        rest = self._data[size : self._filled]
        self._data, self._filled = self.spare.pop() if self.spare else bytearray(self._chunk_bytes), len(rest)
        self._data[: len(rest)] = rest
        self.position += size

    def _pass_line(self) -> Chunk:
        """Skip the rest of a line that is longer than MAX_LINE_BYTES."""
        size = 0
        while not size and self._filled == len(self._data):
            self._advance(self._filled)
            self._fill()
            size = self._data.find(b"\n", 0, self._filled) + 1
        self._advance(size or self._filled)
        self.objects += 1
        self.ended = self.objects == self._max_objects
        return Chunk(bytearray(), 0, ("line_too_long", f"more than {MAX_LINE_BYTES} bytes"))

    def _limit(self, size: int) -> int:
        """Count the objects in data[:size]; return the size of the lines up to the last one wanted."""
        at = 0
        while at < size and self.objects < self._max_objects:
            after = self._data.find(b"\n", at, size) + 1 or size
            self.objects += not self._data[at:after].isspace()
            at = after
        return at


class _Record(msgspec.Struct):
    text: str


class _RawRecord(msgspec.Struct):
    text: msgspec.Raw


_decoder = msgspec.json.Decoder(_Record)
_raw_decoder = msgspec.json.Decoder(_RawRecord)
_string_decoder = msgspec.json.Decoder(str)
REFUSALS = (msgspec.MsgspecError, ValueError, RecursionError)  # what a parser raises where a line is wrong


def parse(chunk: Chunk) -> Documents:
    """Return the texts of a chunk, and its problems."""
    texts, problems, lines = [], [], 0
    data, decode = chunk.data, _decoder.decode
    # Not decode_lines, though a little faster: it also takes two objects on a line, and one on two.
    with memoryview(data) as view:
        after = 0
        while after < chunk.size:
            start, after = after, data.find(b"\n", after, chunk.size) + 1 or chunk.size
            lines += 1
            problem = None
            try:
                text = decode(view[start:after]).text.encode() if after - start <= LONG_LINE_BYTES else b""
            except REFUSALS:
                text = b""
            if not text:
                text, problem = _parse_carefully(view[start:after])
            elif SEPARATOR in text:
                problem = "separator_in_text", ""
            if text:
                texts.append(text)
            if problem:
                problems.append(Problem(problem[0], lines, problem[1]))
    if chunk.fault:
        problems.append(Problem(chunk.fault[0], lines + 1, chunk.fault[1]))
        lines += chunk.fault[0] not in OF_A_FILE
    return Documents(texts, lines, problems)


def _parse_carefully(line: memoryview) -> tuple[bytes, tuple[str, str] | None]:
    """Return the text of a line, empty if it has none, and (kind, detail) of the problem, if there is one."""
    if len(line) <= LONG_LINE_BYTES:
        content = bytes(line)
        return (b"", None) if content.isspace() else _parse_leniently(content)
    try:
        text = _parse_long_line(line)
    except REFUSALS as error:
        return b"", None if bytes(line).isspace() else _refusal(error)
    if len(text) > MAX_TEXT_BYTES:
        return b"", ("line_too_long", f"{len(text)} bytes of text, more than {MAX_TEXT_BYTES}")
    if not text:
        return b"", ("empty_text", "")
    return text, ("separator_in_text", "") if SEPARATOR in text else None


def _parse_long_line(line: memoryview) -> bytes:
    """Return the text of a line, decoded in pieces: one emoji makes a str of all of it four bytes a character."""
    with memoryview(_raw_decoder.decode(line).text) as literal:
        if literal[:1] != b'"':
            return _string_decoder.decode(literal).encode()  # which says what it is instead
        pieces, start = [], 1
        while start < len(literal) - 1:
            cut = _SAFE_CUT.search(literal, start + PIECE_BYTES, len(literal) - 1)
            end = cut.start() if cut else len(literal) - 1
            pieces.append(_string_decoder.decode(b'"%b"' % literal[start:end]).encode())
            start = end
        return b"".join(pieces)


def _parse_leniently(line: bytes) -> tuple[bytes, tuple[str, str] | None]:
    """Return the text of a line that msgspec refuses, empty if it has none, and (kind, detail) of the problem.

    Python's parser accepts what harms no text: NaN in another field, a byte order mark, half a surrogate pair.
    """
    try:
        value = json.loads(line.decode("utf-8-sig", "surrogatepass"))
    except (ValueError, RecursionError) as error:
        return b"", _refusal(error)
    if not isinstance(value, dict) or "text" not in value:
        return b"", ("no_text", "" if isinstance(value, dict) else f"the line is a {type(value).__name__}")
    text = value["text"]
    if not isinstance(text, str):
        return b"", ("text_not_string", f"it is {json.dumps(text)[:40]}")
    text, replaced = _SURROGATE.subn("\ufffd", text)
    if not text:
        return b"", ("empty_text", "")
    if replaced:
        return text.encode(), ("lone_surrogate", f"{replaced} in this text")
    return text.encode(), ("separator_in_text", "") if SEPARATOR in text.encode() else None


def _refusal(error: Exception) -> tuple[str, str]:
    if isinstance(error, UnicodeDecodeError):
        return "not_utf8", f"byte {error.start + 1}: {error.reason}"
    if isinstance(error, RecursionError):
        return "not_json", "nested too deep"
    if isinstance(error, msgspec.ValidationError):
        return "text_not_string" if "Expected `str`" in str(error) else "no_text", str(error)
    return "not_json", str(error)
