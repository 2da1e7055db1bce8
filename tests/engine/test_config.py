"""The configuration tree and its command line: what wins, what is refused and what the message says."""

import dataclasses
import errno
import json
import re
from pathlib import Path

import pytest
import torch

from engine import generate
from engine.command_line import parse
from engine.config import (
    PRESETS,
    Config,
    ConfigError,
    ModelConfig,
    OptimizerConfig,
    ReportConfig,
    StrategyConfig,
    from_dict,
    load_file,
    merge,
    preset,
    settings,
)
from engine.foreign_names import NAMES, REASONS
from engine.model import GPT
from engine.weights import write_hugging_face
from tests.engine.conftest import gpt, save_model


def flags(line: str) -> Config:
    return parse(line.split())[0]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_run(name):
    config = flags(f"--preset {name}")
    assert config.preset == name and config.run_dir == f"runs/{name}"
    assert config.optimizer.batch_tokens % config.model.block_size == 0
    assert config.optimizer.warmup_steps < config.optimizer.max_steps
    with torch.device("meta"):
        GPT(config.model)


def test_presets_leave_their_table_alone():
    before = json.dumps(PRESETS)
    config = flags("--preset gpt2 --n_layer 2 --lr 1")
    config.model.n_head = 1
    assert json.dumps(PRESETS) == before


def test_later_settings_win(tmp_path):
    file = tmp_path / "c.json"
    tree = {"preset": "gpt2", "model": {"n_layer": 5, "n_embd": 96}, "optimizer": {"lr": 0.5}, "seed": 7}
    file.write_text(json.dumps(tree))
    config = flags(f"--config {file} --n_layer 3 --min_lr=0.25")
    assert config.model.vocab_size == 50304  # default
    assert config.model.block_size == 1024 and config.optimizer.batch_tokens == 524_288  # preset
    assert (config.model.n_embd, config.optimizer.lr, config.seed) == (96, 0.5, 7)  # file
    assert (config.model.n_layer, config.optimizer.min_lr) == (3, 0.25)  # flags
    assert flags(f"--config {file} --preset 13m --n_embd=64").model.activation == "relu"  # not the file's preset


def test_dashes_and_underscores_are_the_same():
    config = flags("--max-steps 7 --grad-clip=0.5 --run-dir a-b --weight_decay 0")
    assert (config.optimizer.max_steps, config.optimizer.grad_clip, config.run_dir) == (7, 0.5, "a-b")


@pytest.mark.parametrize(
    "line, value",
    [
        ("", False),
        ("--compile", True),
        ("--compile true", True),
        ("--compile=FALSE", False),
        ("--compile off", False),
        ("--compile --seed 3", True),
    ],
)
def test_switches(line, value):
    assert flags(line).strategy.compile is value


@pytest.mark.parametrize(
    "line, value",
    [("", "auto"), ("--activation_checkpointing", "blocks"), ("--activation_checkpointing True", "blocks"),
     ("--activation_checkpointing=off", "none"), ("--activation_checkpointing selective", "selective"),
     ("--activation_checkpointing --seed 3", "blocks"), ("--activation_checkpointing auto", "auto")],
)  # fmt: skip
def test_a_switch_that_has_become_a_choice(line, value):
    assert flags(line).strategy.activation_checkpointing == value


@pytest.mark.parametrize(
    "saved, value", [(None, "auto"), (True, "blocks"), (False, "none"), ("offloaded", "offloaded")]
)
def test_configurations_saved_when_it_was_a_switch(saved, value):
    assert from_dict({"strategy": {"activation_checkpointing": saved}}).strategy.activation_checkpointing == value


@pytest.mark.parametrize("text, value", [("1000", 1000), ("1_000", 1000), ("1e3", 1000), ("1000.0", 1000)])
def test_whole_numbers(text, value):
    steps = flags(f"--max_steps {text}").optimizer.max_steps
    assert steps == value and type(steps) is int


