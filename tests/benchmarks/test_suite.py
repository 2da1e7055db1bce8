"""The suite does its parts in order, keeps what is there, survives what hangs or fails, and stops when time is up."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest

from benchmarks import environment as where
from benchmarks import suite
from benchmarks.suite import Part
from engine import cards

HERE = {"commit": "a" * 40, "gpu": None, "changed": False}


@pytest.fixture(autouse=True)
def logs(tmp_path, monkeypatch):
    """Logs of their own, in a tree as committed."""
    monkeypatch.setattr(suite, "LOGS", tmp_path / "logs")
    monkeypatch.setattr(suite, "environment", lambda device: where.environment() | HERE)


@pytest.fixture
def writes():
    """Arguments of a Python that writes a result of this commit."""
    result = {"environment": HERE}
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


@pytest.mark.parametrize("left", ["", '{"environment": '])
def test_what_cannot_be_read_is_no_result_and_stops_nothing(tmp_path, writes, left):
    """As pytest-benchmark leaves an empty file where it measures nothing."""
    spoils = shlex.join(["-c", f"import sys; open(sys.argv[1], 'w').write({left!r})"]) + " {file}"
    for name in ("one", "of another"):
        (tmp_path / f"{name}.json").write_text(left)
    parts = [Part("one", spoils, 60), Part("two", writes, 60)]
    assert suite.suite(parts, tmp_path, "all", again=False, seconds=60) == 1
    assert statuses(tmp_path) == {"one": "failed", "two": "done"}
    assert suite.suite([Part("one", writes, 60)], tmp_path, "all", again=False, seconds=60) == 0
    suite.suite(parts, tmp_path, "all", again=True, seconds=60)
    assert statuses(tmp_path)["one"] == "failed" and suite.read(tmp_path / "one.json")


def test_a_part_that_is_cut_off_replaces_no_result_that_holds_more(tmp_path):
    """Unless what is there is of another commit or device."""

    def part(count, then):
        made = {
            "benchmark": "tune",
            "searches": [{}] * count,
            "environment": HERE,
        }
        program = f"import json, sys, time; json.dump({made}, open(sys.argv[1], 'w')); {then}"
        return Part("one", shlex.join(["-c", program]) + " {file}", 5)

    def searches_after(*parts):
        for each in parts:
            suite.suite([each], tmp_path, "all", again=True, seconds=60)
        return len(suite.read(tmp_path / "one.json")["searches"])

    assert searches_after(part(1, "sys.exit(1)"), part(3, "sys.exit(1)")) == 3
    assert searches_after(part(4, ""), part(2, "time.sleep(60)")) == 4
    assert statuses(tmp_path) == {"one": "out of time"}
    assert searches_after(part(2, "")) == 2
    older = suite.read(tmp_path / "one.json") | {"searches": [{}] * 9}
    older["environment"]["commit"] = "b" * 40
    (tmp_path / "one.json").write_text(json.dumps(older))
    assert searches_after(part(1, "sys.exit(1)")) == 1
    assert not list(tmp_path.glob("*.partial"))


def test_tests_that_fail_are_a_result(tmp_path, monkeypatch):
    """The suite's exit code says so, each time; it is not made again unless asked for."""
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "none"))  # so that the part too is of HERE
    monkeypatch.setenv("PILESMITH_COMMIT", HERE["commit"])
    (tmp_path / "test_it.py").write_text("def test_good(): pass\ndef test_bad(): assert 0\n")
    part = Part("tests", f"-m benchmarks.suite --correctness {{file}} -- -pno:cacheprovider {tmp_path}/test_it.py", 60)
    for _ in range(2):
        assert suite.suite([part], tmp_path, "all", again=False, seconds=60) == 1
        row = json.loads((tmp_path / "all.json").read_text())["parts"][0]
        assert (row["status"], row["message"]) == ("tests failed", "1 of 2")
        (tmp_path / "test_it.py").unlink(missing_ok=True)
    payload = suite.read(tmp_path / "tests.json")
    assert (payload["passed"], payload["failed"]) == (1, 1)
    (tmp_path / "tests.json").write_text(json.dumps(payload | {"unfinished": ["test_other.py"]}))
    assert not suite.is_done(part, tmp_path, HERE)


