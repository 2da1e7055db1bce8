"""The number format follows from what the chip can really do."""

import platform
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engine import device
from engine.cards import CARDS, GiB, get
from engine.config import ConfigError
from engine.device import DTYPES, card_of, choose_device, choose_dtype, find_device
from engine.memory import best_dtype
from engine.step_time import chip_of
from kernels import dispatch


@pytest.fixture
def as_chip():
    """as_chip("cuda:75"): decide as if the device were that chip."""
    yield dispatch.force_chip
    dispatch.force_chip(None)


@pytest.mark.parametrize(
    "target, dtype",
    [
        ("cuda:90", torch.bfloat16),
        ("cuda:86", torch.bfloat16),
        ("cuda:75", torch.float16),
        ("cuda:70", torch.float16),
        ("cuda:61", torch.float16),
        ("cuda:60", torch.float16),
    ],
)
def test_dtype_by_chip(as_chip, target, dtype):
    as_chip(target)
    chosen, reason = choose_dtype("auto", torch.device("cuda"))
    assert chosen == dtype and reason


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_a_run_computes_in_what_the_planner_counts_with(monkeypatch, card):
    monkeypatch.setitem(dispatch._chips, torch.device("cuda"), chip_of(card))
    assert choose_dtype("auto", torch.device("cuda"))[0] == DTYPES[best_dtype(card)]


def test_a_cpu_computes_in_fp32_unless_asked():
    assert choose_dtype("auto", torch.device("cpu"))[0] == torch.float32
    assert choose_dtype("bf16", torch.device("cpu")) == (torch.bfloat16, "asked for")


@pytest.mark.parametrize("wanted", ["tpu", "mps", "cuda:99", "nonsense:x"])
def test_a_device_that_is_not_there_is_refused(wanted):
    with pytest.raises(ConfigError, match="--device"):
        choose_device(wanted)


@pytest.mark.parametrize(
    "capability, built", [((6, 0), ["sm_75", "sm_90", "compute_90"]), ((6, 1), ["sm_70", "sm_86"])]
)
def test_a_gpu_that_this_pytorch_was_not_built_for_is_refused_with_the_build_that_was(monkeypatch, capability, built):
    current = []
    for name, value in {"is_available": True, "device_count": 2, "get_device_name": "GTX 1080 Ti"}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)
    for wanted in ("auto", "cuda:1"):
        with pytest.raises(ConfigError, match=r"begins at [67]\.[05].*cu126"):
            choose_device(wanted)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_60", *built])
    assert find_device("cuda:1")[0] == torch.device("cuda", 1) and not current
    assert choose_device("cuda:1")[0] == current[-1] == torch.device("cuda", 1)
    assert choose_device("auto", 1)[0] == current[-1] == torch.device("cuda", 1)


@pytest.mark.parametrize("wanted", ["auto", "cuda"])
def test_more_processes_than_gpus_are_refused(monkeypatch, wanted):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match=f"--device {wanted}: this machine has 2 GPUs and at least 4 processes"):
        find_device(wanted, 3)


@pytest.mark.parametrize(
    "asked, release",
    [
        ("", "6.8.0-51-generic"),
        ("PYTORCH_CUDA_ALLOC_CONF", "6.8.0-51-generic"),
        ("PYTORCH_ALLOC_CONF", "6.8.0-51-generic"),
        ("", "5.15.167.4-microsoft-standard-WSL2"),
    ],
)
def test_segments_expand_unless_a_person_says_something_else_of_the_allocator(monkeypatch, asked, release):
    """Or the driver is Windows', which cannot do it under Linux."""
    monkeypatch.setattr(platform, "release", lambda: release)
    monkeypatch.setattr(device, "find_device", lambda wanted, rank: (torch.device("cuda", 0), "there"))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    if asked:
        monkeypatch.setenv(asked, "max_split_size_mb:256")
    said, settings = [], torch._C._accelerator_setAllocatorSettings
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", lambda text: (settings(text), said.append(text)))
    try:
        choose_device("auto")
    finally:
        settings("expandable_segments:False")
    assert said == ([] if asked or "WSL" in release else ["expandable_segments:True"])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere the system's own counter is right")
def test_the_peak_is_the_programs_own_and_not_its_parents(start):
    held = np.ones(1 << 27)  # 1 GiB, held while the child starts
    child = "import torch\nfrom engine.device import peak_memory\nprint(peak_memory(torch.device('cpu')))"
    output, _ = start("-c", child).communicate(timeout=300)
    assert held.nbytes > int(output.splitlines()[-1]) > 50 << 20


def test_a_container_has_no_more_memory_than_its_limit(monkeypatch, tmp_path):
    monkeypatch.setattr(device.psutil, "virtual_memory", lambda: type("Memory", (), {"total": 64 * GiB}))
    monkeypatch.setattr(device, "_CGROUPS", tmp_path)
    monkeypatch.setattr(device, "_OWN_CGROUPS", own := tmp_path / "own")
    assert device.host_memory() == 64 * GiB  # no control groups
    for limits, lines in (
        ({"memory.max": 48 * GiB}, "0::/"),
        ({"memory.max": "max", "job/memory.max": 48 * GiB, "job/step/memory.max": "max"}, "0::/job/step"),
        ({"memory.max": 48 * GiB}, "0::/not/seen/from/inside"),
        (
            {"memory/memory.limit_in_bytes": 2**63 - 4096, "memory/job/memory.limit_in_bytes": 48 * GiB},
            "3:cpu:/\n2:rdma,memory:/job",
        ),
    ):
        for name, limit in limits.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(f"{limit}\n")
        own.write_text(lines + "\n")
        assert device.host_memory() == 48 * GiB, lines
        for name in limits:
            (tmp_path / name).unlink()
        assert device.host_memory() == 64 * GiB


def test_a_device_is_known_by_its_name_and_its_real_memory(monkeypatch):
    properties = SimpleNamespace(name="NVIDIA GeForce RTX 3090", total_memory=24 * GiB)
    free = [23.5 * GiB]  # our own context takes the rest
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free[0]), 24 * GiB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 0.5)
    monkeypatch.setattr("kernels.dispatch.chip", lambda device: SimpleNamespace(target="cuda:86"))
    assert card_of(torch.device("cuda")) == replace(get("RTX 3090"), memory_bytes=12 * GiB)
    free[0] = 21.5 * GiB
    assert card_of(torch.device("cuda")).memory_bytes == 10 * GiB, "2 GiB are a desktop's"
    free[0] = 23.5 * GiB
    properties.name = "NVIDIA RTX of next year"
    unknown = card_of(torch.device("cuda"))
    assert unknown.name == properties.name and unknown.target == "cuda:86" and unknown.memory_bytes == 12 * GiB
