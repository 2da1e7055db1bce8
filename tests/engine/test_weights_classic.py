"""The classic script's `.pt`, in and out: the same logits, no code ever run; what does not fit is named."""

import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from safetensors.torch import load_file

from benchmarks.classic import ClassicGPT
from engine.config import ModelConfig
from engine.formats import WeightsError
from engine.weights import load_model, read_shape, write_classic
from tests.engine.conftest import CLASSIC, gpt, randomise, tokens
from tools import export_weights, import_weights


def classic_model(proj: bool = True, **changes) -> ClassicGPT:
    """proj False: heads without a projection behind them, as some versions of the script have."""
    shape = dict(n_layer=3, n_head=4, n_embd=32, block_size=16, vocab_size=61)
    model = ClassicGPT(**shape | changes)
    if not proj:
        for block in model.attn_blocks:
            block.attn.proj = nn.Identity()
    return randomise(model)


def classic_checkpoint(model: nn.Module, **more) -> dict:
    """What the script saves, of its older and its newer versions together."""
    optimizer = torch.optim.AdamW(model.parameters())
    model(tokens())[0].sum().backward()
    optimizer.step()
    return {
        "model_state_dict": model.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
        "losses": [3.5, np.float64(3.25), np.float32(3.0)],
        "train_loss": np.float64(3.1),
        "dev_loss": np.float32(3.2),
        "steps": np.int64(500),
        "step": 500,
        "is_final": np.bool_(True),
        "config": {"n_head": 4, "lr": 1e-3, "device": "cuda"},
        "lr_state": {"last": 1e-4},
    } | more


@pytest.mark.parametrize("proj", [True, False])
@pytest.mark.parametrize("zipped", [True, False])
def test_classic_checkpoint_gives_the_same_logits(tmp_path, proj, zipped):
    theirs = classic_model(proj=proj)
    checkpoint = classic_checkpoint(theirs)
    torch.save(checkpoint, tmp_path / "classic.pt", _use_new_zipfile_serialization=zipped)
    ours = load_model(tmp_path / "classic.pt")
    config = ours.config
    assert read_shape(tmp_path / "classic.pt") == config
    assert (config.n_layer, config.n_head, config.n_embd, config.block_size, config.vocab_size) == (3, 4, 32, 16, 61)
    torch.testing.assert_close(ours(tokens()), theirs(tokens())[0], atol=1e-5, rtol=1e-5)


def test_classic_with_numbers_of_numpy_1(tmp_path):
    theirs = classic_model()
    torch.save(classic_checkpoint(theirs), tmp_path / "new.pt")
    with zipfile.ZipFile(tmp_path / "new.pt") as new, zipfile.ZipFile(tmp_path / "old.pt", "w") as old:
        for entry in new.namelist():
            content = new.read(entry)
            if entry.endswith("data.pkl"):
                assert b"numpy._core.multiarray" in content or b"numpy.core.multiarray" in content
                content = content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
            old.writestr(entry, content)
    torch.testing.assert_close(load_model(tmp_path / "old.pt")(tokens()), theirs(tokens())[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "_orig_mod.module."])
def test_classic_state_dict_alone(tmp_path, prefix):
    theirs = classic_model()
    torch.save({prefix + name: tensor for name, tensor in theirs.state_dict().items()}, tmp_path / "bare.pth")
    torch.testing.assert_close(load_model(tmp_path / "bare.pth")(tokens()), theirs(tokens())[0], atol=1e-5, rtol=1e-5)


def test_classic_goes_out(tmp_path):
    ours = gpt(**CLASSIC)
    write_classic(tmp_path / "out.pt", ours.config, ours.state_dict())
    content = torch.load(tmp_path / "out.pt", weights_only=True)
    theirs = classic_model(n_layer=2, n_head=3, n_embd=24, block_size=16, vocab_size=64)
    theirs.load_state_dict(content["model_state_dict"])  # strict: the buffers too
    torch.testing.assert_close(theirs(tokens())[0], ours(tokens()), atol=1e-5, rtol=1e-5)
    again = load_model(tmp_path / "out.pt")
    assert all(a.equal(b) for a, b in zip(again.state_dict().values(), ours.state_dict().values()))
    with pytest.raises(WeightsError, match="positions is 'rotary'"):
        write_classic(tmp_path / "no.pt", ModelConfig(positions="rotary"), {})


