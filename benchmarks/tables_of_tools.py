"""The tables of what compiling, searching, planning and the suite came to; as those of benchmarks/tables.py."""

from collections import defaultdict
from typing import Any

from benchmarks.reading import COMMANDS, Results, device_name, nothing, of_kind, source, table
from kernels import launch_configs
from tools.tune import FATES


def compiled(results: Results, base: str) -> str:
    """For each chip how many of our kernels' configurations compile, fit and do not spill."""
    parts = []
    for name, result in of_kind(results, "compiled_kernels").items():
        chips: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for row in result["rows"]:
            chips[row["target"]].append(row)
        rows = []
        for target, found in chips.items():
            fits = [r for r in found if not r["error"] and r["shared_bytes"] <= r["shared_limit_bytes"]]
            spilling = sum(bool(r["stack_bytes"] or r["spills"]) for r in fits)
            most, limit = max(r["shared_bytes"] for r in found) / 1024, found[0]["shared_limit_bytes"] / 1024
            rows.append(
                [
                    target,
                    f"{len(found)}",
                    f"{len(fits)}",
                    f"{spilling}",
                    f"{most:.0f} of {limit:.0f}",
                    f"{max(r['registers'] for r in found)}",
                ]
            )
        header = ["chip", "configurations", "compile and fit", "spill", "shared memory, most, KiB", "registers, most"]
        parts += [source(name, result, base) + f"; [each of them]({base}results/{name}.md)", table(header, rows)]
    return "\n\n".join(parts) if parts else nothing(COMMANDS["compiled"])


def correctness(results: Results, base: str) -> str:
    found = of_kind(results, "correctness")
    rows = [
        [
            device_name(r),
            f"{r['passed']:,}",
            f"{r['failed']:,}",
            f"{r['skipped']:,}",
            f"`{r['command']}`",
            f"[{name}.json]({base}results/{name}.json)",
        ]
        for name, r in found.items()
    ]
    return (
        table(["device", "passed", "failed", "skipped", "command", "file"], rows)
        if rows
        else nothing(COMMANDS["suite"])
    )


def tune(results: Results, base: str) -> str:
    """For each kernel and case what became of the candidates, and what the best of them gained."""
    parts = []
    for name, result in of_kind(results, "tune").items():
        rows = []
        for search in result["searches"]:
            fates = [sum(trial["fate"] == fate for trial in search["trials"]) for fate in FATES]
            gain = f"{search['gain']:.2f}" if search["gain"] else "-"
            current = " ".join(f"{key}={value}" for key, value in search["current"].items())
            rows.append([f"`{search['kernel']}` {search['case']}", f"`{current}`", *map(str, fates), gain])
        how = "compiled for it without one, not timed" if result["dry_run"] else "timed"
        header = ["kernel", "as it ships", "left", "wrong", "spill or do not fit", "too large", "best / ours"]
        parts += [f"{source(name, result, base)}; {result['chip']} ({result['target']}), {how}", table(header, rows)]
    return "\n\n".join(parts) if parts else nothing(COMMANDS["tune"])


def launches(results: Results, base: str, which: str) -> str:
    """How many launch configurations kernels/configs/ has for GPUs: those that "ship", or of them the "timed" ones."""
    tables = (launch_configs.config_table(target) for target in launch_configs.config_targets() if target != "cpu")
    shipped, timed = 0, 0
    for made in tables:
        timed += sum(map(len, made.get("measured", {}).values()))
        shipped += sum(len(cases) for kernel, cases in made.items() if kernel != "measured")
    return f"{timed if which == 'timed' else shipped:,}"


def suite(results: Results, base: str) -> str:
    """What became of each part of the suite."""
    parts = []
    for name, result in of_kind(results, "suite").items():
        rows = [
            [row["name"], row["status"], f"{row['seconds']:.0f}", row["message"].replace("|", " ")]
            for row in result["parts"]
        ]
        parts += [source(name, result, base), table(["part", "", "s", ""], rows)]
    return "\n\n".join(parts) if parts else nothing(COMMANDS["suite"])


def plans(results: Results, base: str) -> str:
    """What each card of the classic table would do."""
    parts = []
    for name, result in of_kind(results, "plan").items():
        rows = []
        for plan in result["plans"]:
            if plan["fits"]:
                size = f"{sum(plan['peak_bytes'].values()) / 2**30:.1f} of {plan['card_limit_bytes'] / 2**30:.1f}"
                rows.append([plan["gpu"], plan["title"], size, f"{plan['tokens_per_s']:,.0f}"])
            else:
                rows.append([plan["gpu"], "does not fit", "", ""])
        host = f"`{result['preset']}`, {result['host_memory_bytes'] / 2**30:.0f} GiB of host memory; predicted"
        parts += [f"{source(name, result, base)}; {host}", table(["card", "plan", "GiB on it", "tokens/s"], rows)]
    return "\n\n".join(parts) if parts else nothing(COMMANDS["plans"])
