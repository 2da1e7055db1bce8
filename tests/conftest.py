"""What all tests share: Triton's interpreter, small token files with something to learn, the flags of a tiny run.

The interpreter changes what `@triton.jit` returns, so it is one choice for the whole test process, made before anything
imports a kernel; it is off under `-m gpu`. It does not change which path an op takes: on a CPU that stays PyTorch's
until a test asks for Triton (tests/kernels/conftest.py).
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
MOST_PROCESSES = 4  # each holds torch and its tests' models


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads its options
def pytest_cmdline_main(config):
    """Share the default tests among processes, unless `-n` says otherwise or files are named.

    Those for a card share it badly, and slow ones have processes of their own.
    """
    options = config.option
    if not config.pluginmanager.hasplugin("xdist") or hasattr(config, "workerinput"):
        return
    whole = "not slow" in options.markexpr and not any(".py" in argument for argument in config.args)
    if whole and options.numprocesses is None and not options.usepdb:
        options.numprocesses, options.dist = min(os.cpu_count() or 1, MOST_PROCESSES), "worksteal"


def pytest_configure(config):
    if config.getoption("markexpr") == "gpu":
        os.environ.pop("TRITON_INTERPRET", None)
    else:
        os.environ["TRITON_INTERPRET"] = "1"
    # As in the background of a shell; programs would ignore it too.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Small tensors are slower on several threads, and sums over one thread come out the same every time."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def token_files(tmp_path_factory) -> tuple[Path, Path]:
    """(train.bin, val.bin): 200,000 and 20,000 tokens of a noisy cycle through r50k's first 500, a document about 400.

    Their JSON says that there are no other ids but 511, which ends a document, so that a model of them is quick.
    """
    folder = tmp_path_factory.mktemp("tokens")
    generator = np.random.default_rng(0)
    files = []
    for name, count in (("train.bin", 200_000), ("val.bin", 20_000)):
        tokens = (np.cumsum(generator.choice([1, 2, 7], count, p=[0.8, 0.15, 0.05])) % 500).astype("<u2")
        tokens[generator.integers(0, count, count // 400)] = 511
        tokens.tofile(folder / name)
        about = {
            "format": 1,
            "tokenizer": "r50k_base",
            "vocab_size": 512,
            "end_of_text": 511,
            "dtype": "uint16",
            "tokens": count,
        }
        (folder / f"{name}.json").write_text(json.dumps(about))
        files.append(folder / name)
    return tuple(files)


@pytest.fixture
def charts():
    """Runs draw their loss.png: those of tiny_flags in this process else do not, since it takes most of their time."""


@pytest.fixture
def tiny_flags(token_files, tmp_path, request) -> Iterator[list[str]]:
    """Flags of a run of 12 short steps that saves and validates at every fourth, in tmp_path/run."""
    from engine.report import Report

    flags = dict(
        preset="13m", n_embd=16, n_head=2, block_size=32, vocab_size=512, batch_tokens=256, max_steps=12,
        warmup_steps=2, eval_tokens=512, eval_interval=4, save_interval=4, keep_checkpoints=0, sample_tokens=3,
        log_interval=4, tensorboard="false", device="cpu", train_file=token_files[0], val_file=token_files[1],
        run_dir=tmp_path / "run",
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        if "charts" not in request.fixturenames:
            patch.setattr(Report, "draw", lambda report: None)
        yield [f"--{name}={value}" for name, value in flags.items()]


@pytest.fixture
def start():
    """start(command) -> Popen of this Python, one thread, captured output; what still runs at the end is killed."""
    started = []

    def launch(*command: str | Path, **environment: str) -> subprocess.Popen:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | environment
        env.pop("TRITON_INTERPRET", None)
        process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        return process

    yield launch
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()
