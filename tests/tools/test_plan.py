"""The planning program: tables for people, JSON for programs, a picture, messages for mistakes."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine import placement
from engine.cards import CARDS, CLASSIC, COMMON, DTYPES, GiB, get, parse_memory
from engine.command_line import parse
from engine.config import PRESETS, ModelConfig
from engine.distributed import Processes
from engine.footprint import PARTS, Elements
from engine.memory import plan
from tools import plan as program
from tools.plan import LEGEND, main, state, table

NUMBER = {"type": "number"}
SCHEMA = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "required": ["gpu", "fits", "strategy", "micro_batch_size", "peak_bytes", "host_bytes", "tokens_per_s"],
        "properties": {
            "gpu": {"type": "string"},
            "fits": {"type": "boolean"},
            "strategy": {"type": ["string", "null"]},
            "micro_batch_size": {"type": ["integer", "null"]},
            "peak_bytes": {"type": ["object", "null"], "additionalProperties": {"type": "integer"}},
            "host_bytes": {"type": ["integer", "null"]},
            "tokens_per_s": {"type": ["number", "null"]},
            "flags": {"type": "string"},
        },
    },
}


def output(capsys, *arguments: str, code: int = 0) -> str:
    assert main(list(arguments)) == code
    return capsys.readouterr().out


def entries(capsys, *arguments: str, code: int = 0) -> list[dict]:
    jsonschema = pytest.importorskip("jsonschema")
    made = json.loads(output(capsys, "--json", *arguments, code=code))
    jsonschema.validate(made, SCHEMA)
    return made


def test_every_card_is_shown_the_ten_of_the_classic_table_first(capsys, tmp_path):
    picture = tmp_path / "plan.png"
    asked = ("--preset", "2b", "--micro_batch_size", "1", "--gpu", "all", "--picture", str(picture))
    lines = output(capsys, *asked).splitlines()
    assert lines[0].startswith("2b: 2,017 M parameters")
    assert [line.split("  ")[0] for line in lines[2:12]] == [card.name for card in CLASSIC]
    table, legend = lines[: 2 + len(COMMON)], lines[2 + len(COMMON) :]
    assert [line.split("  ")[0] for line in table[2:]] == [card.name for card in COMMON] and legend[0] == ""
    assert all(f"{column}:" in " ".join(legend) for column in ("GiB", "micro", "days/1e9"))
    assert not any("nothing fits" in line for line in lines[2:12])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_card_is_shown_with_every_method_the_choice_and_more_cards(capsys, tmp_path):
    picture = tmp_path / "plan.svg"
    text = output(capsys, "--preset", "2b", "--gpu", "rtx3090", "--picture", str(picture))
    for word in ("chosen", "Choice:", "Not chosen:", "too large", "days", "MFU", "zero-3-offload-params", "\n   64  "):
        assert word in text
    assert picture.read_text().count("tokens/s") > 3
    header = next(line for line in text.splitlines() if line.startswith("method,"))
    legend = " ".join(LEGEND.splitlines())
    assert LEGEND in text
    for column in header.split("  ")[1:]:
        plain = column.strip() in ("", "weights", "grads", "master", "states", "tokens/s")
        assert plain or f"{column.strip()}:" in legend, column
    for word in {state(p, None) for p in plan(ModelConfig(**PRESETS["2b"]["model"]), get("t4"), 8 * GiB)} - {"fits"}:
        assert f"{word}:" in legend
    assert "\n  fp32 weights and moments on the card: would take" in text, "what was passed over has lines of its own"


def test_without_a_name_it_plans_for_the_gpu_that_is_here_or_for_all(capsys, monkeypatch):
    command = ("--preset", "gpt2", "--n_layer", "2", "--micro_batch_size", "8", "--json")
    assert [entry["gpu"] for entry in entries(capsys, *command)] == [card.name for card in COMMON]
    every = entries(capsys, *command, "--gpu", "every")
    assert [entry["gpu"] for entry in every] == [card.name for card in CARDS]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(program, "card_of", lambda device: replace(get("t4"), name="here"))
    assert {entry["gpu"] for entry in entries(capsys, *command)} == {"here"}


def test_host_memory_is_what_is_here_for_the_gpu_that_is_here(capsys, monkeypatch):
    command = ("--preset", "gpt2", "--n_layer", "2", "--micro_batch_size", "8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(program, "card_of", lambda device: get("t4"))
    monkeypatch.setattr(program, "host_memory_here", lambda: 24 * GiB)
    for flags, size, origin in (
        ((), 24, "this machine's"),
        (("--host_memory", "32GB"), 32, "asked for"),
        (("--gpu", "t4"), 64, "assumed"),
        (("--gpu", "all"), 64, "assumed"),
    ):
        assert f"; {size}.0 GiB of host memory, {origin}\n" in output(capsys, *command, *flags)
        assert {entry["host_memory_bytes"] for entry in entries(capsys, *command, *flags)} == {size * GiB}


def test_without_deepspeed_the_plan_for_the_gpu_that_is_here_is_trainings(capsys, monkeypatch):
    asked = ("--preset", "2b", "--micro_batch_size", "1")
    here, named = (), ("--gpu", "quadro rtx 8000", "--host_memory", "64GB")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(program, "card_of", lambda device: get("quadro rtx 8000"))
    monkeypatch.setattr(program, "host_memory_here", lambda: 64 * GiB)
    assert entries(capsys, *asked, *here) == entries(capsys, *asked, *named)
    missing, left_out = "DeepSpeed is not installed here; for zero-1, zero-2: pip install", placement.NO_DEEPSPEED
    assert "DeepSpeed is not" not in output(capsys, *asked, *here) + output(capsys, *asked, *named)
    monkeypatch.setattr(program, "find_spec", lambda name: None)
    assert not any(entry["strategy"].startswith("zero") for entry in entries(capsys, *asked, *here))
    assert "pip install" not in (said := output(capsys, *asked, *here)) and left_out in said
    assert missing in (said := output(capsys, *asked, *named)) and left_out not in said


def test_help_names_the_models_flags(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "engine/train.py's flags of a model" in capsys.readouterr().out


def test_json_holds_what_programs_need(capsys):
    made = entries(capsys, "--preset", "2b", "--gpu", "t4", "--host_memory", "64GB")
    assert sum(entry["chosen"] for entry in made) == 1
    for entry in made:
        assert entry["gpu"] == "T4" and set(entry["peak_bytes"]) == set(PARTS)
        assert sum(entry["peak_bytes"].values()) == entry["card_bytes"]
        assert entry["fits"] or not entry["chosen"]


@pytest.mark.parametrize(
    "asked",
    [
        "2b --gpu rtx3090 --n_layer 20",
        "2b --gpu rtx3060 --dtype fp16",
        "2b --gpu v100",
        "2b --gpu l40s --gpus 2 --host_memory 256GB --batch_tokens 65536",
        "gpt2 --gpu gtx1080 --dtype bf16 --block_size 512",
        "gpt2 --gpu h100 --batch_tokens 16384 --micro_batch_size 16",
    ],
)
def test_flags_ask_for_what_is_shown(asked, capsys, monkeypatch):
    made = [entry for entry in entries(capsys, "--preset", *asked.split()) if entry["fits"]]
    assert len(made) > 3 and made[0]["chosen"]
    starts = "deepspeed --num_gpus 2" if "--gpus 2" in asked else "python"
    assert f"\nBy hand: {starts} engine/train.py {made[0]['flags']}\n" in output(capsys, "--preset", *asked.split())
    card = next(card for card in CARDS if card.name == made[0]["gpu"])
    monkeypatch.setattr(placement, "card_of", lambda device: card)
    monkeypatch.setattr(placement, "host_memory", lambda wanted: (256 if "256GB" in asked else 64) * GiB)
    for entry in made:
        config, _ = parse(entry["flags"].split())
        processes = Processes(world_size=entry["gpus"])
        monkeypatch.setattr(Processes, "gather", lambda self, value: [value])
        device, dtype = torch.device("cuda"), DTYPES[config.strategy.dtype]
        _, grad_accum, chosen = placement.settle(config, device, dtype, processes)
        assert (chosen.name, chosen.micro_batch_size) == (entry["strategy"], entry["micro_batch_size"])
        assert (grad_accum, chosen.batch_tokens) == (entry["grad_accum"], entry["batch_tokens"])
        assert (chosen.footprint.card, chosen.host_bytes) == (entry["peak_bytes"], entry["host_bytes"])


def test_what_starts_several_gpus(capsys, monkeypatch):
    asked = "--preset gpt2 --gpu l4 --gpus 4 --micro_batch_size 8 --batch_tokens 65536 --gpus_per_machine"
    assert "\nBy hand: deepspeed --hostfile hosts engine/train.py --preset gpt2 " in output(capsys, *asked.split(), "2")
    monkeypatch.setattr(program, "find_spec", lambda name: None)
    assert "\nBy hand: torchrun --nproc_per_node 4 engine/train.py " in output(capsys, *asked.split(), "4")


def test_settings_reach_the_planner(capsys):
    asked = ("--preset", "2b", "--gpu", "3090")

    def chosen(*more: str) -> dict:
        (entry,) = [e for e in entries(capsys, *asked, *more) if e["chosen"]]
        return entry

    short = chosen("--block_size", "1024", "--micro_batch_size", "4", "--dtype", "fp16")
    assert short["micro_batch_size"] == 4 and short["dtype"] == "fp16" and short["grad_accum"] == 128
    eight = chosen("--gpus", "8", "--host_memory", "512GB")
    assert eight["gpus"] == 8 and eight["communication_bytes"] > 0
    assert chosen("--gpu_memory", "10GB")["card_bytes"] < 10 * GiB
    half = output(capsys, *asked, "--n_layer", "12", "--positions=learned")
    layers = replace(ModelConfig(**PRESETS["2b"]["model"]), n_layer=12, positions="learned")
    assert f"2b --n_layer 12 --positions=learned: {Elements.of(layers).total / 1e6:,.0f} M parameters" in half


def test_a_format_that_is_emulated_is_named(capsys, monkeypatch):
    command = ("--preset", "gpt2", "--n_layer", "2", "--micro_batch_size", "8", "--gpu")
    said = "bf16 is emulated on GTX 1080, at the rate of fp32 at best: without --dtype it is fp16"
    assert said in output(capsys, *command, "gtx1080", "--dtype", "bf16").splitlines()
    assert "emulated" not in output(capsys, *command, "gtx1080") + output(capsys, *command, "l4", "--dtype", "bf16")
    monkeypatch.setattr(program, "COMMON", (get("gtx1080"), get("l4")))
    assert said in output(capsys, *command, "all", "--dtype", "bf16").splitlines()


def test_what_does_not_fit_says_what_would(capsys, monkeypatch):
    asked = ("--preset", "2b", "--gpu", "rtx4060", "--host_memory")
    text = output(capsys, *asked, "0.1GB", code=1)
    assert "Nothing fits." in text and "Nearest: with" in text and "0.0 GiB of host memory to use" in text
    made = entries(capsys, *asked, "16GB", code=1)
    assert not any(entry["chosen"] for entry in made) and made[0]["nearest"]["strategy"]
    monkeypatch.setattr(program, "COMMON", (get("rtx4060"), get("h100")))
    assert "nothing fits" in output(capsys, "--preset", "2b", "--gpu", "all", "--host_memory", "16GB")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpu", "rtx3091"), "did you mean RTX 3090"),
        (("--gpu", "rtx2050"), "not listed is planned for as one that is, such as --gpu rtx3080 --gpu_memory 12GB"),
        (("--gpu", "t4", "--host_memory", "much"), "no size of memory"),
        (("--gpu", "t4", "--gpus", "3"), "shared by 3 cards evenly: --batch_tokens 522240 would do"),
        (("--gpu", "t4", "--picture", "no/such/folder/x.png"), "No such file"),
        (("--gpu", "t4", "--micro_batch_size", "7"), "must divide"),
        (("--gpu", "t4", "--batch_tokens", "1"), "must be a multiple"),
        (("--gpu", "t4", "--network_gbit", "0"), "moves nothing"),
        (("--gpu", "t4", "--lr", "1"), "--lr is for training: beside its own flags plan takes a model's, n_layer"),
        (("--gpu", "t4", "--config", "a.json"), "--config is for training"),
        (("--gpu", "t4", "--n_layers", "3"), "did you mean '--n_layer'"),
        (("--gpu", "t4", "--learning_rate", "1"), "unknown flag '--learning_rate'\n"),
        (("--gpu", "t4", "--step", "1"), "unknown flag '--step'\n"),
        (("--gpu", "t4", "--hidden_size", "1"), "did you mean '--n_embd'"),
        (("--gpu", "t4", "--n_head", "3"), "must be a multiple of n_head"),
    ],
)
def test_mistakes_are_named(arguments, message, capsys):
    assert main(["--preset", "2b", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_reader_that_has_enough_is_no_mistake():
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "tools.plan", "--preset=gpt2", "--gpu=t4", "--micro_batch_size=8", "--json"]
    ended = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, cwd=Path(program.__file__).parents[1])
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (0, b"")


def test_columns_line_up():
    lines = table(["name", "size"], [["a", "1"], ["longer", "10,000"]]).splitlines()
    assert lines == ["name      size", "a            1", "longer  10,000"]


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GB", 24 << 30), ("24 GiB", 24 << 30), ("1.5", 3 << 29), ("512mb", 512 << 20), ("1TB", 1 << 40)],
)
def test_sizes_of_memory(text, size):
    assert parse_memory(text) == size


def test_a_cards_name_is_a_size_too():
    assert parse_memory("rtx3090") < 24 << 30
    with pytest.raises(ValueError, match="no size of memory"):
        parse_memory("lots")
