"""Turns shards of text into token files: the documents of all shards, in order, as one flat file of ids.

    python tools/prepare.py                              data/train and data/val, on all cores
    python tools/prepare.py --max_data 1000              the first 1000 JSON objects of each shard
    python tools/prepare.py --text_key content           of lines like {"content": "..."}
    python tools/prepare.py --val_fraction 0.01          validate on about a hundredth of the documents of --train_dir
    python tools/prepare.py --shard 2/4                  the second of four machines' share of the work ...
    python tools/prepare.py --merge                      ... and, when all four are done, one file of all shares

Folders are searched with all folders inside them, hidden ones left out. One without shards is taken for documents in
plain text, one a file (.txt, .txt.zst, .txt.gz).

Interrupted, the same command goes on where it was; finished, it does nothing. What a shard should not contain is
counted and listed at the end, and the rest prepared; --strict stops at the first line that would be lost or changed.
"""

import argparse
import errno
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from engine.command_line import CommandLine, ends_on_ctrl_c, positive
from engine.report import human
from engine.tokenizer import DEFAULT_TOKENIZER
from tools.preparing.chunks import TEXT_KEY, Problem
from tools.preparing.compiling import compile_ahead, told
from tools.preparing.inputs import NoInputs, check_inputs, find_inputs, names_of, root_of
from tools.preparing.pipeline import Pipeline, Work, refuse_losses
from tools.preparing.split import Split
from tools.preparing.summary import summarize
from tools.preparing.text_encoders import TextEncoder, load_text_encoder
from tools.preparing.text_files import is_text_file
from tools.preparing.token_file import NoText, PrepareError, Source, claimed, description_path, folder_of, listed
from tools.preparing.workers import Helpers, available_cores, shares
from tools.preparing.workspace import Settings, Workspace
from tools.progress import Progress

