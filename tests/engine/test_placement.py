"""Open choices are made by the planner on a card and by plain defaults without one; what a person set is kept."""

from dataclasses import dataclass, replace

import pytest
import torch

from engine import device, placement
from engine.cards import Card, GiB, get
from engine.command_line import parse
from engine.config import ConfigError, StrategyConfig
from engine.distributed import Processes
from engine.memory import plan
from engine.schedule import decay_length, learning_rate

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def on_card(monkeypatch):
    """on_card("rtx3090", 64): plan as if that card and so many GiB of host memory were here."""

    def pretend(card: str | Card, host_gib: int) -> None:
        monkeypatch.setattr(placement, "card_of", lambda device: get(card) if isinstance(card, str) else card)
        monkeypatch.setattr(device.psutil, "virtual_memory", lambda: type("Memory", (), {"total": host_gib * GiB}))

    return pretend


@dataclass(frozen=True)
class Together(Processes):
    """Stands for a process among others, which have `others`' cards and host memories."""

    others: tuple = ()

    def gather(self, value):
        return [*(self.others or [value] * (self.world_size - 1)), value]


def settled(*flags: str, device=CUDA, dtype=torch.bfloat16, world_size=1, others=()):
    processes = Together(world_size=world_size, others=others)
    return placement.settle(parse(list(flags))[0], device, dtype, processes)


@pytest.mark.parametrize(
    "flags, world_size, strategy, stage",
    [
        ([], 1, "resident", None),
        ([], 2, "zero", 1),
        (["--zero_stage=2"], 1, "zero", 2),
        (["--offload=params"], 1, "zero", 3),
        (["--offload=states"], 2, "resident", None),
    ],
)
def test_without_a_card(flags, world_size, strategy, stage):
    config, grad_accum, chosen = settled("--preset=13m", *flags, device=CPU, dtype=torch.float32, world_size=world_size)
    assert (config.strategy.strategy, config.strategy.zero_stage, chosen) == (strategy, stage, None)
    assert config.optimizer.micro_batch_size * grad_accum * world_size * 128 == config.optimizer.batch_tokens
    assert config.strategy.weights == config.strategy.moments == "fp32"


@pytest.mark.parametrize(
    "flags, warmup_steps",
    [
        ([], 50),  # the preset's
        (["--decay_steps=950"], 50),
        (["--decay_steps=951", "--max_steps=1001", "--warmup_steps=50"], 50),
        (["--decay_steps=900", "--max_steps=1000"], 50),
        (["--max_steps=60"], 6),  # 50 and a decay of 12 would meet
        (["--max_steps=60", "--warmup_steps=48"], 48),
    ],
)
def test_a_warm_up_ends_before_the_decay_begins(flags, warmup_steps):
    config, _, _ = settled("--preset=13m", "--schedule=wsd", *flags, device=CPU, dtype=torch.float32)
    options = config.optimizer
    assert options.warmup_steps == warmup_steps
    rates = [learning_rate(step, options) for step in range(options.max_steps)]
    falls = [before - after for before, after in zip(rates[warmup_steps - 1 :], rates[warmup_steps:])]
    assert max(rates) == options.lr and max(falls) == pytest.approx(
        (options.lr - options.min_lr) / decay_length(options)
    )


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--max_steps=60", "--warmup_steps=49"], "--warmup_steps 49 and a decay of 12 are more than the 60 steps"),
        (
            ["--decay_steps=1001"],
            "--decay_steps 1001 is all of the 1000 steps of --max_steps: --decay_steps 200 would do",
        ),
    ],
)
def test_a_persons_own_warm_up_that_meets_the_decay_is_refused(flags, said):
    with pytest.raises(ConfigError, match=said):
        settled("--preset=13m", "--schedule=wsd", *flags, device=CPU, dtype=torch.float32)


def test_a_card_gets_the_plan_that_fits(on_card):
    on_card("rtx3090", 64)
    config, grad_accum, chosen = settled("--preset=2b")
    assert chosen.fits
    assert config.strategy.weights == "residual" and config.strategy.moments == "int8"
    assert config.optimizer.micro_batch_size * grad_accum * 2048 == config.optimizer.batch_tokens == 524_288
    assert chosen.settings["strategy"].items() <= placement.asdict(config.strategy).items()
    assert any("GiB on the card" in line for line in placement.explain(chosen))
    assert any(
        "Not chosen: fp32 weights and moments on the card: would take" in line for line in placement.explain(chosen)
    )


def test_formats_that_no_plan_has_together_are_named_and_not_called_too_large(on_card):
    on_card("rtx3090", 64)
    with pytest.raises(ConfigError, match="no way that is all of .*'moments': 'bf16'"):
        settled("--preset=13m", "--moments=bf16")


