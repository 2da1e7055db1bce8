"""AdamW against PyTorch's, the formats against fp32, and the kernel, interpreted, against the PyTorch path."""

import math

import pytest
import torch

from kernels import adamw as module
from kernels import dispatch
from kernels.adamw import adamw
from kernels.number_formats import BLOCK, decode_moments, join, split

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
WEIGHTS = ["fp32", "bf16 residual", "bf16", "fp16 residual", "fp16"]
MOMENTS = ["fp32", "bf16", "int8"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Parameters:
    """Tensors of these sizes in given formats, and their states."""

    def __init__(self, masters, weights="fp32", moments="fp32", keys=None):
        dtype, self.residuals, self.exponents = DTYPES[weights.split()[0]], None, None
        self.weights = [m.clone() for m in masters]
        if weights.endswith("residual"):
            self.weights, self.residuals = map(list, zip(*(split(m, dtype) for m in masters)))
        elif dtype != torch.float32:
            self.weights = [m.to(dtype) for m in masters]
        first, second = (torch.int8, torch.uint8) if moments == "int8" else (DTYPES[moments],) * 2
        self.exp_avgs = [torch.zeros_like(m, dtype=first) for m in masters]
        self.exp_avg_sqs = [torch.zeros_like(m, dtype=second) for m in masters]
        if moments == "int8":
            self.exponents = [m.new_zeros(-(-m.numel() // BLOCK), dtype=torch.uint8) for m in masters]
        self.steps = [m.new_zeros(()) for m in masters]
        self.keys = keys or list(range(len(masters)))

    def step(self, grads, **settings):
        states = self.weights, [g.clone() for g in grads], self.exp_avgs, self.exp_avg_sqs, self.steps
        more = {"residuals": self.residuals, "exponents": self.exponents, "keys": self.keys}
        adamw(*states, **(SETTINGS | more | settings))

    def masters(self):
        if self.residuals is None:
            return [w.float() for w in self.weights]
        return [join(w, r) for w, r in zip(self.weights, self.residuals)]

    def moments(self, betas=SETTINGS["betas"]):
        """Decoded, flat."""
        if self.exponents is None:
            return [(m.float().view(-1), v.float().view(-1)) for m, v in zip(self.exp_avgs, self.exp_avg_sqs)]
        states = zip(self.exp_avgs, self.exp_avg_sqs, self.exponents)
        return [decode_moments(m.view(-1), v.view(-1), e, module.momentum_bound(*betas)) for m, v, e in states]

    def everything(self):
        tensors = self.weights + self.exp_avgs + self.exp_avg_sqs + self.steps
        return tensors + (self.residuals or []) + (self.exponents or [])


def draw(shapes, seed=0, scale=0.02):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) * scale for shape in shapes]


def gradients(shapes, seed, dtype=torch.float32):
    """Over several orders of magnitude, some of them 0."""
    spread = [10**x for x in draw(shapes, seed + 1000, 1.0)]
    return [(g * s * (s > 0.1)).clamp(-1e4, 1e4).to(dtype) for g, s in zip(draw(shapes, seed, 1.0), spread)]


def identical(a: Parameters, b: Parameters):
    return all(torch.equal(x, y) for x, y in zip(a.everything(), b.everything(), strict=True))


@pytest.mark.parametrize("path", ["torch", "triton"])
@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999), (0.0, 0.99)])
def test_fp32_is_pytorchs_adamw(path, betas, kernel_path):
    shapes = [(17, 31), (64,), (3, 256)]
    ours, theirs = Parameters(draw(shapes)), [torch.nn.Parameter(w) for w in draw(shapes)]
    settings = SETTINGS | {"betas": betas}
    optimizer = torch.optim.AdamW(theirs, **settings)
    with kernel_path(path):
        for step in range(50 if path == "torch" else 20):
            grads = gradients(shapes, step)
            for p, g in zip(theirs, grads):
                p.grad = g / 4
            optimizer.step()
            ours.step(grads, grad_scale=torch.tensor(0.25), **settings)
    assert max((a - b).abs().max() for a, b in zip(ours.weights, theirs)) < 1e-6
    assert ours.steps[0] == optimizer.state[theirs[0]]["step"]


