"""HDF5 of the classic script to token files and back: the same ids; what is wrong is refused, and nothing is left."""

import builtins
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiktoken

from engine.data import TokenFile
from engine.tokenizer import END_OF_TEXT, load_encoding
from tools import convert_hdf5
from tools.convert_hdf5 import convert, main
from tools.preparing.token_file import PrepareError, description_path, read_description

h5py = pytest.importorskip("h5py")

TEXTS = ["Hello, world!", "naïve café 中文 😀", "", "a" * 50]


def classic(path: Path, ids, dtype: type = np.int32, name: str = "tokens") -> Path:
    """Write a file as the classic script does: a dataset that grows with each text."""
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset(name, (0,), maxshape=(None,), dtype=dtype)
        for part in np.array_split(np.asarray(ids, dtype), 5):
            dataset.resize(len(dataset) + len(part), axis=0)
            dataset[len(dataset) - len(part) :] = part
    return path


def ids() -> list[int]:
    encoding = load_encoding()
    return [token for text in TEXTS for token in [*encoding.encode_ordinary(text), END_OF_TEXT]]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert_hdf5, "BLOCK_TOKENS", 7)


def test_there_and_back(tmp_path: Path) -> None:
    source = classic(tmp_path / "a.h5", ids())
    out, back = tmp_path / "a.bin", tmp_path / "back.hdf5"
    assert convert(source, out) == len(ids())
    assert TokenFile(out).tokens.tolist() == ids()
    description = read_description(out)
    assert (description.tokens, description.documents) == (len(ids()), len(TEXTS))
    assert description.bytes == sum(len(text.encode()) for text in TEXTS)
    assert (description.dtype, description.tokenizer, description.sources[0].file) == ("uint16", "r50k_base", "a.h5")
    assert convert(out, back) == len(ids())
    with h5py.File(back) as file:
        assert file["tokens"].dtype == np.int32 and file["tokens"].maxshape == (None,)
        assert file["tokens"][:].tolist() == ids()
    assert {path.name for path in tmp_path.iterdir()} == {"a.h5", "a.bin", "a.bin.json", "back.hdf5"}


def test_a_last_document_without_its_end_counts(tmp_path: Path) -> None:
    convert(classic(tmp_path / "a.h5", [1, END_OF_TEXT, 2, 3]), tmp_path / "a.bin")
    assert read_description(tmp_path / "a.bin").documents == 2


def test_other_integers_and_wide_ids(tmp_path: Path, monkeypatch) -> None:
    ranks, special = {bytes([i]): i for i in range(256)}, {"<|endoftext|>": 70_000}
    encoding = tiktoken.Encoding("wide", pat_str=".", mergeable_ranks=ranks, special_tokens=special)
    monkeypatch.setattr(convert_hdf5, "load_encoding", lambda name: encoding)
    expected = [*range(256), 70_000]
    convert(classic(tmp_path / "a.h5", expected, np.int64), tmp_path / "a.bin", "wide")
    file = TokenFile(tmp_path / "a.bin")
    assert (file.tokens.dtype, file.tokens.tolist(), file.end_of_text) == (np.dtype("<u4"), expected, 70_000)
    assert read_description(tmp_path / "a.bin").bytes == 256
    convert(tmp_path / "a.bin", tmp_path / "b.h5")
    with h5py.File(tmp_path / "b.h5") as back:
        assert back["tokens"][:].tolist() == expected


