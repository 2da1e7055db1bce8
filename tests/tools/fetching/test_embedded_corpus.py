"""The embedded corpus: real text, nothing in both parts, the same every time, nothing of a person's written over."""

import io
import json
import sys
import sysconfig
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zstandard

from tools.fetching import embedded_corpus
from tools.fetching.embedded_corpus import Corpus, write_embedded_corpus
from tools.fetching.shards import ShardError, note_path

PACKAGE = b'''"""Shapes."""
import math

class Circle:
    """A round thing."""

    def area(self, scale: float = 1.0) -> float:
        """Return the area."""
        return math.pi * self.radius**2 * scale

    def undocumented(self):
        return "secret"

async def draw(
    shape: Circle,
) -> None:  # slow
    r\'\'\'Draw `shape`.

    In one go.
    \'\'\'
    raise NotImplementedError
'''
INTERFACE = '''"""Shapes."""

class Circle:
    """A round thing."""

    def area(self, scale: float = 1.0) -> float:
        """Return the area."""

async def draw(
    shape: Circle,
) -> None:  # slow
    r\'\'\'Draw `shape`.

    In one go.
    \'\'\''''


def read(file: Path) -> Iterator[dict]:
    with open(file, "rb") as raw, zstandard.ZstdDecompressor().stream_reader(raw) as stream:
        yield from map(json.loads, io.TextIOWrapper(stream, encoding="utf-8", newline="\n"))


