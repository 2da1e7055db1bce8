"""Everything that needs a GPU in one command, ten minutes at a time, the most valuable first.

    python benchmarks/suite.py                # on a GPU: results into benchmarks/results/
    python benchmarks/suite.py --again        # measures anew what this commit has results of already
    python benchmarks/suite.py --cpu          # a rehearsal without a GPU: the same parts, small, into build/suite/

Each part is a process of its own with its own time limit and writes its result as soon as it has one; run again, the
suite goes on with the parts that have none for this commit and device, and tries those last that went wrong; in a tree
with changes that are not committed it does all again. What a part that goes wrong leaves never takes the place of more.
Tests that fail are a result: the suite's exit code says so. A card's
memory is imposed on a larger one, for `2b` its number format, kernels and plan as well, and the file says so. In a tree
without its .git, PILESMITH_COMMIT=... says which commit it is. Afterwards: `python benchmarks/render.py`.
"""

import argparse
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from benchmarks.environment import RESULTS, environment, write_result
from engine.command_line import CommandLine, ends_on_ctrl_c, let_go_of_output

ROOT = Path(__file__).parents[1]
LOGS = ROOT / "build" / "logs"
MEMORIES = (24, 16, 10, 11, 40, 48)  # GB
CARDS = {
    "rtx3080": 10, "v100": 16, "gtx1080ti": 11, "t4": 16, "p100": 16, "rtx3090": 24, "a100 40gb": 40,
    "quadro rtx 8000": 48, "rx6900xt": 16, "radeon vii": 16,
}  # fmt: skip
BATCH_TOKENS = {"gpt2": 131_072, "gpt2-xl": 65_536, "2b": 65_536}
PEERS = "pytorch,transformers-liger,transformers,pytorch-compiled"
TINY = "--n_layer 2 --n_embd 64 --n_head 2 --block_size 64 --vocab_size 512 --batch_tokens 512 --micro_batch_size 4"
LEAST_S = 30.0  # with less time than this left no part is started
GRACE_S = 15.0  # to write what there is, once a part is out of time
TESTS_GRACE_S = 10.0  # of it, for the processes that run tests
LONG = {  # files of tests that take a process minutes, most of it to compile, and how their tests are shared out
    "tests/kernels/test_gpu_attention.py": (
        "bfloat16 and documents", "bfloat16 and not documents", "not bfloat16 and documents",
        "not bfloat16 and not documents",
    ),
    "tests/kernels/test_gpu_memory_access.py": ("",),
    "tests/kernels/test_layer_norm.py": ("",),
    "tests/kernels/test_gpu_training.py": ("",),
}  # fmt: skip
TEST_PROCESSES = 6
TEST_BYTES = 12 << 30  # of the card, for each: some tests hold 20 GB for a moment, most 5 or less
MESSAGE_LINES = 5  # of a failure
TESTS_FAILED = "tests failed"
WRONG = ("failed", "out of time", "running")  # the last: the suite was stopped in the middle of it
AMOUNTS: dict[str, Callable[[dict[str, Any]], int]] = {  # how much of its part a result of each kind holds
    "correctness": lambda result: result["passed"] + result["failed"] + result["skipped"],
    "pytest-benchmark": lambda result: len(result["benchmarks"]),
    "scaling": lambda result: len(result["axes"]),
    "throughput": lambda result: sum(isinstance(row, dict) for row in result["results"].values()),
    "tune": lambda result: len(result["searches"]),
}
NEEDED = ("deepspeed", "liger_kernel", "matplotlib", "pynvml", "pytest", "pytest_benchmark", "transformers", "triton")


@dataclass(frozen=True)
class Part:
    """A result file's name, the arguments of the Python that makes it (`{file}` is its path), and its time limit."""

    name: str
    arguments: str
    limit_s: float

    def command(self, file: Path) -> list[str]:
        return [sys.executable, *(word.replace("{file}", str(file)) for word in shlex.split(self.arguments))]


