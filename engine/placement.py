"""What a run leaves open, settled: strategy, formats, recomputation, micro-batch. With a card the planner chooses."""

import copy
from dataclasses import asdict, replace
from importlib.util import find_spec

import torch

from engine.cards import DTYPE_NAMES, Card, GiB
from engine.config import PRESETS, Config, ConfigError, ModelConfig, OptimizerConfig, StrategyConfig, require
from engine.device import card_of, host_memory
from engine.distributed import Processes
from engine.footprint import METHODS, Method, on_nvme, states_bytes
from engine.memory import Plan, Setup, choose, nearest, reason
from engine.schedule import decay_length
from kernels import dispatch

CPU_MICRO_BATCH_TOKENS = 8192  # beyond this a CPU gains nothing and the activations leave its caches
NO_DEEPSPEED = "DeepSpeed is not installed, so what needs it is left out"
_OPEN = (None, "auto")
_LEFT_AS_IT_IS = ("device", "dtype", "kernels", "compile", "host_memory")  # the planner does not choose these
_EXACT = ("auto", "fp32")


def settle(
    config: Config, device: torch.device, dtype: torch.dtype, processes: Processes, card: Card | None = None
) -> tuple[Config, int, Plan | None]:
    """Return `config` with every open choice made, the accumulation steps, and on a card the plan that made them.

    What a person has set is kept. All processes call it, and choose the same: what fits the one with the least memory.
    ConfigError where nothing fits, with the nearest thing that does, or where the batch cannot be shared evenly. card:
    plan for this one, with what memory the device leaves, not for the device.
    """
    config, world_size = copy.deepcopy(config), processes.world_size
    here = card_of(device) if device.type == "cuda" else None
    cards, hosts = zip(*processes.gather((here, host_memory(config.strategy.host_memory))))
    host = min(hosts)
    sequences = config.optimizer.batch_tokens // config.model.block_size
    require(
        sequences % world_size == 0,
        f"batch_tokens ({config.optimizer.batch_tokens}) is {sequences} sequences, "
        f"which {world_size} processes cannot share evenly",
    )
    mine, micro = sequences // world_size, config.optimizer.micro_batch_size
    require(
        not micro or mine % micro == 0,
        f"micro_batch_size ({micro}) must divide the {mine} sequences of a process and step",
    )
    chosen = None
    if here:
        least = min(cards, key=lambda c: c.memory_bytes)
        card = replace(card, memory_bytes=min(card.memory_bytes, least.memory_bytes)) if card else least
        chosen = _plan(config, card, host, dtype, world_size)
    _shorten_warmup(config)
    if chosen:
        _fill(config, chosen.settings["strategy"])
        for key, value in chosen.settings["optimizer"].items():
            setattr(config.optimizer, key, value)
        _refuse_what_is_unused(config)
        return config, chosen.grad_accum, chosen
    strategy = config.strategy
    zero = strategy.strategy == "zero" or (strategy.strategy == "auto" and _asks_for_zero(config, world_size))
    stage = 3 if strategy.offload == "params" else 1
    _fill(
        config, {"strategy": "zero" if zero else "resident", "zero_stage": stage if zero else None, "offload": "none"}
    )
    _fill(config, {"weights": "fp32", "moments": "fp32", "optimizer_in_backward": False})
    kind = "blocks" if strategy.recomputed_blocks else "none"
    _fill(config, {"activation_checkpointing": kind, "recomputed_blocks": config.model.n_layer})
    if not micro:
        fits = max(1, CPU_MICRO_BATCH_TOKENS // config.model.block_size)
        micro = max(size for size in range(1, min(mine, fits) + 1) if mine % size == 0)
        config.optimizer.micro_batch_size = micro
    _refuse_what_is_unused(config)
    triton = strategy.kernels != "triton" or dispatch.interpreting()
    require(triton, "--kernels triton: Triton has no CPU; leave it out, or give --kernels torch")
    _refuse_what_memory_cannot_hold(config, host, dtype, world_size)
    return config, mine // micro, None


def explain(chosen: Plan) -> list[str]:
    """Return the lines that say what was chosen, why, and what it is predicted to hold."""
    missing = [] if find_spec("deepspeed") else [f"plan: {NO_DEEPSPEED}"]
    parts = ", ".join(
        f"{part.replace('_', ' ')} {size / GiB:.2f}" for part, size in chosen.footprint.card.items() if size
    )
    return missing + [
        f"plan: {chosen.title}; tools/plan.py shows the others",
        f"plan: {chosen.why}",
        f"plan: {chosen.footprint.card_bytes / GiB:.2f} GiB on the card ({parts}), "
        f"{chosen.host_bytes / GiB:.1f} GiB on the host",
    ]


def _refuse_what_is_unused(config: Config) -> None:
    """ConfigError for what a person has set and the choices made leave without effect."""
    used = config.strategy.strategy == "zero" or not config.strategy.deepspeed_config
    require(used, "--deepspeed_config is ZeRO's, which is not what was chosen: --strategy zero")


def _shorten_warmup(config: Config) -> None:
    """Shorten a preset's warm-up that would be all of a run, or meet wsd's decay, as a smaller max_steps makes it.

    ConfigError for a person's own.
    """
    options, decay = config.optimizer, decay_length(config.optimizer)
    short = options.max_steps // 10
    require(
        min(short, options.warmup_steps) + decay <= options.max_steps,
        f"--decay_steps {decay} is all of the {options.max_steps} steps of --max_steps: "
        f"--decay_steps {options.max_steps // 5} would do",
    )
    if options.warmup_steps >= options.max_steps or options.warmup_steps + decay > options.max_steps:
        taken = f" and a decay of {decay} are more than" if decay else " is all of"
        require(
            options.warmup_steps == _usual(config).warmup_steps,
            f"--warmup_steps {options.warmup_steps}{taken} the {options.max_steps} steps of --max_steps: "
            f"--warmup_steps {short} would do",
        )
        options.warmup_steps = short


def _refuse_what_memory_cannot_hold(config: Config, limit: int, dtype: torch.dtype, world_size: int) -> None:
    """ConfigError where a CPU's memory is less than states alone take: the system would end the run without a word."""
    strategy, name = config.strategy, DTYPE_NAMES[dtype]
    ours = {key: getattr(strategy, key) for key in ("weights", "moments")} | {
        "in_backward": bool(strategy.optimizer_in_backward)
    }
    method = Method(
        name="",
        title="",
        rank=0,
        stage=strategy.zero_stage or 0,
        offload=strategy.offload if strategy.zero_stage else "none",
        nvme=bool(strategy.nvme_path),
        **ours,
    )
    needed = states_bytes(config.model, method, name, world_size)
    if needed <= limit:
        return
    compact = [
        m
        for m in METHODS
        if not (m.stage or m.streamed or m.in_backward) and states_bytes(config.model, m, name) <= limit
    ]
    smaller = [key for key in PRESETS if states_bytes(ModelConfig(**PRESETS[key]["model"]), METHODS[0], name) <= limit]
    would = [f"--weights {m.weights} --moments {m.moments}" for m in compact[:1]] + [
        f"--preset {key}" for key in smaller[-1:]
    ]
    raise ConfigError(
        f"weights, gradients and moments of {config.preset} take {needed / GiB:.1f} GiB, "
        f"and there are {limit / GiB:.1f} GiB of memory"
        + (f": {', or '.join(would)}, would fit" if would else ": train a smaller model")
    )


def _usual(config: Config) -> OptimizerConfig:
    return OptimizerConfig(**PRESETS[config.preset]["optimizer"])


def _asks_for_zero(config: Config, world_size: int) -> bool:
    strategy = config.strategy
    if strategy.zero_stage is not None or strategy.offload in ("optimizer", "params"):
        return True
    compact = strategy.weights not in _EXACT or strategy.moments not in _EXACT
    only_resident = compact or strategy.compile or strategy.optimizer_in_backward or strategy.offload == "states"
    return world_size > 1 and not only_resident


def _plan(config: Config, card: Card, host: int, dtype: torch.dtype, world_size: int) -> Plan:
    setup = Setup(
        model=config.model,
        card=card,
        host_memory=host,
        gpus=world_size,
        batch_tokens=config.optimizer.batch_tokens,
        dtype=DTYPE_NAMES[dtype],
        micro_batch_size=config.optimizer.micro_batch_size or None,
        recomputed_blocks=config.strategy.recomputed_blocks,
        methods=tuple(map(on_nvme, METHODS)) if config.strategy.nvme_path else METHODS,
    )
    plans = setup.plans()
    ways = allowed(config, plans)
    if not ways:
        raise ConfigError(f"the planner knows no way that is all of {_set(config)}: leave some of it open, as auto")
    chosen = choose(_keeping_batch(config, ways))
    if chosen:
        return replace(chosen, why=reason(chosen, plans))
    if lesser := choose(ways):
        raise ConfigError(
            f"{card.memory_bytes / GiB:.1f} GiB leave only an update inside the backward pass, which neither "
            f"accumulates nor clips: --batch_tokens {lesser.batch_tokens} --grad_clip 0 would do"
        )
    raise ConfigError(
        f"no way that the settings allow fits {config.preset} into {card.memory_bytes / GiB:.1f} GiB"
        f"{_what_would_fit(config, setup)}; tools/plan.py shows all"
    )


def _set(config: Config) -> dict[str, object]:
    """Return what a person has set of the ways to run a step, where the planner would choose."""
    return {
        key: value
        for key, value in asdict(config.strategy).items()
        if value not in (*_OPEN, "") and key not in _LEFT_AS_IT_IS
    }


def _what_would_fit(config: Config, setup: Setup) -> str:
    """Return what to change where nothing fits: first what a person has set, then the machine."""
    kept = {key: getattr(config.strategy, key) for key in _LEFT_AS_IT_IS}
    opened = replace(config, strategy=StrategyConfig(**kept))
    given = _set(config) | ({"micro_batch_size": setup.micro_batch_size} if setup.micro_batch_size else {})
    flags = " ".join(f"--{key} {value}" for key, value in given.items())
    plans = replace(setup, recomputed_blocks=None, micro_batch_size=None, methods=METHODS).plans()
    if flags and choose(_keeping_batch(config, allowed(opened, plans))):
        return f"; it fits without {flags}"
    found = nearest(setup, lambda plans: _keeping_batch(config, allowed(config, plans)))
    return f"; it fits {found[0]}" if found else ""


def allowed(config: Config, plans: list[Plan]) -> list[Plan]:
    """Return the plans that contradict nothing that a person has set."""
    if config.strategy.recomputed_blocks and config.strategy.activation_checkpointing == "auto":
        plans = [p for p in plans if p.recompute.layers]
    asked = {key: value for key, value in asdict(config.strategy).items() if value not in _OPEN}
    if config.strategy.compile:  # which offloaded inputs and DeepSpeed's engine cannot be
        plans = [p for p in plans if p.recompute.kind != "offloaded" and not p.method.stage]
    if not (find_spec("deepspeed") or config.strategy.strategy == "zero" or _asks_for_zero(config, 1)):
        plans = [p for p in plans if not p.method.stage]
    return [p for p in plans if all(asked.get(key, value) == value for key, value in p.settings["strategy"].items())]


def _keeping_batch(config: Config, plans: list[Plan]) -> list[Plan]:
    """Return the plans that take the batch and the clipping that a person has set, which differ from the preset's."""
    usual, asked = _usual(config), config.optimizer
    batch_is_set, clipping_is_set = (
        asked.batch_tokens != usual.batch_tokens,
        asked.grad_clip not in (0, usual.grad_clip),
    )
    return [p for p in plans if (p.keeps_batch or not batch_is_set) and not (p.method.in_backward and clipping_is_set)]


def _fill(config: Config, values: dict[str, object]) -> None:
    for key, value in values.items():
        if getattr(config.strategy, key) in _OPEN:
            setattr(config.strategy, key, value)
