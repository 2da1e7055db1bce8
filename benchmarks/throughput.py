"""Measure training: tokens/s, step time, MFU, peak memory; with --compare also what a person would pick instead.

    python benchmarks/throughput.py --preset 13m --compare
    python benchmarks/throughput.py --preset 2b --gpu_memory 24GB --steps 20 --out benchmarks/results/2b-24GB.json

Any field of the training configuration is a flag as well. Tokens are random: speed and memory do not depend on them.
MFU is tokens/s times (6 N + 12 n_layer n_embd T) FLOPs a token (PaLM, 2022; attention in full, though a causal kernel
does half) over the chip's dense peak in the dtype used; a chip whose peak is not known has none. The peak memory is
that of tensors on a GPU and of the whole process on a CPU; "of a step" is what a step adds to what is held between
steps. Energy is NVML's. Each contender has a process of its own, and on a CPU they take turns, so that what disturbs
the machine disturbs them alike.
"""
import argparse
import multiprocessing
import statistics
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.contenders import CONTENDERS, Step, Unsupported
from benchmarks.environment import environment, write_result
from benchmarks.meters import energy_j, forget_peak, limit_memory, peak_bytes, step_bytes
from engine import cards
from engine.config import Config, ConfigError, parse, require
from engine.data import Batch
from engine.device import choose_device, choose_dtype
from engine.model import GPT, flops_per_token
from engine.report import human
from engine.train import derive_batch
from kernels import dispatch

ROUNDS = 4  # turns that the contenders take on a CPU


def parse_bytes(text: str) -> int:
    """Return what "24GB", "24GiB" or a card's name says, in bytes: for a card what its driver offers to programs.

    Memory is sold in units of 2^30 bytes, whatever the label says. ConfigError for anything else.
    """
    number = text.strip().upper().removesuffix("B").removesuffix("I").removesuffix("G")
    if number.replace(".", "", 1).isdigit():
        return int(float(number) * 2**30)
    card = cards.find(text)
    require(card is not None, f"--gpu_memory takes a size such as 24GB or a card such as rtx3090, got {text!r}")
    return card.memory_bytes


