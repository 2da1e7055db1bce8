"""Search the launch configurations of kernels on this GPU; keep what is right and fastest in kernels/configs/.

    python tools/tune.py                                               # every kernel, at the shapes of the presets
    python tools/tune.py --kernels attention_forward --cases 128 --sizes 2048,16384
    python tools/tune.py --dry_run --chip cuda:86 --limit 8            # compile and prune for a chip that is not here

A configuration whose tiles cannot fit the chip's shared memory is not compiled; one that spills, does not fit after all
or that ptxas warns of is not run; one whose results are wrong is refused. The winner replaces the old one in
kernels/configs/<chip>.json where it is faster over all sizes together, with the figures that earned it under
"measured"; kernels are launched by it, and a chip without one takes the nearest.
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

from benchmarks.environment import environment, write_result
from engine.command_line import CommandLine, beyond_ctrl_c, ends_on_ctrl_c, positive, positives
from kernels import dispatch, launch_configs
from kernels.aot import Row, compile_case
from kernels.dispatch import CHIPS, Chip
from kernels.launch_configs import LaunchConfig
from tools.tuning import TUNABLE
from tools.tuning.cases import Tunable

try:
    from triton.errors import TritonError
except ImportError:  # there is nothing to tune then
    TritonError = RuntimeError

FATES = {  # of candidates, in the words of charts and tables
    "left": "right, or to be tried on the chip", "wrong": "wrong", "faulty": "spill or do not fit",
    "too large": "too large to compile",
}  # fmt: skip
WORTH = 0.99  # a winner must need at most this share of the old one's time


@dataclass(frozen=True)
class Trial:
    """A candidate and what came of it: `refused` says why it is out; seconds: at each size, where it was timed."""

    config: LaunchConfig
    refused: str = ""
    row: Row | None = None
    seconds: tuple[float, ...] = ()

    @property
    def score(self) -> float:
        """The geometric mean of the seconds: every size counts alike."""
        return math.exp(sum(map(math.log, self.seconds)) / len(self.seconds)) if self.seconds else math.inf

    @property
    def fate(self) -> str:
        """One of FATES."""
        if not self.refused:
            return "left"
        if self.row is None:
            return "too large"
        return "faulty" if self.row.fault else "wrong"


def prune(tunable: Tunable, candidates: Iterable[LaunchConfig], case: str, chip: Chip) -> list[Trial]:
    """Return a trial of each candidate, those refused that no compiler can fit into the chip's shared memory."""
    trials = []
    for config in candidates:
        needs = tunable.shared_bytes(config, case)
        words = f"needs {needs >> 10} KiB of shared memory or more, the chip has {chip.shared_bytes >> 10}"
        trials.append(Trial(config, words if needs > chip.shared_bytes else ""))
    return trials


def compile_candidate(kernel: str, config: LaunchConfig, case: str, target: str) -> Row:
    """Compile one configuration for a chip that need not be there; runs in worker processes."""
    return compile_case(TUNABLE[kernel].to_compile(config, case, target), target)


def compile_trials(
    tunable: Tunable, trials: list[Trial], case: str, target: str, pool: ProcessPoolExecutor
) -> list[Trial]:
    """Compile what is not refused yet; refuse what spills, does not fit or is warned of."""
    with beyond_ctrl_c():
        rows = {
            i: pool.submit(compile_candidate, tunable.kernel, t.config, case, target)
            for i, t in enumerate(trials)
            if not t.refused
        }
    try:
        done = {i: future.result() for i, future in rows.items()}
    finally:  # interrupted, the pool waits for what it has begun, and is to begin nothing else
        for future in rows.values():
            future.cancel()
    return [Trial(t.config, done[i].fault, done[i]) if i in done else t for i, t in enumerate(trials)]


