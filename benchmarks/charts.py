"""The charts: for each what it draws from benchmarks/results/, and how. Without its data a chart is not drawn."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from benchmarks.chart_style import OTHERS, OURS, PARTS, log_rates, plain, readable_on
from benchmarks.charts_of_tools import draw_plan, draw_suite, draw_tune, plan_data, suite_data, tune_data
from benchmarks.reading import Results, cases, contender_name, device_name, of_kind, threads_of
from engine import cards
from engine.report import human

MEMORY_COLOURS = {
    "weights and moments": "#bdbdbd", "embedding": "#fdd0a2", "norm": "#a1d99b", "attention": "#6baed6",
    "matmul": "#08519c", "activation": "#31a354", "loss": "#e6550d", "gradients": "#756bb1", "optimizer": "#636363",
    "communication": "#8c6d31", "other": "#d9d9d9",
}  # fmt: skip


@dataclass(frozen=True)
class Chart:
    """data: what is drawn, as JSON, or None where the files do not hold it; draw: the picture of it."""

    title: str
    data: Callable[[Results], Any]
    draw: Callable[[Any], Figure]


def throughput_data(results: Results) -> Any:
    """[{title, rows: [(contender, tokens/s, bytes of a step)]}], for the runs that compare."""
    panels = []
    for result in of_kind(results, "throughput").values():
        rows = [
            [contender_name(name, r, result), r["tokens_per_s"], max(0, r["step_bytes"])]
            for name, r in result["results"].items()
            if isinstance(r, dict)
        ]
        if len(rows) > 1:
            about = [result["config"]["preset"], device_name(result), result["dtype"], threads_of(result)]
            title = ", ".join(filter(None, about))
            panels.append({"title": title, "rows": rows})
    return panels or None


def draw_throughput(panels: Any) -> Figure:
    figure = Figure(figsize=(9, 0.9 + 2.1 * len(panels)), layout="constrained")
    for (left, right), panel in zip(figure.subplots(len(panels), 2, squeeze=False), panels):
        names = [name for name, *_ in panel["rows"]]
        colours = [OURS if name == "pilesmith" else OTHERS[0] for name in names]
        for axes, column, unit, scale in ((left, 1, "tokens/s", 1), (right, 2, "GiB that a step adds", 2**30)):
            values = [row[column] / scale for row in panel["rows"]]
            bars = axes.barh(names, values, color=colours)
            axes.bar_label(bars, [human(v) for v in values], padding=3, fontsize=8)
            axes.set_xlim(0, 1.15 * max(values))
            axes.set_xlabel(unit)
            axes.invert_yaxis()
            plain(axes)
        right.set_yticklabels([])
        left.set_title(panel["title"], loc="left", fontsize=10)
    return figure


def models_data(results: Results) -> Any:
    """[(preset, card and limit, tokens/s)] of our runs on GPUs."""
    rows = []
    for result in of_kind(results, "throughput").values():
        ours = result["results"]["pilesmith"]
        if result["environment"]["gpu"] and isinstance(ours, dict):
            place = ", ".join([device_name(result), *limits(result)])
            rows.append([result["config"]["preset"], place, ours["tokens_per_s"]])
    return rows or None


def limits(result: dict[str, Any]) -> list[str]:
    """Return what a larger card was held to: "as V100", "15.8 GiB"."""
    card, memory = result["card"], result["gpu_memory_bytes"]
    return [f"as {card}"] * bool(card) + [f"{(memory or 0) / 2**30:.3g} GiB"] * bool(memory)


def draw_models(rows: Any) -> Figure:
    presets = list(dict.fromkeys(row[0] for row in rows))
    figure = Figure(figsize=(9, 1.5 + 0.28 * len(rows)), layout="constrained")
    for axes, preset in zip(figure.subplots(len(presets), 1, squeeze=False)[:, 0], presets):
        mine = [(place, speed) for name, place, speed in rows if name == preset]
        bars = axes.barh([place for place, _ in mine], [speed for _, speed in mine], color=OURS)
        axes.bar_label(bars, [human(speed) for _, speed in mine], padding=3, fontsize=8)
        axes.set_title(preset, loc="left", fontsize=10)
        axes.invert_yaxis()
        plain(axes)
    axes.set_xlabel("tokens/s")
    return figure


def attention_data(results: Results) -> Any:
    """{"device", "peak", "panels": {"D 128, forward": {implementation: [(length, FLOP/s)]}}} of a GPU."""
    found: dict[str, Any] = {}
    timed = (
        (r["environment"]["gpu"], *case) for r in of_kind(results, "pytest-benchmark").values() for case in cases(r)
    )
    for gpu, about, stats in timed:
        if gpu and about["op"] == "attention":
            panels = found.setdefault(
                gpu["name"], {"device": gpu["name"], "peak": cards.peak_flops(gpu["name"], _dtype(about)), "panels": {}}
            )["panels"]
            lines = panels.setdefault(f"head width {about['shape']['D']}, {about['step']}", {})
            lines.setdefault(about["implementation"], []).append([about["shape"]["T"], about["flops"] / stats["min"]])
    return list(found.values()) or None


def _dtype(about: dict[str, Any]) -> str:
    return {"bfloat16": "bf16", "float16": "fp16"}.get(about["dtype"], "fp32")


def draw_attention(devices: Any) -> Figure:
    columns = max(len(d["panels"]) for d in devices)
    figure = Figure(figsize=(4.2 * columns, 3.6 * len(devices)), layout="constrained")
    for row, device in zip(figure.subplots(len(devices), columns, squeeze=False), devices):
        for axes, (title, lines) in zip(row, device["panels"].items()):
            for name, points in lines.items():
                lengths, rates = zip(*sorted(points))
                style = {"color": OURS, "linewidth": 2.4} if name == "pilesmith" else {"linewidth": 1.2}
                axes.plot(lengths, [rate / 1e12 for rate in rates], marker="o", markersize=3, label=name, **style)
            if device["peak"]:
                axes.axhline(
                    device["peak"] / 1e12, color="black", linestyle="--", linewidth=0.8, label="peak of the chip"
                )
            axes.set_xscale("log", base=2)
            axes.set_ylim(bottom=0)
            axes.set_xlabel("sequence length")
            axes.set_ylabel("TFLOPS, causal half counted")
            axes.set_title(f"{device['device']}: {title}", fontsize=9)
            plain(axes)
        row[0].legend(fontsize=7, frameon=False)
    return figure


def memory_data(results: Results) -> Any:
    """[(label, {part: bytes}, measured bytes or None)] of the runs that had a plan."""
    rows = []
    for result in of_kind(results, "throughput").values():
        ours, plan = result["results"]["pilesmith"], result["plan"]
        if plan:
            label = ", ".join([result["config"]["preset"], *(limits(result) or [device_name(result)])])
            rows.append([label, plan["parts"], ours["peak_bytes"] if isinstance(ours, dict) else None])
    return rows or None


def draw_memory(rows: Any) -> Figure:
    parts = list(dict.fromkeys(part for _, sizes, _ in rows for part in sizes))
    figure = Figure(figsize=(9, 1.6 + 0.4 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for y, (_, sizes, measured) in enumerate(rows):
        left = 0.0
        for part in parts:
            size = sizes.get(part, 0) / 2**30
            axes.barh(
                y,
                size,
                left=left,
                color=PARTS[parts.index(part) % len(PARTS)],
                label=part.replace("_", " ") if y == 0 else None,
            )
            left += size
        if measured:
            axes.plot(
                [measured / 2**30] * 2,
                [y - 0.42, y + 0.42],
                color="black",
                linewidth=2,
                label="measured" if y == 0 else None,
            )
    axes.set_yticks(range(len(rows)), [label for label, *_ in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("GiB of tensors at the fullest moment of a step, predicted by part")
    figure.legend(loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    plain(axes)
    return figure


def scaling_data(axis: str) -> Callable[[Results], Any]:
    def data(results: Results) -> Any:
        lines = []
        for result in of_kind(results, "scaling").values():
            points = [p for p in result["axes"].get(axis, ()) if "failed" not in p]
            if len(points) > 1:
                line = [[p["value"], p["tokens_per_s"], p["flops_per_token"]] for p in points]
                lines.append({"label": f"{device_name(result)}, {result['dtype']}", "points": line})
        return {"axis": axis, "lines": lines} if lines else None

    return data


def draw_scaling(data: Any) -> Figure:
    """Measured tokens/s, and what the first point's FLOP/s would give, or its tokens/s times the processes."""
    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    axes = figure.subplots()
    rates: list[float] = []
    for i, line in enumerate(data["lines"]):
        values, speeds, flops = zip(*line["points"])
        colour = (OURS, "#d94801", "#31a354")[i % 3]
        axes.plot(values, speeds, color=colour, marker="o", markersize=4, label=line["label"])
        if data["axis"] == "processes":
            expected, expectation = [speeds[0] * n / values[0] for n in values], "in proportion"
        else:
            expected, expectation = [speeds[0] * flops[0] / f for f in flops], "at the first point's FLOP/s"
        axes.plot(
            values,
            expected,
            color=colour,
            linestyle=":",
            linewidth=1,
            label=expectation if i == 0 else None,
        )
        rates += [*speeds, *expected]
    axes.set_xscale("log", base=2)
    ticks = sorted({value for line in data["lines"] for value, *_ in line["points"]})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    if max(rates) < 4 * min(rates):  # a logarithmic scale would have hardly a number on it
        axes.set_ylim(0, 1.15 * max(rates))
        axes.yaxis.set_major_formatter(lambda value, _: human(value))
    else:
        log_rates(axes)
    axes.set_xlabel(
        {"length": "sequence length", "depth": "layers", "micro-batch": "sequences of a micro-batch"}.get(
            data["axis"], data["axis"]
        )
    )
    axes.set_ylabel("tokens/s")
    axes.legend(fontsize=7, frameon=False)
    plain(axes)
    return figure


