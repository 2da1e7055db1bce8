"""The optimizer: equal to PyTorch's in fp32, its compact states close to it, resumed bit for bit."""

import copy

import pytest
import torch
import torch.nn as nn
from torch import Tensor

from engine.config import ModelConfig
from engine.model import GPT
from engine.optimizer import AdamW, InBackwardAdamW, clip_coefficient, parameter_groups
from tests.engine.conftest import draw_weights, state_bytes

FORMATS = [
    {"weights": "residual", "moments": "fp32"},
    {"weights": "residual", "moments": "int8"},
    {"weights": "residual", "moments": "int8", "dtype": torch.float16},
    {"weights": "stochastic", "moments": "bf16"},
    {"weights": "stochastic", "moments": "int8"},
    {"weights": "fp32", "moments": "int8"},
]
NAMES = ["-".join(str(v).removeprefix("torch.") for v in f.values()) for f in FORMATS]


def tiny_gpt(seed: int = 0, **changes) -> GPT:
    """2 layers of 48, no multiple of 64, so that blocks of the 8-bit moments cross rows. Computes in fp32."""
    config = ModelConfig(**(dict(n_layer=2, n_head=4, n_embd=48, block_size=32, vocab_size=80) | changes))
    return draw_weights(GPT(config, dtype=torch.float32), seed)


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences that count upwards by a stride of their own, with rare tokens at the end of the alphabet."""
    generator = torch.Generator().manual_seed(step)
    start, stride = torch.randint(0, 60, (8, 1), generator=generator), torch.randint(1, 4, (8, 1), generator=generator)
    tokens = (start + stride * torch.arange(33)) % 64
    tokens[0, ::7] = 64 + step % 16
    return tokens[:, :-1], tokens[:, 1:]


def train(model: GPT, optimizer: AdamW, first: int, last: int, lr: float = 3e-3) -> list[float]:
    losses = []
    for step in range(first, last):
        loss = model(*batch(step))
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 20)
        norm, coefficient = clip_coefficient(model.parameters(), 1.0)
        optimizer.step(grad_scale=coefficient, found_inf=(~norm.isfinite()).float())
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def build(model_seed: int = 0, cls: type = AdamW, **options) -> tuple[GPT, AdamW]:
    model = tiny_gpt(model_seed)
    return model, cls(parameter_groups(model, 0.1), **options)


def everything(model: nn.Module, optimizer: AdamW) -> list[torch.Tensor]:
    states = [optimizer.state[p][key] for p in model.parameters() for key in sorted(optimizer.state[p])]
    return [*model.parameters(), *states]


def assert_identical(a, b):
    for x, y in zip(everything(*a), everything(*b), strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y)


def test_groups_decay_matrices_once():
    model = tiny_gpt(tie_head=True)
    decay, no_decay = parameter_groups(model, 0.1)
    assert decay["weight_decay"] == 0.1 and no_decay["weight_decay"] == 0.0
    assert all(p.dim() == 2 for p in decay["params"]) and all(p.dim() == 1 for p in no_decay["params"])
    assert len(decay["params"]) + len(no_decay["params"]) == len(list(model.parameters()))
    assert sum(p is model.lm_head.weight for p in decay["params"]) == 1
    model.transformer["wte"].weight.requires_grad_(False)
    assert len(parameter_groups(model, 0.1)[0]["params"]) == len(decay["params"]) - 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clipping_is_pytorchs(dtype):
    torch.manual_seed(0)
    parameters, reference = [], []
    for shape in [(300, 7), (5,), (4, 4)]:
        grad = torch.randn(shape).to(dtype)
        for some, kind in ((parameters, dtype), (reference, torch.float32)):
            some.append(nn.Parameter(torch.zeros(shape, dtype=kind)))
            some[-1].grad = grad.to(kind)
    parameters.append(nn.Parameter(torch.zeros(3)))  # without a gradient
    norm, coefficient = clip_coefficient(parameters, 1.0)
    expected = torch.nn.utils.clip_grad_norm_(reference, 1.0).item()
    assert norm.dtype == coefficient.dtype == torch.float32
    assert norm.item() == pytest.approx(expected, rel=1e-6)  # in fp32, whatever the gradients are
    assert coefficient.item() == pytest.approx(1 / expected, rel=1e-5)
    assert clip_coefficient(parameters, 1e9)[1] == 1 and clip_coefficient(parameters, float("inf"))[1] == 1


def test_fp32_is_pytorchs_adamw():
    model, optimizer = build()
    theirs = tiny_gpt()
    reference = torch.optim.AdamW(parameter_groups(theirs, 0.1), betas=(0.9, 0.95))
    losses = train(model, optimizer, 0, 50)
    for step in range(50):
        for group in reference.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 20)
        loss = theirs(*batch(step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        reference.step()
        reference.zero_grad()
        assert loss.item() == pytest.approx(losses[step], abs=1e-4)
    # Where gradients are near 0 Adam turns differences of a last place into whole steps, so not every weight is equal.
    apart = torch.cat([(p - q).abs().flatten() for p, q in zip(model.parameters(), theirs.parameters())])
    assert apart.median() < 1e-6


def masters(optimizer: AdamW) -> list[tuple[nn.Parameter, Tensor]]:
    """Every parameter with its fp32 weights."""
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    return [(p, optimizer.export_state(p)["weight"]) for p in parameters]


def test_what_is_converted():
    model, optimizer = build(weights="residual", moments="int8")
    before = dict(tiny_gpt().named_parameters())
    for name, p in model.named_parameters():
        assert p.dtype == (torch.bfloat16 if p.dim() == 2 else torch.float32)
        assert (p.float() - before[name]).abs().max() <= before[name].abs().max() / 256
    for p, master in masters(optimizer):
        name = next(n for n, q in model.named_parameters() if q is p)
        assert torch.equal(master, before[name]) and master.dtype == torch.float32
    assert model.lm_head.weight is model.transformer["wte"].weight
    train(model, optimizer, 0, 1)
    for p in model.parameters():
        assert optimizer.state[p]["exp_avg"].dtype == (torch.int8 if p.dim() == 2 else torch.float32)


def test_a_model_that_is_in_16_bits_already():
    model = tiny_gpt()
    groups = parameter_groups(model, 0.1)
    for p in groups[0]["params"]:
        p.data = p.data.bfloat16()
    optimizer = AdamW(groups, weights="residual")
    assert all(torch.equal(master, p.float()) for p, master in masters(optimizer))
    losses = train(model, optimizer, 0, 40)
    assert losses[-1] < losses[0] - 1


def test_bytes_of_a_model_that_does_not_exist():
    """8 bytes a parameter with bf16 gradients, 6 with stochastic rounding: what makes 2b fit 24 and 16 GB."""
    with torch.device("meta"):
        model = GPT(ModelConfig(n_layer=2, n_head=20, n_embd=2560, block_size=64, positions="rotary"))
    n = model.num_parameters()
    for weights, expected in (("residual", 6), ("stochastic", 4), ("fp32", 6)):
        total = sum(state_bytes(model.parameters(), weights, "int8").values())
        assert total / n == pytest.approx(expected, abs=0.03)


def test_residual_training_is_fp32_training():
    """The same gradients give the same masters bit for bit; the model sees them rounded to bf16."""
    model, optimizer = build(weights="residual", moments="int8")
    twin = copy.deepcopy(model).float()
    for p, (_, master) in zip(sorted_like(optimizer, model, twin), masters(optimizer)):
        p.data = master.clone()
    fp32 = AdamW(parameter_groups(twin, 0.1), moments="int8")
    for step in range(30):
        model(*batch(step)).backward()
        for p, q in zip(model.parameters(), twin.parameters()):
            q.grad = p.grad.float()
        for o in (optimizer, fp32):
            o.step()
        optimizer.zero_grad()
    for (p, master), q in zip(masters(optimizer), sorted_like(optimizer, model, twin)):
        assert torch.equal(master, q) and (p.dim() < 2 or not torch.equal(p.float(), q))


def sorted_like(optimizer: AdamW, model: GPT, twin: GPT) -> list[nn.Parameter]:
    """twin's parameters in the order in which the optimizer has model's."""
    names = {p: name for name, p in model.named_parameters()}
    others = dict(twin.named_parameters())
    return [others[names[p]] for p, _ in masters(optimizer)]


@pytest.mark.parametrize("formats", [{"weights": "fp32", "moments": "fp32"}, *FORMATS], ids=["fp32", *NAMES])
def test_resumed_training_is_uninterrupted_training(formats):
    """Bit for bit, through whole fp32 tensors."""
    whole = build(**formats, seed=3)
    train(*whole, 0, 12)
    first = build(**formats, seed=3)
    train(*first, 0, 6)
    second = build(1, **formats, seed=3)
    for p, q in zip(first[0].parameters(), second[0].parameters()):
        exported = first[1].export_state(p)
        assert all(t.dtype == torch.float32 and t.shape == p.shape for t in exported.values())
        second[1].import_state(q, **exported, step=6)
    train(*second, 6, 12)
    for (_, a), (_, b) in zip(masters(whole[1]), masters(second[1])):
        assert torch.equal(a, b)
    for p, q in zip(whole[0].parameters(), second[0].parameters()):
        for key, value in whole[1].export_state(p).items():
            assert torch.equal(value, second[1].export_state(q)[key])


def test_state_moves_between_formats():
    """A run goes on in other formats from where it was, within their rounding."""
    source = build()
    train(*source, 0, 30)
    targets = [build(1, **formats) for formats in FORMATS]
    for target in targets:
        for p, q in zip(source[0].parameters(), target[0].parameters()):
            target[1].import_state(q, **source[1].export_state(p), step=30)
    expected = train(*source, 30, 40)
    for target in targets:
        assert train(*target, 30, 40) == pytest.approx(expected, abs=0.08)


def test_pytorchs_way_of_loading_a_state_is_refused():
    """It would cast 8-bit moments to the dtype of the weights."""
    with pytest.raises(NotImplementedError, match="import_state"):
        build()[1].load_state_dict(build()[1].state_dict())


def test_seeds_change_what_is_random():
    def after(seed):
        model, optimizer = build(weights="stochastic", moments="int8", seed=seed)
        train(model, optimizer, 0, 3)
        return torch.cat([p.detach().float().flatten() for p in model.parameters()])

    assert torch.equal(after(1), after(1)) and not torch.equal(after(1), after(2))


@pytest.mark.parametrize("formats", FORMATS, ids=NAMES)
def test_convex_problem(formats):
    """Least squares of condition number 100, 300 steps with noise: the distance to the optimum is fp32's within 20%."""
    torch.manual_seed(0)
    curvature = torch.logspace(-2, 0, 64)[:, None].expand(64, 50)
    target = torch.randn(64, 50)

    def distance(**options) -> float:
        weight = nn.Parameter(torch.zeros(64, 50))
        optimizer = AdamW([weight], **options)
        generator = torch.Generator().manual_seed(1)
        for step in range(300):
            noise = 0.1 * torch.randn(64, 50, generator=generator)
            weight.grad = (curvature * (weight.detach().float() - target) + noise).to(weight.dtype)
            optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 300)
            optimizer.step()
        ((_, master),) = masters(optimizer)
        return (curvature * (master - target) ** 2).sum().item()

    assert distance(**formats) == pytest.approx(distance(), rel=0.2)