def parts(device: str, small: bool) -> list[Part]:
    """Return the parts in the order of their worth. `device` ends every name; `small`: what a CPU does in seconds."""

    def throughput(
        preset: str,
        limit_s: float,
        *,
        memory: int = 0,
        card: str = "",
        compare: str = "",
        label: str = "",
        flags: str = "",
    ) -> Part:
        """At a limit of `memory` GB; or as `card`, over so many steps that the loss is seen to fall."""
        name = f"throughput-{preset}-{device}{label}"
        shape = TINY if small else f"--batch_tokens {BATCH_TOKENS[preset] // (4 if card else 1)} {flags}".rstrip()
        steps = "--steps 2 --warmup 1" if small else "--steps 20 --warmup 2" if card else "--steps 5 --warmup 2"
        words = f"benchmarks/throughput.py --preset {preset} {shape} {steps}"
        if card:
            name, words = f"{name}-{CARDS[card]}gb-{slug(card)}", f"{words} --card '{card}'"
        elif memory:
            name, words = f"{name}-{memory}gb", f"{words} --gpu_memory {memory}GB"
        if compare:
            words += f" --compare {'pytorch,transformers' if small else compare}"
        return Part(name, f"{words} --out {{file}}", limit_s)

    def kernels(name: str, tests: str, limit_s: float) -> Part:
        budget, fewer = ("0.01", " and not compiled") if small else ("0.2", "")
        words = f"-m pytest benchmarks/test_kernels.py -q -k '({tests}){fewer}' --budget_s {budget}"
        words += " --benchmark-json {file}"
        return Part(f"kernels-{name}-{device}", words, limit_s)

    tests = "-m 'not gpu' tests/kernels/test_rows.py" if small else f"-m gpu {' '.join(gpu_tests())}"
    profiled = TINY if small else f"--batch_tokens {BATCH_TOKENS['gpt2']}"
    tuned = "--dry_run --chip cuda:86 --kernels softmax_forward --limit 2 --workers 1" if small else "--limit 16"
    grown = "--axes depth,length --steps " + ("1 --warmup 1 --batch_tokens 1024" if small else "4")
    return [
        Part(f"correctness-{device}", f"-m benchmarks.suite --correctness {{file}} -- {tests}", 300),
        kernels("attention", "attention and not flex", 120),
        throughput("gpt2", 210, compare=PEERS, flags="--micro_batch_size 32"),  # the others would try ours in vain
        throughput("2b", 120),
        throughput("2b", 90, memory=24),
        throughput("2b", 120, card="rtx3080"),
        throughput("2b", 120, card="v100"),
        throughput("gpt2-xl", 90),
        kernels("rows", "copy or rows or rotary", 160),
        kernels("loss", "copy or cross_entropy or adamw", 90),
        *(throughput("2b", 120, card=card) for card in CARDS if card not in ("rtx3080", "v100")),
        throughput("2b", 300, compare="transformers-liger,transformers,pytorch", label="-compared"),
        Part(
            f"profile-gpt2-{device}",
            f"tools/profile_step.py --preset gpt2 {profiled} --out build/profile-gpt2-{device} --json {{file}}",
            60,
        ),
        *(throughput("2b", 120, memory=memory) for memory in MEMORIES[1:]),
        *(throughput("gpt2-xl", 60, memory=memory) for memory in MEMORIES),
        *(throughput("gpt2", 40, memory=memory) for memory in MEMORIES),
        kernels("flex", "attention and (flex or whole)", 200),
        Part(f"scaling-{device}", f"benchmarks/scaling.py {grown} --out {{file}}", 360),
        Part(f"tune-{device}", f"tools/tune.py {tuned} --out {{file}}", 300),
    ]


def gpu_tests() -> list[str]:
    """Return the files that have tests for a GPU: reading all others takes longer than running some."""
    files = (path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text())
    return [str(path.relative_to(ROOT)) for path in files]


