"""One process's share of preparing: segments decompressed, parsed, encoded, written and merged at the same time.

The thread that calls reads and writes, a pool of threads parses and encodes, one more merges. Decompression, encoding
and most of parsing release the GIL. Other processes may be at the same inputs: each reads an input from end to end and
takes the segments that nobody has; those that others have it only decompresses. So one huge shard keeps as many cores
busy as its decompressor can feed, and nothing is divided up beforehand.
"""

import sys
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import local

import msgspec
import numpy as np

from tools.preparing.chunks import CHANGES, KINDS, LOSSES, Chunk, ChunkReader, Problem
from tools.preparing.json_lines import Documents, parse
from tools.preparing.shard_stream import ShardStream
from tools.preparing.text_encoders import TextEncoder
from tools.preparing.text_files import TextReader, is_text_file, parse_file
from tools.preparing.token_file import PrepareError
from tools.preparing.workspace import MERGED_BYTES, Place, Segment, Workspace

# A thread back from decompressing or encoding waits this long for one that parses; it has little to do with the GIL.
SWITCH_INTERVAL_S = 5e-4
IN_FLIGHT_BYTES = 64 << 20  # of lines between reading and writing; a longer line goes alone


class Work(msgspec.Struct, tag=True):
    """What was done since the last report: bytes of files read, UTF-8 bytes of text, ids."""

    consumed: int = 0
    bytes: int = 0
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Encoded:
    """What a chunk gave."""

    ids: np.ndarray
    documents: int
    bytes: int
    lines: int
    problems: list[Problem]


@dataclass(frozen=True, slots=True)
class Pending:
    """A chunk on its way through the pool; `end`: where the segment ends, if this is its last one."""

    segment: Segment
    size: int
    consumed: int  # bytes of the file on disk
    encoded: Future[Encoded]
    end: Place | None
    sha256: str | None


