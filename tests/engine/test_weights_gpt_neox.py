"""GPT-NeoX of transformers, in and out, for models with rotary positions: the same logits; what differs is named."""

import dataclasses
import json

import pytest
import torch
import torch.nn as nn
from safetensors.torch import load_file, save_file

from engine.config import PRESETS, ModelConfig
from engine.formats import WeightsError, drop_tied, formats_of
from engine.hugging_face import from_hugging_face
from engine.weights import load_model, read_weights, write_hugging_face
from tests.engine.conftest import gpt, randomise, tokens
from tools import import_weights


def rotary(**changes):
    """Two layers of 3 heads, 8 wide each: as many as halves and interleaved heads need to differ."""
    return gpt(**dict(positions="rotary", vocab_size=61) | changes)


def hugging_face(**changes) -> nn.Module:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = dict(
        num_hidden_layers=2, num_attention_heads=3, hidden_size=24, intermediate_size=96, max_position_embeddings=16,
        vocab_size=61, rotary_pct=1.0, use_parallel_residual=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return randomise(GPTNeoXForCausalLM(GPTNeoXConfig(**config | changes)))


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    torch.testing.assert_close(ours(tokens()), theirs(tokens()).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"activation": "gelu", "norm_eps": 1e-3},
        {"activation": "relu", "tie_head": False},
        {"qkv_bias": False},
        {"bias": False},
        {"n_head": 1},
    ],
)
def test_gpt_neox_goes_out_and_comes_back(tmp_path, changes):
    from transformers import AutoModelForCausalLM

    ours = rotary(**changes)
    write_hugging_face(tmp_path, ours.config, ours.state_dict(), "gpt-neox")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert type(theirs).__name__ == "GPTNeoXForCausalLM"
    assert_same(ours, theirs)
    config, state = read_weights(tmp_path)
    assert config == dataclasses.replace(ours.config, bias=True, qkv_bias=True)
    expected = drop_tied(ours.config, ours.state_dict())
    assert all(state.pop(name).equal(tensor) for name, tensor in expected.items())
    assert all(name.endswith(".bias") and not tensor.any() for name, tensor in state.items())


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": True, "hidden_act": "gelu_new"},
        {"hidden_act": "relu", "layer_norm_eps": 1e-3},
        {"attention_bias": False},
    ],
)
def test_gpt_neox_comes_in(tmp_path, changes):
    theirs = hugging_face(**changes)
    theirs.save_pretrained(tmp_path / "hf")
    assert import_weights.main([f"--model_path={tmp_path}/hf", f"--out={tmp_path}/ours", "--vocab_multiple=1"]) == 0
    ours = load_model(tmp_path / "ours")
    assert ours.config.qkv_bias == changes.get("attention_bias", True)
    assert_same(ours, theirs)


def test_a_folder_of_transformers_4(tmp_path):
    theirs = hugging_face()
    theirs.save_pretrained(tmp_path)
    about = json.loads((tmp_path / "config.json").read_text())
    del about["rope_parameters"], about["attention_bias"]
    (tmp_path / "config.json").write_text(json.dumps(about | {"rotary_pct": 1.0, "rope_scaling": None}))
    state = load_file(tmp_path / "model.safetensors")
    state["embed_out.weight"] = state.pop("embed_out.weight" if "embed_out.weight" in state else "lm_head.weight")
    state["gpt_neox.layers.0.attention.bias"] = torch.ones(1, 1, 16, 16)
    state["gpt_neox.layers.0.attention.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(state, tmp_path / "model.safetensors")
    assert_same(load_model(tmp_path), theirs)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"use_parallel_residual": True}, "use_parallel_residual is True; this GPT can only do False"),
        ({"rotary_pct": 0.25}, "rotary_pct is 0.25; this GPT can only do 1.0"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rotary_pct is 0.5"),
        ({"rotary_emb_base": 500_000}, "rotary_emb_base is 500000"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type is 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling is {'type': 'linear'"),
        ({"intermediate_size": 100}, "intermediate_size is 100; this GPT can only do 96"),
        ({"hidden_act": "silu"}, "hidden_act is 'silu'"),
        ({"model_type": "llama"}, "model_type is 'llama'; this GPT can only do 'gpt2' or 'gpt_neox'"),
    ],
)
def test_settings_that_change_the_arithmetic_are_refused(changes, said):
    about = {"model_type": "gpt_neox", "hidden_size": 24, "intermediate_size": 96, "use_parallel_residual": False}
    with pytest.raises(WeightsError) as error:
        from_hugging_face(about | {"rotary_pct": 1.0} | changes, {})
    assert str(error.value).startswith(f"config.json: {said}")


def test_entries_that_do_not_fit_are_named(tmp_path):
    ours = rotary()
    write_hugging_face(tmp_path, ours.config, ours.state_dict(), "gpt-neox")
    state = load_file(tmp_path / "model.safetensors")
    state["extra"] = state.pop("gpt_neox.layers.1.attention.dense.bias")
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="missing: gpt_neox.layers.1.attention.dense.bias; unknown: extra"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"positions": "learned"}, "positions is 'learned' (there always 'rotary'); --format gpt2 or safetensors can"),
        ({"head_bias": True}, "head_bias is True (there always False); --format safetensors can"),
    ],
)
def test_what_gpt_neox_has_not_is_refused_by_field(tmp_path, changes, said):
    model = rotary(**changes)
    with pytest.raises(WeightsError) as error:
        write_hugging_face(tmp_path, model.config, model.state_dict(), "gpt-neox")
    assert str(error.value) == f"gpt-neox cannot express this model: {said}"
    assert not list(tmp_path.iterdir())


def test_every_preset_goes_out_in_a_format_of_another_program():
    formats = {name: formats_of(ModelConfig(**preset["model"]))[:-1] for name, preset in PRESETS.items()}
    of_gpt2 = {name: ["gpt2"] for name in PRESETS if name.startswith("gpt2")}
    assert formats == {"13m": ["classic"], "2b": ["gpt-neox"], "3b": ["classic"]} | of_gpt2
