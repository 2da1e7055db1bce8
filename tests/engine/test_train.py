"""The training loop end to end on a CPU: learns, resumes bit for bit, stops when asked, survives what is not finite."""

import json
import math
import random
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from engine import checkpoint, train
from engine.command_line import parse
from engine.config import changes, from_dict
from engine.distributed import Processes
from engine.formats import resize_vocab
from engine.report import read_metrics
from engine.strategy.loss_scaling import LossScale
from engine.strategy.resident import Resident
from engine.weights import read_weights, recorded_tokenizer, write_weights


def losses(run_dir) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in read_metrics(run_dir) if "loss" in r}


def weights(run_dir) -> dict[str, torch.Tensor]:
    return load_file(checkpoint.newest(run_dir) / "model.safetensors")


def assert_same_run(left, right) -> None:
    """The same losses, validation losses and final weights, bit for bit."""
    kept = [
        [{k: r[k] for k in ("step", "loss", "grad_norm", "val_loss", "sample") if k in r} for r in read_metrics(run)]
        for run in (left, right)
    ]
    assert kept[0] == kept[1]
    first, second = weights(left), weights(right)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_learns_and_leaves_a_record(tiny_flags, charts, tmp_path, capsys):
    assert (
        train.main(
            [
                *tiny_flags,
                "--max_steps=80",
                "--lr=1e-2",
                "--tensorboard=true",
                "--eval_interval=40",
                "--keep_checkpoints=1",
            ]
        )
        == 0
    )
    run = tmp_path / "run"
    curve = losses(run)
    assert list(curve) == list(range(1, 81))
    assert curve[1] > 6 and curve[80] < 4
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((run / "tensorboard").glob("events.*"))
    assert json.loads((run / "config.json").read_text())["model"]["n_embd"] == 16
    validations = [r for r in read_metrics(run) if "val_loss" in r]
    assert [r["step"] for r in validations] == [40, 80] and validations[1]["val_loss"] < validations[0]["val_loss"]
    assert all(isinstance(r["sample"], str) for r in validations)
    assert [p.name for p in checkpoint.checkpoints(run)] == ["step_00000080"]  # the newest is the best
    printed = capsys.readouterr().out
    assert "val.bin, 20,000 tokens\n" in printed and "MB" not in printed
    assert "device: cpu" in printed and "kernels: torch" in printed and "tokens/s" in printed and "left" in printed


def test_accumulation_changes_nothing(tiny_flags, tmp_path):
    flags = [*tiny_flags, "--n_layer=2"]
    assert train.main([*flags, f"--run_dir={tmp_path}/plain"]) == 0
    assert train.main([*flags, f"--run_dir={tmp_path}/changed", "--micro_batch_size=2"]) == 0
    plain, changed = losses(tmp_path / "plain"), losses(tmp_path / "changed")
    assert changed == pytest.approx(plain, abs=5e-6)


def test_resume_after_sigkill_equals_the_uninterrupted_run(tiny_flags, tmp_path, start):
    flags = [*tiny_flags, "--max_steps=40", "--save_interval=3", "--eval_interval=10"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert train.main([*flags, f"--run_dir={whole}"]) == 0
    moments = random.Random(0)
    for kill_at in (moments.randrange(4, 15), moments.randrange(20, 35)):  # at a random moment of a random step, twice
        victim = start("engine/train.py", *flags, f"--run_dir={broken}", "--resume=auto")
        while victim.poll() is None and len(losses(broken)) < kill_at:
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.02))
        victim.kill()
        victim.wait()
        assert kill_at <= len(losses(broken)) < 40, victim.stdout.read()
    assert train.main(["--resume", f"--run_dir={broken}"]) == 0
    assert_same_run(whole, broken)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, "stop"])
