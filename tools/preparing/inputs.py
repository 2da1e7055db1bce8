"""The inputs of a token file: the shards, or else the texts, of a folder and of all folders inside it."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from tools.preparing.chunks import SHARD_ENDINGS
from tools.preparing.text_files import TEXT_ENDINGS, is_text_file
from tools.preparing.token_file import PrepareError, listed


class NoInputs(PrepareError):
    """A folder that is not there, or has nothing to prepare."""


def find_inputs(folder: Path, without: Path | None = None) -> list[Path]:
    """Return the shards below a folder, or where there are none the text files, in the order of their relative paths.

    without: a folder to leave out, where it lies inside. PrepareError where there is neither, or one of them twice:
    unpacked, or compressed in two ways.
    """
    if folder.is_file():
        raise PrepareError(f"{folder} is a file: name its folder")
    files = sorted(_walk(folder, without))
    shards = [file for file in files if file.name.lower().endswith(SHARD_ENDINGS)]
    texts = [file for file in files if is_text_file(file)]
    inputs = shards or texts
    if not inputs:
        what = f"holds no shards ({', '.join(SHARD_ENDINGS)}) and no texts ({', '.join(TEXT_ENDINGS)})"
        raise NoInputs(
            f"{folder} {what if folder.is_dir() else 'does not exist'}. "
            "To fetch some of the Pile: python tools/download.py --size small; without a network: "
            "python tools/download.py --source stdlib"
        )
    names = names_of(files, folder)
    if shards and texts:  # such as a README or a licence
        left_out = listed([names[file] for file in texts])
        print(f"{folder}: {left_out} left out, since there are shards, such as {names[shards[0]]}")
    found: dict[str, str] = {}
    for name in map(names.get, inputs):
        ending = next(e for e in SHARD_ENDINGS + TEXT_ENDINGS if name.lower().endswith(e))
        other = found.setdefault(name[: -len(ending)], name)
        if other is not name:
            what = "shard" if shards else "text"
            raise PrepareError(f"{folder}: {other} and {name}: the same {what} twice? move one away")
    return inputs


def _walk(folder: Path, without: Path | None) -> Iterator[Path]:
    """Yield the files below a folder, without hidden ones, of each folder once: links may lead to it again."""
    seen = set()
    if without and without.is_dir() and folder.is_dir() and not without.samefile(folder):
        seen.add(_identity(without))
    for place, folders, names in os.walk(folder, onerror=_refuse, followlinks=True):
        if (identity := _identity(place)) in seen:
            folders.clear()
            continue
        seen.add(identity)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(place, name) for name in names if not name.startswith("."))


def _identity(folder: str | Path) -> tuple[int, int]:
    stat = os.stat(folder)
    return stat.st_dev, stat.st_ino


def _refuse(error: OSError) -> NoReturn:
    if not isinstance(error, FileNotFoundError):  # else the folder does not exist, or went just now
        raise PrepareError(f"{error.filename}: {error.strerror}") from error


def root_of(inputs: Sequence[Path]) -> Path:
    """Return the folder that has all inputs."""
    return Path(os.path.commonpath([path.absolute().parent for path in inputs]))


def names_of(inputs: Sequence[Path], root: Path) -> dict[Path, str]:
    """Return what inputs are called: their paths as seen from `root`."""
    root = root.absolute()
    return {path: path.absolute().relative_to(root).as_posix() for path in inputs}


def check_inputs(inputs: Sequence[Path]) -> None:
    """PrepareError where there are none, one is given twice, or one is no file."""
    if not inputs:
        raise PrepareError("no inputs: name at least one shard")
    path, times = Counter(path.absolute() for path in inputs).most_common(1)[0]
    if times > 1:
        raise PrepareError(f"{path} is given twice")
    for path in inputs:
        if not path.is_file():
            raise PrepareError(f"{path} does not exist")