@pytest.mark.parametrize(
    "line, said",
    [
        ("--n_layers 3", "unknown flag '--n_layers'; did you mean '--n_layer'?"),
        ("--max_step=3", "did you mean '--max_steps'?"),
        ("--learning-rate 3", "unknown flag '--learning_rate'; did you mean '--lr'?"),
        ("--N_BLOCKS 3", "did you mean '--n_layer'?"),
        ("--checkpoint-dir x", "did you mean '--run_dir'?"),
        ("--prompt x", "did you mean '--sample_prompt'?"),
        ("--start x", "unknown flag '--start'\n"),
        ("--batch_size 8", "unknown flag '--batch_size': a step is --batch_tokens, in tokens"),
        ("--grad_accum 8", "unknown flag '--grad_accum': it follows from --batch_tokens and"),
        ("--dropout=0.1", "unknown flag '--dropout=0.1': there is none: one epoch over the Pile needs none"),
        ("--n_la 3", "unknown flag '--n_la'"),  # no abbreviations: a new flag must not change what an old command means
        ("extra", "'extra' belongs to no flag: flags begin with --"),
        (
            "--train_file mine.bin",
            "--train_file mine.bin without --val_file, which would be data/val/pile_dev.bin: give both",
        ),
        (
            "--val_file mine.bin",
            "--val_file mine.bin without --train_file, which would be data/train/pile_train.bin: give both",
        ),
        ("--preset gpt3", "unknown preset 'gpt3'; known: 13m, gpt2,"),
        ("--preset gpt-2", "did you mean 'gpt2'?"),
        ("--n_layer x", "n_layer must be a whole number, got 'x'"),
        ("--n_layer 1.5", "n_layer must be a whole number, got '1.5'"),
        ("--n_layer inf", "n_layer must be a whole number"),
        ("--n_layer nan", "n_layer must be a whole number"),
        ("--lr fast", "lr must be a number, got 'fast'"),
        ("--lr", "--lr: expected one argument"),
        ("--lr nan", "lr must be positive, got nan"),
        ("--compile maybe", "compile must be true or false, got 'maybe'"),
        (
            "--activation_checkpointing selectiv",
            "must be one of auto, none, blocks, selective, offloaded; got 'selectiv'",
        ),
        ("--compile --activation_checkpointing offloaded", "offloaded cannot be compiled"),
        ("--schedule cosin", "schedule must be one of cosine, wsd, step; got 'cosin'; did you mean 'cosine'?"),
        ("--dtype float16", "dtype must be one of auto, fp32, bf16, fp16; got 'float16'"),
        ("--n_layer 0", "n_layer must be positive, got 0"),
        ("--norm_eps=-1e-5", "norm_eps must be finite and not negative, got -1e-05"),
        ("--z_loss nan", "z_loss must be finite and not negative, got nan"),
        ("--n_head 7", "n_embd (128) must be a multiple of n_head (7); 4 heads would do"),
        ("--positions rotary --n_embd 24", "rotary positions need an even head width, got 3"),
        ("--batch_tokens 1000", "batch_tokens (1000) must be a multiple of block_size (128); 1024 would do"),
        ("--lr 1e-5", "min_lr (0.0002) is above lr (1e-05); lower --min_lr as well"),
        ("--beta2 1", "beta2 must be in [0, 1)"),
        ("--seed -1", "seed must not be negative, got -1"),
        ("--zero_stage 4", "zero_stage must be 0, 1, 2 or 3, got 4"),
        ("--offload params --zero_stage 2", "--offload params needs --zero_stage 3, got 2"),
        ("--offload optimizer --zero_stage 0", "--offload optimizer needs --zero_stage 1, 2 or 3"),
        ("--nvme_path x --zero_stage 3", "--nvme_path needs --offload"),
        ("--strategy resident --offload optimizer", "use --strategy zero"),
        ("--log_interval 0", "log_interval must be positive"),
        ("--keep_checkpoints=-1", "keep_checkpoints must not be negative, got -1"),
        ("--config nowhere.json", "cannot read the configuration nowhere.json: No such file"),
        ("--resume nowhere", "--resume nowhere: no checkpoint there"),
    ],
)
def test_what_cannot_work_is_refused(line, said):
    with pytest.raises(ConfigError) as error:
        flags(line)
    assert said in f"{error.value}\n"


@pytest.mark.parametrize(
    "tree, said",
    [
        ({"model": {"n_layers": 3}}, "c.json: unknown setting 'model.n_layers'; did you mean 'n_layer'?"),
        ({"n_layer": 3}, "unknown setting 'n_layer'; n_layer belongs in 'model'"),
        ({"optimizer": {"learning_rate": 1}}, "unknown setting 'optimizer.learning_rate'; did you mean 'lr'?"),
        ({"modle": {"n_layer": 3}}, "unknown setting 'modle'; did you mean 'model'?"),
        ({"model": {"lr": 3}}, "unknown setting 'model.lr'; lr belongs in 'optimizer'"),
        ({"model": {"seed": 3}}, "unknown setting 'model.seed'; seed belongs outside the sections"),
        ({"model": 3}, "model must hold settings, got 3"),
        ([1, 2], "must hold settings, got [1, 2]"),
        ({"model": {"n_layer": "3x"}}, "n_layer must be a whole number, got '3x'"),
        ({"model": {"n_layer": None}}, "n_layer must be a whole number, got 'None'"),
        ({"model": {"n_layer": True}}, "n_layer must be a whole number, got 'True'"),
        ({"model": {"n_layer": [3]}}, "n_layer must be a whole number"),
        ({"run_dir": 3}, "run_dir must be a string, got 3"),
        ({"strategy": {"compile": 2}}, "compile must be true or false, got '2'"),
        ({"preset": ["13m"]}, "unknown preset ['13m']"),
    ],
)
def test_a_file_that_cannot_work_is_refused(tmp_path, tree, said):
    file = tmp_path / "c.json"
    file.write_text(json.dumps(tree))
    with pytest.raises(ConfigError) as error:
        flags(f"--config {file}")
    assert said in str(error.value)


