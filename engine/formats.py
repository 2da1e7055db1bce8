"""Weights under other programs' names: what every format shares, and the classic train-llm-from-scratch script's.

Each format is a pair of functions between its state dict and ours, {name: tensor} with a tied head stored once, as
transformer.wte.weight. What a file must hold is what the way out would write for a model of its shape, so one list of
names serves both directions. Those of Hugging Face's transformers are in engine/hugging_face.py.
"""

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from engine.config import CLASSIC_MODEL, ModelConfig
from engine.model import GPT
from engine.tokenizer import END_OF_TEXT

State = dict[str, Tensor]
R50K_TOKENS, R50K_PADDED = END_OF_TEXT + 1, 50304

FIELDS: dict[str, dict[str, Any]] = {  # what a model must be for a format to hold it
    "gpt2": dict(positions="learned", head_bias=False),
    "gpt-neox": dict(positions="rotary", head_bias=False),
    "classic": CLASSIC_MODEL,
    "safetensors": {},
}
_CLASSIC_NAMES = {  # ours: the classic script's; the packed qkv matrix is one matrix a head there
    "transformer.wte": "token_embed",
    "transformer.wpe": "position_embed",
    "transformer.h.": "attn_blocks.",
    "ln_1": "ln1",
    "ln_2": "ln2",
    "attn.c_proj": "attn.proj",
    "mlp.c_fc": "mlp.hidden",
    "mlp.c_proj": "mlp.proj",
    "transformer.ln_f": "layer_norm",
}


class WeightsError(ValueError):
    """Weights that cannot be read or written; the message says which file, which entry or field, and what to do."""


def expected_state(config: ModelConfig) -> State:
    """Return the names and shapes of a model's weights, as tensors without memory."""
    return drop_tied(config, GPT.outline(config).state_dict())


def drop_tied(config: ModelConfig, state: State) -> State:
    return {name: tensor for name, tensor in state.items() if not (config.tie_head and name == "lm_head.weight")}


def compare(expected: State, state: State, what: str) -> None:
    """Raise WeightsError, naming every entry, unless `state` has exactly the names and shapes of `expected`."""
    wrong = [
        f"{name} is {tuple(state[name].shape)} and should be {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    faults = [
        _listed("missing", (name for name in expected if name not in state)),
        _listed("unknown", (name for name in state if name not in expected)),
        _listed("wrong shape", wrong),
    ]
    if any(faults):
        raise WeightsError(f"{what} does not fit its model; " + "; ".join(fault for fault in faults if fault))


def _listed(kind: str, names: Iterable[str]) -> str:
    names = list(names)
    return f"{kind}: {', '.join(names)}" if names else ""


def formats_of(config: ModelConfig) -> list[str]:
    """Return the formats that hold this model exactly, by the names that export takes."""
    return [format for format, fields in FIELDS.items() if not _unlike(config, fields)]


def require_format(config: ModelConfig, format: str) -> None:
    """Raise WeightsError unless `format` can hold the model; it names the fields, and the formats that can."""
    if wrong := _unlike(config, FIELDS[format]):
        others = " or ".join(formats_of(config))
        raise WeightsError(f"{format} cannot express this model: {', '.join(wrong)}; --format {others} can")


def _unlike(config: ModelConfig, fields: dict[str, Any]) -> list[str]:
    return [
        f"{name} is {getattr(config, name)!r} (there always {value!r})"
        for name, value in fields.items()
        if getattr(config, name) != value
    ]


def resize_vocab(config: ModelConfig, state: State, vocab_size: int) -> tuple[ModelConfig, State]:
    """Return the model with this many rows in its embedding and head: cut off at the end, or added there.

    An added row is the mean of the others, whose logit is at most the mean of theirs, so that padding takes little
    probability from the tokens. A zero row has the logit 0: beside GPT-2's, all far below it, it would take nearly all.
    """
    resized = dict(state)
    for name in ("transformer.wte.weight", "lm_head.weight", "lm_head.bias"):
        if name in state:
            rows = state[name][:vocab_size]
            added = rows.float().mean(0, keepdim=True).to(rows.dtype).expand(vocab_size - len(rows), *rows.shape[1:])
            resized[name] = torch.cat([rows, added])
    return dataclasses.replace(config, vocab_size=vocab_size), resized


