"""A token file in the making: parts that survive an interruption, and their merging into one file.

`X.bin` grows in the folder `X.bin.parts`. Each input has `<input>.tokens`, its ids, and `<input>.state`, which says how
much of them is whole and on the disk. When all inputs are done their ids are laid end to end, onto the first file, and
each of the others is removed once it is there; then the JSON and at last `X.bin` itself get their names. Whoever is
killed at any point, the next run goes on from what the states say.
"""
import fcntl
import os
import shutil
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import msgspec
import numpy as np

from tools.documents import LOSSES, Problem
from tools.token_file import (
    Description,
    PrepareError,
    Settings,
    Source,
    description_path,
    read_description,
    sync_folder,
    write_whole,
)

COPY_BYTES = 8 << 20
MAX_EXAMPLES = 5  # lines named of each kind of problem and input


class State(msgspec.Struct, kw_only=True):
    """How far an input has got; `source` tells of what is in the part so far."""

    settings: Settings
    source: Source
    position: int = 0  # uncompressed bytes of the input that are done
    next_line: int = 1
    done: bool = False

    def after(self, *, position: int, next_line: int, documents: int, tokens: int, size: int, problems: list[Problem]) -> "State":
        """Return the state after one more chunk; `size` is the UTF-8 bytes of its texts."""
        source = self.source
        skipped, noted, examples = dict(source.skipped), dict(source.noted), dict(source.examples)
        for problem in problems:
            counts = skipped if problem.kind in LOSSES else noted
            counts[problem.kind] = counts.get(problem.kind, 0) + 1
            if counts[problem.kind] <= MAX_EXAMPLES:
                examples[problem.kind] = [*examples.get(problem.kind, []), (problem.line, problem.detail)]
        source = msgspec.structs.replace(
            source,
            documents=source.documents + documents,
            tokens=source.tokens + tokens,
            bytes=source.bytes + size,
            skipped=skipped,
            noted=noted,
            examples=examples,
        )
        return State(settings=self.settings, source=source, position=position, next_line=next_line)


class Merged(msgspec.Struct):
    """Which parts lie end to end in the file of the first: (name of the input, CRC-32 of its ids)."""

    parts: list[tuple[str, int]] = []
    bytes: int = 0


