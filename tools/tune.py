"""Search the launch configurations of kernels on this GPU; keep what is right and fastest in kernels/configs/.

    python tools/tune.py                                               # every kernel, at the head widths 64 and 128
    python tools/tune.py --kernels attention_forward --widths 128 --lengths 2048,16384
    python tools/tune.py --dry_run --chip cuda:86 --limit 8            # compile and prune for a chip that is not here

A configuration whose tiles cannot fit the chip's shared memory is not compiled; one that spills, or does not fit after
all, is not run; one whose results are wrong is refused. The winner replaces the old one in kernels/configs/<chip>.json
where it is faster over all lengths together, with the figures that earned it under "measured"; dispatch reads that
file, and a chip without one takes the nearest.
"""

import argparse
import copy
import math
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import environment
from kernels import dispatch
from kernels.aot import Row
from kernels.dispatch import CHIPS, Chip
from tools.tune_cases import TUNABLE, WIDTHS, Config, Tunable, compile_candidate, speed, wrong

WORTH = 0.99  # a winner must need at most this share of the old one's time


@dataclass(frozen=True)
class Trial:
    """A candidate and what came of it: `refused` says why it is out; seconds: of each length, where it was timed."""

    config: Config
    refused: str = ""
    row: Row | None = None
    seconds: tuple[float, ...] = ()

    @property
    def score(self) -> float:
        """The geometric mean of the seconds: every length counts alike."""
        return math.exp(sum(map(math.log, self.seconds)) / len(self.seconds)) if self.seconds else math.inf


def prune(tunable: Tunable, candidates: Iterable[Config], width: int, chip: Chip) -> list[Trial]:
    """Return a trial of each candidate, those refused that no compiler can fit into the chip's shared memory."""
    trials = []
    for config in candidates:
        needs = tunable.shared_bytes(config, width)
        over = needs > chip.shared_bytes
        trials.append(
            Trial(
                config,
                f"needs {needs >> 10} KiB of shared memory or more, the chip has {chip.shared_bytes >> 10}"
                if over
                else "",
            )
        )
    return trials


def compile_trials(
    tunable: Tunable, trials: list[Trial], width: int, target: str, pool: ProcessPoolExecutor
) -> list[Trial]:
    """Compile what is not refused yet; refuse what spills or does not fit."""
    rows = {
        i: pool.submit(compile_candidate, tunable.kernel, t.config, width, target)
        for i, t in enumerate(trials)
        if not t.refused
    }
    done = {i: future.result() for i, future in rows.items()}
    return [Trial(t.config, done[i].fault, done[i]) if i in done else t for i, t in enumerate(trials)]


def measure(
    trials: list[Trial], verify: Callable[[Config], str], time: Callable[[Config], tuple[float, ...]]
) -> list[Trial]:
    """Verify, then time, what is not refused; a wrong configuration is refused and never timed."""
    measured = []
    for trial in trials:
        refused = trial.refused or verify(trial.config)
        measured.append(Trial(trial.config, refused, trial.row, () if refused else time(trial.config)))
    return measured


def choose(trials: list[Trial], current: Config) -> tuple[Trial | None, Trial | None]:
    """Return the fastest trial, and the one of the current configuration, each None where it was not timed."""
    timed = [t for t in trials if t.seconds]
    return min(timed, key=lambda t: t.score, default=None), next((t for t in timed if t.config == current), None)


def keep(chip: Chip, kernel: str, case: str, config: Config, figures: dict[str, Any]) -> None:
    """Write the winner into the chip's file, which begins as the nearest's where it is not there yet."""
    base = dispatch.config_target(chip)
    table = copy.deepcopy(dispatch.config_table(base))
    if base != chip.target:
        table.pop("measured", None)
    table.setdefault(kernel, {})[case] = config
    table.setdefault("measured", {}).setdefault(kernel, {})[case] = figures
    dispatch.write_config_table(chip.target, table)


