"""Measure training: tokens/s, step time, MFU, peak memory; with --compare also what a person would pick instead.

    python benchmarks/throughput.py --preset 13m --compare
    python benchmarks/throughput.py --preset 2b --gpu_memory 24GB --steps 20 --out benchmarks/results/2b-24GB.json

Any field of the training configuration is a flag as well. Tokens are random: speed and memory do not depend on them.
MFU is tokens/s times (6 N + 12 n_layer n_embd T) FLOPs a token (PaLM, 2022; attention in full, though a causal kernel
does half) over the chip's dense peak in the dtype used; a chip whose peak is not known has none. Each contender has a
process of its own, and on a CPU they take turns, so that what disturbs the machine disturbs them alike.
"""
import argparse
import multiprocessing
import statistics
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.contenders import CONTENDERS, Unsupported
from benchmarks.environment import environment, write_result
from engine.cards import peak_flops
from engine.config import Config, ConfigError, parse, require
from engine.data import Batch
from engine.device import choose_device, choose_dtype
from engine.model import GPT, flops_per_token
from engine.report import human
from engine.train import derive_batch
from kernels import dispatch

ROUNDS = 4  # turns that the contenders take on a CPU


def parse_bytes(text: str) -> int:
    """Return "24GB" or "24GiB" as bytes: cards are sold in units of 2^30, whatever the label says."""
    number = text.strip().upper().removesuffix("B").removesuffix("I").removesuffix("G")
    require(number.replace(".", "", 1).isdigit(), f"a memory size looks like 24GB, got {text!r}")
    return int(float(number) * 2**30)


def random_batches(config: Config, micro_batch_size: int, grad_accum: int, seed: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    shape = (micro_batch_size, config.model.block_size + 1)
    rows = (torch.randint(50257, shape, generator=generator) for _ in range(grad_accum))
    return [Batch(row[:, :-1].contiguous(), row[:, 1:].contiguous()) for row in rows]


def measure(name: str, config: Config, gpu_memory: int | None, threads: int, channel: Connection) -> None:
    """Runs in a contender's own process: build, then answer each number of steps with their times and memory."""
    torch.set_num_threads(threads)
    torch.manual_seed(config.seed)
    device, _ = choose_device(config.strategy.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        if gpu_memory:
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, gpu_memory / total), device)
    dispatch.set_backend(config.strategy.kernels)
    dtype, _ = choose_dtype(config.strategy.dtype, device)
    micro_batch_size, grad_accum = derive_batch(config, 1, device)
    batches = random_batches(config, micro_batch_size, grad_accum, config.seed)
    try:
        step = CONTENDERS[name](config, device, dtype, grad_accum)
        while steps := channel.recv():
            channel.send([_timed_step(step, batches, device) for _ in range(steps)])
    except Unsupported as reason:
        channel.send(f"not run: {reason}")
    except torch.OutOfMemoryError as error:
        channel.send(f"out of memory: {str(error).splitlines()[0]}")


def _timed_step(step: Any, batches: list[Batch], device: torch.device) -> dict[str, float]:
    """One step: seconds, loss, and the bytes it held at its peak, in all and above what it began with."""
    before = _reset_peak(device)
    began = time.perf_counter()
    loss = step(batches).item()  # item() waits for the device
    seconds = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status_bytes("VmHWM")
    reserved = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else peak
    return {"seconds": seconds, "loss": loss, "peak_bytes": peak, "reserved_bytes": reserved, "step_bytes": peak - before}


def _reset_peak(device: torch.device) -> int:
    """Forget the peak so far and return the bytes held now."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")  # Linux: VmHWM begins again at VmRSS
    return _status_bytes("VmRSS")


def _status_bytes(field: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def compare(names: list[str], config: Config, gpu_memory: int | None, warmup: int, steps: int) -> dict[str, list[dict[str, float]] | str]:
    """Return each contender's measured steps, or why there are none. On a CPU they take turns, on a GPU they follow."""
    device, _ = choose_device(config.strategy.device)
    if device.type == "cuda":
        return {name: _take_turns([name], config, gpu_memory, warmup, steps, rounds=1)[name] for name in names}
    return _take_turns(names, config, gpu_memory, warmup, steps, ROUNDS)


def _take_turns(names: list[str], config: Config, gpu_memory: int | None, warmup: int, steps: int, rounds: int) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    channels, results = {}, {name: [] for name in names}
    for name in names:
        channels[name], theirs = context.Pipe()
        context.Process(target=measure, args=(name, config, gpu_memory, torch.get_num_threads(), theirs), daemon=True).start()
        theirs.close()
    for turn in range(rounds + 1):  # turn 0 warms up
        for name in list(channels):
            share = warmup if turn == 0 else steps // rounds + (turn <= steps % rounds)
            try:
                channels[name].send(share)
                answer = channels[name].recv() if share else []
            except (EOFError, BrokenPipeError):
                answer = "failed: its process ended; the error is above"
            if isinstance(answer, str):
                results[name] = answer
                del channels[name]
            elif turn:
                results[name] += answer
    for channel in channels.values():
        channel.send(0)
    return results


def summarise(measured: list[dict[str, float]], config: Config, peak: float | None, flops: int) -> dict[str, Any]:
    seconds = sorted(m["seconds"] for m in measured)
    median = statistics.median(seconds)
    tokens_per_s = config.optimizer.batch_tokens / median
    return {
        "tokens_per_s": tokens_per_s,
        "step_s": median,
        "step_s_quartiles": statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [median] * 3,
        "steps": len(seconds),
        "mfu": tokens_per_s * flops / peak if peak else None,
        "peak_bytes": max(m["peak_bytes"] for m in measured),
        "reserved_bytes": max(m["reserved_bytes"] for m in measured),
        "step_bytes": statistics.median(m["step_bytes"] for m in measured),
        "first_loss": measured[0]["loss"],
        "last_loss": measured[-1]["loss"],
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="measured steps of each contender [20]")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them [3]")
    parser.add_argument("--gpu_memory", help="use no more than this much of the GPU, such as 24GB")
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    parser.add_argument("--compare", nargs="?", const="all", metavar="NAMES", help=f"also measure others: all, or some of {', '.join(CONTENDERS)}")
    options, rest = parser.parse_known_args(arguments)
    try:
        config, _ = parse(rest)
        require(options.steps > 0 and options.warmup >= 0, "--steps must be positive and --warmup not negative")
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
    peak = peak_flops(name, dtype)
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
