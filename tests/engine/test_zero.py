"""DeepSpeed ZeRO in two real processes over gloo against the run of a single process, and checkpoints across both."""

import shutil
import sys
from pathlib import Path

import pytest
import torch

from engine import checkpoint, train
from engine.command_line import parse
from engine.report import read_metrics

pytest.importorskip("deepspeed")
DEPTH = "--n_layer=4"  # inputs of the last two blocks would not be offloaded
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def losses(run_dir) -> dict[tuple[int, str], float]:
    return {
        (r["step"], key): r[key] for r in read_metrics(run_dir) for key in ("loss", "val_loss", "grad_norm") if key in r
    }


def finish(process) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


@pytest.fixture
def single(tiny_flags, tmp_path):
    """The run directory of a single resident process."""
    run = tmp_path / "single"
    assert train.main([*tiny_flags, DEPTH, "--micro_batch_size=2", f"--run_dir={run}"]) == 0
    return run


def cut_back(run: Path, to: Path, step: int = 4) -> Path:
    """Copy a run and leave it only its checkpoint of this step."""
    shutil.copytree(run, to)
    for path in checkpoint.checkpoints(to):
        if path.name != f"step_{step:08d}":
            shutil.rmtree(path)
    return to


@pytest.mark.slow
def test_stages_agree_with_one_process_and_checkpoints_pass_between_them(single, tiny_flags, start, tmp_path):
    reference = losses(single)
    ways = {
        1: ["--offload=optimizer", "--activation_checkpointing=selective"],
        2: ["--activation_checkpointing=blocks"],
    }
    for stage, extra in (ways | {3: ["--activation_checkpointing=offloaded"]}).items():
        run = tmp_path / f"stage{stage}"
        output = finish(
            start(
                *TORCHRUN,
                "engine/train.py",
                *tiny_flags,
                DEPTH,
                "--micro_batch_size=2",
                f"--run_dir={run}",
                f"--zero_stage={stage}",
                *extra,
            )
        )
        assert f"ZeRO stage {stage}" in output and "2 processes" in output
        assert losses(run) == pytest.approx(reference, rel=2e-5), f"stage {stage}"
        assert (run / "deepspeed.json").exists()

    # Saved by two processes, resumed by one without DeepSpeed; saved by one, resumed by two under another stage.
    alone = cut_back(tmp_path / "stage2", tmp_path / "alone")
    finish(start("engine/train.py", "--resume", f"--run_dir={alone}"))
    assert losses(alone) == pytest.approx(reference, rel=2e-5)
    together = cut_back(single, tmp_path / "together")
    finish(start(*TORCHRUN, "engine/train.py", "--resume", f"--run_dir={together}", "--zero_stage=3"))
    assert losses(together) == pytest.approx(reference, rel=2e-5)


@pytest.mark.slow
def test_streamed_states_pass_to_zero_and_back(tiny_flags, start, tmp_path):
    """What goes on from a checkpoint is what resident states in a single process make of the same checkpoint."""
    streamed = ("--strategy=resident", "--zero_stage=auto", "--weights=residual", "--moments=int8", "--offload=states")
    compact = (*streamed, "--offload=none")
    exact = ("--strategy=resident", "--weights=fp32", "--moments=fp32", "--offload=none")
    shared = ("--strategy=zero", "--weights=auto", "--moments=auto", "--offload=none")

    def go_on(run: Path, step: int, name: str, *flags: str, processes: int) -> dict[tuple[int, str], float]:
        to = cut_back(run, tmp_path / name, step)
        launcher = TORCHRUN if processes == 2 else ()
        output = finish(start(*launcher, "engine/train.py", "--resume", f"--run_dir={to}", *flags))
        assert f"resumed from {to}/checkpoints/step_{step:08d}" in output
        assert ("streamed from host memory" in output) == (flags[-1] == "--offload=states"), output
        return losses(to)

    run = tmp_path / "streamed"
    finish(start("engine/train.py", *tiny_flags, "--micro_batch_size=2", *streamed, f"--run_dir={run}"))
    reference = go_on(run, 4, "exact", *exact, processes=1)
    assert reference[12, "loss"] != losses(run)[12, "loss"]
    for stage in (1, 3):
        there = go_on(run, 4, f"stage{stage}", f"--zero_stage={stage}", *shared, processes=2)
        assert there == pytest.approx(reference, rel=2e-5), f"stage {stage}"
    own = tmp_path / "stage3"
    back = go_on(own, 8, "back", *streamed, processes=2)
    assert back == pytest.approx(go_on(own, 8, "compact", *compact, processes=1), rel=2e-3)


