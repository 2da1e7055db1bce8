"""Profile one training step: where its time and its memory go, by part of the model.

    python tools/profile_step.py --preset 13m
    python tools/profile_step.py --preset 2b --micro_batch_size 4 --out runs/profile-2b

Any field of the training configuration is a flag as well. Writes into --out: trace.json.gz (open it in
https://ui.perfetto.dev), memory.png (what is held over time, by the part that asked for it) and profile.json (the
tables). Tokens are random; the step is one of the run's own strategy, after a few that warm it up. The profiler slows
a step; the time without it is told beside. An operation's roofline is the time that its FLOPs at the peak, or its bytes
at full bandwidth, would take: of the card where engine/cards.py has it, else as a large product and a copy reach here.
"""

import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.charts import draw_timelines, timelines_data
from benchmarks.contenders import some_weights
from benchmarks.environment import environment, write_result
from benchmarks.measuring import random_batches
from benchmarks.meters import kernels_in_use, within_minutes
from engine import cards
from engine.command_line import CommandLine, config_of, ends_on_ctrl_c, positive
from engine.config import Config, ConfigError, require
from engine.device import choose_device, choose_dtype
from engine.distributed import Processes
from engine.model import GPT
from engine.placement import settle
from engine.report import human
from engine.strategy import Strategy, build
from kernels import dispatch
from tools.profiling.memory import timeline
from tools.profiling.parts import PARTS, Attributed, Operation, attribute, busy_seconds, scope, scoped


@ends_on_ctrl_c()
def main(arguments: list[str] | None = None) -> int:
    parser = CommandLine(__doc__)
    parser.add_argument(
        "--warmup", type=positive, default=3, help="steps before the profiled one, of which the last ones are timed [3]"
    )
    parser.add_argument(
        "--out", type=Path, help="folder for the trace, the picture and the tables [runs/profile-PRESET]"
    )
    parser.add_argument("--json", type=Path, help="write the tables here as well, for benchmarks/results/")
    options, rest = parser.parse_known_args(arguments)
    try:
        config = config_of(rest, options)
        require(not config.strategy.compile, "--compile fuses the parts that are to be told apart: profile without it")
        device, _ = choose_device(config.strategy.device)
        dispatch.set_backend(config.strategy.kernels)
        dtype, _ = choose_dtype(config.strategy.dtype, device)
        kernels_in_use(device)
        config, grad_accum, _ = settle(within_minutes(config, device), device, dtype, Processes())
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own messages say nothing to a person
        folder = options.out or Path(f"runs/profile-{config.preset}")
        require(folder.is_dir() or not folder.exists(), f"--out {folder} is a file: name a folder")
        folder.mkdir(parents=True, exist_ok=True)
        payload = measure(config, device, dtype, grad_accum, options.warmup, folder / "trace.json.gz")
        draw_timelines(timelines_data({"": payload})).savefig(folder / "memory.png", dpi=110)
        show(payload)
        for path in (folder / "profile.json", options.json):
            if path:
                write_result(path, payload)
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        print(f"error: out of memory: {str(error).splitlines()[0]}: try --micro_batch_size 1", file=sys.stderr)
        return 2
    print(f"written to {folder}: trace.json.gz (ui.perfetto.dev), memory.png, profile.json")
    return 0


