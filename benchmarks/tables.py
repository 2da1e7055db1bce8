"""The tables and figures that pages take from benchmarks/results/: each place is a function of the files.

Every one takes the results, the way from the page to benchmarks/ and the place's own arguments, and returns Markdown.
"""

from collections import defaultdict
from collections.abc import Callable
from functools import reduce
from typing import Any

from benchmarks.reading import (
    COMMANDS,
    Results,
    cases,
    clocked,
    contender_name,
    device_name,
    gib,
    mib,
    nothing,
    of_kind,
    seconds,
    shape_of,
    si,
    source,
    table,
    threads_of,
)  # fmt: skip
from benchmarks.tables_of_tools import compiled, correctness, launches, plans, suite, tune
from engine.report import human

Place = Callable[..., str]
HARD_TEXT_TIMES = 5
EXTREMES = ("random letters", "random digits")


def throughput(results: Results, base: str, *names: str) -> str:
    """One table a file, or of the named files only: our engine, and what it was compared with."""
    found = {n: r for n, r in of_kind(results, "throughput").items() if not names or n in names}
    if not found:
        return nothing(COMMANDS["throughput"])
    return "\n\n".join(source(name, result, base) + "\n\n" + throughput_rows(result) for name, result in found.items())


def throughput_rows(result: dict[str, Any]) -> str:
    config, gpu = result["config"], result["environment"]["gpu"]
    ours = result["results"]["pilesmith"]
    limit = f", at most {result['gpu_memory_bytes'] / 2**30:.3g} GiB" if result["gpu_memory_bytes"] and gpu else ""
    shape = f"`{config['preset']}`, {human(result['n_parameters'])} parameters, {result['dtype']}"
    shape += f", {config['optimizer']['batch_tokens']:,} tokens a step"
    if result["card"]:
        limit = f", as {result['card']}{limit}"
    if not gpu:
        shape += f", {threads_of(result)}"
    if result["processes"] > 1:
        shape += f", {result['processes']} processes"
    rows = []
    for name, row in result["results"].items():
        if isinstance(row, str):
            rows.append([f"{name}: {row}", *[""] * 6])
            continue
        low, _, high = row["step_s_quartiles"]
        rows.append([
            contender_name(name, row, result), f"{row['tokens_per_s']:,.0f}",
            f"{seconds(row['step_s'])} ({seconds(low)} to {seconds(high)}){_retries(row)}",
            f"{row['mfu']:.1%}" if row["mfu"] else "-", mib(row["peak_bytes"]), mib(max(0, row["step_bytes"])),
            f"{ours['tokens_per_s'] / row['tokens_per_s']:.2f}" if isinstance(ours, dict) and row is not ours else "-",
        ])  # fmt: skip
    header = ["", "tokens/s", "step, median (quartiles)", "MFU", "peak memory", "of a step", "ours / it"]
    plan = result["plan"]
    predicted = ""
    if plan and isinstance(ours, dict):
        off = ours["peak_bytes"] / plan["allocated_bytes"] - 1
        predicted = (
            f"\n\nPlan: {plan['name']}, {mib(plan['allocated_bytes'])} predicted; measured is {off:+.1%} of that."
        )
    return f"{shape}{limit}:\n\n{table(header, rows)}{predicted}"


def memory(results: Results, base: str) -> str:
    """Predicted and measured peak memory of every run on a GPU that had a plan."""
    rows = []
    for name, result in of_kind(results, "throughput").items():
        ours, plan = result["results"]["pilesmith"], result["plan"]
        if not plan:
            continue
        limit = f"{result['gpu_memory_bytes'] / 2**30:.3g} GiB" if result["gpu_memory_bytes"] else "all"
        if result["card"]:
            limit += f", as {result['card']}"
        measured = isinstance(ours, dict)
        rows.append([
            f"`{result['config']['preset']}`", device_name(result), limit, plan["name"], mib(plan["allocated_bytes"]),
            mib(ours["peak_bytes"]) if measured else ours,
            f"{ours['tokens_per_s']:,.0f}{_retries(ours)}" if measured else "",
            _fall(ours) if measured else "", f"[{name}.json]({base}results/{name}.json)",
        ])  # fmt: skip
    header = ["model", "card", "memory it may use", "plan", "predicted", "measured", "tokens/s", "loss", "file"]
    return table(header, rows) if rows else nothing(COMMANDS["suite"])