@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_kernel_and_pytorch_agree(weights, moments, kernel_path):
    """Both draw the same random bits, so what is rounded differs only where fp32 arithmetic differs by a last place."""
    shapes = [(1000,), (16,), (4, 16, 80)]  # not multiples of 16 elements; of a block; of the tile
    results = []
    for path in ("torch", "triton"):
        parameters = Parameters(draw(shapes), weights, moments)
        with kernel_path(path):
            for step in range(3):
                grads = gradients(shapes, step, parameters.weights[0].dtype)
                parameters.step(grads, grad_scale=torch.tensor(0.5), found_inf=torch.tensor(float(step == 1)))
        results.append(parameters)
    a, b = results
    assert a.steps == b.steps and a.steps[0] == 2
    last_place = {"fp32": 1e-7, "bf16": 2**-7, "fp16": 2**-9}
    tolerance = last_place["fp32" if a.residuals else weights]
    for x, y in zip(a.masters(), b.masters()):
        # A weight that was rounded differently may have been larger then, by the length of the step that followed.
        assert torch.allclose(x, y, rtol=tolerance, atol=6e-8 + tolerance * SETTINGS["lr"])
        assert tolerance < 1e-6 or (x != y).float().mean() < 2e-3
    for (m, v), (n, w) in zip(a.moments(), b.moments()):
        if moments == "fp32":
            assert torch.allclose(m, n, rtol=1e-5, atol=1e-7) and torch.allclose(v, w, rtol=1e-6, atol=0)
        else:
            assert (v != w).float().mean() < 2e-3 and (m != n).float().mean() < 2e-3


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("moments", MOMENTS)
def test_residual_weights_are_fp32_training(dtype, moments):
    """The masters after 100 steps are those of fp32 weights with the same gradients: in bf16 bit for bit."""
    shapes = [(40, 70), (1 << 14, 5), (512,)]  # one of several chunks
    fp32 = Parameters(draw(shapes), "fp32", moments)
    residual = Parameters(draw(shapes), f"{dtype} residual", moments)
    for step in range(100 if moments != "int8" else 30):
        grads = gradients(shapes, step % 5, DTYPES[dtype])
        settings = {"lr": 1e-3 / (1 + step), "grad_scale": torch.tensor(0.3)}
        fp32.step(grads, **settings)
        residual.step(grads, **settings)
    for a, b, w in zip(fp32.weights, residual.masters(), residual.weights):
        assert torch.equal(a, b) if dtype == "bf16" else (a - b).abs().max() <= 1e-9
        nearest = a.to(w.dtype).float()
        assert torch.equal((w.float() - a).abs(), (nearest - a).abs()) or dtype == "fp16"
        assert (w.float() != a).float().mean() > 0.9  # the weights alone are not the masters


def test_residual_weights_are_fp32_training_in_the_kernel(triton_path):
    shapes = [(33, 70), (512,)]
    fp32, residual = Parameters(draw(shapes)), Parameters(draw(shapes), "bf16 residual")
    for step in range(8):
        grads = gradients(shapes, step, torch.bfloat16)
        fp32.step(grads)
        residual.step(grads)
    assert all(torch.equal(a, b) for a, b in zip(fp32.weights, residual.masters()))


@pytest.mark.parametrize("path", ["torch", "triton"])
@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_nothing_changes_where_gradients_are_not_finite(weights, moments, path, kernel_path):
    shapes = [(300,), (512,)]
    parameters, untouched = (Parameters(draw(shapes), weights, moments) for _ in range(2))
    with kernel_path(path):
        for p in (parameters, untouched):
            p.step(gradients(shapes, 0, p.weights[0].dtype))
        dtype = parameters.weights[0].dtype
        bad = [torch.full(shape, value, dtype=dtype) for shape, value in zip(shapes, (math.nan, math.inf))]
        parameters.step(bad, grad_scale=torch.tensor(math.nan), found_inf=torch.tensor(1.0))
    assert identical(parameters, untouched)


@pytest.mark.parametrize("path", ["torch", "triton"])
def test_tensors_do_not_touch_what_lies_beside_them(path, kernel_path):
    """Views at odd addresses into one buffer, of odd sizes, in one call with an aligned tensor."""
    sizes = [5, 255, 1, 600, 2048]
    apart = Parameters(draw([(n,) for n in sizes]), "bf16 residual", "int8")
    packed = Parameters(draw([(n,) for n in sizes]), "bf16 residual", "int8")
    buffers = []
    for name in ("weights", "residuals", "exp_avgs", "exp_avg_sqs"):
        tensors = getattr(packed, name)
        guarded = torch.full((sum(sizes) + len(sizes) + 1,), 42, dtype=torch.int16).to(tensors[0].dtype)
        place, views = 1, []
        for t in tensors:
            views.append(guarded[place : place + t.numel()].copy_(t))
            place += t.numel() + 1
        setattr(packed, name, views)
        buffers.append((guarded, views))
    with kernel_path(path):
        for step in range(2):
            grads = gradients([(n,) for n in sizes], step, torch.bfloat16)
            apart.step(grads)
            packed.step(grads)
    assert identical(apart, packed)
    for guarded, views in buffers:
        for view in views:
            view.fill_(42)
        assert (guarded == 42).all()


