"""The suite does its parts in order, keeps what is there, survives what hangs or fails, and stops when time is up."""

import json
import os
import subprocess
import sys
import time

import pytest

from benchmarks import environment as where
from benchmarks import suite
from benchmarks.suite import Part


@pytest.fixture(autouse=True)
def logs(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "LOGS", tmp_path / "logs")


@pytest.fixture
def writes():
    """Arguments of a Python that writes a result of this commit."""
    result = {"environment": {"commit": where.environment()["commit"], "gpu": None}}
    return f'-c "import json, sys; json.dump({result}, open(sys.argv[1], chr(119)))" {{file}}'


def statuses(folder, name="all"):
    return {row["name"]: row["status"] for row in json.loads((folder / f"{name}.json").read_text())["parts"]}


def test_what_is_there_is_kept_unless_asked_again(tmp_path, writes, validate):
    parts = [Part("one", writes, 60), Part("two", writes, 60)]
    assert suite.suite(parts[:1], tmp_path, "all", again=False, seconds=60) == 0
    assert suite.suite(parts, tmp_path, "all", again=False, seconds=60) == 0
    assert statuses(tmp_path) == {"one": "kept", "two": "done"}
    validate(json.loads((tmp_path / "all.json").read_text()), "suite")
    suite.suite(parts, tmp_path, "all", again=True, seconds=60)
    assert statuses(tmp_path) == {"one": "done", "two": "done"}


def test_a_part_that_fails_leaves_the_older_result(tmp_path, writes):
    suite.suite([Part("one", writes, 60)], tmp_path, "all", again=False, seconds=60)
    suite.suite([Part("one", "-c 1/0", 60)], tmp_path, "all", again=True, seconds=60)
    assert statuses(tmp_path) == {"one": "failed"} and (tmp_path / "one.json").exists()


def test_a_result_of_another_commit_or_device_does_not_count(tmp_path):
    part, here = Part("one", "", 1), {"commit": "a" * 40, "gpu": None}
    for environment, done in (
        (here, True),
        (here | {"commit": "b" * 40}, False),
        (here | {"gpu": {"name": "H100"}}, False),
    ):
        (tmp_path / "one.json").write_text(json.dumps({"environment": environment}))
        assert suite.is_done(part, tmp_path, here) is done


def test_a_part_that_hangs_or_fails_does_not_stop_the_others(tmp_path, writes):
    child = "-c \"import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])\""
    parts = [
        Part("hangs", child, 1),
        Part("fails", "-c \"raise SystemExit('no such card')\"", 60),
        Part("works", writes, 60),
    ]
    parts.append(Part("late", writes.replace('" {file}', '; import time; time.sleep(60)" {file}'), 10))
    began = time.perf_counter()
    assert suite.suite(parts, tmp_path, "all", again=False, seconds=120) == 1
    assert time.perf_counter() - began < 50
    assert statuses(tmp_path) == {"hangs": "out of time", "fails": "failed", "works": "done", "late": "out of time"}
    assert (tmp_path / "late.json").exists() and "what it had by then is kept" in (tmp_path / "all.json").read_text()
    assert "no such card" in (tmp_path / "all.json").read_text()


def test_nothing_starts_when_the_time_is_up(tmp_path, writes):
    assert suite.suite([Part("late", writes, 60)], tmp_path, "all", again=False, seconds=suite.LEAST_S - 1) == 0
    assert statuses(tmp_path) == {"late": "not run"}


def test_parts_are_all_there_and_the_most_valuable_first():
    names = [part.name for part in suite.parts("h100", small=False)]
    assert len(set(names)) == len(names)
    assert names[:3] == ["correctness-h100", "kernels-attention-h100", "throughput-gpt2-h100"]
    for preset in ("gpt2", "gpt2-xl", "2b"):
        for label in ("", "-10gb", "-11gb", "-16gb", "-24gb", "-40gb", "-48gb"):
            assert f"throughput-{preset}-h100{label}" in names
    assert [part.name for part in suite.parts("h100", small=True)] == names


def test_correctness_counts_tests(tmp_path, validate):
    (tmp_path / "test_it.py").write_text(
        "import pytest\ndef test_good(): pass\ndef test_bad(): assert 0\n@pytest.mark.skip\ndef test_skipped(): pass\n"
    )
    file = tmp_path / "out.json"
    assert suite.correctness(["-p", "no:cacheprovider", str(tmp_path / "test_it.py")], file) == 1
    payload = json.loads(file.read_text())
    validate(payload, "correctness")
    assert (payload["passed"], payload["failed"], payload["skipped"]) == (1, 1, 1)
    assert payload["failures"][0].endswith("test_bad")


def test_without_a_gpu_it_says_what_to_do(capsys):
    assert suite.main([]) == 2
    assert "--cpu rehearses" in capsys.readouterr().err


@pytest.mark.slow
def test_the_rehearsal_runs_every_part(tmp_path, validate):
    command = [sys.executable, "benchmarks/suite.py", "--cpu", "--minutes", "30", "--out", str(tmp_path)]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {
        "OMP_NUM_THREADS": "1"
    }
    subprocess.run(command, cwd=suite.ROOT, check=True, env=environment)
    assert set(statuses(tmp_path, "suite-cpu").values()) == {"done"}
    for file in tmp_path.glob("*.json"):
        payload = json.loads(file.read_text())
        validate(payload, payload["benchmark"])
