"""Preparing goes on where it was: killed at any point, without its helpers, on a full disk, with damaged parts."""

import errno
import itertools
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.tools.conftest import TEXTS, command, ids, run_flags, texts, tokens, write_shard
from tools import prepare
from tools.preparing import workspace
from tools.preparing.token_file import PrepareError, description_path, read_description
from tools.preparing.workspace import Settings, Workspace

TOUCHES_THE_DISK = (
    (os, "replace"),
    (os, "fsync"),
    (os, "open"),
    (Path, "unlink"),
    (workspace, "write_all"),
    (workspace, "append_file"),
    (shutil, "rmtree"),
)


def run_and_die(run: Callable[[], object], point: int, counted: Path | None = None) -> bool:
    """Run in a process that kills itself before it touches the disk for the `point`-th time; return whether it did.

    counted: where to write how often it touched the disk.
    """
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    touched = itertools.count()
    try:
        for place, name in TOUCHES_THE_DISK:

            def touch(*arguments, original=getattr(place, name), **options):
                if next(touched) == point:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*arguments, **options)

            setattr(place, name, touch)
        run()
        if counted:
            counted.write_text(str(next(touched)))
    finally:
        os._exit(0)


@pytest.mark.parametrize("step", [60, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_any_point_it_goes_on_from_there(inputs, expected, small_segments, tmp_path: Path, step: int) -> None:
    reference = tmp_path / "reference" / "out.bin"
    reference.parent.mkdir()
    run_and_die(lambda: prepare.prepare(inputs, reference, workers=2), -1, tmp_path / "count")
    points = int((tmp_path / "count").read_text())
    folder = tmp_path / "out"
    out = folder / "out.bin"

    def run() -> None:
        prepare.prepare(inputs, out, workers=2, overwrite=bool(point % 2))

    for point in [*range(0, points - 12, step), *range(points - 12, points)]:  # at the end the names are given
        folder.mkdir()
        if point % 2:  # over a file of something else, of the same size
            np.fromfile(reference, "<u2")[::-1].tofile(out)
            description_path(out).write_bytes(description_path(reference).read_bytes().replace(b'"00.', b'"99.'))
        run_and_die(run, point)
        run_and_die(run, point // 3)  # killed a second time, earlier
        if (description := read_description(out)) and description.sources[0].file == "00.jsonl.zst":
            assert tokens(out) == expected
        run()
        assert tokens(out) == expected
        assert description_path(out).read_bytes() == description_path(reference).read_bytes()
        assert len(list(folder.iterdir())) == 2
        shutil.rmtree(folder)


def test_what_a_killed_run_left_does_not_outlast_other_settings(inputs, small_segments, tmp_path: Path) -> None:
    out = tmp_path / "out.bin"
    run_and_die(lambda: prepare.prepare(inputs, out, workers=1), 150)
    assert (tmp_path / "out.bin.parts" / "merged").stat().st_size > 1000
    prepare.prepare(inputs[:1], out, max_data=2)
    assert tokens(out) == ids(texts(60, 0)[:2])


def children(pid: int) -> set[int]:
    """The processes that a process has started, from the system's list."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.add(int(entry.parent.name))
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_a_killed_run_with_helpers_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    documents = [texts(150, seed) for seed in range(4)]
    for i, content in enumerate(documents):
        write_shard(tmp_path / "train" / f"{i}.jsonl.zst", content)
    write_shard(tmp_path / "val" / "val.jsonl.zst", TEXTS)
    run = command(*run_flags(tmp_path), "--workers", 8)
    process = subprocess.Popen(run, stdout=subprocess.DEVNULL)
    helpers: set[int] = set()
    while not (helpers and list(tmp_path.glob("train.bin.parts/*.tokens"))):
        assert process.poll() is None
        helpers |= children(process.pid)
        time.sleep(0.001)
    process.kill()
    process.wait()
    finished = subprocess.run(run, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert tokens(tmp_path / "train.bin") == ids([text for content in documents for text in content])
    assert tokens(tmp_path / "val.bin") == ids(TEXTS)
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{pid}").exists() for pid in helpers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in helpers)


def test_ctrl_c_says_one_line(tmp_path: Path) -> None:
    for folder, count in (("train", 3000), ("val", 3)):
        write_shard(tmp_path / folder / "00.jsonl.zst", texts(count))
    run = command(*run_flags(tmp_path), "--workers", 2)
    with subprocess.Popen(run, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while not list(tmp_path.glob("train.bin.parts/*.tokens")):
            assert process.poll() is None
            time.sleep(0.001)
        process.send_signal(signal.SIGINT)
        assert (process.wait(30), process.stderr.read()) == (130, "interrupted; the same command goes on\n")


@pytest.mark.parametrize("megabytes", [0.02, 0.15, 0.35])
def test_a_full_disk_keeps_what_is_done(inputs, expected, small_segments, tmp_path: Path, megabytes: float) -> None:
    out = tmp_path / "out.bin"
    child = os.fork()
    if child == 0:
        # A limit on the size of a file is met in write() as a full disk is, with another number.
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(megabytes * 1e6),) * 2)
        try:
            prepare.prepare(inputs, out, workers=2)
        except PrepareError as error:
            os._exit(28 if "no room left" in str(error) and "run the same command again" in str(error) else 1)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 28
    assert not out.exists()
    folder = tmp_path / "out.bin.parts"
    kept = Workspace(out, inputs, Settings(tokenizer="r50k_base", chunk_bytes=8000, segment_chunks=3), np.dtype("<u2"))
    done = sum(kept.made(source).tokens for source in inputs)
    assert done > 1000 or megabytes == 0.02
    assert not list(folder.glob("*.part"))
    prepare.prepare(inputs, out, workers=2)
    assert tokens(out) == expected


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_is_full_when_merging(inputs, expected, small_segments, tmp_path, monkeypatch, number) -> None:
    out = tmp_path / "out.bin"
    original, left = os.copy_file_range, iter(range(6))

    def copy_file_range(*arguments: int) -> int:
        if next(left, None) is None:
            raise OSError(number, os.strerror(number))
        return original(*arguments)

    monkeypatch.setattr(os, "copy_file_range", copy_file_range)
    with pytest.raises(PrepareError, match="no room left for .*out.bin"):
        prepare.prepare(inputs, out, workers=1)
    monkeypatch.setattr(os, "copy_file_range", original)
    prepare.prepare(inputs, out, workers=1)
    assert tokens(out) == expected


def test_a_damaged_segment_is_made_again(inputs, expected, small_segments, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out.bin"
    prepare.prepare(inputs, out, shard=(1, 1))
    path = sorted((tmp_path / "out.bin.parts").glob("01*.tokens"))[1]
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(PrepareError, match="1 of 3 inputs are not done: 01.jsonl.zst"):
        prepare.prepare(inputs, out, merge=True)
    assert "01.jsonl.zst: damaged" in capsys.readouterr().out
    prepare.prepare(inputs, out)
    assert tokens(out) == expected
