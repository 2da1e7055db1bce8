"""Checkpoints: folders that are complete or absent, in one format for every strategy and any number of processes.

run_dir/checkpoints/step_00000100/
    config.json                    the configuration as it was asked for
    model.safetensors              the weights, fp32, under the model's own names
    optimizer-00000.safetensors …  "<parameter>/exp_avg" and "<parameter>/exp_avg_sq", fp32, in files of about 256 MiB
    state.json                     step, tokens, losses, counters, the fingerprint of the data, which file holds what

Everything is written and synced in a temporary folder, which is then renamed.
"""

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from itertools import dropwhile
from pathlib import Path
from typing import Any

import filelock
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.config import Config, ConfigError, load_file, require
from engine.distributed import Processes
from engine.model import GPT
from engine.strategy import Strategy
from engine.tensor_file import TensorFile
from engine.whole_file import sync

FORMAT = 1
SHARD_BYTES = 256 << 20
BYTES_A_PARAMETER = 12  # the weight and two moments, fp32
_NAME = re.compile(r"step_(\d{8})")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message says which, why, and what to do."""


@dataclass
class Progress:
    """How far a run is: steps done, tokens they took, the validation loss after the last, None where there was none.

    bad_steps: how many of the last steps in a row were not finite.
    """

    step: int = 0
    tokens: int = 0
    val_loss: float | None = None
    bad_steps: int = 0

    @classmethod
    def of(cls, path: Path) -> "Progress":
        """Return that of a checkpoint; CheckpointError as `read_state`."""
        state = read_state(path)
        return cls(**{field.name: state[field.name] for field in fields(cls) if field.name in state})


def checkpoints(run_dir: str | Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    folder = Path(run_dir) / "checkpoints"
    return sorted(p for p in folder.iterdir() if _NAME.fullmatch(p.name)) if folder.is_dir() else []


def newest(run_dir: str | Path) -> Path | None:
    return (checkpoints(run_dir) or [None])[-1]


def later(run_dir: str | Path, step: int) -> list[Path]:
    """Return the checkpoints of a run after this step: what a run that goes on from there gives up."""
    return [path for path in checkpoints(run_dir) if path.name > _name(step)]


def best(run_dir: str | Path) -> Path | None:
    """Return the checkpoint with the lowest validation loss, or None where none that can be read has one."""
    scored = []
    for path in checkpoints(run_dir):
        with suppress(CheckpointError):
            if (loss := read_state(path)["val_loss"]) is not None and math.isfinite(loss):
                scored.append((loss, path))
    return min(scored)[1] if scored else None


def to_start_from(run_dir: str, resume: str | None) -> Path | None:
    """Return the checkpoint to start from; ConfigError if a run would be overwritten, or there is none to go on with.

    resume: None; "latest", run_dir's newest; "auto", that or a new run; or the path of a checkpoint, or of a run.
    """
    last = newest(run_dir)
    if resume is None:
        require(last is None, f"{run_dir} already holds a run: --resume goes on with it, --run_dir NAME starts another")
    elif resume not in ("latest", "auto"):
        start = newest(resume) or Path(resume)
        here = last is None or start.parent.resolve() == last.parent.resolve()
        require(here, f"{run_dir} already holds another run: --run_dir NAME goes on from {start} elsewhere")
        return start
    elif resume == "latest" and last is None:
        beside = Path(run_dir).parent
        runs = [str(path) for path in sorted(beside.iterdir()) if newest(path)] if beside.is_dir() else []
        known = f" ({', '.join(runs)} can be gone on with: --resume --run_dir NAME)" if runs else ""
        raise ConfigError(
            f"--resume: {run_dir} has no checkpoint{known}; --resume auto begins a run where there is none"
        )
    return last


@contextmanager
def claimed(config: Config) -> Iterator[None]:
    """Hold a run's folder, made where it is missing: two runs in one would remove each other's checkpoints.

    The system lets go of it when the process ends, however that does. A folder that was made here goes again where
    nothing came of the run. ConfigError where another process has it, or where it cannot be written.
    """
    folder = Path(config.run_dir)
    lock = filelock.FileLock(folder / ".lock", timeout=0)
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(NotImplementedError):  # some network disks have no locks
            _acquire(lock)
    except filelock.Timeout:
        raise ConfigError(
            f"another run is writing to {folder}: wait for it, stop it, or give another --run_dir"
        ) from None
    except OSError as error:
        raise ConfigError(f"--run_dir {folder} is no folder to write to ({error.strerror}): give another") from None
    try:
        yield
    finally:
        if made and lock.is_locked:
            _remove_unused(folder)
        lock.release()


def _acquire(lock: filelock.FileLock) -> None:
    """Lock the file that has the name: one opened just before another process took it away would keep nobody out."""
    file = Path(lock.lock_file)
    while not lock.is_locked:
        file.touch()
        before = file.stat()  # while it is open here, no other file has its number
        lock.acquire()
        if not file.exists() or not os.path.samestat(before, file.stat()):
            lock.release()


def _remove_unused(folder: Path) -> None:
    """Remove a run's folder, which is locked, where it holds the lock alone."""
    with suppress(OSError):  # another process begins there, or the system keeps files that are open
        if [path.name for path in folder.iterdir()] == [".lock"]:
            (folder / ".lock").unlink()
            folder.rmdir()


