"""The head with its loss against fp64: values, gradients, chunks, memory, what autograd and the compiler make of it."""

import importlib
import weakref
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from kernels import linear_cross_entropy

module = importlib.import_module("kernels.cross_entropy")
gpu = importlib.import_module("kernels.cross_entropy_gpu")

# "torch on gpu" is what cards without Triton run: the chunks of a GPU, PyTorch's operations.
PATHS = ["torch", "torch on gpu", "triton"]
DTYPES = [torch.float32, torch.float16]


@pytest.fixture
def path_of(kernel_path, monkeypatch):
    def enter(path):
        if path == "torch on gpu":
            monkeypatch.setattr(module, "_on_cpu", module.losses_and_gradients)
        return kernel_path("triton" if path == "triton" else "torch")

    return enter


@pytest.fixture
def small_chunks(monkeypatch):
    """Memory limits so small that every loop of every path runs several times, the last time on a rest."""
    monkeypatch.setattr(module, "CPU_LOGITS_BYTES", 4 * 300 * 9)
    monkeypatch.setattr(gpu, "LOGITS_BYTES", 2 * 300 * 20)
    monkeypatch.setattr(gpu, "WORKSPACE_BYTES", 4 * 40 * 50)
    monkeypatch.setattr(gpu, "SLAB_BYTES", 4 * 40 * 33)


def plain(x, weight, targets, bias, z_loss, reduction):
    logits = F.linear(x, weight, bias)
    losses = F.cross_entropy(logits, targets, reduction="none")
    losses = losses + z_loss * (targets != -100) * logits.logsumexp(1).square()
    if reduction == "none":
        return losses
    return losses.sum() / (1 if reduction == "sum" else (targets != -100).sum())


def problem(n, width, vocab, dtype, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, width + 3, generator=generator).to(dtype)[:, :width]
    weight = (0.3 * torch.randn(vocab, width, generator=generator)).to(dtype)
    tensors = [x, weight] + ([torch.randn(vocab, generator=generator).to(dtype)] if bias else [])
    targets = torch.randint(0, vocab, (n,), generator=generator)
    targets[::5] = -100
    return [t.requires_grad_() for t in tensors], targets


def results(run, tensors, grad):
    loss = run(*tensors)
    return loss, *torch.autograd.grad(loss, tensors, grad.to(loss))


def check(context, tensors, targets, z_loss=0.0, reduction="mean"):
    """Errors at most 2 (loss) and 3 (gradients) times those of PyTorch's ops in the same precision."""
    grad = torch.randn(len(targets)) if reduction == "none" else torch.tensor(0.375)

    def ours(x, weight, bias=None):
        return linear_cross_entropy(x, weight, targets, bias=bias, z_loss=z_loss, reduction=reduction)

    def own(x, weight, bias=None):
        return plain(x, weight, targets, bias, z_loss, reduction)

    with context:
        mine = results(ours, tensors, grad)
    exact = results(own, [t.detach().double().requires_grad_() for t in tensors], grad)
    theirs = results(own, tensors, grad)
    assert mine[0].dtype == torch.float32
    for i, (a, b, e) in enumerate(zip(mine, theirs, exact, strict=True)):
        assert a.shape == e.shape and (i == 0 or a.dtype == tensors[i - 1].dtype)
        slack = {torch.float32: 1e-6, torch.float16: 3e-4, torch.bfloat16: 3e-3}[tensors[0].dtype]
        # A single loss may come out right by luck, so it is also held against the logits' size, which is about 1.
        slack *= e.abs().max() if i else e.abs().max() + 1
        assert (a - e).abs().max() <= (3 if i else 2) * (b - e).abs().max() + slack, f"result {i}"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("z_loss, bias", [(0.0, False), (1e-2, True)])
