"""What a token file says of itself: the JSON beside the flat ids."""

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np

from tools.disk import hash_file
from tools.preparing.chunks import LOSSES, TEXT_KEY, Problem
from tools.preparing.split import Split

FORMAT = 1
MAX_EXAMPLES = 5  # lines named of each kind of problem and input


class PrepareError(RuntimeError):
    """Data that cannot be prepared; the message says what, where, and what to do."""


class NoText(PrepareError):
    """There is no text in any input; `sources` tell what is."""

    def __init__(self, sources: "list[Source]", split: Split | None = None) -> None:
        names = listed([source.file for source in sources])
        hint = " (--text_key names another key of the texts)" if any("no_text" in s.skipped for s in sources) else ""
        what = "text"
        if split:
            what += " to train on" if split.side == "train" else " to validate on"
            hint += f" (--val_fraction {split.val_fraction} divides whole documents: these may be too few)"
        super().__init__(f"no {what} in {names}: there is nothing to write{hint}")
        self.sources = sources


class Source(msgspec.Struct, kw_only=True):
    """An input, and what it gave; in a part of a token file, what that part of the input gave."""

    file: str  # its path in the folder of all inputs
    lines: int = 0
    documents: int = 0
    tokens: int = 0
    bytes: int = 0  # UTF-8 bytes of the texts
    skipped: dict[str, int] = {}  # how often each of chunks.LOSSES
    noted: dict[str, int] = {}  # the same for what cost no text
    examples: dict[str, list[tuple[int, str]]] = {}  # kind -> its first lines, and what was said of them
    file_bytes: int  # of the input as it is on disk
    file_mtime_ns: int
    file_sha256: str | None = None  # None where not all of it was read

    @classmethod
    def of(cls, path: Path, name: str | None = None) -> "Source":
        stat = path.stat()
        return cls(file=name or path.name, file_bytes=stat.st_size, file_mtime_ns=stat.st_mtime_ns)

    def is_of(self, other: "Source") -> bool:
        """Whether both are of one state of one file."""
        mine, others = ((source.file, source.file_bytes, source.file_mtime_ns) for source in (self, other))
        return mine == others

    def is_still(self, path: Path, name: str, *, told: bool = False) -> bool:
        """Whether `path` is the input this tells of; where only the time changed, as a copy's does, by its hash.

        told: a person is, once a program, that inputs are hashed, which for large ones takes minutes.
        """
        now = Source.of(path, name)
        if self.is_of(now):
            return True
        if (self.file, self.file_bytes) != (now.file, now.file_bytes) or self.file_sha256 is None:
            return False
        if told:
            _tell()
        return _hash(path, now.file_mtime_ns) == self.file_sha256

    def count(self, lines: int, problems: list[Problem]) -> None:
        """Count lines that follow, and the problems in them, numbered from the first of them."""
        for problem in problems:
            counts = self.skipped if problem.kind in LOSSES else self.noted
            counts[problem.kind] = counts.get(problem.kind, 0) + 1
            if counts[problem.kind] <= MAX_EXAMPLES:
                self.examples.setdefault(problem.kind, []).append((self.lines + problem.line, problem.detail))
        self.lines += lines

    def add(self, later: "Source") -> None:
        """Take in what the part of the input that follows gave."""
        for mine, others in ((self.skipped, later.skipped), (self.noted, later.noted)):
            for kind, count in others.items():
                mine[kind] = mine.get(kind, 0) + count
        for kind, found in later.examples.items():
            lines = [(self.lines + line, detail) for line, detail in found]
            self.examples[kind] = (self.examples.get(kind, []) + lines)[:MAX_EXAMPLES]
        self.lines += later.lines
        self.documents += later.documents
        self.tokens += later.tokens
        self.bytes += later.bytes
        self.file_sha256 = later.file_sha256


class Description(msgspec.Struct, kw_only=True):
    """The JSON beside a token file."""

    format: int = FORMAT
    tokenizer: str
    vocab_size: int
    end_of_text: int
    dtype: str
    tokens: int
    documents: int
    bytes: int
    max_data: int | None = None
    text_key: str = TEXT_KEY
    split: Split | None = None  # None: all documents
    folder: str | None = None  # of the inputs, as seen from the token file: both may move together
    sources: list[Source]

    def is_of(self, names: Mapping[Path, str], folder: str) -> bool:
        """Whether the token file is from this folder, or from some of these inputs only."""
        known = {(name, path.stat().st_size) for path, name in names.items()}
        return self.folder == folder or all((source.file, source.file_bytes) in known for source in self.sources)


def listed(names: Sequence[str]) -> str:
    """Return the first of some names and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@functools.cache
def _hash(path: Path, mtime_ns: int) -> str:
    return hash_file(path)


@functools.cache
def _tell() -> None:
    print("inputs have another time than before: looking by their hashes whether they are the same", flush=True)


def description_path(file: Path) -> Path:
    return file.with_name(file.name + ".json")


def folder_of(root: Path, file: Path) -> str:
    """Return the folder of the inputs, as seen from a token file."""
    return os.path.relpath(root.resolve(), file.parent.resolve())


def claimed(file: Path) -> Description | None:
    """Return what the JSON beside a token file says, of whatever file; None where there is none, or of another kind."""
    try:
        return msgspec.json.decode(description_path(file).read_bytes(), type=Description)
    except (FileNotFoundError, msgspec.DecodeError):
        return None


def read_description(file: Path) -> Description | None:
    """Return what the JSON beside a token file says, None where the two are not there or do not belong together."""
    description = claimed(file)
    whole = description and description.tokens * np.dtype(description.dtype).itemsize
    return description if file.exists() and file.stat().st_size == whole else None
