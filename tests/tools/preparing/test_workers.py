"""Processes that help to prepare: how many, what each does, and what becomes of the work of one that dies."""

import os
from pathlib import Path

import pytest

from tests.tools.conftest import ids, texts, tokens, write_shard
from tools import prepare
from tools.preparing import workers


def test_helpers_share_one_shard(small_segments: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "THREADS", 1)
    started, original = [], workers._start
    monkeypatch.setattr(workers, "_start", lambda job: (started.append(job), original(job))[1])
    documents = texts(300)
    out = tmp_path / "out.bin"
    prepare.prepare([write_shard(tmp_path / "a.jsonl.zst", documents)], out, workers=3)
    assert len(started) == 2
    assert tokens(out) == ids(documents)


def test_a_helper_that_dies_leaves_its_work_to_others(tmp_path: Path, small_segments: None, monkeypatch) -> None:
    documents = texts(300)
    started = workers._start

    def start_and_kill(job):
        process = started(job)
        process.kill()
        return process

    monkeypatch.setattr(workers, "_start", start_and_kill)
    out = tmp_path / "out.bin"
    prepare.prepare([write_shard(tmp_path / "a.jsonl.zst", documents)], out, workers=8)
    assert tokens(out) == ids(documents)


@pytest.mark.parametrize(
    ("count", "gigabytes", "expected_"),
    [(1, 9, [1]), (4, 9, [4]), (5, 9, [3, 2]), (15, 9, [4, 4, 4, 3]), (15, 0.2, [5, 5, 5]), (15, 0.001, [15])],
)
def test_processes_have_a_few_threads_each(count: int, gigabytes: float, expected_: list[int]) -> None:
    assert workers.shares(count, int(gigabytes * 2**30)) == expected_


def test_cores_of_a_control_group(monkeypatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    for content, cores in (("max 100000", 16), ("250000 100000", 2), ("50000 100000", 1), ("3200000 100000", 16)):
        monkeypatch.setattr(Path, "read_text", lambda path, content=content: content)
        assert workers.available_cores() == cores
