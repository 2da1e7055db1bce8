"""The loss of a model on a token file: training's own, transformers', bits a byte of a known text, the program."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from engine import evaluate as program
from engine import train
from engine.data import TokenFile, validation_batches
from engine.report import read_metrics
from engine.tokenizer import END_OF_TEXT, load_encoding
from engine.weights import load_model, write_hugging_face, write_weights
from tests.engine.conftest import gpt, save_model


def write(path: Path, tokens, **about) -> Path:
    np.asarray(tokens, "<u2").tofile(path)
    path.with_name(path.name + ".json").write_text(json.dumps({"tokenizer": "r50k_base", "vocab_size": 61} | about))
    return path


@pytest.fixture
def data(tmp_path) -> Path:
    return write(tmp_path / "val.bin", np.random.default_rng(0).integers(0, 61, 16 * 40 + 1), end_of_text=60)


@pytest.fixture
def saved(tmp_path) -> Path:
    return save_model(tmp_path / "model.safetensors", gpt())


def run(capsys, *flags: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = program.main(["--device=cpu", *flags])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def measured(capsys, *flags: str) -> dict:
    code, out, err = run(capsys, *flags, "--json")
    assert code == 0, err
    return json.loads(out)


@pytest.mark.parametrize("masking", [[], ["--document_masking"]])
def test_it_is_the_loss_of_training_s_validation(masking, tiny_flags, token_files, tmp_path, capsys):
    assert train.main([*tiny_flags, *masking, "--micro_batch_size=4"]) == 0
    [*_, last] = [record for record in read_metrics(tmp_path / "run") if record.get("val_loss")]
    flags = [f"--model_path={tmp_path}/run/checkpoints/step_00000012", f"--data_file={token_files[1]}", *masking]
    again = measured(capsys, *flags, "--tokens=512")
    assert last["step"] == 12 and again["loss"] == pytest.approx(last["val_loss"], rel=1e-6)
    assert (again["tokens"], again["sequences"], again["block_size"]) == (512, 16, 32)
    assert again["document_masking"] == bool(masking)


def test_it_is_transformers_loss_of_an_exported_model(data, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    ours = gpt(vocab_size=61)
    write_hugging_face(tmp_path / "gpt2", ours.config, ours.state_dict(), "gpt2")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2").eval()
    rows = torch.from_numpy(TokenFile(data).tokens.astype(np.int64))
    rows = torch.stack([rows[i : i + 16] for i in range(0, 42 * 15, 15)])  # 15 targets each, as theirs are shifted
    with torch.no_grad():
        expected = theirs(rows, labels=rows).loss.item()
    flags = [f"--model_path={tmp_path}/gpt2", f"--data_file={data}", "--tokens=all", "--block_size=15"]
    found = measured(capsys, *flags)
    assert found["sequences"] == 42 and found["loss"] == pytest.approx(expected, rel=1e-5)


def test_the_standard_error_is_over_sequences_whatever_the_batch(saved, data, capsys):
    flags = [f"--model_path={saved}", f"--data_file={data}", "--tokens=320"]
    found = measured(capsys, *flags)
    model, batches = load_model(saved), validation_batches(TokenFile(data), block_size=16, batch_size=1, tokens=320)
    with torch.no_grad():
        losses = np.array([model(batch.tokens, batch.targets).item() for batch in batches])
    assert found["loss"] == pytest.approx(losses.mean(), rel=1e-5)
    assert found["standard_error"] == pytest.approx(losses.std(ddof=1) / math.sqrt(20), rel=1e-4)
    assert found["perplexity"] == pytest.approx(math.exp(losses.mean()), rel=1e-4)
    assert measured(capsys, *flags, "--micro_batch_size=3")["loss"] == pytest.approx(found["loss"], rel=1e-6)
    assert measured(capsys, *flags, "--tokens=1")["standard_error"] is None


def test_bits_a_byte_of_a_text_that_is_known(tmp_path, capsys):
    texts, encoding = ["Once upon a time, 从前有座山。", "The second document is in one language."], load_encoding()
    tokens = [END_OF_TEXT] + [token for text in texts for token in [*encoding.encode(text), END_OF_TEXT]]
    file = write(tmp_path / "text.bin", tokens, vocab_size=END_OF_TEXT + 1, end_of_text=END_OF_TEXT)
    guessing = gpt(vocab_size=50304, n_embd=6, n_layer=1, block_size=64)
    with torch.no_grad():
        guessing.lm_head.weight.zero_()
    weights = save_model(tmp_path / "guessing.safetensors", guessing)
    flags = [f"--model_path={weights}", f"--data_file={file}", f"--block_size={len(tokens) - 1}"]
    found = measured(capsys, *flags)
    n_bytes, bits = sum(len(text.encode()) for text in texts), math.log2(50304)
    assert found["text_bytes"] == n_bytes and found["bits_per_token"] == pytest.approx(bits)
    assert found["bits_per_byte"] == pytest.approx(bits * (len(tokens) - 1) / n_bytes)
    out = run(capsys, *flags)[1]
    assert f"loss: {math.log(50304):.4f} nats a token\nperplexity: 50304.0" in out
    assert (
        f"bits a byte: {found['bits_per_byte']:.4f}\nevaluated: 28 tokens in 1 sequence of 28, {n_bytes} bytes" in out
    )


def test_without_the_tokenizer_there_is_a_loss_all_the_same(saved, tmp_path, capsys):
    file = write(tmp_path / "other.bin", np.arange(50), tokenizer="other")
    code, out, err = run(capsys, f"--model_path={saved}", f"--data_file={file}")
    assert code == 0 and "warning: without bits a byte: unknown tokenizer 'other'" in err
    assert "nats a token" in out and "byte" not in out


def test_what_is_not_finite_is_null_in_json(data, tmp_path, capsys):
    wild = gpt()
    with torch.no_grad():
        wild.lm_head.weight.mul_(1e5)
    flags = [f"--model_path={save_model(tmp_path / 'wild.safetensors', wild)}", f"--data_file={data}"]
    found = measured(capsys, *flags)
    assert found["loss"] > 1000 and found["perplexity"] is None
    assert "perplexity: inf\n" in run(capsys, *flags)[1]


def test_only_the_result_is_on_standard_output(saved, data, capsys):
    code, out, err = run(capsys, f"--model_path={saved}", f"--data_file={data}", "--tokens=all")
    assert code == 0 and [line.partition(":")[0] for line in out.splitlines()] == [
        "loss", "perplexity", "bits a token", "bits a byte", "evaluated",
    ]  # fmt: skip
    assert "640 tokens in 40 sequences of 16" in out and out.endswith(" tokens/s\n")
    for said in (f"model: {saved}, ", "device: cpu (asked for", f"data: {data}, 641 tokens, of r50k_base"):
        assert said in err


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--model_path=nowhere"], "error: nowhere is missing; it can be a run"),
        (["--data_file=nowhere.bin"], "error: nowhere.bin is missing; make it with"),
        (["--data_file={short}"], "error: {short} has 16 tokens, too few for one window of 16 and its last target"),
        (["--data_file={large}"], "error: {large} has ids up to 99 and {saved} 64 tokens"),
        (["--block_size=17"], "error: --block_size 17: {saved} has a context of 16"),
        (["--device=tpu"], "error: --device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
    ],
)
def test_errors_say_what_is_wrong(flags, said, saved, data, tmp_path, capsys):
    names = {"saved": saved}
    names["short"] = write(tmp_path / "short.bin", np.arange(16))
    names["large"] = write(tmp_path / "large.bin", np.arange(100), vocab_size=100)
    flags = [flag.format(**names) for flag in flags]
    code, out, err = run(capsys, f"--model_path={saved}", f"--data_file={data}", *flags)
    assert (code, out) == (2, "") and said.format(**names) in err


def test_a_file_of_another_tokenizer_is_refused(data, tmp_path, capsys):
    ours = gpt()
    file = write_weights(tmp_path / "m.safetensors", ours.config, ours.state_dict(), "p50k_base")
    code, out, err = run(capsys, f"--model_path={file}", f"--data_file={data}")
    assert (code, out) == (2, "") and f"{file} was trained on tokens of p50k_base, and {data} has those of r50k" in err


def test_a_card_without_the_memory_is_told_what_takes_less(saved, data, monkeypatch, capsys):
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore")

    monkeypatch.setattr(program, "evaluate", full)
    code, _, err = run(capsys, f"--model_path={saved}", f"--data_file={data}")
    assert code == 2 and "error: CUDA out of memory.\n" in err and err.endswith("--micro_batch_size 1\n")