@pytest.fixture(scope="module")
def fp32_losses():
    return train(*build(), 0, 150)


@pytest.mark.parametrize("formats", FORMATS, ids=NAMES)
def test_tiny_gpt_learns_as_in_fp32(formats, fp32_losses):
    """The mean loss of the last 30 of 150 steps is fp32's within 3%."""
    losses = train(*build(**formats), 0, 150)
    ours, theirs = sum(losses[-30:]) / 30, sum(fp32_losses[-30:]) / 30
    assert theirs < 0.5 * fp32_losses[0]
    assert ours == pytest.approx(theirs, rel=0.03)


@pytest.mark.parametrize("formats", [{}, *FORMATS[1:2], *FORMATS[4:5]], ids=["fp32", NAMES[1], NAMES[4]])
def test_updates_inside_the_backward_pass(formats):
    """The same bits as updates after it, when nothing is clipped, and no gradient outlives its update."""
    after, inside = build(**formats), build(cls=InBackwardAdamW, **formats)
    for step in range(5):
        after[0](*batch(step)).backward()
        norm, _ = clip_coefficient(after[0].parameters(), 1.0)
        after[1].step()
        after[1].zero_grad()
        inside[0](*batch(step)).backward()
        assert all(p.grad is None for p in inside[0].parameters())
        assert inside[1].step() == pytest.approx(norm.item(), rel=1e-6)
    assert_identical(after, inside)