def test_a_file_that_begins_with_a_byte_order_mark_is_read(tmp_path):
    (tmp_path / "c.json").write_text('{"preset": "gpt2"}', encoding="utf-8-sig")
    assert load_file(tmp_path / "c.json") == {"preset": "gpt2"}


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe\x00", b""])
def test_a_file_that_is_no_json_is_refused(tmp_path, content):
    (tmp_path / "c.json").write_bytes(content)
    with pytest.raises(ConfigError, match="c.json is no JSON"):
        load_file(tmp_path / "c.json")


def test_a_saved_configuration_is_the_same_run(tmp_path):
    config = flags("--preset 2b --n_layer 2 --offload params --zero_stage 3 --document_masking --sample_prompt 你好")
    config.save(tmp_path / "config.json")
    assert flags(f"--config {tmp_path}/config.json") == config == from_dict(config.to_dict())


def test_resume_goes_on_with_the_saved_configuration(tmp_path):
    config = flags(f"--preset gpt2 --run_dir {tmp_path} --n_layer 3 --seed 9")
    config.save(tmp_path / "config.json")
    again, options = parse(["--resume", f"--run_dir={tmp_path}", "--max_steps=50000"])
    assert options.resume == "latest"
    config.optimizer.max_steps = 50_000
    assert again == config
    named, options = parse([f"--resume={tmp_path}"])
    assert options.resume == str(tmp_path) and named.model.n_layer == 3 and named.run_dir == str(tmp_path)


def test_a_run_that_was_moved_is_written_where_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = Path("big/2b/checkpoints/step_00000004")
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").touch()
    for folder in ("big/2b", checkpoint):
        flags("--preset 2b --run_dir runs/old").save(Path(folder) / "config.json")
    assert flags("--resume big/2b").run_dir == flags(f"--resume {checkpoint}").run_dir == "big/2b"
    assert flags("--resume --run_dir big/2b").run_dir == "big/2b"
    assert flags("--resume big/2b --run_dir runs/new").run_dir == "runs/new"
    alone = checkpoint.rename(tmp_path / "alone")
    assert flags(f"--resume {alone}").run_dir == "runs/old"
    alone.rename(checkpoint)
    monkeypatch.chdir(checkpoint)
    assert Path(flags("--resume .").run_dir).resolve() == tmp_path / "big/2b"


def test_a_configuration_is_laid_over_the_run_that_is_resumed(tmp_path):
    flags(f"--preset gpt2 --run_dir {tmp_path} --seed 9 --lr 1e-3 --n_layer 3").save(tmp_path / "config.json")
    (tmp_path / "my.json").write_text('{"optimizer": {"lr": 2e-3, "beta2": 0.9}}')
    config = flags(f"--resume {tmp_path} --config {tmp_path}/my.json --beta2 0.8")
    assert (config.seed, config.model.n_layer, config.optimizer.lr, config.optimizer.beta2) == (9, 3, 2e-3, 0.8)


@pytest.mark.parametrize("other", ["--preset 13m", "--config {}/other.json"])
def test_another_preset_than_the_runs_is_refused(tmp_path, other):
    flags(f"--preset gpt2 --run_dir {tmp_path}").save(tmp_path / "config.json")
    (tmp_path / "other.json").write_text('{"preset": "13m"}')
    for resume in (f"--resume {tmp_path}", f"--resume --run_dir {tmp_path}"):
        with pytest.raises(ConfigError, match=f"--preset 13m: {tmp_path} is a run of gpt2: leave --preset out"):
            flags(f"{resume} {other.format(tmp_path)}")
        assert flags(f"{resume} --preset gpt2").preset == "gpt2"


