"""A folder for transformers holds model and tokenizer; where there is no tokenizer, the program says why."""

import json
import re
from pathlib import Path

import pytest

from engine.config import PRESETS, ModelConfig
from engine.formats import formats_of
from engine.generate import main as generate
from engine.model import GPT
from engine.tokenizer import load_encoding
from engine.weights import load_model, recorded_tokenizer, write_weights
from tests.engine.conftest import gpt
from tools import export_weights

ROOT = Path(__file__).parents[2]


def save(folder: Path, tokenizer: str | None, **changes) -> GPT:
    ours = gpt(**dict(n_layer=1, n_embd=24, vocab_size=50304) | changes)
    write_weights(folder, ours.config, ours.state_dict(), tokenizer)
    return ours


def export(tmp_path: Path, format: str, *more: str, out: str = "hf") -> int:
    return export_weights.main(
        [f"--model_path={tmp_path}/ours", f"--format={format}", f"--out={tmp_path}/{out}", *more]
    )


@pytest.mark.parametrize(
    "format, changes, more",
    [("gpt2", {}, ["--vocab_size=50304"]), ("gpt-neox", {"positions": "rotary"}, ["--dtype=fp32"])],
)
def test_transformers_writes_what_the_engine_writes(tmp_path, capsys, format, changes, more):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    save(tmp_path / "ours", "r50k_base", **changes)
    assert export(tmp_path, format, *more) == 0
    assert capsys.readouterr().out == f"{tmp_path}/ours -> {tmp_path}/hf\n"
    flags = ["--temperature=0", "--max_new_tokens=8", "--device=cpu", "--input_text=hello world"]
    assert generate([f"--model_path={tmp_path}/hf", *flags]) == 0
    tokenizer, theirs = (kind.from_pretrained(tmp_path / "hf") for kind in (AutoTokenizer, AutoModelForCausalLM))
    ids = tokenizer("hello world", return_tensors="pt")
    written = theirs.generate(**ids, max_new_tokens=8, do_sample=False)[0]
    assert ids["input_ids"].tolist() == [[31373, 995]] and len(written) == 10
    assert tokenizer.decode(written) + "\n" == capsys.readouterr().out
    about = json.loads((tmp_path / "hf/config.json").read_text())
    assert about["eos_token_id"] == about["bos_token_id"] == 50256
    assert recorded_tokenizer(tmp_path / "hf") == "r50k_base"


def test_a_model_of_unknown_words_gets_no_tokenizer(tmp_path, capsys):
    save(tmp_path / "ours", None, vocab_size=64)
    assert export(tmp_path, "gpt2") == 0
    said = capsys.readouterr().out
    assert "no tokenizer is written: none is recorded for this model of 64 tokens; --tokenizer_name names it" in said
    assert "; put its tokenizer.json there\n" in said
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((tmp_path / "hf/config.json").read_text())["eos_token_id"] is None
    assert export(tmp_path, "gpt2", "--tokenizer_name=r50k_base", out="named") == 0
    assert "no tokenizer is written: r50k_base has 50257 tokens and the model 64" in capsys.readouterr().out


def test_rows_of_r50k_are_taken_for_its_words_and_it_is_said(tmp_path, capsys):
    save(tmp_path / "ours", None)
    assert export(tmp_path, "gpt2") == 0
    assert "tokenizer: r50k_base, by the rows of the embedding, as none is recorded" in capsys.readouterr().out
    assert (tmp_path / "hf/tokenizer.json").exists()


def test_words_of_another_tokenizer_are_not_cut_off(tmp_path, monkeypatch, capsys):
    """p50k_base has 50281 of the 50304 rows."""
    save(tmp_path / "ours", "p50k_base")

    def fail(name):
        raise ValueError("the download that p50k_base needs failed")

    monkeypatch.setattr(export_weights, "load_encoding", fail)
    assert export(tmp_path, "gpt2") == 0
    assert load_model(tmp_path / "hf").config.vocab_size == 50304
    assert "no tokenizer is written: the download that p50k_base needs failed" in capsys.readouterr().out


@pytest.mark.parametrize(
    "recorded, asked, said",
    [
        ("p50k_base", "gpt2", "--tokenizer_name r50k_base: the model was trained with p50k_base"),
        (None, "r60k", "--tokenizer_name: unknown tokenizer 'r60k'"),
    ],
)
def test_a_tokenizer_that_cannot_be(tmp_path, capsys, recorded, asked, said):
    save(tmp_path / "ours", recorded, vocab_size=64)
    assert export(tmp_path, "gpt2", f"--tokenizer_name={asked}") == 2
    assert said in capsys.readouterr().err and not (tmp_path / "hf").exists()


def test_a_tokenizer_that_is_there_is_not_replaced_unasked(tmp_path, capsys):
    save(tmp_path / "ours", "r50k_base")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/tokenizer.json").write_text("mine")
    assert export(tmp_path, "gpt2") == 2
    assert "tokenizer.json exists: --overwrite replaces it" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "hf").iterdir()] == ["tokenizer.json"]
    assert export(tmp_path, "gpt2", "--overwrite") == 0
    assert len(json.loads((tmp_path / "hf/tokenizer.json").read_text())["model"]["vocab"]) == load_encoding().n_vocab


@pytest.mark.parametrize("readme", ["README.md", "README.zh-CN.md"])
def test_the_readme_says_which_format_holds_each_preset(readme):
    rows = re.findall(r"(?m)^\| `([\w-]+)` \| \d+ \|.*\| `([\w-]+)` \|", (ROOT / readme).read_text(encoding="utf-8"))
    assert {name: [format, "safetensors"] for name, format in rows} == {
        name: formats_of(ModelConfig(**preset["model"])) for name, preset in PRESETS.items()
    }