def _retries(row: dict[str, Any]) -> str:
    """What slows a step down that is close to its limit, where it happened."""
    count = row.get("alloc_retries", 0)
    return f", {count} allocation{'s' * (count > 1)} retried" if count else ""


def _fall(row: dict[str, Any]) -> str:
    """The first and the last loss, and over how many steps."""
    losses = row["losses"]
    return f"{losses[0]:.2f} to {losses[-1]:.2f} in {len(losses)} steps" if losses else ""


FILE_OPS = ("batches", "open", "checkpoint")
Timed = dict[str, tuple[dict[str, Any], dict[str, Any]]]  # implementation -> what it says of itself, its statistics


def is_kernel(about: dict[str, Any]) -> bool:
    return "step" in about and about["op"] not in FILE_OPS


def kernels(results: Results, base: str) -> str:
    """One table an op and file: a row for each shape and pass, a column for each implementation."""
    found = of_kind(results, "pytest-benchmark")
    copies = {
        device_name(result): about["bytes"] / stats["min"]
        for result in found.values()
        for about, stats in cases(result)
        if about["op"] == "copy"
    }
    parts = []
    for name, result in found.items():
        ops: dict[str, dict[tuple[str, str], Timed]] = defaultdict(lambda: defaultdict(dict))
        for about, stats in cases(result):
            if is_kernel(about) and about["op"] != "copy":
                ops[about["op"]][shape_of(about), about["step"]][about["implementation"]] = about, stats
        copy = copies.get(device_name(result))
        if ops:
            parts.append(
                source(name, result, base) + clocked(result) + (f". A copy moves {si(copy, 'B/s')}." if copy else "")
            )
        for op, rows in ops.items():
            names = ["pilesmith", *dict.fromkeys(name for row in rows.values() for name in row if name != "pilesmith")]
            lines = [
                [
                    shape,
                    step,
                    *(seconds(row[n][1]["min"]) if n in row else "-" for n in names),
                    _rate(row, copy),
                    _gain(row),
                ]
                for (shape, step), row in rows.items()
            ]
            parts.append(table([f"`{op}`", "pass", *names, "our rate", "best other / ours"], lines))
    return "\n\n".join(parts) if parts else nothing(COMMANDS["kernels"])


def _rate(row: Timed, copy: float | None) -> str:
    if "pilesmith" not in row:
        return "-"
    about, stats = row["pilesmith"]
    if about.get("flops"):
        return si(about["flops"] / stats["min"], "FLOP/s")
    moved = about["bytes"] / stats["min"]
    return si(moved, "B/s") + (f", {moved / copy:.0%} of the copy" if copy else "")


def _gain(row: Timed) -> str:
    others = [stats["min"] for name, (_, stats) in row.items() if not name.startswith("pilesmith")]
    return f"{min(others) / row['pilesmith'][1]['min']:.2f}" if others and "pilesmith" in row else "-"


def files(results: Results, base: str) -> str:
    """Everything else that pytest-benchmark measured: loader, checkpoint, tokenizer; one table a file."""
    parts = []
    for name, result in of_kind(results, "pytest-benchmark").items():
        rows = []
        for about, stats in cases(result):
            if is_kernel(about):
                continue
            amount, unit = (about["tokens"], "tokens/s") if about.get("tokens") else (about.get("bytes"), "B/s")
            step = f" {about['step']}" if about.get("step") in ("save", "load") else ""
            rate = si(amount / stats["min"], unit) if amount else "-"
            rows.append(
                [f"{about['op']}{step}", str(about["implementation"]), shape_of(about), seconds(stats["min"]), rate]
            )
        if rows:
            header = ["", "implementation", "size", "time", "rate"]
            parts.append(source(name, result, base) + clocked(result) + "\n\n" + table(header, rows))
    return "\n\n".join(parts) if parts else nothing(COMMANDS["files"])


