"""Train `2b` in miniature inside each card's memory, scaled down with it, by the very plan that the card gets.

    python benchmarks/miniature.py                                  # the ten cards of the classic table, about an hour
    python benchmarks/miniature.py --cards rtx3080,t4 --steps 50

The miniature has all blocks of the model, but a SCALE-th of its width, length and vocabulary: a SCALE²-th of its
weights, states, activations and logits. So is its limit: a SCALE²-th of what the card has beside its context, and of
the host memory that the plan takes; a CPU has one memory for both. The system imposes it (RLIMIT_DATA) on a process of
its own, which trains on real text with the card's number format, states, offload and recomputation.
The plain way, all in fp32 with every activation kept, is tried inside the same limit of the card. Beside them stand the
plan's bytes at full size, and what torch's memory tracker sees of it.
"""

import argparse
import functools
import json
import os
import pydoc_data.topics
import resource
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.environment import RESULTS, environment, write_result
from benchmarks.meters import STATUS, status_bytes
from engine import footprint
from engine.cards import CLASSIC, Card, GiB, get
from engine.command_line import CommandLine, ends_on_ctrl_c, positive
from engine.config import PRESETS, Config, ModelConfig, from_dict
from engine.data import Batch
from engine.device import DTYPES, peak_memory
from engine.distributed import Processes
from engine.footprint import Footprint, MiB, predict
from engine.memory import Plan, best_first, choose, plan
from engine.model import GPT
from engine.strategy import build
from engine.tokenizer import load_encoding
from tools.track_memory import predict_tracked, track

PRESET = "2b"
SCALE = 8
HOST_MEMORY = 64 * GiB  # of the machine that the cards are in
SMALL_CARD = 12 * GiB  # below it DeepSpeed's offload is tried too, where the planner prefers something else
# Python's objects, oneDNN's kernels and the C library's own: of no scale.
PROCESS_BYTES = 16 * MiB
BUCKET = footprint.DEEPSPEED_BUCKET // SCALE**2
OUT_OF_MEMORY = "out of memory"
PLAIN_STEPS = 2


@dataclass(frozen=True)
class Trial:
    """What a process trains: a configuration's settings, micro-batches a step, and the bytes that it may grow by."""

    settings: dict[str, Any]
    grad_accum: int
    steps: int
    limit_bytes: int