def measure(
    trials: list[Trial], verify: Callable[[LaunchConfig], str], time: Callable[[LaunchConfig], tuple[float, ...]]
) -> list[Trial]:
    """Verify, then time, what is not refused; what is wrong is refused and never timed, as is what does not run."""
    measured = []
    for trial in trials:
        refused, seconds = trial.refused, ()
        try:
            refused = refused or verify(trial.config)
            seconds = () if refused else time(trial.config)
        except (RuntimeError, TritonError) as error:  # CUDA's; the compiler's, and of a launch that asks for too much
            refused = f"does not run: {(str(error).splitlines() or [type(error).__name__])[0]}"
        measured.append(Trial(trial.config, refused, trial.row, seconds))
    return measured


def choose(trials: list[Trial], current: LaunchConfig) -> tuple[Trial | None, Trial | None]:
    """Return the fastest trial, and the one of the current configuration, each None where it was not timed."""
    timed = [t for t in trials if t.seconds]
    return min(timed, key=lambda t: t.score, default=None), next((t for t in timed if t.config == current), None)


def keep(chip: Chip, kernel: str, case: str, config: LaunchConfig, figures: dict[str, Any]) -> None:
    """Write the winner into the chip's file, which begins as the nearest's where it is not there yet.

    What loads by descriptors leaves the pointers, which it falls back to, the tile that they had.
    """
    base = launch_configs.config_target(chip)
    table = copy.deepcopy(launch_configs.config_table(base))
    if base != chip.target:
        table.pop("measured", None)
    old = table.setdefault(kernel, {}).get(case, {})
    if config.get("TMA") and old and not old.get("TMA"):
        table.setdefault(f"{kernel}_pointers", {}).setdefault(case, old)
    table[kernel][case] = config
    table.setdefault("measured", {}).setdefault(kernel, {})[case] = figures
    launch_configs.write_config_table(chip.target, table)