def test_a_configuration_is_saved_whole_or_not_at_all(tmp_path, monkeypatch):
    flags("--seed 1").save(tmp_path / "config.json")

    def cut_off(path, text):
        path.write_bytes(b"{")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", cut_off)
    with pytest.raises(OSError, match="No space"):
        flags("--seed 2").save(tmp_path / "config.json")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert load_file(tmp_path / "config.json")["seed"] == 1


def test_the_launchers_flag_is_no_setting():
    config, options = parse(["--local_rank=2", "--seed=4"])
    assert options.local_rank == 2 and config.seed == 4 and options.resume is None


def test_help_lists_every_setting(capsys):
    with pytest.raises(SystemExit) as exit:
        parse(["--help"])
    assert exit.value.code == 0
    shown = capsys.readouterr().out
    for section in (Config, ModelConfig, OptimizerConfig, StrategyConfig, ReportConfig):
        for field in dataclasses.fields(section):
            assert "help" not in field.metadata or f"--{field.name} " in shown, field.name


def test_help_shows_a_default_only_where_no_preset_decides(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for name, default in (
        ("lr X", "preset's"),
        ("batch_tokens N", "preset's"),
        ("beta2 X", "0.95"),
        ("zero_stage N", "auto"),
    ):
        assert shown.split(f"--{name} ")[-1].partition("[")[2].startswith(f"{default}]"), name


def test_a_training_file_beside_the_usual_validation_file():
    line = "--train_file mine.bin --val_file data/val/pile_dev.bin"
    assert flags(line).data.train_file == "mine.bin"
    assert flags("--train_file data/train/pile_train.bin") == flags("")


def test_merge_is_deep_and_leaves_its_arguments():
    a, b = {"x": {"p": 1, "q": 2}, "y": 1}, {"x": {"q": 3}, "y": {"z": 4}}
    assert merge(a, b) == {"x": {"p": 1, "q": 3}, "y": {"z": 4}}
    assert a == {"x": {"p": 1, "q": 2}, "y": 1} and preset("13m")["preset"] == "13m"


def test_resume_goes_on_with_the_run_that_the_configuration_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for run_dir, seed in (("runs/13m", 1), ("runs/mine", 2)):
        (tmp_path / run_dir).mkdir(parents=True)
        parse(["--preset=gpt2", f"--run_dir={run_dir}", f"--seed={seed}"])[0].save(tmp_path / run_dir / "config.json")
    (tmp_path / "my.json").write_text('{"preset": "gpt2", "run_dir": "runs/mine"}')
    config = parse(["--config=my.json", "--resume"])[0]
    assert (config.run_dir, config.seed) == ("runs/mine", 2)


@pytest.mark.parametrize(
    "flag", ["--lr=inf", "--weight_decay=inf", "--adam_eps=0", "--lr_decay_step=-4", "--grad_clip=nan"]
)
def test_numbers_that_train_nothing_are_refused(flag):
    with pytest.raises(ConfigError, match=flag[2:].partition("=")[0]):
        parse([flag])


def test_names_from_elsewhere_lead_to_flags_that_there_are():
    options = generate.parse(["--model_path=x"])
    ours = {*settings(), "resume", *vars(options)}
    named = [name for names in NAMES.values() for name in names.split()]
    named += re.findall(r"--(\w+)", " ".join(REASONS.values()))
    assert set(named) <= ours and not (NAMES.keys() | REASONS.keys()) & ours and not NAMES.keys() & REASONS.keys()


def test_weights_to_begin_with_bring_their_shape(tmp_path):
    ours = gpt(vocab_size=50257, positions="rotary", z_loss=0.1)
    write_hugging_face(tmp_path / "hf", ours.config, ours.state_dict(), "gpt-neox")
    config, options = parse([f"--init_from={tmp_path}/hf", "--z_loss=0.5", "--lr=0.1"])
    padded = dataclasses.replace(ours.config, vocab_size=50304, z_loss=0.5)
    assert options.shape_from_weights and config.model == padded
    assert (config.preset, config.optimizer.max_steps, config.optimizer.lr) == ("13m", 1000, 0.1)
    (tmp_path / "c.json").write_text("{}")
    for other in ("--preset=13m", "--n_layer=1", f"--config={tmp_path}/c.json"):
        config, options = parse([f"--init_from={tmp_path}/hf", other])
        assert not options.shape_from_weights and config.model.n_embd == 128
    ours = save_model(tmp_path / "m.safetensors", gpt(z_loss=0.1))
    assert flags(f"--init_from {ours}").model == ModelConfig(
        n_layer=2, n_head=3, n_embd=24, block_size=16, vocab_size=64
    )
    with pytest.raises(ConfigError, match="--init_from: .*none is missing"):
        flags(f"--init_from {tmp_path}/none")