@pytest.mark.parametrize(
    "flags",
    [
        ["--zero_stage=1", "--compile"],
        ["--zero_stage=1", "--weights=residual"],
        ["--strategy=resident", "--zero_stage=2"],
        ["--deepspeed_config=mine.json"],
    ],
)
def test_what_would_be_ignored_is_refused(flags):
    with pytest.raises(ConfigError, match="strategy"):
        settled("--preset=13m", *flags, device=CPU, dtype=torch.float32)


def test_a_compiled_model_in_several_processes_is_not_deepspeeds():
    assert (
        settled("--preset=13m", "--compile", device=CPU, dtype=torch.float32, world_size=2)[0].strategy.strategy
        == "resident"
    )


def test_what_needs_deepspeed_is_not_chosen_where_it_is_not_installed(on_card, monkeypatch):
    on_card("quadro rtx 8000", 64)
    assert settled("--preset=2b", dtype=torch.float16)[2].method.stage
    monkeypatch.setattr(placement, "find_spec", lambda name: None)
    config, _, chosen = settled("--preset=2b", dtype=torch.float16)
    assert config.strategy.strategy == "resident" and "DeepSpeed is not installed" in placement.explain(chosen)[0]
    assert settled("--preset=2b", "--zero_stage=1", dtype=torch.float16)[2].method.stage == 1  # its own error says more


def test_the_host_memory_that_is_asked_for_is_planned_with(on_card):
    on_card("gtx1080ti", 64)
    more, less = (settled("--preset=2b", f"--host_memory={size}", dtype=torch.float16)[2] for size in ("", "12GB"))
    assert more.host_limit > 12 * GiB >= less.host_bytes and more.name != less.name
    with pytest.raises(ConfigError, match="--host_memory: 'much' is no size of memory"):
        settled("--preset=2b", "--host_memory=much")


@pytest.mark.parametrize(
    "flag, field, value",
    [
        ("--strategy=zero", "strategy", "zero"),
        ("--offload=optimizer", "offload", "optimizer"),
        ("--weights=stochastic", "weights", "stochastic"),
        ("--activation_checkpointing=true", "activation_checkpointing", "blocks"),
        ("--activation_checkpointing=selective", "activation_checkpointing", "selective"),
        ("--activation_checkpointing=offloaded", "activation_checkpointing", "offloaded"),
        ("--activation_checkpointing=none", "activation_checkpointing", "none"),
        ("--recomputed_blocks=7", "recomputed_blocks", 7),
    ],
)
def test_what_a_person_set_is_kept(on_card, flag, field, value):
    on_card("rtx3090", 64)
    config, _, chosen = settled("--preset=2b", flag)
    assert getattr(config.strategy, field) == value == chosen.settings["strategy"][field]


def test_the_smallest_card_updates_inside_the_backward_pass_without_clipping(on_card):
    on_card("rtx3080", 16)
    config, grad_accum, chosen = settled("--preset=2b")
    assert chosen.method.in_backward and config.strategy.optimizer_in_backward
    assert grad_accum == 1 and config.optimizer.grad_clip == 0
    assert config.optimizer.batch_tokens == config.optimizer.micro_batch_size * 2048


@pytest.mark.parametrize("flag", ["--batch_tokens=262144", "--grad_clip=0.5"])
def test_a_batch_and_a_clipping_that_a_person_set_are_kept_or_refused(on_card, flag):
    on_card("rtx3080", 16)
    with pytest.raises(ConfigError, match=r"--batch_tokens (\d+) --grad_clip 0 would do") as refused:
        settled("--preset=2b", flag)
    would = str(refused.value).partition(": ")[2].split()
    config, grad_accum, chosen = settled(
        "--preset=2b", *(f"{name}={value}" for name, value in zip(would[::2], would[1:4:2]))
    )
    assert chosen.method.in_backward and grad_accum == 1 and config.optimizer.batch_tokens == int(would[1])
    on_card("rtx3080", 64)
    name, value = flag.removeprefix("--").split("=")
    assert getattr(settled("--preset=2b", flag)[0].optimizer, name) == float(value)


def test_a_compiled_model_is_not_given_what_cannot_be_compiled(on_card):
    on_card("rtx3080", 64)
    assert settled("--preset=2b")[2].recompute.kind == "offloaded"
    config, _, chosen = settled("--preset=2b", "--compile")
    assert config.strategy.compile and chosen.recompute.kind in ("blocks", "selective") and not chosen.method.stage
    with pytest.raises(ConfigError, match="offloaded cannot be compiled"):
        settled("--preset=2b", "--compile", "--activation_checkpointing=offloaded")


def test_a_number_of_recomputed_blocks_asks_for_recomputation():
    assert (
        settled("--preset=gpt2", "--recomputed_blocks=3", device=CPU)[0].strategy.activation_checkpointing == "blocks"
    )
    assert settled("--preset=gpt2", device=CPU)[0].strategy.activation_checkpointing == "none"


def test_all_blocks_are_recomputed_where_so_many_are_asked_for(on_card):
    on_card("h100", 64)
    recompute = settled("--preset=gpt2", "--recomputed_blocks=12")[2].recompute
    assert recompute.kind != "none" and recompute.layers == 12
    kept = settled("--preset=gpt2", "--recomputed_blocks=12", "--activation_checkpointing=none")[2].recompute
    assert kept.layers == 0  # as a run's resolved.json has it


