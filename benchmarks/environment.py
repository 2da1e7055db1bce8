"""Where a number was measured, and the file it is kept in."""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from engine.whole_file import whole_file

PACKAGES = ("torch", "triton", "deepspeed", "numpy", "numba", "tiktoken", "transformers", "liger-kernel")
RESULTS = Path(__file__).parent / "results"
WRITTEN = ("benchmarks/results", "benchmarks/charts", "*.md")  # by measuring and rendering: no code that is measured


def environment(device: torch.device = torch.device("cpu")) -> dict[str, Any]:
    """Return usable cores, versions, commit (and whether the tree had changes on top of it), date, and the GPU.

    device: what did the work. Only where it is a GPU is one told, whatever else the machine has.
    """
    gpu = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        versions = {"cuda": torch.version.cuda, "hip": torch.version.hip}
        gpu = {"name": properties.name, "memory_bytes": properties.total_memory} | versions
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpu": gpu,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": _git("rev-parse", "HEAD") or os.environ.get("PILESMITH_COMMIT"),
        "changed": _changed(),
        "date": datetime.date.today().isoformat(),
    }


def write_result(path: Path, payload: dict[str, Any]) -> None:
    """Write `payload` as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        partial.write_text(json.dumps(payload, indent=1) + "\n")


def _cpu_name() -> str:
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _changed() -> bool:
    """Whether tracked files differ from the commit; without git that cannot be known, and nothing is said to."""
    others = (f":(top,exclude){path}" for path in WRITTEN)
    return bool(_git("status", "--porcelain", "--untracked-files=no", "--", ":/", *others))


def _git(*command: str) -> str | None:
    try:
        done = subprocess.run(["git", *command], cwd=Path(__file__).parent, capture_output=True, text=True)
    except FileNotFoundError:  # git is not installed
        return None
    return done.stdout.strip() if done.returncode == 0 else None
