"""What each format promises: exact where it says exact, unbiased where it rounds, no small divisor turned into 0."""

import math

import pytest
import torch

from kernels.number_formats import (
    BLOCK,
    NEAREST,
    decode_first,
    decode_moments,
    decode_second,
    encode_first,
    encode_moments,
    encode_second,
    join,
    momentum_bound,
    more_bits,
    random_bits,
    round_stochastic,
    split,
)

EVERY_LOW_HALF = torch.arange(65536, dtype=torch.int64)
BETAS = [(0.9, 0.95), (0.9, 0.999), (0.8, 0.99)]


def numbers(high_half: int) -> torch.Tensor:
    """All fp32 numbers with these upper 16 bits."""
    bits = (high_half << 16) + EVERY_LOW_HALF
    return torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(torch.float32)


def same_bits(x: torch.Tensor, y: torch.Tensor) -> bool:
    return torch.equal(x.view(torch.int32), y.view(torch.int32))


def draws(key: int, shape: tuple[int, int]) -> torch.Tensor:
    """16 random bits, (times, BLOCK) of them as a tile."""
    return random_bits(key, torch.tensor(3.0), 0, shape[0]) & 0xFFFF


def test_bf16_and_residual_are_the_master_bit_for_bit():
    for exponent in range(256):  # subnormal numbers, infinities and NaN too
        for sign_and_mantissa in (0x0, 0x7F, 0x8040):
            x = numbers(exponent << 7 | sign_and_mantissa)
            weight, residual = split(x, torch.bfloat16)
            back = join(weight, residual)
            kept = ~x.isnan()
            assert same_bits(back[kept], x[kept])
            assert weight[~kept].isnan().logical_or(weight[~kept].isinf()).all()  # never a NaN that looks healthy
            rounded = x.bfloat16()
            finite = rounded.isfinite()
            assert torch.equal((weight.float() - x).abs()[finite], (rounded.float() - x).abs()[finite])