def test_the_deepspeed_launcher_starts_what_agrees_with_one_process(single, tiny_flags, start, tmp_path):
    """Left to choose, stage 1; and its checkpoint resumes in one process without DeepSpeed."""
    launcher, reference = Path(sys.executable).with_name("deepspeed"), losses(single)
    run, flags = tmp_path / "run", [*tiny_flags, DEPTH, "--micro_batch_size=2"]
    output = finish(start(launcher, "--num_gpus", "2", "engine/train.py", *flags))
    assert "ZeRO stage 1, 2 processes" in output and (run / "deepspeed.json").exists()
    assert losses(run) == pytest.approx(reference, rel=2e-5)
    alone = cut_back(run, tmp_path / "alone")
    assert train.main(["--resume", f"--run_dir={alone}"]) == 0
    assert losses(alone) == pytest.approx(reference, rel=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "chip, launcher, flags",
    [
        ("cuda:60", (), ["--zero_stage=1", "--offload=optimizer"]),
        (
            "hip:gfx906", TORCHRUN,
            ["--zero_stage=3", "--offload=params", "--activation_checkpointing=offloaded", "--recomputed_blocks=4"],
        ),
    ],
    ids=["stage 1 alone", "stage 3 in two processes"],
)  # fmt: skip
def test_on_a_pretended_card(single, tiny_flags, start, tmp_path, chip, launcher, flags):
    """DeepSpeed as it is on a GPU, in fp16, with its side streams, which tests/pretended_card.py looks for races of."""
    run = tmp_path / chip
    command = (
        "-m",
        "tests.pretended_card",
        chip,
        *tiny_flags,
        DEPTH,
        "--micro_batch_size=2",
        *flags,
        f"--run_dir={run}",
    )
    output = finish(start(*launcher, *command))
    assert "device: cuda:0" in output and "dtype: float16" in output
    assert ("2 processes" if launcher else "stage 1, optimizer in host memory, 1 process") in output
    assert losses(run) == pytest.approx(losses(single), rel=1e-2)


@pytest.mark.parametrize("stage", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_step_that_is_not_finite_is_skipped(tiny_flags, start, tmp_path, stage):
    shape = ["--max_steps=5", "--micro_batch_size=4", "--grad_clip=0.1"]  # a quarter of what the gradients have
    flags = [*shape, "--strategy=zero", f"--zero_stage={stage}"]
    finish(start("-m", "tests.engine.poisoned_zero", *tiny_flags, *flags))
    assert [r["step"] for r in read_metrics(tmp_path / "run") if r.get("skipped")] == [3]
    assert checkpoint.read_state(checkpoint.newest(tmp_path / "run"))["counters"]["updates"] == 4
    assert train.main([*tiny_flags, *shape, f"--run_dir={tmp_path}/plain"]) == 0
    poisoned, plain = losses(tmp_path / "run"), losses(tmp_path / "plain")
    until = [(step, "loss") for step in (1, 2, 3)]
    assert [poisoned[at] for at in until] == pytest.approx([plain[at] for at in until], rel=1e-6)
    assert abs(poisoned[4, "loss"] / plain[4, "loss"] - 1) > 1e-5


def test_what_lies_on_a_drive_is_swapped_in_small_parts(monkeypatch):
    """DeepSpeed's own sizes hold 16 GB in buffers, and refuse a parameter of over 1e8 numbers: 2b's embedding."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from engine.strategy.zero import deepspeed_config  # asks at import which accelerator there is

    config, _ = parse(["--preset=2b", "--zero_stage=3", "--offload=params", "--nvme_path=/nvme"])
    made = deepspeed_config(config, torch.bfloat16, 1, 2)["zero_optimization"]
    assert made["offload_optimizer"] == {"device": "nvme", "nvme_path": "/nvme"}
    assert made["offload_param"]["buffer_size"] == 50304 * 2560 // 2 and made["offload_param"]["max_in_cpu"] == 0
    assert made["sub_group_size"] <= 10**8 and made["stage3_max_live_parameters"] == 0
