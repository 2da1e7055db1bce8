"""Small files written whole, locks that end with their process, and moving bytes between files."""

import errno
import fcntl
import hashlib
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import msgspec

from engine.whole_file import whole_file

COPY_BYTES = 8 << 20
NO_COPY_FILE_RANGE = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)  # across file systems, or on old ones


def write_whole(path: Path, content: bytes, *, synced: bool = True) -> None:
    """Write a small file that appears whole or not at all; `synced`: on the disk when this returns."""
    with whole_file(path, synced=synced) as partial:
        partial.write_bytes(content)


def write_json(path: Path, content: msgspec.Struct) -> None:
    """`write_whole` of what a person may want to read."""
    write_whole(path, msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n")


def write_all(file: BinaryIO, content: bytes | memoryview) -> None:
    """Write to an unbuffered file, which may take less than it is given."""
    with memoryview(content) as view:
        written = 0
        while written < len(view):
            written += file.write(view[written:])


def append_file(
    source: Path, size: int, target: BinaryIO, report: Callable[[int], object] = lambda count: None
) -> None:
    """Append the first `size` bytes of a file to another; some file systems then share them between the two.

    report: told of each part how many bytes it had.
    """
    with open(source, "rb", buffering=0) as file:
        try:
            while size and (count := os.copy_file_range(file.fileno(), target.fileno(), size)):
                size -= count
                report(count)
        except AttributeError:  # not Linux
            pass
        except OSError as error:
            if error.errno not in NO_COPY_FILE_RANGE:
                raise
        while size and (block := file.read(min(size, COPY_BYTES))):
            write_all(target, block)
            size -= len(block)
            report(len(block))


def checksum(path: Path) -> int:
    """Return the CRC-32 of a file."""
    crc32 = 0
    with open(path, "rb", buffering=0) as file:
        while block := file.read(COPY_BYTES):
            crc32 = zlib.crc32(block, crc32)
    return crc32


def hash_file(path: Path) -> str:
    """Return the SHA-256 of the bytes of `path` in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def lock(path: Path, *, shared: bool = False) -> Iterator[bool]:
    """Hold the system's lock on a file, which is made where it is missing; False where another process holds it."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a") as file:
            if not (mine := try_lock(file, shared=shared)) or is_at(file, path):
                yield mine
                return
        # Whoever had the lock has removed the file, between opening and locking it here: this lock keeps no one out.


def try_lock(file: BinaryIO, *, shared: bool = False) -> bool:
    """Take the system's lock on an open file, if it is free."""
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_at(file: BinaryIO, path: Path) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
