"""The uncompressed bytes of a shard, up to the first damaged or missing one."""

import gzip
import hashlib
import zlib
from pathlib import Path
from typing import BinaryIO

import zstandard

READ_BYTES = 1 << 20
CAREFUL_BYTES = 1 << 10
MAX_WINDOW_BYTES = 512 << 20  # of memory that a frame may ask for; `zstd --long=29`
ZSTD_MAGIC = 0xFD2FB528
SKIPPABLE_MAGIC = 0x184D2A50  # and the 15 that follow


class ShardStream:
    """Reads a `.zst`, `.gz` or plain file; any number of frames or members follow one another.

    At the end `fault` is None, or (kind of chunks.LOSSES, what the library said) where the file is cut off or
    damaged, and `sha256` is that of the file, None where there is a fault.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._suffix = path.suffix.lower()
        self.fault: tuple[str, str] | None = None
        self.sha256: str | None = None
        self._open()

    def _open(self) -> None:
        self._source = _Source(open(self.path, "rb"))
        self._position = 0
        self._careful = False
        if self._suffix == ".zst":
            decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
            self._reader = decompressor.stream_reader(self._source, read_size=READ_BYTES, read_across_frames=True)
        elif self._suffix == ".gz":
            self._reader = gzip.GzipFile(fileobj=self._source)
        else:
            self._reader = self._source

    @property
    def consumed(self) -> int:
        """Bytes of the file as it is on disk that have been read."""
        return self._source.consumed

    def readinto(self, view: memoryview) -> int:
        """Fill the front of `view`; return the number of bytes, 0 at the end. OSError where the disk fails."""
        if self.fault:
            return 0
        try:
            count = self._reader.readinto(view[:CAREFUL_BYTES] if self._careful else view)
        except (zstandard.ZstdError, zlib.error, EOFError, gzip.BadGzipFile) as error:
            if self._careful:
                kind = "truncated_file" if isinstance(error, EOFError) else "corrupt_file"
                self.fault = kind, str(error)
                return 0
            # The call that failed had decompressed more than it returned: go there again, in small steps.
            position = self._position
            self.close()
            self._open()
            self.skip(position)
            self._careful = True
            return self.readinto(view)
        self._position += count
        if count == 0 and len(view):
            if self._suffix == ".zst" and not self._source.complete:
                self.fault = "truncated_file", "the last zstd frame is not complete"
            else:
                self.sha256 = self._source.hash.hexdigest()
        return count

    def skip(self, size: int) -> None:
        """Pass over `size` uncompressed bytes, or to the end where there are fewer."""
        waste = memoryview(bytearray(min(size, READ_BYTES)))
        while size and (count := self.readinto(waste[: min(size, len(waste))])):
            size -= count

    def close(self) -> None:
        self._source.file.close()

    def __enter__(self) -> "ShardStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Source:
    """A file that hashes what is read and follows zstd's frames, since the library does not tell when one is cut off.

    The format is RFC 8878: a frame is a header, blocks with three bytes of header each, and maybe a checksum.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.hash = hashlib.sha256()
        self.consumed = 0
        self._skip = 0  # bytes to pass before the next header
        self._header = bytearray()  # as much of it as has been read
        self._in_frame = False
        self._checksum = 0
        self._frames = 0
        self._foreign = False  # not zstd

    @property
    def complete(self) -> bool:
        """Whether what was read ends where a frame ends."""
        return self._frames > 0 and not (self._skip or self._header or self._in_frame)

    def read(self, size: int = -1) -> bytes:
        data = self.file.read(size)
        self._note(data)
        return data

    def readinto(self, view: memoryview) -> int:
        count = self.file.readinto(view)
        self._note(view[:count])
        return count

    def _note(self, data: bytes | memoryview) -> None:
        self.hash.update(data)
        self.consumed += len(data)
        at = 0
        while at < len(data) and not self._foreign:
            if self._skip:
                step = min(self._skip, len(data) - at)
                self._skip -= step
            else:
                step = min(self._missing(), len(data) - at)
                self._header += data[at : at + step]
                if not self._missing():
                    self._block() if self._in_frame else self._frame()
            at += step

    def _missing(self) -> int:
        """Bytes that the header read now still lacks."""
        if self._in_frame:
            size = 3
        elif len(self._header) < 5:
            size = 5
        elif self._magic() == ZSTD_MAGIC:
            descriptor = self._header[4]
            single_segment = descriptor >> 5 & 1
            content_size = (single_segment, 2, 4, 8)[descriptor >> 6]
            size = 5 + (not single_segment) + (0, 1, 2, 4)[descriptor & 3] + content_size
        else:
            size = 8
        return size - len(self._header)

    def _magic(self) -> int:
        return int.from_bytes(self._header[:4], "little")

    def _frame(self) -> None:
        if self._magic() == ZSTD_MAGIC:
            self._in_frame = True
            self._checksum = 4 if self._header[4] >> 2 & 1 else 0
        elif self._magic() & ~0xF == SKIPPABLE_MAGIC:
            self._skip = int.from_bytes(self._header[4:8], "little")
            self._frames += 1
        else:
            self._foreign = True
        self._header.clear()

    def _block(self) -> None:
        header = int.from_bytes(self._header, "little")
        last, kind, size = header & 1, header >> 1 & 3, header >> 3
        self._skip = 1 if kind == 1 else size
        if last:
            self._skip += self._checksum
            self._in_frame = False
            self._frames += 1
        self._header.clear()
