"""More processes for preparing: each takes the inputs that nobody is at, until there are none.

A process has a few threads; more of them would wait for each other, since parsing holds the GIL. Nothing is divided up
beforehand: whoever gets the lock of a part does it. A helper ends with the process that started it, even a killed one,
because the pipe between the two ends then.
"""
import _thread
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from tools.parts import Part, Workspace
from tools.pipeline import Pipeline, Work
from tools.text_encoders import TextEncoder
from tools.token_file import PrepareError, Settings

THREADS = 4  # of a process, where there are inputs for several
GRACE_S = 20  # for a helper to save what it has


class Job(msgspec.Struct):
    """What a helper is told."""

    file: str
    inputs: list[str]
    mine: list[str]  # names of the inputs that may be taken
    settings: Settings
    threads: int


def available_cores() -> int:
    """Return the cores this process may use: its affinity, or less where a control group limits its time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no control groups, or their first version
        return cores


def shares(workers: int, inputs: int) -> list[int]:
    """Return the threads of each process: as many processes as make the last round of inputs a full one."""
    most = max(1, min(inputs, workers // THREADS))
    rounds = -(-inputs // most)
    processes = -(-inputs // rounds)
    return [workers // processes + (i < workers % processes) for i in range(processes)]


class Helpers:
    """Processes that work on the parts of a workspace beside this one."""

    def __init__(self, workspace: Workspace, parts: Sequence[Part], threads: Sequence[int], report: Callable) -> None:
        self._report = report
        self._error = ""
        self._processes = [self._start(workspace, parts, count) for count in threads]
        self._readers = [threading.Thread(target=self._read, args=(process,), daemon=True) for process in self._processes]
        for reader in self._readers:
            reader.start()

    def _start(self, workspace: Workspace, parts: Sequence[Part], threads: int) -> subprocess.Popen:
        job = Job(
            file=str(workspace.file.absolute()),
            inputs=[str(part.input.absolute()) for part in workspace.parts],
            mine=[part.input.name for part in parts],
            settings=workspace.settings,
            threads=threads,
        )
        process = subprocess.Popen(
            [sys.executable, "-c", "from tools.workers import help_out; help_out()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[1],
            start_new_session=True,  # a Ctrl-C reaches it through the pipe, once
        )
        process.stdin.write(msgspec.json.encode(job) + b"\n")
        process.stdin.flush()
        return process

    def _read(self, process: subprocess.Popen) -> None:
        for line in process.stdout:
            work = msgspec.json.decode(line, type=Work | Failure)
            if isinstance(work, Failure):
                self._error = self._error or work.error
            else:
                self._report(work)

    def wait(self) -> None:
        """Wait until none finds anything to do. PrepareError where one failed; one that died left its input to others."""
        for process, reader in zip(self._processes, self._readers):
            reader.join()
            process.wait()
        if self._error:
            raise PrepareError(self._error)

    def __enter__(self) -> "Helpers":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.stdin.close()
        for process in self._processes:
            try:
                process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


class Failure(msgspec.Struct, tag=True):
    """Why a helper gave up."""

    error: str


def help_out() -> None:
    """Do the job on standard input, reporting on standard output, for as long as standard input is open."""
    job = msgspec.json.decode(sys.stdin.buffer.readline(), type=Job)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    encoder = TextEncoder(job.settings.tokenizer)
    workspace = Workspace(Path(job.file), [Path(name) for name in job.inputs], job.settings, encoder.dtype)
    parts = [part for part in workspace.missing() if part.input.name in job.mine]
    try:
        with Pipeline(encoder, job.threads, _tell) as pipeline:
            pipeline.run(parts)
    except PrepareError as error:
        _tell(Failure(str(error)))
    except OSError as error:
        _tell(Failure(f"{error.strerror}: {error.filename or workspace.folder}"))
    except (KeyboardInterrupt, BrokenPipeError):
        pass
    os._exit(0)


def _tell(message: Work | Failure) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(message) + b"\n")
    sys.stdout.buffer.flush()


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    _thread.interrupt_main()
