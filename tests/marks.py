"""Marks for lists of parameters."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def slow_unless(fast: Callable[[Any], bool], values: Iterable[Any]) -> list[Any]:
    """Return the parameters, those that are not `fast` marked as slow: the rest show no fault of another kind."""
    return [value if fast(value) else pytest.param(value, marks=pytest.mark.slow) for value in values]
