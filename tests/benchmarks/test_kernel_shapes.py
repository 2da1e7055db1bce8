"""What is timed on a GPU is the kernel: each call keeps the fastest card busy longer than Python takes to make it."""

import importlib.util
import sys

import pytest
import torch

from benchmarks import test_kernels

LAUNCH_S = 250e-6  # an op of ours takes Python 80 to 200 microseconds
BYTES_S, FLOP_S = 3.35e12, 500e12  # of an H100, the latter in attention


@pytest.fixture
def on_a_gpu(monkeypatch):
    """benchmarks/test_kernels.py as it is where there is a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    spec = importlib.util.spec_from_file_location("kernels_on_a_gpu", test_kernels.__file__)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # where its dataclasses look for it
    spec.loader.exec_module(module)
    return module


def test_calls_outlast_their_launch(on_a_gpu):
    told = {}
    on_a_gpu.test_rotary(lambda run, **about: told.update(about), torch.device("meta"), torch.bfloat16, "pilesmith")
    assert told["bytes"] / BYTES_S > LAUNCH_S
    for width in {width * inner for width in on_a_gpu.WIDTHS for inner in (1, 4)}:
        assert 2 * 2 * on_a_gpu.rows_of(width) * width / BYTES_S > LAUNCH_S, width  # 16 bits, read and written
    for B, T, H, D in on_a_gpu.ATTENTION:
        assert 2 * B * H * T * T * D / FLOP_S > LAUNCH_S, (B, T, H, D)
