"""What each format promises: exact where it says exact, unbiased where it rounds, no small divisor turned into 0."""

import math

import pytest
import torch

from kernels.number_formats import (
    BLOCK,
    GROUP,
    NEAREST,
    decode_first,
    decode_moments,
    decode_root,
    decode_second,
    encode_first,
    encode_moments,
    encode_second,
    join,
    momentum_bound,
    more_bits,
    random_bits,
    random_keys,
    random_table,
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


def draws(key: int, blocks: int, step: float = 3.0, first_block: int = 0) -> torch.Tensor:
    """32 random bits for each element of these blocks."""
    step = torch.tensor(step)
    return random_bits(random_table(step), random_keys(key, step, first_block + blocks), first_block, blocks)


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
    whole = draws(11, 2 * GROUP + 40, 7.0)
    assert torch.equal(whole[GROUP : GROUP + 16], draws(11, 16, 7.0, GROUP))
    for other in (draws(12, len(whole), 7.0), draws(11, len(whole), 8.0), draws(11, 3 * GROUP, 7.0, GROUP)):
        assert (whole == other[: len(whole)]).float().mean() < 1e-3
    assert torch.equal(draws(2**32 - 1, 1), draws(2**32 - 1, 1))


def test_random_bits_are_uniform_and_independent():
    """Each bit, each pair of an element's bits, and the same bit of neighbours, near and far, of tensors, of steps."""
    bits = draws(5, GROUP, 1.0)
    coins = torch.stack(
        [(bits >> i & 1).float() for i in range(32)] + [(more_bits(bits) >> i & 1).float() for i in range(16)]
    )
    coins = coins.view(48, -1) * 2 - 1
    n = coins.shape[1]
    assert (coins.mean(1).abs() < 5 / math.sqrt(n)).all()
    correlations = coins @ coins.T / n - torch.eye(48)
    assert correlations.abs().max() < 6 / math.sqrt(n)
    for distance in (1, 32, BLOCK):  # neighbours, and the same place of two blocks
        assert ((coins[:, distance:] * coins[:, :-distance]).mean(1).abs() < 6 / math.sqrt(n)).all()


def test_groups_tensors_and_steps_are_independent():
    """The same places of two groups and of two tensors share a table, so it is keys and steps that must differ."""
    draw = [torch.stack([draws(key, 2 * GROUP, step)[::GROUP, :2] for key in range(16)]) for step in range(256)]
    coins = torch.stack([torch.stack(draw) >> i & 1 for i in range(32)]).float() * 2 - 1  # bit, step, key, group, place
    n = coins[0, :, :, 0].numel()
    for a, b in (
        (coins[:, :, :, 0], coins[:, :, :, 1]),
        (coins[:, :, 1:], coins[:, :, :-1]),
        (coins[:, 1:], coins[:, :-1]),
    ):
        assert ((a * b).flatten(1).mean(1).abs() < 5 / math.sqrt(n)).all()


def test_a_rounding_says_nothing_of_another():
    """The three roundings of an element's update: 10 upper bits of the first moment's, the second's, the weight's."""
    bits = draws(9, 8 * GROUP)
    parts = [bits >> 22 & 0x3FF, bits >> 10 & 0x3FF, more_bits(bits) >> 6]
    parts = [(p.view(-1).double() - 511.5) / 295.6 for p in parts]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        for f in (lambda x: x, torch.square):
            x, y = f(parts[a]), f(parts[b])
            correlation = ((x - x.mean()) * (y - y.mean())).mean() / (x.std() * y.std())
            assert correlation.abs() < 5 / math.sqrt(bits.numel())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_is_unbiased(dtype):
    x = torch.tensor([1.001, -0.3, 3e-6, -1.7e-5, 6e-8, 7.7e3, 0.0, -2.0, 1 - 1e-4])
    times = 1 << 18
    rounded = round_stochastic(x.repeat_interleave(times), dtype, draws(1, len(x) * times // BLOCK).view(-1) & 0xFFFF)
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


@pytest.mark.parametrize("random", [0, NEAREST, 0xFFFFF])
def test_a_divisor_never_underflows(random):
    v = second_moments()
    v[:, ::3] = v[:, ::3] ** 3  # far below their block's largest
    v[0, :5] = 1e-45
    v[:, 7] = 0
    v[3] = 0
    decoded = decode_second(*encode_second(v, random))
    assert (decoded > 0).all() and (decoded >= v * (1 - 1 / 8)).all()
    smallest = (decoded.amax(1, keepdim=True) * 2.0**-30).clamp(min=torch.finfo(torch.float32).tiny)
    assert (decoded[v == 0] <= smallest.expand_as(v)[v == 0]).all()


def test_what_was_never_encoded_is_zero():
    first, second = decode_moments(
        torch.zeros(100, dtype=torch.int8), torch.zeros(100, dtype=torch.uint8), torch.zeros(2, dtype=torch.uint8), 1.3
    )
    assert (first == 0).all() and (second == 0).all()


def test_the_root_is_at_most_six_percent_too_large():
    code = torch.arange(256, dtype=torch.uint8).repeat(224, 1)
    lowest = torch.arange(1, 225, dtype=torch.uint8)
    exact, root = decode_second(code, lowest).double().sqrt(), decode_root(code, lowest).double()
    finite = exact.isfinite()
    assert ((root / exact)[finite] >= 1).all() and ((root / exact)[finite] < 1.0607).all()


def test_second_moments_are_unbiased():
    v = torch.tensor([1.0, 0.999, 0.9990001, 0.3, 1e-3, 1.9, 1.95, 1.2345e-7]).repeat(BLOCK // 8)[None]
    times = 1 << 13
    decoded = decode_second(*encode_second(v.expand(times, BLOCK).contiguous(), draws(2, times)))
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
    decoded = decode_first(encode_first(m, root, bound, draws(3, times)), root, bound)
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