def here_and_now() -> dict[str, Any]:
    """Return the environment of parts that take a GPU where they see one."""
    return environment(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def read(file: Path) -> dict[str, Any] | None:
    """Return what a result file holds; None where it is not there, or cannot be read."""
    try:
        return json.loads(file.read_text())
    except (FileNotFoundError, ValueError):
        return None


def is_from(here: dict[str, Any], result: dict[str, Any]) -> bool:
    """Whether a result is of this commit and device."""
    return all(result.get("environment", {}).get(key, "unknown") == here[key] for key in ("commit", "gpu"))


def is_done(part: Part, folder: Path, here: dict[str, Any]) -> bool:
    """Whether this part's result is there, from this commit and device, and no code was changed since."""
    found = read(folder / f"{part.name}.json")
    if found is None or not is_from(here, found) or found.get("unfinished"):
        return False
    return not (here["changed"] or found["environment"]["changed"])


def verdict(part: Part, folder: Path) -> tuple[str, str]:
    """Return the status of a part whose result is there, and what there is to say of it."""
    found = read(folder / f"{part.name}.json")
    failed = found["failed"] if found.get("benchmark") == "correctness" else 0
    return (TESTS_FAILED, f"{failed} of {amount(found)}") if failed else ("done", "")


def amount(result: dict[str, Any]) -> int:
    return AMOUNTS.get(result.get("benchmark"), len)(result)


def put_in_place(partial: Path, file: Path, whole: bool) -> bool:
    """Give what a part wrote its name if it can be read and, unless it is `whole`, what has the name holds no more."""
    made, before = read(partial), read(file)
    better = made is not None and (
        whole or before is None or not is_from(made["environment"], before) or amount(made) >= amount(before)
    )
    if better:
        partial.replace(file)
    partial.unlink(missing_ok=True)
    return better


def run(part: Part, folder: Path, limit_s: float) -> tuple[str, str]:
    """Run a part; return its status and, if it went wrong, the last line of its log in build/logs/.

    Past the limit it is interrupted, so that pytest writes what it has, and soon after killed with its children.
    """
    file, partial = (folder / f"{part.name}.{ending}" for ending in ("json", "partial"))
    partial.unlink(missing_ok=True)
    LOGS.mkdir(parents=True, exist_ok=True)
    log = LOGS / f"{part.name}.log"
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    variables = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {"PYTHONPATH": paths}
    late = False
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in the background of a shell; a part would ignore it too
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with open(log, "w+") as output:
        process = subprocess.Popen(
            part.command(partial), cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env=variables,
            start_new_session=True,
        )  # fmt: skip
        try:
            process.wait(limit_s)
        except subprocess.TimeoutExpired:
            late = True
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
        finally:  # also where the suite itself is stopped
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            whole = process.wait() == 0 and not late
            written = put_in_place(partial, file, whole)
        output.seek(0)
        lines = output.read().strip().splitlines() or [""]
    if late:
        return "out of time", f"after {limit_s:.0f} s" + ("; what it had by then is kept" if written else "")
    return verdict(part, folder) if whole and written else ("failed", lines[-1])


def correctness(arguments: list[str], file: Path) -> int:
    """Run pytest, several processes at once, a file of tests or a share of one each; write what is known after each.

    Kernels compile while others run, and one that breaks the device's context takes no other process's tests with it.
    Interrupted, it passes that on, and counts what its processes still report. Return 1 if it could not finish.
    """
    files, options = [a for a in arguments if a.endswith(".py")], [a for a in arguments if not a.endswith(".py")]
    began, here, waiting = time.perf_counter(), here_and_now(), shares(files)
    payload: dict[str, Any] = {
        "benchmark": "correctness", "environment": here, "command": f"pytest {shlex.join(arguments)}",
        "passed": 0, "failed": 0, "skipped": 0, "seconds": 0.0, "failures": [],
        "unfinished": [shlex.join(share) for share in waiting],
    }  # fmt: skip
    running: dict[subprocess.Popen, tuple[str, Path]] = {}

    def ended(process: subprocess.Popen, interrupted: bool = False) -> None:
        share, report = running.pop(process)
        if not interrupted:
            payload["unfinished"].remove(share)
        if report.exists() or not interrupted:
            count_tests(payload, share, report)
        payload["seconds"] = time.perf_counter() - began
        write_result(file, payload)

    with tempfile.TemporaryDirectory() as scratch:
        try:
            while waiting or running:
                while waiting and len(running) < processes_at_once(here):
                    share, report = waiting.pop(0), Path(scratch) / f"{len(waiting)}.xml"
                    command = [sys.executable, "-m", "pytest", "-q", *options, *share, "--junitxml", str(report)]
                    running[subprocess.Popen(command, cwd=ROOT)] = shlex.join(share), report
                for process in [process for process in running if process.poll() is not None]:
                    ended(process)
                time.sleep(0.1)
        except KeyboardInterrupt:
            deadline = time.perf_counter() + TESTS_GRACE_S
            for process in running:
                process.send_signal(signal.SIGINT)
            for process in list(running):
                with suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, deadline - time.perf_counter()))
                    ended(process, interrupted=True)
    return int(bool(payload["unfinished"]))


