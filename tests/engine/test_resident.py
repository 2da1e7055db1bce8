"""Training with small states: close to fp32, resumed bit for bit, and checkpoints that pass between the formats."""

import shutil

import pytest
import torch
from safetensors.torch import load_file as load_tensors

from engine import checkpoint, train
from engine.config import from_dict, load_file
from engine.model import GPT
from engine.report import read_metrics
from tests.marks import slow_unless

FORMATS = [
    ("--weights=residual", "--moments=int8"),
    ("--weights=stochastic", "--moments=int8"),
    ("--weights=stochastic", "--moments=bf16"),
    ("--weights=stochastic", "--moments=int8", "--optimizer_in_backward=true", "--grad_clip=0"),
    ("--weights=residual", "--moments=fp32", "--offload=states"),
    ("--weights=residual", "--moments=int8", "--offload=states"),
]


def losses(run_dir) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in read_metrics(run_dir) if "loss" in r}


@pytest.mark.parametrize("formats", slow_unless(lambda f: "--optimizer_in_backward=true" in f, FORMATS), ids=" ".join)
def test_small_states_learn_as_fp32_does(tiny_flags, tmp_path, formats):
    flags = [*tiny_flags, "--max_steps=60", "--lr=5e-3", "--save_interval=0", "--eval_interval=0", "--grad_clip=0"]
    assert train.main([*flags, f"--run_dir={tmp_path}/fp32"]) == 0
    assert train.main([*flags, *formats, f"--run_dir={tmp_path}/small"]) == 0
    exact, small = losses(tmp_path / "fp32"), losses(tmp_path / "small")
    assert small == pytest.approx(exact, abs=0.05)
    assert exact[60] < exact[1] - 0.7


@pytest.mark.parametrize("formats", slow_unless(lambda f: "--offload=states" in f, FORMATS), ids=" ".join)
def test_resume_is_bit_for_bit_in_every_format(tiny_flags, tmp_path, formats):
    assert train.main([*tiny_flags, *formats]) == 0
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "run", again)
    for path in checkpoint.checkpoints(again)[1:]:
        shutil.rmtree(path)
    assert train.main([f"--run_dir={again}", "--resume"]) == 0
    assert losses(again) == losses(tmp_path / "run")
    ends = [load_tensors(checkpoint.newest(run) / "model.safetensors") for run in (tmp_path / "run", again)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_checkpoint_passes_between_formats(tiny_flags, tmp_path):
    tiny_flags.append("--lr=2e-2")  # so large that without the moments losses end 0.03 off
    assert train.main(tiny_flags) == 0
    step = str(checkpoint.checkpoints(tmp_path / "run")[1])
    for number, formats in enumerate(FORMATS):
        run = tmp_path / f"run{number}"
        assert train.main([*tiny_flags, *formats, f"--run_dir={run}", "--resume", step]) == 0
        exact = losses(tmp_path / "run")
        assert losses(run) == pytest.approx({s: exact[s] for s in range(9, 13)}, abs=5e-4)


@pytest.mark.parametrize("formats", [(), *FORMATS], ids=" ".join)
def test_the_learning_rate_is_the_schedules(tiny_flags, tmp_path, monkeypatch, formats):
    monkeypatch.setattr(train, "learning_rate", lambda step, options: 0.0)
    assert train.main([*tiny_flags, *formats, "--max_steps=3"]) == 0
    config = load_file(tmp_path / "run/config.json")
    initial = GPT.outline(from_dict(config).model).initial_weights(torch.Generator().manual_seed(config["seed"]))
    trained = load_tensors(checkpoint.newest(tmp_path / "run") / "model.safetensors")
    rounded = torch.bfloat16 if "--weights=stochastic" in formats else torch.float32
    for name, weight in initial:
        stored = weight.to(rounded) if weight.dim() == 2 else weight
        assert torch.equal(trained[name], stored.float()), name


def test_a_compiled_model_is_what_is_trained(tiny_flags, monkeypatch):
    calls = []

    def compile(module):
        def compiled(*inputs, **options):
            calls.append(module)
            return module(*inputs, **options)

        compiled.__dict__ |= {"_orig_mod": module, "eval": module.eval, "train": module.train}
        return compiled

    monkeypatch.setattr(torch, "compile", compile)
    assert train.main([*tiny_flags, "--max_steps=3"]) == 0 and not calls
    assert train.main([*tiny_flags, "--compile", "--resume", "--max_steps=5", "--micro_batch_size=4"]) == 0
    assert len(calls) == 2 * 2 + 2 * 4 and isinstance(calls[0], GPT)  # two steps of two micro-batches, two validations


@pytest.mark.parametrize(
    "flags, complaint",
    [
        (["--optimizer_in_backward"], "--grad_clip 0"),
        (["--optimizer_in_backward", "--grad_clip=0", "--micro_batch_size=2"], "cannot accumulate over 4"),
        (["--strategy=zero", "--moments=int8"], "are the resident strategy's"),
        (
            ["--offload=states", "--optimizer_in_backward", "--grad_clip=0"],
            "--offload states excludes --optimizer_in_backward",
        ),
        (["--offload=states", "--strategy=zero"], "--offload states is the resident strategy's"),
        (["--offload=states", "--zero_stage=1"], "--offload states is the resident strategy's"),
    ],
)
def test_what_a_strategy_cannot_do_is_refused(tiny_flags, capsys, flags, complaint):
    assert train.main([*tiny_flags, *flags]) == 2
    assert complaint in capsys.readouterr().err


def test_streamed_runs_are_resident_runs(tiny_flags, tmp_path):
    """With clipping and accumulation: every loss and all that a checkpoint holds, bit for bit."""
    flags = [*tiny_flags, "--weights=residual", "--moments=int8", "--micro_batch_size=2"]
    for name, offload in (("here", "none"), ("there", "states")):
        assert train.main([*flags, f"--offload={offload}", f"--run_dir={tmp_path / name}"]) == 0
    assert losses(tmp_path / "here") == losses(tmp_path / "there")
    here, there = (sorted(checkpoint.newest(tmp_path / name).glob("*.safetensors")) for name in ("here", "there"))
    assert [file.name for file in here] == ["model.safetensors", "optimizer-00000.safetensors"]
    for ours, theirs in zip(here, there, strict=True):
        ours, theirs = load_tensors(ours), load_tensors(theirs)
        assert ours and all(torch.equal(ours[name], theirs[name]) for name in ours)