class Pipeline:
    """The threads of a process. `merging`: whether to merge what is finished while others are still written."""

    def __init__(
        self,
        workspace: Workspace,
        encoder: TextEncoder,
        threads: int,
        report: Callable[[Work], None],
        *,
        merging: bool,
        strict: bool = False,
    ) -> None:
        self._workspace, self._encoder, self._report, self._strict = workspace, encoder, report, strict
        self._depth = 2 * threads  # chunks in the pool: one at work and one waiting for each thread
        self._parse_lines = partial(parse, text_key=workspace.settings.text_key)
        self._of_thread = local()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="encode")
        self._merger = ThreadPoolExecutor(1, thread_name_prefix="merge") if merging else None
        self._merging: Future[None] | None = None
        self._unmerged_bytes = 0  # of ids finished since the last merging began
        self._pending: deque[Pending] = deque()
        self._in_flight = 0
        self._taken: set[Segment] = set()

    def __enter__(self) -> "Pipeline":
        self._switch_interval_s = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setswitchinterval(self._switch_interval_s)
        self._pool.shutdown(cancel_futures=True)
        if self._merger:
            self._merger.shutdown()
        for segment in self._taken:
            segment.abandon()

    def run(self, inputs: Sequence[Path]) -> None:
        """Do what is to be done of these inputs and no other process is at: first whole inputs, then parts of others'.

        PrepareError says what is wrong with an input. OSError where the disk is full or failing.
        """
        for owned in (True, False):
            for source in inputs if owned else self._workspace.missing(inputs):
                if is_text_file(source):
                    self._work_on_text(source)
                    continue
                with ExitStack() as stack:
                    if not owned or stack.enter_context(self._workspace.owning(source)):
                        self._work_on(source)
                        self._write_down_to(0)
            self._write_down_to(0)
        if self._merging:
            self._merging.result()

    def _work_on_text(self, source: Path) -> None:
        """Bring a file of text, which is one segment of one chunk, into the pool, if nobody has it."""
        if self._workspace.reach(source).ended or not (segment := self._take(source, 0)):
            return
        with ShardStream(source) as stream:
            self._read_segment(TextReader(stream), stream, Place(), segment)

    def _work_on(self, source: Path) -> None:
        """Bring the segments of a shard that nobody has into the pool, and write what comes out of it."""
        workspace, settings = self._workspace, self._workspace.settings
        place = workspace.reach(source)
        if place.ended:
            return
        with ShardStream(source) as stream:
            reader = ChunkReader(stream, settings.chunk_bytes, settings.max_data)
            while not place.ended:
                if done := workspace.place_after(source, place.segment):
                    place = done
                    continue
                reader.skip_to(place.position, place.objects)
                place = self._read_segment(reader, stream, place, self._take(source, place.segment))

    def _take(self, source: Path, number: int) -> Segment | None:
        if segment := self._workspace.take(source, number):
            self._taken.add(segment)
        return segment

    def _read_segment(
        self, reader: ChunkReader | TextReader, stream: ShardStream, place: Place, segment: Segment | None
    ) -> Place:
        """Read the segment that begins at `place`, and have it encoded if it is taken; return where it ends."""
        end, left = None, self._workspace.settings.segment_chunks
        while not end:
            before, left = stream.consumed, left - 1
            chunk = reader.next_chunk()
            if reader.ended or not left:
                end = Place(
                    segment=place.segment + 1,
                    position=reader.position,
                    objects=reader.objects,
                    consumed=stream.consumed,
                    ended=reader.ended,
                )
            if segment:
                read = parse_file if is_text_file(segment.input) else self._parse_lines
                size, encoded = len(chunk.data), self._pool.submit(self._encode, chunk, read, reader.spare)
                self._pending.append(Pending(segment, size, stream.consumed - before, encoded, end, stream.sha256))
                self._in_flight += size
                self._write_down_to(self._depth)
            elif len(chunk.data) == self._workspace.settings.chunk_bytes:
                reader.spare.append(chunk.data)
        return end

    def _write_down_to(self, depth: int) -> None:
        """Write what is encoded; wait for it while more than `depth` chunks, or too many bytes, are on their way."""
        while self._pending:
            oldest = self._pending[0]
            waiting = len(self._pending) > depth or self._in_flight > IN_FLIGHT_BYTES
            if not (waiting or oldest.encoded.done()):
                return
            self._write(oldest)
            if oldest.end:
                self._finish(oldest.segment, oldest.end, oldest.sha256)
            self._pending.popleft()
            self._in_flight -= oldest.size

    def _write(self, pending: Pending) -> None:
        segment, encoded = pending.segment, pending.encoded.result()
        if self._strict and encoded.problems:
            before = self._workspace.made(segment.input, segment.number).lines + segment.source.lines
            refuse_losses(segment.input, encoded.problems, before)
        segment.append(encoded.ids, encoded.documents, encoded.bytes, encoded.lines, encoded.problems)
        self._report(Work(pending.consumed, encoded.bytes, len(encoded.ids)))

    def _finish(self, segment: Segment, end: Place, sha256: str | None) -> None:
        segment.finish(end, sha256)
        self._taken.discard(segment)
        if end.ended:
            self._report(Work(segment.source.file_bytes - end.consumed))
        self._unmerged_bytes += segment.source.tokens * self._workspace.dtype.itemsize
        # Each merging looks at all inputs, which may be thousands of small ones: not for every one of these.
        enough = self._unmerged_bytes >= MERGED_BYTES
        if enough and self._merger and (self._merging is None or self._merging.done()):
            if self._merging:
                self._merging.result()
            self._unmerged_bytes = 0
            self._merging = self._merger.submit(self._workspace.merge)

    def _encode(self, chunk: Chunk, read: Callable[[Chunk], Documents], spare: list[bytearray]) -> Encoded:
        if not hasattr(self._of_thread, "encode"):
            self._of_thread.encode = self._encoder.encoder()
        documents = read(chunk)
        if split := self._workspace.settings.split:
            text, ends = split.select(documents.text, documents.ends)
            documents = replace(documents, text=text, ends=ends)
        if len(chunk.data) == self._workspace.settings.chunk_bytes:
            spare.append(chunk.data)
        else:
            chunk.data.clear()  # a document may be huge: not to be held twice while it is encoded
        ids = self._of_thread.encode(documents.text, documents.ends)
        return Encoded(ids, len(documents.ends), len(documents.text), documents.lines, documents.problems)


def refuse_losses(source: Path, problems: Sequence[Problem], lines_before: int = 0) -> None:
    """PrepareError for the first of `problems` that loses or changes something."""
    for problem in sorted(problems, key=lambda problem: problem.line):
        if problem.kind in LOSSES or problem.kind in CHANGES:
            detail = f" ({problem.detail})" if problem.detail else ""
            raise PrepareError(f"{source}:{lines_before + problem.line}: {KINDS[problem.kind]}{detail} (--strict)")