def test_every_nan_stays_one_that_the_gpu_makes():
    x = torch.tensor([0x7FFFFFFF, 0x7FC00000, -1, -0x400000], dtype=torch.int32).view(torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        weight, residual = split(x, dtype)
        assert weight.isnan().all() and join(weight, residual).isnan().all()


def test_fp16_and_residual_are_the_master_as_far_as_promised():
    for exponent in (0, 1, *range(80, 146), 254, 255):
        for sign_and_mantissa in (0x0, 0x7F, 0x802A):
            x = numbers(exponent << 7 | sign_and_mantissa)
            weight, residual = split(x, torch.float16)
            back, size = join(weight, residual), x.abs()
            exact, tiny = (size >= 2**-17) & (size < 65520), size < 2**-17
            assert same_bits(back[exact], x[exact])
            assert ((back - x)[tiny].abs() <= 2**-41).all()
            assert back[(size >= 65520) & ~x.isnan()].isinf().all()
            finite = size < 65520
            assert ((weight.float() - x).abs() <= (x.half().float() - x).abs() + 2**-40)[finite].all()


def test_join_of_split_does_not_move():
    torch.manual_seed(0)
    x = torch.randn(1 << 16) * 2.0 ** torch.randint(-40, 10, (1 << 16,))
    for dtype in (torch.bfloat16, torch.float16):
        weight, residual = split(x, dtype)
        once = join(weight, residual)
        again = split(once, dtype)
        assert torch.equal(again[0].view(torch.int16), weight.view(torch.int16)) and torch.equal(again[1], residual)


def test_random_bits_depend_on_key_step_and_element_alone():
    step = torch.tensor(7.0)
    whole = random_bits(11, step, 0, 40)
    assert torch.equal(whole[8:24], random_bits(11, step, 8, 16))
    for other in (random_bits(12, step, 0, 40), random_bits(11, step + 1, 0, 40), random_bits(11, step, 40, 40)):
        assert (whole == other).float().mean() < 1e-3
    assert torch.equal(random_bits(2**32 - 1, step, 0, 1), random_bits(2**32 - 1, step, 0, 1))


def test_random_bits_are_uniform_and_independent():
    bits = random_bits(5, torch.tensor(1.0), 0, 4096)
    n = bits.numel()
    columns = [(bits >> i & 1).float() for i in range(32)] + [(more_bits(bits) >> i & 1).float() for i in range(32)]
    coins = torch.stack(columns).view(64, -1) * 2 - 1
    assert (coins.mean(1).abs() < 5 / math.sqrt(n)).all()
    correlations = coins @ coins.T / n - torch.eye(64)
    assert correlations.abs().max() < 6 / math.sqrt(n)
    for distance in (1, BLOCK):  # neighbours in a block, and the same place of two blocks
        assert ((coins[:, distance:] * coins[:, :-distance]).mean(1).abs() < 6 / math.sqrt(n)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_is_unbiased(dtype):
    x = torch.tensor([1.001, -0.3, 3e-6, -1.7e-5, 6e-8, 7.7e3, 0.0, -2.0, 1 - 1e-4])
    times = 1 << 18
    rounded = round_stochastic(x.repeat_interleave(times), dtype, draws(1, (len(x) * times // BLOCK, BLOCK)).view(-1))
    rounded = rounded.float().view(len(x), times)
    assert (rounded.amax(1) - rounded.amin(1) <= x.abs() * 2**-6 + 2**-24).all()  # neighbours only
    standard_error = rounded.double().std(1) / math.sqrt(times)
    assert ((rounded.double().mean(1) - x.double()).abs() <= 4 * standard_error + x.abs() * 2e-7 + 1e-12).all()
    assert torch.equal(rounded[6:8], x[6:8, None].expand(2, times))  # what is representable stays


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_keeps_what_is_not_finite(dtype):
    x = torch.tensor([math.inf, -math.inf, math.nan])
    rounded = round_stochastic(x, dtype, 0xFFFF)
    assert torch.equal(rounded[:2].float(), x[:2]) and rounded[2].isnan()


def second_moments() -> torch.Tensor:
    """Blocks over eight orders of magnitude each, at scales from subnormal to huge."""
    torch.manual_seed(0)
    scales = 10.0 ** torch.tensor([-44.0, -38, -37, -30, -12, -3, 0, 20, 30])
    return torch.rand(len(scales), BLOCK) ** 5 * scales[:, None]


def test_second_moments_round_trip():
    v = second_moments()
    codes = encode_second(v, NEAREST)
    decoded = decode_second(*codes)
    normal = v >= 2 * torch.finfo(torch.float32).tiny
    inside = normal & (v >= v.amax(1, keepdim=True) * 2**-30)
    assert ((decoded - v).abs() / v)[inside].max() <= 1 / 16
    assert torch.equal(decode_second(*encode_second(decoded, NEAREST)), decoded)
    everything = torch.arange(256, dtype=torch.uint8)[None]
    for lowest in (1, 100, 224):
        values = decode_second(everything, torch.tensor([lowest], dtype=torch.uint8))
        if lowest < 224:  # beyond, codes of infinity and NaN
            assert torch.equal(decode_second(*encode_second(values, NEAREST)), values)
            assert (values[0, 1:] > values[0, :-1]).all()


@pytest.mark.parametrize("random", [0, NEAREST, 0xFFFF])
def test_a_divisor_never_underflows(random):
    v = second_moments()
    v[:, ::3] = v[:, ::3] ** 3  # far below their block's largest
    v[0, :5] = 1e-45
    v[:, 7] = 0
    decoded = decode_second(*encode_second(v, random))
    assert torch.equal(decoded == 0, v == 0)
    assert (decoded >= v * (1 - 1 / 8)).all()


def test_second_moments_are_unbiased():
    v = torch.tensor([1.0, 0.999, 0.9990001, 0.3, 1e-3, 1.9, 1.95, 1.2345e-7]).repeat(BLOCK // 8)[None]
    times = 1 << 13
    decoded = decode_second(*encode_second(v.expand(times, BLOCK).contiguous(), draws(2, (times, BLOCK))))
    decoded = decoded.double().view(times * BLOCK // 8, 8)
    standard_error = decoded.std(0) / math.sqrt(len(decoded))
    assert ((decoded.mean(0) - v[0, :8].double()).abs() <= 4 * standard_error + v[0, :8] * 2e-6).all()


@pytest.mark.parametrize("betas", BETAS)
def test_first_moments_round_trip(betas):
    bound = momentum_bound(*betas)
    every = torch.arange(-127, 128, dtype=torch.int8)
    for root in (3e-19, 1e-12, 3.3e-5, 0.7, 1e4):
        roots = torch.full(every.shape, root)
        assert torch.equal(encode_first(decode_first(every, roots, bound), roots, bound, NEAREST), every)
    assert (decode_first(every, torch.zeros(255), bound) == 0).all()


@pytest.mark.parametrize("betas", BETAS)
def test_first_moments_are_unbiased(betas):
    bound = momentum_bound(*betas)
    fractions = torch.tensor([0.0, 1e-5, 3e-4, 0.013, -0.2, 0.5, -0.99, 1.0]) * min(bound, 1.0)
    times = 1 << 13
    root = torch.full((times, BLOCK), 3e-5)
    m = (fractions * 3e-5).repeat(BLOCK // 8).expand(times, BLOCK)
    decoded = decode_first(encode_first(m, root, bound, draws(3, (times, BLOCK))), root, bound)
    decoded = (decoded / 3e-5).double().view(-1, 8)
    standard_error = decoded.std(0) / math.sqrt(len(decoded))
    assert ((decoded.mean(0) - fractions.double()).abs() <= 4 * standard_error + 1e-6).all()


@pytest.mark.parametrize("betas", BETAS)
def test_the_bound_holds_against_the_worst_gradients(betas):
    beta1, beta2 = betas
    m = v = 0.0
    for k in reversed(range(3000)):  # Cauchy and Schwarz are equal where gradients grow as (beta2 / beta1)^t
        g = (beta1 / beta2) ** k
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
    ratio = m / math.sqrt(v)
    assert 0.88 * momentum_bound(beta1, beta2) < ratio < 0.9 * momentum_bound(beta1, beta2)
    assert momentum_bound(0.99, 0.9) == 32.0


@pytest.mark.parametrize("n", [1, BLOCK - 1, BLOCK, BLOCK + 1, 1000])
def test_moments_of_any_size(n):
    torch.manual_seed(0)
    v = torch.rand(n) * 1e-6 + 1e-9
    m = (torch.rand(n) - 0.5) * v.sqrt()
    codes = encode_moments(m, v, 1.3, NEAREST)
    assert [c.numel() for c in codes] == [n, n, math.ceil(n / BLOCK)]
    decoded = decode_moments(*codes, 1.3)
    assert ((decoded[1] - v).abs() / v).max() <= 1 / 16
    assert ((decoded[0] - m).abs() / v.sqrt()).max() < 0.01
