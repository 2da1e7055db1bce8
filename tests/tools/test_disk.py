"""Files and locks: whole or absent, one holder at a time, and a lock on a file that was removed keeps no one out."""

import errno
import os
from pathlib import Path

import pytest

from tools import disk
from tools.disk import append_file, checksum, lock, write_all, write_whole


def test_a_file_is_whole_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_whole(path, b"first")
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match="full"):
        write_whole(path, b"second")
    assert path.read_bytes() == b"first"
    write_whole(path, b"second", synced=False)
    assert path.read_bytes() == b"second"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("held", "wanted", "had"),
    [(False, False, False), (False, True, False), (True, False, False), (True, True, True)],
)
def test_a_lock_has_one_holder_or_sharers(tmp_path: Path, held: bool, wanted: bool, had: bool) -> None:
    path = tmp_path / "folder" / "lock"
    with lock(path, shared=held) as first:
        assert first
        with lock(path, shared=wanted) as second:
            assert second is had
    with lock(path) as third:
        assert third


def test_a_lock_on_a_file_that_was_removed_is_taken_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, original = tmp_path / "lock", disk.try_lock
    removed = iter([True])

    def try_lock(file, *, shared: bool) -> bool:
        if next(removed, False):
            path.unlink()
        return original(file, shared=shared)

    monkeypatch.setattr(disk, "try_lock", try_lock)
    with lock(path) as mine:
        assert mine and path.exists()
        with lock(path) as others:
            assert not others


class Reluctant:
    """A file that takes a few bytes at a time."""

    def __init__(self) -> None:
        self.content = b""

    def write(self, content: memoryview) -> int:
        self.content += content[:3]
        return len(content[:3])


def test_everything_is_written() -> None:
    file = Reluctant()
    write_all(file, b"twelve bytes")
    assert file.content == b"twelve bytes"


@pytest.mark.parametrize("number", [None, *disk.NO_COPY_FILE_RANGE])
def test_appending_where_the_system_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int | None) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_bytes(bytes(range(256)) * 100)
    target.write_bytes(b"before")

    def copy_file_range(*arguments: int) -> int:
        raise OSError(number, "not here")

    if number:
        monkeypatch.setattr(os, "copy_file_range", copy_file_range, raising=False)
    monkeypatch.setattr(disk, "COPY_BYTES", 1000)
    with open(target, "r+b", buffering=0) as file:
        file.seek(6)
        append_file(source, 25_000, file)
    assert target.read_bytes() == b"before" + source.read_bytes()[:25_000]
    assert checksum(source) != checksum(target)


def test_a_full_disk_is_not_taken_for_an_old_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def copy_file_range(*arguments: int) -> int:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "copy_file_range", copy_file_range, raising=False)
    (tmp_path / "a").write_bytes(b"content")
    with open(tmp_path / "b", "wb", buffering=0) as file, pytest.raises(OSError, match="full"):
        append_file(tmp_path / "a", 7, file)
