"""Weights in and out, unchanged: transformers' GPT-2, the classic script, our own files; what is wrong is named."""
import dataclasses
import json
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from engine.config import ModelConfig, from_dict
from engine.formats import WeightsError, drop_tied, resize_vocab
from engine.model import GPT
from engine.weights import load_model, read_weights, save_model, write_classic, write_gpt2
from tools import export_weights, import_weights

CLASSIC = dict(positions="learned", activation="relu", qkv_bias=False, head_bias=True, tie_head=False)


def randomise(model: nn.Module, std: float = 0.2) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=std, generator=generator)
    return model.eval()


def gpt(**changes) -> GPT:
    config = dict(n_layer=2, n_head=3, n_embd=24, block_size=16, vocab_size=64)
    return randomise(GPT(ModelConfig(**config | changes)))


def tokens(seed: int = 0, below: int = 61) -> torch.Tensor:
    return torch.randint(below, (2, 16), generator=torch.Generator().manual_seed(seed))


def hugging_face(**changes):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = dict(n_layer=2, n_head=3, n_embd=24, n_positions=16, vocab_size=61, bos_token_id=0, eos_token_id=0)
    return randomise(GPT2LMHeadModel(GPT2Config(**config | changes)))


# GPT-2 of transformers


def assert_parity(ours: GPT, theirs: nn.Module, vocab_size: int) -> None:
    """Logits and every gradient agree within 1e-5."""
    x, targets = tokens(), tokens(seed=1)
    expected = theirs(x).logits
    torch.testing.assert_close(ours(x)[..., :vocab_size], expected, atol=1e-5, rtol=1e-5)
    F.cross_entropy(expected.reshape(-1, vocab_size), targets.reshape(-1)).backward()
    ours(x, targets).backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        expected = gradients.pop(name)
        conv1d = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        torch.testing.assert_close(parameter.grad, expected.t() if conv1d else expected, atol=1e-5, rtol=1e-5, msg=name)
    assert not gradients


@pytest.mark.parametrize(
    "changes", [{}, {"activation_function": "gelu", "layer_norm_epsilon": 1e-3}, {"tie_word_embeddings": False}]
)
def test_gpt2_comes_in(tmp_path, changes):
    theirs = hugging_face(**changes)
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    assert ours.config.activation == ("gelu" if "activation_function" in changes else "gelu_tanh")
    assert_parity(ours, theirs, 61)


@pytest.mark.parametrize("changes", [{}, {"activation": "gelu", "norm_eps": 1e-3}, {"tie_head": False}])
def test_gpt2_goes_out(tmp_path, changes):
    from transformers import GPT2LMHeadModel

    ours = gpt(vocab_size=61, **changes)
    write_gpt2(tmp_path, ours.config, ours.state_dict())
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    assert_parity(ours, theirs, 61)


def test_gpt2_in_and_out_is_the_same_file(tmp_path):
    hugging_face().save_pretrained(tmp_path / "in")
    write_gpt2(tmp_path / "out", *read_weights(tmp_path / "in"))
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
        torch.testing.assert_close(load_model(tmp_path / name)(tokens()), theirs(tokens()).logits, atol=1e-5, rtol=1e-5)


def test_padding_is_cut_on_the_way_out(tmp_path):
    from transformers import GPT2LMHeadModel

    ours = gpt(n_embd=6, n_layer=1, vocab_size=50304)
    write_gpt2(tmp_path / "usual", ours.config, ours.state_dict())
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "usual").eval()
    assert theirs.config.vocab_size == 50257
    torch.testing.assert_close(ours(tokens())[..., :50257], theirs(tokens()).logits, atol=1e-5, rtol=1e-5)
    write_gpt2(tmp_path / "asked", ours.config, ours.state_dict(), vocab_size=100)
    assert load_model(tmp_path / "asked").config.vocab_size == 100


@pytest.mark.parametrize("changes", [{}, CLASSIC])
def test_padding_changes_no_logit_and_takes_little_probability(changes):
    ours = randomise(GPT(ModelConfig(n_layer=2, n_head=3, n_embd=24, block_size=16, vocab_size=61, **changes)), std=1.0)
    config, state = resize_vocab(ours.config, drop_tied(ours.config, ours.state_dict()), 64)
    padded = GPT(config).eval()
    padded.load_state_dict(state, strict=False)
    logits = padded(tokens())
    torch.testing.assert_close(logits[..., :61], ours(tokens()))
    assert logits.softmax(-1)[..., 61:].sum(-1).max() <= 3 / 64
    back = resize_vocab(config, state, 61)[1]
    assert all(back[name].equal(tensor) for name, tensor in ours.state_dict().items() if name in back)


