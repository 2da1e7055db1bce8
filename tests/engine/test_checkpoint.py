"""Checkpoints are complete or absent, the right ones are kept, and a wrong one is refused by name."""

import errno
import itertools
import json
import os
import shutil
import tempfile
import time
import weakref
from contextlib import suppress
from types import SimpleNamespace

import filelock
import pytest
import torch
from safetensors.torch import load_file

from engine import checkpoint, train
from engine.command_line import parse
from engine.config import ConfigError
from engine.distributed import Processes
from engine.tensor_file import TensorFile


class States:
    """The states of a strategy, made as they are asked for, and nothing else of it."""

    def __init__(self, config) -> None:
        outline = checkpoint.GPT.outline(config.model)
        self.shapes = {name: parameter.shape for name, parameter in outline.named_parameters()}

    def state(self):
        for name, shape in self.shapes.items():
            yield name, {key: torch.ones(shape) for key in ("weight", "exp_avg", "exp_avg_sq")}

    def counters(self) -> dict:
        return {"updates": 1, "loss_scale": None}


@pytest.fixture
def saves(tiny_flags):
    """saves(step, ..., options) writes a checkpoint of a tiny run for each step, by `checkpoint.save`."""
    config = parse(tiny_flags)[0]

    def save(*steps: int, keep: int = 0, loss: float | None = None, **options) -> None:
        config.report.keep_checkpoints = keep
        for step in steps:
            progress = checkpoint.Progress(step=step, val_loss=loss)
            checkpoint.save(config, States(config), Processes(), progress, "r50k_base", **options)

    return save


def saved_steps(run_dir) -> list[int]:
    return [checkpoint.read_state(p)["step"] for p in checkpoint.checkpoints(run_dir)]


def test_newest_and_best_are_kept(tiny_flags, tmp_path, monkeypatch):
    scores = iter([3.0, 1.0, 2.0, 4.0])
    monkeypatch.setattr(train, "validate", lambda run: setattr(run.progress, "val_loss", next(scores)))
    assert train.main([*tiny_flags, "--eval_interval=3", "--save_interval=3", "--keep_checkpoints=1"]) == 0
    run = tmp_path / "run"
    assert saved_steps(run) == [6, 12]
    assert checkpoint.best(run).name == "step_00000006" and checkpoint.newest(run).name == "step_00000012"


@pytest.mark.parametrize("keep", [0, 1, 2])
def test_a_run_that_goes_back_keeps_what_it_trains_from_there(saves, tmp_path, keep):
    run = tmp_path / "run"
    saves(4, loss=3.0)
    saves(5, 8, loss=1.0)  # a better course, but given up
    saves(12)
    saves(6, keep=keep, loss=4.0, abandoned=checkpoint.later(run, 4))
    assert saved_steps(run) == [4, 6]
    assert checkpoint.newest(run).name == "step_00000006" and checkpoint.best(run).name == "step_00000004"


class Killed(BaseException):
    """As SIGKILL, of which no handler hears."""


@pytest.mark.parametrize("step", [6, 7])  # with one of the other course at its name, and with none
def test_killed_at_any_point_of_a_save_no_abandoned_checkpoint_comes_after_it(saves, tmp_path, monkeypatch, step):
    run = tmp_path / "run"
    for point in range(100):
        shutil.rmtree(run, ignore_errors=True)
        saves(4, 6, 8, 12, loss=1.0)
        with monkeypatch.context() as patched:
            calls = itertools.count()
            for place, name in ((os, "rename"), (shutil, "rmtree"), (tempfile, "mkdtemp")):

                def call(*arguments, original=getattr(place, name), **options):
                    if next(calls) == point:
                        raise Killed
                    return original(*arguments, **options)

                patched.setattr(place, name, call)
            with suppress(Killed):
                saves(step, loss=2.0, abandoned=checkpoint.later(run, 4))
                break
        there = checkpoint.checkpoints(run)
        left = [checkpoint.read_state(path)["step"] for path in there if checkpoint.Progress.of(path).val_loss == 1.0]
        assert left[-1] == (12 if len(left) > 1 else 4) and left[0] == 4  # as if the save had not begun, or the start
        assert len(left) == 1 or len(left) == len(there), left
        saves(20, abandoned=checkpoint.later(run, 4))
        assert saved_steps(run) == [4, 20] and not list((run / "checkpoints").glob(".*"))
    assert point > 9 and saved_steps(run) == [4, step]


