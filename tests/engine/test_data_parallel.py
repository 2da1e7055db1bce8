"""The resident strategy in two real processes over gloo against one process with the same tokens."""

import shutil

import pytest

from engine import checkpoint, train
from engine.report import read_metrics

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def losses(run_dir) -> dict[tuple[int, str], float]:
    return {
        (r["step"], key): r[key] for r in read_metrics(run_dir) for key in ("loss", "val_loss", "grad_norm") if key in r
    }


@pytest.mark.parametrize(
    "flags, tolerance",
    [
        (["--micro_batch_size=2"], 2e-5),  # 2 micro-batches in each process
        pytest.param(
            ["--weights=residual", "--moments=int8", "--micro_batch_size=4", "--activation_checkpointing=true"], 2e-3,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["--weights=residual", "--moments=int8", "--offload=states", "--micro_batch_size=2"], 2e-3,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["--weights=fp32", "--moments=fp32", "--offload=states", "--micro_batch_size=2"],
            2e-5,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["--weights=stochastic", "--moments=int8", "--optimizer_in_backward=true", "--grad_clip=0"], 2e-3,
            marks=pytest.mark.slow,
        ),
    ],
    ids=["fp32", "residual-int8", "streamed-int8", "streamed-fp32", "in-backward"],
)  # fmt: skip
def test_two_processes_train_as_one_does(tiny_flags, start, tmp_path, flags, tolerance):
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert train.main([*tiny_flags, *flags, f"--run_dir={alone}"]) == 0
    process = start(*TORCHRUN, "engine/train.py", *tiny_flags, *flags, "--strategy=resident", f"--run_dir={together}")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "the same in 2 processes, gradients averaged" in output
    assert ("streamed from host memory" in output) == ("--offload=states" in flags)
    assert losses(together) == pytest.approx(losses(alone), rel=tolerance)

    # Saved by two processes, resumed by one.
    for path in checkpoint.checkpoints(together)[1:]:
        shutil.rmtree(path)
    assert train.main(["--resume", f"--run_dir={together}", *[f for f in flags if "micro" in f]]) == 0
    assert losses(together) == pytest.approx(losses(alone), rel=tolerance)
