"""Inputs in folders inside a folder: which are found, in what order, and that those of one name are kept apart."""

import os
import shutil
from pathlib import Path

import pytest

from tests.tools.conftest import TEXTS, ids, run_flags, texts, tokens, write_shard
from tests.tools.test_prepare_interrupted import run_and_die
from tools import prepare
from tools.prepare import find_inputs, main, summarize
from tools.preparing.token_file import PrepareError, read_description


def write_texts(root: Path, *names: str) -> list[Path]:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return [root / name for name in names]


def test_folders_are_searched_in_the_order_of_relative_paths(tmp_path: Path) -> None:
    expected = write_texts(tmp_path, "a/b/c.txt", "a/z.txt", "a.txt", "b/a.txt", "c.txt")
    write_texts(tmp_path, ".git/a.txt", "a/.cache/b.txt", "b/.hidden.txt", "b/a.md", "out.bin.parts/a.txt.00000.json")
    assert find_inputs(tmp_path) == expected


def test_links_lead_nowhere_twice(tmp_path: Path) -> None:
    root = tmp_path / "root"
    inside, beyond = write_texts(root, "a/1.txt")[0], write_texts(tmp_path, "beyond/2.txt")[0]
    for link, target in (("a/up", root), ("a/self", root / "a"), ("linked", beyond.parent), ("z", beyond.parent)):
        (root / link).symlink_to(target)
    assert find_inputs(root) == [inside, root / "linked/2.txt"]


def test_the_other_folder_is_left_out(tmp_path: Path) -> None:
    train, val = write_texts(tmp_path, "a.txt", "val/b.txt")
    assert find_inputs(tmp_path, val.parent) == [train]
    assert find_inputs(val.parent, tmp_path) == [val]
    assert find_inputs(tmp_path, tmp_path) == [train, val]
    (tmp_path / "link").symlink_to(val.parent)
    assert main([f"--train_dir={tmp_path}", f"--val_dir={tmp_path}/val", *map(str, outputs(tmp_path))]) == 0
    assert tokens(tmp_path / "train.bin") == ids(["a.txt"])


def outputs(root: Path) -> list[object]:
    return ["--out_train_file", root / "train.bin", "--out_val_file", root / "val.bin"]


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path: Path, monkeypatch) -> None:
    write_texts(tmp_path, "a.txt", "b/c.txt")
    scandir = os.scandir

    def refuse(path: str | Path):
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PrepareError, match=f"{tmp_path}/b: Permission denied"):
        find_inputs(tmp_path)


def test_what_is_left_out_and_what_is_there_twice_is_named_by_its_path(tmp_path: Path, capsys) -> None:
    write_texts(tmp_path, "x/README.txt", "x/a.jsonl", "y/a.jsonl")
    assert len(find_inputs(tmp_path)) == 2
    assert "x/README.txt left out, since there are shards, such as x/a.jsonl\n" in capsys.readouterr().out
    write_texts(tmp_path, "y/a.jsonl.gz")
    with pytest.raises(PrepareError, match=r"y/a.jsonl and y/a.jsonl.gz: the same shard twice"):
        find_inputs(tmp_path)


NAMES = ["a/00.jsonl.zst", "b/00.jsonl.zst", "b/c/00.jsonl.zst", f"{'d' * 200}/{'文' * 60}.jsonl.zst"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with shards of one name and, in the last, a line that is wrong."""
    for seed, name in enumerate(NAMES):
        write_shard(tmp_path / "root" / name, texts(30, seed))
    (tmp_path / "root/b/c/01.jsonl").write_text("x\n")
    return tmp_path / "root"


EXPECTED = [text for seed in range(len(NAMES)) for text in texts(30, seed)]


@pytest.mark.parametrize("workers", [1, 8])
def test_inputs_of_one_name_are_kept_apart(root: Path, small_segments: None, tmp_path: Path, workers: int) -> None:
    out = tmp_path / "out.bin"
    sources = prepare.prepare(find_inputs(root), out, workers=workers, root=root)
    assert tokens(out) == ids(EXPECTED)
    assert [source.file for source in sources] == [*NAMES[:3], "b/c/01.jsonl", NAMES[3]]
    assert read_description(out).folder == "root"
    assert any(line.startswith(f"    {root}/b/c/01.jsonl:1: ") for line in summarize(root, sources))


@pytest.mark.parametrize("point", [40, 80])
def test_killed_among_inputs_of_one_name_it_goes_on(root: Path, small_segments: None, tmp_path: Path, point) -> None:
    out = tmp_path / "out.bin"
    assert run_and_die(lambda: prepare.prepare(find_inputs(root), out, workers=2, root=root), point)
    prepare.prepare(find_inputs(root), out, root=root)
    assert tokens(out) == ids(EXPECTED)


def test_shares_of_inputs_of_one_name(root: Path, small_segments: None, tmp_path: Path) -> None:
    out = tmp_path / "out.bin"
    for i in (1, 2, 3):
        prepare.prepare(find_inputs(root), out, root=root, shard=(i, 3))
    prepare.prepare(find_inputs(root), out, root=root, merge=True)
    assert tokens(out) == ids(EXPECTED)


def test_what_is_there_is_kept_when_a_folder_comes_or_all_is_moved(tmp_path: Path, capsys) -> None:
    for folder in ("train", "val"):
        write_shard(tmp_path / "old" / folder / "a.jsonl.zst", TEXTS)
    assert main([*map(str, run_flags(tmp_path / "old"))]) == 0
    write_shard(tmp_path / "old/train/b/a.jsonl.zst", texts(5))
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    capsys.readouterr()
    assert main([*map(str, run_flags(tmp_path / "new"))]) == 0
    assert "train.bin: keeping what it has of a.jsonl.zst\n" in capsys.readouterr().out
    assert tokens(tmp_path / "new/train.bin") == ids([*TEXTS, *texts(5)])
    assert main([*map(str, run_flags(tmp_path / "new"))]) == 0
    assert capsys.readouterr().out.count("nothing to do") == 2
