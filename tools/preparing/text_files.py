"""Plain text: `.txt`, `.txt.zst` and `.txt.gz`, each file one document, read whole and taken or left whole.

A file is the one chunk of its shard, so that what a line of JSON can have wrong is told of it in the same way.
"""

import codecs
from pathlib import Path

import numpy as np

from tools.preparing.chunks import MAX_TEXT_BYTES, SEPARATOR, Chunk, Problem
from tools.preparing.json_lines import Documents, judge
from tools.preparing.shard_stream import READ_BYTES, ShardStream

TEXT_ENDINGS = (".txt", ".txt.zst", ".txt.gz")
DECODED_BYTES = 16 << 20  # at once: one emoji makes four bytes a character of a str


def is_text_file(path: Path) -> bool:
    return path.name.lower().endswith(TEXT_ENDINGS)


class TextReader:
    """What `ChunkReader` is to a shard, for a file of text."""

    def __init__(self, stream: ShardStream) -> None:
        self._stream = stream
        self.position = self.objects = 0
        self.ended = False
        self.spare: list[bytearray] = []

    def next_chunk(self) -> Chunk:
        """Return the file; nothing of it where it is too long, cut off or damaged. OSError where the disk fails."""
        content, block = bytearray(), memoryview(bytearray(READ_BYTES))
        while len(content) <= MAX_TEXT_BYTES and (count := self._stream.readinto(block)):
            content += block[:count]
        fault = self._stream.fault
        if len(content) > MAX_TEXT_BYTES:
            fault = "line_too_long", f"more than {MAX_TEXT_BYTES} bytes of text"
        self.position, self.ended = len(content), True
        return Chunk(content, 0 if fault else len(content), fault)

    def skip_to(self, position: int, objects: int) -> None:
        """A file has one place to begin at."""


def parse_file(chunk: Chunk) -> Documents:
    """Return the text of a file without its byte order mark, and what is wrong with it."""
    content = chunk.data[: chunk.size].removeprefix(codecs.BOM_UTF8)
    lines = content.count(b"\n") + (not content.endswith(b"\n"))
    line = 1
    if chunk.fault:
        problem = chunk.fault
    elif (bad := _not_utf8(memoryview(content))) is not None:
        line, line_end = content.count(b"\n", 0, bad) + 1, content.rfind(b"\n", 0, bad)
        problem = "not_utf8", f"byte {bad - line_end}"
        content = b""
    elif not content:
        problem = "empty_text", ""
    else:
        _, problem = judge(len(content), 0, SEPARATOR in content)
    text = np.frombuffer(content, np.uint8)
    problems = [Problem(problem[0], line, problem[1])] if problem else []
    return Documents(text, np.array([len(text)] if len(text) else [], np.int64), lines, problems)


def _not_utf8(content: memoryview) -> int | None:
    """Return the place of the first byte that is not UTF-8, None where all are."""
    start = 0
    while start < len(content):
        end = start + DECODED_BYTES
        try:
            start += codecs.utf_8_decode(content[start:end], "strict", end >= len(content))[1]
        except UnicodeDecodeError as error:
            return start + error.start
    return None
