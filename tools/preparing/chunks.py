"""Shards in chunks: `.jsonl.zst`, `.jsonl.gz` and `.jsonl`, one JSON object with a text a line.

A shard is cut into chunks of whole lines, and a chunk is parsed on its own (json_lines.py), so that several can
be at once. What a shard should not contain becomes a `Problem` with its line. Lines of white space are passed over:
they count as lines, no more.
"""

from dataclasses import dataclass

import msgspec

from tools.preparing.shard_stream import ShardStream

SHARD_ENDINGS = (".jsonl.zst", ".jsonl.gz", ".jsonl")
TEXT_KEY = "text"  # of a line's object, unless another is named
CHUNK_BYTES = 4 << 20
# Memory decides these: 200 MB of emoji are a line of 600 MB where each is written \ud83d\ude00.
MAX_LINE_BYTES = 640 << 20
MAX_TEXT_BYTES = 384 << 20
SEPARATOR = b"<|endoftext|>"

# What is lost: a line, or the rest of a file.
LOSSES = {
    "truncated_file": "the file is cut off in this line, which is left out",
    "corrupt_file": "the compressed data are damaged: this line and all that follow are left out",
    "line_too_long": "the line is too long",
    "not_utf8": "not UTF-8",
    "not_json": "not JSON",
    "no_text": "no object with a text",
    "text_not_string": "the text is no string",
    "empty_text": "the text is empty",
}
# What is kept, but not as it was.
CHANGES = {"lone_surrogate": "half a surrogate pair in the text, replaced by U+FFFD"}
# What is kept as it is.
REMARKS = {"separator_in_text": f"{SEPARATOR.decode()} in the text, encoded as the characters it is written with"}
KINDS = LOSSES | CHANGES | REMARKS
OF_A_FILE = ("truncated_file", "corrupt_file")  # not a whole line


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
