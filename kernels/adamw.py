"""AdamW for a whole group of parameters in one launch, its state in 32, 16 or 8 bits."""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.aot import Case, as_launched, triton_targets
from kernels.dispatch import CHIPS, backend, chip, tl, triton
from kernels.launch_configs import launch_config
from kernels.number_formats import (
    BLOCK,
    GROUP,
    decode_moments,
    encode_moments,
    join,
    momentum_bound,
    more_bits,
    random_bits,
    random_keys,
    random_table,
    round_stochastic,
    split,
    tile_decode_first,
    tile_decode_root,
    tile_decode_second,
    tile_encode_first,
    tile_encode_second,
    tile_join,
    tile_more_bits,
    tile_random_bits,
    tile_round_stochastic,
    tile_split,
    tile_widen,
)

CHUNK = 1 << 18  # elements that the PyTorch path unpacks at a time on a CPU
CHUNK_ON_CARD = 1 << 22  # and elsewhere
UNPACKED_BYTES = {"residual": 61, "stochastic": 44}  # at most, an element of a chunk: of fp16 weights and int8 moments


class Parameter(NamedTuple):
    """What a step reads and writes for one parameter; see `adamw`."""

    weight: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    residual: Tensor | None
    exponents: Tensor | None
    key: int
    first_block: int