def test_a_run_that_went_back_removes_the_other_course_once(tiny_flags, saves, tmp_path):
    saves(1, 2, 3, 4)
    back = checkpoint.checkpoints(tmp_path / "run")[0]
    run = train.set_up(parse([*tiny_flags, "--keep_checkpoints=2"])[0], back, Processes())
    for run.progress.step in (2, 3):
        assert train.save(run, final=True).name == f"step_0000000{run.progress.step}"
    assert saved_steps(tmp_path / "run") == [2, 3]  # 2, too, is of this course


def test_a_run_elsewhere_is_not_written_into_another(tiny_flags, tmp_path, saves):
    saves(4, 8)
    start = shutil.copytree(checkpoint.newest(tmp_path / "run"), tmp_path / "copy")
    with pytest.raises(ConfigError, match=f"{tmp_path}/run already holds another run: --run_dir NAME goes on from"):
        checkpoint.to_start_from(str(tmp_path / "run"), str(start))
    assert checkpoint.to_start_from(str(tmp_path / "new"), str(start)) == start


def test_what_a_network_disk_keeps_of_an_old_checkpoint_ends_no_run(saves, tmp_path, monkeypatch, capsys):
    rmtree = shutil.rmtree

    def kept(path, ignore_errors=False):
        if not ignore_errors:
            raise OSError(errno.ENOTEMPTY, "Directory not empty")

    monkeypatch.setattr(checkpoint.shutil, "rmtree", kept)
    saves(4)
    saves(4, 8, keep=1)  # written over, then removed
    assert saved_steps(tmp_path / "run") == [8]
    monkeypatch.setattr(checkpoint.shutil, "rmtree", rmtree)
    saves(9, keep=2)
    assert not list((tmp_path / "run/checkpoints").glob(".*"))


def test_an_old_checkpoint_that_cannot_be_removed_is_warned_of(saves, tmp_path, monkeypatch, capsys):
    rename = os.rename

    def refusing(path, to):
        if path.name.startswith("step_"):
            raise OSError(errno.EBUSY, "Device or resource busy")
        rename(path, to)

    monkeypatch.setattr(checkpoint.os, "rename", refusing)
    saves(4, 8, keep=1)
    assert saved_steps(tmp_path / "run") == [4, 8]
    assert "warning: could not remove an old checkpoint: [Errno 16] Device or resource busy" in capsys.readouterr().out


def test_a_save_holds_one_parameter_at_a_time(saves, monkeypatch):
    """And so neither the weights nor a file of moments."""

    class Watched(States):
        def state(self):
            for name, tensors in super().state():
                held = [weakref.ref(tensor) for tensor in tensors.values()]
                yield name, tensors
                del tensors
                assert not any(tensor() is not None for tensor in held), name

    monkeypatch.setattr(__name__ + ".States", Watched)
    saves(4)


def test_a_checkpoint_without_a_validation_is_never_the_best(tiny_flags, tmp_path):
    assert train.main([*tiny_flags, "--eval_interval=0", "--save_interval=5"]) == 0
    assert [checkpoint.read_state(p)["val_loss"] is None for p in checkpoint.checkpoints(tmp_path / "run")] == [
        True,
        True,
        False,
    ]


def test_moments_are_split_into_files_and_read_back(tiny_flags, tmp_path, monkeypatch):
    assert train.main([*tiny_flags, "--max_steps=8", f"--run_dir={tmp_path}/one"]) == 0
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 10_000)
    assert train.main([*tiny_flags, "--max_steps=8", f"--run_dir={tmp_path}/many"]) == 0
    split = checkpoint.checkpoints(tmp_path / "many")[0]
    assert len(list(split.glob("optimizer-*.safetensors"))) > 2
    for name in ("one", "many"):
        newest = checkpoint.newest(tmp_path / name)
        for path in [*newest.iterdir()]:
            path.unlink()
        newest.rmdir()
        assert train.main(["--resume", f"--run_dir={tmp_path}/{name}"]) == 0
    ends = [load_file(checkpoint.newest(tmp_path / name) / "model.safetensors") for name in ("one", "many")]
    assert all(ends[0][name].equal(ends[1][name]) for name in ends[0])


