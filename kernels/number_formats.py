"""The number formats of an optimizer's state: 32-bit numbers kept in 16 and 8 bits, in PyTorch and inside kernels.

- `split`/`join`: an fp32 master weight as a bf16 or fp16 weight and an int16 residual.
- `round_stochastic`: fp32 to bf16 or fp16.
- `encode_second`/`decode_second`, `encode_first`/`decode_first`: AdamW's moments in 8 bits.

Whatever rounds takes random bits and is unbiased; NEAREST instead of random bits rounds to nearest, and then encoding
what was decoded gives the same values back. `random_bits` makes them from counters, so they are a function of
(key, step, element) and of nothing else: not of the device, the launch or the history.

On a CPU the PyTorch side is bound by the number of operations, each a pass over its tensors. So they work in place
where they can, do without what takes ten times as long as an addition (`where`, `isfinite`, comparisons), and take a
square root, where its size is all that matters, by halving the exponent.

Why AdamW's moments must not be rounded to nearest: with beta2 = 0.999 a second moment shrinks by a thousandth a step
where the gradient is 0, less than half of bf16's last place, so it would never shrink at all.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dispatch import tl, triton

# Elements that share an exponent of the second moment. An exponent is a byte, so small blocks are cheap; and rows of a
# matrix, which may differ by many octaves, are multiples of 64 in nearly every model.
BLOCK = 64
GROUP = 1024  # blocks that share a key of the random bits
NEAREST = 0x80000  # in place of random bits for the moments

_GOLDEN = 0x9E3779B9 - (1 << 32)  # 2^32 over the golden ratio: multiples of it spread evenly
_MIX_1, _MIX_2 = 0x7FEB352D, 0x846CA68B - (1 << 32)
_TABLE = 0x3C6EF372  # in place of a tensor's key
_MULTIPLIER = 0x915F77F5 - (1 << 32)
_UNIT = 2.0**-32 * (1 - 2.0**-20)  # makes a word less than a half, even rounded
_FP16_BIAS = (127 - 15) << 23  # between the exponents of fp32 and fp16
_ROOT_BIAS = 127 << 22
_FIRST_LEVELS = 127
_SECOND_OCTAVES = 31


def momentum_bound(beta1: float, beta2: float) -> float:
    """What |first moment| / sqrt(second moment) cannot exceed, by Cauchy and Schwarz, and an eighth for rounding.

    Where beta1^2 >= beta2 there is no bound; 32 then, which no gradient that is not made for it reaches.
    """
    ratio = beta1**2 / beta2 if beta2 else math.inf
    return min(32.0, 1.125 * (1 - beta1) / math.sqrt((1 - beta2) * (1 - ratio))) if ratio < 1 else 32.0


def random_bits(table: Tensor, keys: Tensor, first_block: int, blocks: int) -> Tensor:
    """Return int32 (blocks, BLOCK): 32 random bits for each element of these blocks of a tensor.

    table: `random_table` of the step; keys: `random_keys` of the tensor; first_block: a multiple of GROUP. An element's
    bits are those of its place in the table and of its group's key, one flipped by the other. So any two elements' are
    independent, which is what the variance of a sum of rounding errors asks for, and a table does for all tensors.
    """
    keys = keys[first_block // GROUP : -(-(first_block + blocks) // GROUP), None, None]
    return (table[:blocks] ^ keys).view(-1, BLOCK)[:blocks]


def random_table(step: Tensor) -> Tensor:
    """Return int32 (GROUP, BLOCK): what a step's random bits are made from; step: fp32 scalar."""
    elements = torch.arange(GROUP * BLOCK, dtype=torch.int32, device=step.device)
    return _mix(elements.mul_(_GOLDEN).add_(_mix(step.to(torch.int32) * _GOLDEN + _TABLE))).view(-1, BLOCK)


