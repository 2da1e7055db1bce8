"""How the cost grows: tokens/s against depth, width, length, micro-batch and processes; more cards on paper.

    python benchmarks/scaling.py --out benchmarks/results/scaling-cpu.json
    python benchmarks/scaling.py --axes depth,length --steps 8

Each axis changes one thing and keeps the tokens of a step; on a CPU its points take turns. From 1 to 1024 cards the
planner's formulas speak (`python tools/plan.py`): its step times are predictions, and are named so.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import environment, write_result
from benchmarks.measuring import Job, Measured, compare, summarise
from engine import cards
from engine.command_line import CommandLine, ends_on_ctrl_c, positive
from engine.config import Config, ConfigError, from_dict, merge, preset, require
from engine.device import choose_dtype, find_device
from engine.memory import Plan, choose, plan
from engine.model import GPT, flops_per_token
from engine.report import human

# A vocabulary so small that the blocks are what is measured.
BASES: dict[str, dict[str, Any]] = {
    "cpu": {
        "preset": "13m",
        "model": {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 128, "vocab_size": 512},
        "optimizer": {"batch_tokens": 2048, "micro_batch_size": 8},
    },
    "cuda": {
        "preset": "gpt2",
        "model": {"n_layer": 12, "n_head": 8, "n_embd": 1024, "block_size": 1024, "vocab_size": 512},
        "optimizer": {"batch_tokens": 65536, "micro_batch_size": 16},
    },
}
AXES: dict[str, dict[str, list[int]]] = {
    "cpu": {
        "depth": [1, 2, 4, 8, 16],
        "width": [64, 128, 256, 512],
        "length": [32, 64, 128, 256, 512, 1024],
        "micro-batch": [1, 2, 4, 8, 16],
        "processes": [1, 2],
    },
    "cuda": {
        "depth": [3, 6, 12, 24, 48],
        "width": [512, 1024, 2048, 4096],
        "length": [256, 512, 1024, 2048, 4096, 8192],
        "micro-batch": [1, 2, 4, 8, 16, 32],
        "processes": [1, 2, 4, 8],
    },
}
HEAD_DIM = {"cpu": 32, "cuda": 128}
PAPER_PRESET, PAPER_CARDS, PAPER_TOKENS = "2b", ("RTX 3090", "A100 80GB", "H100"), 1 << 21
PAPER_HOST_BYTES = 64 << 30  # for each card of a machine


def point(kind: str, axis: str, value: int) -> dict[str, Any]:
    """Return the changes to the base that put an axis at `value`; the tokens of a micro-batch stay where they can."""
    base = BASES[kind]
    tokens = base["model"]["block_size"] * base["optimizer"]["micro_batch_size"]
    return {
        "depth": {"model": {"n_layer": value}},
        "width": {"model": {"n_embd": value, "n_head": value // HEAD_DIM[kind]}},
        "length": {"model": {"block_size": value}, "optimizer": {"micro_batch_size": max(1, tokens // value)}},
        "micro-batch": {"optimizer": {"micro_batch_size": value}},
        "processes": {"optimizer": {"micro_batch_size": 1}},
    }[axis]


def jobs(kind: str, axis: str, overrides: dict[str, Any]) -> dict[int, Job]:
    """Return a job for each value. Several processes have a core each, and so has one that they are compared with."""
    made = {}
    for value in AXES[kind][axis]:
        config = from_dict(merge(preset(BASES[kind]["preset"]), BASES[kind], point(kind, axis, value), overrides))
        if axis != "processes":
            made[value] = Job("pilesmith", config)
        elif kind == "cpu" or value <= torch.cuda.device_count():
            made[value] = Job("pilesmith", config, processes=value, threads=1)
    return made


def row(value: int, measured: Measured | str, job: Job, peak: float | None) -> dict[str, Any]:
    """Return a point of an axis as the result file has it: tokens/s, seconds, bytes. `peak`: the device's FLOP/s."""
    n = GPT.outline(job.config.model).num_parameters()
    flops = flops_per_token(job.config.model, n)
    about = {"value": value, "n_parameters": n, "flops_per_token": flops, "threads": job.threads}
    if isinstance(measured, str):
        return about | {"failed": measured}
    result = summarise(measured, peak)
    return about | {
        key: result[key] for key in ("tokens_per_s", "step_s", "step_s_quartiles", "steps", "mfu", "step_bytes")
    }


