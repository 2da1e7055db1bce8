"""Read benchmarks/results/, and say what is there in words and Markdown."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.environment import RESULTS
from engine.report import human

Results = dict[str, dict[str, Any]]  # file name without .json -> content


def load(folder: Path = RESULTS) -> Results:
    """Return every result file's content under its name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def of_kind(results: Results, kind: str) -> dict[str, dict[str, Any]]:
    return {name: result for name, result in results.items() if kind_of(name, result) == kind}


def kind_of(name: str, result: dict[str, Any]) -> str:
    """Return what a file says it is, which is its own name where it says nothing."""
    return result.get("benchmark", name)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; columns after the first whose cells are numbers, or "-", lie to the right."""
    numeric = [i > 0 and all((row[i].lstrip("+-") or "0")[0].isdigit() for row in rows) for i in range(len(header))]
    lines = [header, ["---:" if right else "---" for right in numeric], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def device_name(result: dict[str, Any]) -> str:
    """Return what people call the device, such as "H100" or "AMD EPYC, 2 cores"."""
    environment = result["environment"]
    gpu = environment["gpu"]
    return gpu["name"].removeprefix("NVIDIA ") if gpu else f"{environment['cpu']}, {environment['cores']} cores"


def contender_name(name: str, row: dict[str, Any], result: dict[str, Any]) -> str:
    """Return "classic (163M, untied head, ReLU)" where a row's model is not the one that the file is about."""
    size = human(row.get("n_parameters", result["n_parameters"]))
    differs = [size] * (size != human(result["n_parameters"])) + list(filter(None, [row.get("differs")]))
    return f"{name} ({', '.join(differs)})" if differs else name


def threads_of(result: dict[str, Any]) -> str:
    """Return "2 threads", or nothing where a GPU did the work."""
    return "" if result["environment"]["gpu"] else f"{result['threads']} thread{'s' * (result['threads'] > 1)}"


def source(name: str, result: dict[str, Any], base: str) -> str:
    """Return a line that says where a table's numbers come from."""
    environment = result["environment"]
    commit = (environment["commit"] or "no commit")[:9] + (" with changes" if environment["changed"] else "")
    versions = environment["versions"]
    triton = f", Triton {versions['triton']}" if environment["gpu"] and versions.get("triton") else ""
    file = f"[{name}.json]({base}results/{name}.json)"
    return f"{device_name(result)}; PyTorch {versions['torch']}{triton}; {environment['date']}; commit {commit}; {file}"


def clocked(result: dict[str, Any]) -> str:
    """Return how a pytest-benchmark file's times were taken, where that is not the plain wall clock."""
    clocks = {(case["extra_info"].get("clock"), case["extra_info"].get("threads")) for case in result["benchmarks"]}
    return "; CPU seconds of one thread" if clocks == {("cpu", 1)} else ""


# What makes the files of each kind, the names in benchmarks/results/ included.
_OUT = "benchmarks/results/"
COMMANDS = {
    "throughput": f"python benchmarks/throughput.py --preset 13m --compare --out {_OUT}throughput-13m-cpu.json",
    "profile": f"python tools/profile_step.py --preset 13m --json {_OUT}profile-13m-cpu.json",
    "kernels": f"pytest benchmarks/test_kernels.py --benchmark-json {_OUT}kernels-cpu.json",
    "files": f"pytest benchmarks/test_loader.py --benchmark-json {_OUT}loader-cpu.json",
    "scaling": f"python benchmarks/scaling.py --out {_OUT}scaling-cpu.json",
    "tune": f"python tools/tune.py --dry_run --chip cuda:86 --limit 15 --out {_OUT}tune-cuda_86.json",
    "tokenizer": "pytest benchmarks/test_tokenizer.py",
    "prepare": "pytest benchmarks/test_prepare.py",
    "quality": "python benchmarks/optimizer_quality.py",
    "miniature": "python benchmarks/miniature.py",
    "compiled": "python tools/compile_kernels.py",
    "plans": "python benchmarks/plans.py",
    "suite": "python benchmarks/suite.py",
}


def nothing(command: str) -> str:
    return f"Not measured yet: `{command}`."


def mib(size: float) -> str:
    return f"{size / 2**20:,.0f} MiB" if size < 10 * 2**30 else f"{size / 2**30:.2f} GiB"


def gib(size: float) -> str:
    """For columns that hold large sizes as well as small ones."""
    return f"{size / 2**30:.2f} GiB"


def si(value: float, unit: str) -> str:
    """Return "3.88 GB/s"."""
    number = human(value)
    return f"{number[:-1]} {number[-1]}{unit}" if number[-1].isalpha() else f"{number} {unit}"


def seconds(value: float) -> str:
    for limit, factor, unit in ((1, 1, "s"), (1e-3, 1e3, "ms"), (0, 1e6, "µs")):
        if value >= limit:
            return f"{value * factor:.3g} {unit}"
    raise ValueError(value)


def cases(result: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield what each case of a pytest-benchmark file says of itself, and its statistics."""
    for case in result["benchmarks"]:
        about = {"op": case["name"].partition("[")[0], "implementation": case.get("param") or ""}
        yield about | case["extra_info"], case["stats"]


def shape_of(about: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value:,}" for key, value in about.get("shape", {}).items())
