"""Turns Triton's interpreter on for the whole test process, before anything imports a kernel; off under `-m gpu`.

The interpreter changes what `@triton.jit` returns, so it is one choice for a process. It does not change which path an
op takes: on a CPU that stays PyTorch's until a test asks for Triton (tests/kernels/conftest.py).
"""

import os


def pytest_configure(config):
    if config.getoption("markexpr") == "gpu":
        os.environ.pop("TRITON_INTERPRET", None)
    else:
        os.environ["TRITON_INTERPRET"] = "1"
