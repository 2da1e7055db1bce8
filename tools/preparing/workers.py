"""More processes for preparing: a decompressor, of which a process has one at a time, feeds only a few threads.

A helper ends with the process that started it, even a killed one, because the pipe between the two ends then.
"""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from tools.preparing.pipeline import Pipeline, Work
from tools.preparing.text_encoders import TextEncoder
from tools.preparing.token_file import PrepareError
from tools.preparing.workspace import Settings, Workspace

THREADS = 4  # of a process: a thread does 200 MB of text a second, a decompressor 900 (results/prepare.json)
BYTES_A_PROCESS = 64 << 20  # of inputs; for less it is not worth starting one


class Job(msgspec.Struct):
    """What a helper is told."""

    file: str
    inputs: list[str]
    root: str
    mine: list[int]  # which of the inputs it may work on
    settings: Settings
    threads: int
    merging: bool


class Failure(msgspec.Struct, tag=True):
    """Why a helper gave up."""

    message: str
    errno: int | None = None
    path: str | None = None

    @classmethod
    def of(cls, error: PrepareError | OSError) -> "Failure":
        if isinstance(error, OSError):
            return cls(error.strerror or str(error), error.errno, error.filename and str(error.filename))
        return cls(str(error))

    def exception(self) -> PrepareError | OSError:
        return PrepareError(self.message) if self.errno is None else OSError(self.errno, self.message, self.path)


def available_cores() -> int:
    """Return the cores this process may use: its affinity, or less where a control group limits its time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no control groups, or their first version
        return cores


def shares(workers: int, size: int) -> list[int]:
    """Return the threads of each process; size: bytes of the files that are to be read."""
    processes = max(1, min(-(-workers // THREADS), size // BYTES_A_PROCESS))
    return [workers // processes + (i < workers % processes) for i in range(processes)]


class Helpers:
    """Processes that work on a workspace beside this one."""

    def __init__(
        self,
        workspace: Workspace,
        inputs: Sequence[Path],
        threads: Sequence[int],
        report: Callable[[Work], None],
        *,
        merging: bool,
    ) -> None:
        self._report = report
        self._failure: Failure | None = None
        job = Job(
            file=str(workspace.file.absolute()),
            inputs=[str(source.absolute()) for source in workspace.inputs],
            root=str(workspace.root.absolute()),
            mine=[workspace.number(source) for source in inputs],
            settings=workspace.settings,
            threads=1,
            merging=merging,
        )
        self._processes = [_start(msgspec.structs.replace(job, threads=count)) for count in threads]
        self._readers = [threading.Thread(target=self._read, args=[process]) for process in self._processes]
        for reader in self._readers:
            reader.start()

    def _read(self, process: subprocess.Popen) -> None:
        for line in process.stdout:
            message = msgspec.json.decode(line, type=Work | Failure)
            if isinstance(message, Failure):
                self._failure = message
            else:
                self._report(message)

    def wait(self) -> None:
        """Wait until none finds anything to do. PrepareError, or OSError, where one failed; one that died did not."""
        for process, reader in zip(self._processes, self._readers):
            reader.join()
            process.wait()
        if self._failure:
            raise self._failure.exception()

    def __enter__(self) -> "Helpers":
        return self

    def __exit__(self, *_: object) -> None:
        for process, reader in zip(self._processes, self._readers):
            process.stdin.close()
            reader.join()
            process.stdout.close()
            process.wait()


def _start(job: Job) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", "from tools.preparing.workers import help_out; help_out()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],  # where `tools` is found, installed or not
        start_new_session=True,  # a Ctrl-C reaches it as the end of the pipe
    )
    process.stdin.write(msgspec.json.encode(job) + b"\n")
    process.stdin.flush()
    return process


def help_out() -> None:
    """Do the job on standard input, reporting on standard output, for as long as standard input is open."""
    job = msgspec.json.decode(sys.stdin.buffer.readline(), type=Job)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        encoder = TextEncoder(job.settings.tokenizer)
        inputs = [Path(path) for path in job.inputs]
        workspace = Workspace(Path(job.file), inputs, job.settings, encoder.dtype, Path(job.root))
        with workspace.helping() as welcome:
            if welcome:
                with Pipeline(workspace, encoder, job.threads, _tell, merging=job.merging) as pipeline:
                    pipeline.run([workspace.inputs[i] for i in job.mine])
    except (PrepareError, OSError) as error:
        _tell(Failure.of(error))


def _tell(message: Work | Failure) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(message) + b"\n")
    sys.stdout.buffer.flush()


def _end_with_parent() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(1)  # at any moment, as a kill may be: what is finished is kept