def random_keys(key: int, step: Tensor, blocks: int) -> Tensor:
    """Return int32 (ceil(blocks / GROUP),): the keys of a tensor's groups at a step.

    key: what tells tensors and runs apart, in [0, 2^32); step: fp32 scalar.
    """
    groups = torch.arange(-(-blocks // GROUP), dtype=torch.int32, device=step.device)
    return _mix(_mix(step.to(torch.int32) * _GOLDEN + (key - (key >> 31 << 32))) ^ groups)


def more_bits(bits: Tensor) -> Tensor:
    """Return another 16 random bits for each of `bits`.

    Made by a multiplication whose pairs of number and product fill the square evenly (spectral figure of merit 0.79).
    """
    return (bits * _MULTIPLIER).bitwise_right_shift_(16).bitwise_and_(0xFFFF)


def _mix(x: Tensor) -> Tensor:
    """A permutation of 32-bit numbers, "lowbias32", in which each bit of the input flips half of the output's."""
    x = (x ^ (x >> 16).bitwise_and_(0xFFFF)).mul_(_MIX_1)
    x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).mul_(_MIX_2)
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


def split(master: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Split fp32 numbers into weights of `dtype`, rounded to nearest, and the int16 residuals that give them back.

    bf16: the upper 16 bits rounded, ties away from zero (a tie to even might need a residual of +32768), and the signed
    difference of the bits. Every number comes back bit for bit, infinities too; a NaN loses its payload.
    fp16: where the weight is a normal number the same, with 13 bits; below, fixed point with 40 bits after the point.
    Every |x| in [2^-17, 65520) comes back bit for bit, a smaller one as the nearest multiple of 2^-40 = 9e-13, a larger
    one as infinity.
    """
    if dtype == torch.bfloat16:
        bits = _one_nan(master).view(torch.int32)
        low = bits.to(torch.int16)  # the lower half, which as a signed number is the difference sought
        return bits.add_(0x8000).bitwise_right_shift_(16).to(torch.int16).view(dtype), low
    bits = master.contiguous().view(torch.int32)
    rebased, fixed = _fp16_parts(master, bits)
    high = torch.where(rebased >= 1 << 23, (rebased + 0x1000) >> 13, (fixed + 0x8000) >> 16)
    low = torch.where(high >= 0x400, rebased - (high << 13), fixed - (high << 16))
    low = torch.where(high >= 0x7C00, 0, low)
    return _fp16(high, bits, master), low.to(torch.int16)


def join(weight: Tensor, residual: Tensor) -> Tensor:
    """Return the fp32 numbers that `split` took apart."""
    if weight.dtype == torch.bfloat16:
        return weight.to(torch.float32).view(torch.int32).add_(residual).view(torch.float32)
    high, low = weight.view(torch.int16).to(torch.int32), residual.to(torch.int32)
    magnitude = high & 0x7FFF
    normal = ((magnitude << 13) + low + _FP16_BIAS).view(torch.float32)
    subnormal = ((magnitude << 16) + low).to(torch.float32) * 2.0**-40
    number = torch.where(magnitude >= 0x400, normal, subnormal)
    return torch.where(magnitude >= 0x7C00, weight.to(torch.float32), torch.where(high < 0, -number, number))


def round_stochastic(x: Tensor, dtype: torch.dtype, random: Tensor | int) -> Tensor:
    """Round fp32 to bf16 or fp16, up with the probability that makes the mean x.

    random: int32, 16 bits an element. What is not finite stays so; fp16 has nothing finite beyond 65504.
    """
    if dtype == torch.bfloat16:
        # Infinity's lower half and this NaN's are 0, so nothing carries into what makes them so.
        bits = _one_nan(x).view(torch.int32).add_(random)
        return bits.bitwise_right_shift_(16).to(torch.int16).view(dtype)
    bits = x.contiguous().view(torch.int32)
    rebased, fixed = _fp16_parts(x, bits)
    return _fp16(torch.where(rebased >= 1 << 23, (rebased + (random >> 3)) >> 13, (fixed + random) >> 16), bits, x)


def _one_nan(x: Tensor) -> Tensor:
    """A copy of x whose NaN are all 0x7FC00000: a GPU's, 0x7FFFFFFF, would be rounded up to -0."""
    return torch.nan_to_num(x.contiguous(), nan=math.nan, posinf=math.inf, neginf=-math.inf)


def _fp16_parts(x: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
    """|x| as fp16's bits and 13 more, for where it is a normal number there, and as a multiple of 2^-40 below that."""
    halves = (x.abs().clamp(max=2.0**-13) * 2.0**41).to(torch.int32)
    return (bits & 0x7FFFFFFF) - _FP16_BIAS, (halves + 1) >> 1


def _fp16(magnitude: Tensor, bits: Tensor, x: Tensor) -> Tensor:
    """fp16 of this magnitude, with the sign of `bits` and the overflow and NaN of x."""
    magnitude = torch.where(x.isnan(), 0x7E00, magnitude.clamp(max=0x7C00))
    return (magnitude | (bits >> 16 & 0x8000)).to(torch.int16).view(torch.float16)


def encode_second(v: Tensor, random: Tensor | int) -> tuple[Tensor, Tensor]:
    """Encode second moments in 8 bits: floats with 5 bits of exponent and 3 of mantissa, the exponent's range by block.

    v: fp32 (blocks, BLOCK), not negative; random: int32, of which the lower 20 bits count. Returns uint8 codes
    (blocks, BLOCK) and uint8 lowest exponents (blocks,). The steps are 7-12% wide wherever a number lies in the 32
    octaves below its block's largest, 3-6% in the square root that Adam divides by. A number below the range, 0 too,
    becomes its end: a divisor rounded down to 0 would blow the update up. The range ends at fp32's smallest normal
    numbers, so a block of nothing but tiny numbers loses nothing either. (Block-wise as in Dettmers et al., 8-bit
    Optimizers via Block-wise Quantization, 2022, whose code has more steps near a block's largest element, fewer
    octaves, and a table to look up.)
    """
    bits = v.view(torch.int32)
    # The largest may round up by a step, even into the next octave.
    top = (bits.amax(1, keepdim=True) + 0xFFFFF) >> 23
    lowest = (top - _SECOND_OCTAVES).clamp_(min=1)
    code = torch.add(bits, random & 0xFFFFF).sub_(lowest << 23).bitwise_right_shift_(20).clamp_(0, 255)
    return code.to(torch.uint8), lowest[:, 0].to(torch.uint8)


def decode_second(code: Tensor, lowest: Tensor) -> Tensor:
    """Return the fp32 second moments (blocks, BLOCK) that `encode_second` encoded, exactly representable numbers.

    What was never encoded, zeros throughout, is 0.
    """
    exponent = lowest.to(torch.int32)[:, None] << 23
    return torch.add(exponent, code.to(torch.int32), alpha=1 << 20).view(torch.float32)


def decode_root(code: Tensor, lowest: Tensor) -> Tensor:
    """Return what first moments are stored as fractions of, fp32 (blocks, BLOCK), from their second moments' codes.

    Half the exponent, and the mantissa as it is: the square root of the second moment or up to 6% above it.
    """
    exponent = (lowest.to(torch.int32)[:, None] << 22) + _ROOT_BIAS
    return torch.add(exponent, code.to(torch.int32), alpha=1 << 19).view(torch.float32)


def encode_first(m: Tensor, root: Tensor, bound: float, random: Tensor | int) -> Tensor:
    """Encode first moments in 8 bits, int8, as fractions of the `decode_root` of their second moments.

    m and root, fp32, one shape; bound: `momentum_bound`; random: int32, of which the upper 20 bits count. The fraction
    is what moves a weight, so its steps are even where it matters, and no element's error depends on its neighbours.
    With a scale for a block it does: one large element makes steps that throw a rarely touched row, with its small
    second moment, far off. The code is the square root of the fraction, 127 steps either side.

    Between level^2 and (level + 1)^2 a square s rounds up with the probability (s - level^2) / (2 level + 1). With t
    even in (0, 1), that is when floor(sqrt(s - t (1 - t)) + t) is level + 1, without a look at the level.
    """
    t_negative = torch.as_tensor(random, dtype=torch.int32).to(torch.float32).mul_(_UNIT).sub_(0.5)
    square = torch.addcmul(t_negative, t_negative, t_negative)
    square = torch.addcdiv(square, m.abs(), root, value=_FIRST_LEVELS**2 / bound).clamp_(0, _FIRST_LEVELS**2)
    level = square.sqrt_().sub_(t_negative)
    # copysign takes three times as long.
    level.view(torch.int32).bitwise_or_(m.view(torch.int32) & -(2**31))
    return level.to(torch.int8)  # towards 0


def decode_first(code: Tensor, root: Tensor, bound: float) -> Tensor:
    """Return the fp32 first moments that `encode_first` encoded against `root`."""
    level = code.to(torch.float32)
    return level.mul_(level.abs()).mul_(bound / _FIRST_LEVELS**2).mul_(root)


def encode_moments(m: Tensor, v: Tensor, bound: float, random: Tensor | int) -> tuple[Tensor, Tensor, Tensor]:
    """Encode both moments, fp32 (n,): int8 (n,), uint8 (n,) and uint8 (ceil(n / BLOCK),) of `encode_second`.

    random: 32 random bits an element, (blocks, BLOCK), or NEAREST.
    """
    code, lowest = encode_second(_blocks(v), random)
    first = encode_first(_blocks(m), decode_root(code, lowest), bound, random)
    return first.view(-1)[: m.numel()], code.view(-1)[: v.numel()], lowest


def decode_moments(m: Tensor, v: Tensor, lowest: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """Return both moments, fp32 (n,), that `encode_moments` encoded."""
    code = _blocks(v)
    first, second = decode_first(_blocks(m), decode_root(code, lowest), bound), decode_second(code, lowest)
    return first.view(-1)[: m.numel()], second.view(-1)[: v.numel()]


def _blocks(flat: Tensor) -> Tensor:
    """A flat tensor as (blocks, BLOCK), the last block filled up with zeros."""
    missing = -flat.numel() % BLOCK
    return (F.pad(flat, (0, missing)) if missing else flat).view(-1, BLOCK)


# The same inside kernels, a tile at a time. The constants above are written out, for kernels cannot read a module's.
# bf16 travels as its bits in int16: chips without bf16 can shift too, and the interpreter rounds it wrongly.


@triton.jit
def tile_random_bits(key, step, first_block, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """uint32 (ROWS, BLOCK): `random_bits` of ROWS blocks from first_block, a multiple of ROWS, which divides 1024."""
    base = step.to(tl.int32).to(tl.uint32) * 0x9E3779B9
    elements = (first_block % 1024).to(tl.uint32) * BLOCK + tl.arange(0, ROWS).to(tl.uint32)[:, None] * BLOCK
    elements = elements + tl.arange(0, BLOCK).to(tl.uint32)[None, :]
    group_key = tile_mix(tile_mix(base + key.to(tl.uint32)) ^ (first_block // 1024).to(tl.uint32))
    return tile_mix(tile_mix(base + 0x3C6EF372) + elements * 0x9E3779B9) ^ group_key


@triton.jit
def tile_more_bits(bits):
    return (bits * 0x915F77F5) >> 16


@triton.jit
def tile_mix(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def tile_widen(x, FORMAT: tl.constexpr):
    """fp32 of a tile as it was loaded: int16 bits of bf16, fp16 or fp32."""
    if FORMAT == "bf16":
        return (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def tile_split(x, FORMAT: tl.constexpr):
    """`split` to "bf16", as int16 bits, or "fp16"; and the int16 residual."""
    bits = x.to(tl.int32, bitcast=True)
    if FORMAT == "bf16":
        bits = tl.where((bits & 0x7FFFFFFF) < 0x7F800000, bits, bits & -65536)
        high = (bits + 0x8000) >> 16
        return high.to(tl.int16), (bits - (high << 16)).to(tl.int16)
    else:
        rebased, fixed = _tile_fp16_parts(x)
        high = tl.where(rebased >= 0x800000, (rebased + 0x1000) >> 13, (fixed + 0x8000) >> 16)
        low = tl.where(high >= 0x400, rebased - (high << 13), fixed - (high << 16))
        low = tl.where(high >= 0x7C00, 0, low)
        return _tile_fp16(high, x), low.to(tl.int16)


@triton.jit
def tile_join(weight, residual, FORMAT: tl.constexpr):
    """`join` of a tile of weights as loaded and of int16 residuals."""
    low = residual.to(tl.int32)
    if FORMAT == "bf16":
        return ((weight.to(tl.int32) << 16) + low).to(tl.float32, bitcast=True)
    else:
        magnitude = weight.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF
        normal = ((magnitude << 13) + low + 0x38000000).to(tl.float32, bitcast=True)
        subnormal = ((magnitude << 16) + low).to(tl.float32) * 9.094947017729282e-13  # 2^-40
        number = tl.where(magnitude >= 0x400, normal, subnormal)
        negative = weight.to(tl.int16, bitcast=True) < 0
        return tl.where(magnitude >= 0x7C00, weight.to(tl.float32), tl.where(negative, -number, number))


@triton.jit
def tile_round_stochastic(x, random, FORMAT: tl.constexpr):
    """`round_stochastic` to "bf16", as int16 bits, or "fp16"."""
    random = random.to(tl.int32)
    if FORMAT == "bf16":
        bits = x.to(tl.int32, bitcast=True)
        return (tl.where((bits & 0x7FFFFFFF) < 0x7F800000, bits + random, bits) >> 16).to(tl.int16)
    else:
        rebased, fixed = _tile_fp16_parts(x)
        return _tile_fp16(tl.where(rebased >= 0x800000, (rebased + (random >> 3)) >> 13, (fixed + random) >> 16), x)


@triton.jit
def _tile_fp16_parts(x):
    halves = (tl.minimum(tl.abs(x), 0.0001220703125) * 2199023255552.0).to(tl.int32)  # min(|x|, 2^-13) 2^41
    return (x.to(tl.int32, bitcast=True) & 0x7FFFFFFF) - 0x38000000, (halves + 1) >> 1


@triton.jit
def _tile_fp16(magnitude, x):
    magnitude = tl.where(x != x, 0x7E00, tl.minimum(magnitude, 0x7C00))
    sign = (x.to(tl.int32, bitcast=True) >> 16) & 0x8000
    return (magnitude | sign).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def tile_encode_second(v, random):
    """`encode_second` of a tile (blocks, BLOCK): uint8 codes and uint8 lowest exponents (blocks,)."""
    bits = v.to(tl.int32, bitcast=True)
    top = (tl.max(bits, axis=1) + 0xFFFFF) >> 23
    lowest = tl.maximum(top - 31, 1)
    code = (bits + (random & 0xFFFFF).to(tl.int32) - (lowest << 23)[:, None]) >> 20
    return tl.minimum(tl.maximum(code, 0), 255).to(tl.uint8), lowest.to(tl.uint8)


@triton.jit
def tile_decode_second(code, lowest):
    """`decode_second` of a tile of uint8 codes (blocks, BLOCK) and uint8 lowest exponents (blocks,)."""
    return ((code.to(tl.int32) << 20) + (lowest.to(tl.int32) << 23)[:, None]).to(tl.float32, bitcast=True)


@triton.jit
def tile_decode_root(code, lowest):
    """`decode_root` of a tile of uint8 codes (blocks, BLOCK) and uint8 lowest exponents (blocks,)."""
    bits = (code.to(tl.int32) << 19) + ((lowest.to(tl.int32) << 22) + 0x1FC00000)[:, None]
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def tile_encode_first(m, root, bound, random):
    """`encode_first` of a tile of first moments: int8 codes."""
    t_negative = random.to(tl.int32).to(tl.float32) * 2.328304216092647e-10 - 0.5  # 2^-32 (1 - 2^-20)
    square = t_negative + t_negative * t_negative + tl.abs(m) * (16129 / bound) / root
    level = (tl.sqrt(tl.minimum(tl.maximum(square, 0.0), 16129.0)) - t_negative).to(tl.int32)
    return tl.where(m < 0, -level, level).to(tl.int8)


@triton.jit
def tile_decode_first(code, root, bound):
    """`decode_first` of a tile of int8 codes."""
    level = code.to(tl.float32)
    return level * tl.abs(level) * (bound / 16129) * root
