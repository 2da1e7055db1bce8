"""A token file in the making: segments that survive an interruption, and their merging into one file.

`X.bin` grows in the folder `X.bin.parts`. An input is done in segments of about 32 MiB of its uncompressed bytes, by
whichever process takes the segment's lock first. A finished one is two files, the ids and a record that says what they
are of. In order, segments are appended to the file `merged` and removed, and the state `merged.json` says how far that
has come. When all are, the JSON and at last `X.bin` itself get their names.

Whoever is killed at any point, the next run goes on from the records and the state. Segments are not brought to the
disk one by one: after a power failure their checksums tell which of them are to be made again.
"""

import glob
import hashlib
import os
import shutil
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain, takewhile
from pathlib import Path
from typing import BinaryIO

import msgspec
import numpy as np

from engine.whole_file import sync
from tools.disk import append_file, checksum, is_at, lock, try_lock, write_all, write_json, write_whole
from tools.preparing.chunks import CHUNK_BYTES, TEXT_KEY, Problem
from tools.preparing.inputs import names_of, root_of
from tools.preparing.split import Split
from tools.preparing.token_file import (
    FORMAT,
    Description,
    NoText,
    PrepareError,
    Source,
    description_path,
    folder_of,
    read_description,
)  # fmt: skip
from tools.progress import Progress

