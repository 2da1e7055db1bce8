"""What the planner chooses for small cards is what runs: its settings build a strategy that trains."""

import pytest
import torch

from engine import device, placement
from engine.cards import GiB, get
from engine.command_line import parse
from engine.config import ModelConfig
from engine.data import Batch
from engine.device import DTYPES
from engine.distributed import Processes
from engine.memory import best_dtype, choose, plan
from engine.model import GPT
from engine.strategy import build

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SMALL = ModelConfig(n_layer=2, n_head=4, n_embd=64, block_size=32, vocab_size=128, positions="rotary")


@pytest.mark.parametrize("host_gib", [32, 64])
@pytest.mark.parametrize("name", ["t4", "gtx1080ti", "rtx3080"])
def test_the_chosen_settings_train_a_smaller_model(monkeypatch, name, host_gib):
    card = get(name)
    monkeypatch.setattr(placement, "card_of", lambda device: card)
    monkeypatch.setattr(device.psutil, "virtual_memory", lambda: type("Memory", (), {"total": host_gib * GiB}))
    dtype = DTYPES[best_dtype(card)]
    config, grad_accum, chosen = placement.settle(parse(["--preset=2b"])[0], CUDA, dtype, Processes())
    assert chosen.fits and chosen.method.streamed and chosen.keeps_batch and config.strategy.offload == "states"

    config.model = SMALL
    config.strategy.recomputed_blocks = min(config.strategy.recomputed_blocks, SMALL.n_layer)
    model = GPT.outline(SMALL)
    weights = model.initial_weights(torch.Generator().manual_seed(0))
    strategy = build(config, model, Processes.from_environment(), CPU, dtype, grad_accum, weights)
    assert "streamed from host memory" in strategy.describe()
    tokens = torch.arange(2 * 33).view(2, 33) % 60
    losses = []
    for _ in range(4):
        strategy.set_lr(3e-3)
        loss = strategy.forward_backward([Batch(tokens[:, :-1], tokens[:, 1:], None)] * 2)
        assert not strategy.step(loss).skipped
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


def test_streaming_is_chosen_over_zeros_offload_where_it_is_faster():
    plans = plan(parse(["--preset=2b"])[0].model, get("rtx3080"), 64 * GiB)
    chosen = choose(plans)
    offloaded = [p for p in plans if p.method.offload != "none" and p.fits and p.keeps_batch]
    assert chosen.method.streamed and offloaded
    assert all(chosen.tokens_per_s > p.tokens_per_s for p in offloaded)
