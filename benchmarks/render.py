"""Write what benchmarks/results/ holds into benchmarks/RESULTS.md, the charts and the marked places of the READMEs.

    python benchmarks/render.py            # after a new result
    python benchmarks/render.py --check    # exit 1 if a page or a chart is not what its files say

A marked place is `<!-- results:NAME ARGUMENTS -->…<!-- /results:NAME -->`, where NAME is one of `PLACES`: a
table, a chart, or a single figure in a sentence.
"""

import hashlib
import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks import tables
from benchmarks.charts import CHARTS
from benchmarks.environment import RESULTS
from benchmarks.optimizer_quality import curves_data, draw_curves
from benchmarks.reading import COMMANDS, Results, load, of_kind
from benchmarks.tables import Place
from engine.command_line import CommandLine, ends_on_ctrl_c
from kernels.aot import Row
from tools.compile_kernels import document

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "benchmarks" / "RESULTS.md"
COSTS = ROOT / "benchmarks" / "results" / "compiled_kernels.md"
CHART_FOLDER = ROOT / "benchmarks" / "charts"
READMES = ("README.md", "README.zh-CN.md")
_MARKED = re.compile(r"(<!-- results:([\w-]+)((?: [^\s>]+)*) -->)(.*?)(<!-- /results:\2 -->)", re.DOTALL)


def chart(results: Results, base: str, name: str) -> str:
    """A chart, where its data is there."""
    return f"![{CHARTS[name].title}]({base}charts/{name}.png)" if CHARTS[name].data(results) else ""


PLACES: dict[str, Place] = tables.PLACES | {"chart": chart}


# Title, place, and how it is measured and to be read.
SECTIONS: list[tuple[str, str, str]] = [
    (
        "Training",
        "throughput",
        f"`{COMMANDS['throughput']}`. MFU counts 6 N + 12 n_layer n_embd T FLOPs a token of the contender's own model, "
        "attention in full, over the chip's dense peak, where one is known: a CPU's is not. Peak memory is that of "
        'tensors on a GPU, of the whole process on a CPU; "of a step" is what a step adds to what is held between '
        'steps; "ours / it" is our tokens/s over the row\'s.',
    ),
    (
        "Where a step's time goes",
        "profile",
        f"`{COMMANDS['profile']}`. The parts are those of a step under the profiler; what a step takes without it "
        "stands beside. Where that is not what Training says, threads or commit are others. The loss's gradients are "
        "computed with the loss, in the forward pass.",
    ),
    ("Memory: predicted and measured", "memory", f"`{COMMANDS['suite']}` on a GPU."),
    (
        "Every card of the classic table, in miniature",
        "miniature",
        f"`{COMMANDS['miniature']}`: `2b` with an eighth of its width, length and vocabulary, inside a 64th of "
        "each card's memory, and of the host memory that its plan takes, which the system imposes on the process. What "
        "is planned for the whole model stands beside it, and how far the formulas are from torch's memory tracker "
        "where that can see: weights, gradients and activations. A small card's second row is the best plan with "
        "DeepSpeed's offload, which the planner does not choose there; a row that ends out of memory is one whose "
        "process, with all that DeepSpeed takes, did not keep to what the formulas predict.",
    ),
    (
        "Kernels",
        "kernels",
        f"`{COMMANDS['kernels']}`. The fastest round of each, which other programs disturbed least; the rate counts "
        "what must be computed, or read and written once; the copy is that of a large tensor, and what moves more lies "
        "in the cache.",
    ),
    ("Kernels, compiled for every chip", "compiled", f"`{COMMANDS['compiled']}`; no GPU is needed."),
    ("Tokenizer", "tokenizer", f"`{COMMANDS['tokenizer']}`."),
    ("Raw shards to tokens", "prepare", f"`{COMMANDS['prepare']}`."),
    (
        "Loader and checkpoints",
        "files",
        f"`{COMMANDS['files']}`, and the same of benchmarks/test_checkpoint.py. The fastest round of each. A "
        "checkpoint is loaded from the system's cache, where saving has just left it: no disk reads so fast.",
    ),
    (
        "Compact optimizer states",
        "quality",
        f"`{COMMANDS['quality']}`. Where a file holds no curves, its picture was drawn from the runs.",
    ),
    ("How the cost grows", "scaling", f"`{COMMANDS['scaling']}`."),
    (
        "More cards, predicted",
        "paper",
        "By the planner's formulas (`python tools/plan.py`), not measured. Ideal are as many times the tokens/s of one "
        "card; more than that comes of a faster plan, which fits once cards share the states.",
    ),
    ("Plans", "plans", f"`{COMMANDS['plans']}`: predicted, for every card of the classic table."),
    (
        "Launch configurations",
        "tune",
        f"`{COMMANDS['tune']}`, and on a GPU without the first two flags. A candidate that is left has compiled "
        "without spilling and fits; on a GPU it was right as well, and was timed.",
    ),
    ("The suite", "suite", f"`{COMMANDS['suite']}`, and without a GPU `--cpu`."),
    ("Tests on a GPU", "correctness", f"`{COMMANDS['suite']}`."),
]


