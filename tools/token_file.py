"""What a token file says of itself: the JSON beside the flat ids, and how both get their names."""
import os
from pathlib import Path

import msgspec
import numpy as np

from tools.shards import hash_file

FORMAT = 1


class PrepareError(RuntimeError):
    """Data that cannot be prepared; the message says what, where, and what to do."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What decides the ids that an input gives."""

    format: int = FORMAT
    tokenizer: str
    max_data: int | None = None


class Source(msgspec.Struct, kw_only=True):
    """An input and what it gave; its first fields are the ones that readers of token files know."""

    file: str
    documents: int = 0
    tokens: int = 0
    bytes: int = 0  # UTF-8 bytes of the texts
    skipped: dict[str, int] = {}  # kind -> how often, kinds of documents.LOSSES
    noted: dict[str, int] = {}  # the same for what cost no line
    examples: dict[str, list[tuple[int, str]]] = {}  # kind -> the first few lines, and what was said of them
    crc32: int = 0  # of the ids as bytes
    file_bytes: int  # of the input as it is on disk
    file_mtime_ns: int
    file_sha256: str | None = None  # None where not all of it was read, or it could not be

    @classmethod
    def of(cls, path: Path) -> "Source":
        stat = path.stat()
        return cls(file=path.name, file_bytes=stat.st_size, file_mtime_ns=stat.st_mtime_ns)

    def is_still(self, path: Path) -> bool:
        """Whether `path` is the input this tells of. One whose time changed, as copies do, is hashed."""
        stat = path.stat()
        if (path.name, stat.st_size) != (self.file, self.file_bytes):
            return False
        return stat.st_mtime_ns == self.file_mtime_ns or hash_file(path) == self.file_sha256


class Description(msgspec.Struct, kw_only=True):
    """The JSON beside a token file."""

    format: int = FORMAT
    tokenizer: str
    vocab_size: int
    end_of_text: int
    dtype: str
    tokens: int
    documents: int
    bytes: int
    max_data: int | None = None
    sources: list[Source]

    @property
    def settings(self) -> Settings:
        return Settings(format=self.format, tokenizer=self.tokenizer, max_data=self.max_data)


def description_path(file: Path) -> Path:
    return file.with_name(file.name + ".json")


def read_description(file: Path) -> Description | None:
    """Return what the JSON beside a token file says, None where the two are not there or do not belong together."""
    try:
        description = msgspec.json.decode(description_path(file).read_bytes(), type=Description)
        size = file.stat().st_size
    except (FileNotFoundError, msgspec.DecodeError):
        return None
    return description if size == description.tokens * np.dtype(description.dtype).itemsize else None


def write_whole(path: Path, content: bytes) -> None:
    """Write a small file that appears whole or not at all, and is on the disk when this returns."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