def shares(files: list[str]) -> list[list[str]]:
    """Return pytest's arguments for each process, the longest first."""
    split = [[file, "-k", words] for file, halves in LONG.items() if file in files for words in halves]
    return split + [[file] for file in files if file not in LONG]


def processes_at_once(here: dict[str, Any]) -> int:
    """Return how many processes of tests the cores and the card's memory have room for."""
    room = here["gpu"]["memory_bytes"] // TEST_BYTES if here["gpu"] else TEST_PROCESSES
    return max(1, min(TEST_PROCESSES, here["cores"] // 2, room))


def count_tests(payload: dict[str, Any], share: str, report: Path) -> None:
    """Add what a process's report says; a process that left none has crashed, which is a failure."""
    if not report.exists():
        payload["failed"] += 1
        payload["failures"].append({"test": share, "message": "its process ended without a report"})
        return
    suite = ElementTree.parse(report).getroot().find("testsuite")
    counts = {key: int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")}
    failed = counts["failures"] + counts["errors"]
    payload["passed"] += counts["tests"] - failed - counts["skipped"]
    payload["failed"] += failed
    payload["skipped"] += counts["skipped"]
    for case in suite.iter("testcase"):
        for fault in (*case.iter("failure"), *case.iter("error")):
            message = "\n".join(fault.get("message").splitlines()[:MESSAGE_LINES])
            payload["failures"].append({"test": f"{case.get('classname')}::{case.get('name')}", "message": message})


def suite(todo: list[Part], folder: Path, name: str, again: bool, seconds: float) -> int:
    """Do the parts for `seconds`, those that went wrong before at the end; write what becomes of each at once.

    Return 1 if any went wrong.
    """
    folder.mkdir(parents=True, exist_ok=True)
    began, here = time.perf_counter(), here_and_now()
    rows = rows_before(folder / f"{name}.json", here)
    wrong = {key for key, row in rows.items() if row["status"] in WRONG}

    def note(part: Part, status: str, took_s: float, message: str) -> None:
        command = shlex.join(["python", *part.command(Path(f"benchmarks/results/{part.name}.json"))[1:]])
        about = {"name": part.name, "command": command, "file": f"{part.name}.json"}
        rows[part.name] = about | {"status": status, "seconds": took_s, "message": message}
        elapsed = time.perf_counter() - began
        summary = {"benchmark": "suite", "environment": here, "seconds": elapsed, "parts": list(rows.values())}
        write_result(folder / f"{name}.json", summary)

    for part in sorted(todo, key=lambda part: part.name in wrong):
        started = time.perf_counter()
        left = seconds - (started - began)
        kept = not again and part.name not in wrong and is_done(part, folder, here)
        if kept:
            status, message = verdict(part, folder)
            status = "kept" if status == "done" else status
        elif left < LEAST_S:  # what went wrong stays so: its file may hold half of a result
            status = rows[part.name]["status"] if part.name in wrong else "not run"
            message = "no time left: run the suite again"
        else:
            print(f"{part.name} ...", flush=True)
            note(part, "running", 0.0, "")
            status, message = run(part, folder, min(part.limit_s, left))
        took_s = time.perf_counter() - started
        if kept and part.name in rows:
            took_s = rows[part.name]["seconds"]
        print(f"{part.name}: {status}{f', {message}' if message else ''} ({took_s:.0f} s)", flush=True)
        note(part, status, took_s, message)
    return int(any(rows[part.name]["status"] in (*WRONG, TESTS_FAILED) for part in todo))


def rows_before(summary: Path, here: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return by name what became of each part in the runs before this one, of this commit and device."""
    found = read(summary)
    return {row["name"]: row for row in found["parts"]} if found and is_from(here, found) else {}


def slug(name: str) -> str:
    """Return "NVIDIA H100 80GB HBM3" as "h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"nvidia|geforce|amd|tesla", "", name.lower())).strip("-")


@ends_on_ctrl_c("interrupted; the same command goes on")
def main(arguments: list[str] | None = None) -> int:
    parser = CommandLine(__doc__)
    parser.add_argument("--cpu", action="store_true", help="rehearse every part without a GPU")
    parser.add_argument("--again", action="store_true", help="also the parts that this commit has results of")
    parser.add_argument(
        "--minutes",
        type=float,
        default=10.0,
        help="end after so long: what runs then is interrupted and keeps what it has [10]",
    )
    parser.add_argument(
        "--only", metavar="WORDS", help="parts whose names have one of these words, such as 2b,attention"
    )
    parser.add_argument("--list", action="store_true", help="say what would be run")
    parser.add_argument("--out", type=Path, help="folder for the results [benchmarks/results; with --cpu build/suite]")
    parser.add_argument("--correctness", type=Path, metavar="FILE", help=argparse.SUPPRESS)
    parser.add_argument("rest", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.correctness:
        return correctness(options.rest, options.correctness)
    if options.rest:
        parser.error(f"{options.rest[0]!r} belongs to no flag; --only takes words of the parts' names")
    if not options.cpu and not torch.cuda.is_available() and not options.list:
        print("error: no GPU here; --cpu rehearses every part without one", file=sys.stderr)
        return 2
    device = "cpu" if options.cpu or not torch.cuda.is_available() else slug(torch.cuda.get_device_name())
    todo = parts(device, options.cpu)
    words = options.only.split(",") if options.only else []
    for word in words:
        if not any(word in part.name for part in todo):
            parser.error(f"--only {word}: no part has it in its name; they are {', '.join(p.name for p in todo)}")
    todo = [part for part in todo if not words or any(word in part.name for word in words)]
    folder = (options.out or (ROOT / "build" / "suite" if options.cpu else RESULTS)).resolve()
    if options.list:
        lines = [f"{p.limit_s:>4.0f} s  {shlex.join(p.command(folder / f'{p.name}.json')[1:])}" for p in todo]
        try:
            print(*lines, sep="\n", flush=True)
        except BrokenPipeError:
            let_go_of_output()
        return 0
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(f"not installed: {', '.join(missing)}; what needs them says so in its result", flush=True)
    if options.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the parts of a rehearsal take no GPU either
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # the part that runs is ended with us
    return suite(todo, folder, f"suite-{device}", options.again, 60 * options.minutes)


if __name__ == "__main__":
    sys.exit(main())
