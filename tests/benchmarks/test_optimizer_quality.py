"""The study of the optimizer's quality: it trains what is missing, goes on where it stopped, and judges rightly."""

import json
import shutil

import numpy as np
import pytest

from benchmarks import optimizer_quality as quality
from benchmarks import render


@pytest.fixture
def flags(tmp_path, monkeypatch):
    """A tiny model on made-up text of 64 words, two formats, two seeds, in tmp_path."""
    tiny = ["--preset=13m", "--n_head=2", "--n_embd=16", "--block_size=16", "--vocab_size=64", "--lr=1e-2"]
    monkeypatch.setattr(quality, "MODELS", {"tiny": tiny})
    monkeypatch.setattr(quality, "LAST", 3)
    monkeypatch.setattr(quality.os, "nice", lambda increment: 0)
    rng = np.random.default_rng(0)
    for name, tokens in (("train", 4000), ("val", 1000)):
        rng.integers(0, 64, tokens).astype("<u2").tofile(tmp_path / f"{name}.bin")
        about = {"tokenizer": "r50k_base", "vocab_size": 64, "end_of_text": 63, "dtype": "uint16"}
        (tmp_path / f"{name}.bin.json").write_text(json.dumps(about))
    files = [f"--{name}_file={tmp_path / name}.bin" for name in ("train", "val")]
    places = [f"--run_dir={tmp_path / 'runs'}", f"--out={tmp_path / 'quality.json'}"]
    sizes = ["--steps=6", "--batch_tokens=64", "--eval_tokens=128"]
    return [*files, *places, *sizes, "--models", "tiny", "--formats", "fp32", "stochastic-int8", "--seeds", "1", "2"]


def write_run(options, form, seed, val_loss, steps):
    run = quality.folder(options, "tiny", form, seed)
    run.mkdir(parents=True)
    records = [{"step": s, "loss": val_loss + 1 / s} for s in range(1, steps + 1)] + [
        {"step": steps, "val_loss": val_loss}
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def outcome(path):
    return json.loads(path.read_text())["models"]["tiny"]


def test_one_run_is_trained_and_not_again(flags, tmp_path, capfd):
    flags = [*flags, "--formats", "fp32", "--seeds", "1"]
    quality.main(flags)
    assert "6/6" in capfd.readouterr().out
    result = outcome(tmp_path / "quality.json")["formats"]["fp32"]
    assert result["val_loss"]["1"] == pytest.approx(np.log(64), abs=0.2)
    assert (tmp_path / "quality.png").stat().st_size > 10_000
    quality.main(flags)
    assert "6/6" not in capfd.readouterr().out  # nothing left to train


@pytest.mark.parametrize("apart, inside", [(0.05, True), (-0.05, True), (0.25, False), (-0.25, False)])
def test_the_verdict(flags, tmp_path, apart, inside):
    options = quality.parse(flags)
    for seed, loss in ((1, 3.0), (2, 3.2)):
        write_run(options, "fp32", seed, loss, steps=6)
        write_run(options, "stochastic-int8", seed, loss + apart, steps=6)
    quality.report(options)
    result = outcome(tmp_path / "quality.json")
    assert result["spread"] == pytest.approx(0.2)
    assert result["formats"]["stochastic-int8"]["difference"] == pytest.approx(apart)
    assert result["formats"]["stochastic-int8"]["inside"] is inside
    assert result["formats"]["fp32"]["train_loss"]["1"] == pytest.approx(3 + (1 / 4 + 1 / 5 + 1 / 6) / 3)


def test_the_picture_is_drawn_from_what_the_file_holds(flags, tmp_path, validate, monkeypatch):
    options = quality.parse(flags)
    for form, loss in (("fp32", 3.0), ("stochastic-int8", 3.1)):
        for seed in (1, 2):
            write_run(options, form, seed, loss, steps=6)
    quality.report(options)
    shutil.rmtree(tmp_path / "runs")
    payload = json.loads((tmp_path / "quality.json").read_text())
    validate(payload, "optimizer_quality")
    assert payload["settings"]["curve_steps"] == [3, 4, 5, 6]
    curve = payload["models"]["tiny"]["formats"]["stochastic-int8"]["curves"]["2"]
    assert curve == [round(3.1 + sum(1 / s for s in range(last - 2, last + 1)) / 3, 4) for last in (3, 4, 5, 6)]
    (panel,) = quality.curves_data(payload)
    top, bottom = quality.draw_curves([panel]).axes
    assert [line.get_ydata()[-1] for line in top.get_lines()][-1] == curve[-1]
    assert bottom.get_lines()[0].get_ydata() == pytest.approx([0.1] * 4, abs=1e-4)
    for name in ("RESULTS", "CHART_FOLDER"):
        monkeypatch.setattr(render, name, tmp_path)
    monkeypatch.setattr(render, "READMES", ())
    assert render.stale({"quality": payload})[tmp_path / "quality.png"]() == "drawn"
    assert tmp_path / "quality.png" not in render.stale({"quality": payload})


def test_unfinished_runs_do_not_count(flags, tmp_path):
    options = quality.parse(flags)
    write_run(options, "fp32", 1, 3.0, steps=6)
    write_run(options, "fp32", 2, 3.2, steps=5)
    write_run(options, "stochastic-int8", 1, 3.1, steps=6)
    quality.report(options)
    result = outcome(tmp_path / "quality.json")
    assert list(result["formats"]["fp32"]["val_loss"]) == ["1"] and result["spread"] is None
    assert result["formats"]["stochastic-int8"]["difference"] == pytest.approx(0.1)
    assert result["formats"]["stochastic-int8"]["inside"] is None


def test_what_is_learned_is_more_than_frequencies(flags, tmp_path):
    """64 words as frequent as each other: log 64, whatever the order."""
    options = quality.parse(flags)
    quality.report(options)
    settings = json.loads((tmp_path / "quality.json").read_text())["settings"]
    assert settings["train_tokens"] == 4000 and settings["unigram_loss"] == pytest.approx(np.log(64), abs=0.02)


def test_tokens_are_counted_in_blocks(monkeypatch):
    """Whatever the length of the file, in the memory of one."""
    sizes, bincount = [], np.bincount
    monkeypatch.setattr(quality, "BLOCK_TOKENS", 100)
    monkeypatch.setattr(quality.np, "bincount", lambda x, **options: sizes.append(len(x)) or bincount(x, **options))
    tokens = np.random.default_rng(0).integers(0, 64, 250).astype("<u2")
    assert quality.count_tokens(tokens, 70).tolist() == bincount(tokens, minlength=70).tolist()
    assert sizes == [100, 100, 50]


def test_missing_data_is_said(flags, capsys):
    with pytest.raises(SystemExit):
        quality.main([*flags, "--train_file", "nowhere.bin"])
    assert "nowhere.bin is missing" in capsys.readouterr().err