def paper_data(results: Results) -> Any:
    """{"title", "cards": {card: [(cards, tokens/s)]}} as predicted, from the newest scaling file that has any."""
    found = [result for result in of_kind(results, "scaling").values() if result["paper"]["rows"]]
    if not found:
        return None
    made = max(found, key=lambda result: result["environment"]["date"])["paper"]
    lines = defaultdict(list)
    for row in made["rows"]:
        if "failed" not in row:
            lines[row["card"]].append([row["gpus"], row["tokens_per_s"]])
    return {"title": f"{made['preset']}, {made['batch_tokens']:,} tokens a step, predicted", "cards": dict(lines)}


def draw_paper(data: Any) -> Figure:
    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    axes = figure.subplots()
    for (card, points), colour in zip(data["cards"].items(), (OURS, "#d94801", "#31a354", "#756bb1")):
        gpus, speeds = zip(*points)
        axes.plot(gpus, speeds, color=colour, marker="o", markersize=3, label=card)
        axes.plot(gpus, [speeds[0] / gpus[0] * n for n in gpus], color=colour, linestyle=":", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xticks(gpus[::2], [str(n) for n in gpus[::2]])
    axes.minorticks_off()
    log_rates(axes)
    axes.set_xlabel("cards")
    axes.set_ylabel("tokens/s (dotted: ideal)")
    axes.set_title(data["title"], fontsize=9)
    axes.legend(fontsize=8, frameon=False)
    plain(axes)
    return figure


def profile_data(results: Results) -> Any:
    """[(label, {part: share})] of the profiled steps."""
    rows = [
        [_profiled(r), {part["part"]: part["share"] for part in r["parts"]}]
        for r in of_kind(results, "profile").values()
    ]
    return rows or None


def _profiled(result: dict[str, Any]) -> str:
    return ", ".join(filter(None, [result["config"]["preset"], device_name(result), threads_of(result)]))


def draw_profile(rows: Any) -> Figure:
    parts = list(dict.fromkeys(part for _, shares in rows for part in shares))
    figure = Figure(figsize=(9, 1.5 + 0.5 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for y, (_, shares) in enumerate(rows):
        left = 0.0
        for part in parts:
            share = 100 * shares.get(part, 0)
            axes.barh(y, share, left=left, color=PARTS[parts.index(part) % len(PARTS)], label=part if y == 0 else None)
            if share > 4:
                ink = readable_on(PARTS[parts.index(part) % len(PARTS)])
                axes.text(left + share / 2, y, f"{share:.0f}%", ha="center", va="center", color=ink, fontsize=9)
            left += share
    axes.set_yticks(range(len(rows)), [label for label, _ in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("% of a step's time")
    figure.legend(loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    plain(axes)
    return figure


def timelines_data(results: Results) -> Any:
    """[(label, {seconds, held: {part: bytes}, backward_s})] of the profiled steps."""
    found = of_kind(results, "profile").values()
    return [[_profiled(r), r["memory"]["timeline"]] for r in found] or None


def draw_timelines(rows: Any) -> Figure:
    figure = Figure(figsize=(10, 4.2 * len(rows)), layout="constrained")
    for axes, (label, line) in zip(figure.subplots(len(rows), 1, squeeze=False)[:, 0], rows):
        totals = [sum(values) for values in zip(*line["held"].values())]
        most = max(totals)
        unit, name = (2**30, "GiB") if most > 2**30 else (2**20, "MiB")
        milliseconds = [1e3 * s for s in line["seconds"]]
        parts = [part for part in MEMORY_COLOURS if part in line["held"]]
        stacks = [[value / unit for value in line["held"][part]] for part in parts]
        axes.stackplot(
            milliseconds,
            stacks,
            labels=parts,
            colors=[MEMORY_COLOURS[part] for part in parts],
            step="post",
            linewidth=0,
        )
        peak = milliseconds[totals.index(most)], most / unit
        axes.annotate(f"{most / unit:,.1f} {name}", peak, textcoords="offset points", xytext=(6, 4), fontsize=9)
        axes.axvline(1e3 * line["backward_s"], color="black", linewidth=0.8, linestyle=":")
        axes.text(1e3 * line["backward_s"], 0, " backward", fontsize=8, va="bottom")
        axes.set_xlabel("ms")
        axes.set_ylabel(f"{name} of tensors")
        axes.set_ylim(0, 1.1 * most / unit)
        axes.set_xlim(left=0)
        axes.set_title(f"{label}: memory of a step, by the part that asked for it", fontsize=10)
        axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
        plain(axes)
    return figure


CHARTS: dict[str, Chart] = {
    "throughput": Chart("Tokens a second, memory of a step, beside other ways", throughput_data, draw_throughput),
    "models": Chart("Tokens a second by model, card and memory", models_data, draw_models),
    "attention": Chart("Attention: TFLOPS against the length", attention_data, draw_attention),
    "memory": Chart("Memory by part, predicted, and measured", memory_data, draw_memory),
    "plan": Chart("What each card would do", plan_data, draw_plan),
    "tune": Chart("Launch configurations, and what became of them", tune_data, draw_tune),
    "suite": Chart("The suite's parts", suite_data, draw_suite),
    "profile": Chart("Where the time of a step goes", profile_data, draw_profile),
    "profile-memory": Chart("The memory of a step over time", timelines_data, draw_timelines),
    **{
        f"scaling-{axis}": Chart(f"Tokens a second against {words}", scaling_data(axis), draw_scaling)
        for axis, words in (
            ("depth", "depth"), ("width", "width"), ("length", "length"), ("micro-batch", "the micro-batch"),
            ("processes", "processes"),
        )
    },
    "scaling-paper": Chart("Tokens a second on 1 to 1024 cards, predicted", paper_data, draw_paper),
}  # fmt: skip
