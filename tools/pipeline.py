"""One process's share of preparing: its inputs one after another, each decompressed, parsed, encoded and written at once.

The thread that calls reads and writes; a pool of threads parses and encodes. Decompression and encoding release the GIL.
"""
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import local

import msgspec
import numpy as np

from tools.documents import CHANGES, KINDS, LOSSES, OF_A_FILE, Chunk, Problem, parse, read_chunks
from tools.parts import Part, PartWriter, State
from tools.shard_stream import ShardStream
from tools.text_encoders import TextEncoder
from tools.token_file import PrepareError, Source

SAVE_INTERVAL_S = 2.0
IN_FLIGHT_BYTES = 64 << 20  # of text between reading and writing; a longer line goes alone


class Work(msgspec.Struct, tag=True):
    """What was done since the last report: bytes of files read, UTF-8 bytes of text, ids; and maybe a line to print."""

    consumed: int = 0
    bytes: int = 0
    tokens: int = 0
    message: str = ""


Report = Callable[[Work], None]


@dataclass(frozen=True, slots=True)
class Encoded:
    """What a chunk gave."""

    ids: np.ndarray
    documents: int
    bytes: int
    problems: list[Problem]


class Pipeline:
    """Threads that parse and encode, and what they need."""

    def __init__(self, encoder: TextEncoder, threads: int, report: Report, strict: bool = False) -> None:
        self.encoder, self.threads, self.report, self.strict = encoder, threads, report, strict
        self._of_thread = local()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="encode")

    def __enter__(self) -> "Pipeline":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def run(self, parts: Iterable[Part]) -> None:
        """Finish those of `parts` that no other process is at. PrepareError, OSError where the disk is full."""
        for part in parts:
            with part.writing() as writer:
                if writer and not writer.state.done:
                    self._fill(writer)

    def _fill(self, writer: PartWriter) -> None:
        source = writer.state.source
        path = writer.part.input
        if writer.restarted:
            self.report(Work(message=f"{path} is not what it was, or was prepared in another way: starting it again"))
        elif writer.state.position:
            self.report(Work(message=f"{path}: going on at line {writer.state.next_line}"))
        self._check(writer.part, [Problem(kind, *lines[0]) for kind, lines in source.examples.items()])
        with ShardStream(path) as stream:
            self._pump(writer, stream)
            now = Source.of(path)
            if (now.file_bytes, now.file_mtime_ns) != (source.file_bytes, source.file_mtime_ns):
                writer.part.state_path.unlink(missing_ok=True)
                raise PrepareError(f"{path} changed while it was read: run the same command again when it is complete")
            source = msgspec.structs.replace(writer.state.source, file_sha256=stream.sha256)
            self.report(Work(consumed=source.file_bytes - stream.consumed))
        writer.state = msgspec.structs.replace(writer.state, source=source, done=True)
        self.report(Work(message=f"{path}: {source.documents} documents, {source.tokens} tokens"))

    def _pump(self, writer: PartWriter, stream: ShardStream) -> None:
        """Bring what is left of a shard into its part, the chunks in order."""
        state = writer.state
        wanted = state.settings.max_data
        if wanted is not None:
            wanted = max(0, wanted - objects(state.source))
        pending: deque[tuple[Chunk, int, Future[Encoded]]] = deque()
        in_flight, saved, consumed = 0, time.monotonic(), 0

        def write_oldest() -> None:
            nonlocal in_flight, saved, consumed
            chunk, size, future = pending.popleft()
            encoded = future.result()
            self._check(writer.part, encoded.problems)
            state = writer.state.after(
                position=chunk.end,
                next_line=chunk.next_line,
                documents=encoded.documents,
                tokens=len(encoded.ids),
                size=encoded.bytes,
                problems=encoded.problems,
            )
            writer.append(encoded.ids, state)
            in_flight -= size
            self.report(Work(chunk.consumed - consumed, encoded.bytes, len(encoded.ids)))
            consumed = chunk.consumed
            if time.monotonic() - saved > SAVE_INTERVAL_S:
                writer.save()
                saved = time.monotonic()

        for chunk in read_chunks(stream, start=state.position, first_line=state.next_line, max_objects=wanted):
            size = len(chunk.data)
            pending.append((chunk, size, self._pool.submit(self._encode, chunk)))
            in_flight += size
            del chunk
            while pending and (
                pending[0][2].done() or len(pending) > 2 * self.threads or (in_flight > IN_FLIGHT_BYTES)
            ):
                write_oldest()
        while pending:
            write_oldest()

    def _encode(self, chunk: Chunk) -> Encoded:
        if not hasattr(self._of_thread, "encode"):
            self._of_thread.encode = self.encoder.encoder()
        documents = parse(chunk)
        chunk.data.clear()  # a document may be huge: do not hold it twice while it is encoded
        size = sum(map(len, documents.texts))
        count = len(documents.texts)
        return Encoded(self._of_thread.encode(documents.texts), count, size, documents.problems)

    def _check(self, part: Part, problems: list[Problem]) -> None:
        """PrepareError for the first problem that costs something, where `strict`."""
        if self.strict:
            for problem in sorted(problems, key=lambda problem: problem.line):
                if problem.kind in LOSSES or problem.kind in CHANGES:
                    raise PrepareError(f"{describe(part.input, problem)} (--strict)")


def objects(source: Source) -> int:
    """Return the lines of an input, white space aside, that have become documents or problems."""
    return source.documents + sum(count for kind, count in source.skipped.items() if kind not in OF_A_FILE)


def describe(path: object, problem: Problem) -> str:
    """Return one line on a problem: file, line, what it is, and what the library said."""
    detail = f" ({problem.detail})" if problem.detail else ""
    return f"{path}:{problem.line}: {KINDS[problem.kind]}{detail}"