def require_space(config: Config) -> None:
    """ConfigError where what is kept at once does not fit the disk: known at the start, not when the last is lost."""
    options, size = config.report, BYTES_A_PARAMETER * GPT.outline(config.model).num_parameters()
    written = 1 + (config.optimizer.max_steps // options.save_interval if options.save_interval else 0)
    # Beside the newest: the best, and the one being written. Where all are kept, a person sees to the later ones.
    kept = min(options.keep_checkpoints + 2 if options.keep_checkpoints else 2, written)
    there = sum(file.stat().st_size for path in checkpoints(config.run_dir) for file in path.iterdir())
    free, less = shutil.disk_usage(config.run_dir).free, "a smaller --keep_checkpoints, or " if kept > 3 else ""
    require(
        free >= max(size, kept * size - there),
        f"the disk of {config.run_dir} has {free / 2**30:.3g} GiB free, and checkpoints would take "
        f"{kept} x {size / 2**30:.3g} GiB at once: {less}a --run_dir on another disk",
    )


def check(path: Path) -> dict[str, Any]:
    """Return a checkpoint's state.json; CheckpointError, with the one before, where a file is missing or cut off."""
    try:
        state = read_state(path)
        load_file(path / "config.json")
        for name in sorted({"model.safetensors", *state["shards"].values()}):
            try:
                with safe_open(path / name, framework="pt"):
                    pass
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path} is damaged: {name} cannot be read whole: {error}") from None
    except (CheckpointError, ConfigError) as error:
        before = [other for other in checkpoints(path.parent.parent) if other.name < path.name]
        raise CheckpointError(f"{error}; the one before: --resume {before[-1]}" if before else str(error)) from None
    return state


