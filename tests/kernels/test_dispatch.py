"""The capability table and the decisions that follow from it, for chips that are not there."""

import subprocess
import sys

import pytest
import torch

from kernels import dispatch
from kernels.dispatch import CHIPS, OPS
from kernels.launch_configs import launch_config

GPU = torch.device("cuda", 0)  # never touched: decisions need only its name
CPU = torch.device("cpu")


@pytest.fixture
def pretend(monkeypatch):
    """pretend(target): every device is that chip."""
    monkeypatch.delenv("PILESMITH_KERNELS", raising=False)
    yield dispatch.force_chip
    dispatch.force_chip(None)


@pytest.mark.parametrize("target", [t for t in CHIPS if t != "cpu"])
def test_matrix_ops_go_where_the_tensor_cores_are(target, pretend):
    pytest.importorskip("triton")
    pretend(target)
    chip = CHIPS[target]
    for op, backend, reason in dispatch.decisions(GPU):
        expected = "triton" if chip.triton and (chip.tensor_cores or not OPS[op]) else "torch"
        assert backend == expected, (op, reason)
        assert chip.name in reason and chip.target in reason


def test_the_table_is_the_one_measured():
    """Chips of the README's table: bf16, tensor cores, shared memory in KiB."""
    rows = {
        "cuda:90": (True, True, 227), "cuda:80": (True, True, 163), "cuda:86": (True, True, 99),
        "cuda:70": (False, False, 96), "cuda:75": (False, False, 64), "cuda:60": (False, False, 48),
        "cuda:61": (False, False, 48), "hip:gfx1030": (False, False, 64), "hip:gfx906": (False, False, 64),
    }  # fmt: skip
    for target, (bf16, tensor_cores, shared_kib) in rows.items():
        chip = CHIPS[target]
        assert (chip.bf16, chip.tensor_cores, chip.shared_bytes) == (bf16, tensor_cores, shared_kib << 10), target
    assert CHIPS["cuda:61"].dtype == "float16"  # stored so; multiplied in fp32, since its own fp16 is a 64th as fast
    assert CHIPS["hip:gfx906"].warp_size == 64 and CHIPS["hip:gfx1030"].warp_size == 32


def test_environment_goes_before_config(pretend, monkeypatch):
    pytest.importorskip("triton")
    pretend("cuda:80")
    monkeypatch.setenv("PILESMITH_KERNELS", "torch")
    with dispatch.use_backend("triton"):
        assert all((b, r) == ("torch", "PILESMITH_KERNELS says torch") for _, b, r in dispatch.decisions(GPU))
    monkeypatch.delenv("PILESMITH_KERNELS")
    with dispatch.use_backend("torch"):
        assert all((b, r) == ("torch", "the config says torch") for _, b, r in dispatch.decisions(GPU))
    assert dispatch.backend("attention", GPU) == "triton"


def test_decided_once(pretend, monkeypatch):
    pretend("cuda:80")
    before = dispatch.backend("softmax", GPU)
    monkeypatch.setenv("PILESMITH_KERNELS", "torch" if before == "triton" else "triton")
    assert dispatch.backend("softmax", GPU) == before


def test_bad_names_say_what_is_allowed(pretend, monkeypatch):
    with pytest.raises(ValueError, match="should be auto, triton or torch"):
        dispatch.set_backend("cuda")
    with pytest.raises(ValueError, match="the table has cuda:90"):
        pretend("cuda:42")
    monkeypatch.setenv("PILESMITH_KERNELS", "fast")
    pretend("cuda:80")
    with pytest.raises(ValueError, match="PILESMITH_KERNELS=fast"):
        dispatch.backend("softmax", GPU)


def test_chip_from_the_environment(monkeypatch):
    dispatch.force_chip(None)
    monkeypatch.setenv("PILESMITH_CHIP", "cuda:75")
    try:
        assert dispatch.chip(CPU).name == "T4" and not dispatch.chip(CPU).bf16
    finally:
        monkeypatch.delenv("PILESMITH_CHIP")
        dispatch.force_chip(None)
    assert dispatch.chip(CPU).target == "cpu"


@pytest.mark.parametrize(
    "major, minor, shared_kib, target, config",
    [(9, 0, 227, "cuda:90", "cuda:90"), (12, 0, 99, "cuda:89", "cuda:86"), (10, 0, 227, "cuda:89", "cuda:86"),
     (8, 9, 99, "cuda:89", "cuda:86"), (8, 7, 163, "cuda:86", "cuda:86"), (5, 2, 48, "cuda:60", None)],
)  # fmt: skip
def test_an_unlisted_gpu_is_treated_as_the_nearest_older_one(major, minor, shared_kib, target, config, monkeypatch):
    class Properties:
        name = "some GPU"
        shared_memory_per_block_optin = shared_kib << 10

    Properties.major, Properties.minor = major, minor
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    dispatch.force_chip(None)
    try:
        chip = dispatch.chip(GPU)
        assert chip.target == target and chip.name == "some GPU" and chip.shared_bytes <= shared_kib << 10
        if config:
            expected = launch_config(CHIPS[config], "attention_forward", 64)
            assert launch_config(chip, "attention_forward", 64) == expected
    finally:
        dispatch.force_chip(None)


@pytest.mark.parametrize("bf16", [False, True])
def test_an_unlisted_amd_chip_trains_in_what_it_multiplies(bf16, monkeypatch):
    class Properties:
        name, gcnArchName = "some AMD GPU", "gfx1201:sramecc-"

    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16 and not including_emulation)
    dispatch.force_chip(None)
    try:
        chip = dispatch.chip(GPU)
        assert (chip.target, chip.bf16, chip.triton) == ("hip:gfx1201", bf16, False)
    finally:
        dispatch.force_chip(None)


def test_the_interpreter_runs_only_when_asked_for(kernel_path):
    dispatch.set_backend("auto")
    assert dispatch.backend("attention", CPU) == "torch"
    with kernel_path("triton"):
        assert dispatch.backend("attention", CPU) == "triton"


PROGRAM = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch, kernels
from kernels import dispatch
q = torch.randn(1, 8, 2, 16, requires_grad=True)
kernels.attention(q, q, q).sum().backward()
kernels.attention_decode(q.detach(), q.detach(), q.detach(), 8)
x = torch.randn(1, 8, 64, requires_grad=True)
cos = torch.ones(8, 8)
kernels.rotary(x, cos, cos, n_head=2, head_dim=16).sum().backward()
y, s = kernels.add_layer_norm(x, x, torch.ones(64), torch.zeros(64))
z = kernels.bias_activation(kernels.layer_norm(y, torch.ones(64)), torch.zeros(64), "gelu")
kernels.softmax(z).sum().backward()
kernels.linear_cross_entropy(s[0], torch.randn(50, 64), torch.arange(8)).backward()
assert all(rest == ["torch", "Triton is not installed"] for _, *rest in dispatch.decisions(q.device))
print("works")
"""


def test_everything_works_without_triton():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.stdout == "works\n", done.stderr
