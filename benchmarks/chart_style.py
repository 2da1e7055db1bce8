"""Colours and axes that the charts share."""

from typing import Any

from engine.report import human

OURS, OTHERS = "#08519c", ("#9ecae1", "#fdae6b", "#a1d99b", "#bcbddc", "#d9d9d9", "#fdd0a2")
PARTS = (
    "#08519c",
    "#6baed6",
    "#e6550d",
    "#fdae6b",
    "#31a354",
    "#a1d99b",
    "#756bb1",
    "#bcbddc",
    "#636363",
    "#bdbdbd",
    "#8c6d31",
)


def readable_on(colour: str) -> str:
    """Return black or white, whichever is read better on a colour."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 130 else "white"


def log_rates(axes: Any) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: human(value))
    axes.yaxis.set_minor_formatter(lambda value, _: human(value) if f"{value:e}"[0] in "25" else "")
    axes.tick_params(which="minor", labelsize=7)


def plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.2)
    axes.set_axisbelow(True)