def test_in_chunks(path, dtype, reduction, z_loss, bias, path_of, small_chunks):
    check(path_of(path), *problem(67, 40, 300, dtype, bias), z_loss, reduction)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n, width, vocab", [(1, 40, 111), (2, 59, 300), (9, 8, 5), (17, 40, 4096), (19, 111, 5001)])
def test_sizes(path, dtype, n, width, vocab, path_of):
    tensors, targets = problem(n, width, vocab, dtype)
    targets[0] = vocab - 1
    check(path_of(path), tensors, targets)


@pytest.mark.parametrize("path", PATHS)
def test_targets_that_lie_apart(path, path_of):
    tensors, targets = problem(9, 8, 50, torch.float32)
    check(path_of(path), tensors, torch.stack((targets, torch.zeros_like(targets)), 1)[:, 0])


@pytest.mark.parametrize("path", ["torch", "torch on gpu"])
def test_bfloat16_sums_in_fp32(path, path_of, small_chunks):
    """67 tokens are 4 chunks on a GPU, of which the gradient in bf16 must not be the running sum."""
    check(path_of(path), *problem(67, 40, 300, torch.bfloat16), 1e-3)


@pytest.mark.parametrize("path", PATHS)
def test_large_logits(path, path_of):
    """The target's probability underflows, the loss does not."""
    tensors, targets = problem(23, 40, 300, torch.float32)
    tensors[1] = (tensors[1].detach() * 200).requires_grad_()
    check(path_of(path), tensors, targets)


@pytest.mark.parametrize("path", PATHS)
def test_fp16_gradients_of_a_mean_survive_until_the_loss_scale(path, path_of):
    (x, weight), targets = problem(512, 4, 6000, torch.float16, bias=False)
    weight = (weight.detach() * 6).requires_grad_()  # most words are improbable
    with path_of(path):
        loss = linear_cross_entropy(x, weight, targets)
        grad_x, grad_weight = torch.autograd.grad(loss * 4096.0, (x, weight))
    exact_x, exact_weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    exact = torch.autograd.grad(4096 * plain(exact_x, exact_weight, targets, None, 0, "mean"), (exact_x, exact_weight))
    for ours, e in zip((grad_x, grad_weight), exact, strict=True):
        assert (ours - e).abs().max() < 2e-3 * e.abs().max()
        rare = e.abs() < e.abs().median()
        assert (ours - e)[rare].norm() < 2e-2 * e[rare].norm()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_nothing_to_learn(path, reduction, path_of):
    (x, weight, bias), targets = problem(6, 8, 40, torch.float32)
    for rows in (6, 0):
        with path_of(path):
            ignored = targets[:rows].fill_(7)
            loss = linear_cross_entropy(x[:rows], weight, ignored, bias=bias, ignore_index=7, reduction=reduction)
            grads = torch.autograd.grad(loss, (x, weight, bias))
        assert loss == 0 and all((g == 0).all() for g in grads)


def test_targets_outside_the_vocabulary(kernel_path):
    (x, weight), targets = problem(6, 8, 40, torch.float32, bias=False)
    targets[2] = 40
    with kernel_path("torch"), pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        linear_cross_entropy(x, weight, targets)
    with kernel_path("triton"), torch.no_grad():
        losses = linear_cross_entropy(x, weight, targets, reduction="none")
    assert losses.isnan().tolist() == [False, False, True, False, False, False]


def test_refuses_an_unknown_reduction():
    (x, weight), targets = problem(6, 8, 40, torch.float32, bias=False)
    with pytest.raises(ValueError, match="'average'"):
        linear_cross_entropy(x, weight, targets, reduction="average")


