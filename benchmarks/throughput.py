"""Measure training: tokens/s, step time, MFU, peak memory; with --compare also what a person would pick instead.

    python benchmarks/throughput.py --preset 13m --compare
    python benchmarks/throughput.py --preset 2b --gpu_memory 24GB --steps 20 --out 2b-24GB.json
    python benchmarks/throughput.py --preset 2b --card v100 --out 2b-v100.json

Any field of the training configuration is a flag as well. Tokens are random and the same at every step: speed and
memory do not depend on them, and the loss falls as they are learnt by heart. With --card a larger GPU does what the
named one would: its memory, its number format, the kernels that dispatch gives it, PyTorch's fused attention as far as
it has one, and the plan made for it.
MFU is tokens/s times (6 N + 12 n_layer n_embd T) FLOPs a token (PaLM, 2022; attention in full, though a causal kernel
does half) of the contender's own model, over the chip's dense peak in the dtype used; a chip whose peak is not known
has none. Where that model is another, as the classic beside `gpt2`, its row says how. The peak memory is that of
tensors on a GPU and of the whole process on a CPU; "of a step" is what a step adds to what is held between steps.
Energy is NVML's. Each contender has a process of its own, and on a CPU they take turns, so that what disturbs the
machine disturbs them alike. Where another's micro-batch does not fit a GPU it gets smaller ones.
"""

import argparse
import multiprocessing
import os
import socket
import statistics
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.contenders import CONTENDERS, Step, Unsupported, not_installed
from benchmarks.environment import environment, write_result
from benchmarks.meters import (
    alloc_retries,
    energy_j,
    forget_peak,
    kernels_in_use,
    limit_attention,
    limit_memory,
    peak_bytes,
    step_bytes,
    within_minutes,
)
from engine import cards
from engine.cards import Card
from engine.command_line import parse, positive
from engine.config import Config, ConfigError, did_you_mean, require, settings
from engine.data import Batch
from engine.device import choose_device, choose_dtype, find_device
from engine.distributed import Processes
from engine.memory import Plan
from engine.model import GPT, flops_per_token
from engine.placement import host_memory, settle
from engine.report import human
from engine.step_time import chip_of
from kernels import dispatch

ROUNDS = 4  # turns that the contenders take on a CPU


