"""Everything that needs a GPU in one command under ten minutes, the most valuable first.

    python benchmarks/suite.py                # on a GPU: results into benchmarks/results/
    python benchmarks/suite.py --again        # measures anew what this commit has results of already
    python benchmarks/suite.py --cpu          # a rehearsal without a GPU: the same parts, small, into build/suite/

Each part is a process of its own with its own time limit and writes its result as soon as it has one; run again, the
suite goes on with the parts that have none for this commit and device. A card's memory is imposed on a larger one, and
the file says so. Afterwards: `python benchmarks/render.py`.
"""

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from benchmarks.environment import RESULTS, environment, write_result
from benchmarks.reading import load

ROOT = Path(__file__).parents[1]
LOGS = ROOT / "build" / "logs"
CARDS = {
    10: "rtx3080",
    11: "gtx1080ti",
    16: "v100",
    24: "rtx3090",
    40: "a100 40gb",
    48: "quadro rtx 8000",
}  # label: whose memory
BATCH_TOKENS = {"gpt2": 131_072, "gpt2-xl": 65_536, "2b": 65_536}
PEERS = "pytorch,transformers-liger,transformers,pytorch-compiled"
TINY = "--n_layer 2 --n_embd 64 --n_head 2 --block_size 64 --vocab_size 512 --batch_tokens 512 --micro_batch_size 4"
LEAST_S = 5.0  # with less time than this left no part is started


@dataclass(frozen=True)
class Part:
    """A result file's name, the arguments of the Python that makes it (`{file}` is its path), and its time limit."""

    name: str
    arguments: str
    limit_s: float

    def command(self, folder: Path) -> list[str]:
        file = folder / f"{self.name}.json"
        return [sys.executable, *(word.replace("{file}", str(file)) for word in shlex.split(self.arguments))]


def parts(device: str, small: bool) -> list[Part]:
    """Return the parts in the order of their worth. `device` ends every name; `small`: what a CPU does in seconds."""

    def throughput(preset: str, limit_s: float, gigabytes: int | None = None, compare: str = "") -> Part:
        label = f"-{gigabytes}gb" if gigabytes else ""
        steps = "--steps 2 --warmup 1" if small else "--steps 5 --warmup 2"
        shape = TINY if small else f"--batch_tokens {BATCH_TOKENS[preset]}"
        memory = f" --gpu_memory '{CARDS[gigabytes]}'" if gigabytes else ""
        peers = f" --compare {'pytorch,transformers' if small else compare}" if compare else ""
        words = f"benchmarks/throughput.py --preset {preset} {shape} {steps}{memory}{peers} --out {{file}}"
        return Part(f"throughput-{preset}-{device}{label}", words, limit_s)

    def kernels(name: str, tests: str, limit_s: float) -> Part:
        budget, fewer = ("0.01", " and not compiled") if small else ("0.2", "")
        words = f"-m pytest benchmarks/test_kernels.py -q -k '({tests}){fewer}' --budget_s {budget}"
        words += " --benchmark-json {file}"
        return Part(f"kernels-{name}-{device}", words, limit_s)

    tests = "-m 'not gpu' tests/kernels/test_rows.py" if small else "-m gpu tests"
    profiled = TINY if small else f"--batch_tokens {BATCH_TOKENS['gpt2']}"
    memories = [16, 10, 11, 40, 48]
    return [
        Part(f"correctness-{device}", f"-m benchmarks.suite --correctness {{file}} -- {tests}", 200),
        kernels("attention", "attention", 120),
        throughput("gpt2", 150, compare=PEERS),
        throughput("2b", 60),
        throughput("2b", 60, 24),
        throughput("gpt2-xl", 60),
        kernels("rows", "copy or rows or rotary", 120),
        kernels("loss", "copy or cross_entropy or adamw", 90),
        *(throughput("2b", 120, gigabytes) for gigabytes in memories),
        Part(
            f"profile-gpt2-{device}",
            f"tools/profile_step.py --preset gpt2 {profiled} --out build/profile-gpt2-{device} --json {{file}}",
            60,
        ),
        *(throughput("gpt2-xl", 60, gigabytes) for gigabytes in (24, *memories)),
        *(throughput("gpt2", 40, gigabytes) for gigabytes in (24, *memories)),
    ]


def is_done(part: Part, folder: Path, here: dict[str, Any]) -> bool:
    """Whether this part's result is there, from this commit and device."""
    found = load(folder).get(part.name)
    return found is not None and all(found["environment"][key] == here[key] for key in ("commit", "gpu"))