@pytest.mark.parametrize("path", PATHS)
def test_makes_only_the_gradients_that_are_wanted(path, path_of, monkeypatch):
    (x, weight, bias), targets = problem(12, 8, 40, torch.float32)
    asked = []
    for name in ("_on_cpu", "losses_and_gradients"):

        def spy(*args, real=getattr(module, name)):
            asked.append(args[7])
            return real(*args)

        monkeypatch.setattr(module, name, spy)
    if path == "torch on gpu":
        monkeypatch.setattr(module, "_on_cpu", module.losses_and_gradients)
    with path_of("triton" if path == "triton" else "torch"):
        with torch.no_grad():
            linear_cross_entropy(x, weight, targets, bias=bias)
        linear_cross_entropy(x, weight, targets, bias=bias, reduction="none")
        frozen = linear_cross_entropy(x, weight.detach(), targets, bias=bias)
        grads = torch.autograd.grad(frozen, (x, bias))
    expected = torch.autograd.grad(plain(x, weight, targets, bias, 0, "mean"), (x, bias))
    assert asked == [[False] * 3, [False] * 3, [True, False, True]]
    torch.testing.assert_close(grads, expected)


@pytest.mark.parametrize("path", PATHS)
def test_backward_twice_checkpoint_and_tied_weights(path, path_of):
    """A graph kept for another pass gives the same again; an embedding tied to the head gets the sum of both."""
    (_, weight), targets = problem(22, 16, 300, torch.float32, bias=False)
    tokens = torch.randint(0, 300, (22,))

    def loss(run):
        return run(weight[tokens].tanh()) / 4

    def ours(x):
        return linear_cross_entropy(x, weight, targets)

    expected = torch.autograd.grad(loss(lambda x: plain(x, weight, targets, None, 0, "mean")), weight)
    with path_of(path):
        kept = loss(ours)
        for retain in (True, True, False):
            torch.testing.assert_close(torch.autograd.grad(kept, weight, retain_graph=retain), expected)
        again = checkpoint(loss, ours, use_reentrant=False)
        torch.testing.assert_close(torch.autograd.grad(again, weight), expected)


def test_gradients_are_scaled_with_one_rounding(kernel_path):
    """By a factor in fp32, which bf16 could not hold."""
    tensors, targets = problem(22, 16, 300, torch.bfloat16)
    with kernel_path("torch"):
        loss = linear_cross_entropy(tensors[0], tensors[1], targets, bias=tensors[2])
        once = torch.autograd.grad(loss, tensors, retain_graph=True)
        third = torch.autograd.grad(loss, tensors, torch.tensor(1 / 3))
    for a, b in zip(once, third, strict=True):
        assert torch.equal(b, (a.float() * torch.tensor(1 / 3)).bfloat16())


def test_refuses_second_derivatives():
    (x, weight), targets = problem(6, 8, 40, torch.float32, bias=False)
    for reduction in ("mean", "none"):
        loss = linear_cross_entropy(x, weight, targets, reduction=reduction).sum()
        with pytest.raises(RuntimeError, match="second derivative"):
            torch.autograd.grad(loss, x, create_graph=True)


@pytest.mark.parametrize("path", ["torch", "triton"])
def test_compiles_without_a_break(path, path_of):
    tensors, targets = problem(22, 16, 300, torch.float32)

    def run(x, weight, bias):
        loss = linear_cross_entropy(x.tanh(), weight, targets, bias=bias, z_loss=1e-3)
        return loss + linear_cross_entropy(x, weight, targets, bias=bias, reduction="none").square().mean()

    with path_of(path):
        eager = results(run, tensors, torch.tensor(0.5))
        compiled = results(torch.compile(run, fullgraph=True, backend="aot_eager"), tensors, torch.tensor(0.5))
    torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(reduction, kernel_path, monkeypatch):
    tensors, targets = problem(7, 5, 11, torch.float64)
    monkeypatch.setattr(module, "CPU_LOGITS_BYTES", 8 * 11 * 3)
    with kernel_path("torch"):

        def run(x, weight, bias):
            return linear_cross_entropy(x, weight, targets, bias=bias, z_loss=0.1, reduction=reduction)

        assert torch.autograd.gradcheck(run, tensors)


