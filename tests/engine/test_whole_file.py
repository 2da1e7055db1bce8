"""A file is whole or as it was, whatever happens while it is written."""

import errno
import os
from pathlib import Path

import pytest

from engine.whole_file import whole_file


def test_what_was_there_stays_where_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with whole_file(path) as partial:
        partial.write_text("first")
        assert not path.exists()
    with pytest.raises(OSError, match="full"), whole_file(path) as partial:
        partial.write_text("half")
        raise OSError(errno.ENOSPC, "full")
    assert path.read_text() == "first"
    with whole_file(path) as partial:
        partial.write_text("second")
    assert path.read_text() == "second"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("synced", [True, False])
def test_the_content_is_on_the_disk_before_the_name(tmp_path: Path, monkeypatch, synced: bool) -> None:
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (done.append(os.fstat(file).st_size), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda *names: (done.append("name"), replace(*names)))
    with whole_file(tmp_path / "a", synced=synced) as partial:
        partial.write_bytes(b"seven b")
    assert done == ([7, "name"] if synced else ["name"])
