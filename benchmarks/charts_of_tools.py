"""The charts of what plans, searches and suites came to."""

from typing import Any

from matplotlib.figure import Figure

from benchmarks.chart_style import plain
from benchmarks.reading import Results, device_name, of_kind
from tools.plan import draw
from tools.tune import FATES


def plan_data(results: Results) -> Any:
    """{"title", "rows": [[card, plan, {part: bytes}, bytes of the card]]} of `2b`, which the READMEs are about."""
    result = results.get("plan-2b")
    if not result:
        return None
    rows = [
        [plan["gpu"], plan["strategy"], plan["peak_bytes"], plan["card_limit_bytes"]]
        for plan in result["plans"]
        if plan["fits"]
    ]
    host = f"{result['host_memory_bytes'] / 2**30:.0f} GiB of host memory"
    return {"title": f"{result['preset']}: what each card would do, with {host}; predicted", "rows": rows}


def draw_plan(data: Any) -> Figure:
    return draw([(card, sizes, limit, name) for card, name, sizes, limit in data["rows"]], data["title"])


FATE_COLOURS = ("#08519c", "#e6550d", "#fdae6b", "#bdbdbd")


def tune_data(results: Results) -> Any:
    """[{title, rows: [[kernel and case, {fate: candidates}, gain or None]]}] of the searches."""
    panels = []
    for result in of_kind(results, "tune").values():
        rows = []
        for search in result["searches"]:
            counts = {fate: sum(trial["fate"] == fate for trial in search["trials"]) for fate in FATES}
            rows.append([f"{search['kernel']}, {search['case']}", counts, search["gain"]])
        how = "compiled for it, not timed" if result["dry_run"] else "timed"
        panels.append({"title": f"{result['chip']} ({result['target']}), {how}", "rows": rows})
    return panels or None


def draw_tune(panels: Any) -> Figure:
    most = max(len(panel["rows"]) for panel in panels)
    figure = Figure(figsize=(9, 1.4 + 0.24 * most * len(panels)), layout="constrained")
    for axes, panel in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels):
        for y, (_, counts, gain) in enumerate(panel["rows"]):
            left = 0
            for (fate, words), colour in zip(FATES.items(), FATE_COLOURS):
                label = words if y == 0 and axes is figure.axes[0] else None
                axes.barh(y, counts[fate], left=left, color=colour, label=label)
                left += counts[fate]
            if gain:
                axes.text(left + 0.3, y, f"{gain:.2f} times as fast", va="center", fontsize=8)
        axes.set_yticks(range(len(panel["rows"])), [name for name, *_ in panel["rows"]])
        axes.invert_yaxis()
        axes.margins(y=0.01)
        axes.set_title(panel["title"], loc="left", fontsize=10)
        plain(axes)
    axes.set_xlabel("launch configurations")
    figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


STATUSES = {
    "done": "#08519c", "kept": "#9ecae1", "failed": "#e6550d", "out of time": "#fdae6b", "running": "#fdae6b",
    "tests failed": "#a63603", "not run": "#d9d9d9",
}  # fmt: skip


def suite_data(results: Results) -> Any:
    """[{title, rows: [[part, status, seconds]]}] of the suites that were run."""
    panels = []
    for result in of_kind(results, "suite").values():
        rehearsal = "" if result["environment"]["gpu"] else ", a rehearsal with small shapes"
        minutes = f"{sum(part['seconds'] for part in result['parts']) / 60:.1f} minutes"
        rows = [[part["name"], part["status"], part["seconds"]] for part in result["parts"]]
        panels.append({"title": f"{device_name(result)}{rehearsal}: {minutes}", "rows": rows})
    return panels or None


def draw_suite(panels: Any) -> Figure:
    heights = [len(panel["rows"]) for panel in panels]
    figure = Figure(figsize=(9, 1 + 0.2 * sum(heights)), layout="constrained")
    rows = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axes, panel in zip(rows, panels):
        began = 0.0
        for y, (_, status, seconds) in enumerate(panel["rows"]):
            axes.barh(y, seconds, left=began, color=STATUSES[status])
            began += seconds
            axes.text(began + 0.5, y, f"{status}, {seconds:.0f} s", va="center", fontsize=7)
        axes.set_yticks(range(len(panel["rows"])), [name for name, *_ in panel["rows"]])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.15 * max(began, 1.0))
        axes.margins(y=0.01)
        axes.set_title(panel["title"], loc="left", fontsize=10)
        plain(axes)
        axes.tick_params(axis="y", labelsize=7)
    axes.set_xlabel("seconds that the parts took, one after the other")
    return figure