VAL_DIR = Path("data/val")
PATIENCE_S = 5
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def prepare(
    inputs: Sequence[Path],
    out_file: Path,
    tokenizer_name: str = DEFAULT_TOKENIZER,
    max_data: int | None = None,
    workers: int | None = None,
    strict: bool = False,
    *,
    root: Path | None = None,
    shard: tuple[int, int] | None = None,
    merge: bool = False,
    text_key: str = TEXT_KEY,
    split: Split | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> list[Source]:
    """Write the documents of `inputs`, in order, to `out_file` and `out_file`.json; return what each input gave.

    root: the folder from which inputs are named, None for the one that has all. max_data: JSON objects taken of each
    input, None for all. workers: threads that parse and encode, None for as many as cores may be used. shard (i, n):
    only prepare the i-th, from 1, of n shares of the inputs; the file is then made by a call with `merge`, which
    prepares nothing. text_key: of the text in a shard's objects. split: the documents to take, None for all.
    overwrite: replace what was prepared from other inputs. PrepareError says what went wrong, where, and what to do;
    what is done by then is kept for the next call.
    """
    check_inputs(inputs)
    root = root or root_of(inputs)
    check_output(out_file, inputs, root, overwrite)
    try:
        with told(progress):
            encoder = load_text_encoder(tokenizer_name)
    except ValueError as error:
        raise PrepareError(str(error)) from None
    settings = Settings(tokenizer=tokenizer_name, max_data=max_data, text_key=text_key, split=split)
    workspace = Workspace(out_file, inputs, settings, encoder.dtype, root, told=progress)
    with _explained(workspace), workspace.locked(shared=shard is not None):
        if description := workspace.finished():
            if shard is None:
                workspace.remove()
            if strict:
                _refuse_losses(inputs, description.sources)
            made = f"{description.tokens} tokens of {description.documents} documents"
            print(f"{out_file}: {made} are there, nothing to do")
            return description.sources
        if shard is None:
            _take_over(workspace, progress)
            mine = workspace.inputs
        else:
            mine = workspace.inputs[shard[0] - 1 :: shard[1]]
        if strict:
            _refuse_losses(mine, [workspace.made(source) for source in mine])
        if merge:
            _check_complete(workspace)
        else:
            _fill(workspace, mine, encoder, workers or available_cores(), strict, progress, merging=shard is None)
        if shard is not None:
            print(f"{out_file}: share {shard[0]} of {shard[1]} is done; when all are, run again with --merge")
            return [workspace.made(source) for source in mine]
        workspace.merge(shown=progress)
        description = workspace.publish(encoder.vocab_size, encoder.end_of_text)
    print(f"{out_file}: {description.tokens} tokens of {description.documents} documents, {description.dtype}")
    return description.sources


def _take_over(workspace: Workspace, progress: bool) -> None:
    """Begin with what earlier runs have left."""
    if changed := workspace.tidy(shown=progress):
        print(f"{listed(changed)}: damaged, changed, or prepared in another way before; doing that part again")
    if reused := workspace.reuse(shown=progress):
        print(f"{workspace.file}: keeping what it has of {listed(reused)}")


def _fill(
    workspace: Workspace,
    inputs: list[Path],
    encoder: TextEncoder,
    workers: int,
    strict: bool,
    progress: bool,
    *,
    merging: bool,
) -> None:
    """Finish all segments of `inputs`."""
    left = {}
    for source in workspace.missing(inputs):
        place = workspace.reach(source)
        left[source] = source.stat().st_size - place.consumed
        if place.segment:
            print(f"{source}: going on at line {workspace.made(source).lines + 1}")

    def report(work: Work) -> None:
        shown.add(work.consumed, work.bytes, work.tokens)

    if left:
        with told(progress):
            compile_ahead(encoder, json=not all(map(is_text_file, left)))
    # The first of several bad lines is only known where one process goes through the inputs in order.
    threads = [workers] if strict else shares(workers, sum(left.values()))
    rates = ("B/s of text", " tokens/s")
    with (
        Progress(workspace.file.name, sum(left.values()), rates=rates, shown=progress) as shown,
        Helpers(workspace, list(left), threads[1:], report, merging=merging) as helpers,
        Pipeline(workspace, encoder, threads[0], report, merging=merging, strict=strict) as pipeline,
    ):
        pipeline.run(list(left))
        helpers.wait()
        patience = time.monotonic() + PATIENCE_S
        # A helper may have died, or one of a run that was killed just now may still be ending.
        while missing := workspace.missing(inputs):
            if time.monotonic() > patience:
                raise PrepareError(f"another run is preparing {missing[0]}: wait for it, or stop it")
            pipeline.run(missing)
            time.sleep(0.05)


def check_output(out_file: Path, inputs: Sequence[Path], root: Path, overwrite: bool = False) -> None:
    """PrepareError where `out_file` would replace what this program did not make, or not from these inputs."""
    if not out_file.exists():
        return
    if any(out_file.samefile(path) for path in inputs):
        raise PrepareError(f"{out_file} is one of the shards: name another file for the tokens")
    made = claimed(out_file)
    if made is None:
        missing = description_path(out_file).name
        raise PrepareError(
            f"{out_file} is there already, and without a {missing} of this program's it may be anything: "
            "move it away, or name another file"
        )
    if overwrite:
        return
    names = names_of(inputs, root)
    if not made.is_of(names, folder_of(root, out_file)):
        theirs, ours = listed([source.file for source in made.sources]), listed(list(names.values()))
        folder = "" if made.folder is None else f" in {os.path.normpath(out_file.parent / made.folder)}"
        raise PrepareError(
            f"{out_file} was prepared from {theirs}{folder}, and now is to be from {ours} in {root}: "
            "name another file, or replace it with --overwrite"
        )


def _check_complete(workspace: Workspace) -> None:
    """PrepareError naming the inputs that are not done."""
    if missing := workspace.missing(workspace.inputs):
        names = listed([workspace.name(source) for source in missing])
        raise PrepareError(
            f"{workspace.file}: {len(missing)} of {len(workspace.inputs)} inputs are not done: {names}. "
            "Prepare them with the same command without --merge, or "
            f"copy what other machines have in {workspace.folder.name} into {workspace.folder}"
        )


def _refuse_losses(inputs: Sequence[Path], sources: Sequence[Source]) -> None:
    """PrepareError for the first problem of earlier runs that lost or changed something."""
    for path, source in zip(inputs, sources):
        refuse_losses(path, [Problem(kind, *lines[0]) for kind, lines in source.examples.items()])


@contextmanager
def _explained(workspace: Workspace) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise PrepareError(f"{error.filename or workspace.file}: {error.strerror}") from error
        free = human(shutil.disk_usage(workspace.file.parent).free, "B")
        raise PrepareError(
            f"no room left for {workspace.file} ({free} free): what is done is kept in {workspace.folder}. "
            "Free some space and run the same command again"
        ) from error


def _print_summary(folder: Path, sources: Sequence[Source]) -> None:
    for line in summarize(folder, sources):
        print(line, flush=True)


def parse_shard(text: str) -> tuple[int, int]:
    """Return (i, n) of "i/n"."""
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form i/n with i from 1 to n, as in 2/4")
    return int(number), int(count)


def parse_fraction(text: str) -> float:
    """Return a number above 0 and below 1."""
    try:
        if 0 < (fraction := float(text)) < 1:
            return fraction
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"must be above 0 and below 1, got {text!r}")


