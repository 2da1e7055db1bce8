"""Shares of a token file: kept apart by locks, put together by merging, from one machine or several."""

import argparse
import errno
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.tools.conftest import tokens
from tools import prepare, progress
from tools.prepare import parse_shard
from tools.preparing.token_file import PrepareError, description_path
from tools.preparing.workspace import Settings, Workspace


def test_two_runs_on_one_output_refuse_each_other(inputs, expected, tmp_path: Path) -> None:
    out = tmp_path / "out.bin"
    workspace = Workspace(out, inputs, Settings(tokenizer="r50k_base"), np.dtype("<u2"))
    with workspace.locked(shared=False):
        for options in ({}, {"shard": (1, 3)}):
            with pytest.raises(PrepareError, match="another run is preparing .*out.bin"):
                prepare.prepare(inputs, out, **options)
    with workspace.locked(shared=True):  # shares go together with each other only
        prepare.prepare(inputs, out, shard=(1, 3))
        with pytest.raises(PrepareError, match="another run"):
            prepare.prepare(inputs, out)
    prepare.prepare(inputs, out)
    assert tokens(out) == expected


def test_the_same_share_twice_at_once_is_refused(inputs, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(prepare, "PATIENCE_S", 0.2)
    out = tmp_path / "out.bin"
    workspace = Workspace(out, inputs, Settings(tokenizer="r50k_base"), np.dtype("<u2"))
    with workspace.locked(shared=True):
        segment = workspace.take(inputs[0], 0)
        with pytest.raises(PrepareError, match="another run is preparing .*00.jsonl.zst"):
            prepare.prepare(inputs, out, shard=(1, 3))
        segment.abandon()
        prepare.prepare(inputs, out, shard=(1, 3))


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_shares_put_together_are_the_whole(inputs, expected, small_segments, tmp_path: Path, count: int) -> None:
    whole, out = tmp_path / "whole.bin", tmp_path / "out.bin"
    prepare.prepare(inputs, whole)
    for i in range(count, 0, -1):
        if i < count:
            missing = [path.name for path in inputs if (inputs.index(path) % count) < i]
            with pytest.raises(PrepareError, match=f"{len(missing)} of 3 inputs are not done: {', '.join(missing)}"):
                prepare.prepare(inputs, out, merge=True)
        prepare.prepare(inputs, out, shard=(i, count))
        assert not out.exists()
    prepare.prepare(inputs, out, merge=True)
    assert out.read_bytes() == whole.read_bytes()
    assert description_path(out).read_bytes() == description_path(whole).read_bytes()
    prepare.prepare(inputs, out, shard=(1, count))  # nothing to do


def test_shares_of_machines_with_their_own_copies(inputs, expected, small_segments, tmp_path: Path) -> None:
    machines = []
    for i in (1, 2):
        folder = tmp_path / f"machine{i}"
        copies = [Path(shutil.copy(path, folder)) for path in inputs if folder.mkdir(exist_ok=True) or True]
        for path in copies:
            os.utime(path, (i, i))  # each downloaded them at another time
        prepare.prepare(copies, folder / "out.bin", shard=(i, 2))
        machines.append((copies, folder / "out.bin"))
    (copies, out), (_, other) = machines
    for path in (other.parent / "out.bin.parts").iterdir():
        shutil.copy(path, out.parent / "out.bin.parts")
    prepare.prepare(copies, out, merge=True)
    assert tokens(out) == expected


def test_a_log_says_how_far_checking_and_merging_are(
    inputs, small_segments, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(progress, "LINE_S", 0)
    out = tmp_path / "out.bin"
    prepare.prepare(inputs[:2], out, shard=(1, 1))
    capsys.readouterr()
    prepare.prepare(inputs[:2], out, merge=True)
    said = capsys.readouterr().out
    for doing in ("checking", "merging"):
        shares = [
            int(share) for share in re.findall(rf"^out.bin, {doing}: (\d+)%, \S+B/s, \d\d:\d\d left$", said, re.M)
        ]
        assert len(shares) > 3 and shares == sorted(shares) and shares[-1] == 100, said
    prepare.prepare(inputs, out)
    assert "out.bin, copying: 100%" in capsys.readouterr().out


def test_what_is_merged_is_not_done_again(inputs, small_segments, tmp_path: Path) -> None:
    out = tmp_path / "out.bin"
    prepare.prepare(inputs, out, shard=(1, 1))
    settings = prepare.Settings(tokenizer="r50k_base")
    workspace = Workspace(out, inputs, settings, np.dtype("<u2"))
    before = [workspace.reach(source) for source in inputs]
    workspace.merge()
    assert not list((tmp_path / "out.bin.parts").glob("*.tokens"))
    assert all(place.ended for place in before) and [workspace.reach(source).ended for source in inputs] == [True] * 3
    assert workspace.place_after(inputs[1], 0).ended and workspace.take(inputs[1], 0) is None


def test_segments_that_are_merged_meanwhile_are_counted(inputs, small_segments, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "out.bin"
    prepare.prepare(inputs, out, shard=(1, 1))
    workspace = Workspace(out, inputs, prepare.Settings(tokenizer="r50k_base"), np.dtype("<u2"))
    original, whole = workspace.record, workspace.made(inputs[0])

    def record(source: Path, number: int):
        if number == 1:  # another thread merges everything between one record and the next
            monkeypatch.setattr(workspace, "record", original)
            workspace.merge()
        return original(source, number)

    monkeypatch.setattr(workspace, "record", record)
    assert whole.lines == 60 and workspace.made(inputs[0]) == whole


@pytest.mark.parametrize("number", [errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, None])
def test_a_system_that_copies_no_file_ranges(inputs, expected, small_segments, tmp_path, monkeypatch, number) -> None:
    def copy_file_range(*arguments: int) -> int:
        raise OSError(number, os.strerror(number))

    if number is None:
        monkeypatch.delattr(os, "copy_file_range")
    else:
        monkeypatch.setattr(os, "copy_file_range", copy_file_range)
    prepare.prepare(inputs, tmp_path / "out.bin")
    assert tokens(tmp_path / "out.bin") == expected


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "-1/2", "1/0", "²/3"])
def test_shares_are_numbered_from_one(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="as in 2/4"):
        parse_shard(text)