def test_a_signal_or_a_file_finishes_the_step_saves_and_exits(tiny_flags, tmp_path, monkeypatch, capfd, how):
    run, original = tmp_path / "run", Resident.forward_backward

    def forward_backward(strategy, batches):
        if strategy.updates == 2 and how == "stop":
            (run / "stop").touch()
        elif strategy.updates == 2:
            signal.raise_signal(how)
        return original(strategy, batches)

    monkeypatch.setattr(Resident, "forward_backward", forward_backward)
    run.mkdir()
    (run / "stop").touch()  # of a run that ended before it looked
    assert train.main([*tiny_flags, "--save_interval=0", "--eval_interval=0"]) == train.EXIT_STOPPED
    assert list(losses(run)) == [1, 2, 3] and checkpoint.read_state(checkpoint.newest(run))["step"] == 3
    assert not (run / "stop").exists()
    said = capfd.readouterr()
    assert "stopped as asked after step 3; go on with --resume\n" in said.out
    assert ("stopping after this step; Ctrl-C again stops at once" in said.err) == (how != "stop")


def test_a_stop_in_the_last_step_is_the_end(tiny_flags, monkeypatch):
    monkeypatch.setattr(train.Interrupt, "asked", True)
    assert train.main([*tiny_flags, "--max_steps=1", "--warmup_steps=0"]) == 0


def test_signals_of_both_kinds_are_answered_once_and_by_one_process(tmp_path, capfd):
    for run_dir, times in ((str(tmp_path), 1), (None, 0)):
        with train.Interrupt(run_dir) as interrupt:
            assert not interrupt.asked
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
            assert interrupt.asked
        assert capfd.readouterr().err.count("stopping after this step") == times


def test_a_step_that_waits_for_its_data_is_a_slow_one(tiny_flags, tmp_path, monkeypatch):
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr(train, "time", clock)
    original = train.prefetch

    def slow(*arguments, **options):
        for batches in (steps := original(*arguments, **options)):
            clock.now += 100
            yield batches
        steps.close()

    monkeypatch.setattr(train, "prefetch", slow)
    monkeypatch.setattr(train, "validate", lambda run: setattr(clock, "now", clock.now + 1000))  # is no part of a step
    assert train.main([*tiny_flags, "--max_steps=4", "--eval_interval=2"]) == 0
    assert [r["step_s"] for r in read_metrics(tmp_path / "run")] == [100] * 4


@pytest.fixture
def run(tiny_flags):
    """A run before its first step."""
    return train.set_up(parse(tiny_flags)[0], None, Processes())


def test_the_peak_is_that_of_all_cards(run, monkeypatch):
    monkeypatch.setattr(train, "peak_flops", lambda name, dtype: 1e12)
    assert train.begin_report(replace(run, processes=Processes(0, 4))).peak_flops == 4e12


def test_a_resumed_run_with_another_batch_goes_on_where_the_data_ended(run):
    seen = train.Progress(step=6, tokens=6 * 512)  # twice the batch
    data, _, _ = train.open_data(run.config, run.processes, run.data.grad_accum, seen, pin=False)
    assert data.window_numbers(6).tolist() == run.data.window_numbers(12).tolist()


def test_where_the_first_weights_are_from_is_said(run, monkeypatch):
    monkeypatch.setattr(train, "find_weights", lambda path: Path(path) / "checkpoints/step_00000004")
    assert not any(line.startswith("weights: ") for line in train.first_lines(run))
    run.config.init_from = "runs/gpt2"
    assert "weights: runs/gpt2/checkpoints/step_00000004" in list(train.first_lines(run))


class Poison:
    """Puts an infinite number into a gradient of chosen steps, counted from 1."""

    def __init__(self, monkeypatch, steps) -> None:
        self.step, original = 0, Resident.forward_backward

        def forward_backward(strategy, batches):
            self.step += 1
            loss = original(strategy, batches)
            if self.step in steps:
                next(iter(strategy.parameters.values())).grad[0, 0] = float("inf")
            return loss

        monkeypatch.setattr(Resident, "forward_backward", forward_backward)


