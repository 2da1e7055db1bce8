"""The embedded corpus: real text that every Python brings along, for a first training run without a network.

Three kinds of documents, in the Pile's own format:
- the standard library's sources and the language reference that `help()` shows, whole;
- what installed packages say about themselves: descriptions, README and other .md, .rst and .txt files;
- the interfaces of installed packages: every documented class and function, signature and docstring, a file each.

The text stays on this machine; each file keeps its own licence.
"""

import hashlib
import os
import platform
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from tools.fetching.shards import Note, ShardError, ShardWriter, read_note
from tools.preparing.chunks import SHARD_ENDINGS

SOURCE = "stdlib"
VAL_SHARE = 20  # one document in twenty is for validation
PROSE_SUFFIXES = {".md", ".rst", ".txt"}

_MODULE_DOCSTRING = re.compile(rb'\A(?:[ \t]*(?:#[^\n]*)?\r?\n)*[rRuU]?("""|\'\'\').*?\1', re.DOTALL)
# Either the start of a class or function, or a docstring right after the colon that ends a signature. Parsing every
# file with `ast` would say the same and take minutes.
_INTERFACE = re.compile(
    rb"^(?P<head>[ \t]*(?:async[ \t]+def|def|class)[ \t]+\w+)"
    rb'|:[ \t]*(?:#[^\n]*)?\n\s*[rRuU]?(?P<quote>"""|\'\'\').*?(?P=quote)',
    re.DOTALL | re.MULTILINE,
)
_BOILERPLATE = re.compile(r"licen[cs]e|copying|notice|requirements|cmakelists", re.IGNORECASE)


@dataclass(frozen=True)
class Corpus:
    """What `write_embedded_corpus` made, or found already made."""

    train_file: Path
    val_file: Path
    train_documents: int
    val_documents: int
    train_bytes: int  # UTF-8 bytes of text
    val_bytes: int
    written: bool  # False: the corpus was there already
    skipped: dict[str, int] = field(default_factory=dict)  # documents left out, by reason


def write_embedded_corpus(train_dir: Path, val_dir: Path) -> Corpus:
    """Write `train_dir/00.jsonl.zst` and `val_dir/val.jsonl.zst` from the files of the Python that runs this.

    No text is in both: each document falls to one side by the hash of its content, and equal contents count once.
    The order is that of the hashes, so it is mixed and the same every time. A corpus that is there already is kept.
    ShardError where the folders hold other shards.
    """
    if train_dir.resolve() == val_dir.resolve():
        raise ShardError(f"train and validation shards would share the folder {train_dir}: name two folders")
    train_file, val_file = train_dir / "00.jsonl.zst", val_dir / "val.jsonl.zst"
    notes = {file: note for file in (train_file, val_file) if (note := _own_note(file))}
    _refuse_other_shards(train_dir, val_dir, own=set(notes))
    if len(notes) == 2:
        return _describe(train_file, val_file, notes[train_file], notes[val_file], written=False, skipped={})

    skipped: Counter[str] = Counter()
    train: list[tuple[bytes, str, str]] = []
    val: list[tuple[bytes, str, str]] = []
    for digest, kind, text in sorted(_distinct(_documents(skipped), skipped)):
        # The last byte decides the side and the first ones the order: neither says anything about the other.
        (val if digest[-1] % VAL_SHARE == 0 else train).append((digest, kind, text))
    revision = f"Python {platform.python_version()}"
    with ShardWriter(train_file) as train_writer, ShardWriter(val_file) as val_writer:
        train_count = _write(train_writer, train)
        val_count = _write(val_writer, val)
        if not (train_count[0] and val_count[0]):
            raise ShardError(
                f"this Python's files give {train_count[0]} training and {val_count[0]} validation documents: "
                "too little to train on"
            )
        notes = [
            writer.publish(source=SOURCE, revision=revision, documents=count[0], text_bytes=count[1])
            for writer, count in ((train_writer, train_count), (val_writer, val_count))
        ]
    return _describe(train_file, val_file, *notes, written=True, skipped=dict(sorted(skipped.items())))


def _own_note(file: Path) -> Note | None:
    note = read_note(file)
    return note if note and note.source == SOURCE else None