def miniature(model: ModelConfig) -> ModelConfig:
    """Return the model at a SCALE-th of its width, length and vocabulary, with all blocks, and heads half as wide."""
    C, heads = model.n_embd // SCALE, model.n_head * 2 // SCALE
    shorter = {"block_size": model.block_size // SCALE, "vocab_size": model.vocab_size // SCALE}
    return replace(model, n_embd=C, n_head=heads, **shorter)


def held_bytes(planned: Footprint) -> int:
    """What a plan holds on the card and in host memory, but for the context and the process."""
    return planned.allocated_bytes + planned.host_bytes - planned.host["process"]


def trial(chosen: Plan, steps: int) -> tuple[Trial, int]:
    """Return the miniature of a card's plan inside its limit, and the bytes that the formulas predict for it."""
    small, method = miniature(chosen.model), chosen.method
    options = dict(dtype=chosen.dtype, micro_batch_size=chosen.micro_batch_size, recompute=chosen.recompute)
    with mock.patch.object(footprint, "DEEPSPEED_BUCKET", BUCKET):
        predicted = held_bytes(predict(small, method, **options))
    free = (chosen.card_limit - chosen.footprint.card_bytes) // SCALE**2  # what the plan leaves of the card
    grad_accum = 1 if method.in_backward else 2
    settings = chosen.settings
    settings["optimizer"]["batch_tokens"] = grad_accum * chosen.micro_batch_size * small.block_size
    settings["strategy"]["device"] = "cpu"
    asked = Trial(settings | {"model": asdict(small)}, grad_accum, steps, predicted + free + PROCESS_BYTES)
    return asked, predicted


def plain_trial(card: Card, model: ModelConfig) -> Trial:
    """Return the plain way inside a card's limit: fp32 weights, gradients and moments, every activation kept."""
    small = miniature(model)
    settings = {
        "model": asdict(small),
        "optimizer": {"batch_tokens": 2 * small.block_size, "micro_batch_size": 1},
        "strategy": {"strategy": "resident", "weights": "fp32", "moments": "fp32", "dtype": "fp32", "device": "cpu"},
    }
    settings["strategy"] |= {"activation_checkpointing": "none", "optimizer_in_backward": False, "offload": "none"}
    limit = (card.memory_bytes - footprint.CONTEXT_BYTES) // SCALE**2 + PROCESS_BYTES
    return Trial(settings, grad_accum=2, steps=PLAIN_STEPS, limit_bytes=limit)


@functools.cache
def text_tokens(vocab_size: int) -> Tensor:
    """Return Python's own documentation, int64 (n,): r50k's tokens by frequency, the rarest all as the last number.

    So most of the vocabulary is in use: where most of it never is, training jumps, in fp32 too.
    """
    text = "\n".join(pydoc_data.topics.topics.values())
    tokens = torch.tensor(load_encoding().encode_ordinary(text))
    counts = tokens.bincount()
    return counts.argsort(descending=True, stable=True).argsort()[tokens].clamp(max=vocab_size - 1)


def text_batches(config: Config, count: int, seed: int) -> list[Batch]:
    """Return `count` micro-batches from places of the text drawn at random."""
    tokens, block_size = text_tokens(config.model.vocab_size), config.model.block_size
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        micro_batch_size = (config.optimizer.micro_batch_size,)
        starts = torch.randint(len(tokens) - block_size, micro_batch_size, generator=generator).tolist()
        windows = torch.stack([tokens[start : start + block_size + 1] for start in starts])
        batches.append(Batch(windows[:, :-1].contiguous(), windows[:, 1:].contiguous()))
    return batches


def train(asked: Trial) -> dict[str, Any]:
    """Train in this process, which is limited for good; return each step's loss and the most that it grew by."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as run_dir:
        config = from_dict(asked.settings | {"run_dir": run_dir})
        if config.strategy.strategy == "zero":
            from deepspeed.accelerator import get_accelerator

            get_accelerator().is_fp16_supported = lambda: True  # so that DeepSpeed runs it on a CPU
            footprint.DEEPSPEED_BUCKET = BUCKET
        # What the first call of each op loads belongs to no model.
        tiny = replace(config.model, n_embd=64, n_head=2, vocab_size=256, block_size=16)
        steps(replace(config, model=tiny), asked.grad_accum, 2)
        before = status_bytes("VmRSS")
        limit = status_bytes("VmData") + asked.limit_bytes
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        losses = steps(config, asked.grad_accum, asked.steps)
        return {"status": "trained", "losses": losses, "peak_bytes": peak_memory(torch.device("cpu")) - before}


def steps(config: Config, grad_accum: int, count: int) -> list[float]:
    """Train for `count` steps and return their losses."""
    model, dtype = GPT.outline(config.model), DTYPES[config.strategy.dtype]
    weights = model.initial_weights(torch.Generator().manual_seed(0))
    strategy = build(config, model, Processes(), torch.device("cpu"), dtype, grad_accum, weights)
    losses = []
    for step in range(count):
        strategy.set_lr(1e-3 * min(1.0, (step + 1) / 5))
        loss = strategy.forward_backward(text_batches(config, grad_accum, seed=step))
        strategy.step(loss)
        losses.append(loss.item())
    return losses


def in_a_process(asked: Trial) -> dict[str, Any]:
    """Return what `train` says in a fresh process whose freed memory goes back to the system at once.

    RuntimeError where it ends by anything but the limit.
    """
    variables = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    variables |= {"CUDA_VISIBLE_DEVICES": ""}  # a CPU is what is measured, whatever else there is
    command = [sys.executable, "-m", "benchmarks.miniature", "--trial", json.dumps(asdict(asked))]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if any(words in done.stderr for words in ("can't allocate memory", "MemoryError", "bad_alloc")):
        return {"status": OUT_OF_MEMORY, "losses": [], "peak_bytes": None}
    raise RuntimeError(f"the miniature failed:\n{done.stderr}")


def full_size(chosen: Plan) -> dict[str, Any]:
    """Return what the plan holds at full size, and what torch's tracker sees of it: weights, gradients, activations."""
    weights = chosen.dtype if chosen.method.stage or chosen.method.weights != "fp32" else "fp32"
    options = dict(dtype=chosen.dtype, weights=weights, micro_batch_size=chosen.micro_batch_size)
    options |= {"recompute": chosen.recompute, "accumulates": chosen.grad_accum > 1}
    return {
        "card_bytes": chosen.footprint.card_bytes,
        "host_bytes": chosen.host_bytes,
        "tracked_bytes": track(chosen.model, **options)["total"],
        "predicted_of_tracked_bytes": predict_tracked(chosen.model, **options).card_bytes,
    }


def measure(card: Card, chosen: Plan, count: int) -> dict[str, Any]:
    """Return a result's row: a card, its plan, the plan at full size, and in miniature."""
    asked, predicted = trial(chosen, count)
    planned = {
        "name": chosen.name,
        "title": chosen.title,
        "dtype": chosen.dtype,
        "micro_batch_size": chosen.micro_batch_size,
    }
    small = {"limit_bytes": asked.limit_bytes, "predicted_bytes": predicted} | in_a_process(asked)
    plain = in_a_process(plain_trial(card, chosen.model))["status"]
    return {
        "card": card.name,
        "memory_bytes": card.memory_bytes,
        "plan": planned,
        "full_size": full_size(chosen),
        "miniature": small,
        "plain": plain,
    }


def choices(card: Card, model: ModelConfig) -> list[Plan]:
    """Return the plan that a card gets, and on a small card the best with DeepSpeed's offload if that is another."""
    plans = plan(model, card, HOST_MEMORY)
    chosen = [choose(plans)]
    if card.memory_bytes < SMALL_CARD and not chosen[0].method.stage:
        offloading = [p for p in plans if p.method.stage and p.method.offload != "none" and p.fits]
        chosen += best_first(offloading)[:1]
    return chosen


@ends_on_ctrl_c()
def main(arguments: list[str] | None = None) -> int:
    parser = CommandLine(__doc__)
    parser.add_argument("--cards", help="names as in tools/plan.py, separated by commas [the classic ten]")
    parser.add_argument("--steps", type=positive, default=20, help="[%(default)s]")
    parser.add_argument("--out", type=Path, default=RESULTS / "miniature-cpu.json", help="[%(default)s]")
    parser.add_argument("--trial", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.trial:
        print(json.dumps(train(Trial(**json.loads(options.trial)))))
        return 0
    if not STATUS.exists():
        print("error: the limit is Linux's: this needs /proc", file=sys.stderr)
        return 2
    try:
        cards = [get(name) for name in options.cards.split(",")] if options.cards else CLASSIC
    except ValueError as error:
        parser.error(f"--cards: {error}")
    model = ModelConfig(**PRESETS[PRESET]["model"])
    settings = {"preset": PRESET, "scale": SCALE, "steps": options.steps, "host_memory_bytes": HOST_MEMORY}
    settings |= {"model": asdict(miniature(model)), "process_bytes": PROCESS_BYTES}
    payload = {"benchmark": "miniature", "environment": environment(), "settings": settings, "rows": []}
    for card in cards:
        for chosen in choices(card, model):
            row = measure(card, chosen, options.steps)
            payload["rows"].append(row)
            write_result(options.out, payload)
            made = row["miniature"]
            shown = (
                f"{made['peak_bytes'] / made['limit_bytes']:.0%} of {made['limit_bytes'] / MiB:.0f} MiB"
                if made["peak_bytes"]
                else ""
            )
            learned = f"loss {made['losses'][0]:.2f} to {made['losses'][-1]:.2f}" if made["losses"] else ""
            print(f"{card.name}: {chosen.name}: {made['status']} {shown} {learned}; plain: {row['plain']}", flush=True)
    return int(any(row["miniature"]["status"] != "trained" for row in payload["rows"]))


if __name__ == "__main__":
    sys.exit(main())