@pytest.mark.parametrize("path", ["torch", "triton"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_op_is_registered_right(path, reduction, path_of):
    (x, weight, bias), targets = problem(6, 8, 40, torch.float32)
    with path_of(path):
        needs = [reduction != "none"] * 3
        torch.library.opcheck(module._op, (x, weight, targets, bias, None, -100, 0.1, reduction, needs))


class PeakBytes(TorchDispatchMode):
    """The most bytes that tensors made within took at any time."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.seen = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self.seen:
                storage = tensor.untyped_storage()
                self.seen.add(storage)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, storage.nbytes())
        return out

    def _gone(self, size):
        self.now -= size


@pytest.mark.parametrize(
    "path, n, width",
    [("torch on gpu", 16384, 2560), ("triton", 16384, 2560), ("triton", 16384, 768), ("triton", 65536, 1600)],
)
def test_memory_on_a_gpu(path, n, width, path_of, monkeypatch):
    """Beyond the gradients, under 300 MB at V=50304 in bf16, counted on tensors without data."""
    monkeypatch.setattr(gpu, "turn_in_triton", lambda *_, **__: None)
    with path_of(path), FakeTensorMode(), PeakBytes() as memory:
        x, weight = (torch.empty(rows, width, dtype=torch.bfloat16) for rows in (n, 50304))
        targets, scale = torch.empty(n, dtype=torch.int64), torch.ones(())
        inputs = memory.now
        out = gpu.losses_and_gradients(x, weight, targets, None, scale, -100, 0.0, [True, True, False], (1.0, 1.0))
    gradients = 2 * width * (n + 50304)
    assert memory.now - inputs < gradients + 16 * n + 1000 and len(out) == 4
    assert 100e6 < memory.peak - inputs - gradients < 300e6


@pytest.mark.parametrize("width, share", [(768, 1), (1280, 1), (1600, 0.9), (2560, 0.76)])
def test_words_that_need_no_second_look(width, share):
    with FakeTensorMode():
        sums = gpu._WeightSums(torch.empty(50304, width, dtype=torch.bfloat16), gpu.WORKSPACE_BYTES)
    assert sums.summed / 50304 == pytest.approx(share, abs=0.02)


def test_memory_on_a_cpu(kernel_path, monkeypatch):
    """The logits of 400 tokens would take 80 MB; beyond the gradients a chunk is all that counts."""
    monkeypatch.setattr(module, "CPU_LOGITS_BYTES", 8 << 20)
    (x, weight), targets = problem(400, 8, 50304, torch.float32, bias=False)
    with kernel_path("torch"), PeakBytes() as memory:
        linear_cross_entropy(x, weight, targets).backward()
    assert weight.grad is not None and memory.peak < 1.1 * (8 << 20) + weight.nbytes + 3 * x.nbytes


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n, width, vocab", [(4096, 768, 50304), (4099, 1600, 50304), (3000, 768, 50257)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_on_a_gpu(dtype, n, width, vocab, reduction):
    tensors, targets = problem(n, width, vocab, dtype, bias=False)
    tensors = [t.detach().cuda().mul(0.1).requires_grad_() for t in tensors]
    check(nullcontext(), tensors, targets.cuda(), 1e-4, reduction)


@pytest.mark.gpu
def test_memory_on_this_gpu():
    """The promise of the file, measured: 16k tokens, 2560 wide, 50304 words in under 300 MB beyond the gradients."""
    shapes = (16384, 2560), (50304, 2560)
    x, weight = (torch.randn(s, device="cuda").bfloat16().mul_(0.02).requires_grad_() for s in shapes)
    targets = torch.randint(0, 50304, (16384,), device="cuda")
    linear_cross_entropy(x[:128], weight, targets[:128]).backward()  # what cuBLAS keeps is not ours
    x.grad = weight.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_cross_entropy(x, weight, targets).backward()
    assert torch.cuda.max_memory_allocated() - before - x.nbytes - weight.nbytes < 300e6
