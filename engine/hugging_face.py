"""Models of Hugging Face's transformers: GPT-2 where positions are learned, GPT-NeoX where they are rotary.

Biases that a model does not have are zeros there, which compute the same; they come back as biases.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.formats import (
    R50K_PADDED,
    R50K_TOKENS,
    State,
    WeightsError,
    compare,
    drop_tied,
    expected_state,
    require_format,
    resize_vocab,
)

_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
_GPT2_DEFAULTS = dict(  # what a config.json may leave out
    n_layer=12, n_head=12, n_embd=768, n_positions=1024, vocab_size=R50K_TOKENS,
    activation_function="gelu_new", layer_norm_epsilon=1e-5, tie_word_embeddings=True,
)  # fmt: skip
_NEOX_DEFAULTS = dict(
    num_hidden_layers=44, num_attention_heads=64, hidden_size=6144, intermediate_size=24576, vocab_size=50432,
    max_position_embeddings=2048, hidden_act="gelu", layer_norm_eps=1e-5, tie_word_embeddings=False,
    use_parallel_residual=True, attention_bias=True, rotary_pct=0.25, rotary_emb_base=10_000,
)  # fmt: skip
_GPT2_SETTINGS = {  # ours: config.json's
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
    "block_size": "n_positions",
    "vocab_size": "vocab_size",
    "norm_eps": "layer_norm_epsilon",
    "tie_head": "tie_word_embeddings",
}
_NEOX_SETTINGS = {
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_embd": "hidden_size",
    "block_size": "max_position_embeddings",
    "vocab_size": "vocab_size",
    "norm_eps": "layer_norm_eps",
    "tie_head": "tie_word_embeddings",
}
_CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # GPT-2 stores these (in, out)
_NEOX_NAMES = {  # ours: GPT-NeoX's
    "transformer.wte": "gpt_neox.embed_in",
    "transformer.h.": "gpt_neox.layers.",
    "transformer.ln_f": "gpt_neox.final_layer_norm",
    "ln_1": "input_layernorm",
    "ln_2": "post_attention_layernorm",
    "attn.c_attn": "attention.query_key_value",
    "attn.c_proj": "attention.dense",
    "mlp.c_fc": "mlp.dense_h_to_4h",
    "mlp.c_proj": "mlp.dense_4h_to_h",
    "lm_head": "embed_out",  # as published files have it, and every version of transformers reads it
}


def from_hugging_face(about: dict[str, Any], state: State) -> tuple[ModelConfig, State]:
    """Return the model of a Hugging Face folder: `about` its config.json, `state` its tensors.

    It may be GPT2LMHeadModel's, GPT2Model's or GPTNeoXForCausalLM's. WeightsError names a setting that this GPT does
    not have, and entries that are missing or unknown.
    """
    _check_settings(about, {"model_type": ("gpt2", "gpt_neox")})
    return (_from_gpt_neox if about.get("model_type") == "gpt_neox" else _from_gpt2)(about, state)


def to_hugging_face(
    config: ModelConfig, state: State, format: str, vocab_size: int | None = None, end_of_text: int | None = None
) -> tuple[dict[str, Any], State]:
    """Return config.json and the state dict of GPT2LMHeadModel ("gpt2") or GPTNeoXForCausalLM ("gpt-neox").

    vocab_size: rows kept of the embedding; None cuts r50k's padding of 50304 back to 50257 and nothing else.
    end_of_text: the token that begins and ends a document; None where it is not known. WeightsError names the fields
    that the format does not have (the other's positions, a biased head).
    """
    require_format(config, format)
    rows = vocab_size or (R50K_TOKENS if config.vocab_size == R50K_PADDED else config.vocab_size)
    config, state = resize_vocab(config, state, rows)
    like = state["transformer.wte.weight"]
    for name, empty in expected_state(_with_biases(config)).items():
        if name not in state:
            state[name] = torch.zeros(empty.shape, dtype=like.dtype)
    about, state = (_to_gpt2 if format == "gpt2" else _to_gpt_neox)(config, drop_tied(config, state))
    shared = {
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "dtype": str(like.dtype).removeprefix("torch."),
    }
    return about | shared, state


def _with_biases(config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(config, bias=True, qkv_bias=True)


def _check_settings(about: dict[str, Any], settings: dict[str, tuple]) -> None:
    for name, known in settings.items():
        if about.get(name, known[0]) not in known:
            expressible = " or ".join(map(repr, known))
            raise WeightsError(f"config.json: {name} is {about[name]!r}; this GPT can only do {expressible}")


def _from_gpt2(about: dict[str, Any], state: State) -> tuple[ModelConfig, State]:
    about = _GPT2_DEFAULTS | about
    settings = {
        "activation_function": tuple(_ACTIVATIONS),
        "n_inner": (None, 4 * about["n_embd"]),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    }
    _check_settings(about, settings)
    shape = {ours: about[theirs] for ours, theirs in _GPT2_SETTINGS.items()}
    config = ModelConfig(activation=_ACTIVATIONS[about["activation_function"]], **shape)
    prefix = "" if any(name.startswith("transformer.") for name in state) else "transformer."  # GPT2Model has none
    named = {name if name.startswith("lm_head.") else prefix + name: tensor for name, tensor in state.items()}
    masks = (".attn.bias", ".attn.masked_bias")
    named = drop_tied(config, {name: tensor for name, tensor in named.items() if not name.endswith(masks)})
    compare(_transpose_conv1d(expected_state(config)), named, "this GPT-2")
    return config, _transpose_conv1d(named)


def _to_gpt2(config: ModelConfig, state: State) -> tuple[dict[str, Any], State]:
    about = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": _activation(config, "gelu_new"),
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }
    shape = {theirs: getattr(config, ours) for ours, theirs in _GPT2_SETTINGS.items()}
    return about | shape, _transpose_conv1d(state)


def _activation(config: ModelConfig, gelu_tanh: str) -> str:
    return gelu_tanh if config.activation == "gelu_tanh" else config.activation


def _transpose_conv1d(state: State) -> State:
    return {name: tensor.t().contiguous() if name.endswith(_CONV1D) else tensor for name, tensor in state.items()}


def _from_gpt_neox(about: dict[str, Any], state: State) -> tuple[ModelConfig, State]:
    about = _NEOX_DEFAULTS | about
    # Before transformers 5 the rotary settings had names of their own, and other kinds were called rope_scaling.
    rope = {name: value for name, value in (about.get("rope_parameters") or {}).items() if value is not None}
    about["rotary_pct"] = rope.get("partial_rotary_factor", about["rotary_pct"])
    about["rotary_emb_base"] = rope.get("rope_theta", about["rotary_emb_base"])
    about["rope_type"] = rope.get("rope_type", "default")
    settings = {
        "hidden_act": tuple(_ACTIVATIONS),
        "intermediate_size": (4 * about["hidden_size"],),
        "use_parallel_residual": (False,),
        "rotary_pct": (1.0,),
        "rotary_emb_base": (10_000,),
        "rope_type": ("default",),
        "rope_scaling": (None,),
    }
    _check_settings(about, settings)
    shape = {ours: about[theirs] for ours, theirs in _NEOX_SETTINGS.items()}
    activation = _ACTIVATIONS[about["hidden_act"]]
    config = ModelConfig(positions="rotary", activation=activation, qkv_bias=about["attention_bias"], **shape)
    buffers = (".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq")
    named = {
        name.replace("lm_head.", "embed_out."): tensor for name, tensor in state.items() if not name.endswith(buffers)
    }
    if config.tie_head:
        named.pop("embed_out.weight", None)
    if not config.qkv_bias:  # its attention has no biases at all, and ours one on the output
        for name in expected_state(config):
            if name.endswith("attn.c_proj.bias"):
                named.setdefault(_neox_name(name), torch.zeros(config.n_embd, dtype=next(iter(named.values())).dtype))
    ours = {_neox_name(name): name for name in expected_state(config)}
    compare({_neox_name(name): tensor for name, tensor in expected_state(config).items()}, named, "this GPT-NeoX")
    return config, {ours[name]: _unpack_heads(config, ours[name], tensor) for name, tensor in named.items()}


def _to_gpt_neox(config: ModelConfig, state: State) -> tuple[dict[str, Any], State]:
    about = {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "hidden_act": _activation(config, "gelu_pytorch_tanh"),
        "intermediate_size": 4 * config.n_embd,
        "use_parallel_residual": False,
        "attention_bias": True,
        "rotary_pct": 1.0,
        "rotary_emb_base": 10_000,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }
    shape = {theirs: getattr(config, ours) for ours, theirs in _NEOX_SETTINGS.items()}
    return about | shape, {_neox_name(name): _pack_heads(config, name, tensor) for name, tensor in state.items()}


def _pack_heads(config: ModelConfig, name: str, tensor: Tensor) -> Tensor:
    """GPT-NeoX's query_key_value (n_head, 3, D, …) of our c_attn, (3, n_head, D, …), flat in both."""
    if ".c_attn." not in name:
        return tensor
    return tensor.unflatten(0, (3, config.n_head, config.head_dim)).transpose(0, 1).flatten(0, 2)


def _unpack_heads(config: ModelConfig, name: str, tensor: Tensor) -> Tensor:
    if ".c_attn." not in name:
        return tensor
    return tensor.unflatten(0, (config.n_head, 3, config.head_dim)).transpose(0, 1).flatten(0, 2)


def _neox_name(name: str) -> str:
    for ours, theirs in _NEOX_NAMES.items():
        name = name.replace(ours, theirs)
    return name