def scaling(results: Results, base: str) -> str:
    """What grows, and one table an axis: tokens/s, the arithmetic behind it, and the memory of a step."""
    parts = []
    for name, result in of_kind(results, "scaling").items():
        model, optimizer = result["config"]["model"], result["config"]["optimizer"]
        words = f"{model['n_layer']} layers, width {model['n_embd']}, {model['block_size']:,} tokens a sequence, a "
        words += f"vocabulary of {model['vocab_size']:,}, {optimizer['batch_tokens']:,} tokens a step in micro-batches "
        words += f"of {optimizer['micro_batch_size']} sequences; {result['dtype']}. Each table changes one of them"
        if "processes" in result["axes"]:
            threads = result["axes"]["processes"][0]["threads"]
            words += f"; processes have {threads} thread{'s' * (threads > 1)} and micro-batches of one sequence each"
        parts += [source(name, result, base), words + ":"]
        for axis, points in result["axes"].items():
            rows = []
            for p in points:
                if "failed" in p:
                    rows.append([f"{p['value']:,}: {p['failed']}", "-", "-", "-"])
                    continue
                arithmetic = si(p["tokens_per_s"] * p["flops_per_token"], "FLOP/s")
                rows.append([f"{p['value']:,}", f"{p['tokens_per_s']:,.0f}", arithmetic, mib(max(0, p["step_bytes"]))])
            parts.append(table([axis, "tokens/s", "model FLOP/s", "memory of a step"], rows))
    return "\n\n".join(parts) if parts else nothing(COMMANDS["scaling"])


def paper(results: Results, base: str) -> str:
    """What the planner predicts for more cards."""
    parts = []
    for name, result in of_kind(results, "scaling").items():
        made = result["paper"]
        words = f"`{made['preset']}`, {made['batch_tokens']:,} tokens a step; [{name}.json]({base}results/{name}.json)"
        parts += [words] if made["rows"] else []
        for card in dict.fromkeys(row["card"] for row in made["rows"]):
            lines, ideal = [], None  # ideal: tokens/s of one card, as the smallest number that works has it
            for r in (row for row in made["rows"] if row["card"] == card):
                if "failed" in r:
                    lines.append([f"{r['gpus']:,}: {r['failed']}", *[""] * 5])
                    continue
                ideal = ideal or r["tokens_per_s"] / r["gpus"]
                of_ideal = f"{r['tokens_per_s'] / r['gpus'] / ideal:.0%}"
                sent = si(r["communication_bytes"], "B")
                lines.append(
                    [f"{r['gpus']:,}", f"{r['tokens_per_s']:,.0f}", of_ideal, gib(r["card_bytes"]), sent, r["plan"]]
                )
            header = [f"{card}: cards", "tokens/s", "of ideal", "memory of a card", "sent by one in a step", "plan"]
            parts.append(table(header, lines))
    return "\n\n".join(parts) if parts else nothing(COMMANDS["scaling"])


def profile(results: Results, base: str) -> str:
    """Where the time of a step goes, one table a file."""
    parts = []
    for name, result in of_kind(results, "profile").items():
        rows = [
            [
                r["part"],
                f"{r['share']:.1%}",
                *(seconds(r[key]) if r[key] else "-" for key in ("forward_s", "backward_s", "seconds")),
            ]
            for r in result["parts"]
        ]
        shape = f"{result['config']['optimizer']['batch_tokens']:,} tokens a step"
        if not result["environment"]["gpu"]:
            shape += f" on {threads_of(result)}"
        times = [seconds(result[key]) for key in ("step_s", "profiled_step_s")]
        title = f"`{result['config']['preset']}`, {result['dtype']}, {shape}: {times[0]} without the profiler; under it"
        title += f" {times[1]}, of which"
        parts.append(
            source(name, result, base)
            + f"\n\n{title}:\n\n"
            + table(["part", "share", "forward", "backward", "in all"], rows)
        )
    return "\n\n".join(parts) if parts else nothing(COMMANDS["profile"])


