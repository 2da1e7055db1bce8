"""Recomputation on a real card, where copies race with the computation. Run with `pytest -m gpu`."""

import gc

import pytest
import torch

from engine.config import ModelConfig
from engine.footprint import METHODS, Recompute, predict
from engine.model import GPT
from engine.strategy.activations import recompute_blocks
from kernels import dispatch
from tests.engine.conftest import draw_weights

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
ROWS, LENGTH, WIDTH = 16, 512, 512


def shape(n_layer: int) -> ModelConfig:
    return ModelConfig(n_layer=n_layer, n_head=8, n_embd=WIDTH, block_size=LENGTH, vocab_size=4096, positions="rotary")


def trained(kind: str, n_layer: int, steps: int = 4) -> tuple[list[torch.Tensor], int]:
    """The losses and the last gradients of some steps, launched without waiting, and the most bytes held."""
    dtype = getattr(torch, dispatch.chip(DEVICE).dtype)
    with DEVICE:
        model = GPT(shape(n_layer), dtype).to(dtype)
        tokens = torch.randint(4096, (ROWS, LENGTH), generator=torch.Generator(DEVICE).manual_seed(1))
    recompute_blocks(draw_weights(model), kind, n_layer)
    torch.cuda.reset_peak_memory_stats()
    losses = []
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = None
        for n in range(2):  # micro-batches: the second's inputs go into the buffers that the first's come back from
            losses.append(model(tokens.roll(n, 1), tokens))
            losses[-1].backward()
        with torch.no_grad():
            torch._foreach_add_(list(model.parameters()), [p.grad for p in model.parameters()], alpha=-0.1)
    return [loss.detach() for loss in losses] + [p.grad for p in model.parameters()], torch.cuda.max_memory_allocated()


@pytest.mark.parametrize("kind", ["blocks", "selective", "offloaded"])
def test_steps_are_those_without_recomputation(kind):
    plain, made = trained("none", 12)[0], trained(kind, 12)[0]
    torch.testing.assert_close(made, plain, rtol=2e-2, atol=1e-4)
    again = trained(kind, 12)[0]  # a race would not come out the same twice
    torch.testing.assert_close(again[:8], made[:8], rtol=1e-3, atol=0)


@pytest.mark.parametrize("kind", ["none", "blocks", "selective", "offloaded"])
def test_the_card_holds_what_is_planned_and_offloaded_inputs_are_not_there(kind):
    method = next(m for m in METHODS if m.name == "stochastic")
    chip = dispatch.chip(DEVICE)
    dtype = {"bfloat16": "bf16", "float16": "fp16"}.get(chip.dtype)
    if dtype is None:
        pytest.skip(f"{chip.name} trains in fp32")
    for n_layer in (4, 16):
        gc.collect()  # the model before: its blocks' new forward functions hold the blocks
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        recompute = Recompute(kind, n_layer) if kind != "none" else Recompute()
        made = predict(shape(n_layer), method, dtype=dtype, micro_batch_size=ROWS, recompute=recompute, chip=chip)
        planned = made.allocated_bytes - made.card["optimizer_states"]
        assert trained(kind, n_layer, 2)[1] - before == pytest.approx(planned, rel=0.10), (n_layer, made.phase)