def read_state(path: Path) -> dict[str, Any]:
    """Return a checkpoint's state.json; CheckpointError where it is missing, damaged or from a newer version."""
    try:
        state = json.loads((path / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no checkpoint of this engine: {error}") from None
    known = ("format", "step", "tokens", "val_loss", "counters", "shards")
    if not isinstance(state, dict) or (missing := [name for name in known if name not in state]):
        said = f"lacks {', '.join(missing)}" if isinstance(state, dict) else "holds no names"
        raise CheckpointError(f"{path} is damaged: its state.json {said}")
    if state["format"] > FORMAT:
        raise CheckpointError(
            f"{path} has format {state['format']}, this version reads up to {FORMAT}: update pilesmith"
        )
    return state


def save(
    config: Config,
    strategy: Strategy,
    processes: Processes,
    progress: Progress,
    tokenizer: str,
    abandoned: Iterable[Path] = (),
    train_data: dict[str, Any] | None = None,
) -> Path:
    """Write a checkpoint of progress.step finished steps and remove those no longer kept; all processes call it.

    tokenizer: the training data's, by name; train_data: the fingerprint of its file. abandoned: checkpoints of a course
    that the run went back from, which go when this one is complete and before it has its name: wherever it is killed,
    none comes after this one. Beside the states a save takes host memory for the largest parameter alone, 12 bytes a
    number. CheckpointError, on every process, where the disk refuses; the earlier checkpoints are then untouched.
    """
    folder = Path(config.run_dir) / "checkpoints"
    final = folder / _name(progress.step)
    writer = _Writer(folder / f".{final.name}.partial", config, tokenizer) if processes.main else None
    for name, tensors in strategy.state():  # collective: every process goes through it, whatever happens on the first
        if writer:
            writer.add(name, tensors)
        del tensors  # else they stay while the next parameter's are made
    error = None
    if writer:
        state = {"format": FORMAT, "world_size": processes.world_size, "counters": strategy.counters()}
        state |= asdict(progress) | {"tokenizer": tokenizer, "train_data": train_data}
        error = writer.finish(config, state, final, abandoned)
        if error is None and newest(config.run_dir) == final:  # not one abandoned that the disk would not remove
            _remove_old(config)
    if processes.world_size > 1:
        shared = [error]
        dist.broadcast_object_list(shared, src=0)
        error = shared[0]
    if error is not None:
        last = newest(config.run_dir)
        kept = f"{last} is untouched" if last else "there is no other checkpoint of this run"
        raise CheckpointError(f"could not write {final}: {error}; {kept}")
    return final


def load(path: Path, strategy: Strategy) -> None:
    """Put a checkpoint's weights, moments and counters into `strategy`, whose model has the same shape."""
    state = read_state(path)
    files = {name: safe_open(path / name, framework="pt") for name in {"model.safetensors", *state["shards"].values()}}

    def read(parameter: str, key: str) -> Tensor:
        if key == "weight":
            return files["model.safetensors"].get_tensor(parameter)
        entry = f"{parameter}/{key}"
        return files[state["shards"][entry]].get_tensor(entry)

    strategy.load_counters(state["counters"])
    strategy.load_state(read)


class _Writer:
    """Writes tensors into safetensors files in a temporary folder as they come; `finish` returns the first failure."""

    def __init__(self, folder: Path, config: Config, tokenizer: str) -> None:
        self.folder, self.error = folder, None
        self.shapes = {name: parameter.shape for name, parameter in GPT.outline(config.model).named_parameters()}
        self.files: list[TensorFile] = []  # the weights', then those of moments; the last one is being written
        self.shards: dict[str, str] = {}
        for leftover in folder.parent.glob(".*.partial"):  # of a save that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        self._attempt(lambda: folder.mkdir(parents=True))
        self._attempt(lambda: self._open_weights(config, tokenizer))

    def add(self, name: str, tensors: dict[str, Tensor]) -> None:
        self._attempt(lambda: self._add(name, tensors))

    def finish(self, config: Config, state: dict[str, Any], final: Path, abandoned: Iterable[Path]) -> Exception | None:
        for file in self.files:
            self._attempt(file.finish)
        self._attempt(lambda: config.save(self.folder / "config.json"))
        self._attempt(
            lambda: (self.folder / "state.json").write_text(json.dumps(state | {"shards": self.shards}, indent=1))
        )
        self._attempt(lambda: _commit(self.folder, final, abandoned))
        if self.error is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
        return self.error

    def _open_weights(self, config: Config, tokenizer: str) -> None:
        about = {"model_config": json.dumps(config.to_dict()["model"]), "tokenizer": tokenizer}
        self.files.append(TensorFile(self.folder / "model.safetensors", self.shapes, about))

    def _add(self, name: str, tensors: dict[str, Tensor]) -> None:
        self.files[0].write(name, tensors["weight"])
        keys = [key for key in tensors if key != "weight"]
        for key in keys:
            if f"{name}/{key}" not in self.shards:
                self._open_shard(name, keys)
            self.files[-1].write(f"{name}/{key}", tensors[key])

    def _open_shard(self, first: str, keys: list[str]) -> None:
        """Begin a file of about SHARD_BYTES for the moments from the parameter `first` on."""
        shapes: dict[str, torch.Size] = {}
        for name in dropwhile(lambda name: name != first, self.shapes):
            shapes |= {f"{name}/{key}": self.shapes[name] for key in keys}
            if 4 * sum(map(math.prod, shapes.values())) >= SHARD_BYTES:
                break
        file = f"optimizer-{len(self.files) - 1:05d}.safetensors"
        self.files.append(TensorFile(self.folder / file, shapes))
        self.shards |= dict.fromkeys(shapes, file)

    def _attempt(self, action: Callable[[], Any]) -> None:
        if self.error is None:
            try:
                action()
            except Exception as error:  # of any kind: the others are in the collectives, and are told at the end
                self.error = error


def _name(step: int) -> str:
    return f"step_{step:08d}"


def _commit(folder: Path, final: Path, abandoned: Iterable[Path]) -> None:
    """Sync everything, then rename: after a power cut the checkpoint is there whole or not at all."""
    for path in folder.iterdir():
        sync(path)
    sync(folder)
    _remove_all(path for path in {*abandoned, final} if path.exists())
    os.rename(folder, final)
    sync(final.parent)


def _remove_old(config: Config) -> None:
    """Remove all but the newest and the best."""
    if keep := config.report.keep_checkpoints:
        _remove_all(set(checkpoints(config.run_dir)[:-keep]) - {best(config.run_dir)})


def _remove_all(paths: Iterable[Path]) -> None:
    """Remove checkpoints, the oldest first, so that a kill leaves the newest or none; what the disk refuses is said."""
    try:
        for path in sorted(paths):
            _remove(path)
    except OSError as error:
        print(f"warning: could not remove an old checkpoint: {error}; training goes on", flush=True)


def _remove(path: Path) -> None:
    """Take a checkpoint away, at once; files that a network disk keeps because somebody reads them go at a later save.

    Renamed first: a removal that is interrupted must not leave half a checkpoint under a good name.
    """
    doomed = tempfile.mkdtemp(prefix=".", suffix=".partial", dir=path.parent)
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)