def tokenizer(results: Results, base: str) -> str:
    """Every encoder's rate on one thread, then threads, then the texts that are hardest for us."""
    parts = []
    for name, result in of_kind(results, "tokenizer").items():
        rows = []
        for encoder, row in sorted(result["encoders"].items(), key=lambda item: -item[1]["mb_s"]):
            rates = [f"{row[key]:,}" for key in ("mb_s", "mb_s_again")]
            times = [f"{row[key]:.2f}" for key in ("times_tiktoken", "times_tiktoken_again")]
            rows.append([encoder, row["version"] or "this", "yes" if row["exact"] else "no", *rates, *times])
        header = ["encoder", "version", "tiktoken's ids", "MB/s", "again", "times tiktoken", "again"]
        words = f'{mib(result["text"]["bytes"])} of text, one thread; "again" is the same text once more:'
        parts += [source(name, result, base), words, table(header, rows)]
        if "threads" in result:
            one = result["threads"]["1"]["mb_s"]
            words = ", ".join(
                f"{n} threads {row['mb_s']:,}, {row['mb_s'] / one:.2f} times one"
                for n, row in result["threads"].items()
                if n != "1"
            )
            parts.append(
                f"Each thread through all of the text, caches filled, by the wall clock, the best of "
                f"{result['method']['rounds']} rounds where the table has medians of CPU seconds: 1 thread {one:,} MB/s"
                f"{words and ', '}{words}."
            )
        if "worst_cases" in result:
            found = result["worst_cases"]
            rows = [[text, f"{row['mb_s']:,}", f"{row['times_ordinary']:.2f}"] for text, row in found.items()]
            above = [text for text, row in found.items() if row["times_ordinary"] > HARD_TEXT_TIMES]
            words = f"What is hard is meant to take at most {HARD_TEXT_TIMES} times as long a byte as ordinary text"
            words += f"; beyond that: {', '.join(above)}" if above else ", as all of it does"
            words += f". Of these rows {' and '.join(EXTREMES)} are beyond the bound's list, to see how bad it gets."
            parts += [words, table(["hard text", "MB/s", "time against ordinary text"], rows)]
    return "\n\n".join(parts) if parts else nothing(COMMANDS["tokenizer"])


def prepare(results: Results, base: str) -> str:
    """Raw shards to tokens, beside what reading them alone costs: by CPU seconds, then by the wall clock."""
    parts = []
    for name, result in of_kind(results, "prepare").items():
        method, cores = result["method"], result["all_cores"]["cores"]
        words = (
            f'{result["text"]["bytes"] / 1e6:.0f} MB of text. "bare": {method["bare"]}; "of" is the share of such a '
        )
        parts += [source(name, result, base), words + f"floor that is reached. Of `prepare` {method['prepare']}."]
        for key, title in (("one_core", "one core, CPU seconds"), ("all_cores", f"{cores} cores, wall clock")):
            found = {what: row for what, row in result[key].items() if isinstance(row, dict)}
            shares = [column for column in list(found.values())[-1] if column != "mb_s"]
            rows = [
                [what, f"{row['mb_s']:,}", *(f"{row[share]:.0%}" if share in row else "-" for share in shares)]
                for what, row in found.items()
            ]
            parts.append(table([title, "MB/s of text", *shares], rows))
        peaks = ", ".join(f"{mib(size)} with {what}" for what, size in result["peak_bytes"].items())
        parts.append(f"It starts in {seconds(result['start_s'])} and holds at most {peaks}.")
    return "\n\n".join(parts) if parts else nothing(COMMANDS["prepare"])


