"""Mistakes on command lines: each program says in a line what is wrong, and ends with 2."""

import pytest

from benchmarks import miniature, optimizer_quality, plans, render, scaling, suite, throughput
from engine import generate, train
from tools import (
    compile_kernels,
    convert_hdf5,
    download,
    export_weights,
    import_weights,
    plan,
    prepare,
    profile_step,
    track_memory,
    tune,
)  # fmt: skip


@pytest.mark.parametrize(
    ("program", "flags", "said"),
    [
        (compile_kernels, "--workers=0", "--workers: must be a whole number from 1 on, got '0'"),
        (tune, "--sizes=1024,", "--sizes: must be"),
        (import_weights, "--model_path=a --out=b --vocab_multiple=0", "--vocab_multiple: must be"),
        (export_weights, "--model_path=a --out=b --format=gpt2 --vocab_size=x", "--vocab_size: must be"),
        (track_memory, "--preset=13m --block_size=-4", "--block_size: must be"),
        (track_memory, "--preset=13m --recompute=99", "--recompute must be 0 to 1"),
        (miniature, "--cards=nonsense", "unknown GPU 'nonsense'"),
        (miniature, "--steps=0", "--steps: must be"),
        (prepare, "--max-dat=5", "error: unknown flag '--max_dat=5'; did you mean '--max_data'?\n"),
        (prepare, "--max-data=0", "error: argument --max_data: must be"),
        (download, "--train-max 1 --sise=small", "error: unknown flag '--sise=small'; did you mean '--size'?\n"),
        (download, "--train 1", "error: unknown flag '--train'; did you mean '--train_"),
        (convert_hdf5, "a.h5 b.bin --tokeniser-name=gpt2", "did you mean '--tokenizer_name'?\n"),
        (convert_hdf5, "a.h5", "error: the following arguments are required: target\n"),
        (
            generate,
            "--model-path=a --max-new-token=3",
            "unknown flag '--max_new_token=3'; did you mean '--max_new_tokens'?",
        ),
        (generate, "--model_path=a --prompt=x", "unknown flag '--prompt=x'; did you mean '--input_text'?\n"),
        (generate, "--model_path=a --start x", "did you mean '--input_text'?\n"),
        (generate, "--model_path=a --batch_size=8", "unknown flag '--batch_size=8'\n"),
        (generate, "--model_path=a --num-samples=0", "--num_samples: must be"),
        (compile_kernels, "--opp=rotary", "error: unknown flag '--opp=rotary'; did you mean '--op'?\n"),
        (export_weights, "--model-path=a --out=b --format=gpt2 --vocab-siz=8", "did you mean '--vocab_size'?\n"),
        (import_weights, "--model-path=a --out=b --vocab-mul=8", "did you mean '--vocab_multiple'?\n"),
        (track_memory, "--preset=13m --micro-batch=2", "error: unknown flag '--micro_batch=2'; did you mean"),
        (throughput, "--steps=0", "--steps: must be a whole number from 1 on, got '0'"),
        (throughput, "--processes=-1", "--processes: must be"),
        (tune, "--dry-run --chips=cuda:86", "error: unknown flag '--chips=cuda:86'; did you mean '--chip'?\n"),
        (plan, "--preset=2b --gpus=0", "--gpus: must be"),
        (plan, "--preset=2b --micro-batch-size=-2", "--micro_batch_size: must be"),
        (plan, "--preset=2B", "did you mean '2b'?\n"),
        (plan, "--gpu=t4", "error: the following arguments are required: --preset\n"),
        (profile_step, "--warmup=0", "--warmup: must be"),
        (scaling, "--steps=0", "--steps: must be"),
        (scaling, "--step=4", "error: unknown flag '--step=4'; did you mean '--steps'?\n"),
        (suite, "--cpus", "error: unknown flag '--cpus'; did you mean '--cpu'?\n"),
        (plans, "--host-mem=8GB", "did you mean '--host_memory'?\n"),
        (render, "--checks", "did you mean '--check'?\n"),
        (miniature, "--card=t4", "did you mean '--cards'?\n"),
        (optimizer_quality, "--model=13m", "did you mean '--models'?\n"),
    ],
)
def test_arguments_that_cannot_be(program, flags, said, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        program.main(flags.split())
    assert ended.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("program", "flags", "said"),
    [
        (plan, "--preset=2b --gpu-memry=8GB", "error: unknown flag '--gpu_memry=8GB'; did you mean '--gpu_memory'?\n"),
        (profile_step, "--warm=1", "error: unknown flag '--warm=1'; did you mean '--warmup'"),
        (throughput, "--step 3", "error: unknown flag '--step'; did you mean '--steps'?\n"),
        (throughput, "--gpu-memory=lots", "no size of memory"),
    ],
)
def test_arguments_that_cannot_be_beside_those_of_a_run(program, flags, said, capsys) -> None:
    assert program.main(flags.split()) == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "said"), [("PILESMITH_CHIP", "no such chip"), ("PILESMITH_KERNELS", "should be auto, triton or torch")]
)
def test_an_environment_that_cannot_be(name, said, tiny_flags, monkeypatch, capsys) -> None:
    monkeypatch.setenv(name, "x")
    assert train.main(tiny_flags) == 2
    assert f"error: {name}=x: {said}" in capsys.readouterr().err
