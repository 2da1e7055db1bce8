"""GPT-2 of transformers, in and out: the same logits and gradients, the same file; what differs is named."""

import json

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from engine.formats import WeightsError
from engine.model import GPT
from engine.weights import load_model, read_shape, read_weights, write_hugging_face
from tests.engine.conftest import CLASSIC, gpt, randomise, tokens
from tools import export_weights, import_weights


def hugging_face(**changes):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = dict(n_layer=2, n_head=3, n_embd=24, n_positions=16, vocab_size=61, bos_token_id=0, eos_token_id=0)
    return randomise(GPT2LMHeadModel(GPT2Config(**config | changes)))


def assert_parity(ours: GPT, theirs: nn.Module, vocab_size: int) -> None:
    """Logits and every gradient agree within 1e-5."""
    x, targets = tokens(), tokens(seed=1)
    expected = theirs(x).logits
    torch.testing.assert_close(ours(x)[..., :vocab_size], expected, atol=1e-5, rtol=1e-5)
    F.cross_entropy(expected.reshape(-1, vocab_size), targets.reshape(-1)).backward()
    ours(x, targets).backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    missing = gradients.keys() - dict(ours.named_parameters())  # biases that are zeros over there
    assert not any(theirs.get_parameter(name).any() for name in missing)
    gradients = {name: gradient for name, gradient in gradients.items() if name not in missing}
    for name, parameter in ours.named_parameters():
        expected = gradients.pop(name)
        conv1d = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        torch.testing.assert_close(parameter.grad, expected.t() if conv1d else expected, atol=1e-5, rtol=1e-5, msg=name)
    assert not gradients


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"activation_function": "gelu", "layer_norm_epsilon": 1e-3},
        {"activation_function": "relu", "tie_word_embeddings": False},
    ],
)
def test_gpt2_comes_in(tmp_path, changes):
    theirs = hugging_face(**changes)
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    assert ours.config.activation == changes.get("activation_function", "gelu_tanh")
    assert_parity(ours, theirs, 61)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"activation": "gelu", "norm_eps": 1e-3},
        {"tie_head": False},
        {"qkv_bias": False},
        {"bias": False},
        CLASSIC | {"head_bias": False, "bias": False},
    ],
)
def test_gpt2_goes_out(tmp_path, changes):
    from transformers import GPT2LMHeadModel

    ours = gpt(vocab_size=61, **changes)
    write_hugging_face(tmp_path, ours.config, ours.state_dict(), "gpt2")
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    assert_parity(ours, theirs, 61)


def test_gpt2_in_and_out_is_the_same_file(tmp_path):
    hugging_face().save_pretrained(tmp_path / "in")
    write_hugging_face(tmp_path / "out", *read_weights(tmp_path / "in"), "gpt2")
    before, after = (load_file(tmp_path / side / "model.safetensors") for side in ("in", "out"))
    assert before.keys() == after.keys() and all(before[name].equal(after[name]) for name in before)


def test_gpt2_in_several_files_and_without_its_prefix(tmp_path):
    theirs = hugging_face()
    theirs.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert (tmp_path / "many/model.safetensors.index.json").exists()
    theirs.transformer.save_pretrained(tmp_path / "bare")  # the published files: h.0.…, with the mask as a buffer
    state = load_file(tmp_path / "bare/model.safetensors")
    state |= {"h.0.attn.bias": torch.ones(1, 1, 16, 16), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    save_file(state, tmp_path / "bare/model.safetensors")
    for name in ("many", "bare"):
        assert read_shape(tmp_path / name) == read_weights(tmp_path / name)[0]
        torch.testing.assert_close(load_model(tmp_path / name)(tokens()), theirs(tokens()).logits, atol=1e-5, rtol=1e-5)


def test_padding_is_cut_on_the_way_out(tmp_path):
    from transformers import GPT2LMHeadModel

    ours = gpt(n_embd=6, n_layer=1, vocab_size=50304)
    write_hugging_face(tmp_path / "usual", ours.config, ours.state_dict(), "gpt2")
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "usual").eval()
    assert theirs.config.vocab_size == 50257
    torch.testing.assert_close(ours(tokens())[..., :50257], theirs(tokens()).logits, atol=1e-5, rtol=1e-5)
    write_hugging_face(tmp_path / "asked", ours.config, ours.state_dict(), "gpt2", vocab_size=100)
    assert load_model(tmp_path / "asked").config.vocab_size == 100


@pytest.mark.parametrize(
    "changes, said",
    [
        (
            dict(positions="rotary"),
            "positions is 'rotary' (there always 'learned'); --format gpt-neox or safetensors can",
        ),
        (dict(head_bias=True), "head_bias is True (there always False); --format safetensors can"),
        (CLASSIC, "head_bias is True (there always False); --format classic or safetensors can"),
    ],
)
def test_what_gpt2_has_not_is_refused_by_field(tmp_path, changes, said):
    model = gpt(n_head=4, n_embd=32, **changes)
    with pytest.raises(WeightsError) as error:
        write_hugging_face(tmp_path, model.config, model.state_dict(), "gpt2")
    assert f"gpt2 cannot express this model: {said}" == str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "setting, value",
    [
        ("activation_function", "silu"),
        ("scale_attn_by_inverse_layer_idx", True),
        ("n_inner", 50),
        ("model_type", "llama"),
    ],
)
def test_gpt2_settings_that_change_the_arithmetic_are_refused(tmp_path, setting, value):
    hugging_face().save_pretrained(tmp_path)
    about = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(about | {setting: value}))
    with pytest.raises(WeightsError, match=f"{setting} is {value!r}"):
        load_model(tmp_path)


def test_gpt2_entries_that_do_not_fit_are_named(tmp_path):
    hugging_face().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["transformer.h.1.extra"] = state.pop("transformer.h.0.ln_1.weight")
    state["transformer.wpe.weight"] = state["transformer.wpe.weight"][:9].clone()
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError) as error:
        load_model(tmp_path)
    shape = "transformer.wpe.weight is (9, 24) and should be (16, 24)"
    for part in ("missing: transformer.h.0.ln_1.weight;", "unknown: transformer.h.1.extra;", f"wrong shape: {shape}"):
        assert part in str(error.value)


def test_programs_carry_gpt2_in_and_out(tmp_path, capsys):
    theirs = hugging_face()
    theirs.save_pretrained(tmp_path / "hf")
    assert import_weights.main([f"--model_path={tmp_path}/hf", f"--out={tmp_path}/ours"]) == 0
    assert "61 rows padded to 64" in capsys.readouterr().out
    assert load_model(tmp_path / "ours").config.vocab_size == 64
    export = [f"--model_path={tmp_path}/ours", "--format=gpt2", f"--out={tmp_path}/back", "--vocab_size=61"]
    assert export_weights.main(export) == 0
    torch.testing.assert_close(load_model(tmp_path / "back")(tokens()), theirs(tokens()).logits, atol=1e-5, rtol=1e-5)