def fill(text: str, results: Results, base: str) -> str:
    """Return a page's text with its marked places filled; `base`: the way from the page to benchmarks/, such as "./".

    ValueError for a place that nothing here can fill.
    """

    def replace(match: re.Match) -> str:
        opening, name, arguments, _, closing = match.groups()
        if name not in PLACES:
            raise ValueError(f"{opening}: no such place; known: {', '.join(PLACES)}")
        content = PLACES[name](results, base, *arguments.split())
        return opening + (f"\n{content}\n" if "\n" in content or content.startswith("!") else content) + closing

    return _MARKED.sub(replace, text)


def page(results: Results) -> str:
    """Return benchmarks/RESULTS.md."""
    parts = [
        "# Results",
        "",
        "Made by `python benchmarks/render.py` from the files in [results/](results/); a test compares them.",
    ]
    for title, place, words in SECTIONS:
        parts += ["", f"## {title}", "", words, "", PLACES[place](results, "")]
    return "\n".join(parts) + "\n"


def digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def drawn_from(chart: Path) -> str | None:
    """Return the digest of the data that a chart was drawn from, which it carries as PNG text, or None."""
    found = re.search(rb"tEXtData\0([0-9a-f]{64})", chart.read_bytes()) if chart.exists() else None
    return found[1].decode() if found else None


def stale(results: Results) -> dict[Path, Callable[[], str]]:
    """Return what does not say what the files say, each with what mends it and returns what it did, "written"."""
    mends: dict[Path, Callable[[], str]] = {}
    pages = {PAGE: page(results)}
    if "compiled_kernels" in results:
        rows = [Row(**row) for row in results["compiled_kernels"]["rows"]]
        pages[COSTS] = document(rows, results["compiled_kernels"]["environment"])
    for path in (ROOT / name for name in READMES):
        if path.exists():
            pages[path] = fill(path.read_text(encoding="utf-8"), results, "benchmarks/")
    for path, text in pages.items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            mends[path] = partial(write, path, text)
    wanted = {}
    for name, chart in CHARTS.items():
        data = chart.data(results)
        if data:
            wanted[CHART_FOLDER / f"{name}.png"] = chart.draw, data
    for name, result in of_kind(results, "optimizer_quality").items():
        if data := curves_data(result):  # None of those files from before the curves were kept: their pictures stay
            wanted[RESULTS / f"{name}.png"] = draw_curves, data
    for path, (picture, data) in wanted.items():
        if drawn_from(path) != digest(data):
            mends[path] = partial(draw, path, picture, data)
    for path in CHART_FOLDER.glob("*.png"):
        if path not in wanted:
            mends[path] = partial(delete, path)
    return mends


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return "written"


def draw(path: Path, picture: Callable[[Any], Figure], data: Any) -> str:
    save(picture(data), path, digest(data))
    return "drawn"


def delete(path: Path) -> str:
    path.unlink()
    return "deleted: no result is drawn in it"


def save(figure: Any, path: Path, data_digest: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=110, metadata={"Data": data_digest, "Software": None})


@ends_on_ctrl_c()
def main(arguments: list[str] | None = None) -> int:
    parser = CommandLine(__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; say what would change")
    options = parser.parse_args(arguments)
    mends = stale(load())
    for path, mend in mends.items():
        print(f"{path.relative_to(ROOT)}: {'stale' if options.check else mend()}")
    return int(options.check and bool(mends))


if __name__ == "__main__":
    sys.exit(main())