def spread(candidates: list[Config], limit: int | None) -> list[Config]:
    """Return at most `limit` candidates, taken evenly from all."""
    if not limit or limit >= len(candidates):
        return candidates
    return [candidates[i * len(candidates) // limit] for i in range(limit)]


def report(tunable: Tunable, width: int, trials: list[Trial]) -> None:
    too_large = sum(t.row is None and bool(t.refused) for t in trials)
    faulty = sum(bool(t.row and t.row.fault) for t in trials)
    false = sum(bool(t.refused) for t in trials) - too_large - faulty
    left = len(trials) - too_large - faulty - false
    print(
        f"{tunable.kernel}, width {width}: of {len(trials)} candidates {too_large} are too large to compile, {faulty}",
        end=" ",
    )
    print(f"spill or do not fit or compile, {false} are wrong, {left} are left")
    for trial in sorted(trials, key=lambda t: (bool(t.refused), t.score)):
        row, cost = trial.row, ""
        if row and not row.error:
            cost = f"{row.registers:>4} registers {row.shared_bytes / 1024:>6.1f} KiB"
        times = " ".join(f"{1e3 * s:.3f} ms" for s in trial.seconds)
        config = " ".join(f"{k}={v}" for k, v in trial.config.items())
        print(f"  {config:62} {cost:25}  {trial.refused or times or 'compiles'}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", default=",".join(TUNABLE), help=f"which of {', '.join(TUNABLE)} [all]")
    parser.add_argument("--widths", default="64,128", help=f"head widths, of {', '.join(map(str, WIDTHS))} [64,128]")
    parser.add_argument(
        "--lengths", default="2048,8192", help="sequence lengths that a winner is measured at [2048,8192]"
    )
    parser.add_argument(
        "--limit", type=int, help="try no more candidates than this for a kernel and width, taken evenly"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that compile [one a core]")
    parser.add_argument(
        "--dry_run", action="store_true", help="compile and prune only; needs no GPU and writes nothing"
    )
    parser.add_argument(
        "--chip", help=f"with --dry_run, the chip to compile for: {', '.join(t for t in CHIPS if t != 'cpu')}"
    )
    options = parser.parse_args(arguments)
    kernels, widths = options.kernels.split(","), [int(w) for w in options.widths.split(",")]
    lengths = [int(n) for n in options.lengths.split(",")]
    fault = _fault(options, kernels, widths)
    if fault:
        print(f"error: {fault}", file=sys.stderr)
        return 2
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    chip = CHIPS[options.chip] if options.chip else dispatch.chip(device)
    print(f"{chip.name} ({chip.target}), {chip.shared_bytes >> 10} KiB of shared memory a block")
    with tempfile.TemporaryDirectory() as scratch:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(options.workers, context, _own_cache, (scratch,)) as pool:
            for kernel in kernels:
                for width in widths:
                    tune(TUNABLE[kernel], width, chip, device, lengths, options, pool)
    return 0


def _fault(options: argparse.Namespace, kernels: list[str], widths: list[int]) -> str:
    if not dispatch.TRITON_PRESENT:
        return "Triton is not installed; there is nothing to tune"
    if dispatch.interpreting():
        return "TRITON_INTERPRET=1 is set: nothing compiles under the interpreter; unset it"
    if not set(kernels) <= set(TUNABLE):
        return f"--kernels knows {', '.join(TUNABLE)}; got {options.kernels}"
    if not set(widths) <= set(WIDTHS):
        return f"--widths knows {', '.join(map(str, WIDTHS))}; got {options.widths}"
    if options.chip and options.chip not in CHIPS:
        return f"--chip {options.chip}: no such chip; known: {', '.join(CHIPS)}"
    if options.chip and not options.dry_run:
        return "--chip goes with --dry_run: times are measured on the GPU that is here"
    if not options.dry_run and not torch.cuda.is_available():
        return "no GPU here; --dry_run --chip cuda:86 compiles and prunes without one"
    if not options.dry_run and dispatch.chip(torch.device("cuda", 0)).target != _target_here():
        why = "has no row in kernels/dispatch.py, or another chip is pretended"
        return f"{_target_here()} {why}: its figures would go to the wrong file"
    if options.dry_run and not (options.chip or torch.cuda.is_available()):
        return "--dry_run needs --chip where there is no GPU"
    return ""


def _target_here() -> str:
    properties = torch.cuda.get_device_properties(0)
    return (
        f"hip:{properties.gcnArchName.split(':')[0]}"
        if torch.version.hip
        else f"cuda:{10 * properties.major + properties.minor}"
    )


def _own_cache(scratch: str) -> None:
    """Workers that share a compiler cache wait for each other."""
    os.environ["TRITON_CACHE_DIR"] = f"{scratch}/{os.getpid()}"


def tune(
    tunable: Tunable,
    width: int,
    chip: Chip,
    device: torch.device,
    lengths: list[int],
    options: argparse.Namespace,
    pool: ProcessPoolExecutor,
) -> None:
    """Search one kernel at one width, and keep the winner unless it is a dry run."""
    from triton.testing import do_bench

    current = dict(dispatch.launch_config(chip, tunable.kernel, width))
    candidates = spread([c for c in tunable.candidates() if c != current], options.limit)
    trials = compile_trials(tunable, prune(tunable, [current, *candidates], width, chip), width, chip.target, pool)
    if options.dry_run:
        return report(tunable, width, trials)
    dtype = getattr(torch, chip.dtype)
    timed = [speed(tunable, width, device, dtype, length) for length in lengths]

    def verify(config: Config) -> str:
        with dispatch.use_launch_config(tunable.kernel, width, config):
            return wrong(tunable, width, device, dtype)

    def time(config: Config) -> tuple[float, ...]:
        with dispatch.use_launch_config(tunable.kernel, width, config):
            return tuple(1e-3 * do_bench(run, warmup=10, rep=50, return_mode="median") for run, _ in timed)

    trials = measure(trials, verify, time)
    report(tunable, width, trials)
    best, before = choose(trials, current)
    if best is None:
        print("  nothing is right here: the table stays as it is")
        return
    gain = before.score / best.score if before else None
    if before and best.score > WORTH * before.score:
        print("  the table's own is as fast as any")
        best, gain = before, 1.0
    else:
        print(f"  {gain:.2f} times the speed of the table's own" if gain else "  the table's own does not run here")
    where = environment()
    figures = {
        "seconds": list(best.seconds),
        "before_s": list(before.seconds) if before else None,
        "gain": gain,
        "dtype": chip.dtype,
        "shapes": [shape for _, shape in timed],
        "tried": len(trials),
        "refused": sum(bool(t.refused) for t in trials),
        "device": where["gpu"]["name"],
        "versions": {k: where["versions"][k] for k in ("torch", "triton")},
        "commit": where["commit"],
        "date": where["date"],
    }
    keep(chip, tunable.kernel, str(width), best.config, figures)


if __name__ == "__main__":
    sys.exit(main())