def test_all_tensors_of_a_group_go_in_one_launch(triton_path, monkeypatch):
    shapes = [(16 * (i + 1),) for i in range(12)]
    together, alone = Parameters(draw(shapes), "bf16", "int8"), Parameters(draw(shapes), "bf16", "int8")
    grids, launch = [], module._adamw_kernel

    class Counted:
        def __getitem__(self, grid):
            grids.append(grid)
            return launch[grid]

    monkeypatch.setattr(module, "_adamw_kernel", Counted())
    grads = gradients(shapes, 0, torch.bfloat16)
    together.step(grads)
    assert grids == [(12,)]
    for i in range(12):  # the same bits, however parameters are shared out over launches
        lists = (alone.weights, grads, alone.exp_avgs, alone.exp_avg_sqs, alone.steps)
        adamw(*([x[i]] for x in lists), **SETTINGS, exponents=[alone.exponents[i]], keys=[i])
    assert identical(together, alone)


def test_offsets_past_two_to_the_31(triton_path, monkeypatch):
    """A tensor that begins 2^33 elements before the memory that is there, its first 2^23 programs left out."""
    here, far = (Parameters(draw([(5000,)]), "bf16 residual", "int8") for _ in range(2))
    skipped, widths = 1 << 23, {0: 2, 1: 2, 2: 1, 3: 1, 5: 2}
    launch, elements = module._adamw_kernel, skipped * module.ODD_TILE["ROWS"] * BLOCK

    class Shifted:
        def __getitem__(self, grid):
            def run(tensor_of_program, table, *args, **options):
                table = table.clone()
                for column, width in widths.items():
                    table[:, column] -= elements * width
                table[:, 6] -= elements // BLOCK
                table[:, 7] += elements
                table[:, 8] -= skipped
                launch[grid](tensor_of_program, table, *args, **options)

            return run

    grads = gradients([(5000,)], 0, torch.bfloat16)
    here.step(grads)
    monkeypatch.setattr(module, "_adamw_kernel", Shifted())
    far.step(grads)
    assert elements == 1 << 33
    assert torch.allclose(here.masters()[0], far.masters()[0], atol=0, rtol=1e-6)
    assert not torch.equal(here.exp_avgs[0], far.exp_avgs[0])  # other elements, other random bits
    for (m, v), (n, w) in zip(here.moments(), far.moments()):
        assert ((v - w).abs() <= v / 7).all() and ((m - n).abs() <= 0.04 * v.sqrt()).all()


@pytest.mark.parametrize("moments", ["bf16", "int8"])
def test_moments_decay_where_there_is_no_gradient(moments):
    """0.999 v rounded to nearest is v again, in 16 bits and in 8: such a moment would never decay."""
    betas, steps = (0.9, 0.999), 1000
    parameters = Parameters([torch.zeros(8192)], "fp32", moments)
    parameters.step([torch.linspace(1, 2, 8192)], betas=betas)
    (_, start), zero = parameters.moments(betas)[0], [torch.zeros(8192)]
    for _ in range(steps):
        parameters.step(zero, betas=betas)
    m, v = parameters.moments(betas)[0]
    assert (v / start).mean() == pytest.approx(betas[1] ** steps, rel=0.03)
    assert m.abs().max() == 0 if moments == "int8" else m.abs().max() < 1e-30


@pytest.mark.parametrize("weights", ["bf16", "fp16"])
def test_small_updates_are_not_lost(weights):
    """A step of a thousandth of a weight's last place moves the mean of many weights all the same."""
    masters = [torch.full((1 << 16,), 1.0)]
    settings = {"lr": 4e-6 if weights == "bf16" else 5e-7, "weight_decay": 0.0}
    stochastic, fp32 = Parameters(masters, weights), Parameters(masters)
    for _ in range(20):
        for p in (stochastic, fp32):
            p.step([torch.ones(1 << 16, dtype=p.weights[0].dtype)], **settings)
    moved = (1 - fp32.weights[0].double()).mean().item()
    assert (1 - stochastic.weights[0].double()).mean().item() == pytest.approx(moved, rel=0.1)


def test_a_block_whose_second_moments_are_tiny():
    """Gradients of 1e-18, with squares near fp32's smallest normal number, and gradients of 1 in the next block."""
    fp32, compact = (Parameters([torch.zeros(2, BLOCK)], "fp32", moments) for moments in ("fp32", "int8"))
    for _ in range(20):
        grads = [torch.stack([torch.full((BLOCK,), 1e-18), torch.ones(BLOCK)])]
        for p in (fp32, compact):
            p.step(grads, eps=1e-30, weight_decay=0.0)
    assert torch.allclose(compact.weights[0], fp32.weights[0], rtol=0.1)


