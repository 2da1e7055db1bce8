"""Fetches training text: the Pile's shards from the Hugging Face hub, or the embedded corpus of this Python.

    python tools/download.py                        the first training shard and the validation shard
    python tools/download.py --train_max 30         the whole Pile
    python tools/download.py --size small           about 1 GB of text
    python tools/download.py --source stdlib        this Python's own sources and documentation, no network

Interrupted, the same command goes on where it was; finished, it fetches nothing.
"""

import hashlib
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import filelock
import msgspec
import zstandard
from huggingface_hub.utils import WeakFileLock

from engine.command_line import CommandLine, ends_on_ctrl_c
from engine.report import human
from tools.disk import hash_file
from tools.fetching.embedded_corpus import SOURCE as EMBEDDED
from tools.fetching.embedded_corpus import Corpus, write_embedded_corpus
from tools.fetching.hub import RemoteFile, explained, find_files, read_through
from tools.fetching.shards import Note, ShardError, ShardWriter, publish, read_note, write_note
from tools.progress import Progress

REPOSITORY = "monology/pile-uncopyrighted"
TRAIN_SHARDS = 30
SIZES = {"small": 10**9, "medium": 5 * 10**9, "large": 10**10}  # UTF-8 bytes of training text
VAL_SHARE = 100  # with a size: one byte of validation text to a hundred of training text


@dataclass(frozen=True)
class Job:
    """One shard: its path in the repository and its place on disk."""

    path: str
    shard: Path


@dataclass(frozen=True)
class Order:
    """Shards to have, in this order: all of each, or only so many of their first lines as hold `text_bytes` of text."""

    jobs: list[Job]
    text_bytes: int | None


class Line(msgspec.Struct):
    """What counts of a line when its text is measured."""

    text: str