def test_a_step_that_is_not_finite_is_skipped(tiny_flags, tmp_path, monkeypatch, capsys):
    Poison(monkeypatch, {5, 6, 9})
    assert train.main([*tiny_flags, "--max_bad_steps=3"]) == 0
    records = [r for r in read_metrics(tmp_path / "run") if "loss" in r]
    assert [r["step"] for r in records if r.get("skipped")] == [5, 6, 9]
    assert all(w.isfinite().all() for w in weights(tmp_path / "run").values())
    assert checkpoint.read_state(checkpoint.newest(tmp_path / "run"))["counters"]["updates"] == 9


def test_several_bad_steps_in_a_row_stop_the_run(tiny_flags, tmp_path, monkeypatch, capsys):
    Poison(monkeypatch, range(6, 100))
    assert train.main([*tiny_flags, "--max_bad_steps=3"]) == train.EXIT_DIVERGED
    assert list(losses(tmp_path / "run"))[-1] == 8
    assert f"last good checkpoint is {tmp_path}/run/checkpoints/step_00000004" in capsys.readouterr().out


def test_fp16_scales_its_loss(tiny_flags, tmp_path):
    assert train.main([*tiny_flags, "--dtype=fp16", "--max_steps=8", f"--run_dir={tmp_path}/half"]) == 0
    assert train.main([*tiny_flags, "--max_steps=8", f"--run_dir={tmp_path}/full"]) == 0
    state = checkpoint.read_state(checkpoint.newest(tmp_path / "half"))
    assert state["counters"]["loss_scale"]["value"] >= 1024
    good = {r["step"]: r["grad_norm"] for r in read_metrics(tmp_path / "half") if "loss" in r and not r.get("skipped")}
    whole = {r["step"]: r["grad_norm"] for r in read_metrics(tmp_path / "full") if "loss" in r}
    assert good and good[1] == pytest.approx(whole[1], rel=0.02)  # the norm is reported without the scale


def test_a_loss_scale_on_its_way_down_is_no_divergence(tiny_flags, tmp_path, monkeypatch):
    Poison(monkeypatch, range(1, 7))
    assert train.main([*tiny_flags, "--dtype=fp16", "--max_bad_steps=3"]) == 0
    records = [r for r in read_metrics(tmp_path / "run") if "loss" in r]
    assert [r["step"] for r in records if r.get("skipped")] == [1, 2, 3, 4, 5, 6]
    state = checkpoint.read_state(checkpoint.newest(tmp_path / "run"))
    assert state["counters"]["loss_scale"]["value"] == 65536 / 2**6


def test_a_loss_scale_that_cannot_go_lower_is(tiny_flags, tmp_path, monkeypatch):
    Poison(monkeypatch, range(1, 100))
    monkeypatch.setattr("engine.strategy.resident.LossScale", lambda: LossScale(minimum=65536 / 4))
    assert train.main([*tiny_flags, "--dtype=fp16", "--max_bad_steps=3"]) == train.EXIT_DIVERGED
    assert list(losses(tmp_path / "run"))[-1] == 5  # two steps that halve it, then three bad ones


def test_a_loss_scale_grows_after_good_steps_and_stays_within_bounds():
    scale = LossScale(value=8.0, growth_interval=3, minimum=2.0, maximum=16.0)
    values = []
    for overflowed in [
        False, False, True, False, False, False, False, False, False,
        False, False, False, True, True, True, True, True,
    ]:  # fmt: skip
        scale.update(overflowed)
        values.append(scale.value)
    assert values == [8, 8, 4, 4, 4, 8, 8, 8, 16, 16, 16, 16, 8, 4, 2, 2, 2]