def _refuse_other_shards(*folders: Path, own: set[Path]) -> None:
    found = (file for folder in folders for file in sorted(folder.glob("*")))
    if others := [file for file in found if file.name.lower().endswith(SHARD_ENDINGS) and file not in own]:
        raise ShardError(
            f"{others[0]} is not part of the embedded corpus"
            f"{f' (nor are {len(others) - 1} more files)' if len(others) > 1 else ''}, and nothing is written over it: "
            "choose other folders with --train_dir and --val_dir, or move the shards away"
        )


def _describe(
    train_file: Path, val_file: Path, train: Note, val: Note, *, written: bool, skipped: dict[str, int]
) -> Corpus:
    return Corpus(
        train_file=train_file,
        val_file=val_file,
        train_documents=train.documents,
        val_documents=val.documents,
        train_bytes=train.text_bytes,
        val_bytes=val.text_bytes,
        written=written,
        skipped=skipped,
    )


def _write(writer: ShardWriter, documents: list[tuple[bytes, str, str]]) -> tuple[int, int]:
    """Write documents; return how many there are and the bytes of their texts."""
    encode = msgspec.json.Encoder().encode
    for _, kind, text in documents:
        writer.write(encode({"text": text, "meta": {"pile_set_name": kind}}) + b"\n")
    return len(documents), sum(len(text.encode()) for _, _, text in documents)


def _distinct(documents: Iterator[tuple[str, bytes]], skipped: Counter[str]) -> Iterator[tuple[bytes, str, str]]:
    """Yield (SHA-256, kind, text) of the documents that are UTF-8, not empty, and not there yet."""
    seen: set[bytes] = set()
    for kind, content in documents:
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError:
            skipped["not UTF-8"] += 1
            continue
        if not text.strip():
            skipped["empty"] += 1
            continue
        digest = hashlib.sha256(text.encode()).digest()
        if digest in seen:
            skipped["duplicate"] += 1
            continue
        seen.add(digest)
        yield digest, kind, text


def _documents(skipped: Counter[str]) -> Iterator[tuple[str, bytes]]:
    """Yield (kind, content) of every document of this Python, in the order of their paths."""
    paths = sysconfig.get_paths()
    for file, content in _read_files(Path(paths["stdlib"]), skipped):
        source = file.suffix == ".py" and file.parent.name != "pydoc_data"  # the reference comes as prose below
        if source or (file.suffix in PROSE_SUFFIXES and not _BOILERPLATE.search(file.name)):
            yield "Python Standard Library", content
    for topic in _reference():
        yield "Python Reference", topic
    for folder in sorted({Path(paths["purelib"]), Path(paths["platlib"])}):
        for file, content in _read_files(folder, skipped):
            if file.suffix == ".py":
                if interface := _interface(content):
                    yield "Package Interfaces", interface
            elif file.name in ("METADATA", "PKG-INFO"):
                yield "Package Documentation", content.partition(b"\n\n")[2]  # what follows the header fields
            elif not file.parent.name.endswith(("-info", "licenses")) and not _BOILERPLATE.search(file.name):
                yield "Package Documentation", content


def _read_files(folder: Path, skipped: Counter[str]) -> Iterator[tuple[Path, bytes]]:
    """Yield (path, content) of the Python and prose files under `folder`, sorted, without the packages inside it."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in ("__pycache__", "site-packages", "dist-packages"))
        for name in sorted(names):
            file = Path(parent, name)
            if file.suffix == ".py" or file.suffix in PROSE_SUFFIXES or name in ("METADATA", "PKG-INFO"):
                try:
                    yield file, file.read_bytes()
                except OSError:  # a dangling link, or a file that only root may read
                    skipped["unreadable"] += 1


def _reference() -> Iterator[bytes]:
    """Yield the topics of the language reference that `help("for")` and its like show; some builds leave them out."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    for name in sorted(topics):
        yield topics[name].encode()


def _interface(source: bytes) -> bytes:
    """Return the module docstring of `source` and each documented class and function, as written, bodies left out."""
    module = _MODULE_DOCSTRING.match(source)
    parts = [module[0].lstrip()] if module else []
    start = None
    for match in _INTERFACE.finditer(source, module.end() if module else 0):
        if match["head"]:
            start = match.start()
        elif start is not None:
            parts.append(source[start : match.end()])
            start = None
    return b"\n\n".join(parts)