@pytest.mark.gpu
@pytest.mark.parametrize("formats", [{}, *FORMATS], ids=["fp32", *NAMES])
def test_on_a_gpu_updates_inside_the_backward_pass_are_those_after_it(formats):
    """Launched from autograd's own thread, while later gradients are computed by weights that must not change yet."""

    def trained(cls: type) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(12))).cuda()
        optimizer = cls(parameter_groups(model, 0.1), lr=1e-3, **formats)
        for step in range(6):
            x = torch.randn(256, 512, device="cuda", generator=torch.Generator("cuda").manual_seed(step))
            for layer in model:
                x = torch.nn.functional.gelu(torch.nn.functional.linear(x, layer.weight.float(), layer.bias))
            x.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach().cpu() for p in model.parameters()]

    for p, q in zip(trained(AdamW), trained(InBackwardAdamW)):
        assert torch.equal(p, q)


def test_updates_inside_the_backward_pass_are_scaled_and_skipped():
    after, inside = build(), build(cls=InBackwardAdamW)
    after[0](*batch(0)).backward()
    after[1].step()
    inside[1].grad_scale = torch.tensor(1 / 1024)
    (inside[0](*batch(0)) * 1024).backward()
    inside[1].step()
    for a, b in zip(after[0].parameters(), inside[0].parameters()):
        assert torch.allclose(a, b, atol=1e-6)
    before = copy.deepcopy(list(inside[0].parameters()))
    (inside[0](*batch(1)) * float("nan")).backward()
    assert not inside[1].step().isfinite()
    assert all(torch.equal(p, q) for p, q in zip(before, inside[0].parameters()))


def test_updates_inside_the_backward_pass_refuse_what_they_cannot_do():
    model, optimizer = build(cls=InBackwardAdamW)
    with pytest.raises(ValueError, match="inside the backward pass"):
        optimizer.step(grad_scale=torch.tensor(1.0))
    model(*batch(0)).backward()
    with pytest.raises(RuntimeError, match="second backward pass"):
        model(*batch(1)).backward()