def test_a_run_without_prepared_data_makes_its_own_and_touches_no_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    commands, code = [], 0

    def run(command):
        commands.append(command[2])
        return SimpleNamespace(returncode=code)

    monkeypatch.setattr(train.subprocess, "run", run)
    named = parse(["--preset=13m", "--train_file=mine.bin", "--val_file=other.bin"])[0]
    train.prepare_default_data(named, Processes())
    assert not commands and named.data.train_file == "mine.bin"

    config = parse(["--preset=13m"])[0]
    train.prepare_default_data(config, Processes())
    assert commands == ["tools.download", "tools.prepare"] and config.data.train_file == "data/embedded/train.bin"
    assert "building the embedded default" in capsys.readouterr().out
    for name in ("train", "val"):
        Path(f"data/embedded/{name}.bin").parent.mkdir(parents=True, exist_ok=True)
        Path(f"data/embedded/{name}.bin").touch()
    train.prepare_default_data(parse(["--preset=13m"])[0], Processes())
    assert len(commands) == 2  # it is there
    Path("data/embedded/val.bin").unlink()
    for code, ends, said in (
        (1, 2, "python -m tools.download --source stdlib --train_dir data/embedded/train"),
        (130, 130, "interrupted\n"),
        (-signal.SIGINT, 130, "interrupted\n"),
    ):
        capsys.readouterr()
        assert train.main(["--preset=13m"]) == ends
        assert said in capsys.readouterr().err and not Path("runs/13m").exists()
    code = 0
    prepared = parse(["--preset=13m"])[0]
    Path(prepared.data.train_file).parent.mkdir(parents=True)
    Path(prepared.data.train_file).touch()
    train.prepare_default_data(prepared, Processes())
    assert prepared.data == parse(["--preset=13m"])[0].data


def test_resume_from_a_named_checkpoint(tiny_flags, tmp_path):
    assert train.main(tiny_flags) == 0
    assert (
        train.main(
            [*tiny_flags, f"--run_dir={tmp_path}/branch", "--resume", str(tmp_path / "run/checkpoints/step_00000004")]
        )
        == 0
    )
    original, branch = losses(tmp_path / "run"), losses(tmp_path / "branch")
    assert list(branch) == list(range(5, 13))
    assert all(branch[step] == original[step] for step in branch)


def test_resume_from_a_runs_folder_takes_its_newest_checkpoint(tiny_flags, tmp_path, capsys):
    assert train.main(tiny_flags) == 0
    assert train.main([f"--resume={tmp_path}/run", "--max_steps=13"]) == 0
    assert f"resumed from {tmp_path}/run/checkpoints/step_00000012 at step 12" in capsys.readouterr().out


