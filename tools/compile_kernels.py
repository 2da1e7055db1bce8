"""Compile every kernel that ships for every chip it ships to, without those chips, and tell what each costs.

    python tools/compile_kernels.py                                  # all of it, into benchmarks/results/
    python tools/compile_kernels.py --target cuda:86 --op attention  # print only
    python tools/compile_kernels.py --workers 8 --cache /tmp/rows

Registers are a thread's; stack is what spilled; shared memory is a block's. Ends with 1 if a configuration spills,
does not fit its chip, does not compile or is warned of by ptxas. Finished rows are cached by source, options and
Triton's version.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.environment import RESULTS, environment, write_result
from engine.command_line import CommandLine, ends_on_ctrl_c, positive
from kernels import aot
from kernels.dispatch import CHIPS, OPS, TRITON_PRESENT

COLUMNS = ("kernel", "warps", "stages", "registers", "stack B", "shared KiB", "of", "tensor cores")


@ends_on_ctrl_c("interrupted; the same command goes on")
def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print, and write the table of a whole run; return the exit status."""
    parser = CommandLine(__doc__)
    parser.add_argument("--target", action="append", choices=[t for t in CHIPS if t != "cpu"], help="only this chip")
    parser.add_argument("--op", action="append", choices=list(OPS), help="only this op")
    parser.add_argument("--workers", type=positive, default=2, help="processes side by side (2)")
    parser.add_argument("--cache", type=Path, help="folder of finished rows (default: the user's cache folder)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of compiled_kernels.json and .md")
    options = parser.parse_args(arguments)
    if not TRITON_PRESENT:
        parser.error("Triton is not installed")

    jobs = [
        (module, label, target)
        for module, label, target in aot.all_jobs()
        if (not options.target or target in options.target)
        and (not options.op or aot.cases_of(module)[label].op in options.op)
    ]
    began = time.perf_counter()
    rows = aot.compile_all(jobs, workers=options.workers, cache=options.cache)
    elapsed_s = time.perf_counter() - began
    print(table(rows))
    faults = [row for row in rows if row.fault]
    print(f"{len(rows)} configurations in {elapsed_s:.0f} s, {len(faults)} of them unfit to ship")
    for row in faults:
        print(f"{row.label} on {row.target}: {row.fault}", file=sys.stderr)
    if not options.target and not options.op:
        result = {"benchmark": "compiled_kernels", "environment": environment(), "rows": [asdict(row) for row in rows]}
        write_result(options.out / "compiled_kernels.json", result)
        (options.out / "compiled_kernels.md").write_text(document(rows, result["environment"]))
    return 1 if faults else 0


def table(rows: Sequence[aot.Row]) -> str:
    """A Markdown table for each chip."""
    parts = []
    for target in dict.fromkeys(row.target for row in rows):
        chip = CHIPS[target]
        parts += [f"\n## {chip.name} ({target})\n", "| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
        parts += ["| " + " | ".join(cells(row)) + " |" for row in rows if row.target == target]
    return "\n".join(parts)


def cells(row: aot.Row) -> list[str]:
    """One row's cells, in the order of COLUMNS."""
    if row.error:
        return [row.label, str(row.num_warps), str(row.num_stages), row.error, "", "", "", ""]
    spilled = row.stack_bytes or (f"{row.spills} registers" if row.spills else 0)
    numbers = (row.num_warps, row.num_stages, row.registers, spilled)
    shared = (f"{row.shared_bytes / 1024:.1f}", f"{row.shared_limit_bytes >> 10}")
    return [row.label, *map(str, numbers), *shared, "yes" if row.tensor_cores else "no"]


def document(rows: Sequence[aot.Row], where: dict) -> str:
    """The whole file: what it is, where it was made, one table a chip."""
    versions = where["versions"]
    return (
        "# What each kernel costs on each chip\n\n"
        "Compiled ahead of time, without the chips, by `python tools/compile_kernels.py`; not a measurement of speed.\n"
        f"Triton {versions['triton']}, torch {versions['torch']}, commit {where['commit']}, {where['date']}.\n"
        f"{table(rows)}\n"
    )


if __name__ == "__main__":
    sys.exit(main())
