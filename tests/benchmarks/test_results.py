"""What is kept is valid, what is shown is what is kept, and the READMEs claim nothing that no file holds."""

import json
import re
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from benchmarks import render
from benchmarks.environment import RESULTS
from benchmarks.reading import kind_of, load

ROOT = Path(__file__).parents[2]
FILES = sorted(RESULTS.glob("*.json"))
READMES = [ROOT / name for name in render.READMES if (ROOT / name).exists()]
# Speeds, shares of a peak, and how many times as fast: a size or a count is no measurement.
FIGURE = re.compile(
    r"\d[\d.,]*\s?(?:[kKMG]\s?)?(?:(?:tokens|tok|[kKMGT]i?B|bytes)\s?/\s?s\b|[TGP]FLOPS?\b|FLOP/s|ms\b|µs\b|%|x\b"
    r"|×|times\b"
    r"|[MG]iB\b|tokens?\s(?:a|per)\ssecond|tokens?/J|seconds\b|-?fold\b|倍|毫秒|秒|個?\s?token\s?/\s?s)"
    r"|\b1/\d+\sof\b|每秒\s?\d[\d.,]*|\b1/\d+(?=[，。：])"
)


def test_schemas_are_schemas(schemas):
    for schema in schemas.values():
        Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_result_is_valid(path, schemas, validate):
    payload = json.loads(path.read_text())
    kind = kind_of(path.stem, payload)
    assert kind in schemas, f"{path.name} is of the kind {kind}, which needs a schema in benchmarks/schemas/"
    validate(payload, kind)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_result_names_no_machine_and_no_place_on_it(path):
    found = re.search(r'"(?:/(?:home|root|work|tmp|Users|usr)/[^"]*|node|hostname)"', path.read_text())
    assert not found, f"{path.name} says {found[0]}"


def test_pages_and_charts_say_what_the_files_say():
    old = [str(path.relative_to(ROOT)) for path in render.stale(load())]
    assert not old, f"{', '.join(old)}: run python benchmarks/render.py"


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.name)
def test_no_figure_in_a_readme_without_a_file(readme):
    assert claims(readme.read_text(encoding="utf-8")) == []


def test_both_readmes_have_marked_figures():
    """So that a page without any is not taken for one that is checked."""
    for readme in READMES:
        assert len(re.findall(r"<!-- results:(?:value|ratio|throughput) ", readme.read_text(encoding="utf-8"))) >= 3


def test_the_readmes_tell_the_same():
    """The same figures and charts, commands and flags, in either language."""
    english, chinese = ((ROOT / name).read_text(encoding="utf-8") for name in render.READMES)
    for told in (r"<!-- results:(.*?) -->", r"(?m)^((?:python|deepspeed|pip) [^#\n]*?) *(?:#.*)?$", r"(--\w[\w-]*)"):
        assert set(re.findall(told, english)) <= set(re.findall(told, chinese)), told


@pytest.mark.parametrize("command, chart", sorted({
    "benchmarks/throughput.py": "throughput", "tools/plan.py": "plan", "tools/profile_step.py": "profile",
    "benchmarks/scaling.py": "scaling-paper", "tools/tune.py": "tune", "benchmarks/suite.py": "suite",
}.items()))  # fmt: skip
def test_the_readme_pictures_what_each_command_gives(command, chart):
    text = (ROOT / "README.md").read_text()
    assert f"python {command}" in text
    assert f"(benchmarks/charts/{chart}.png)" in text and (ROOT / f"benchmarks/charts/{chart}.png").exists()


def claims(text: str) -> list[str]:
    """Return the measured-looking figures of a page outside its marked places and its code."""
    text = re.sub(r"<!-- results:([\w-]+).*?<!-- /results:\1 -->", "", text, flags=re.DOTALL)
    text = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    return [match[0] for match in FIGURE.finditer(text)]


def test_a_figure_typed_by_hand_is_found():
    assert claims("It runs at 12,000 tokens/s, 1.8x the loop, 55% of the peak.") == ["12,000 tokens/s", "1.8x", "55%"]
    assert claims("It holds 687 MiB, takes 12 seconds, 1/12 of the memory, at 3,441 tokens a second.") == [
        "687 MiB", "12 seconds", "1/12 of", "3,441 tokens a second",
    ]  # fmt: skip
    assert claims("快 3.1 倍") == ["3.1 倍"] and claims("每秒 3,441 个 token") == ["每秒 3,441"]
    assert claims("内存是它的 1/12：") == ["1/12"] and claims("省 60% 内存") == ["60%"]
    assert claims("A 24 GB card, 12 layers, 1 GB of text, `--size 5x`.") == []
    assert claims("It is <!-- results:ratio a b c -->1.83<!-- /results:ratio --> times as fast.") == []