def parse_key(text: str) -> str:
    """Return a key that JSON has no second way to write, \\u aside."""
    if re.search(r'["\\/\x00-\x1f]', text):
        raise argparse.ArgumentTypeError(f"must have no quotes, slashes or control characters, got {text!r}")
    return text


@dataclass(frozen=True)
class Job:
    """A token file to make of a folder's inputs."""

    folder: Path
    inputs: list[Path]
    out_file: Path
    split: Split | None = None


def _jobs(options: argparse.Namespace) -> list[Job]:
    """Return the training file and the validation file to make; PrepareError where there are no inputs."""
    train_dir, outputs = options.train_dir, (options.out_train_file, options.out_val_file)
    if fraction := options.val_fraction:
        inputs = find_inputs(train_dir)
        splits = [Split(val_fraction=fraction, side=side) for side in ("train", "val")]
        return [Job(train_dir, inputs, *pair) for pair in zip(outputs, splits)]
    val_dir = options.val_dir or VAL_DIR
    train = find_inputs(train_dir, val_dir)
    try:
        val = find_inputs(val_dir, train_dir)
    except NoInputs as error:
        raise PrepareError(f"{error}; to validate on some of {train_dir}: --val_fraction 0.01") from None
    return [Job(train_dir, train, outputs[0]), Job(val_dir, val, outputs[1])]


@ends_on_ctrl_c("interrupted; the same command goes on")
def main(arguments: list[str] | None = None) -> int:
    parser = CommandLine(__doc__)
    for name, path, metavar in (
        ("--train_dir", "data/train", "FOLDER"),
        ("--out_train_file", "data/train/pile_train.bin", "FILE"),
        ("--out_val_file", "data/val/pile_dev.bin", "FILE"),
    ):
        parser.add_argument(name, type=Path, default=Path(path), metavar=metavar, help="default %(default)s")
    about = f"default {VAL_DIR}"
    parser.add_argument("--val_dir", type=Path, metavar="FOLDER", help=about)
    about = "of the documents of --train_dir, by a hash of their text, instead of --val_dir"
    parser.add_argument("--val_fraction", type=parse_fraction, metavar="X", help=about)
    about = "any of tiktoken's, default %(default)s"
    parser.add_argument("--tokenizer_name", default=DEFAULT_TOKENIZER, metavar="NAME", help=about)
    parser.add_argument("--max_data", type=positive, metavar="N", help="JSON objects of each shard (default all)")
    about = "of the text in each object, default %(default)s"
    parser.add_argument("--text_key", type=parse_key, default=TEXT_KEY, metavar="KEY", help=about)
    parser.add_argument("--workers", type=positive, metavar="N", help="threads (default: the cores that may be used)")
    parser.add_argument("--shard", type=parse_shard, metavar="I/N", help="only the I-th of N shares of the shards")
    parser.add_argument("--merge", action="store_true", help="make the files from all shares, preparing nothing")
    parser.add_argument("--strict", action="store_true", help="stop at the first line that would be lost or changed")
    parser.add_argument("--overwrite", action="store_true", help="replace what was prepared from other shards")
    options = parser.parse_args(arguments)
    if options.shard and options.merge:
        parser.error("--shard prepares a share, --merge puts all of them together: choose one")
    if options.val_fraction and options.val_dir:
        parser.error("--val_fraction takes the validation text from --train_dir: leave out --val_dir")
    if options.out_train_file.resolve() == options.out_val_file.resolve():
        parser.error(f"--out_train_file and --out_val_file are both {options.out_train_file}: name two files")
    try:
        jobs = _jobs(options)
        for job in jobs:  # before the first takes hours
            check_output(job.out_file, job.inputs, job.folder, options.overwrite)
        for job in jobs:
            told_of = job.split is None or job.split.side == "train"  # the other side is of the same files
            try:
                sources = prepare(
                    job.inputs,
                    job.out_file,
                    options.tokenizer_name,
                    options.max_data,
                    options.workers,
                    options.strict,
                    root=job.folder,
                    shard=options.shard,
                    merge=options.merge,
                    text_key=options.text_key,
                    split=job.split,
                    overwrite=options.overwrite,
                )
            except NoText as error:
                if told_of:
                    _print_summary(job.folder, error.sources)
                raise
            if told_of:
                _print_summary(job.folder, sources)
    except PrepareError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
