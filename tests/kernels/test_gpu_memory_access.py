"""Attention under compute-sanitizer: no access out of bounds, which takes minutes. Run with `pytest -m gpu`."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from kernels import dispatch

LIMIT_S = 120
PROGRAM = """
import torch
from kernels import attention, attention_decode
for D in (64, 80, 59):
    for T in (1, 97, 257):
        q = torch.randn(2, T, 4, D, device="cuda", dtype=torch.float16, requires_grad=True)
        k = torch.randn(2, T, 2, D, device="cuda", dtype=torch.float16, requires_grad=True)
        starts = torch.zeros(2, T, dtype=torch.int32, device="cuda")
        starts[:, T // 3 :] = T // 3
        for doc_start in (None, starts):
            attention(q, k, k, doc_start=doc_start).sum().backward()
        with torch.no_grad():
            attention_decode(q[:, -1:], k, k, T)
torch.cuda.synchronize()
"""


@pytest.mark.gpu
def test_no_access_out_of_bounds():
    device = torch.device("cuda")
    if dispatch.backend("attention", device) != "triton":
        pytest.skip({op: why for op, _, why in dispatch.decisions(device)}["attention"])
    run_sanitized()


def run_sanitized():
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    # PyTorch asks CUDA for things that it may not have, which are errors of the API and none of memory.
    options = ["--error-exitcode", "9", "--report-api-errors", "no"]
    command = [sanitizer, *options, sys.executable, "-c", PROGRAM]
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # so that an allocation ends where its tensor ends
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        pytest.skip(f"compute-sanitizer was not through after {LIMIT_S} s")
    if "Device not supported" in done.stdout:
        pytest.skip("compute-sanitizer cannot see into this device")
    assert done.returncode == 0, done.stdout[-3000:]


def test_a_sanitizer_that_is_slow_is_no_failure(tmp_path, monkeypatch):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text("#!/bin/sh\nexec sleep 20\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setitem(globals(), "LIMIT_S", 0.5)
    with pytest.raises(pytest.skip.Exception, match="not through after 0.5 s"):
        run_sanitized()
