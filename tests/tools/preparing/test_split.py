"""A share of the documents to validate on: which ones, how many, and that nothing but their text decides."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest

from engine.data import TokenFile
from tests.tools.conftest import TEXTS, ids, texts, tokens, write_shard
from tests.tools.test_prepare_interrupted import run_and_die
from tools import prepare
from tools.prepare import find_inputs, main
from tools.preparing.split import Split
from tools.preparing.token_file import read_description

FRACTION = 0.3
SIDES = [Split(val_fraction=FRACTION, side=side) for side in ("train", "val")]


def validates(text: str, fraction: float = FRACTION) -> bool:
    return zlib.crc32(text.encode()) * 0x9E3779B1 % 2**32 < fraction * 2**32


def sides(documents: list[str]) -> list[list[int]]:
    """The ids for training and for validation."""
    return [ids([text for text in documents if validates(text) == side]) for side in (False, True)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


def flags(root: Path, *others: str) -> list[str]:
    outputs = [f"--out_train_file={root.parent}/out.train", f"--out_val_file={root.parent}/out.val"]
    return [f"--train_dir={root}", *outputs, f"--val_fraction={FRACTION}", *others]


def made(root: Path) -> list[list[int]]:
    return [tokens(root.parent / f"out.{side}") for side in ("train", "val")]


@pytest.mark.parametrize("fraction", [0.01, 0.2])
@pytest.mark.parametrize("form", ["{}", "document {:06}\n", "{} of a text", "a" * 100 + "{:06}"])
def test_of_documents_that_differ_little_the_fraction_is_kept(fraction: float, form: str) -> None:
    documents = [form.format(i) for i in range(10_000)]
    text, ends = np.frombuffer("".join(documents).encode(), np.uint8), np.cumsum([len(text) for text in documents])
    for side, share in (("train", 1 - fraction), ("val", fraction)):
        selected, selected_ends = Split(val_fraction=fraction, side=side).select(text, ends)
        assert abs(len(selected_ends) / 10_000 - share) < 4 * (fraction * (1 - fraction) / 10_000) ** 0.5
        kept = [document for document in documents if validates(document, fraction) == (side == "val")]
        assert selected.tobytes().decode() == "".join(kept)


def test_a_large_shard_and_files_of_text_are_divided_by_document(root: Path, capsys) -> None:
    documents = [*texts(40), *TEXTS]
    write_shard(root / "a.jsonl.zst", documents)
    assert main(flags(root)) == 0
    assert made(root) == sides(documents) and all(made(root))
    assert capsys.readouterr().out.count("in the text, encoded as the characters") == 1  # of both sides together
    description = read_description(root.parent / "out.val")
    assert description.split == SIDES[1] and len(TokenFile(root.parent / "out.val")) == description.tokens
    other = root.parent / "texts"
    other.mkdir()
    for i, text in enumerate(documents):
        (other / f"{i:03}.txt").write_bytes(text.encode())
    assert main(flags(other, "--overwrite")) == 0
    assert made(root) == sides(documents)
    assert main(flags(other)) == 0
    assert capsys.readouterr().out.count("nothing to do") == 2


@pytest.mark.parametrize("workers", [1, 8])
def test_workers_shares_and_limits_change_nothing(root: Path, small_segments: None, tmp_path: Path, workers) -> None:
    for seed in range(2):
        write_shard(root / f"{seed}.jsonl.zst", texts(60, seed))
    documents = texts(60, 0)[:50] + texts(60, 1)[:50]
    for split, expected in zip(SIDES, sides(documents)):
        options = dict(workers=workers, split=split, max_data=50)
        prepare.prepare(find_inputs(root), tmp_path / "whole", **options)
        for i in (1, 2):
            prepare.prepare(find_inputs(root), tmp_path / "shared", **options, shard=(i, 2))
        prepare.prepare(find_inputs(root), tmp_path / "shared", **options, merge=True)
        assert tokens(tmp_path / "whole") == tokens(tmp_path / "shared") == expected


def test_killed_it_goes_on(root: Path, small_segments: None) -> None:
    write_shard(root / "a.jsonl.zst", texts(80))
    for point in (20, 50, 50):
        assert run_and_die(lambda: main(flags(root)), point)
    assert main(flags(root)) == 0
    assert made(root) == sides(texts(80))


def test_text_that_is_added_moves_none_and_another_fraction_begins_anew(root: Path, capsys) -> None:
    write_shard(root / "a.jsonl", []).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(20)))
    assert main(flags(root)) == 0
    write_shard(root / "b.jsonl.zst", texts(20) + texts(20, 1))  # copies of a text are on one side
    capsys.readouterr()
    assert main(flags(root)) == 0
    assert capsys.readouterr().out.count("keeping what it has of a.jsonl\n") == 2
    assert made(root) == sides(texts(20) + texts(20) + texts(20, 1))
    assert main(flags(root, "--val_fraction=0.9")) == 0
    assert "keeping" not in capsys.readouterr().out
    assert sum(map(len, made(root))) == len(ids(texts(20) + texts(20) + texts(20, 1)))


def test_too_few_documents_are_an_error(root: Path, capsys) -> None:
    write_shard(root / "a.jsonl.zst", ["one"])
    for fraction, side in ((1e-9, "validate"), (1 - 1e-9, "train")):
        assert main(flags(root, f"--val_fraction={fraction}")) == 2
        error = capsys.readouterr().err
        assert f"no text to {side} on in a.jsonl.zst" in error and f"--val_fraction {fraction} divides whole" in error


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--val_fraction=1"], "--val_fraction: must be above 0 and below 1, got '1'"),
        (["--val_fraction=nan"], "must be above 0 and below 1"),
        (["--val_fraction=1%"], "must be above 0 and below 1"),
        (["--val_dir=data/val", "--val_fraction=0.1"], "leave out --val_dir"),
    ],
)
def test_what_cannot_be_asked_for(given: list[str], said: str, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(given)
    assert said in capsys.readouterr().err