def test_small_elements_beside_large_ones():
    """Two gradients in a block are 1e-4 and 1e-6 of the others: their second moments are far below linear steps.

    The first is within the code's 32 octaves and trains as in fp32; the second is below, and trains slower, not wilder.
    """
    lr, scale = SETTINGS["lr"], torch.ones(BLOCK)
    scale[7], scale[8] = 1e-4, 1e-6
    fp32, compact = (Parameters([torch.zeros(BLOCK)], "fp32", moments) for moments in ("fp32", "int8"))
    for step in range(200):
        before = compact.weights[0].clone()
        grads = [draw([(BLOCK,)], step, 1.0)[0] * scale]
        for p in (fp32, compact):
            p.step(grads, weight_decay=0.0)
        moved = (compact.weights[0] - before).abs()
        assert moved.max() < 3 * lr and (step == 0 or moved[8] < 0.2 * lr)
    apart = (compact.weights[0] - fp32.weights[0]).abs()
    apart[8] = 0
    assert apart[7] < 3 * lr and apart.mean() < lr


def test_rarely_touched_rows():
    """Rows of an embedding narrower than a block, touched every step, now and then, and once, share blocks."""
    rows, width, steps = 16, 48, 240
    masters = draw([(rows, width)])
    fp32, compact = (Parameters(masters, "fp32", moments) for moments in ("fp32", "int8"))
    every = [1, steps, 40, 10**9] * (rows // 4)
    for step in range(steps):
        grad = draw([(rows, width)], step, 1.0)[0]
        for row, period in enumerate(every):
            if step % period != period // 2 and period > 1:
                grad[row] = 0
        before = compact.weights[0].clone()
        for p in (fp32, compact):
            p.step([grad], weight_decay=0.0)
        assert (compact.weights[0] - before).abs().max() < 2.5 * SETTINGS["lr"]
    untouched = [row for row, period in enumerate(every) if period == 10**9]
    assert torch.equal(compact.weights[0][untouched], masters[0][untouched])
    for period in (steps, 40):
        some = [row for row, p in enumerate(every) if p == period]
        moved = (fp32.weights[0] - masters[0])[some].abs().mean()
        difference = (compact.weights[0] - fp32.weights[0])[some]
        assert difference.abs().mean() < 0.12 * moved
        assert difference.mean().abs() < 0.02 * moved  # and to no side


@pytest.mark.parametrize("path", ["torch", "triton"])
def test_tensors_that_are_not_contiguous(path, kernel_path):
    parameters, grads = Parameters(draw([(8, 6)])), gradients([(6, 8)], 0)
    transposed = Parameters(draw([(8, 6)]))
    with kernel_path(path):
        parameters.step([grads[0].t().contiguous()])
        transposed.step([grads[0].t()])
        assert identical(parameters, transposed)
        transposed.weights = [transposed.weights[0].t()]
        with pytest.raises(ValueError, match="contiguous"):
            transposed.step(grads)


@pytest.mark.gpu
@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_on_a_gpu(weights, moments):
    """The kernel, compiled, against the PyTorch path on the same device: large, unaligned and skipped."""
    shapes, results = [(1024, 3000), (50304,), (777,), (1 << 20,)], []
    drawn = [[g.cuda() for g in gradients(shapes, step, DTYPES[weights.split()[0]])] for step in range(6)]
    for path in ("torch", "triton"):
        parameters = Parameters([m.cuda() for m in draw(shapes)], weights, moments)
        with dispatch.use_backend(path):
            for step in range(6):
                skipped = torch.tensor(float(step == 3), device="cuda")
                parameters.step(drawn[step], grad_scale=torch.tensor(0.5, device="cuda"), found_inf=skipped)
        results.append(parameters)
    a, b = results
    assert a.steps == b.steps and a.steps[0] == 5
    last_place = {"fp32": 1e-6, "bf16": 2**-7, "fp16": 2**-9}["fp32" if a.residuals else weights]
    for x, y in zip(a.masters(), b.masters()):
        # Where a rounding falls the other way, once or more, the weight is a step or two apart.
        far = (x - y).abs() > last_place * x.abs() + 1e-7
        assert far.float().mean() < 1e-2 and torch.allclose(x, y, rtol=4 * last_place, atol=SETTINGS["lr"])
    for (m, v), (n, w) in zip(a.moments(), b.moments()):
        assert ((v - w).abs() > 1e-5 * v).float().mean() < 1e-2
        assert ((m - n).abs() > 1e-4 * m.abs() + 1e-7).float().mean() < 2e-2
