"""Measure training steps: each contender in processes of its own, in turns on a CPU, one after the other on a GPU."""

import multiprocessing
import os
import socket
import statistics
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks.contenders import CONTENDERS, Step, Unsupported, not_installed
from benchmarks.meters import (
    alloc_retries,
    energy_j,
    forget_peak,
    kernels_in_use,
    limit_attention,
    limit_memory,
    peak_bytes,
    step_bytes,
)
from engine.cards import Card
from engine.command_line import beyond_ctrl_c
from engine.config import Config, ConfigError
from engine.data import Batch
from engine.device import choose_device, choose_dtype
from engine.distributed import Processes
from engine.memory import Plan
from engine.placement import settle
from engine.step_time import chip_of
from kernels import dispatch

ROUNDS = 4  # turns that the contenders take on a CPU


def random_batches(config: Config, micro_batch_size: int, grad_accum: int, seed: int) -> list[Batch]:
    """Return `grad_accum` micro-batches of random tokens and targets, each int64 (micro_batch_size, block_size)."""
    generator = torch.Generator().manual_seed(seed)
    shape = (micro_batch_size, config.model.block_size + 1)
    rows = (torch.randint(min(50257, config.model.vocab_size), shape, generator=generator) for _ in range(grad_accum))
    return [Batch(row[:, :-1].contiguous(), row[:, 1:].contiguous()) for row in rows]


@dataclass(frozen=True)
class Job:
    """What is measured: a contender with a config, in one process or in several that share its batch.

    gpu_memory: bytes, no more than these; card: do as this one would.
    """

    contender: str
    config: Config
    gpu_memory: int | None = None
    card: Card | None = None
    processes: int = 1
    threads: int = field(default_factory=torch.get_num_threads)


@dataclass
class Measured:
    """What a job's first process told.

    config: with the open choices made; plan: the planner's bytes by part, on a card; kernels: op -> backend; losses: of
    the steps before the timed ones; n_parameters, flops_per_token, differs: as a `Step` has them; steps: (seconds,
    loss) of each timed step; memory: `step_bytes`, `peak_bytes`, `reserved_bytes`; energy_j: joules of all timed steps;
    alloc_retries: how often in them memory was unmapped to make room, which takes long.
    """

    config: Config
    plan: dict[str, Any] | None
    kernels: dict[str, str]
    losses: list[float]
    n_parameters: int
    flops_per_token: int
    differs: str = ""
    step_bytes: int = 0
    peak_bytes: int = 0
    reserved_bytes: int = 0
    steps: list[tuple[float, float]] = field(default_factory=list)
    energy_j: float | None = 0.0
    alloc_retries: int = 0

    def saw(self, peak_bytes: int, reserved_bytes: int) -> None:
        self.peak_bytes = max(self.peak_bytes, peak_bytes)
        self.reserved_bytes = max(self.reserved_bytes, reserved_bytes)


@dataclass(frozen=True)
class OutOfMemory:
    """The device's words, and the micro-batch that did not fit, None where it was not chosen yet."""

    message: str
    micro_batch_size: int | None


Outcome = Measured | OutOfMemory | str  # the last: why there is nothing to tell


def measure(job: Job, rank: int, port: int, channel: Connection) -> None:
    """Runs in a process of its own: build and warm up, tell the memory, then time as many steps as are asked for."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job.processes)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(job.threads)
    torch.manual_seed(job.config.seed)
    processes, config = Processes.from_environment(), job.config
    try:
        if job.card:
            dispatch.force_chip(chip_of(job.card))
            limit_attention(chip_of(job.card))
        device, _ = choose_device(config.strategy.device, rank)
        if device.type == "cuda":
            limit_memory(device, job.gpu_memory)
        if processes.world_size > 1:
            processes.connect(device)
        dispatch.set_backend(config.strategy.kernels)
        dtype, _ = choose_dtype(config.strategy.dtype, device)
        kernels = kernels_in_use(device)
        config, grad_accum, plan = settle(config, device, dtype, processes, job.card)
        if device.type == "cuda":
            limit_memory(device, job.gpu_memory, context_counts=True)
        batches = random_batches(config, config.optimizer.micro_batch_size, grad_accum, config.seed + rank)
        step = CONTENDERS[job.contender](config, device, dtype, grad_accum, processes)
        forget_peak(device)
        losses = [step(batches).item() for _ in range(channel.recv())]
        about = {"n_parameters": step.n_parameters, "flops_per_token": step.flops_per_token, "differs": step.differs}
        measured = Measured(config, plan and describe(plan), kernels, losses, **about)
        measured.saw(**peak_bytes(device))  # the first step makes the moments: it may need more than any other
        measured.step_bytes = step_bytes(lambda: losses.append(step(batches).item()), device)
        channel.send(measured)
        while steps := channel.recv():
            joules, retries = energy_j(device), alloc_retries(device)
            measured.steps += [timed_step(step, batches) for _ in range(steps)]
            measured.energy_j = None if joules is None else measured.energy_j + energy_j(device) - joules
            measured.alloc_retries += alloc_retries(device) - retries
            measured.saw(**peak_bytes(device))
            channel.send(measured)
    except (Unsupported, ConfigError) as reason:
        channel.send(f"not run: {reason}")
    except torch.OutOfMemoryError as error:
        channel.send(OutOfMemory(str(error).splitlines()[0], config.optimizer.micro_batch_size))
    except Exception as error:  # another's fault is a finding, and ends nobody else's measurement
        traceback.print_exc()
        channel.send(f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
    finally:
        processes.close()


def describe(plan: Plan) -> dict[str, Any]:
    """Return what the result file says of the planner's choice."""
    footprint = plan.footprint
    allocated = {part: size for part, size in footprint.card.items() if part != "context" and size}
    return {
        "name": plan.name,
        "parts": allocated,
        "allocated_bytes": footprint.allocated_bytes,
        "host_bytes": plan.host_bytes,
    }