def test_classic_entries_that_do_not_fit_are_named(tmp_path):
    state = classic_model().state_dict()
    state["attn_blocks.2.rotary.weight"] = torch.zeros(3)
    del state["attn_blocks.1.attn.heads.2.key.weight"], state["attn_blocks.0.attn.proj.bias"], state["layer_norm.bias"]
    state["lm_head.bias"] = torch.zeros(60)
    torch.save(state, tmp_path / "odd.pt")
    with pytest.raises(WeightsError) as error:
        load_model(tmp_path / "odd.pt")
    missing = "missing: attn_blocks.0.attn.proj.bias, attn_blocks.1.attn.heads.2.key.weight, layer_norm.bias"
    unknown, shape = "unknown: attn_blocks.2.rotary.weight", "lm_head.bias is (60,) and should be (61,)"
    for part in ("odd.pt", missing, unknown, shape):
        assert part in str(error.value)


def test_a_file_of_another_model_says_so(tmp_path):
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(WeightsError, match="missing: token_embed.weight, position_embed.*it begins with: conv1.weight"):
        load_model(tmp_path / "other.pt")
    torch.save({"weights": [1, 2], "epoch": 3}, tmp_path / "odd.pt")
    with pytest.raises(WeightsError, match="no model_state_dict, but keys weights, epoch"):
        load_model(tmp_path / "odd.pt")


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("place", ["losses", "config", "model_state_dict"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_wants_to_run_code_is_refused(tmp_path, place, zipped):
    checkpoint = classic_checkpoint(classic_model(), **{place: Evil(tmp_path / "ran")})
    torch.save(checkpoint, tmp_path / "evil.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match=r"evil\.pt: holds posix\.system, and loading that could run code: refused"):
        load_model(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


def test_a_bare_pickle_that_wants_to_run_code_is_refused(tmp_path):
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Evil(tmp_path / "ran"), protocol=2))
    with pytest.raises(WeightsError):
        load_model(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint at all", "half"])
def test_a_damaged_pt_is_refused(tmp_path, content):
    if content == "half":
        torch.save(classic_model().state_dict(), tmp_path / "whole.pt")
        content = (tmp_path / "whole.pt").read_bytes()[:20_000]
    (tmp_path / "bad.pt").write_bytes(content)
    with pytest.raises(WeightsError, match=r"bad\.pt: is no whole PyTorch checkpoint \("):
        load_model(tmp_path / "bad.pt")


def test_programs_carry_classic_checkpoints_in_and_out(tmp_path, capsys):
    torch.save(classic_model().state_dict(), tmp_path / "a.pt")
    between = tmp_path / "b.safetensors"
    assert import_weights.main([f"--model_path={tmp_path}/a.pt", f"--out={between}", "--vocab_multiple=1"]) == 0
    assert export_weights.main([f"--model_path={between}", "--format=classic", f"--out={tmp_path}/c.pt"]) == 0
    a, c = torch.load(tmp_path / "a.pt"), torch.load(tmp_path / "c.pt")["model_state_dict"]
    assert a.keys() == c.keys() and all(a[name].equal(c[name]) for name in a)
    export = ["--format=safetensors", f"--out={tmp_path}/d", "--dtype=bf16"]
    assert export_weights.main([f"--model_path={tmp_path}/a.pt", *export]) == 0
    assert {t.dtype for t in load_file(tmp_path / "d/model.safetensors").values()} == {torch.bfloat16}
    capsys.readouterr()
    assert export_weights.main([f"--model_path={tmp_path}/a.pt", "--format=gpt2", f"--out={tmp_path}/e"]) == 2
    assert "gpt2 cannot express this model: head_bias" in capsys.readouterr().err