class Part:
    """The place of one input's ids."""

    def __init__(self, folder: Path, source: Path, settings: Settings, dtype: np.dtype) -> None:
        self.input, self.settings, self.dtype = source, settings, dtype
        self.tokens_path = folder / f"{source.name}.tokens"
        self.state_path = folder / f"{source.name}.state"

    def read_state(self) -> State | None:
        """Return the state on disk where it is of this input as it is now, with these settings."""
        try:
            state = msgspec.json.decode(self.state_path.read_bytes(), type=State)
        except (FileNotFoundError, msgspec.DecodeError):
            return None
        return state if state.settings == self.settings and state.source.is_still(self.input) else None

    def size(self, state: State) -> int:
        return state.source.tokens * self.dtype.itemsize

    def holds(self, state: State) -> bool:
        """Whether the file can have the ids that a state tells of."""
        return self.tokens_path.exists() and self.tokens_path.stat().st_size >= self.size(state)

    @contextmanager
    def writing(self) -> Iterator["PartWriter | None"]:
        """Lock the part and go on where it stands; None where another process holds it. Leaving saves what is whole."""
        with open(os.open(self.tokens_path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0) as file:
            if not try_lock(file, fcntl.LOCK_EX):
                yield None
                return
            with PartWriter(self, file) as writer:
                yield writer


class PartWriter:
    """Appends to a part and keeps its state on disk up to date, in the background."""

    def __init__(self, part: Part, file: BinaryIO) -> None:
        self.part, self._file = part, file
        self.restarted = part.state_path.exists()  # there is one, but it is not of this input with these settings
        self.state = State(settings=part.settings, source=Source.of(part.input))
        if (state := part.read_state()) and part.holds(state):
            if state.done or crc32(file, 0, part.size(state)) == state.source.crc32:
                self.state, self.restarted = state, False
        self._finished_before = self.state.done
        if self.restarted:
            part.state_path.unlink()  # before the ids that it tells of
        if not self._finished_before:
            self._cut()
        self._saver = ThreadPoolExecutor(1)
        self._saving: Future | None = None

    def append(self, ids: np.ndarray, state: State) -> None:
        """Write ids, after which `state` is true, but for its CRC, which is set here. OSError where the disk is full."""
        content = memoryview(ids).cast("B")
        write_all(self._file, content)
        state.source.crc32 = zlib.crc32(content, self.state.source.crc32)
        self.state = state

    def copy(self, file: BinaryIO, offset: int, state: State) -> None:
        """Take the ids that `state` tells of from another file, in place of what is here."""
        self._file.seek(0)
        copy(file, offset, self.part.size(state), self._file)
        self.state = state

    def save(self) -> None:
        """Begin to bring file and state to the disk, unless that still goes on from the last time."""
        if self._saving is None or self._saving.done():
            self._wait()
            self._saving = self._saver.submit(self._sync, msgspec.json.encode(self.state))

    def _sync(self, state: bytes) -> None:
        os.fsync(self._file.fileno())
        write_whole(self.part.state_path, state)

    def _wait(self) -> None:
        if self._saving:
            self._saving.result()

    def _cut(self) -> None:
        """Drop what the state does not vouch for."""
        size = self.part.size(self.state)
        self._file.truncate(size)
        self._file.seek(size)

    def __enter__(self) -> "PartWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._finished_before:  # and the ids of other parts may follow
            return
        with self._saver:
            try:
                self._wait()
            except OSError:
                if kind is None:
                    raise
            self._cut()  # half a chunk, of a write that failed; on a full disk it makes room for the state
            self._sync(msgspec.json.encode(self.state))


class Workspace:
    """All parts of a token file, the lock on them, and their merging."""

    def __init__(self, file: Path, inputs: Sequence[Path], settings: Settings, dtype: np.dtype) -> None:
        self.file, self.settings, self.dtype = file, settings, dtype
        self.folder = file.with_name(file.name + ".parts")
        self.parts = [Part(self.folder, source, settings, dtype) for source in inputs]
        self._merged_path = self.folder / "merged.state"

    @contextmanager
    def locked(self, shared: bool = False) -> Iterator[None]:
        """Keep other runs away from this file, all or (shared) but those of other inputs. PrepareError where one is on.

        The lock is the system's: it ends with the process, however that ends.
        """
        path = self.folder / "lock"
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(path, "a") as file:
                if not try_lock(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX):
                    raise PrepareError(f"another run is preparing {self.file}: wait for it, or choose another output")
                if not _is_at(file, path):  # the run before removed it after this one had opened it
                    continue
                yield
                return

    def finished(self) -> Description | None:
        """Return the description of the token file where it is there, made of these inputs with these settings."""
        description = read_description(self.file)
        if description is None or description.settings != self.settings:
            return None
        if len(description.sources) != len(self.parts):
            return None
        pairs = zip(description.sources, self.parts)
        return description if all(source.is_still(part.input) for source, part in pairs) else None

    def missing(self) -> list[Part]:
        """Return the parts that are not done."""
        states = self._states()
        merged = len(self._merged(states).parts)
        return [
            part
            for i, (part, state) in enumerate(zip(self.parts, states))
            if not (state and state.done and (i < merged or part.holds(state)))
        ]

    def reuse(self) -> list[str]:
        """Take over what the token file that is there has of these inputs; return their names.

        So a file with one more input takes the time of that input. ValueError where the file is damaged.
        """
        description = read_description(self.file)
        if description is None or description.settings != self.settings:
            return []
        missing = {part.input.name: part for part in self.missing() if not part.state_path.exists()}
        reused, offset = [], 0
        with open(self.file, "rb") as file:
            for source in description.sources:
                size = source.tokens * self.dtype.itemsize
                part = missing.get(source.file)
                if part and source.is_still(part.input) and crc32(file, offset, size) == source.crc32:
                    with part.writing() as writer:
                        if writer and not writer.state.done:
                            writer.copy(file, offset, State(settings=self.settings, source=source, done=True))
                            reused.append(source.file)
                offset += size
        return reused

    def merge(self, vocab_size: int, end_of_text: int) -> Description:
        """Lay the ids of all parts, which are done, end to end, give the file its name, and remove the parts.

        PrepareError where a part is damaged or there is not a single token.
        """
        states = self._states()
        sources = [state.source for state in states]
        description = Description(
            tokenizer=self.settings.tokenizer,
            vocab_size=vocab_size,
            end_of_text=end_of_text,
            dtype=self.dtype.name,
            tokens=sum(source.tokens for source in sources),
            documents=sum(source.documents for source in sources),
            bytes=sum(source.bytes for source in sources),
            max_data=self.settings.max_data,
            sources=sources,
        )
        if description.tokens == 0:
            raise PrepareError(f"no text in {', '.join(source.file for source in sources)}: there is nothing to write")
        merged = self._merged(states)
        with open(self.parts[0].tokens_path, "r+b", buffering=0) as file:
            if len(merged.parts) == 1 and crc32(file, 0, merged.bytes) != sources[0].crc32:
                raise self._damaged(self.parts[0])
            file.truncate(merged.bytes)
            file.seek(merged.bytes)
            for part, state in list(zip(self.parts, states))[len(merged.parts) :]:
                with open(part.tokens_path, "rb") as other:
                    if copy(other, 0, part.size(state), file) != state.source.crc32:
                        raise self._damaged(part)
                os.fsync(file.fileno())
                merged.parts.append((part.input.name, state.source.crc32))
                merged.bytes += part.size(state)
                write_whole(self._merged_path, msgspec.json.encode(merged))
                part.tokens_path.unlink()
            os.fsync(file.fileno())
        self._publish(description)
        return description

    def _publish(self, description: Description) -> None:
        # A token file without its JSON would pass for GPT-2's, one with another's for damaged; a JSON alone harms no one.
        self.file.unlink(missing_ok=True)
        write_whole(description_path(self.file), msgspec.json.format(msgspec.json.encode(description), indent=2) + b"\n")
        sync_folder(self.file.parent)
        os.replace(self.parts[0].tokens_path, self.file)
        sync_folder(self.file.parent)
        self.remove()

    def remove(self) -> None:
        """Remove the parts and the lock."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _damaged(self, part: Part) -> PrepareError:
        part.state_path.unlink()
        return PrepareError(
            f"{part.tokens_path} is damaged: its checksum is not the one it was written with. The same command makes it "
            "anew; where that happens again, look for a failing disk"
        )

    def _states(self) -> list[State | None]:
        return [part.read_state() for part in self.parts]

    def _merged(self, states: list[State | None]) -> Merged:
        """Return how many of the parts lie end to end in the first one's file, as the states are now."""
        try:
            recorded = msgspec.json.decode(self._merged_path.read_bytes(), type=Merged).parts
        except (FileNotFoundError, msgspec.DecodeError):
            recorded = []
        first = self.parts[0]
        room = first.tokens_path.stat().st_size if first.tokens_path.exists() else -1
        merged = Merged()
        for i, (part, state) in enumerate(zip(self.parts, states)):
            if not (state and state.done) or merged.bytes + part.size(state) > room:
                break
            name = part.input.name, state.source.crc32
            if i > 0 and (i >= len(recorded) or recorded[: i + 1] != [*merged.parts, name]):
                break
            merged.parts.append(name)
            merged.bytes += part.size(state)
        return merged


def copy(source: BinaryIO, offset: int, size: int, target: BinaryIO) -> int:
    """Append size bytes of `source` to `target`; return their CRC-32."""
    checksum = 0
    for block in _blocks(source, offset, size):
        write_all(target, block)
        checksum = zlib.crc32(block, checksum)
    return checksum


def crc32(file: BinaryIO, offset: int, size: int) -> int:
    """Return the CRC-32 of size bytes of a file."""
    checksum = 0
    for block in _blocks(file, offset, size):
        checksum = zlib.crc32(block, checksum)
    return checksum


def _blocks(file: BinaryIO, offset: int, size: int) -> Iterator[bytes]:
    file.seek(offset)
    while size and (block := file.read(min(size, COPY_BYTES))):
        size -= len(block)
        yield block


def write_all(file: BinaryIO, content: bytes | memoryview) -> None:
    """Write to an unbuffered file, which may take less than it is given."""
    with memoryview(content) as view:
        written = 0
        while written < len(view):
            written += file.write(view[written:])


def try_lock(file: BinaryIO, kind: int) -> bool:
    """Take the system's lock on an open file, if it is free."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
