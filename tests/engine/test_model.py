"""The GPT: its sizes, what may see what, the cache, the loss, dtypes."""

import math

import pytest
import torch
import torch.nn.functional as F

from engine.config import ModelConfig, from_dict, preset
from engine.data import document_starts
from engine.model import GPT, KVCache, flops_per_token, rotary_tables
from tests.engine.conftest import draw_weights

END = 50  # ends a document here


def small(**changes) -> GPT:
    config = dict(n_layer=2, n_head=4, n_embd=32, block_size=24, vocab_size=64)
    model = draw_weights(GPT(ModelConfig(**config | changes)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # biases start at 0 and would not be seen
        for parameter in model.parameters():
            parameter.add_(torch.empty_like(parameter).normal_(std=0.1, generator=generator))
    return model


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(END, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("13m", 13_142_656),
        ("gpt2", 124_475_904),  # 124,439,808 and 47 rows of padding
        ("gpt2-medium", 354_871_296),
        ("gpt2-large", 774_090_240),
        ("gpt2-xl", 1_557_686_400),
        ("2b", 2_017_018_880),
        ("3b", 3_429_684_352),
    ],
)
def test_presets_have_their_published_sizes(name, parameters):
    with torch.device("meta"):
        model = GPT(from_dict(preset(name)).model)
    assert model.num_parameters() == parameters


@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu", "relu"])
def test_a_token_sees_itself_and_the_earlier_ones(positions, activation):
    model, x = small(positions=positions, activation=activation), tokens(2, 20)
    changed = x.clone()
    changed[:, 12] = END
    difference = (model(x) - model(changed)).abs().amax(-1)
    assert (difference[:, :12] == 0).all()
    assert (difference[:, 12:] > 0).all()


def test_the_rotation_writes_into_no_view():
    """In place on one, autograd makes the gradient of its base: as much memory again, and four copies more a block."""
    loss = small(positions="rotary")(tokens(2, 20), tokens(2, 20, 1))
    names, seen, waiting = set(), set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            names.add(node.name())
            waiting += [following for following, _ in node.next_functions]
    assert any("Rotary" in name for name in names) and not any("CopySlices" in name for name in names)


def test_masked_documents_are_what_they_are_alone():
    model, lengths = small(positions="rotary"), (7, 1, 11)
    documents = [torch.cat([tokens(1, n - 1, seed=n), torch.tensor([[END]])], 1) for n in lengths]
    packed = torch.cat(documents, 1)
    starts = torch.from_numpy(document_starts(packed.numpy(), END))
    apart = torch.cat([model(document) for document in documents], 1)
    torch.testing.assert_close(model(packed, doc_start=starts), apart, atol=1e-5, rtol=1e-5)
    assert (model(packed) - apart)[:, 8:].abs().max() > 0.01


def test_masking_hides_the_documents_before_at_learned_positions_too():
    model, x = small(), tokens(1, 20)
    x[0, 9] = END
    other = x.clone()
    other[0, :9] = tokens(1, 9, seed=5)
    starts = torch.from_numpy(document_starts(x.numpy(), END))
    a, b = model(x, doc_start=starts), model(other, doc_start=starts)
    torch.testing.assert_close(a[:, 10:], b[:, 10:], atol=1e-6, rtol=0)
    assert (a - b)[:, :9].abs().max() > 0.01


@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("pieces", [(1,) * 12, (5, 1, 6), (12,), (4, 4, 4)])
def test_the_cache_changes_nothing(positions, pieces):
    model, x = small(positions=positions), tokens(3, 12)
    cache = KVCache.empty(model.config, 3, 12, torch.device("cpu"), torch.float32)
    whole, end = model(x), 0
    with torch.no_grad():
        for piece in pieces:
            logits = model(x[:, end : end + piece], cache=cache)
            end += piece
            assert logits.shape == (3, 1, 64) and cache.length == end
            torch.testing.assert_close(logits[:, 0], whole[:, end - 1], atol=1e-5, rtol=1e-5)


def test_more_tokens_than_the_context_are_refused():
    model = small()
    cache = KVCache.empty(model.config, 1, 24, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        model(tokens(1, 24), cache=cache)
        for call in (lambda: model(tokens(1, 25)), lambda: model(tokens(1, 1), cache=cache)):
            with pytest.raises(ValueError, match="25 tokens do not fit the context of 24"):
                call()


@pytest.mark.parametrize("tie_head, head_bias", [(True, False), (False, True)])
def test_the_loss_is_cross_entropy_of_the_logits(tie_head, head_bias):
    model, x, targets = small(tie_head=tie_head, head_bias=head_bias), tokens(2, 10), tokens(2, 10, seed=1)
    targets[0, 3:6] = -100
    logits = model(x).view(-1, 64)
    for reduction in ("mean", "sum", "none"):
        expected = F.cross_entropy(logits, targets.view(-1), reduction=reduction)
        torch.testing.assert_close(model(x, targets, reduction=reduction), expected, atol=1e-5, rtol=1e-5)
    expected = torch.autograd.grad(F.cross_entropy(logits, targets.view(-1)), list(model.parameters()))
    got = torch.autograd.grad(model(x, targets), list(model.parameters()))
    for name, a, b in zip(dict(model.named_parameters()), got, expected):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4, msg=name)


def test_z_loss_is_part_of_training_and_not_of_validation():
    model, x, targets = small(z_loss=0.1), tokens(2, 10), tokens(2, 10, seed=1)
    logits = model(x).view(-1, 64)
    plain = F.cross_entropy(logits, targets.view(-1))
    torch.testing.assert_close(model(x, targets), plain + 0.1 * logits.logsumexp(-1).square().mean())
    torch.testing.assert_close(model.eval()(x, targets), plain)


def test_sixteen_bit_activations_over_fp32_weights():
    model, x, targets = small(), tokens(2, 10), tokens(2, 10, seed=1)
    exact = model(x, targets)
    model.dtype = torch.bfloat16
    assert model(x).dtype == torch.bfloat16
    loss = model(x, targets)
    loss.backward()
    assert loss.dtype == torch.float32 and abs(loss - exact) < 0.02
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())