def on_paper(preset_name: str, card_names: tuple[str, ...], batch_tokens: int) -> list[dict[str, Any]]:
    """Return what the planner predicts for 1, 2, 4 ... 1024 cards that share `batch_tokens` a step."""
    model = from_dict(preset(preset_name)).model
    rows = []
    for name in card_names:
        for gpus in (2**i for i in range(11)):
            host = PAPER_HOST_BYTES * min(gpus, 8)
            made = choose(plan(model, cards.get(name), host, gpus=gpus, batch_tokens=batch_tokens))
            rows.append({"card": name, "gpus": gpus} | (describe(made) if made else {"failed": "nothing fits"}))
    return rows


def describe(made: Plan) -> dict[str, Any]:
    """Return what the result file says of a plan, each for one card: bytes, seconds of a step; tokens/s of all."""
    return {
        "plan": made.name,
        "tokens_per_s": made.tokens_per_s,
        "card_bytes": made.footprint.card_bytes,
        "host_bytes": made.host_bytes,
        "communication_bytes": made.communication_bytes,
        "communication_s": made.time.communication,
        "step_s": made.time.total,
    }


@ends_on_ctrl_c()
def main(arguments: list[str] | None = None) -> int:
    parser = CommandLine(__doc__)
    parser.add_argument("--axes", help="which, such as depth,width [all, and paper]")
    parser.add_argument("--steps", type=positive, default=12, help="measured steps of each point [12]")
    parser.add_argument("--warmup", type=positive, default=2, help="steps before them [2]")
    parser.add_argument("--batch_tokens", type=positive, help="tokens of a step [2048, on a GPU 65536]")
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    options = parser.parse_args(arguments)
    device, reason = find_device("auto")  # its memory is for the processes that measure
    kind, dtype = device.type, choose_dtype("auto", device)[0]
    known = [*AXES[kind], "paper"]
    chosen = options.axes.split(",") if options.axes else known
    try:
        require(set(chosen) <= set(known), f"--axes knows {', '.join(known)}; got {options.axes}")
        overrides = {"optimizer": {"batch_tokens": options.batch_tokens}} if options.batch_tokens else {}
        planned = {axis: jobs(kind, axis, overrides) for axis in chosen if axis != "paper"}
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{device} ({reason})", flush=True)
    peak = cards.peak_flops(torch.cuda.get_device_name(device), dtype) if kind == "cuda" else None
    base: Config = from_dict(merge(preset(BASES[kind]["preset"]), BASES[kind], overrides))
    payload: dict[str, Any] = {
        "benchmark": "scaling",
        "environment": environment(device),
        "config": dataclasses.asdict(base),
        "dtype": str(dtype).removeprefix("torch."),
        "axes": {},
        "paper": {"preset": PAPER_PRESET, "batch_tokens": PAPER_TOKENS, "rows": []},
    }
    for axis, points in planned.items():
        measured = dict(
            compare({str(value): job for value, job in points.items()}, device, options.warmup, options.steps)
        )
        payload["axes"][axis] = [row(value, measured[str(value)], job, peak) for value, job in points.items()]
        for r in payload["axes"][axis]:
            print(f"{axis:12}{r['value']:>6} {r.get('failed') or human(r['tokens_per_s']) + ' tokens/s'}", flush=True)
        if options.out:
            write_result(options.out, payload)
    if "paper" in chosen:
        payload["paper"]["rows"] = on_paper(PAPER_PRESET, PAPER_CARDS, PAPER_TOKENS)
        for r in payload["paper"]["rows"]:
            words = r.get("failed") or f"{human(r['tokens_per_s'])} tokens/s, predicted: {r['plan']}"
            print(f"{r['card']:12}{r['gpus']:>6} {words}")
        if options.out:
            write_result(options.out, payload)
    return 0


if __name__ == "__main__":
    sys.exit(main())
