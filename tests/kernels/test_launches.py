"""Training, sampling and decoding launch their kernels as Triton's own launcher takes them: no GPU, and no results."""

import json
import os
import subprocess
import sys

import pytest

nvidia = pytest.importorskip("triton.backends.nvidia.driver")

PROGRAM = """
import json
import sys

import torch

from tests.pretended_driver import pretend_driver

target = sys.argv[1]
launched = pretend_driver(target)

from engine.config import ModelConfig
from engine.model import GPT, KVCache
from engine.optimizer import AdamW, InBackwardAdamW, clip_coefficient, parameter_groups
from kernels import softmax
from kernels.dispatch import CHIPS

dtype = getattr(torch, CHIPS[target].dtype)

def model(head, length):
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 2 * head, "block_size": length, "vocab_size": 512}
    return GPT(ModelConfig(**shape, positions="learned" if length % 2 else "rotary"), dtype)

def train(kind, weights, moments, head, length, documents=False):
    gpt = model(head, length)
    optimizer = kind(parameter_groups(gpt, 0.1), weights=weights, moments=moments, dtype=dtype)
    tokens = torch.randint(512, (2, length))
    doc_start = torch.zeros(2, length, dtype=torch.int32) if documents else None
    gpt(tokens, tokens, doc_start=doc_start).backward()
    if kind is InBackwardAdamW:
        optimizer.step()
    else:
        norm, coefficient = clip_coefficient(gpt.parameters(), 1.0)
        optimizer.step(grad_scale=coefficient, found_inf=(~torch.isfinite(norm)).float())

train(AdamW, "fp32", "fp32", 64, 64, documents=True)
train(AdamW, "residual", "int8", 128, 64)
train(AdamW, "residual", "int8", 128, 64, documents=True)
train(InBackwardAdamW, "stochastic", "int8", 40, 63)
with torch.no_grad():
    gpt = model(64, 64).to(dtype)
    for new in (1, 5, 16):
        cache = KVCache.empty(gpt.config, 2, 64, torch.device("cpu"), dtype)
        for tokens in (new, 1, 7):
            gpt(torch.randint(512, (2, tokens)), cache=cache)
    softmax(torch.randn(2, 50257), temperature=0.8)
print(json.dumps(launched))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(nvidia, "wrap_handle_tensordesc"), reason="follows the launcher of Triton 3.8")
@pytest.mark.parametrize("target", ["cuda:90", "cuda:86", "cuda:75"])
def test_every_kernel_is_launched_as_the_launcher_takes_it(target, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", PROGRAM, target]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    launched = json.loads(done.stdout)
    attention = {"forward_kernel", "backward_q_kernel", "backward_kv_kernel", "decode_kernel"}
    assert {"_adamw_kernel", "rotary_kernel", "column_sums_kernel"} <= launched.keys()
    assert (attention <= launched.keys()) == (target != "cuda:75")
