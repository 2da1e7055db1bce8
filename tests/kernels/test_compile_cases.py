"""Every launch configuration that we ship compiles for its chip, fits it, does not spill and is not warned of.

The default run takes a sample; `pytest -m slow` takes all. Finished rows are cached by source, options and versions.
"""

import os
import subprocess
import sys

import pytest

from kernels import aot
from kernels.dispatch import CHIPS, OPS

pytest.importorskip("triton")


def faults(rows):
    return [f"{row.label} on {row.target}: {row.fault}" for row in rows if row.fault]


def narrow(rows):
    """What is bound by memory and not loaded 16 bytes at a time, as where the compiler cannot follow a mask."""
    ops = ("layer_norm", "softmax", "bias_activation", "cross_entropy", "adamw")
    mine = [row for row in rows if row.op in ops and row.target.startswith("cuda:") and not row.label.endswith("_odd")]
    return [f"{row.label} on {row.target}: {row.load_bytes} bytes" for row in mine if row.load_bytes < 16]


def test_a_sample_of_what_ships():
    """For each file the first case of each chip of a sample, causal softmax, attention at presets' widths."""
    seen, sample = set(), []
    for module, label, target in aot.all_jobs():
        main = module == "attention_forward" and target in ("cuda:86", "cuda:90") and "bf16 d64 " in label
        main = main or (target == "cuda:86" and label.startswith("forward_causal_768"))
        main = main or (target == "cuda:90" and label.startswith("attention_backward_kv fp16 d128 docs"))
        if main or (target in ("cuda:75", "cuda:86", "hip:gfx942") and (module, target) not in seen):
            seen.add((module, target))
            sample.append((module, label, target))
    rows = aot.compile_all(sample)
    assert not faults(rows)
    attention = [row for row in rows if row.op == "attention"]
    assert attention and all(row.tensor_cores and row.registers for row in attention)
    assert not narrow(rows) and {"layer_norm", "softmax", "adamw"} <= {row.op for row in rows}


@pytest.mark.slow
def test_all_that_ships():
    rows = aot.compile_all()
    assert not faults(rows) and not narrow(rows)


def test_every_chip_that_dispatch_serves_is_covered():
    """No op goes to Triton on a chip for which none of its kernels was compiled."""
    covered = {(case.op, target) for m in aot.MODULES for case in aot.cases_of(m).values() for target in case.chips()}
    served = {(op, target) for op in OPS for target in aot.triton_targets(op)}
    assert served <= covered
    assert not any(CHIPS[target].target == "cpu" for _, target in covered)


FAULTY = """
import dataclasses
from kernels.aot import Case, compile_case
from kernels.attention_forward import forward_kernel
from kernels.attention_tiles import element_case
from kernels.dispatch import tl, triton
from kernels.launch_configs import use_launch_config

@triton.jit
def product(a, b, M: tl.constexpr):
    i = tl.arange(0, M)
    x = tl.load(a + i[:, None] * M + i[None, :])
    for k in range(4):
        x = tl.dot(x, tl.load(b + k * M * M + i[:, None] * M + i[None, :])).to(tl.float16)
    tl.store(a + i[:, None] * M + i[None, :], x)

@triton.jit
def wrong(a, M: tl.constexpr):
    tl.store(a + tl.arange(0, M), tl.no_such_function(M))

signature = {"a": "*fp16", "b": "*fp16"}
case = Case(op="x", label="x", kernel=product, signature=signature, constants={"M": 64}, num_warps=4)
print(compile_case(case, "cuda:80").fault)
print(compile_case(dataclasses.replace(case, num_warps=1, constants={"M": 128}), "cuda:80").fault)
print(compile_case(Case(op="x", label="x", kernel=wrong, signature=signature, constants={"M": 16}), "cuda:80").fault)
tile = {"ROWS": 128, "KEYS": 128, "num_warps": 4, "num_stages": 2, "EDGE_STAGES": None, "TMA": 1}
with use_launch_config("attention_forward", 64, tile):
    case = element_case("attention_forward", forward_kernel, "cuda:90", "bf16", 64, D=64)
print(compile_case(case, "cuda:90").fault)
"""


def test_a_fault_is_seen(tmp_path):
    """Too much shared memory, a kernel that spills, one that is no Triton at all, and one whose products wait."""
    row = aot.Row(op="x", label="x", target="cuda:75", num_warps=4, num_stages=3, shared_bytes=9, shared_limit_bytes=8)
    assert "shared memory" in row.fault
    (tmp_path / "program.py").write_text(FAULTY)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, tmp_path / "program.py"], env=environment, capture_output=True, text=True)
    fine, spilling, wrong, waiting = done.stdout.split("\n")[:4]
    assert fine == "", done.stderr
    assert spilling.startswith("spills")
    assert wrong.startswith("CompilationError")
    assert waiting.startswith("wgmma.mma_async instructions are serialized due to insufficient register resources")


def test_rows_are_cached(tmp_path):
    job = next(job for job in aot.all_jobs() if job[0] == "rotary")
    first = aot.compile_all([job], cache=tmp_path)
    (file,) = tmp_path.glob("*.json")
    file.write_text(file.read_text().replace(f'"registers": {first[0].registers}', '"registers": 7'))
    assert aot.compile_all([job], cache=tmp_path)[0].registers == 7