def test_what_fits_nowhere_is_refused_with_what_would(on_card):
    on_card("rtx3080", 16)
    with pytest.raises(ConfigError, match="it fits "):
        settled("--preset=3b", "--weights=fp32")


def test_what_is_said_to_fit_fits(on_card):
    """Formats that somebody set keep more host memory from helping: what helps is to leave them open."""
    exact = ["--strategy=resident", "--weights=fp32", "--moments=fp32"]
    on_card("rtx3090", 64)
    with pytest.raises(ConfigError, match="it fits without --strategy resident --weights fp32 --moments fp32;"):
        settled("--preset=2b", *exact)
    assert settled("--preset=2b")[2].fits
    with pytest.raises(ConfigError, match="it fits without --strategy resident --micro_batch_size 256;"):
        settled("--preset=2b", "--strategy=resident", "--micro_batch_size=256")
    on_card("rtx3060", 16)
    with pytest.raises(ConfigError, match="it fits on the MI210;"):
        settled("--preset=3b", *exact)
    on_card("mi210", 16)
    assert settled("--preset=3b", *exact)[2].fits


def test_a_drive_takes_what_host_memory_does_not(on_card):
    asked = ["--preset=2b", "--zero_stage=3", "--offload=params"]
    on_card("rtx3080", 24)
    with pytest.raises(ConfigError, match="it fits without --zero_stage 3 --offload params;"):
        settled(*asked)
    config, _, chosen = settled(*asked, "--nvme_path=/nvme")
    assert chosen.method.nvme and "optimizer and parameters on a drive" in chosen.title
    assert 8 * GiB < chosen.host_bytes < 20 * GiB  # of which 8 are gradients, which DeepSpeed keeps in fp32
    cpu = dict(device=CPU, dtype=torch.float32)
    with pytest.raises(ConfigError, match="there are 24.0 GiB of memory"):
        settled(*asked, **cpu)
    settled(*asked, "--nvme_path=/nvme", **cpu)


def test_states_that_a_cpus_memory_cannot_hold_are_refused_with_what_would(on_card):
    cpu = dict(device=CPU, dtype=torch.float32)
    on_card("h100", 24)
    with pytest.raises(ConfigError) as refused:
        settled("--preset=2b", **cpu)
    assert "take 30.1 GiB, and there are 24.0 GiB of memory" in str(refused.value)
    assert "--weights residual --moments int8, or --preset gpt2-xl, would fit" in str(refused.value)
    settled("--preset=2b", "--weights=residual", "--moments=int8", **cpu)
    settled("--preset=2b", "--host_memory=32GB", **cpu)
    on_card("h100", 1)
    with pytest.raises(ConfigError, match="of memory: --preset 13m, would fit"):
        settled("--preset=2b", **cpu)
    with pytest.raises(ConfigError, match="of memory: --weights residual --moments int8, or --preset 13m, would fit"):
        settled("--preset=gpt2", **cpu)


def test_kernels_that_a_cpu_does_not_have_are_refused(monkeypatch):
    monkeypatch.setattr(placement.dispatch, "interpreting", lambda: False)
    with pytest.raises(ConfigError, match="--kernels triton: Triton has no CPU"):
        settled("--preset=13m", "--kernels=triton", device=CPU, dtype=torch.float32)


def test_every_plan_is_a_valid_configuration():
    for candidate in plan(parse(["--preset=gpt2"])[0].model, get("rtx3090"), 64 * GiB):
        StrategyConfig(**candidate.settings["strategy"])


def test_all_processes_plan_for_the_least_memory_of_any(on_card):
    """Else one would stream its states where another shares them, and each wait for the other."""
    on_card("rtx3080", 64)
    whole, desktop = get("rtx3080"), replace(get("rtx3080"), memory_bytes=8 * GiB)
    alone = settled("--preset=2b", world_size=2)[0]
    behind = settled("--preset=2b", world_size=2, others=((desktop, 64 * GiB),))[0]
    assert alone.strategy != behind.strategy
    on_card(desktop, 64)
    assert settled("--preset=2b", world_size=2, others=((whole, 64 * GiB),))[0] == behind
    on_card("rtx3080", 64)
    lacking = settled("--preset=2b", world_size=2, others=((whole, 24 * GiB),))[2]
    assert lacking.host_bytes <= lacking.host_limit < 24 * GiB
    with pytest.raises(ConfigError, match="there are 24.0 GiB of memory"):
        settled("--preset=2b", device=CPU, dtype=torch.float32, world_size=2, others=((None, 24 * GiB),))


def test_what_was_excluded_is_not_said_to_be_slower(on_card):
    on_card("h100", 64)
    said = settled("--preset=gpt2", "--weights=stochastic")[2].why
    assert said.count("excluded by what is set") == 2 and "slower" not in said