@pytest.mark.parametrize(
    "field, value, said",
    [
        ("positions", "rotary", "positions is 'rotary' (GPT-2: 'learned')"),
        ("head_bias", True, "head_bias is True (GPT-2: False)"),
        ("activation", "relu", "activation is 'relu'"),
        ("qkv_bias", False, "qkv_bias is False"),
        ("bias", False, "bias is False"),
    ],
)
def test_what_gpt2_has_not_is_refused_by_field(tmp_path, field, value, said):
    model = gpt(n_head=4, n_embd=32, **{field: value})
    with pytest.raises(WeightsError) as error:
        write_gpt2(tmp_path, model.config, model.state_dict())
    assert said in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "setting, value",
    [
        ("activation_function", "relu"),
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


# The classic script


class ClassicHead(nn.Module):
    def __init__(self, n_embd, head_size, block_size):
        super().__init__()
        self.key, self.query, self.value = (nn.Linear(n_embd, head_size, bias=False) for _ in range(3))
        self.register_buffer("tril", torch.tril(torch.ones(block_size, block_size)))

    def forward(self, x):
        T = x.shape[1]
        scores = self.query(x) @ self.key(x).transpose(1, 2) / self.key.out_features**0.5
        return scores.masked_fill(self.tril[:T, :T] == 0, float("-inf")).softmax(-1) @ self.value(x)


class ClassicAttention(nn.Module):
    def __init__(self, n_embd, n_head, block_size, proj):
        super().__init__()
        self.heads = nn.ModuleList(ClassicHead(n_embd, n_embd // n_head, block_size) for _ in range(n_head))
        if proj:
            self.proj = nn.Linear(n_embd, n_embd)

    def forward(self, x):
        x = torch.cat([head(x) for head in self.heads], -1)
        return self.proj(x) if hasattr(self, "proj") else x


class ClassicMLP(nn.Module):
    def __init__(self, n_embd):
        super().__init__()
        self.hidden, self.proj = nn.Linear(n_embd, 4 * n_embd), nn.Linear(4 * n_embd, n_embd)

    def forward(self, x):
        return self.proj(self.hidden(x).relu())


class ClassicBlock(nn.Module):
    def __init__(self, n_embd, n_head, block_size, proj):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(n_embd), nn.LayerNorm(n_embd)
        self.attn, self.mlp = ClassicAttention(n_embd, n_head, block_size, proj), ClassicMLP(n_embd)

    def forward(self, x):
        x = x + self.attn(self.ln1(x))
        return x + self.mlp(self.ln2(x))


class ClassicModel(nn.Module):
    def __init__(self, n_layer=3, n_head=4, n_embd=32, block_size=16, vocab_size=61, proj=True):
        super().__init__()
        self.token_embed, self.position_embed = nn.Embedding(vocab_size, n_embd), nn.Embedding(block_size, n_embd)
        self.attn_blocks = nn.ModuleList(ClassicBlock(n_embd, n_head, block_size, proj) for _ in range(n_layer))
        self.layer_norm, self.lm_head = nn.LayerNorm(n_embd), nn.Linear(n_embd, vocab_size)
        self.register_buffer("pos_idxs", torch.arange(block_size))

    def forward(self, x):
        x = self.token_embed(x) + self.position_embed(self.pos_idxs[: x.shape[1]])
        for block in self.attn_blocks:
            x = block(x)
        return self.lm_head(self.layer_norm(x))


def classic_checkpoint(model: nn.Module, **more) -> dict:
    """What the script saves, of its older and its newer versions together."""
    optimizer = torch.optim.AdamW(model.parameters())
    model(tokens()).sum().backward()
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
    theirs = randomise(ClassicModel(proj=proj))
    checkpoint = classic_checkpoint(theirs)
    torch.save(checkpoint, tmp_path / "classic.pt", _use_new_zipfile_serialization=zipped)
    ours = load_model(tmp_path / "classic.pt")
    config = ours.config
    assert (config.n_layer, config.n_head, config.n_embd, config.block_size, config.vocab_size) == (3, 4, 32, 16, 61)
    torch.testing.assert_close(ours(tokens()), theirs(tokens()), atol=1e-5, rtol=1e-5)


def test_classic_with_numbers_of_numpy_1(tmp_path):
    theirs = randomise(ClassicModel())
    torch.save(classic_checkpoint(theirs), tmp_path / "new.pt")
    with zipfile.ZipFile(tmp_path / "new.pt") as new, zipfile.ZipFile(tmp_path / "old.pt", "w") as old:
        for entry in new.namelist():
            content = new.read(entry)
            if entry.endswith("data.pkl"):
                assert b"numpy._core.multiarray" in content or b"numpy.core.multiarray" in content
                content = content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
            old.writestr(entry, content)
    torch.testing.assert_close(load_model(tmp_path / "old.pt")(tokens()), theirs(tokens()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "_orig_mod.module."])
def test_classic_state_dict_alone(tmp_path, prefix):
    theirs = randomise(ClassicModel())
    torch.save({prefix + name: tensor for name, tensor in theirs.state_dict().items()}, tmp_path / "bare.pth")
    torch.testing.assert_close(load_model(tmp_path / "bare.pth")(tokens()), theirs(tokens()), atol=1e-5, rtol=1e-5)


def test_classic_goes_out(tmp_path):
    ours = gpt(**CLASSIC)
    write_classic(tmp_path / "out.pt", ours.config, ours.state_dict())
    content = torch.load(tmp_path / "out.pt", weights_only=True)
    theirs = ClassicModel(n_layer=2, n_head=3, n_embd=24, block_size=16, vocab_size=64)
    theirs.load_state_dict(content["model_state_dict"])  # strict: the buffers too
    torch.testing.assert_close(theirs(tokens()), ours(tokens()), atol=1e-5, rtol=1e-5)
    again = load_model(tmp_path / "out.pt")
    assert all(a.equal(b) for a, b in zip(again.state_dict().values(), ours.state_dict().values()))
    with pytest.raises(WeightsError, match="positions is 'rotary'"):
        write_classic(tmp_path / "no.pt", ModelConfig(positions="rotary"), {})


def test_classic_entries_that_do_not_fit_are_named(tmp_path):
    state = ClassicModel().state_dict()
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
    checkpoint = classic_checkpoint(ClassicModel(), **{place: Evil(tmp_path / "ran")})
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
        torch.save(ClassicModel().state_dict(), tmp_path / "whole.pt")
        content = (tmp_path / "whole.pt").read_bytes()[:20_000]
    (tmp_path / "bad.pt").write_bytes(content)
    with pytest.raises(WeightsError, match=r"bad\.pt: is no whole PyTorch checkpoint \("):
        load_model(tmp_path / "bad.pt")


# Our own files


@pytest.mark.parametrize("changes", [{}, CLASSIC, dict(positions="rotary", n_head=4, n_embd=32)])
@pytest.mark.parametrize("name", ["model.safetensors", "folder"])
def test_our_files_give_the_same_model(tmp_path, changes, name):
    ours = gpt(**changes)
    file = save_model(tmp_path / name, ours)
    again = load_model(tmp_path / name)
    assert again.config == ours.config and not again.training
    assert torch.equal(again(tokens()), ours(tokens()))
    with safe_open(file, framework="pt") as opened:
        assert json.loads(opened.metadata()["model_config"])["n_layer"] == 2
        assert ("lm_head.weight" in opened.keys()) != ours.config.tie_head
    assert (again.lm_head.weight is again.transformer["wte"].weight) == ours.config.tie_head
    plain = tmp_path / "plain"
    plain.touch()
    assert file.stat().st_mode == plain.stat().st_mode
    assert not list(tmp_path.rglob("*.partial"))


def test_dtype_of_a_loaded_model(tmp_path):
    ours = gpt()
    save_model(tmp_path / "a.safetensors", ours)
    half = load_model(tmp_path / "a.safetensors", dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16} and half(tokens()).dtype == torch.bfloat16
    assert load_model(tmp_path / "a.safetensors")(tokens()).dtype == torch.float32


def write_run(run: Path, losses: dict[int, float | None]) -> dict[int, GPT]:
    """A run folder as training leaves it, a different model at each step."""
    models = {}
    shape = dict(n_layer=1, n_head=2, n_embd=8, block_size=16, vocab_size=64)
    config = from_dict({"preset": "13m", "model": shape, "optimizer": {"batch_tokens": 64}})
    for step, loss in losses.items():
        models[step] = GPT(config.model)
        models[step].init_weights(torch.Generator().manual_seed(step))
        folder = run / f"checkpoints/step_{step:08d}"
        save_model(folder, models[step])
        config.save(folder / "config.json")
        (folder / "state.json").write_text(json.dumps({"format": 1, "step": step, "val_loss": loss}))
    config.save(run / "config.json")
    return models


@pytest.mark.parametrize("losses, taken", [({10: 3.0, 20: 2.0, 30: 2.5}, 20), ({10: None, 30: None, 20: None}, 30)])
def test_a_run_is_its_best_checkpoint_or_else_the_newest(tmp_path, losses, taken):
    models = write_run(tmp_path, losses)
    assert torch.equal(load_model(tmp_path)(tokens()), models[taken](tokens()))
    assert torch.equal(load_model(tmp_path / "checkpoints/step_00000010")(tokens()), models[10](tokens()))


def test_the_configuration_beside_is_read_where_the_file_has_none(tmp_path):
    models = write_run(tmp_path, {10: None})
    file = tmp_path / "checkpoints/step_00000010/model.safetensors"
    save_file(load_file(file), file)
    assert torch.equal(load_model(file)(tokens()), models[10](tokens()))
    (file.parent / "config.json").unlink()
    with pytest.raises(WeightsError, match="no config.json beside it"):
        load_model(file)


def test_our_files_that_cannot_be_read_say_why(tmp_path):
    with pytest.raises(WeightsError, match="nowhere is missing"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(WeightsError, match="holds neither model.safetensors nor a checkpoint"):
        load_model(tmp_path)
    file = save_model(tmp_path / "a.safetensors", gpt())
    content = file.read_bytes()
    for damaged in (content[:-1000], content[:5], b""):
        file.write_bytes(damaged)
        with pytest.raises(WeightsError, match=r"a\.safetensors cannot be read whole"):
            load_model(file)
    state = gpt().state_dict()
    state["transformer.h.7.ln_1.bias"] = state.pop("transformer.h.1.ln_1.bias")
    del state["lm_head.weight"]
    save_file(state, file, metadata={"model_config": json.dumps(dataclasses.asdict(gpt().config))})
    named = r"a\.safetensors: .*missing: transformer.h.1.ln_1.bias; unknown: transformer.h.7.ln_1.bias"
    with pytest.raises(WeightsError, match=named):
        load_model(file)
    config = json.dumps({"n_layer": 2, "n_experts": 8})
    save_file({"a": torch.zeros(1)}, file, metadata={"model_config": config})
    with pytest.raises(WeightsError, match="settings that this version does not know: n_experts"):
        load_model(file)


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    file = save_model(tmp_path / "a.safetensors", gpt())
    before = file.read_bytes()

    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("engine.weights.save_file", fail)
    with pytest.raises(WeightsError, match="a.safetensors cannot be written: No space left"):
        save_model(file, gpt(n_layer=1))
    assert file.read_bytes() == before and os.listdir(tmp_path) == ["a.safetensors"]


# The programs


def test_programs_carry_gpt2_in_and_out(tmp_path, capsys):
    theirs = hugging_face()
    theirs.save_pretrained(tmp_path / "hf")
    assert import_weights.main([f"--model_path={tmp_path}/hf", f"--out={tmp_path}/ours"]) == 0
    assert "61 rows padded to 64" in capsys.readouterr().out
    assert load_model(tmp_path / "ours").config.vocab_size == 64
    export = [f"--model_path={tmp_path}/ours", "--format=gpt2", f"--out={tmp_path}/back", "--vocab_size=61"]
    assert export_weights.main(export) == 0
    torch.testing.assert_close(load_model(tmp_path / "back")(tokens()), theirs(tokens()).logits, atol=1e-5, rtol=1e-5)


def test_programs_carry_classic_checkpoints_in_and_out(tmp_path, capsys):
    torch.save(randomise(ClassicModel()).state_dict(), tmp_path / "a.pt")
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
    assert "GPT-2 cannot express this model: qkv_bias" in capsys.readouterr().err
