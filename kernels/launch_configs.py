"""What kernels are launched with on each chip: tile sizes, warps and stages, from the files of kernels/configs/."""

import functools
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from kernels.dispatch import CHIPS, Chip

LaunchConfig = dict[str, int | None]  # a kernel's constants, num_warps, num_stages
CONFIGS = Path(__file__).parent / "configs"
_OWN_TAG = torch.compiler.config.cache_key_tag

_trials: dict[tuple[str, str], LaunchConfig] = {}


def launch_config(here: Chip, kernel: str, case: int | str, default: LaunchConfig | None = None) -> LaunchConfig:
    """Tile sizes, num_warps and num_stages of a kernel: what kernels/configs/ says, else `default`.

    case: what a kernel's configurations are told apart by, such as the width of its tile. A chip without a file of its
    own takes that of the newest older chip of its family whose shared memory is no larger, one that is older than all
    the oldest's. KeyError without either.
    """
    trial = _trials.get((kernel, str(case)))
    found = trial or config_table(config_target(here)).get(kernel, {}).get(str(case), default)
    if found is None:
        raise KeyError(f"kernels/configs/ has no {kernel} for {case} on {here.name} ({here.target})")
    return found


@contextmanager
def use_launch_config(kernel: str, case: int | str, config: LaunchConfig) -> Iterator[None]:
    """Launch `kernel` with `config`, whatever the table says, for the length of a with block."""
    _trials[kernel, str(case)] = config
    try:
        yield
    finally:
        del _trials[kernel, str(case)]


def config_targets() -> list[str]:
    """The chips that have a file of launch configurations."""
    return [target for target in CHIPS if config_file(target).exists()]


def config_file(target: str) -> Path:
    """Where the launch configurations of a chip are kept; most chips have no file."""
    return CONFIGS / (target.replace(":", "_") + ".json")


@functools.cache
def config_table(target: str) -> dict[str, dict[str, Any]]:
    """What a chip's file says: kernel -> case -> launch configuration; "measured" holds the figures behind them."""
    return json.loads(config_file(target).read_text())


def write_config_table(target: str, table: dict[str, dict[str, Any]]) -> None:
    """Write a chip's file, whole or not at all; kernels are launched by it from now on."""
    partial = CONFIGS / f".{config_file(target).name}.partial"
    partial.write_text(json.dumps(table, indent=1) + "\n")
    os.replace(partial, config_file(target))
    config_table.cache_clear()
    config_target.cache_clear()
    _tag_compiled_graphs()


def _tag_compiled_graphs() -> None:
    """Have torch.compile take graphs from disk only if they were made with these launch configurations.

    It knows the kernels by their sources, and not what they are launched with.
    """
    tables = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(CONFIGS.glob("*.json"))))
    torch.compiler.config.cache_key_tag = _OWN_TAG + tables.hexdigest()[:16]


_tag_compiled_graphs()


@functools.cache
def config_target(here: Chip) -> str:
    """The chip whose file serves `here`: its own, or the nearest's."""
    family = sorted((t for t in config_targets() if _family(t) == _family(here.target)), key=_age)
    older = [t for t in family if _age(t) <= _age(here.target)]
    fitting = [t for t in older if CHIPS[t].shared_bytes <= here.shared_bytes]
    return (fitting or older or family[:1])[-1]


def _family(target: str) -> str:
    return target.partition(":")[0]


def _age(target: str) -> int:
    """The number in a target's name, which grows from one chip to the next: AMD's is hexadecimal."""
    return int("0" + target.partition(":")[2].removeprefix("gfx"), 16)