def random_batches(config: Config, micro_batch_size: int, grad_accum: int, seed: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    shape = (micro_batch_size, config.model.block_size + 1)
    rows = (torch.randint(min(50257, config.model.vocab_size), shape, generator=generator) for _ in range(grad_accum))
    return [Batch(row[:, :-1].contiguous(), row[:, 1:].contiguous()) for row in rows]


@dataclass
class Measured:
    """What a contender's process told: (seconds, loss) of each timed step, memory, and the joules of all timed steps."""

    steps: list[tuple[float, float]] = field(default_factory=list)
    first_loss: float = 0.0
    step_bytes: int = 0
    peak_bytes: int = 0
    reserved_bytes: int = 0
    energy_j: float | None = 0.0

    def add(self, answer: dict[str, Any]) -> None:
        self.first_loss = answer.get("first_loss", self.first_loss)
        self.step_bytes = answer.get("step_bytes", self.step_bytes)
        self.peak_bytes = max(self.peak_bytes, answer["peak_bytes"])
        self.reserved_bytes = max(self.reserved_bytes, answer["reserved_bytes"])
        self.steps += answer.get("steps", [])
        if "energy_j" in answer:
            self.energy_j = None if None in (self.energy_j, answer["energy_j"]) else self.energy_j + answer["energy_j"]


def measure(name: str, config: Config, gpu_memory: int | None, threads: int, channel: Connection) -> None:
    """Runs in a contender's own process: build, warm up, answer with the memory, then with the times of the steps asked for."""
    torch.set_num_threads(threads)
    torch.manual_seed(config.seed)
    device, _ = choose_device(config.strategy.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        limit_memory(device, gpu_memory)
    dispatch.set_backend(config.strategy.kernels)
    dtype, _ = choose_dtype(config.strategy.dtype, device)
    micro_batch_size, grad_accum = derive_batch(config, 1, device)
    batches = random_batches(config, micro_batch_size, grad_accum, config.seed)
    try:
        step = CONTENDERS[name](config, device, dtype, grad_accum)
        forget_peak(device)
        losses = [step(batches).item() for _ in range(channel.recv())]
        warm = peak_bytes(device)  # the first step makes the moments: it may need more than any other
        channel.send({"first_loss": losses[0], "step_bytes": step_bytes(lambda: step(batches).item(), device)} | warm)
        while steps := channel.recv():
            joules = energy_j(device)
            timed = [timed_step(step, batches) for _ in range(steps)]
            used = None if joules is None else energy_j(device) - joules
            channel.send({"steps": timed, "energy_j": used} | peak_bytes(device))
    except Unsupported as reason:
        channel.send(f"not run: {reason}")
    except torch.OutOfMemoryError as error:
        channel.send(f"out of memory: {str(error).splitlines()[0]}")


def timed_step(step: Step, batches: list[Batch]) -> tuple[float, float]:
    """Return the seconds and the loss of one step."""
    began = time.perf_counter()
    loss = step(batches).item()  # item() waits for the device
    return time.perf_counter() - began, loss


def compare(names: list[str], config: Config, gpu_memory: int | None, warmup: int, steps: int) -> dict[str, Measured | str]:
    """Return what was measured of each contender, or why nothing was. On a CPU they take turns, on a GPU they follow."""
    device, _ = choose_device(config.strategy.device)
    if device.type == "cuda":
        return {name: take_turns([name], config, gpu_memory, warmup, steps, rounds=1)[name] for name in names}
    return take_turns(names, config, gpu_memory, warmup, steps, ROUNDS)


def take_turns(
    names: list[str], config: Config, gpu_memory: int | None, warmup: int, steps: int, rounds: int
) -> dict[str, Measured | str]:
    context = multiprocessing.get_context("spawn")
    channels: dict[str, Connection] = {}
    results: dict[str, Measured | str] = {}

    def ask(name: str, count: int) -> None:
        with suppress(BrokenPipeError):  # one that cannot run has said so and gone
            channels[name].send(count)
        try:
            answer = channels[name].recv()
        except (EOFError, ConnectionResetError):
            answer = "failed: its process ended; the error is above"
        if isinstance(answer, str):
            results[name] = answer
            del channels[name]
        else:
            results.setdefault(name, Measured()).add(answer)

    for name in names:
        channels[name], theirs = context.Pipe()
        context.Process(target=measure, args=(name, config, gpu_memory, torch.get_num_threads(), theirs), daemon=True).start()
        theirs.close()
    for name in names:
        ask(name, warmup)
    for turn in range(min(rounds, steps)):
        for name in list(channels):
            ask(name, (turn + 1) * steps // min(rounds, steps) - turn * steps // min(rounds, steps))
    for channel in channels.values():
        channel.send(0)
    return results


def summarise(measured: Measured, config: Config, peak_flops_s: float | None, flops: int) -> dict[str, Any]:
    """Return what the result file says of a contender; energy only where the GPU counts it."""
    seconds = [s for s, _ in measured.steps]
    median = statistics.median(seconds)
    tokens_per_s = config.optimizer.batch_tokens / median
    energy = measured.energy_j
    return {
        "tokens_per_s": tokens_per_s,
        "step_s": median,
        "step_s_quartiles": statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else [median] * 3,
        "steps": len(seconds),
        "mfu": tokens_per_s * flops / peak_flops_s if peak_flops_s else None,
        "tokens_per_j": None if energy is None else len(seconds) * config.optimizer.batch_tokens / energy,
        "peak_bytes": measured.peak_bytes,
        "reserved_bytes": measured.reserved_bytes,
        "step_bytes": measured.step_bytes,
        "first_loss": measured.first_loss,
        "last_loss": measured.steps[-1][1],
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="measured steps of each contender [20]")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them, not measured [3]")
    parser.add_argument("--gpu_memory", help="use no more of the GPU than this, such as 24GB, or than this card has, such as rtx3090")
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    parser.add_argument("--compare", nargs="?", const="all", metavar="NAMES", help=f"also measure others: all, or some of {', '.join(CONTENDERS)}")
    options, rest = parser.parse_known_args(arguments)
    try:
        config, _ = parse(rest)
        require(options.steps > 0 and options.warmup > 0, "--steps and --warmup must be positive")
        wanted = {None: ["pilesmith"], "all": list(CONTENDERS)}.get(options.compare) or ["pilesmith", *options.compare.split(",")]
        require(set(wanted) <= set(CONTENDERS), f"--compare knows {', '.join(CONTENDERS)}; got {options.compare}")
        gpu_memory = parse_bytes(options.gpu_memory) if options.gpu_memory else None
        device, reason = choose_device(config.strategy.device)
        dtype, _ = choose_dtype(config.strategy.dtype, device)
        micro_batch_size, grad_accum = derive_batch(config, 1, device)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with torch.device("meta"):
        n_parameters = GPT(config.model).num_parameters()
    flops = flops_per_token(config.model, n_parameters)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    peak = cards.peak_flops(name, dtype)
    print(f"{config.preset}: {n_parameters:,} parameters; {device} ({reason}), {str(dtype).removeprefix('torch.')}; a step is "
          f"{config.optimizer.batch_tokens} tokens: {grad_accum} x {micro_batch_size} x {config.model.block_size}")  # fmt: skip
    measured = compare(list(dict.fromkeys(wanted)), config, gpu_memory, options.warmup, options.steps)
    results = {n: m if isinstance(m, str) else summarise(m, config, peak, flops) for n, m in measured.items()}
    show(results)
    payload = {
        "benchmark": "throughput",
        "environment": environment(),
        "config": config.to_dict(),
        "dtype": str(dtype).removeprefix("torch."),
        "n_parameters": n_parameters,
        "micro_batch_size": micro_batch_size,
        "grad_accum": grad_accum,
        "threads": torch.get_num_threads(),
        "gpu_memory_bytes": gpu_memory,
        "flops_per_token": flops,
        "peak_flops": peak,
        "results": results,
    }
    if options.out:
        write_result(options.out, payload)
    return 1 if isinstance(results["pilesmith"], str) else 0


def show(results: dict[str, Any]) -> None:
    ours = results["pilesmith"]
    print(f"{'':20}{'tokens/s':>10}{'step':>10}{'MFU':>8}{'peak':>11}{'of a step':>11}{'ours is':>10}")
    for name, row in results.items():
        if isinstance(row, str):
            print(f"{name:20}{row}")
            continue
        mfu = f"{row['mfu']:.1%}" if row["mfu"] else "unknown"
        ratio = f"{ours['tokens_per_s'] / row['tokens_per_s']:.2f}x" if not isinstance(ours, str) and name != "pilesmith" else ""
        print(
            f"{name:20}{human(row['tokens_per_s']):>10}{row['step_s'] * 1e3:>8.0f}ms{mfu:>8}"
            f"{row['peak_bytes'] / 2**20:>8.0f}MiB{row['step_bytes'] / 2**20:>8.0f}MiB{ratio:>10}"
        )


if __name__ == "__main__":
    sys.exit(main())