def test_resume_of_a_run_that_is_not_there_is_refused_or_begins_it(tiny_flags, tmp_path, capsys):
    assert train.main(tiny_flags) == 0
    assert train.main([*tiny_flags, f"--run_dir={tmp_path}/rum", "--resume"]) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path}/rum has no checkpoint ({tmp_path}/run can be gone on with" in said and "--resume auto" in said
    assert not (tmp_path / "rum").exists()
    assert train.main([*tiny_flags, f"--run_dir={tmp_path}/rum", "--resume=auto", "--max_steps=4"]) == 0
    assert train.main([f"--run_dir={tmp_path}/rum", "--resume=auto", "--max_steps=5"]) == 0
    assert list(losses(tmp_path / "rum")) == [1, 2, 3, 4, 5]


def test_a_run_that_is_done_says_so_and_one_that_is_lengthened_too(tiny_flags, tmp_path, monkeypatch, capsys):
    assert train.main(tiny_flags) == 0
    before = checkpoint.newest(tmp_path / "run").stat().st_mtime_ns
    with monkeypatch.context() as full:
        full.setattr(checkpoint.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
        for flags, done in (([], "step 12 of 12 is done"), (["--max_steps=5"], "step 12 of 5 is done")):
            assert train.main(["--resume", f"--run_dir={tmp_path}/run", *flags]) == 0
            assert f"{done}: raise --max_steps to go on" in capsys.readouterr().out
    assert checkpoint.newest(tmp_path / "run").stat().st_mtime_ns == before
    assert train.main(["--resume", f"--run_dir={tmp_path}/run", "--max_steps=13"]) == 0
    assert "schedule: of 12 steps when the checkpoint was saved, of 13 from here on" in capsys.readouterr().out
    assert (
        train.main(["--resume", f"--run_dir={tmp_path}/run/checkpoints/..", "--max_steps=14", "--schedule=step"]) == 0
    )
    assert "schedule: of" not in capsys.readouterr().out


def test_what_a_resumed_run_does_otherwise_is_said(tiny_flags, token_files, tmp_path, capsys):
    assert train.main([*tiny_flags, "--max_steps=4"]) == 0
    (run := tmp_path / "run").rename(run := tmp_path / "moved")
    resumed = [f"--run_dir={run}", "--resume"]
    assert train.main([*resumed, "--max_steps=5"]) == 0
    assert "changed since" not in capsys.readouterr().out  # the new length is said of the schedule
    other = [f"--train_file={token_files[1]}", f"--val_file={token_files[0]}", "--zero_stage=auto", "--compile=false"]
    assert train.main([*resumed, "--max_steps=6", "--schedule=step", "--lr=1e-2", "--micro_batch_size=1", *other]) == 0
    train_file, val_file = token_files
    assert (
        f"\nchanged since the checkpoint: train_file {train_file} -> {val_file}, val_file {val_file} -> {train_file}, "
        "max_steps 5 -> 6, micro_batch_size 0 -> 1, lr 0.002 -> 0.01, schedule cosine -> step\n"
    ) in capsys.readouterr().out
    said = changes({"strategy": {"zero_stage": 1, "compile": True}}, from_dict({}))
    assert said == ["compile true -> false", "zero_stage 1 -> auto"]


def test_a_resumed_run_says_that_its_training_file_holds_other_tokens(tiny_flags, token_files, tmp_path, capsys):
    train_file, tokens = tmp_path / "train.bin", token_files[0].read_bytes()
    shutil.copy(f"{token_files[0]}.json", f"{train_file}.json")
    train_file.write_bytes(tokens)
    assert train.main([*tiny_flags, f"--train_file={train_file}", "--max_steps=3"]) == 0
    resumed, warned = [f"--run_dir={tmp_path}/run", "--resume"], f"warning: {train_file} holds other tokens than"
    shutil.copy(train_file, tmp_path / "copy")
    (tmp_path / "copy").rename(train_file)
    assert train.main([*resumed, "--max_steps=4"]) == 0 and warned not in capsys.readouterr().out
    train_file.write_bytes(tokens[2:] + tokens[:2])
    assert train.main([*resumed, "--max_steps=5"]) == 0 and warned in capsys.readouterr().out
    assert train.main([*resumed, "--max_steps=6"]) == 0 and warned not in capsys.readouterr().out
    last = checkpoint.newest(tmp_path / "run") / "state.json"
    last.write_text(
        json.dumps({key: value for key, value in json.loads(last.read_text()).items() if "data" not in key})
    )
    assert (
        train.main([*resumed, "--max_steps=7"]) == 0 and warned not in capsys.readouterr().out
    )  # saved by an older one


def test_validation_on_the_training_file_is_warned_of(tiny_flags, token_files, tmp_path, capsys):
    (tmp_path / "same.bin").symlink_to(token_files[1])
    (tmp_path / "same.bin.json").symlink_to(f"{token_files[1]}.json")
    for file, warned in ((tmp_path / "same.bin", True), (token_files[0], False)):
        flags = [f"--train_file={file}", f"--run_dir={tmp_path}/{file.stem}", "--max_steps=3"]
        assert train.main([*tiny_flags, *flags]) == 0
        assert ("warning: validation is on the training file" in capsys.readouterr().out) == warned


def test_training_begins_with_weights_from_elsewhere(tiny_flags, tmp_path, capsys):
    assert train.main([*tiny_flags, "--max_steps=60", "--lr=1e-2"]) == 0
    run = str(tmp_path / "run")
    assert train.main([*tiny_flags, f"--run_dir={tmp_path}/second", f"--init_from={run}"]) == 0
    assert losses(tmp_path / "run")[1] > 6 and losses(tmp_path / "second")[1] < 4.7  # 6.2 is a guess among 512 words
    assert train.main([*tiny_flags, f"--run_dir={tmp_path}/third", f"--init_from={run}", "--n_layer=2"]) == 2
    assert "n_layer is 1 there and 2 here; its flags: --n_layer 1\n" in capsys.readouterr().err


def test_weights_from_elsewhere_bring_their_shape(tiny_flags, tmp_path, capsys):
    assert train.main(tiny_flags) == 0
    shape = ("preset", "n_embd", "n_head", "block_size", "vocab_size")
    shapeless = [flag for flag in tiny_flags if not flag[2:].startswith(shape)] + [f"--run_dir={tmp_path}/second"]
    capsys.readouterr()
    for steps in (4, 6):  # the second goes on with the shape of the run
        begun = [f"--init_from={tmp_path}/run", "--resume=auto", f"--max_steps={steps}"]
        assert train.main([*shapeless, *begun]) == 0
        said = f"shape: that of {tmp_path}/run; the other settings are 13m's\n"
        assert capsys.readouterr().out.startswith(said) == (steps == 4)
    before, after = (weights(tmp_path / run) for run in ("run", "second"))
    assert {name: tensor.shape for name, tensor in before.items()} == {n: tensor.shape for n, tensor in after.items()}


def test_an_embedding_that_begins_a_run_is_padded_as_the_presets_are(tiny_flags, tmp_path, capsys):
    assert train.main(tiny_flags) == 0
    config, state = resize_vocab(*read_weights(tmp_path / "run"), 500)
    write_weights(tmp_path / "weights", config, state)
    other = [f"--run_dir={tmp_path}/second", f"--init_from={tmp_path}/weights"]
    assert train.main([*tiny_flags, *other]) == 0
    assert weights(tmp_path / "second")["transformer.wte.weight"].shape[0] == 512
    assert train.main([*tiny_flags, *other, f"--run_dir={tmp_path}/third", "--vocab_size=576"]) == 2
    assert "vocab_size is 500 there and 576 here" in capsys.readouterr().err
    assert train.main([*tiny_flags, "--resume", "--max_steps=14", "--vocab_size=576"]) == 2


def test_weights_and_tokens_are_of_one_tokenizer(tiny_flags, token_files, tmp_path, capsys):
    assert train.main(tiny_flags) == 0
    assert recorded_tokenizer(tmp_path / "run") == "r50k_base"

    def train_on(tokenizer: str, *flags: str) -> int:
        copies = []
        for flag, file in zip(("train", "val"), map(Path, token_files)):
            about = json.loads(Path(f"{file}.json").read_text()) | {"tokenizer": tokenizer}
            copy = Path(shutil.copy(file, tmp_path))
            Path(f"{copy}.json").write_text(json.dumps(about))
            copies.append(f"--{flag}_file={copy}")
        return train.main([*tiny_flags, *copies, *flags])

    for flags in (["--resume", "--max_steps=14"], [f"--run_dir={tmp_path}/second", f"--init_from={tmp_path}/run"]):
        assert train_on("p50k_base", *flags) == 2
        assert "was trained on tokens of r50k_base, and" in capsys.readouterr().err
        assert train_on("gpt2", *flags) == 0  # another name of r50k_base


@pytest.mark.parametrize(
    "flags, complaint",
    [
        (["--n_lyer=2"], "did you mean '--n_layer'"),
        (["--n_head=3"], "n_embd (16) must be a multiple of n_head (3)"),
        (["--batch_tokens=250"], "batch_tokens (250) must be a multiple of block_size (32); 256 would do"),
        (["--micro_batch_size=3"], "micro_batch_size (3) must divide the 8 sequences"),
        (["--vocab_size=256"], "set --vocab_size 512"),
        (["--train_file=nowhere.bin"], "nowhere.bin is missing"),
        (["--train_file="], "'' is no file; give the .bin"),
        (["--val_file=engine"], "'engine' is no file; give the .bin"),
        (["--seed=99999999999999999999999"], "seed must be at most 9223372036854775807"),
        (["--host_memory=abc"], "--host_memory: 'abc' is no size of memory"),
        (["--warmup_steps=12"], "--warmup_steps 12 is all of the 12 steps of --max_steps: --warmup_steps 1 would do"),
        (["--device=cuda"], "sees no GPU"),
        (["--device=tpu"], "must be auto, cpu, cuda"),
        (["--resume", "nowhere"], "no checkpoint there"),
        (["--strategy=resident", "--offload=optimizer"], "use --strategy zero"),
        (["--strategy=zero", "--zero_stage=0", "--dtype=bf16"], "use --zero_stage 1"),
    ],
)
def test_what_cannot_work_is_refused_with_a_reason(tiny_flags, capsys, flags, complaint):
    if "--device=cuda" in flags and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert train.main([*tiny_flags, *flags]) == 2
    assert complaint in capsys.readouterr().err


def test_a_presets_warm_up_is_shortened_to_a_short_run_and_said_to_be(tiny_flags, tmp_path, capsys):
    assert train.main([*tiny_flags, "--warmup_steps=50"]) == 0
    assert "schedule: a warm-up of 50 steps is too long for 12: shortened to 1" in capsys.readouterr().out
    rates = [r["lr"] for r in read_metrics(tmp_path / "run") if "lr" in r]
    assert rates[0] == max(rates) == 2e-3


def test_tokens_that_nothing_describes_are_said_to_be_assumed(tiny_flags, token_files, tmp_path, capsys):
    plain = Path(shutil.copy(token_files[0], tmp_path))
    assert train.main([*tiny_flags, f"--train_file={plain}", "--vocab_size=50304", "--max_steps=4"]) == 0
    assert (
        f"{plain}, 200,000 tokens, read as GPT-2's ids in uint16: there is no train.bin.json" in capsys.readouterr().out
    )


def test_a_run_is_not_overwritten(tiny_flags, capsys):
    assert train.main(tiny_flags) == 0
    assert train.main(tiny_flags) == 2
    assert "--resume goes on with it" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB.\nIf reserved"), MemoryError()]
)
def test_without_enough_memory_a_run_says_what_takes_less(tiny_flags, monkeypatch, capsys, error):
    def build(*_):
        raise error

    monkeypatch.setattr(train, "build", build)
    assert train.main(tiny_flags) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0] in ("error: CUDA out of memory. Tried 2 GiB.", "error: out of memory")
    assert any("--micro_batch_size 1" in line for line in said) and not any("If reserved" in line for line in said)