def test_a_token_file_without_json_is_nanogpts(tmp_path: Path) -> None:
    np.array(ids(), "<u2").tofile(tmp_path / "train.bin")
    convert(tmp_path / "train.bin", tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5") as file:
        assert file["tokens"][:].tolist() == ids()


@pytest.mark.parametrize(("bad", "place"), [(-1, 3), (50257, 0), (2**31 - 1, 20)])
def test_ids_out_of_range_are_refused(tmp_path: Path, bad: int, place: int) -> None:
    wrong = [5] * 30
    wrong[place] = bad
    with pytest.raises(PrepareError, match=rf"a\.h5: id {bad} at place {place} is none of r50k_base's, 0 to 50256"):
        convert(classic(tmp_path / "a.h5", wrong), tmp_path / "a.bin")
    assert [path.name for path in tmp_path.iterdir()] == ["a.h5"]


def test_ids_beyond_int32_are_refused(tmp_path: Path) -> None:
    np.array([1, 2**31], "<u4").tofile(tmp_path / "a.bin")
    description_path(tmp_path / "a.bin").write_text(
        '{"tokenizer": "x", "vocab_size": 4294967295, "end_of_text": 1, "dtype": "uint32", "tokens": 2, '
        '"documents": 1, "bytes": 2, "sources": []}'
    )
    with pytest.raises(PrepareError, match="id 2147483648, more than HDF5's int32"):
        convert(tmp_path / "a.bin", tmp_path / "a.h5")
    assert not (tmp_path / "a.h5").exists()


def test_what_is_written_wrong_is_noticed(tmp_path: Path, monkeypatch) -> None:
    source = classic(tmp_path / "a.h5", ids())
    convert(source, tmp_path / "good.bin")
    original = np.memmap

    def damaged(path, dtype, mode):
        found = np.array(original(path, dtype, mode))
        found[11] += 1
        return found

    monkeypatch.setattr(np, "memmap", damaged)
    with pytest.raises(PrepareError, match="a.bin would differ from .*a.h5 at place 11"):
        convert(source, tmp_path / "a.bin")
    monkeypatch.setattr(np, "memmap", lambda path, dtype, mode: original(path, dtype, mode)[:-1])
    with pytest.raises(PrepareError, match="a.bin would have"):
        convert(source, tmp_path / "a.bin")
    assert not (tmp_path / "a.bin").exists() and not list(tmp_path.glob("*.partial"))


WRONG = {
    "no dataset": (lambda path: classic(path, [1], name="ids"), "has no dataset `tokens`, only: ids"),
    "floats": (lambda path: classic(path, [1.0], dtype=np.float32), "not a row of integers"),
    "nothing in it": (lambda path: classic(path, []), "has no ids"),
    "no HDF5": (lambda path: path.write_bytes(b"nonsense"), "a.h5"),
    "cut off": (lambda path: path.write_bytes(classic(path, ids() * 100).read_bytes()[:3000]), "a.h5"),
    "absent": (lambda path: None, "a.h5"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_the_classic_file_is_refused(tmp_path: Path, name: str) -> None:
    make, message = WRONG[name]
    make(tmp_path / "a.h5")
    with pytest.raises(PrepareError, match=message):
        convert(tmp_path / "a.h5", tmp_path / "a.bin")
    assert not list(tmp_path.glob("*.bin*"))


def test_arguments_that_cannot_be_meant(tmp_path: Path, capsys) -> None:
    source = classic(tmp_path / "a.h5", ids())
    (tmp_path / "b.bin").write_bytes(b"precious")
    for target, message in (("b.bin", "there already"), ("b.h5", "one must be HDF5")):
        assert main([str(source), str(tmp_path / target)]) == 2
        assert message in capsys.readouterr().err
    assert main([str(source), str(tmp_path / "c.bin"), "--tokenizer_name", "r60k"]) == 2
    assert "unknown tokenizer 'r60k'" in capsys.readouterr().err
    assert (tmp_path / "b.bin").read_bytes() == b"precious"
    (tmp_path / "odd.bin").write_bytes(b"123")
    with pytest.raises(PrepareError, match="no whole number of uint16 ids"):
        convert(tmp_path / "odd.bin", tmp_path / "c.h5")


@pytest.mark.parametrize("name", ["README.md", "readme"])
def test_text_is_no_token_file(name: str, tmp_path: Path, capsys) -> None:
    (tmp_path / name).write_text("It was a dark and stormy night.\n" * 100)
    assert main([str(tmp_path / name), str(tmp_path / "y.h5")]) == 2
    assert f"{name} is text, not tokens: prepare it first" in capsys.readouterr().err
    assert not (tmp_path / "y.h5").exists()


def test_ctrl_c_says_one_line(tmp_path: Path, monkeypatch, capsys) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(convert_hdf5, "_compare", interrupted)
    source = classic(tmp_path / "a.h5", ids())
    assert main([str(source), str(tmp_path / "a.bin")]) == 130
    assert capsys.readouterr().err == "interrupted; nothing is written\n" and [*tmp_path.iterdir()] == [source]


def test_without_h5py(tmp_path: Path, monkeypatch) -> None:
    source = classic(tmp_path / "a.h5", ids())
    original = builtins.__import__

    def without(name, *arguments, **options):
        if name == "h5py":
            raise ImportError(name)
        return original(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(PrepareError, match=r"pip install h5py$"):
        convert(source, tmp_path / "a.bin")


def test_the_program(tmp_path: Path) -> None:
    source = classic(tmp_path / "a.h5", ids())
    command = [sys.executable, "-m", "tools.convert_hdf5", source, tmp_path / "a.bin"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/a.bin: {len(ids())} ids, each compared with {source}\n")