@torch.no_grad()
def adamw(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    residuals: Sequence[Tensor] | None = None,
    exponents: Sequence[Tensor] | None = None,
    bound: float | None = None,
    keys: Sequence[int] | None = None,
    first_blocks: Sequence[int] | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Update weights and moments in place by one step of AdamW with decoupled weight decay.

    All lists run over the same parameters, contiguous tensors of any shapes; within a list all have one dtype.
    weights: fp32; or bf16 or fp16 and int16 `residuals`, which together are the fp32 master weights (`split`); or
    bf16 or fp16 alone, rounded stochastically. grads: fp32, bf16 or fp16. exp_avgs and exp_avg_sqs: fp32; or bf16,
    rounded stochastically; or int8 and uint8 with `exponents`, uint8 (ceil(n / BLOCK),) (`encode_first`,
    `encode_second`). steps: fp32 scalars that count the updates.

    bound: `momentum_bound` that int8 moments were encoded with (None: that of `betas`). keys: an integer below 2^32
    for each parameter; with the step they determine the random bits. first_blocks: where what is given begins in its
    parameter, in blocks and a multiple of GROUP: parts of a parameter are updated as the whole is. grad_scale, fp32
    scalar: multiplies the gradients (clipping and loss scale). found_inf, fp32 scalar, 0 or 1: where it is 1 nothing
    changes, steps included. Neither is read on the host. The gradients hold nothing of use afterwards. (Loshchilov and
    Hutter, 2019)
    """
    if not weights:
        return
    if not all(t.is_contiguous() for t in (*weights, *exp_avgs, *exp_avg_sqs)):
        raise ValueError("adamw: weights and moments must be contiguous")
    # A lone tensor of one number would be taken for a Scalar, and read on the host.
    torch._foreach_add_(steps, 1 if found_inf is None else [1 - found_inf] * len(steps))
    nothing = [None] * len(weights)
    grads = [g.contiguous() for g in grads]
    lists = (weights, grads, exp_avgs, exp_avg_sqs, steps, residuals or nothing, exponents or nothing)
    places = keys or [0] * len(weights), first_blocks or [0] * len(weights)
    parameters = [Parameter(*of_one) for of_one in zip(*lists, *places, strict=True)]
    numbers = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    numbers["bound"] = momentum_bound(*betas) if bound is None else bound
    launch = _adamw_triton if backend("adamw", weights[0].device) == "triton" else _adamw_torch
    launch(parameters, grad_scale=grad_scale, found_inf=found_inf, **numbers)


def _adamw_torch(parameters: list[Parameter], *, grad_scale, found_inf, **numbers) -> None:
    """PyTorch's own kernel where all is fp32; else the same on what a chunk unpacks to."""
    if found_inf is not None and found_inf.device.type == "cpu":
        if found_inf.item():
            return
        found_inf = None
    # PyTorch divides by it.
    scaling = {"grad_scale": None if grad_scale is None else grad_scale.reciprocal(), "found_inf": found_inf}
    weights, grads, exp_avgs, exp_avg_sqs, steps, *_ = map(list, zip(*parameters))
    if {weights[0].dtype, grads[0].dtype, exp_avgs[0].dtype} == {torch.float32}:
        _fused(weights, grads, exp_avgs, exp_avg_sqs, steps, **scaling, **numbers)
    else:
        for parameter in parameters:
            _adamw_chunks(parameter, **scaling, **numbers)


def _fused(weights, grads, exp_avgs, exp_avg_sqs, steps, *, lr, betas, eps, weight_decay, bound, grad_scale, found_inf):
    torch._fused_adamw_(
        weights,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        steps,
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
        grad_scale=grad_scale,
        found_inf=found_inf,
    )


def _adamw_chunks(parameter: Parameter, *, bound, found_inf, **numbers) -> None:
    """One parameter, a chunk at a time, so that what is unpacked stays small, and on a CPU in its caches."""
    weight, grad, exp_avg, exp_avg_sq = (t.view(-1) for t in parameter[:4])
    step, exponents, key = parameter.step, parameter.exponents, parameter.key
    residual = None if parameter.residual is None else parameter.residual.view(-1)
    keep = None if found_inf is None else found_inf != 0
    chunk = CHUNK if weight.is_cpu else CHUNK_ON_CARD
    rounds_weight, rounds_moments = weight.dtype != torch.float32 and residual is None, exp_avg.dtype != torch.float32
    if rounds_weight or rounds_moments:
        table = _cpu_table(step.item()) if step.is_cpu else random_table(step)
        blocks = -(-weight.numel() // BLOCK)
        keys = random_keys(key, step, parameter.first_block + blocks)[parameter.first_block // GROUP :]
    for start in range(0, weight.numel(), chunk):
        part = slice(start, min(start + chunk, weight.numel()))
        blocks = slice(start // BLOCK, -(-part.stop // BLOCK))
        # fp32 that is there already is not copied: the kernel below updates it in its place.
        w = weight[part].float() if residual is None else join(weight[part], residual[part])
        if exponents is None:
            m, v = exp_avg[part].float(), exp_avg_sq[part].float()
        else:
            m, v = decode_moments(exp_avg[part], exp_avg_sq[part], exponents[blocks], bound)
        _fused([w], [grad[part].float()], [m], [v], [step], bound=bound, found_inf=found_inf, **numbers)
        if rounds_weight or rounds_moments:
            random = random_bits(table, keys, blocks.start, blocks.stop - blocks.start)
        if exponents is not None:
            codes = encode_moments(m, v, bound, random)
            for place, values in zip((exp_avg[part], exp_avg_sq[part], exponents[blocks]), codes):
                _put(place, values, keep)
        elif rounds_moments:
            bits = random.view(-1)[: m.numel()]
            _put(exp_avg[part], round_stochastic(m, exp_avg.dtype, bits & 0xFFFF), keep)
            _put(exp_avg_sq[part], round_stochastic(v, exp_avg.dtype, (bits >> 16) & 0xFFFF), keep)
        if rounds_weight:
            bits = more_bits(random).view(-1)[: w.numel()]
            _put(weight[part], round_stochastic(w, weight.dtype, bits), keep)
        elif residual is not None:
            high, low = split(w, weight.dtype)
            _put(weight[part], high, keep)
            _put(residual[part], low, keep)


@lru_cache(maxsize=1)
def _cpu_table(step: float) -> Tensor:
    """`random_table` on a CPU, made once for all parameters."""
    return random_table(torch.tensor(step))


def _put(place: Tensor, values: Tensor, keep: Tensor | None) -> None:
    """Write values, but not where `keep`, a scalar on the device, says that the old ones stay."""
    place.copy_(values if keep is None else torch.where(keep, place, values))


TILE = {"ROWS": 32, "num_warps": 4}
ODD_TILE = {"ROWS": 16, "num_warps": 4}  # of tensors whose addresses or sizes allow no wide loads


@triton.jit
def _adamw_kernel(
    tensor_ptr,  # int32 (programs,): the tensor that each program works on
    # int64 (tensors, 11): the addresses in a Parameter in its order, elements, first program, key, first block
    table_ptr,
    grad_scale_ptr,  # fp32 scalar or None
    found_inf_ptr,  # fp32 scalar or None
    lr,
    decay,  # 1 - lr * weight_decay
    beta1_rest,  # 1 - beta1, made in double precision, as are the others
    beta2,
    beta2_rest,
    beta1_log,
    beta2_log,
    eps,
    bound,
    WEIGHT: tl.constexpr,  # "fp32", "bf16" or "fp16"
    RESIDUAL: tl.constexpr,  # whether 16-bit weights have one
    GRAD: tl.constexpr,
    MOMENTS: tl.constexpr,  # "fp32", "bf16" or "int8"
    ALIGNED: tl.constexpr,  # of all addresses, in bytes, and sizes, in elements: 16, or 1
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tensor = tl.load(tensor_ptr + tl.program_id(0))
    row = table_ptr + tensor * 11
    step = tl.load(tl.load(row + 4).to(tl.pointer_type(tl.float32)))
    first_block = (tl.program_id(0) - tl.load(row + 8)) * ROWS
    start = first_block * BLOCK
    # Addresses take 64 bits, what is added to them within the tile 32.
    size = tl.minimum(tl.load(row + 7) - start, ROWS * BLOCK).to(tl.int32)
    if found_inf_ptr is not None:
        size = tl.where(tl.load(found_inf_ptr) == 0, size, 0)
    size = tl.multiple_of(size, ALIGNED)
    blocks = tl.arange(0, ROWS)
    offsets = blocks[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = offsets < size

    w_ptr = _address(row, start, WEIGHT, ALIGNED) + offsets
    g = tile_widen(tl.load(_address(row + 1, start, GRAD, ALIGNED) + offsets, mask=mask, other=0), GRAD)
    w = tl.load(w_ptr, mask=mask, other=0)
    residual_ptr = _address(row + 5, start, "int16", ALIGNED) + offsets
    if RESIDUAL:
        w = tile_join(w, tl.load(residual_ptr, mask=mask, other=0), WEIGHT)
    else:
        w = tile_widen(w, WEIGHT)
    if MOMENTS == "int8":
        m_ptr = _address(row + 2, start, "int8", ALIGNED) + offsets
        v_ptr = _address(row + 3, start, "uint8", ALIGNED) + offsets
        exponent_ptr = _address(row + 6, first_block, "uint8", 1) + blocks
        block_mask = blocks * BLOCK < size
        code, exponent = tl.load(v_ptr, mask=mask, other=0), tl.load(exponent_ptr, mask=block_mask, other=0)
        v = tile_decode_second(code, exponent)
        m = tile_decode_first(tl.load(m_ptr, mask=mask, other=0), tile_decode_root(code, exponent), bound)
    else:
        m_ptr = _address(row + 2, start, MOMENTS, ALIGNED) + offsets
        v_ptr = _address(row + 3, start, MOMENTS, ALIGNED) + offsets
        m = tile_widen(tl.load(m_ptr, mask=mask, other=0), MOMENTS)
        v = tile_widen(tl.load(v_ptr, mask=mask, other=0), MOMENTS)

    if grad_scale_ptr is not None:
        g *= tl.load(grad_scale_ptr)
    m += (g - m) * beta1_rest
    v = v * beta2 + g * g * beta2_rest
    divisor = tl.sqrt(v * (1 / _one_minus_power(beta2_log, step))) + eps
    w = w * decay - m / divisor * (lr / _one_minus_power(beta1_log, step))

    if MOMENTS != "fp32" or (WEIGHT != "fp32" and not RESIDUAL):
        random = tile_random_bits(tl.load(row + 9), step, tl.load(row + 10) + first_block, ROWS, BLOCK)
    if MOMENTS == "int8":
        code, exponent = tile_encode_second(v, random)
        tl.store(v_ptr, code, mask=mask)
        tl.store(exponent_ptr, exponent, mask=block_mask)
        tl.store(m_ptr, tile_encode_first(m, tile_decode_root(code, exponent), bound, random), mask=mask)
    elif MOMENTS == "bf16":
        tl.store(m_ptr, tile_round_stochastic(m, random & 0xFFFF, "bf16"), mask=mask)
        tl.store(v_ptr, tile_round_stochastic(v, random >> 16, "bf16"), mask=mask)
    else:
        tl.store(m_ptr, m, mask=mask)
        tl.store(v_ptr, v, mask=mask)
    if RESIDUAL:
        high, low = tile_split(w, WEIGHT)
        tl.store(w_ptr, high, mask=mask)
        tl.store(residual_ptr, low, mask=mask)
    elif WEIGHT == "fp32":
        tl.store(w_ptr, w, mask=mask)
    else:
        tl.store(w_ptr, tile_round_stochastic(w, tile_more_bits(random), WEIGHT), mask=mask)


@triton.jit
def _address(cell, start, FORMAT: tl.constexpr, ALIGNED: tl.constexpr):
    """The address in a cell of the table, as a pointer to what FORMAT is stored in, moved by `start` elements."""
    address = tl.load(cell)
    if FORMAT == "fp32":
        pointer = address.to(tl.pointer_type(tl.float32))
    elif FORMAT == "fp16":
        pointer = address.to(tl.pointer_type(tl.float16))
    elif FORMAT == "int8":
        pointer = address.to(tl.pointer_type(tl.int8))
    elif FORMAT == "uint8":
        pointer = address.to(tl.pointer_type(tl.uint8))
    else:
        pointer = address.to(tl.pointer_type(tl.int16))  # bf16 as its bits, too
    return tl.multiple_of(pointer + start, ALIGNED)


@triton.jit
def _one_minus_power(log, step):
    """1 - exp(log * step), by its series where the difference would cancel."""
    x = log * step
    near = tl.maximum(x, -0.25)
    series = 1 + near / 2 * (1 + near / 3 * (1 + near / 4 * (1 + near / 5 * (1 + near / 6))))
    return tl.where(x > -0.25, -near * series, 1 - tl.exp(x))


FORMATS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "int8"}


def _adamw_triton(parameters: list[Parameter], *, lr, betas, eps, weight_decay, bound, grad_scale, found_inf) -> None:
    by_alignment: dict[int, list[Parameter]] = {16: [], 1: []}
    for p in parameters:
        places = [t.data_ptr() for t in (*p[:4], p.residual) if t is not None]
        by_alignment[1 if p.weight.numel() % 16 or any(place % 16 for place in places) else 16].append(p)
    for alignment, some in by_alignment.items():
        if not some:
            continue
        of_all, device = some[0], some[0].weight.device
        weight, moments = FORMATS[of_all.weight.dtype], FORMATS[of_all.exp_avg.dtype]
        case = launch_case(weight, of_all.residual is not None, moments, alignment)
        launch = launch_config(chip(device), "adamw", case, TILE if alignment == 16 else ODD_TILE)
        programs = tuple(triton.cdiv(p.weight.numel(), launch["ROWS"] * BLOCK) for p in some)
        _adamw_kernel[(sum(programs),)](
            _tensor_of_program(programs, device),
            _table(some, programs, device),
            grad_scale,
            found_inf,
            lr,
            1 - lr * weight_decay,
            1 - betas[0],
            betas[1],
            1 - betas[1],
            math.log(betas[0]) if betas[0] else -1e9,
            math.log(betas[1]) if betas[1] else -1e9,
            eps,
            bound,
            WEIGHT=weight,
            RESIDUAL=of_all.residual is not None,
            GRAD=FORMATS[of_all.grad.dtype],
            MOMENTS=moments,
            ALIGNED=alignment,
            BLOCK=BLOCK,
            **launch,
        )


def launch_case(weight: str, residual: bool, moments: str, alignment: int) -> str:
    """Key into kernels/configs, such as "bf16_residual_moments_int8"."""
    return f"{weight}{'_residual' if residual else ''}_moments_{moments}{'' if alignment == 16 else '_odd'}"


def _table(parameters: list[Parameter], programs: tuple[int, ...], device: torch.device) -> Tensor:
    """The kernel's table_ptr."""
    rows, first = [], 0
    for (*tensors, key, first_block), count in zip(parameters, programs):
        addresses = [0 if t is None else t.data_ptr() for t in tensors]
        rows.append([*addresses, tensors[0].numel(), first, key, first_block])
        first += count
    table = torch.tensor(rows, dtype=torch.int64, pin_memory=device.type == "cuda")
    return table.to(device, non_blocking=True)


@lru_cache(maxsize=1024)  # an optimizer whose states are streamed has over a hundred portions
def _tensor_of_program(programs: tuple[int, ...], device: torch.device) -> Tensor:
    """int32: the number of the tensor that each program works on, when tensor i has programs[i] of them."""
    return torch.repeat_interleave(torch.tensor(programs)).to(device, torch.int32)


def compile_cases() -> list[Case]:
    """Every format of weights and moments, each on the chips that train in it; gradients as wide as the weights."""
    targets = triton_targets("adamw")
    of_format = {
        "fp32": tuple(targets),
        "bf16": tuple(t for t in targets if CHIPS[t].bf16),
        "fp16": tuple(t for t in targets if not CHIPS[t].bf16),
    }
    pointers = {"tensor_ptr": "*i32", "table_ptr": "*i64", "grad_scale_ptr": "*fp32", "found_inf_ptr": "*fp32"}
    numbers = ("lr", "decay", "beta1_rest", "beta2", "beta2_rest", "beta1_log", "beta2_log", "eps", "bound")
    cases = []
    for weight, residual in (("bf16", True), ("fp16", True), ("bf16", False), ("fp16", False), ("fp32", False)):
        for moments in ("int8", "bf16", "fp32"):
            form = {"WEIGHT": weight, "RESIDUAL": residual, "GRAD": weight, "MOMENTS": moments}
            for alignment, tile in ((16, TILE), (1, ODD_TILE)):
                label = launch_case(weight, residual, moments, alignment)
                case = Case(
                    op="adamw", label=label, kernel=_adamw_kernel, signature=pointers | dict.fromkeys(numbers, "fp32"),
                    constants=form | {"ALIGNED": alignment, "BLOCK": BLOCK}, targets=of_format[weight],
                )  # fmt: skip
                cases += as_launched(case, "adamw", [label], tile)
    return cases
