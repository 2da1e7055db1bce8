"""Memory by part is counted from the tensors that are there: shared ones once, gradients while they are held."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from engine import train
from engine.config import ModelConfig
from engine.device import peak_memory
from engine.held_memory import by_part, gradient_bytes, storage_bytes
from engine.model import GPT
from engine.optimizer import AdamW, parameter_groups
from tests.engine.conftest import state_bytes

CPU = torch.device("cpu")


def test_a_storage_counts_once_and_only_where_it_lies():
    whole = torch.empty(100)
    assert storage_bytes([whole, whole[:50], None, torch.empty(10, device="meta")], CPU) == 400


@pytest.mark.parametrize("weights, moments", [("fp32", "fp32"), ("residual", "int8")])
def test_parts_are_those_of_the_model_and_its_optimizer(weights, moments):
    model = GPT(ModelConfig(n_layer=2, n_head=2, n_embd=128, block_size=32, vocab_size=8192))
    expected = state_bytes(model.parameters(), weights, moments)
    optimizer = AdamW(parameter_groups(model, 0.1), weights=weights, moments=moments)
    before = by_part(list(model.parameters()), CPU, 0)["states and buffers"]
    tokens = torch.zeros(2, 32, dtype=torch.int64)
    model(tokens, tokens).backward()
    gradients = gradient_bytes(model.parameters(), CPU)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    parts = by_part(list(model.parameters()), CPU, gradients)
    assert gradients == parts["gradients"] == parts["weights"] == expected["weights"]
    residuals = expected["residuals"]  # were there before the step
    made = parts["states and buffers"] - before
    assert expected["moments"] <= made < 1.1 * expected["moments"] and before >= residuals  # and tables made once
    assert sum(parts.values()) == pytest.approx(peak_memory(CPU), rel=0.02)


def test_tensors_without_memory_are_passed_over():
    with FakeTensorMode():
        fake = torch.empty(100)
    assert fake.device == CPU and by_part([torch.empty(100)], CPU, 0)["weights"] == 400


def test_a_run_says_it_once(tiny_flags, tmp_path, capsys):
    assert train.main([*tiny_flags, "--max_steps=4"]) == 0
    assert capsys.readouterr().out.count("at the peak of the first step: weights ") == 1
    assert train.main([*tiny_flags, "--max_steps=8", "--resume"]) == 0
    assert capsys.readouterr().out.count("at the peak of the first step: weights ") == 1