def test_a_part_that_fails_leaves_the_older_result(tmp_path, writes):
    suite.suite([Part("one", writes, 60)], tmp_path, "all", again=False, seconds=60)
    suite.suite([Part("one", "-c 1/0", 60)], tmp_path, "all", again=True, seconds=60)
    assert statuses(tmp_path) == {"one": "failed"} and (tmp_path / "one.json").exists()


@pytest.mark.parametrize(
    "other, done",
    [({}, True), ({"commit": "b" * 40}, False), ({"gpu": {"name": "H100"}}, False), ({"changed": True}, False)],
)
def test_a_result_of_other_code_or_of_another_device_does_not_count(other, done, tmp_path):
    """Nor does any where the code is other now than its commit."""
    (tmp_path / "one.json").write_text(json.dumps({"environment": HERE | other}))
    assert suite.is_done(Part("one", "", 1), tmp_path, HERE) is done
    assert not suite.is_done(Part("one", "", 1), tmp_path, HERE | {"changed": True})


def test_a_tree_without_git_goes_on_by_the_commit_that_it_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(where, "_git", lambda *command: None)
    monkeypatch.setenv("PILESMITH_COMMIT", HERE["commit"])
    here = where.environment()
    (tmp_path / "one.json").write_text(json.dumps({"environment": here}))
    assert here["commit"] == HERE["commit"] and suite.is_done(Part("one", "", 1), tmp_path, here)


def test_what_is_measured_and_rendered_is_no_change_of_the_code(tmp_path, monkeypatch):
    def git(*command):
        subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x", *command], cwd=tmp_path, check=True)

    files = ["kernels/a.py", "benchmarks/results/a.json", "benchmarks/charts/a.png", "README.md"]
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "all")
    monkeypatch.setattr(where, "__file__", str(tmp_path / "benchmarks/environment.py"))
    changed = []
    for file in files[::-1]:
        (tmp_path / file).write_text("x")
        changed.append(where.environment()["changed"])
    assert changed == [False, False, False, True]


def test_a_part_that_hangs_or_fails_does_not_stop_the_others(tmp_path, writes, monkeypatch):
    monkeypatch.setattr(suite, "GRACE_S", 0.5)
    child = "-c \"import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])\""
    deaf = '-c "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"'
    parts = [
        Part("hangs", child, 1),
        Part("deaf", deaf, 1),
        Part("fails", "-c \"raise SystemExit('no such card')\"", 60),
        Part("writes and fails", writes.replace('" {file}', '; sys.exit(1)" {file}'), 60),
        Part("works", writes, 60),
        Part("late", writes.replace('" {file}', '; import time; time.sleep(60)" {file}'), 5),
    ]
    began = time.perf_counter()
    assert suite.suite(parts, tmp_path, "all", again=False, seconds=120) == 1
    assert time.perf_counter() - began < 40
    wrong = {"hangs": "out of time", "deaf": "out of time", "fails": "failed", "writes and fails": "failed"}
    assert statuses(tmp_path) == wrong | {"works": "done", "late": "out of time"}
    assert (tmp_path / "late.json").exists() and "what it had by then is kept" in (tmp_path / "all.json").read_text()
    assert "no such card" in (tmp_path / "all.json").read_text()


@pytest.mark.parametrize("before", [signal.default_int_handler, signal.SIG_IGN], ids=["asked for", "in the background"])
def test_what_is_out_of_time_is_interrupted_and_can_write_what_it_has(tmp_path, before):
    program = "import sys, time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: open(sys.argv[1], 'w').write('{}')"
    script = tmp_path / "program.py"
    script.write_text(program)
    handler = signal.signal(signal.SIGINT, before)
    try:
        assert suite.suite([Part("one", f"-S {script} {{file}}", 4)], tmp_path, "all", again=False, seconds=60) == 1
    finally:
        signal.signal(signal.SIGINT, handler)
    assert statuses(tmp_path) == {"one": "out of time"} and (tmp_path / "one.json").read_text() == "{}"


