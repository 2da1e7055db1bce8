"""Files that appear whole or not at all: written under another name, which is then exchanged for theirs."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path, *, synced: bool = False) -> Iterator[Path]:
    """Yield a path beside `path` to write to; it takes that name at the end, and where the block fails it is removed.

    What was there stays until then. synced: the content is on the disk before the name is.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        if synced:
            sync(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Bring a file's content, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
