"""Mistakes on command lines: each program says in a line what is wrong, and ends with 2. Ctrl-C: a line, and 130."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import miniature, optimizer_quality, plans, render, scaling, suite, throughput
from engine import evaluate, generate, train
from engine.command_line import CommandLine, beyond_ctrl_c
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
        (
            generate,
            "--model_path=a --input_text=- --input-file=x",
            "--input_file: not allowed with argument --input_text",
        ),
        (generate, "--model_path=a --num-samples=0", "--num_samples: must be"),
        (evaluate, "--model-path=a --data-file=x --token=5", "unknown flag '--token=5'; did you mean '--tokens'?\n"),
        (evaluate, "--model_path=a --data_file=x --batch_size=8", "did you mean '--micro_batch_size'?\n"),
        (
            evaluate,
            "--model_path=a --data_file=x --tokens=some",
            "--tokens: must be a whole number from 1 on, got 'some'",
        ),
        (evaluate, "--model_path=a", "error: the following arguments are required: --data_file\n"),
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


@pytest.mark.parametrize(
    "program",
    [
        miniature, optimizer_quality, plans, render, scaling, suite, throughput, evaluate, generate, train,
        compile_kernels, convert_hdf5, download, export_weights, import_weights, plan, prepare,
        profile_step, track_memory, tune,
    ],
)  # fmt: skip
def test_ctrl_c_ends_every_program_with_a_line(program, monkeypatch, capsys) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(CommandLine, "parse_known_args", interrupted)
    assert program.main([]) == 130
    said = capsys.readouterr()
    assert said.err.startswith("interrupted" if program is not generate else "\n")
    assert (said.out, said.err.count("\n")) == ("", 1)


def test_what_is_started_beyond_ctrl_c_ignores_it() -> None:
    program = "import signal; print(signal.getsignal(signal.SIGINT) == signal.SIG_IGN)"
    before = signal.getsignal(signal.SIGINT)
    with beyond_ctrl_c():
        child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert child.stdout == "True\n" and signal.getsignal(signal.SIGINT) is before


RUN = "--preset=13m --n_embd=32 --n_head=2 --block_size=16 --vocab_size=96 --batch_tokens=64 --steps=1000000"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "begun"),
    [
        (f"benchmarks/throughput.py {RUN}", "13m: "),
        ("tools/tune.py --dry_run --chip=cuda:86 --kernels=softmax_forward --workers=2", "shared memory a block"),
        ("tools/compile_kernels.py --op=softmax --workers=2 --cache={tmp}", ""),
    ],
)
@pytest.mark.parametrize("after_s", [1, 20])
def test_the_processes_of_a_program_say_nothing_of_ctrl_c(program: str, begun: str, after_s: int, tmp_path: Path):
    command = [sys.executable, *program.replace("{tmp}", str(tmp_path)).split()]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        while begun and begun not in process.stdout.readline():
            assert process.poll() is None
        time.sleep(after_s + 15 * (not begun))
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        _, said = process.communicate(timeout=60)
        assert process.returncode == 130 and said.startswith("interrupted") and said.count("\n") == 1, said