def run(part: Part, folder: Path, limit_s: float) -> tuple[str, str]:
    """Run a part; return its status and, if it went wrong, the last line of its log in build/logs/.

    Past the limit it and its children are killed.
    """
    file = folder / f"{part.name}.json"
    before = file.stat().st_mtime_ns if file.exists() else None
    LOGS.mkdir(parents=True, exist_ok=True)
    log = LOGS / f"{part.name}.log"
    with open(log, "w+") as output:
        process = subprocess.Popen(
            part.command(folder), cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            process.wait(limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        lines = output.read().strip().splitlines() or [""]
    written = file.exists() and file.stat().st_mtime_ns != before
    if process.returncode == -signal.SIGKILL:
        return "out of time", f"after {limit_s:.0f} s" + ("; what it had by then is kept" if written else "")
    if written:
        return "done", "" if process.returncode == 0 else lines[-1]
    return "failed", lines[-1]


def correctness(arguments: list[str], file: Path) -> int:
    """Run pytest and write how many tests passed, and which failed."""
    report = file.with_suffix(".xml")
    command = [sys.executable, "-m", "pytest", "-q", *arguments, "--junitxml", str(report)]
    subprocess.run(command, cwd=ROOT)
    suite = ElementTree.parse(report).getroot().find("testsuite")
    report.unlink()
    counts = {key: int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")}
    failed = counts["failures"] + counts["errors"]
    cases = [
        case for case in suite.iter("testcase") if case.find("failure") is not None or case.find("error") is not None
    ]
    payload = {
        "benchmark": "correctness",
        "environment": environment(),
        "command": f"pytest {shlex.join(arguments)}",
        "passed": counts["tests"] - failed - counts["skipped"],
        "failed": failed,
        "skipped": counts["skipped"],
        "seconds": float(suite.get("time")),
        "failures": [f"{case.get('classname')}::{case.get('name')}" for case in cases],
    }
    write_result(file, payload)
    return int(failed > 0)


def suite(todo: list[Part], folder: Path, name: str, again: bool, seconds: float) -> int:
    """Do the parts while the time lasts; write what became of each as it happens. Return 1 if any failed."""
    folder.mkdir(parents=True, exist_ok=True)
    began, here = time.perf_counter(), environment()
    rows: list[dict[str, Any]] = []
    for part in todo:
        left = seconds - (time.perf_counter() - began)
        started = time.perf_counter()
        if not again and is_done(part, folder, here):
            status, message = "kept", ""
        elif left < LEAST_S:
            status, message = "not run", "no time left: run the suite again"
        else:
            print(f"{part.name} ...", flush=True)
            status, message = run(part, folder, min(part.limit_s, left))
        took = time.perf_counter() - started
        print(f"{part.name}: {status}{f', {message}' if message else ''} ({took:.0f} s)", flush=True)
        command = shlex.join(["python", *part.command(Path("benchmarks/results"))[1:]])
        rows.append(
            {
                "name": part.name,
                "command": command,
                "status": status,
                "seconds": took,
                "file": f"{part.name}.json",
                "message": message,
            }
        )
        summary = {"benchmark": "suite", "environment": here, "seconds": time.perf_counter() - began, "parts": rows}
        write_result(folder / f"{name}.json", summary)
    return int(any(row["status"] in ("failed", "out of time") for row in rows))


def slug(name: str) -> str:
    """Return "NVIDIA H100 80GB HBM3" as "h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"nvidia|geforce|amd|tesla", "", name.lower())).strip("-")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="rehearse every part without a GPU")
    parser.add_argument("--again", action="store_true", help="also the parts that this commit has results of")
    parser.add_argument("--minutes", type=float, default=10.0, help="start nothing after so long [10]")
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
    if not options.cpu and not torch.cuda.is_available() and not options.list:
        print("error: no GPU here; --cpu rehearses every part without one", file=sys.stderr)
        return 2
    device = slug(torch.cuda.get_device_name()) if torch.cuda.is_available() and not options.cpu else "cpu"
    todo = parts(device, options.cpu)
    if options.only:
        todo = [part for part in todo if any(word in part.name for word in options.only.split(","))]
    folder = (options.out or (ROOT / "build" / "suite" if options.cpu else RESULTS)).resolve()
    if options.list:
        for part in todo:
            print(f"{part.limit_s:>4.0f} s  {shlex.join(part.command(folder)[1:])}")
        return 0
    return suite(todo, folder, f"suite-{device}", options.again, 60 * options.minutes)


if __name__ == "__main__":
    sys.exit(main())