def timed_step(step: Step, batches: list[Batch]) -> tuple[float, float]:
    """Return the seconds and the loss of one step."""
    began = time.perf_counter()
    loss = step(batches).item()  # item() waits for the device
    return time.perf_counter() - began, loss


def compare(
    jobs: dict[str, Job], device: torch.device, warmup: int, steps: int
) -> Iterator[tuple[str, Measured | str]]:
    """Yield what was measured of each job, or why nothing was. On a CPU they take turns, on a GPU they follow."""
    if device.type == "cpu":
        yield from take_turns(jobs, warmup, steps, ROUNDS).items()
        return
    for name, job in jobs.items():
        yield name, largest_that_fits(name, job, warmup, steps)


def largest_that_fits(name: str, job: Job, warmup: int, steps: int) -> Measured | str:
    """Return what was measured of a job; another's than ours may run with smaller micro-batches where it must."""
    result = take_turns({name: job}, warmup, steps, rounds=1)[name]
    while isinstance(result, OutOfMemory) and job.contender != "pilesmith" and (result.micro_batch_size or 1) % 2 == 0:
        optimizer = replace(job.config.optimizer, micro_batch_size=result.micro_batch_size // 2)
        job = replace(job, config=replace(job.config, optimizer=optimizer))
        result = take_turns({name: job}, warmup, steps, rounds=1)[name]
    return f"out of memory: {result.message}" if isinstance(result, OutOfMemory) else result


def take_turns(jobs: dict[str, Job], warmup: int, steps: int, rounds: int) -> dict[str, Outcome]:
    """Return what came of each job by name: `warmup` steps of all of them, then `steps` timed ones of each.

    They take these in `rounds` turns, all in processes that live until the end.
    """
    missing = {name: not_installed(job.contender) for name, job in jobs.items()}
    results: dict[str, Outcome] = {
        n: f"not run: {package} is not installed" for n, package in missing.items() if package
    }
    running = {name: Running(job) for name, job in jobs.items() if name not in results}
    rounds = min(rounds, steps)
    for turn in range(rounds + 1):  # 0: warm up, all of them before any is timed
        count = warmup if turn == 0 else turn * steps // rounds - (turn - 1) * steps // rounds
        for name in list(running):
            results[name] = running[name].run(count)
            if not isinstance(results[name], Measured):
                running.pop(name).end()
    for job in running.values():
        job.end()
    return {name: results[name] for name in jobs}


class Running:
    """A job's processes, as the one that waits for them sees it."""

    def __init__(self, job: Job) -> None:
        context = multiprocessing.get_context("spawn")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.channels, self.processes = [], []
        for rank in range(job.processes):
            mine, theirs = context.Pipe()
            self.channels.append(mine)
            self.processes.append(context.Process(target=measure, args=(job, rank, port, theirs), daemon=True))
            with beyond_ctrl_c():
                self.processes[-1].start()
            theirs.close()

    def run(self, steps: int) -> Outcome:
        """Return what is measured once it has done `steps` more, or why it cannot."""
        self._send(steps)
        try:
            answers = [channel.recv() for channel in self.channels]
        except (EOFError, ConnectionResetError):
            return "failed: its process was ended"
        return next((a for a in answers if not isinstance(a, Measured)), answers[0])

    def end(self) -> None:
        self._send(0)
        for process in self.processes:
            process.join(timeout=20)
            process.kill()

    def _send(self, steps: int) -> None:
        for channel in self.channels:
            with suppress(BrokenPipeError):  # one that cannot run has said so and gone
                channel.send(steps)


def summarise(measured: Measured, peak_flops_s: float | None) -> dict[str, Any]:
    """Return what the result file says of a contender: MFU by its own FLOPs, energy where the GPU counts it."""
    seconds = [s for s, _ in measured.steps]
    median, batch_tokens = statistics.median(seconds), measured.config.optimizer.batch_tokens
    tokens_per_s = batch_tokens / median
    energy = measured.energy_j
    return {
        "n_parameters": measured.n_parameters,
        "differs": measured.differs,
        "tokens_per_s": tokens_per_s,
        "step_s": median,
        "step_s_quartiles": statistics.quantiles(seconds, n=4, method="inclusive")
        if len(seconds) > 1
        else [median] * 3,
        "steps": len(seconds),
        "mfu": tokens_per_s * measured.flops_per_token / peak_flops_s if peak_flops_s else None,
        "tokens_per_j": len(seconds) * batch_tokens / energy if energy else None,
        "peak_bytes": measured.peak_bytes,
        "reserved_bytes": measured.reserved_bytes,
        "step_bytes": measured.step_bytes,
        "alloc_retries": measured.alloc_retries,
        "micro_batch_size": measured.config.optimizer.micro_batch_size,
        "losses": measured.losses + [loss for _, loss in measured.steps],
    }
