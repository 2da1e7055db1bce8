"""What the kernels over rows share: tiles, sums, rows that lie beyond 2^31 elements, and what the compiler sees."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from kernels import bias_activation, layer_norm, softmax
from kernels.cross_entropy_gpu import _turn_in_torch, turn_in_triton
from kernels.dispatch import CHIPS, triton
from kernels.rows import GPT_WIDTHS, column_sums, pipeline_stages, row_tile

pytest.importorskip("triton")


@pytest.mark.parametrize("programs, sums, width", [(1, 1, 1), (3, 2, 59), (40, 2, 111), (65, 1, 1023)])
def test_column_sums(programs, sums, width, triton_path):
    partial = torch.randn(programs, sums, width)
    first, second = torch.full((width,), 9.0), torch.full((width,), 9.0, dtype=torch.float16)
    column_sums(partial, first, second if sums == 2 else None)
    torch.testing.assert_close(first, partial[:, 0].sum(0))
    torch.testing.assert_close(second, partial[:, 1].sum(0).half() if sums == 2 else torch.full_like(second, 9.0))


@pytest.mark.parametrize("width", [1, 40, 59, 1023, 8192, *GPT_WIDTHS])
def test_tile_holds_whole_rows(width):
    rows, columns, num_warps = row_tile(width)
    assert columns >= width and triton.next_power_of_2(columns) == columns
    assert rows * columns == 512 * num_warps and num_warps in (4, 8, 16)


def test_pipeline_fits_the_shared_memory_of_every_chip():
    for chip in CHIPS.values():
        for width in GPT_WIDTHS:
            rows, columns, num_warps = row_tile(width)
            bytes_per_stage = 3 * rows * columns * 2
            stages = pipeline_stages(chip.shared_bytes, bytes_per_stage, num_warps)
            taken = (stages - 1) * bytes_per_stage + 1024  # of which CUDA takes 1 KiB for each program
            assert stages == 1 or 16 // num_warps * taken <= chip.shared_bytes + 1024


@pytest.fixture(scope="module")
def far_rows():
    """fp16 (5, 40) whose last row lies 2^31 elements after its first; what 32 bits make of that lies within it too.

    The rows in between are never touched, so the memory is never there.
    """
    try:
        storage = torch.empty((1 << 32) + 64, dtype=torch.float16)
    except RuntimeError:
        pytest.skip("the system does not promise 8.6 GB")
    rows = storage[1 << 31 :].as_strided((5, 40), (1 << 29, 1))
    rows.copy_(torch.randn(5, 40))
    storage[:40] = 7
    return rows


def test_offsets_beyond_32_bits(far_rows, triton_path):
    near = far_rows.clone()
    weight = torch.ones(40, dtype=torch.float16)

    def results(x):
        leaf = x.detach().requires_grad_()  # the same strides
        outputs = layer_norm(leaf, weight), bias_activation(leaf, weight, "relu"), softmax(leaf)
        return *outputs, *(torch.autograd.grad(y, leaf, x)[0] for y in outputs)

    for far, expected in zip(results(far_rows), results(near), strict=True):
        assert torch.equal(far, expected)


def test_logits_beyond_32_bits(far_rows, triton_path):
    targets, near = torch.arange(5), far_rows.float()
    before = far_rows.clone()
    results = []
    for turn, logits in ((turn_in_triton, far_rows), (_turn_in_torch, near)):
        losses, lse = torch.empty(5), torch.empty(5)
        turn(logits, targets, losses, lse, torch.ones(()), -100, 0.0, 1.0, gradient=True)
        results.append((losses, logits.float()))
    far_rows.copy_(before)
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)
    assert torch.allclose(results[0][0], F.cross_entropy(before.float(), targets, reduction="none"), atol=1e-3)


def test_the_compiler_sees_the_kernels():
    """Without the interpreter, a joint graph of forward and backward holds kernel launches, not opaque calls."""
    program = """
        import importlib, torch, triton
        from torch._functorch.aot_autograd import aot_export_joint_simple
        from torch._subclasses import FakeTensorMode
        from triton.backends.compiler import GPUTarget
        from kernels import dispatch

        class Driver:
            get_current_target = lambda self: GPUTarget("cuda", 90, 32)
            get_current_device = lambda self: 0

        triton.runtime.driver.set_active(Driver())
        dispatch.force_chip("cuda:90")
        modules = "kernels.layer_norm", "kernels.softmax", "kernels.activation"
        norm, softmax, activation = map(importlib.import_module, modules)
        norm.persistent_programs = activation.persistent_programs = lambda device, num_warps: 264

        def launches(function, *shapes):
            with FakeTensorMode():
                inputs = [torch.empty(shape, requires_grad=True) for shape in shapes]
                graph = aot_export_joint_simple(function, inputs, trace_joint=True).graph
            names = [str(node.target) for node in graph.nodes]
            assert not any("pilesmith" in name for name in names), names
            return sum("triton_kernel_wrapper" in name for name in names)

        rows, row = (64, 768), (768,)
        assert launches(lambda x, r, w, b: list(norm._layer_norm_op(x, r, w, b, 1e-5)[:2]), rows, rows, row, row) == 3
        assert launches(lambda x, w: [norm._layer_norm_op(x, None, w, None, 1e-5)[0]], rows, row) == 3
        assert launches(lambda x: [softmax._softmax_op(x, 0, 1.0)], rows) == 2
        assert launches(lambda x, b: [activation._bias_activation_op(x, b, 1)], rows, row) == 3
        assert launches(lambda x: [activation._bias_activation_op(x, None, 0)], rows) == 2
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
