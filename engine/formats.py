"""Weights under other programs' names: Hugging Face's GPT-2 and the classic train-llm-from-scratch script.

Each format is a pair of functions between its state dict and ours, {name: tensor} with a tied head stored once, as
transformer.wte.weight. What a file must hold is what the way out would write for a model of its shape, so one list of
names serves both directions.
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

_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}  # Hugging Face's: ours
_GPT2_DEFAULTS = dict(  # what a config.json may leave out
    n_layer=12, n_head=12, n_embd=768, n_positions=1024, vocab_size=R50K_TOKENS,
    activation_function="gelu_new", layer_norm_epsilon=1e-5, tie_word_embeddings=True,
)  # fmt: skip
_CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # GPT-2 stores these (in, out)
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
    with torch.device("meta"):
        return drop_tied(config, GPT(config).state_dict())


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


def _require_fields(config: ModelConfig, wanted: dict[str, Any], format: str) -> None:
    wrong = [
        f"{name} is {getattr(config, name)!r} ({format}: {value!r})"
        for name, value in wanted.items()
        if getattr(config, name) != value
    ]
    if wrong:
        raise WeightsError(f"{format} cannot express this model: {', '.join(wrong)}; --format safetensors can")


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


def from_gpt2(about: dict[str, Any], state: State) -> tuple[ModelConfig, State]:
    """Return the model of a Hugging Face GPT-2: `about` its config.json, `state` GPT2LMHeadModel's or GPT2Model's.

    WeightsError names a setting that this GPT does not have, and entries that are missing or unknown.
    """
    about = _GPT2_DEFAULTS | about
    settings = {
        "model_type": ("gpt2",),
        "activation_function": tuple(_ACTIVATIONS),
        "n_inner": (None, 4 * about["n_embd"]),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    }
    for name, known in settings.items():
        if about.get(name, known[0]) not in known:
            expressible = " or ".join(map(repr, known))
            raise WeightsError(f"config.json: {name} is {about[name]!r}; this GPT can only do {expressible}")
    config = ModelConfig(
        n_layer=about["n_layer"],
        n_head=about["n_head"],
        n_embd=about["n_embd"],
        block_size=about["n_positions"],
        vocab_size=about["vocab_size"],
        activation=_ACTIVATIONS[about["activation_function"]],
        norm_eps=about["layer_norm_epsilon"],
        tie_head=about["tie_word_embeddings"],
    )
    prefix = "" if any(name.startswith("transformer.") for name in state) else "transformer."  # GPT2Model has none
    named = {name if name.startswith("lm_head.") else prefix + name: tensor for name, tensor in state.items()}
    masks = (".attn.bias", ".attn.masked_bias")
    named = drop_tied(config, {name: tensor for name, tensor in named.items() if not name.endswith(masks)})
    compare(_transpose_conv1d(expected_state(config)), named, "this GPT-2")
    return config, _transpose_conv1d(named)


def to_gpt2(config: ModelConfig, state: State, vocab_size: int | None = None) -> tuple[dict[str, Any], State]:
    """Return config.json and the state dict of Hugging Face's GPT2LMHeadModel.

    vocab_size: rows kept of the embedding; None cuts r50k's padding of 50304 back to 50257 and nothing else.
    WeightsError names the fields that GPT-2 does not have (rotary positions, a biased head, ReLU).
    """
    learned = dict(positions="learned", bias=True, qkv_bias=True, head_bias=False)
    _require_fields(config, learned | ({} if config.activation == "gelu" else dict(activation="gelu_tanh")), "GPT-2")
    rows = vocab_size or (R50K_TOKENS if config.vocab_size == R50K_PADDED else config.vocab_size)
    config, state = resize_vocab(config, state, rows)
    about = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new" if config.activation == "gelu_tanh" else "gelu",
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_head,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "bos_token_id": END_OF_TEXT,
        "eos_token_id": END_OF_TEXT,
        "dtype": str(state["transformer.wte.weight"].dtype).removeprefix("torch."),
    }
    return about, _transpose_conv1d(state)


def _transpose_conv1d(state: State) -> State:
    return {name: tensor.t().contiguous() if name.endswith(_CONV1D) else tensor for name, tensor in state.items()}


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
    _require_fields(config, CLASSIC_MODEL, "the classic format")
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
