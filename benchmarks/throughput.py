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
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.contenders import CONTENDERS
from benchmarks.environment import environment, write_result
from benchmarks.measuring import Job, Measured, compare, summarise
from benchmarks.meters import within_minutes
from engine import cards
from engine.cards import Card
from engine.command_line import CommandLine, config_of, ends_on_ctrl_c, positive
from engine.config import Config, require
from engine.device import choose_dtype, find_device, host_memory
from engine.model import GPT, flops_per_token
from engine.report import human
from engine.step_time import chip_of
from kernels import dispatch


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the command line asks for. gpu_memory: bytes; dtype: of the computation, as the card's where there is one;
    device, reason: as `find_device` has them; contenders: by name, ours first.
    """

    config: Config
    contenders: list[str]
    device: torch.device
    reason: str
    dtype: torch.dtype
    gpu_memory: int | None
    card: Card | None


@ends_on_ctrl_c()
def main(arguments: list[str] | None = None) -> int:
    options, rest = parse_arguments(arguments)
    try:
        asked = what_is_asked(options, rest)
        payload = result_head(asked, options.processes)
    except ValueError as error:  # ConfigError is one
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"{asked.config.preset}: {payload['n_parameters']:,} parameters; {asked.device} ({asked.reason}), "
        f"{payload['dtype']}",
        flush=True,
    )
    if asked.gpu_memory and asked.device.type != "cuda":
        flag = f"--gpu_memory {options.gpu_memory}" if options.gpu_memory else f"the memory of --card {options.card}"
        print(f"{flag} is not imposed: no GPU here", file=sys.stderr)
    run(asked, options, payload)
    show(payload)
    return 1 if isinstance(payload["results"]["pilesmith"], str) else 0


def parse_arguments(arguments: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Return this program's own options, and the flags that are left for the configuration."""
    parser = CommandLine(__doc__)
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
    return parser.parse_known_args(arguments)


def what_is_asked(options: argparse.Namespace, rest: list[str]) -> Asked:
    """ValueError: a mistake in any of the flags."""
    config = config_of(rest, options)
    named = options.compare.split(",") if options.compare not in (None, "all") else []
    contenders = list(CONTENDERS) if options.compare == "all" else list(dict.fromkeys(["pilesmith", *named]))
    require(set(contenders) <= set(CONTENDERS), f"--compare knows {', '.join(CONTENDERS)}; got {options.compare}")
    require(options.processes == 1 or len(contenders) == 1, "--compare runs in one process: leave --processes out")
    card = cards.get(options.card) if options.card else None
    gpu_memory = cards.parse_memory(options.gpu_memory) if options.gpu_memory else card and card.memory_bytes
    device, reason = find_device(config.strategy.device)  # its memory is for the processes that measure
    config = within_minutes(config, device, options.processes)
    dispatch.force_chip(chip_of(card) if card else None)
    dtype, _ = choose_dtype(config.strategy.dtype, device)
    dispatch.force_chip(None)  # the processes that measure pretend; this one need not
    return Asked(
        config=config, contenders=contenders, device=device, reason=reason, dtype=dtype, gpu_memory=gpu_memory,
        card=card,
    )  # fmt: skip


def result_head(asked: Asked, processes: int) -> dict[str, Any]:
    """Return the result file as it is before anything is measured. ConfigError: --host_memory is no size."""
    config, device = asked.config, asked.device
    n_parameters = GPT.outline(config.model).num_parameters()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {
        "benchmark": "throughput",
        "environment": environment(device),
        "config": config.to_dict(),
        "dtype": str(asked.dtype).removeprefix("torch."),
        "n_parameters": n_parameters,
        "processes": processes,
        "threads": torch.get_num_threads(),
        "gpu_memory_bytes": asked.gpu_memory,
        "host_memory_bytes": host_memory(config.strategy.host_memory),
        "card": asked.card and asked.card.name,
        "flops_per_token": flops_per_token(config.model, n_parameters),
        "peak_flops": cards.peak_flops(name, asked.dtype),
        "plan": None,
        "kernels": {},
        "results": {},
    }


def run(asked: Asked, options: argparse.Namespace, payload: dict[str, Any]) -> None:
    """Measure each contender and put what came of it into `payload`, which is written after each."""
    jobs = {name: Job(name, asked.config, asked.gpu_memory, asked.card, options.processes) for name in asked.contenders}
    peak = payload["peak_flops"] and payload["peak_flops"] * options.processes
    for contender, measured in compare(jobs, asked.device, options.warmup, options.steps):
        told = isinstance(measured, Measured)
        payload["results"][contender] = summarise(measured, peak) if told else measured
        if told and contender == "pilesmith":
            payload |= {"config": measured.config.to_dict(), "plan": measured.plan, "kernels": measured.kernels}
        if options.out:  # one that hangs does not take the others' figures with it
            write_result(options.out, payload)


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
