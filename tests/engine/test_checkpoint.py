"""Checkpoints are complete or absent, the right ones are kept, and a wrong one is refused by name."""
import errno
import json

from safetensors.torch import load_file

from engine import checkpoint, train


def saved_steps(run_dir) -> list[int]:
    return [checkpoint.read_state(p)["step"] for p in checkpoint.checkpoints(run_dir)]


def test_newest_and_best_are_kept(tiny_flags, tmp_path, monkeypatch):
    scores = iter([3.0, 1.0, 2.0, 4.0])
    monkeypatch.setattr(train, "validate", lambda run: run.progress.update(val_loss=next(scores)))
    assert train.main([*tiny_flags, "--eval_interval=3", "--save_interval=3", "--keep_checkpoints=1"]) == 0
    run = tmp_path / "run"
    assert saved_steps(run) == [6, 12]
    assert checkpoint.best(run).name == "step_00000006" and checkpoint.newest(run).name == "step_00000012"


def test_a_checkpoint_without_a_validation_is_never_the_best(tiny_flags, tmp_path):
    assert train.main([*tiny_flags, "--eval_interval=0", "--save_interval=5"]) == 0
    assert [checkpoint.read_state(p)["val_loss"] is None for p in checkpoint.checkpoints(tmp_path / "run")] == [True, True, False]


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
    original, calls = checkpoint.save_file, []

    def save_file(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:  # the weights of the second checkpoint
            raise OSError(errno.ENOSPC, "No space left on device")
        original(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    assert train.main(tiny_flags) == 0
    assert saved_steps(tmp_path / "run") == [4, 12]
    assert not list((tmp_path / "run/checkpoints").glob(".*"))
    printed = capsys.readouterr().out
    assert "step_00000008: [Errno 28] No space left on device" in printed and "training goes on" in printed


def test_a_last_checkpoint_that_cannot_be_written_is_an_error(tiny_flags, tmp_path, monkeypatch, capsys):
    def save_file(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    assert train.main(tiny_flags) == 2
    assert "No space left on device" in capsys.readouterr().err


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
    assert train.main([*tiny_flags, f"--run_dir={tmp_path}/other", "--n_layer=2", "--resume", step]) == 2
    assert "n_layer is 1 there and 2 here" in capsys.readouterr().err
    assert train.main([*tiny_flags, f"--run_dir={tmp_path}/wider", "--n_embd=32", "--resume", step]) == 2
    assert "n_embd is 16 there and 32 here" in capsys.readouterr().err


def test_a_newer_format_is_refused(tiny_flags, tmp_path, capsys):
    assert train.main(tiny_flags) == 0
    path = checkpoint.newest(tmp_path / "run") / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": checkpoint.FORMAT + 1}))
    assert train.main(["--resume", f"--run_dir={tmp_path}/run"]) == 2
    assert "update pilesmith" in capsys.readouterr().err