def test_what_went_wrong_is_tried_again_last(tmp_path, writes):
    """Its file may be there, but hold half of a result."""
    one, two = Part("one", writes, 60), Part("two", writes, 60)
    failing = Part("one", writes.replace('" {file}', '; sys.exit(1)" {file}'), 60)
    suite.suite([failing], tmp_path, "all", again=False, seconds=60)
    assert statuses(tmp_path) == {"one": "failed"} and (tmp_path / "one.json").exists()
    suite.suite([one, two], tmp_path, "all", again=False, seconds=suite.LEAST_S - 1)
    assert statuses(tmp_path) == {"one": "failed", "two": "not run"}
    suite.suite([one, two], tmp_path, "all", again=False, seconds=60)
    rows = json.loads((tmp_path / "all.json").read_text())["parts"]
    assert statuses(tmp_path) == {"one": "done", "two": "done"}
    assert {row["name"]: row["message"] for row in rows} == {"one": "", "two": ""}


def test_a_suite_that_is_stopped_takes_its_part_along_and_goes_on(tmp_path):
    """Stopped in the middle of a part: nothing of it runs on, and the next suite begins it anew."""
    mark = tmp_path / "alive"
    sleeper = tmp_path / "sleeper.py"
    sleeper.write_text(f"import pathlib, time\nwhile True: pathlib.Path({str(mark)!r}).touch(); time.sleep(0.05)")
    program = (
        "import pathlib, signal, sys\nfrom benchmarks import suite\n"
        f"suite.LOGS = pathlib.Path({str(tmp_path / 'logs')!r})\n"
        "part = suite.Part('one', sys.argv.pop(), 60)\nsuite.parts = lambda *_: [part]\nsys.exit(suite.main())"
    )
    command = [sys.executable, "-c", program, "--cpu", "--out", str(tmp_path), str(sleeper)]
    process = subprocess.Popen(command, cwd=suite.ROOT, stdout=subprocess.DEVNULL)
    deadline = time.perf_counter() + 60
    while not mark.exists() and time.perf_counter() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 128 + signal.SIGTERM
    mark.unlink()
    time.sleep(0.3)
    assert not mark.exists()
    assert statuses(tmp_path, "suite-cpu") == {"one": "running"} and "running" in suite.WRONG


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


def test_every_card_of_the_classic_table_is_done_for_2b():
    commands = {part.name: part.arguments for part in suite.parts("h100", small=False)}
    assert {cards.get(name) for name in suite.CARDS} == set(cards.CLASSIC)
    for name, memory in suite.CARDS.items():
        assert cards.get(name).label_gb == memory
        command = commands[f"throughput-2b-h100-{memory}gb-{suite.slug(name)}"]
        assert f"--card '{name}'" in command and "--steps 20" in command


def test_only_files_with_tests_for_a_gpu_are_read():
    files = suite.gpu_tests()
    assert "tests/kernels/test_gpu_attention.py" in files and "tests/benchmarks/test_render.py" not in files


def test_correctness_counts_tests(tmp_path, validate):
    (tmp_path / "test_it.py").write_text(
        "import pytest\ndef test_good(): pass\ndef test_bad(): assert 0, 'seven\\nof nine'\n"
        "@pytest.mark.skip\ndef test_skipped(): pass\n"
    )
    (tmp_path / "test_crash.py").write_text("import os\ndef test_crash(): os._exit(1)\n")
    file = tmp_path / "out.json"
    tests = [str(tmp_path / name) for name in ("test_it.py", "test_crash.py")]
    assert suite.correctness(["-p", "no:cacheprovider", *tests], file) == 0
    payload = json.loads(file.read_text())
    validate(payload, "correctness")
    assert (payload["passed"], payload["failed"], payload["skipped"], payload["unfinished"]) == (1, 2, 1, [])
    told = {failure["test"].rpartition("::")[2]: failure["message"] for failure in payload["failures"]}
    assert told == {
        "test_bad": "AssertionError: seven\n  of nine\nassert 0",
        tests[1]: "its process ended without a report",
    }


