"""What the kernels over rows share: the tile that a program works on, and the second stage of sums over rows."""

import torch
from torch import Tensor

from kernels.aot import triton_targets
from kernels.custom_op import wrap_triton
from kernels.dispatch import CHIPS, interpreting, processors, tl, triton

WIDEST_TILE = 8192
GPT_WIDTHS = (768, 1024, 1280, 1600, 2048, 2560)
WARPS_PER_MULTIPROCESSOR = 16
# Beside its stages a program holds what CUDA keeps for itself, 1 KiB, and what reductions exchange.
OTHER_SHARED_BYTES = 1280


def row_tile(width: int) -> tuple[int, int, int]:
    """(rows, columns, num_warps) of a tile that holds whole rows: 16 elements a thread at every width up to 8192.

    From 1024 columns on, a thread holds the same columns of every row of its tile, so sums over rows stay in registers.
    Wider rows do not fit the registers of a program and have kernels of their own that loop.
    """
    columns = max(16, triton.next_power_of_2(width))
    rows = max(1, (2048 if columns <= 1024 else 4096) // columns)
    return rows, columns, rows * columns // 512


def tile_case(columns: int, itemsize: int) -> str:
    """Key into kernels/configs for kernels on rows: "2048x2" is a tile of 2048 columns of 2 bytes each."""
    return f"{max(16, triton.next_power_of_2(columns))}x{itemsize}"


def contiguous_rows(x: Tensor) -> Tensor:
    """x (..., C) as (rows, C) with columns side by side, copied only where no view can be that."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def persistent_programs(device: torch.device, num_warps: int) -> int:
    """How many programs keep a device busy when each walks over many rows: 16 warps a multiprocessor."""
    if interpreting():
        return 3
    return WARPS_PER_MULTIPROCESSOR // num_warps * processors(device)


def pipeline_stages(shared_bytes: int, bytes_per_stage: int, num_warps: int) -> int:
    """How many iterations of a persistent loop to keep in flight; n of them hold n - 1 in shared memory."""
    for_stages = shared_bytes * num_warps // WARPS_PER_MULTIPROCESSOR - OTHER_SHARED_BYTES
    return min(4, 1 + max(0, for_stages) // bytes_per_stage)


@triton.jit
def column_sums_kernel(
    partial_ptr,  # fp32 (n_rows, 2, n_cols)
    first_ptr,  # (n_cols,)
    second_ptr,  # (n_cols,) or None
    n_rows,
    n_cols,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    which = tl.program_id(1)
    # Added up over the rows of a tile only at the end: inside the loop each sum would wait for its loads.
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in tl.range(0, n_rows, ROWS, num_stages=4):
        rows = start + tl.arange(0, ROWS)
        mask = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
        offsets = (rows[:, None].to(tl.int64) * tl.num_programs(1) + which) * n_cols + cols[None, :]
        total += tl.load(partial_ptr + offsets, mask=mask, other=0.0)
    total = tl.sum(total, axis=0)
    if which == 0:
        tl.store(first_ptr + cols, total.to(first_ptr.dtype.element_ty), mask=cols < n_cols)
    else:
        if second_ptr is not None:
            tl.store(second_ptr + cols, total.to(second_ptr.dtype.element_ty), mask=cols < n_cols)


COLUMN_SUMS_TILE = {"ROWS": 64, "BLOCK": 32}


def column_sums(partial: Tensor, first: Tensor, second: Tensor | None = None) -> None:
    """Sum partial (programs, 1 or 2, C), fp32, over the programs into first (C,) and, if there, second (C,).

    The second stage of a reduction without atomics: the same bits at every run.
    """
    programs, sums, width = partial.shape
    grid = (triton.cdiv(width, COLUMN_SUMS_TILE["BLOCK"]), sums)
    wrap_triton(column_sums_kernel)[grid](partial, first, second, programs, width, **COLUMN_SUMS_TILE, num_warps=4)


def shipped_dtypes(op: str) -> list[tuple[str, tuple[str, ...]]]:
    """(Triton's name of a dtype, the chips that train in it) for an op's compile cases."""
    targets = triton_targets(op)
    native = tuple(t for t in targets if CHIPS[t].bf16)
    others = tuple(t for t in targets if not CHIPS[t].bf16)
    return [("bf16", native), ("fp16", tuple(targets)), ("fp32", others)]


def tiles_of_gpt_widths() -> dict[tuple[int, int, int], list[int]]:
    """The tiles of `row_tile` that GPT's widths need, each with its widths."""
    tiles: dict[tuple[int, int, int], list[int]] = {}
    for width in GPT_WIDTHS:
        tiles.setdefault(row_tile(width), []).append(width)
    return tiles