def spread(candidates: list[LaunchConfig], limit: int | None) -> list[LaunchConfig]:
    """Return at most `limit` candidates, taken evenly from all."""
    if not limit or limit >= len(candidates):
        return candidates
    return [candidates[i * len(candidates) // limit] for i in range(limit)]


def summary(kernel: str, case: str, trials: list[Trial], current: LaunchConfig) -> dict[str, Any]:
    """Return what the result file says of one search; `gain`: how many times the speed of the table's own."""
    best, before = choose(trials, current)
    rows = [
        {
            "config": t.config, "fate": t.fate, "refused": t.refused or None, "seconds": list(t.seconds),
            "registers": t.row.registers if t.row else None, "shared_bytes": t.row.shared_bytes if t.row else None,
        }
        for t in trials
    ]  # fmt: skip
    gain = before.score / best.score if best and before else None
    return {"kernel": kernel, "case": case, "current": current, "gain": gain, "trials": rows}


def report(kernel: str, case: str, trials: list[Trial]) -> None:
    fates = [t.fate for t in trials]
    left, false, faulty, too_large = (fates.count(fate) for fate in FATES)
    print(f"{kernel}, {case}: of {len(trials)} candidates {too_large} are too large to compile, {faulty}", end=" ")
    print(f"spill or do not fit or compile, {false} are wrong, {left} are left")
    for trial in sorted(trials, key=lambda t: (bool(t.refused), t.score)):
        row, cost = trial.row, ""
        if row and not row.error:
            cost = f"{row.registers:>4} registers {row.shared_bytes / 1024:>6.1f} KiB"
        times = " ".join(f"{1e3 * s:.3f} ms" for s in trial.seconds)
        config = " ".join(f"{k}={v}" for k, v in trial.config.items())
        print(f"  {config:62} {cost:25}  {trial.refused or times or 'compiles'}", flush=True)


@ends_on_ctrl_c()
def main(arguments: list[str] | None = None) -> int:
    parser = CommandLine(__doc__)
    parser.add_argument("--kernels", default=",".join(TUNABLE), help=f"which of {', '.join(TUNABLE)} [all]")
    parser.add_argument(
        "--cases", help="only these, named as in kernels/configs/: 128 (a head's width), 2048x2 (columns x bytes of "
        "one), bf16_residual_moments_int8 [those of the presets]",
    )  # fmt: skip
    parser.add_argument(
        "--sizes", type=positives, metavar="N,N",
        help="what a winner is measured at: sequence lengths, rows or parameters [each kernel's own]",
    )  # fmt: skip
    parser.add_argument(
        "--limit", type=positive, metavar="N",
        help="try no more than N candidates beside the table's own for a kernel and case, taken evenly",
    )  # fmt: skip
    parser.add_argument("--workers", type=positive, default=os.cpu_count(), help="processes that compile [one a core]")
    parser.add_argument(
        "--dry_run", action="store_true", help="compile and prune only; needs no GPU and changes no table"
    )
    parser.add_argument(
        "--chip", help=f"with --dry_run, the chip to compile for: {', '.join(t for t in CHIPS if t != 'cpu')}"
    )
    parser.add_argument("--out", type=Path, help="the JSON file to write every candidate and its fate into")
    options = parser.parse_args(arguments)
    if fault := _fault(options):
        parser.error(fault)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    chip = CHIPS[options.chip] if options.chip else dispatch.chip(device)
    print(f"{chip.name} ({chip.target}), {chip.shared_bytes >> 10} KiB of shared memory a block")
    worker = torch.device("cpu") if options.dry_run else device
    payload = {
        "benchmark": "tune", "environment": environment(worker), "chip": chip.name, "target": chip.target,
        "dry_run": options.dry_run, "limit": options.limit, "searches": [],
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(options.workers, context, _own_cache, (scratch,)) as pool:
            for kernel, case in todo(options, chip):
                search = tune(TUNABLE[kernel], case, chip, device, options, pool)
                payload["searches"].append(search)
                if options.out:
                    write_result(options.out, payload)
    return 0


def todo(options: argparse.Namespace, chip: Chip) -> list[tuple[str, str]]:
    """Return the (kernel, case) pairs that are asked for."""
    asked = options.cases.split(",") if options.cases else None
    chosen = [TUNABLE[kernel] for kernel in options.kernels.split(",")]
    return [
        (t.kernel, case)
        for t in chosen
        for case in ([c for c in t.cases(chip) if c in asked] if asked else t.usual(chip))
    ]


def _fault(options: argparse.Namespace) -> str:
    if not dispatch.TRITON_PRESENT:
        return "Triton is not installed; there is nothing to tune"
    if dispatch.interpreting():
        return "TRITON_INTERPRET=1 is set: nothing compiles under the interpreter; unset it"
    if not set(options.kernels.split(",")) <= set(TUNABLE):
        return f"--kernels knows {', '.join(TUNABLE)}; got {options.kernels}"
    if options.chip and options.chip not in CHIPS:
        return f"--chip {options.chip}: {_no_row(options.chip)}"
    if options.chip and not options.dry_run:
        return "--chip goes with --dry_run: times are measured on the GPU that is here"
    if not options.dry_run and not torch.cuda.is_available():
        return "no GPU here; --dry_run --chip cuda:86 compiles and prunes without one"
    if not options.dry_run and dispatch.chip(torch.device("cuda", 0)).target != _target_here():
        why = "has no row in kernels/dispatch.py, or another chip is pretended"
        return f"{_target_here()} {why}: its figures would go to the wrong file"
    if options.dry_run and not (options.chip or torch.cuda.is_available()):
        return "--dry_run needs --chip where there is no GPU"
    chip = CHIPS[options.chip] if options.chip else dispatch.chip(torch.device("cuda", 0))
    known = {case for kernel in options.kernels.split(",") for case in TUNABLE[kernel].cases(chip)}
    unknown = set(options.cases.split(",") if options.cases else ()) - known
    if unknown or not known:
        nothing = f"--cases {', '.join(sorted(unknown))}: no such case" if unknown else "nothing to tune"
        return f"{nothing} on {chip.target}; cases of these kernels there: {', '.join(sorted(known)) or 'none'}"
    return ""


def _no_row(target: str) -> str:
    """Say that kernels/dispatch.py has no row for a chip, and which one serves it there: the nearest older."""
    family, _, number = target.partition(":")
    oldest = min(int(t.removeprefix("cuda:")) for t in CHIPS if t.startswith("cuda:"))
    if family != "cuda" or not number.isdecimal() or int(number) < oldest:
        return f"no such chip; known: {', '.join(t for t in CHIPS if t != 'cpu')}"
    nearest = dispatch.row_of(target, bf16=True).target
    return f"has no row in kernels/dispatch.py, where {nearest} serves it: --chip {nearest}, of its own shared memory"


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
    case: str,
    chip: Chip,
    device: torch.device,
    options: argparse.Namespace,
    pool: ProcessPoolExecutor,
) -> dict[str, Any]:
    """Search one kernel in one case and keep the winner unless it is a dry run; return what came of it."""
    current = tunable.current(case, chip)
    candidates = spread([c for c in tunable.candidates(case, chip) if c != current], options.limit)
    trials = compile_trials(tunable, prune(tunable, [current, *candidates], case, chip), case, chip.target, pool)
    if not options.dry_run:
        trials, shapes = timed_trials(tunable, case, chip, device, options.sizes or tunable.sizes, trials)
    report(tunable.kernel, case, trials)
    found = summary(tunable.kernel, case, trials, current)
    if not options.dry_run:
        winner = decide(trials, current, found["gain"])
        if winner:
            figures = figures_of(winner, trials, current, shapes, chip, environment(device))
            keep(chip, tunable.kernel, case, winner.config, figures)
    return found


def timed_trials(
    tunable: Tunable, case: str, chip: Chip, device: torch.device, sizes: Iterable[int], trials: list[Trial]
) -> tuple[list[Trial], list[dict[str, int]]]:
    """Return the trials, what is right of them timed at each size, and the shapes that they were timed at."""
    from triton.testing import do_bench

    dispatch.set_backend("triton")
    dtype = getattr(torch, chip.dtype)
    runs, shapes = zip(*(tunable.speed(case, device, dtype, size) for size in sizes))

    def verify(config: LaunchConfig) -> str:
        with launch_configs.use_launch_config(tunable.kernel, case, config):
            return tunable.wrong(case, device, dtype)

    def time(config: LaunchConfig) -> tuple[float, ...]:
        with launch_configs.use_launch_config(tunable.kernel, case, config):
            return tuple(1e-3 * do_bench(run, warmup=10, rep=50, return_mode="median") for run in runs)

    return measure(trials, verify, time), list(shapes)


def decide(trials: list[Trial], current: LaunchConfig, gain: float | None) -> Trial | None:
    """Say what wins and return it: the table's own where none is clearly faster, None where nothing is right."""
    best, before = choose(trials, current)
    if best is None:
        print("  nothing is right here: the table stays as it is")
    elif before and best.score > WORTH * before.score:
        print("  the table's own is as fast as any")
        return before
    else:
        print(f"  {gain:.2f} times the speed of the table's own" if gain else "  the table's own does not run here")
    return best


def figures_of(
    winner: Trial, trials: list[Trial], current: LaunchConfig, shapes: list[dict[str, int]], chip: Chip,
    where: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Return what is kept beside a winner: seconds at each of `shapes`, against the table's own, and where."""
    _, before = choose(trials, current)
    return {
        "seconds": list(winner.seconds),
        "before_s": list(before.seconds) if before else None,
        "gain": before.score / winner.score if before else None,
        "dtype": chip.dtype,
        "shapes": shapes,
        "tried": len(trials),
        "refused": sum(bool(t.refused) for t in trials),
        "device": where["gpu"]["name"],
        "versions": {k: where["versions"][k] for k in ("torch", "triton")},
        "commit": where["commit"],
        "date": where["date"],
    }


if __name__ == "__main__":
    sys.exit(main())