def test_a_tied_head_is_one_parameter_with_both_gradients():
    model, x, targets = small(), tokens(1, 10) % 8, tokens(1, 10, seed=1)
    assert model.lm_head.weight is model.transformer["wte"].weight
    model(x, targets).backward()
    grad = model.transformer["wte"].weight.grad
    assert grad[60].abs().sum() > 0  # never an input: from the head
    head = small(tie_head=False)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            parameter.copy_(dict(model.named_parameters(remove_duplicate=False))[name])
    head(x, targets).backward()
    torch.testing.assert_close(grad, head.lm_head.weight.grad + head.transformer["wte"].weight.grad)


def test_initial_weights():
    config = from_dict(preset("13m")).model
    config.n_layer = 8
    model = GPT.outline(config)
    drawn, again = (dict(model.initial_weights(torch.Generator().manual_seed(3))) for _ in range(2))
    assert {name: weight.shape for name, weight in drawn.items()} == {n: p.shape for n, p in model.named_parameters()}
    for name, weight in drawn.items():
        assert weight.dtype == torch.float32 and torch.equal(weight, again[name])
        if weight.dim() < 2:
            assert (weight == ("ln_" in name and name.endswith("weight"))).all(), name
        else:
            std = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02
            assert weight.std().item() == pytest.approx(std, rel=0.05), name
            assert abs(weight.mean().item()) < 0.05 * std, name


def test_rotary_scores_depend_on_the_distance_alone():
    cos, sin = (table.double() for table in rotary_tables(32, 8, torch.device("cpu")))
    q, k = torch.randn(2, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind(0)

    def turned(x, at):  # pairs (i, i + D/2), here the last dimension
        a, b = x.unbind(-1)
        return torch.stack([a * cos[at] - b * sin[at], b * cos[at] + a * sin[at]], -1)

    score = lambda i, j: (turned(q, i) * turned(k, j)).sum().item()
    assert score(5, 2) == pytest.approx(score(31, 28), abs=1e-5)
    assert score(5, 2) != pytest.approx(score(5, 3), abs=1e-3)
    assert cos[1, 0].item() == pytest.approx(math.cos(1)) and cos[1, 3].item() == pytest.approx(math.cos(10_000**-0.75))


def test_flops_count_what_multiplies():
    model = GPT(from_dict(preset("13m")).model)
    multiplied = 13_142_656 - 128 * 128 - 50_304 * 128  # without positions and the input embedding
    assert flops_per_token(model.config, model.num_parameters()) == 6 * multiplied + 12 * 128 * 128