def from_classic(state: State) -> tuple[ModelConfig, State]:
    """Return the model of a classic state dict, its shape read off the tensors.

    Checkpoints from before the script had attn.proj get the identity there, which computes the same. WeightsError names
    entries that are missing or unknown.
    """
    for prefix in ("_orig_mod.", "module."):  # of torch.compile and of data parallelism
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    state = {name: tensor for name, tensor in state.items() if name != "pos_idxs" and not name.endswith(".tril")}
    layers = [int(found[1]) for name in state if (found := re.match(r"attn_blocks\.(\d+)\.", name))]
    heads = [int(found[1]) for name in state if (found := re.search(r"\.heads\.(\d+)\.", name))]
    embeddings = [name for name in ("token_embed.weight", "position_embed.weight") if name not in state]
    if embeddings or not layers or not heads:
        missing = embeddings + (["attn_blocks.0.attn.heads.0.query.weight"] if not layers or not heads else [])
        found = ", ".join(list(state)[:5]) or "nothing"
        raise WeightsError(f"no model of the classic script: missing: {', '.join(missing)}; it begins with: {found}")
    vocab_size, n_embd = state["token_embed.weight"].shape
    config = ModelConfig(
        n_layer=max(layers) + 1,
        n_head=max(heads) + 1,
        n_embd=n_embd,
        block_size=len(state["position_embed.weight"]),
        vocab_size=vocab_size,
        **CLASSIC_MODEL,
    )
    if not any(".attn.proj." in name for name in state):
        like = state["token_embed.weight"]
        for layer in range(config.n_layer):
            state[f"attn_blocks.{layer}.attn.proj.weight"] = torch.eye(n_embd, dtype=like.dtype)
            state[f"attn_blocks.{layer}.attn.proj.bias"] = torch.zeros(n_embd, dtype=like.dtype)
    compare(_classic_entries(config, expected_state(config)), state, "this classic model")

    ours: State = {}
    for name in expected_state(config):
        if ".c_attn." in name:
            ours[name] = torch.cat([state[part] for part in _classic_heads(name, config.n_head)])  # (3C, C)
        else:
            ours[name] = state[_classic_name(name)]
    return config, ours


def to_classic(config: ModelConfig, state: State) -> State:
    """Return the classic script's state dict, its buffers included; WeightsError names the fields it does not have."""
    require_format(config, "classic")
    classic = {name: tensor.clone() for name, tensor in _classic_entries(config, state).items()}
    tril = torch.ones(config.block_size, config.block_size).tril()  # one tensor for all heads: stored once
    for layer in range(config.n_layer):
        classic |= {f"attn_blocks.{layer}.attn.heads.{head}.tril": tril for head in range(config.n_head)}
    return classic | {"pos_idxs": torch.arange(config.block_size)}


def _classic_entries(config: ModelConfig, state: State) -> State:
    entries: State = {}
    for name, tensor in state.items():
        if ".c_attn." in name:
            entries |= zip(_classic_heads(name, config.n_head), tensor.split(config.head_dim))
        else:
            entries[_classic_name(name)] = tensor
    return entries


def _classic_heads(name: str, n_head: int) -> list[str]:
    """The matrices that c_attn packs, in its order: all queries, all keys, all values, each head by head."""
    block = _classic_name(name).removesuffix("c_attn.weight")
    return [f"{block}heads.{head}.{part}.weight" for part in ("query", "key", "value") for head in range(n_head)]


def _classic_name(name: str) -> str:
    for ours, classic in _CLASSIC_NAMES.items():
        name = name.replace(ours, classic)
    return name
