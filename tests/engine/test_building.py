"""Building a strategy: the same first weights in every one, and no more host memory on the way than it holds."""

import pytest
import torch

from engine import train
from engine.command_line import parse
from engine.distributed import Processes
from engine.model import GPT

SIZE = ["--n_layer=8", "--n_embd=512", "--tie_head=true"]  # 26 million parameters, the largest a million
GROWTH = """
import os
import torch
from engine import train
from engine.command_line import parse
from engine.device import peak_memory
from engine.distributed import Processes
from engine.model import GPT
from kernels.number_formats import split

torch.set_num_threads(1)
given = []
if ZERO:  # what DeepSpeed builds of what it is given is its own, and on a CPU in host memory too
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    initialize = deepspeed.initialize
    deepspeed.initialize = lambda **k: (given.append(peak_memory(torch.device("cpu"))), initialize(**k))[1]

def build(*flags):
    return train.set_up(parse([*FLAGS, *flags])[0], None, Processes())

build("--run_dir=" + FOLDER + "/small")  # what the first call of each op loads belongs to no model
before = peak_memory(torch.device("cpu"))
run = build("--run_dir=" + FOLDER + "/large", *SIZE)
grown = (given[-1] if ZERO else peak_memory(torch.device("cpu"))) - before
drawn = dict(GPT.outline(run.config.model).initial_weights(torch.Generator().manual_seed(run.config.seed)))
for name, state in run.strategy.state():
    weight = drawn[name]
    if ZERO:
        weight = weight.bfloat16()
    elif weight.dim() >= 2:
        weight, _ = split(weight, torch.bfloat16)
    assert torch.equal(state["weight"], weight.float()), name
print(grown)
"""


@pytest.mark.parametrize(
    "flags",
    [
        ("--weights=stochastic", "--moments=int8"),
        pytest.param(("--zero_stage=1", "--dtype=bf16"), marks=pytest.mark.slow),
        pytest.param(("--zero_stage=3", "--dtype=bf16"), marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_a_model_comes_into_its_place_and_format_without_being_whole_in_fp32(tiny_flags, start, tmp_path, flags):
    if zero := "zero" in flags[0]:
        pytest.importorskip("deepspeed")
    script = tmp_path / "build.py"
    values = f"FLAGS, SIZE, ZERO, FOLDER = {[*tiny_flags, *flags]!r}, {SIZE!r}, {zero!r}, {str(tmp_path)!r}"
    script.write_text(f"{values}\n{GROWTH}")
    output, _ = (process := start(script, MALLOC_MMAP_THRESHOLD_="131072")).communicate(timeout=300)
    assert process.returncode == 0, output
    n = GPT.outline(parse([*tiny_flags, *SIZE])[0].model).num_parameters()
    held = (2 if zero else 4) * n  # 16-bit weights, and moments, which DeepSpeed has not made by then
    assert held - 0.1 * n < int(output.splitlines()[-1]) < held + n  # the model in fp32 would be four bytes more


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--weights=residual", "--moments=int8"],
        ["--weights=residual", "--moments=int8", "--offload=states"],
        ["--weights=residual", "--moments=int8", "--optimizer_in_backward=true", "--grad_clip=0"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("tied", ["true", "false"])
def test_every_exact_strategy_begins_with_the_weights_that_the_seed_draws(tiny_flags, flags, tied):
    run = train.set_up(parse([*tiny_flags, *flags, f"--tie_head={tied}"])[0], None, Processes())
    drawn = GPT.outline(run.config.model).initial_weights(torch.Generator().manual_seed(run.config.seed))
    made = dict(run.strategy.state())
    for name, weight in drawn:
        assert torch.equal(made.pop(name)["weight"], weight), name
    assert not made
    model = run.strategy.module
    assert (model.lm_head.weight is model.transformer["wte"].weight) == (tied == "true")
    assert all(p.dtype == (torch.bfloat16 if flags and p.dim() >= 2 else torch.float32) for p in model.parameters())
