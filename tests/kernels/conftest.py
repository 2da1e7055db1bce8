"""How kernels are tested without a GPU.

tests/conftest.py turns the interpreter on for the process. A test that wants the Triton path takes the fixture
`triton_path`; within it every op dispatches to Triton, interpreted, and without it to PyTorch. So both paths can be
tried in one process:

    def test_values(triton_path): ...                         # Triton, skipped where Triton is absent
    @pytest.mark.parametrize("path", ["torch", "triton"])
    def test_both(path, kernel_path):
        with kernel_path(path): ...

The compiler needs the interpreter off: ahead-of-time compiles run in the worker processes of kernels/aot.py, and
anything else that needs a real `@triton.jit` runs in a subprocess without TRITON_INTERPRET.
The interpreter is wrong in bf16 and slow: test fp32 and fp16, lengths up to about 257, few heads.
"""

from contextlib import AbstractContextManager

import pytest

# No kernel is imported here: conftest files load before the interpreter is turned on.


@pytest.fixture
def triton_path():
    """Every op on its Triton path for the length of the test."""
    with _path("triton"):
        yield


@pytest.fixture
def kernel_path():
    """kernel_path("torch" | "triton"): a context in which every op takes that path."""

    return _path


def _path(path: str) -> AbstractContextManager:
    from kernels import dispatch

    if path == "triton":
        if not dispatch.TRITON_PRESENT:
            pytest.skip("Triton is not installed")
        assert dispatch.interpreting(), "a kernel was imported before tests/conftest.py turned the interpreter on"
    return dispatch.use_backend(path)