def texts(corpus: Corpus) -> dict[str, str]:
    """Return text -> kind of both parts."""
    return {
        line["text"]: line["meta"]["pile_set_name"]
        for file in (corpus.train_file, corpus.val_file)
        for line in read(file)
    }


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Python of two hundred and some files whose contents are known."""
    stdlib, site = tmp_path / "lib", tmp_path / "lib" / "site-packages"
    files = {
        "empty.py": b"\n  \n",
        "latin.py": "# caf\xe9".encode("latin-1"),
        "copy_of_0.py": b"module = 0\n",
        "marked.py": b"\xef\xbb\xbfmarked = True\n",
        "__pycache__/cached.py": b"cached = True\n",
        "notes.txt": "ÄÖÜ 你好\n".encode(),
        "LICENSE.txt": b"Do as you like.\n",
        "site-packages/shapes/__init__.py": PACKAGE,
        "site-packages/shapes/bare.py": b"x = 1\n",
        "site-packages/shapes/README.md": b"# Shapes\n",
        "site-packages/shapes-1.0.dist-info/METADATA": b"Name: shapes\nVersion: 1.0\n\nAll about shapes.\n",
        "site-packages/shapes-1.0.dist-info/top_level.txt": b"shapes\n",
    } | {f"module_{i}.py": f"module = {i}\n".encode() for i in range(200)}
    for name, content in files.items():
        (stdlib / name).parent.mkdir(parents=True, exist_ok=True)
        (stdlib / name).write_bytes(content)
    (stdlib / "dangling.py").symlink_to(stdlib / "nowhere.py")
    paths = {"stdlib": str(stdlib), "purelib": str(site), "platlib": str(site)}
    monkeypatch.setattr(sysconfig, "get_paths", lambda: paths)
    reference = types.ModuleType("pydoc_data.topics")
    reference.topics = {"for": "The for statement\n"}
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", reference)
    return stdlib


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Corpus]:
    return lambda **limits: write_embedded_corpus(tmp_path / "train", tmp_path / "val", **limits)


def test_what_is_taken_and_what_is_left_out(python: Path, write: Callable[..., Corpus]) -> None:
    corpus = write()
    found = texts(corpus)
    assert found["ÄÖÜ 你好\n"] == "Python Standard Library"
    assert found["marked = True\n"] == "Python Standard Library"
    assert found["The for statement\n"] == "Python Reference"
    assert found["# Shapes\n"] == "Package Documentation"
    assert found["All about shapes.\n"] == "Package Documentation"
    assert found[INTERFACE] == "Package Interfaces"
    assert sum(text.startswith("module = ") for text in found) == 200
    for left_out in ("cached = True\n", "Do as you like.\n", "shapes\n", "x = 1\n"):
        assert left_out not in found
    assert corpus.skipped == {"duplicate": 1, "empty": 1, "not UTF-8": 1, "unreadable": 1}


def test_counts_are_those_of_the_files(python: Path, write: Callable[..., Corpus]) -> None:
    corpus = write()
    train, val = list(read(corpus.train_file)), list(read(corpus.val_file))
    assert (corpus.train_documents, corpus.val_documents) == (len(train), len(val))
    assert corpus.train_bytes == sum(len(line["text"].encode()) for line in train)
    assert corpus.val_bytes == sum(len(line["text"].encode()) for line in val)
    assert len(texts(corpus)) == len(train) + len(val)  # no text twice, none in both
    assert 0 < len(val) < len(train) / 5
    numbers = [line["text"] for line in train if line["text"].startswith("module = ")]
    assert numbers != sorted(numbers)  # mixed, not in the order of the folders


def test_same_bytes_every_time(python: Path, tmp_path: Path) -> None:
    first = write_embedded_corpus(tmp_path / "a", tmp_path / "b")
    second = write_embedded_corpus(tmp_path / "c", tmp_path / "d")
    assert first.train_file.read_bytes() == second.train_file.read_bytes()
    assert first.val_file.read_bytes() == second.val_file.read_bytes()


def test_a_document_keeps_its_side_when_others_come(python: Path, tmp_path: Path) -> None:
    before = write_embedded_corpus(tmp_path / "a", tmp_path / "b")
    (python / "newcomer.py").write_text("newcomer = True\n")
    after = write_embedded_corpus(tmp_path / "c", tmp_path / "d")
    assert {line["text"] for line in read(before.val_file)} <= {line["text"] for line in read(after.val_file)}
    assert {line["text"] for line in read(before.train_file)} <= {line["text"] for line in read(after.train_file)}


def test_corpus_that_is_there_is_kept(python: Path, write: Callable[..., Corpus]) -> None:
    first = write()
    times = first.train_file.stat().st_mtime_ns, first.val_file.stat().st_mtime_ns
    (python / "newcomer.py").write_text("newcomer = True\n")
    again = write()
    assert not again.written and first.written
    assert (again.train_bytes, again.val_documents) == (first.train_bytes, first.val_documents)
    assert (first.train_file.stat().st_mtime_ns, first.val_file.stat().st_mtime_ns) == times


def test_a_python_without_files_leaves_nothing(write: Callable[..., Corpus], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(embedded_corpus, "_documents", lambda skipped: iter([("kind", b"all there is")]))
    with pytest.raises(ShardError, match="give 1 training and 0 validation documents: too little to train on"):
        write()
    assert not [file for folder in ("train", "val") for file in (tmp_path / folder).iterdir()]


@pytest.mark.parametrize(
    "name", ["train/00.jsonl.zst", "train/17.jsonl.zst", "val/val.jsonl.zst", "val/mine.jsonl", "val/a.JSONL.gz"]
)
def test_other_shards_are_not_touched(python: Path, write: Callable[..., Corpus], tmp_path: Path, name: str) -> None:
    theirs = tmp_path / name
    theirs.parent.mkdir()
    theirs.write_bytes(b"theirs")
    with pytest.raises(ShardError, match=theirs.name):
        write()
    assert theirs.read_bytes() == b"theirs"
    assert [file for folder in ("train", "val") for file in (tmp_path / folder).glob("*")] == [theirs]


def test_altered_corpus_counts_as_a_persons_own(python: Path, write: Callable[..., Corpus]) -> None:
    corpus = write()
    content = bytearray(corpus.train_file.read_bytes())
    content[-1] ^= 1
    corpus.train_file.write_bytes(content)
    with pytest.raises(ShardError, match="00.jsonl.zst"):
        write()
    assert corpus.train_file.read_bytes() == content


def test_half_written_corpus_is_completed(python: Path, write: Callable[..., Corpus]) -> None:
    corpus = write()
    whole = corpus.val_file.read_bytes()
    corpus.val_file.unlink()
    note_path(corpus.val_file).unlink()
    assert write().written
    assert corpus.val_file.read_bytes() == whole


def test_copied_corpus_is_recognised(python: Path, write: Callable[..., Corpus]) -> None:
    corpus = write()
    content = corpus.train_file.read_bytes()
    corpus.train_file.unlink()
    corpus.train_file.write_bytes(content)  # a new file with another time
    assert not write().written


def test_one_folder_for_both_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="two folders"):
        write_embedded_corpus(tmp_path, tmp_path)


@pytest.mark.slow
def test_this_python_has_tens_of_megabytes(tmp_path: Path) -> None:
    corpus = write_embedded_corpus(tmp_path / "train", tmp_path / "val")
    found = texts(corpus)
    assert corpus.train_bytes + corpus.val_bytes > 20e6
    assert 0.02 < corpus.val_bytes / corpus.train_bytes < 0.12
    assert len(found) == corpus.train_documents + corpus.val_documents
    assert any('"""Event loop using a selector' in text for text in found)  # asyncio, a source
    assert any('class Linear(Module):\n    r"""Applies an affine' in text for text in found)  # torch, an interface