def test_document_masking_reaches_the_model(tiny_flags):
    run = train.set_up(parse([*tiny_flags, "--document_masking"])[0], None, Processes())
    batches = run.data.step(0)
    assert all(batch.doc_start is not None for batch in batches)
    alone = torch.arange(batches[0].tokens.shape[1], dtype=torch.int32).expand(batches[0].tokens.shape)
    batches = [replace(batch, doc_start=alone.contiguous()) for batch in batches]  # every token a document
    with torch.no_grad():
        model = run.strategy.module
        masked = sum(model(b.tokens, b.targets, doc_start=b.doc_start) for b in batches) / len(batches)
        whole = sum(model(b.tokens, b.targets) for b in batches) / len(batches)
    assert run.strategy.forward_backward(batches).item() == pytest.approx(masked.item(), rel=1e-5)
    assert abs(masked - whole) > 1e-4


def test_a_step_whose_loss_alone_is_not_finite_changes_nothing(tiny_flags):
    run = train.set_up(parse(tiny_flags)[0], None, Processes())
    run.strategy.forward_backward(run.data.step(0))
    before = [p.detach().clone() for p in run.strategy.parameters.values()]
    result = run.strategy.step(torch.tensor(float("nan")))
    assert result.skipped and math.isfinite(result.grad_norm)
    assert all(torch.equal(p, q) for p, q in zip(before, run.strategy.parameters.values()))