def test_a_full_disk_costs_no_checkpoint(tiny_flags, tmp_path, monkeypatch, capsys):
    original, full = TensorFile.write, "transformer.h.0.ln_1.weight"

    def write(file, name, tensor):
        if name == full and "step_00000008" in str(file.path):
            raise OSError(errno.ENOSPC, "No space left on device")
        original(file, name, tensor)

    monkeypatch.setattr(TensorFile, "write", write)
    assert train.main(tiny_flags) == 0
    assert saved_steps(tmp_path / "run") == [4, 12]
    assert not list((tmp_path / "run/checkpoints").glob(".*"))
    printed = capsys.readouterr().out
    assert "step_00000008: [Errno 28] No space left on device" in printed and "training goes on" in printed


def test_a_last_checkpoint_that_cannot_be_written_is_an_error(tiny_flags, tmp_path, monkeypatch, capsys):
    def write(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(TensorFile, "write", write)
    assert train.main(tiny_flags) == 2
    said = capsys.readouterr().err
    assert "No space left on device; there is no other checkpoint of this run" in said and "untouched" not in said


@pytest.mark.parametrize(
    "flags, room, said",
    [
        ([], 1.5, "checkpoints would take 2 x"),
        (["--keep_checkpoints=2"], 3.5, "a smaller --keep_checkpoints, or a --run_dir"),
        (["--keep_checkpoints=2"], 4, None),
        (["--keep_checkpoints=1"], 2.5, "at once: a --run_dir on another disk"),
        (["--save_interval=0"], 1, None),
    ],
)
def test_checkpoints_that_would_not_fit_the_disk_are_refused_at_the_start(
    tiny_flags, tmp_path, monkeypatch, capsys, flags, room, said
):
    size = 12 * 20_000  # about what this model's take, in bytes
    monkeypatch.setattr(checkpoint.GPT, "outline", lambda _: SimpleNamespace(num_parameters=lambda: size // 12))
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: SimpleNamespace(free=int(room * size)))
    monkeypatch.setattr(train, "set_up", lambda *_: 1 / 0)
    if said is None:
        with pytest.raises(ZeroDivisionError):
            train.main([*tiny_flags, *flags])
    else:
        assert train.main([*tiny_flags, *flags]) == 2
        assert said in capsys.readouterr().err


def test_the_checkpoints_that_are_there_take_no_further_room(tiny_flags, tmp_path, monkeypatch):
    flags = [*tiny_flags, "--keep_checkpoints=1"]
    assert train.main(flags) == 0
    size = sum(file.stat().st_size for path in checkpoint.checkpoints(tmp_path / "run") for file in path.iterdir())
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: SimpleNamespace(free=2 * size))
    assert train.main([*flags, "--resume", "--max_steps=14"]) == 0


def test_a_second_run_in_a_folder_is_refused_until_the_first_ends(tiny_flags, tmp_path, capsys, start):
    first = start("engine/train.py", *tiny_flags, "--max_steps=100000", "--save_interval=1", "--keep_checkpoints=2")
    while first.poll() is None and not checkpoint.newest(tmp_path / "run"):
        time.sleep(0.01)
    again = [*tiny_flags, "--resume=auto", "--max_steps=100000"]
    assert train.main(again) == 2
    assert f"another run is writing to {tmp_path}/run: wait for it, stop it, or give" in capsys.readouterr().err
    first.kill()
    first.wait()
    step = checkpoint.read_state(checkpoint.newest(tmp_path / "run"))["step"] + 3  # beyond the warm-up
    assert train.main([*again, f"--max_steps={step}"]) == 0


def test_a_start_that_fails_leaves_no_folder_that_it_made(tiny_flags, tmp_path, capsys):
    fails = [*tiny_flags, "--vocab_size=64"]
    assert train.main(fails) == 2 and "set --vocab_size 512" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "run").mkdir()  # not ours
    assert train.main(fails) == 2
    assert (tmp_path / "run").is_dir()
    assert train.main([*tiny_flags, "--max_steps=3"]) == 0