def random_batches(config: Config, micro_batch_size: int, grad_accum: int, seed: int) -> list[Batch]:
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
            dispatch.force_chip(chip_of(job.card).target)
            limit_attention(chip_of(job.card))
        device, _ = choose_device(config.strategy.device, rank)
        if device.type == "cuda":
            limit_memory(device, job.gpu_memory)
        if processes.world_size > 1:
            processes.connect(device)
        dispatch.set_backend(config.strategy.kernels)
        dtype, _ = choose_dtype(config.strategy.dtype, device)
        kernels = kernels_in_use(device)
        config, grad_accum, plan = settle(config, device, dtype, job.processes, job.card)
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


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=positive, default=20, help="measured steps of each contender [20]")
    parser.add_argument("--warmup", type=positive, default=3, help="steps before them, not measured [3]")
    parser.add_argument(
        "--gpu_memory", help="use no more of the GPU than this, such as 24GB, or than this card has, such as rtx3090"
    )
    parser.add_argument(
        "--card", help="do as this one would, such as v100: its memory, number format, kernels and plan"
    )
    parser.add_argument(
        "--processes", type=positive, default=1, help="processes that share our batch, one for each GPU [1]"
    )
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    parser.add_argument(
        "--compare",
        nargs="?",
        const="all",
        metavar="NAMES",
        help=f"also measure others: all, or some of {', '.join(CONTENDERS)}",
    )
    options, rest = parser.parse_known_args(arguments)
    try:
        config = config_of(rest, options)
        wanted = {None: ["pilesmith"], "all": list(CONTENDERS)}.get(options.compare) or [
            "pilesmith",
            *options.compare.split(","),
        ]
        require(set(wanted) <= set(CONTENDERS), f"--compare knows {', '.join(CONTENDERS)}; got {options.compare}")
        require(options.processes == 1 or len(wanted) == 1, "--compare runs in one process: leave --processes out")
        card = cards.get(options.card) if options.card else None
        gpu_memory = cards.parse_memory(options.gpu_memory) if options.gpu_memory else card and card.memory_bytes
        device, reason = find_device(config.strategy.device)  # its memory is for the processes that measure
        config = within_minutes(config, device, options.processes)
        dispatch.force_chip(chip_of(card).target if card else None)
        dtype, _ = choose_dtype(config.strategy.dtype, device)
        dispatch.force_chip(None)  # the processes that measure pretend; this one need not
    except ValueError as error:  # ConfigError is one
        print(f"error: {error}", file=sys.stderr)
        return 2
    with torch.device("meta"):
        n_parameters = GPT(config.model).num_parameters()
    flops = flops_per_token(config.model, n_parameters)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    peak = cards.peak_flops(name, dtype)
    print(
        f"{config.preset}: {n_parameters:,} parameters; {device} ({reason}), {str(dtype).removeprefix('torch.')}",
        flush=True,
    )
    if gpu_memory and device.type != "cuda":
        asked = f"--gpu_memory {options.gpu_memory}" if options.gpu_memory else f"the memory of --card {options.card}"
        print(f"{asked} is not imposed: no GPU here", file=sys.stderr)
    jobs = {name: Job(name, config, gpu_memory, card, options.processes) for name in dict.fromkeys(wanted)}
    payload = {
        "benchmark": "throughput",
        "environment": environment(device),
        "config": config.to_dict(),
        "dtype": str(dtype).removeprefix("torch."),
        "n_parameters": n_parameters,
        "processes": options.processes,
        "threads": torch.get_num_threads(),
        "gpu_memory_bytes": gpu_memory,
        "host_memory_bytes": host_memory(config.strategy.host_memory),
        "card": card and card.name,
        "flops_per_token": flops,
        "peak_flops": peak,
        "plan": None,
        "kernels": {},
        "results": {},
    }
    for contender, measured in compare(jobs, device, options.warmup, options.steps):
        if isinstance(measured, Measured):
            payload["results"][contender] = summarise(measured, peak and peak * options.processes)
        else:
            payload["results"][contender] = measured
        if contender == "pilesmith" and isinstance(measured, Measured):
            payload |= {"config": measured.config.to_dict(), "plan": measured.plan, "kernels": measured.kernels}
        if options.out:  # after each: one that hangs does not take the others' figures with it
            write_result(options.out, payload)
    show(payload)
    return 1 if isinstance(payload["results"]["pilesmith"], str) else 0


def config_of(flags: list[str], options: argparse.Namespace) -> Config:
    """Return the configuration of a training run by the flags that a program with `options` of its own leaves.

    ConfigError as `parse`; a mistyped flag may be meant for either.
    """
    known = settings()
    for flag in flags:
        name = flag.removeprefix("--").partition("=")[0].replace("-", "_")
        unknown = flag.startswith("--") and name not in {*known, "config", "resume"}
        require(not unknown, f"unknown flag {flag!r}{did_you_mean(name, [*vars(options), *known])}")
    return parse(flags)[0]


def show(payload: dict[str, Any]) -> None:
    config, results = payload["config"], payload["results"]
    tokens, sequences = (config["optimizer"][key] for key in ("batch_tokens", "micro_batch_size"))
    print(f"a step is {tokens} tokens, a micro-batch {sequences} sequences of {config['model']['block_size']}")
    ours = results["pilesmith"]
    print(f"{'':20}{'tokens/s':>10}{'step':>10}{'MFU':>8}{'tokens/J':>10}{'peak':>11}{'of a step':>11}{'ours is':>10}")
    for name, row in results.items():
        if isinstance(row, str):
            print(f"{name:20}{row}")
            continue
        mfu = f"{row['mfu']:.1%}" if row["mfu"] else "unknown"
        energy = f"{row['tokens_per_j']:.1f}" if row["tokens_per_j"] else "unknown"
        ratio = (
            f"{ours['tokens_per_s'] / row['tokens_per_s']:.2f}x"
            if not isinstance(ours, str) and name != "pilesmith"
            else ""
        )
        print(
            f"{name:20}{human(row['tokens_per_s']):>10}{row['step_s'] * 1e3:>8.0f}ms{mfu:>8}{energy:>10}"
            f"{row['peak_bytes'] / 2**20:>8.0f}MiB{row['step_bytes'] / 2**20:>8.0f}MiB{ratio:>10}"
        )


if __name__ == "__main__":
    sys.exit(main())