def measure(
    config: Config, device: torch.device, dtype: torch.dtype, grad_accum: int, warmup: int, trace: Path
) -> dict[str, Any]:
    """Run and profile a step; return what is written of it."""
    model = GPT.outline(config.model)
    strategy = build(config, model, Processes(), device, dtype, grad_accum, some_weights(model, config.seed))
    batches = random_batches(config, config.optimizer.micro_batch_size, grad_accum, config.seed)
    strategy.set_lr(config.optimizer.lr)

    def step() -> None:
        strategy.step(strategy.forward_backward(batches))
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    times = [_seconds(step) for _ in range(warmup)]
    scope(model)
    strategy.step = scoped(strategy.step, "optimizer")
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities):  # the first time, CUPTI starts and our ops enter torch.library, with Inductor
        step()
    held = _held_bytes(strategy, device)
    with profile(activities=activities, record_shapes=True, profile_memory=True) as profiler:
        profiled_s = _seconds(step)
    profiler.export_chrome_trace(str(trace))
    events = profiler.events()
    attributed = attribute(events, on_gpu, dtype.itemsize)
    busy = busy_seconds(events) if on_gpu else sum(t.total for t in attributed.parts.values())
    attributed.parts["idle"].neither = max(0.0, profiled_s - busy)
    line = timeline(profiler, device.type, held)
    peaks = find_peaks(device, dtype)
    return {
        "benchmark": "profile",
        "environment": environment(device),
        "config": config.to_dict(),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "strategy": strategy.describe(),
        "step_s": statistics.median(times[len(times) // 2 :]),
        "profiled_step_s": profiled_s,
        "parts": part_rows(attributed, profiled_s),
        "peaks": peaks,
        "operations": operation_rows(attributed, peaks),
        "memory": {"held_bytes": held, "peak_bytes": line.peak[1], "timeline": line.to_dict()},
    }


def _seconds(step: Any) -> float:
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def _held_bytes(strategy: Strategy, device: torch.device) -> int:
    """The bytes of tensors between steps: what the allocator says, or on a CPU weights and moments."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return sum(t.nbytes for _, tensors in strategy.state() for t in tensors.values())


def part_rows(attributed: Attributed, step_s: float) -> list[dict[str, Any]]:
    """Return the seconds of each part that took any, forward, backward and in all, and its share of `step_s`."""
    rows = []
    for part in PARTS:
        t = attributed.parts.get(part)
        if t and t.total > 0:
            passes = {"forward_s": t.forward, "backward_s": t.backward, "seconds": t.total}
            rows.append({"part": part} | passes | {"share": min(1.0, t.total / step_s)})
    return rows


def find_peaks(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Return FLOP/s and bytes/s of the device: the card's published ones, or what is reached here and now."""
    card = cards.find(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if card:
        return {
            "flops_s": card.peak_flops(dtype),
            "bytes_s": card.bandwidth_bytes_s,
            "source": f"published for {card.name}",
        }
    size, length = (4096, 2**28) if device.type == "cuda" else (1024, 2**26)
    a = torch.randn(size, size, device=device, dtype=dtype)
    source = torch.zeros(length, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return {
        "flops_s": 2 * size**3 / _fastest(lambda: a @ a, device),
        "bytes_s": 2 * length / _fastest(lambda: target.copy_(source), device),
        "source": f"measured here: a product of {size} x {size}, a copy of {length >> 20} MiB",
    }


def _fastest(run: Any, device: torch.device) -> float:
    def timed() -> None:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    timed()
    return min(_seconds(timed) for _ in range(5))


def operation_rows(attributed: Attributed, peaks: dict[str, Any]) -> list[dict[str, Any]]:
    """Return calls, seconds, FLOPs and bytes of each operation whose work is known, the longest first.

    roofline: the share of its seconds that it would need at `peaks`, FLOP/s and bytes/s as `find_peaks` returns them.
    """

    def roofline(o: Operation) -> float:
        needed = max(o.flops / peaks["flops_s"], o.bytes / peaks["bytes_s"])
        return needed / o.seconds if o.seconds else 0.0

    operations = sorted(attributed.operations.values(), key=lambda o: -o.seconds)
    return [
        {
            "operation": o.name, "part": o.part, "calls": o.calls, "seconds": o.seconds,
            "flops": o.flops, "bytes": o.bytes, "roofline": roofline(o),
        }
        for o in operations
    ]  # fmt: skip


def show(payload: dict[str, Any]) -> None:
    name, times = payload["config"]["preset"], [1e3 * payload[key] for key in ("step_s", "profiled_step_s")]
    print(f"{name}, {payload['dtype']}: {times[0]:.1f} ms a step; profiled {times[1]:.1f} ms")
    print(f"\n{'part':16}{'share':>8}{'forward':>12}{'backward':>12}{'in all':>12}")
    for row in payload["parts"]:
        passes = "".join(f"{1e3 * row[key]:>9.2f} ms" for key in ("forward_s", "backward_s", "seconds"))
        print(f"{row['part']:16}{row['share']:>8.1%}{passes}")
    peaks = payload["peaks"]
    print(f"\n{'operation':60}{'part':12}{'calls':>6}{'time':>12}{'rate':>14}{'of roofline':>13}")
    for row in payload["operations"][:20]:
        compute_bound = row["flops"] / peaks["flops_s"] > row["bytes"] / peaks["bytes_s"]
        amount, unit = (row["flops"], "FLOP/s") if compute_bound else (row["bytes"], "B/s")
        rate = human(amount / row["seconds"]) + unit if row["seconds"] else ""
        where = f"{row['operation'][:58]:60}{row['part']:12}{row['calls']:>6}"
        print(f"{where}{1e3 * row['seconds']:>9.2f} ms{rate:>14}{row['roofline']:>12.0%}")
    print(f"roofline: {human(peaks['flops_s'])}FLOP/s, {human(peaks['bytes_s'])}B/s, {peaks['source']}")
    held, peak = (payload["memory"][key] / 2**20 for key in ("held_bytes", "peak_bytes"))
    print(f"memory of tensors: {held:,.0f} MiB between steps, {peak:,.0f} MiB at the peak")


if __name__ == "__main__":
    sys.exit(main())
