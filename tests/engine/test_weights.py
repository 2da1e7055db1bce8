"""Our own files: the model as it was, of a run its best checkpoint, and what is wrong with a file named."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from engine.config import ModelConfig, from_dict
from engine.formats import WeightsError, drop_tied, resize_vocab
from engine.model import GPT
from engine.weights import find_weights, load_model, recorded_tokenizer, write_weights
from tests.engine.conftest import CLASSIC, draw_weights, gpt, randomise, save_model, tokens
from tools import export_weights, import_weights


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
        models[step] = draw_weights(GPT(config.model), step)
        folder = run / f"checkpoints/step_{step:08d}"
        save_model(folder, models[step])
        config.save(folder / "config.json")
        state = {"format": 1, "step": step, "tokens": 0, "val_loss": loss, "counters": {}, "shards": {}}
        (folder / "state.json").write_text(json.dumps(state))
    config.save(run / "config.json")
    return models


@pytest.mark.parametrize("losses, taken", [({10: 3.0, 20: 2.0, 30: 2.5}, 20), ({10: None, 30: None, 20: None}, 30)])
def test_a_run_is_its_best_checkpoint_or_else_the_newest(tmp_path, losses, taken):
    models = write_run(tmp_path, losses)
    assert torch.equal(load_model(tmp_path)(tokens()), models[taken](tokens()))
    assert torch.equal(load_model(tmp_path / "checkpoints/step_00000010")(tokens()), models[10](tokens()))


def test_a_folder_of_runs_or_checkpoints_names_them(tmp_path):
    for run in ("b", "a"):
        write_run(tmp_path / run, {10: None, 20: None})
    (tmp_path / "empty").mkdir()
    steps = tmp_path / "a/checkpoints"
    for folder, named in ((tmp_path, ("a", "b")), (steps, ("step_00000010", "step_00000020"))):
        with pytest.raises(WeightsError) as refused:
            find_weights(folder)
        assert str(refused.value).endswith(
            f"; inside are {', '.join(f'{folder}/{n}' for n in named)}: name one of them"
        )


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


@pytest.mark.parametrize("tool", [import_weights, export_weights])
def test_tools_keep_the_tokenizer_that_is_recorded(tmp_path, tool):
    ours = gpt()
    write_weights(tmp_path / "a", ours.config, ours.state_dict(), "p50k_base")
    flags = ["--model_path", str(tmp_path / "a"), "--out", str(tmp_path / "b")]
    assert tool.main([*flags, *(["--format=safetensors"] if tool is export_weights else [])]) == 0
    assert recorded_tokenizer(tmp_path / "b") == "p50k_base"
    save_model(tmp_path / "c", ours)
    assert recorded_tokenizer(tmp_path / "c") is None


@pytest.mark.parametrize("tool", [import_weights, export_weights])
def test_tools_replace_nothing_unasked_and_never_what_is_read_nor_a_runs(tmp_path, tool, capsys):
    source, run = save_model(tmp_path / "a", gpt()).parent, tmp_path / "run"
    write_run(run, {4: 1.0})
    linked, free = tmp_path / "link", tmp_path / "b.safetensors"
    linked.symlink_to(source)
    form = ["--format=safetensors"] if tool is export_weights else []

    def written(out: Path, *more: str, source: Path = source) -> str:
        before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
        status = tool.main([f"--model_path={source}", f"--out={out}", *form, *more])
        same = before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
        assert same == (status == 2)
        return capsys.readouterr().err

    step = find_weights(run)
    assert written(free) == ""
    assert "exists: --overwrite replaces it" in written(free)
    free.write_bytes(b"other")
    assert written(free, "--overwrite") == ""
    for out in (source, linked, source / "model.safetensors"):
        assert "belongs to the weights that are read" in written(out, "--overwrite")
    assert "belongs to the weights that are read" in written(free, "--overwrite", source=free)
    assert "belongs to the weights that are read" in written(step, "--overwrite", source=run)
    for out in (step, step / "model.safetensors"):
        assert f"{step} is a checkpoint" in written(out, "--overwrite")
    for out in (run, run / "model.safetensors"):  # which would hide the checkpoints from whoever loads the run
        assert f"{run} is a run" in written(out, "--overwrite")
    assert written(run / "beside.safetensors") == ""


def test_an_export_keeps_the_tokenizers_words(tmp_path, capsys):
    ours = gpt(n_layer=1, n_embd=6, vocab_size=50304)
    source = save_model(tmp_path / "a.safetensors", ours)
    flags = [f"--model_path={source}", "--format=safetensors", f"--out={tmp_path}/b"]
    assert export_weights.main([*flags, "--vocab_size=50256"]) == 2
    assert "--vocab_size 50256 would cut off words of r50k_base, which has 50257" in capsys.readouterr().err
    assert export_weights.main([*flags, "--vocab_size=50257"]) == 0