SEGMENT_CHUNKS = 8
MERGED_BYTES = 64 << 20  # of ids to one state on disk, which names every input: there may be many, and small
MAX_STEM = 40  # characters, of four bytes at most: a name may have 255 bytes
PATIENCE_S = 5  # for the helpers of a run that was killed to end as well


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What decides the ids that an input gives, and how it is cut."""

    format: int = FORMAT
    tokenizer: str
    max_data: int | None = None
    text_key: str = TEXT_KEY
    split: Split | None = None
    chunk_bytes: int = CHUNK_BYTES
    segment_chunks: int = SEGMENT_CHUNKS

    def made(self, description: Description) -> bool:
        """Whether a token file was made with these settings; how its inputs were cut changes nothing."""
        decisive = ("format", "tokenizer", "max_data", "text_key", "split")
        return all(getattr(description, name) == getattr(self, name) for name in decisive)


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """A point in an input between two segments."""

    segment: int = 0  # number of the one that begins here
    position: int = 0  # uncompressed bytes before it
    objects: int = 0  # lines before it that are not white space, where they are limited
    consumed: int = 0  # bytes of the file on disk read by then
    ended: bool = False  # nothing follows


class Record(msgspec.Struct, kw_only=True):
    """What a finished segment holds."""

    settings: Settings
    source: Source
    end: Place
    crc32: int  # of the ids as bytes


class Merged(msgspec.Struct, kw_only=True):
    """What the file `merged` holds: all of `sources` but for the last, of which it holds what is before `end`."""

    settings: Settings
    sources: list[Source] = []
    end: Place = Place(ended=True)
    bytes: int = 0

    def place(self, number: int) -> Place:
        """Return how far into the input of that number it goes."""
        if number >= len(self.sources):
            return Place()
        return self.end if number == len(self.sources) - 1 else Place(ended=True)


class Segment:
    """A segment that this process has taken: its ids are written here."""

    def __init__(self, workspace: "Workspace", source: Path, number: int, file: BinaryIO) -> None:
        self._workspace, self.input, self.number, self._file = workspace, source, number, file
        self._crc32 = 0
        self.source = workspace.now(source)

    def append(self, ids: np.ndarray, documents: int, size: int, lines: int, problems: list[Problem]) -> None:
        """Write the ids of a chunk and count what it had; size: UTF-8 bytes. OSError where the disk is full."""
        content = memoryview(ids).cast("B")
        write_all(self._file, content)
        self._crc32 = zlib.crc32(content, self._crc32)
        self.source.documents += documents
        self.source.tokens += len(ids)
        self.source.bytes += size
        self.source.count(lines, problems)

    def finish(self, end: Place, sha256: str | None) -> None:
        """Make the segment count; PrepareError where the input changed meanwhile."""
        if not self.source.is_of(self._workspace.now(self.input)):
            raise PrepareError(f"{self.input} changed while it was read: run the same command again when it is done")
        self.source.file_sha256 = sha256
        tokens, record = self._workspace.segment_files(self.input, self.number)
        os.replace(self._file.name, tokens)
        content = Record(settings=self._workspace.settings, source=self.source, end=end, crc32=self._crc32)
        write_whole(record, msgspec.json.encode(content), synced=False)
        self._file.close()

    def abandon(self) -> None:
        """Remove what was written, unless it is finished."""
        if not self._file.closed:
            Path(self._file.name).unlink(missing_ok=True)
            self._file.close()


class Workspace:
    """The inputs of a token file, what has been made of them, and the locks that keep runs apart.

    root: the folder from which inputs are named, None for the one that has all. told: a person is, where inputs are
    hashed.
    """

    def __init__(
        self,
        file: Path,
        inputs: Sequence[Path],
        settings: Settings,
        dtype: np.dtype,
        root: Path | None = None,
        *,
        told: bool = False,
    ) -> None:
        self.file, self.inputs, self.settings, self.dtype = file, list(inputs), settings, dtype
        self.root = root or root_of(inputs)
        self._told = told
        self.folder = file.with_name(file.name + ".parts")
        self._merged, self._state = self.folder / "merged", self.folder / "merged.json"
        self._names = names_of(self.inputs, self.root)
        self._numbers = {source: number for number, source in enumerate(self.inputs)}
        self._same: dict[tuple[Path, int, int], bool] = {}
        self._seen: tuple[tuple[int, ...] | None, Merged] | None = None  # a state of `merged`, and what it comes to

    def number(self, source: Path) -> int:
        """Return the place of an input among all, from 0."""
        return self._numbers[source]

    def name(self, source: Path) -> str:
        """Return the path of an input in the folder of all."""
        return self._names[source]

    def now(self, source: Path) -> Source:
        """Return a record of an input as it is now."""
        return Source.of(source, self.name(source))

    def _stem(self, source: Path) -> str:
        """Return what the files of an input are called: its name or, in a folder, the end of it and a hash of all."""
        name = self.name(source)
        if "/" not in name:
            return name
        return f"{hashlib.sha256(os.fsencode(name)).hexdigest()[:32]}-{source.name[-MAX_STEM:]}"

    @contextmanager
    def locked(self, *, shared: bool) -> Iterator[None]:
        """Keep other runs away from this file: all of them, or (shared) those that are not shared.

        PrepareError where one is on. The lock is the system's: it ends with the process, however that ends.
        """
        with lock(self.folder / "lock", shared=shared) as mine:
            if not (mine and (shared or self._alone())):
                raise PrepareError(f"another run is preparing {self.file}: wait for it, or choose another output")
            yield

    def _alone(self) -> bool:
        """True once no helper is at work; those of a run that was killed are waited for, PATIENCE_S at most."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            with lock(self.folder / "helpers") as alone:
                if alone or time.monotonic() > deadline:
                    return alone
            time.sleep(0.02)

    @contextmanager
    def helping(self) -> Iterator[bool]:
        """Be a helper of the run that has the lock."""
        with lock(self.folder / "helpers", shared=True) as welcome:
            yield welcome

    @contextmanager
    def owning(self, source: Path) -> Iterator[bool]:
        """Be the first process at an input, unless another is."""
        with lock(self.folder / f"{self._stem(source)}.owner") as mine:
            yield mine

    def segment_files(self, source: Path, number: int) -> tuple[Path, Path]:
        """Return the paths of a finished segment's ids and record."""
        stem = f"{self._stem(source)}.{number:05}"
        return self.folder / f"{stem}.tokens", self.folder / f"{stem}.json"

    def record(self, source: Path, number: int) -> Record | None:
        """Return the record of a finished segment that is not merged yet, if it is of the input as it is now."""
        tokens, path = self.segment_files(source, number)
        try:
            record = msgspec.json.decode(path.read_bytes(), type=Record)
            size = tokens.stat().st_size
        except (FileNotFoundError, msgspec.DecodeError):
            return None
        if record.settings != self.settings or size != record.source.tokens * self.dtype.itemsize:
            return None
        return record if self._is_current(record.source, source) else None

    def _is_current(self, recorded: Source, source: Path) -> bool:
        """Whether a record is of an input as it is now; where only the time changed, as a copy's does, by its hash."""
        now = self.now(source)
        if recorded.is_of(now):
            return True
        key = source, recorded.file_mtime_ns, now.file_mtime_ns
        if key not in self._same:
            others = chain([recorded], self._recorded(source))  # which looks through the folder
            hashed = (other for other in others if other.is_of(recorded) and other.file_sha256)
            same = (self._is_still(other, source) for other in hashed)
            self._same[key] = recorded.file_bytes == now.file_bytes and any(same)
        return self._same[key]

    def _is_still(self, recorded: Source, source: Path) -> bool:
        return recorded.is_still(source, self.name(source), told=self._told)

    def _recorded(self, source: Path) -> Iterator[Source]:
        """Yield what is recorded of an input, of whatever state of it."""
        for path in self.folder.glob(f"{glob.escape(self._stem(source))}.?????.json"):
            with suppress(FileNotFoundError, msgspec.DecodeError):
                yield msgspec.json.decode(path.read_bytes(), type=Record).source
        yield from (recorded for recorded in self._read_state().sources if recorded.file == self.name(source))

    def place_after(self, source: Path, number: int) -> Place | None:
        """Return a place after a segment up to which an input is done, None where that segment is not."""
        if record := self.record(source, number):
            return record.end
        # Read in this order: a segment that is merged between the two is in the state before its record goes.
        place = self._merged_place(source)
        return place if place.segment > number or place.ended else None

    def take(self, source: Path, number: int) -> Segment | None:
        """Return a segment to be written, None where another process has it or it is finished."""
        path = self.folder / f"{self._stem(source)}.{number:05}.part"
        file = open(path, "ab", buffering=0)
        if not try_lock(file) or not is_at(file, path):
            file.close()
            return None
        segment = Segment(self, source, number, file)
        if self.place_after(source, number):
            segment.abandon()
            return None
        file.truncate(0)
        return segment

    def reach(self, source: Path) -> Place:
        """Return the first place in an input after which something is to be done; `ended` where nothing is."""
        place = self._merged_place(source)
        while not place.ended and (record := self.record(source, place.segment)):
            place = record.end
        return place

    def missing(self, inputs: Sequence[Path]) -> list[Path]:
        """Return those inputs that are not done, or whose end is being merged just now."""
        return [source for source in inputs if not self.reach(source).ended]

    def made(self, source: Path, before: int | None = None) -> Source:
        """Return what an input has given up to segment `before`, or as far as it is done without a gap."""
        while True:
            merged, number = self._read_merged(), self.number(source)
            whole = self.now(source)
            for found in merged.sources[number : number + 1]:
                whole.add(found)
            place = merged_place = merged.place(number)
            while place.segment != before and not place.ended and (record := self.record(source, place.segment)):
                whole.add(record.source)
                place = record.end
            # Else segments were merged meanwhile, so that their records went before they were counted.
            if self._merged_place(source) == merged_place:
                return whole

    def finished(self) -> Description | None:
        """Return the description of the token file where it is there, made of these inputs with these settings."""
        description = read_description(self.file)
        if description is None or not self.settings.made(description) or len(description.sources) != len(self.inputs):
            return None
        still = all(self._is_still(*pair) for pair in zip(description.sources, self.inputs))
        return description if still else None

    def tidy(self, *, shown: bool = False) -> list[str]:
        """Remove what is damaged, of other settings, or of inputs as they were before; return these inputs' names."""
        names = set()
        inputs = {self._stem(source): source for source in self.inputs}
        with self._progress("checking", shown) as progress:
            for path in self.folder.glob("*.?????.json"):
                stem, number = path.name.removesuffix(".json").rsplit(".", 1)
                tokens = path.with_suffix(".tokens")
                record = self.record(inputs[stem], int(number)) if stem in inputs else None
                size = tokens.stat().st_size if tokens.exists() else 0
                if record is None or checksum(tokens) != record.crc32:
                    names.add(self.name(inputs[stem]) if stem in inputs else stem)
                    path.unlink()
                    tokens.unlink(missing_ok=True)
                progress.add(size)
        merged = self._read_merged()
        names |= {source.file for source in self._read_state().sources[len(merged.sources) :]}
        self._write_merged(merged)
        return sorted(names)

    def reuse(self, *, shown: bool = False) -> list[str]:
        """Take over what the token file that is there begins with, as far as inputs are the same; return their names.

        So a file with one more shard takes the time of that shard. OSError where the disk is full.
        """
        description = read_description(self.file)
        if description is None or not self.settings.made(description):
            return []
        same = [a for a, _ in takewhile(lambda pair: self._is_still(*pair), zip(description.sources, self.inputs))]
        if len(same) <= len(self._read_merged().sources):
            return []
        size = sum(source.tokens for source in same) * self.dtype.itemsize
        with (
            self._appending(Merged(settings=self.settings)) as file,
            self._progress("copying", shown, size) as progress,
        ):
            append_file(self.file, size, file, progress.add)
            self._write_merged(Merged(settings=self.settings, sources=same, bytes=size), file)
        return [source.file for source in same]

    def merge(self, *, shown: bool = False) -> None:
        """Append to `merged` the segments that are next, unless another process is doing that."""
        with lock(self.folder / "merging") as mine:
            if not mine:
                return
            merged = self._read_current()
            with self._appending(merged) as file, self._progress("merging", shown) as progress:
                while added := self._append(merged, file, progress):
                    self._write_merged(merged, file)
                    for path in added:
                        path.unlink()

    def _append(self, merged: Merged, file: BinaryIO, progress: Progress) -> list[Path]:
        """Append segments, about MERGED_BYTES of them; return the paths of what is not needed any more."""
        added, enough = [], merged.bytes + MERGED_BYTES
        while merged.bytes < enough:
            if not merged.end.ended:
                source, number = self.inputs[len(merged.sources) - 1], merged.end.segment
            elif len(merged.sources) < len(self.inputs):
                source, number = self.inputs[len(merged.sources)], 0
            else:
                break
            if not (record := self.record(source, number)):
                break
            if number == 0:
                merged.sources.append(self.now(source))
            tokens, path = self.segment_files(source, number)
            append_file(tokens, record.source.tokens * self.dtype.itemsize, file, progress.add)
            merged.sources[-1].add(record.source)
            merged.end = record.end
            merged.bytes += record.source.tokens * self.dtype.itemsize
            added += path, tokens  # ids without a record are nothing, a record without ids looks like a damaged one
        return added

    def publish(self, vocab_size: int, end_of_text: int) -> Description:
        """Give the merged file its name, its JSON first, and remove the folder; PrepareError where it is empty."""
        sources = self._read_merged().sources
        description = Description(
            tokenizer=self.settings.tokenizer,
            vocab_size=vocab_size,
            end_of_text=end_of_text,
            dtype=self.dtype.name,
            tokens=sum(source.tokens for source in sources),
            documents=sum(source.documents for source in sources),
            bytes=sum(source.bytes for source in sources),
            max_data=self.settings.max_data,
            text_key=self.settings.text_key,
            split=self.settings.split,
            folder=folder_of(self.root, self.file),
            sources=sources,
        )
        if description.tokens == 0:
            raise NoText(sources, self.settings.split)
        # A token file without its JSON would pass for GPT-2's, one with another's for damaged; a JSON alone is nothing.
        self.file.unlink(missing_ok=True)
        write_json(self.folder / "description", description)
        os.replace(self.folder / "description", description_path(self.file))
        sync(self.file.parent)
        os.replace(self._merged, self.file)
        sync(self.file.parent)
        self.remove()
        return description

    def remove(self) -> None:
        """Remove what the token file has grown from, and the lock with it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _progress(self, doing: str, shown: bool, size: int | None = None) -> Progress:
        """Return one over `size` bytes, None for those of all segments that lie there; without any it is not shown."""
        if size is None:
            size = sum(path.stat().st_size for path in self.folder.glob("*.tokens")) if shown else 0
        return Progress(f"{self.file.name}, {doing}", size, shown=shown and size > 0)

    def _read_state(self) -> Merged:
        try:
            return msgspec.json.decode(self._state.read_bytes(), type=Merged)
        except (FileNotFoundError, msgspec.DecodeError):
            return Merged(settings=self.settings)

    def _read_merged(self) -> Merged:
        """Return what of `merged` was of these settings and inputs when its state was first seen; not to be changed."""
        try:
            stat = self._state.stat()
            key = stat.st_ino, stat.st_mtime_ns, stat.st_size
        except FileNotFoundError:
            key = None
        seen = self._seen  # other threads come here as well
        if seen is None or seen[0] != key:
            seen = self._seen = key, self._read_current()
        return seen[1]

    def _read_current(self) -> Merged:
        """Return what of `merged` is of these settings and of the inputs as they are now, looking at each."""
        merged = self._read_state()
        try:
            whole = self._merged.stat().st_size >= merged.bytes and merged.settings == self.settings
        except FileNotFoundError:
            whole = False
        if not whole:
            return Merged(settings=self.settings)
        pairs = zip(merged.sources, self.inputs)
        current = [source for source, _ in takewhile(lambda pair: self._is_current(*pair), pairs)]
        if len(current) == len(merged.sources):
            return merged
        size = sum(source.tokens for source in current) * self.dtype.itemsize
        return Merged(settings=self.settings, sources=current, bytes=size)

    def _merged_place(self, source: Path) -> Place:
        return self._read_merged().place(self.number(source))

    def _write_merged(self, merged: Merged, file: BinaryIO | None = None) -> None:
        if file:
            os.fsync(file.fileno())
        write_whole(self._state, msgspec.json.encode(merged))

    @contextmanager
    def _appending(self, merged: Merged) -> Iterator[BinaryIO]:
        """Open `merged` at its end; whatever is appended and not in the state on disk is cut off where that fails."""
        with open(os.open(self._merged, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0) as file:
            file.truncate(merged.bytes)
            file.seek(merged.bytes)
            try:
                yield file
            except BaseException:
                file.truncate(min(self._read_state().bytes, os.fstat(file.fileno()).st_size))
                raise