def download(
    train_dir: Path, val_dir: Path, *, train_max: int = 1, size: str | None = None, endpoint: str | None = None
) -> None:
    """Fetch the first `train_max` training shards and the validation shard or, with `size`, only so much of their text.

    A shard gets its name once it is complete and, where it is a whole one, has the hub's SHA-256. What is there already
    stays, and where everything is, the hub is not asked. ShardError says what went wrong, where, and what to do.
    """
    if not 1 <= train_max <= TRAIN_SHARDS:
        raise ShardError(f"--train_max {train_max}: the Pile has training shards 1 to {TRAIN_SHARDS}")
    if train_dir.resolve() == val_dir.resolve():
        raise ShardError(f"training and validation shards would share the folder {train_dir}: name two folders")
    text_bytes = SIZES[size] if size else None
    val = Order([Job("val.jsonl.zst", val_dir / "val.jsonl.zst")], text_bytes // VAL_SHARE if size else None)
    names = [f"{i:02}.jsonl.zst" for i in range(train_max)]
    train = Order([Job(f"train/{name}", train_dir / name) for name in names], text_bytes)

    orders = [_outstanding(val), _outstanding(train)]
    if not any(order.jobs for order in orders):
        print(f"nothing to fetch: {train_dir} and {val_dir} have it all")
        return
    paths = [job.path for order in orders for job in order.jobs]
    remote = {file.path: file for file in find_files(REPOSITORY, paths, endpoint=endpoint)}
    for order in orders:
        for job in order.jobs:
            _adopt(job, remote[job.path])
    orders = [_outstanding(order) for order in orders]
    _check_space(orders, remote)
    for order in orders:
        missing = order.text_bytes
        for job in order.jobs:
            file = remote[job.path]
            with explained(str(file)), _locked(job.shard.parent):
                if missing is None:
                    _fetch_whole(file, job.shard)
                elif missing > 0:
                    missing -= _fetch_text(file, job.shard, missing)


def _outstanding(order: Order) -> Order:
    """Return what of `order` is not on disk yet; ShardError where a shard of another kind is in the way."""
    jobs, text_bytes = [], order.text_bytes
    for job in order.jobs:
        note = read_note(job.shard)
        if note and note.source != EMBEDDED and (note.source, note.file) != (REPOSITORY, job.path):
            raise ShardError(f"{job.shard} holds {note.file} of {note.source}: move it away, or choose another folder")
        if note is None or note.source == EMBEDDED:
            jobs.append(job)
        elif text_bytes is None:
            if not note.whole:
                jobs.append(job)
        elif note.text_bytes is None or note.text_bytes >= text_bytes:  # None: a whole shard, more than any size
            return Order([], 0)
        elif note.whole:
            text_bytes -= note.text_bytes
        else:
            jobs.append(job)
    return Order(jobs, text_bytes)


def _adopt(job: Job, file: RemoteFile) -> None:
    """Give a file that came without a note its note where it is the hub's shard; ShardError where it is another."""
    if not job.shard.exists() or read_note(job.shard):
        return
    if job.shard.stat().st_size != file.bytes or hash_file(job.shard) != file.sha256:
        raise ShardError(
            f"{job.shard} is not {file} (SHA-256 {file.sha256}), and nothing is written over it: "
            "move it away, or choose another folder with --train_dir and --val_dir"
        )
    write_note(job.shard, _whole(file, mtime_ns=job.shard.stat().st_mtime_ns))
    print(f"{job.shard}: there already, SHA-256 verified")


def _check_space(orders: list[Order], remote: dict[str, RemoteFile]) -> None:
    """Say how much is to be fetched onto which disk; ShardError where one has less room than that."""
    needed: dict[int, int] = defaultdict(int)  # by device: both folders may be on one
    places: dict[int, Path] = {}
    for order in (order for order in orders if order.jobs):
        place = next(folder for folder in order.jobs[0].shard.resolve().parents if folder.exists())
        size = sum(remote[job.path].bytes - _kept_bytes(_part(remote[job.path], job.shard)) for job in order.jobs)
        if order.text_bytes is not None:
            # What is fetched and what is written from it are there at once; together they take less than the text.
            size = min(size, order.text_bytes)
        device = place.stat().st_dev
        places.setdefault(device, place)
        needed[device] += size
    for device, size in needed.items():
        free = shutil.disk_usage(places[device]).free
        print(
            f"{REPOSITORY}: up to {human(size, 'B')} to fetch, {human(free, 'B')} free on the disk of {places[device]}"
        )
        if size > free:
            raise ShardError(
                f"{human(size, 'B')} do not fit into the {human(free, 'B')} free on the disk of {places[device]}: "
                "free some space, choose another disk with --train_dir and --val_dir, lower --train_max, "
                "or take --size small"
            )


def _part(file: RemoteFile, shard: Path) -> Path:
    """Return where the first bytes of `file` are kept; its checksum is in the name, so no two versions mix."""
    return shard.with_name(f"{shard.name}.{file.sha256[:12]}.part")


def _kept_bytes(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep a second download out of `folder`: two would add to the same part."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with WeakFileLock(folder / ".download.lock", timeout=1):
            yield
    except filelock.Timeout:
        raise ShardError(f"another download is writing to {folder}: wait for it, or stop it") from None


def _fetch_whole(file: RemoteFile, shard: Path) -> None:
    """Fetch all of `file` and give it its name where its SHA-256 is right; else remove it and raise ShardError."""
    part = _part(file, shard)
    digest = hashlib.sha256()
    with Progress(shard.name, file.bytes) as bar:
        for chunk in read_through(file, part):
            digest.update(chunk)
            bar.add(len(chunk))
    if digest.hexdigest() != file.sha256:
        raise _damaged(file, part)
    publish(part, shard, _whole(file))
    print(f"{shard}: {human(file.bytes, 'B')}, SHA-256 verified")


def _fetch_text(file: RemoteFile, shard: Path, text_bytes: int) -> int:
    """Write the first lines of `file` that together hold `text_bytes` of text; return the bytes of text they hold.

    Where the file has less, all of it is taken, checked as in `_fetch_whole`.
    """
    part = _part(file, shard)
    kept, used, documents, text = _kept_bytes(part), 0, 0, 0
    decompressor = zstandard.ZstdDecompressor().decompressobj(read_across_frames=True)
    rest = b""
    with ShardWriter(shard) as writer, Progress(shard.name, text_bytes) as bar:
        for chunk in read_through(file, part):
            used += len(chunk)
            try:
                lines = (rest + decompressor.decompress(chunk)).split(b"\n")
            except zstandard.ZstdError:
                raise _damaged(file, part) from None
            rest = lines.pop()
            before, taken = text, 0
            while taken < len(lines) and text < text_bytes:
                text += _text_bytes(lines[taken])
                taken += 1
            documents += taken
            bar.add(text - before)
            writer.write(b"".join(line + b"\n" for line in lines[:taken]))
            if text >= text_bytes:
                break
        if text >= text_bytes:
            origin = {"source": REPOSITORY, "revision": file.revision, "file": file.path, "whole": False}
            writer.publish(**origin, documents=documents, text_bytes=text)
            if kept <= used:  # a longer one is left from fetching the whole shard, which may go on later
                part.unlink()
            print(f"{shard}: the first {human(text, 'B')} of text of {file}")
            return text
    if rest:
        documents, text = documents + 1, text + _text_bytes(rest)
    if hash_file(part) != file.sha256:
        raise _damaged(file, part)
    publish(part, shard, _whole(file, documents=documents, text_bytes=text))
    print(f"{shard}: {human(text, 'B')} of text, all there is in {file}, SHA-256 verified")
    return text


def _text_bytes(line: bytes) -> int:
    """Return the UTF-8 bytes of the text of a line; 0 where it has none, which tools/prepare.py will name."""
    try:
        return len(msgspec.json.decode(line, type=Line).text.encode())
    except (msgspec.DecodeError, UnicodeEncodeError):
        return 0


def _whole(file: RemoteFile, **known: int) -> Note:
    return Note(
        source=REPOSITORY, revision=file.revision, file=file.path, bytes=file.bytes, sha256=file.sha256, **known
    )


def _damaged(file: RemoteFile, part: Path) -> ShardError:
    part.unlink()
    return ShardError(
        f"{file} arrived damaged, and what was fetched is removed: run the same command again; "
        "where it happens again, look for a failing disk, or a proxy that alters what it passes on"
    )


@ends_on_ctrl_c("interrupted; the same command goes on")
def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, 2 with a message for a ShardError, 130 when interrupted."""
    parser = CommandLine(__doc__)
    about = f"training shards, 1 to {TRAIN_SHARDS} (default 1)"
    parser.add_argument("--train_max", type=int, default=1, metavar="N", help=about)
    for name, path in (("--train_dir", "data/train"), ("--val_dir", "data/val")):
        parser.add_argument(name, type=Path, default=Path(path), metavar="FOLDER", help="default %(default)s")
    parser.add_argument("--size", choices=SIZES, help="about 1, 5 or 10 GB of text, instead of whole shards")
    parser.add_argument("--source", choices=("pile", EMBEDDED), default="pile", help="default %(default)s")
    options = parser.parse_args(arguments)
    if options.source == EMBEDDED and (options.size or options.train_max != 1):
        parser.error("--size and --train_max are for the Pile; the embedded corpus is taken whole")
    try:
        with explained(f"{options.train_dir} and {options.val_dir}"):
            if options.source == EMBEDDED:
                _report(write_embedded_corpus(options.train_dir, options.val_dir))
            else:
                download(options.train_dir, options.val_dir, train_max=options.train_max, size=options.size)
    except ShardError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _report(corpus: Corpus) -> None:
    for file, documents, size in (
        (corpus.train_file, corpus.train_documents, corpus.train_bytes),
        (corpus.val_file, corpus.val_documents, corpus.val_bytes),
    ):
        print(
            f"{file}: {human(size, 'B')} of text in {documents} documents{'' if corpus.written else ', there already'}"
        )
    if corpus.skipped:
        print("left out: " + ", ".join(f"{count} {reason}" for reason, count in corpus.skipped.items()))


if __name__ == "__main__":
    sys.exit(main())