def test_tests_that_are_interrupted_are_counted_up_to_then(tmp_path, validate):
    """Its processes are interrupted too; what they were about is not finished, and neither is what waits."""
    for name in ("test_it.py", "test_later.py"):
        (tmp_path / name).write_text(
            "import pathlib, time\ndef test_good(): pass\n"
            f"def test_slow(): pathlib.Path({str(tmp_path / 'begun')!r}).touch(); time.sleep(60)\n"
        )
    file, tests = tmp_path / "out.json", [str(tmp_path / name) for name in ("test_it.py", "test_later.py")]
    program = (
        "import sys\nfrom benchmarks import suite\nsuite.TEST_PROCESSES = 1\n"
        f"sys.exit(suite.correctness({['-pno:cacheprovider', *tests]}, suite.Path({str(file)!r})))"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=suite.ROOT, start_new_session=True)
    deadline = time.perf_counter() + 60
    while not (tmp_path / "begun").exists() and time.perf_counter() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 1
    payload = json.loads(file.read_text())
    validate(payload, "correctness")
    assert (payload["passed"], payload["failed"], payload["unfinished"]) == (1, 0, tests)


def test_long_files_are_begun_first_and_shared_out_evenly():
    files = suite.gpu_tests()
    assert set(suite.LONG) <= set(files)
    made = suite.shares(files)
    assert [share[0] for share in made[:5]] == 4 * ["tests/kernels/test_gpu_attention.py"] + [
        "tests/kernels/test_gpu_memory_access.py"
    ]
    assert {share[0] for share in made} == set(files) and suite.shares(["tests/a.py"]) == [["tests/a.py"]]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "gpu", made[0][0]]
    names = subprocess.run(command, cwd=suite.ROOT, capture_output=True, text=True).stdout.split()
    for dtype in ("bfloat16", "torch.float16"):
        for documents in ("plain", "documents"):
            assert sum(dtype in name and documents in name for name in names) == 10


def test_a_smaller_card_has_room_for_fewer_processes():
    for gib, cores, count in ((80, 16, 6), (80, 4, 2), (24, 16, 2), (8, 16, 1)):
        assert suite.processes_at_once({"gpu": {"memory_bytes": gib << 30}, "cores": cores}) == count


def test_without_a_gpu_it_says_what_to_do(capsys):
    assert suite.main([]) == 2
    assert "--cpu rehearses" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, said",
    [
        (
            ["--cpu", "--only", "2b,tokenizer"],
            "--only tokenizer: no part has it in its name; they are correctness-cpu, ",
        ),
        (["--cpu", "gpt2"], "'gpt2' belongs to no flag"),
    ],
)
def test_mistakes_are_said(flags, said, capsys):
    with pytest.raises(SystemExit) as ended:
        suite.main(flags)
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_a_reader_of_the_list_may_have_enough():
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "benchmarks/suite.py", "--cpu", "--list"]
    ended = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, cwd=suite.ROOT)
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (0, b"")


@pytest.mark.slow
def test_the_rehearsal_runs_every_part(tmp_path, validate):
    command = [sys.executable, "benchmarks/suite.py", "--cpu", "--minutes", "30", "--out", str(tmp_path)]
    unwanted = ("TRITON_INTERPRET", "PYTEST_XDIST_WORKER")  # beside which pytest-benchmark would measure nothing
    environment = {key: value for key, value in os.environ.items() if key not in unwanted} | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=suite.ROOT, check=True, env=environment)
    assert set(statuses(tmp_path, "suite-cpu").values()) == {"done"}
    for file in tmp_path.glob("*.json"):
        payload = json.loads(file.read_text())
        validate(payload, payload["benchmark"])
