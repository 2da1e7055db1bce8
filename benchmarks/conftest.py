"""What the benchmarks share: a clock that waits for the device, as many rounds as a budget allows, a record of where.

    pytest benchmarks/test_kernels.py --benchmark-json benchmarks/results/kernels-cpu.json

On a machine that others use, `--clock cpu` counts the processor's seconds, on one thread, instead of the wall's.
"""

import ctypes
import os
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch

from benchmarks.environment import environment
from benchmarks.meters import step_bytes
from engine.device import choose_device

# glibc's mallopt: freed memory stays with the process. Else results of a few MB are at times handed back and faulted in
# again each round, which takes ten times as long as filling them, and whether they are is decided by earlier cases.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MALLOC = {M_TRIM_THRESHOLD: 1 << 30, M_MMAP_THRESHOLD: 32 << 20}

ROUND_S = 0.01  # a shorter round would measure the clock and the wait
MIN_ROUNDS, MAX_ROUNDS = 5, 100


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise pytest.UsageError("TRITON_INTERPRET=1 is set: the interpreter's times mean nothing; unset it")
    with suppress(AttributeError, OSError, TypeError):  # another C library
        for option, value in MALLOC.items():
            ctypes.CDLL(None).mallopt(option, value)
    if config.getoption("--clock") == "cpu":
        torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="what is counted: time, or this process's CPU time on one thread",
    )
    parser.addoption("--budget_s", type=float, default=0.5, help="seconds of measuring for each case [0.5]")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "measure" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=_clock(config)))


def _clock(config: pytest.Config) -> Callable[[], float]:
    return device_clock if config.getoption("--clock") == "wall" else time.process_time


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list, output_json: dict[str, Any]) -> None:
    """Say where it was measured as every other result does; leave out single rounds and the machine's own name."""
    output_json["benchmark"] = "pytest-benchmark"
    output_json["environment"] = environment(choose_device("auto")[0])
    cpu = output_json["machine_info"]["cpu"]
    output_json["machine_info"] = {"cpu": {key: cpu[key] for key in ("brand_raw", "count") if key in cpu}}
    for case in output_json["benchmarks"]:
        case["stats"].pop("data", None)


def device_clock() -> float:
    """Return seconds, once everything asked of the GPU is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


@pytest.fixture(scope="session")
def device() -> torch.device:
    return choose_device("auto")[0]


@pytest.fixture
def measure(benchmark: Any, request: pytest.FixtureRequest, device: torch.device) -> Callable[..., None]:
    """measure(run, **about): time `run()` and keep `about` beside the times.

    `about` has op, step, implementation, shape, dtype and, where they are known, the flops and bytes that the result
    needs at least: what must be read and written once. The memory that one run needs is measured as well.
    """

    clock = _clock(request.config)

    def measure(run: Callable[[], Any], **about: Any) -> None:
        run()  # compiles
        began = clock()
        run()
        seconds = max(clock() - began, 1e-7)
        iterations = max(1, int(ROUND_S / seconds))
        rounds = int(request.config.getoption("--budget_s") / (iterations * seconds))
        benchmark.extra_info |= {"flops": None, "bytes": None} | about
        benchmark.extra_info |= {
            "step_bytes": step_bytes(run, device),
            "clock": request.config.getoption("--clock"),
            "threads": torch.get_num_threads(),
        }
        benchmark.pedantic(run, iterations=iterations, rounds=min(max(rounds, MIN_ROUNDS), MAX_ROUNDS))

    return measure