def test_a_lock_that_another_process_takes_away_meanwhile_is_taken_anew(tiny_flags, tmp_path, monkeypatch):
    """Two processes with a lock of one name, on a file with that name and on one without, would both go on."""
    config, taken = parse(tiny_flags)[0], []

    class Slow(filelock.FileLock):
        def acquire(self, *arguments, **options):
            proxy = super().acquire(*arguments, **options)
            taken.append(self)
            if len(taken) == 1:
                (tmp_path / "run/.lock").unlink()
            return proxy

    monkeypatch.setattr(checkpoint.filelock, "FileLock", Slow)
    with checkpoint.claimed(config):
        assert len(taken) == 2 and (tmp_path / "run/.lock").exists()
        with pytest.raises(ConfigError, match="another run is writing"), checkpoint.claimed(config):
            pass
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/self/run"])
def test_a_run_dir_that_cannot_be_written_is_refused_before_any_work(tiny_flags, tmp_path, monkeypatch, capsys, place):
    (tmp_path / "file").touch()
    monkeypatch.setattr(train, "set_up", lambda *_: 1 / 0)
    assert train.main([*tiny_flags, f"--run_dir={tmp_path / place}"]) == 2
    assert f"--run_dir {tmp_path / place} is no folder to write to" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, change, said",
    [
        ("state.json", lambda file: file.write_text("{}"), "its state.json lacks format, step, tokens"),
        ("state.json", lambda file: file.write_text("[]"), "its state.json holds no names"),
        ("optimizer-00000.safetensors", lambda file: file.unlink(), "optimizer-00000.safetensors cannot be read whole"),
        (
            "optimizer-00000.safetensors",
            lambda file: os.truncate(file, 5000),
            "optimizer-00000.safetensors cannot be read",
        ),
        ("model.safetensors", lambda file: os.truncate(file, 5), "model.safetensors cannot be read whole"),
        ("config.json", lambda file: file.write_text("{"), "is no JSON"),
    ],
)
def test_a_damaged_checkpoint_is_refused_with_the_one_before(
    tiny_flags, tmp_path, monkeypatch, capsys, name, change, said
):
    assert train.main(tiny_flags) == 0
    change(checkpoint.newest(tmp_path / "run") / name)
    assert train.main(["--resume", f"--run_dir={tmp_path}/run", "--max_steps=14"]) == 2
    message = capsys.readouterr().err
    before = f"{tmp_path}/run/checkpoints/step_00000008"
    assert said in message and message.endswith(f"; the one before: --resume {before}\n")
    assert train.main([f"--resume={before}", f"--run_dir={tmp_path}/run", "--max_steps=9", "--keep_checkpoints=2"]) == 0


def test_half_a_checkpoint_is_not_seen_and_is_cleared_away(tiny_flags, tmp_path):
    leftover = tmp_path / "run/checkpoints/.step_00000099.partial"
    leftover.mkdir(parents=True)
    (leftover / "model.safetensors").write_bytes(b"half")
    assert checkpoint.newest(tmp_path / "run") is None
    assert train.main(tiny_flags) == 0
    assert not leftover.exists() and saved_steps(tmp_path / "run") == [4, 8, 12]


def test_another_models_checkpoint_is_refused(tiny_flags, tmp_path, capsys):
    assert train.main(tiny_flags) == 0
    step = str(checkpoint.newest(tmp_path / "run"))
    assert (
        train.main([*tiny_flags, f"--run_dir={tmp_path}/other", "--max_steps=14", "--n_layer=2", "--resume", step]) == 2
    )
    assert "n_layer is 1 there and 2 here" in capsys.readouterr().err
    assert (
        train.main([*tiny_flags, f"--run_dir={tmp_path}/wider", "--max_steps=14", "--n_embd=32", "--resume", step]) == 2
    )
    assert "n_embd is 16 there and 32 here" in capsys.readouterr().err


def test_a_newer_format_is_refused(tiny_flags, tmp_path, capsys):
    assert train.main(tiny_flags) == 0
    path = checkpoint.newest(tmp_path / "run") / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": checkpoint.FORMAT + 1}))
    assert train.main(["--resume", f"--run_dir={tmp_path}/run"]) == 2
    assert "update pilesmith" in capsys.readouterr().err