def quality(results: Results, base: str) -> str:
    """Validation losses of compact optimizer states beside fp32's, seed by seed."""
    parts = []
    for name, result in of_kind(results, "optimizer_quality").items():
        rows = []
        for model, outcome in result["models"].items():
            spread = "" if outcome["spread"] is None else f"{outcome['spread']:.4f}"
            for form, row in outcome["formats"].items():
                losses = ", ".join(f"{loss:.4f}" for loss in row["val_loss"].values())
                difference = "" if row["difference"] is None else f"{row['difference']:+.4f}"
                rows.append([model, form, losses, difference, spread])
        header = ["model", "states", "validation loss, each seed", "against fp32", "spread of fp32's seeds"]
        settings = result["settings"]
        words = f"{settings['steps']:,} steps of {settings['batch_tokens']:,} tokens"
        if "unigram_loss" in settings:
            words += f"; the frequencies of words alone give a loss of {settings['unigram_loss']:.2f}"
        picture = f"![Losses of compact optimizer states]({base}results/{name}.png)"
        parts += [source(name, result, base), words + ":", table(header, rows), picture]
    return "\n\n".join(parts) if parts else nothing(COMMANDS["quality"])


def miniature(results: Results, base: str) -> str:
    """Each card's plan, at full size by the formulas and the tracker, and trained in miniature inside a limit."""
    parts = []
    for name, result in of_kind(results, "miniature").items():
        rows = []
        for row in result["rows"]:
            whole, small, losses = row["full_size"], row["miniature"], row["miniature"]["losses"]
            tracked = whole["predicted_of_tracked_bytes"] / whole["tracked_bytes"] - 1
            trained = small["status"] == "trained"
            rows.append(
                [
                    f"{row['card']}, {row['memory_bytes'] / 2**30:.1f} GiB",
                    f"{row['plan']['name']}, {row['plan']['dtype']}",
                    f"{whole['card_bytes'] / 2**30:.2f} GiB",
                    f"{tracked:+z.1%}",
                    mib(small["limit_bytes"]),
                    mib(small["predicted_bytes"]),
                    mib(small["peak_bytes"]) if trained else small["status"],
                    f"{losses[0]:.2f} to {losses[-1]:.2f}" if trained else "",
                    "fits" if row["plain"] == "trained" else row["plain"],
                ]
            )
        header = ["card", "plan", "planned on the card", "planned against tracked", "limit of the miniature"]
        header += ["predicted", "measured", f"loss in {result['settings']['steps']} steps", "plain fp32, same limit"]
        parts += [source(name, result, base), table(header, rows)]
    return "\n\n".join(parts) if parts else nothing(COMMANDS["miniature"])


def value(results: Results, base: str, name: str, path: str, form: str = "") -> str:
    """A single figure: the number at `path` in a file, keys parted by dots; `form` as format() takes it, or "MiB"."""
    found = _at(results, name, path)
    return mib(found) if form == "MiB" else format(found, form)


def ratio(results: Results, base: str, name: str, above: str, below: str, form: str = ".2f") -> str:
    """One number of a file over another."""
    return format(_at(results, name, above) / _at(results, name, below), form)


def _at(results: Results, name: str, path: str) -> float:
    """A place has its arguments parted by blanks: in `path` a blank of a key is %20."""
    keys = (key.replace("%20", " ") for key in path.split("."))
    return reduce(lambda node, key: node[int(key) if isinstance(node, list) else key], keys, results[name])


PLACES: dict[str, Place] = {
    "throughput": throughput,
    "memory": memory,
    "kernels": kernels,
    "files": files,
    "tokenizer": tokenizer,
    "prepare": prepare,
    "quality": quality,
    "miniature": miniature,
    "compiled": compiled,
    "scaling": scaling,
    "paper": paper,
    "profile": profile,
    "correctness": correctness,
    "tune": tune,
    "suite": suite,
    "plans": plans,
    "launches": launches,
    "value": value,
    "ratio": ratio,
}
