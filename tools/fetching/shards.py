"""Shards on disk: `.jsonl.zst` files that appear whole or not at all, each with a note of where it came from.

A shard `00.jsonl.zst` has its note beside it, `00.jsonl.zst.json`. The note is what tells a whole shard of the Pile
from the first gigabyte of one, and either from a file that a person put there.
"""

import hashlib
import os
from pathlib import Path
from types import TracebackType

import msgspec
import zstandard

from engine.whole_file import sync
from tools.disk import hash_file, write_json


class ShardError(RuntimeError):
    """A shard that cannot be had or must not be touched; the message says what, where, and what to do."""


class Note(msgspec.Struct, kw_only=True):
    """Where a shard came from and how to tell that it is still the same file."""

    source: str  # "stdlib", or the repository of the hub
    revision: str = ""  # commit of the hub's repository, or version of the Python whose files these are
    file: str = ""  # path within the repository
    whole: bool = True  # False: only the first part of `file`
    documents: int | None = None
    text_bytes: int | None = None  # UTF-8 bytes of the texts
    bytes: int  # of the shard itself
    sha256: str  # of the shard itself
    mtime_ns: int = 0  # spares hashing a file that nobody touched


def note_path(shard: Path) -> Path:
    """Return the place of the note of `shard`."""
    return shard.with_name(shard.name + ".json")


def read_note(shard: Path) -> Note | None:
    """Return the note of `shard` where the file is still what the note describes, else None.

    A file whose time changed (copied, restored from a backup) is hashed once and its note brought up to date.
    """
    try:
        note = msgspec.json.decode(note_path(shard).read_bytes(), type=Note)
        stat = shard.stat()
    except (FileNotFoundError, msgspec.DecodeError):
        return None
    if stat.st_size != note.bytes:
        return None
    if stat.st_mtime_ns != note.mtime_ns:
        if hash_file(shard) != note.sha256:
            return None
        note.mtime_ns = stat.st_mtime_ns
        write_note(shard, note)
    return note


def write_note(shard: Path, note: Note) -> None:
    """Write the note of `shard` beside it, in place of an older one."""
    write_json(note_path(shard), note)


def publish(temporary: Path, shard: Path, note: Note) -> None:
    """Give the finished file `temporary` the name `shard`; its bytes and its note are on disk before the name is."""
    sync(temporary)
    note.mtime_ns = temporary.stat().st_mtime_ns
    # The note goes first: a note without its file says nothing, a file without its note would pass for a person's own.
    write_note(shard, note)
    os.replace(temporary, shard)


class ShardWriter:
    """Writes lines into `<path>.tmp`, which takes the name `path` in `publish`; leaving the block early removes it."""

    def __init__(self, path: Path, level: int = 3) -> None:
        self.path = path
        self.temporary = path.with_name(path.name + ".tmp")
        self._level = level

    def __enter__(self) -> "ShardWriter":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.temporary, "wb")
        self._compressor = zstandard.ZstdCompressor(self._level, write_checksum=True).compressobj()
        self._hash = hashlib.sha256()
        self._bytes = 0
        return self

    def write(self, lines: bytes) -> None:
        """Append complete lines, each with its line feed."""
        self._append(self._compressor.compress(lines))

    def _append(self, compressed: bytes) -> None:
        self._file.write(compressed)
        self._hash.update(compressed)
        self._bytes += len(compressed)

    def publish(self, **origin: object) -> Note:
        """Finish the shard and give it its name; `origin` are the fields of its `Note`, which is returned."""
        self._append(self._compressor.flush())
        self._file.close()
        note = Note(bytes=self._bytes, sha256=self._hash.hexdigest(), **origin)
        publish(self.temporary, self.path, note)
        return note

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self.temporary.unlink(missing_ok=True)  # gone already where it was published
