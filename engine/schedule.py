"""Learning rate by step."""

import math

from engine.config import OptimizerConfig


def learning_rate(step: int, config: OptimizerConfig) -> float:
    """Return the learning rate of `step` (0 is the first).

    All schedules warm up linearly over warmup_steps. Then `cosine` falls to min_lr at max_steps; `wsd` (warm-up,
    stable, decay: Hu et al., MiniCPM, 2024) stays at lr and falls linearly to min_lr over the last decay_steps; `step`
    (the classic script's) drops from lr to min_lr after step lr_decay_step.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "step":
        return config.lr if step <= config.lr_decay_step else config.min_lr
    last = max(config.max_steps - 1, 1)
    if config.schedule == "cosine":
        progress = (step - config.warmup_steps) / max(last - config.warmup_steps, 1)
        return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2
    decay = decay_length(config)
    progress = (step - (last - decay)) / decay
    return config.lr + (config.min_lr - config.lr) * min(max(progress, 0.0), 1.0)


def decay_length(config: OptimizerConfig) -> int:
    """Return how many of a run's last steps wsd's final decay takes; 0 for other schedules."""
    return (config.decay_steps or max(config.max_steps // 5, 1)) if config.schedule == "wsd" else 0


def never_drops(config: OptimizerConfig) -> list[str]:
    """Return the line that says of the step schedule that its drop comes after the run's end, where it does."""
    if config.schedule != "step" or config.lr_decay_step < config.max_steps - 1:
        return []
    return [
        f"schedule: the learning rate stays at {config.lr:g}: "
        f"--lr_decay_step {config.lr_decay_step} is not before the last of {config.max_steps} steps"
    ]


def new_length(before: int, config: OptimizerConfig) -> list[str]:
    """Return the line that says what another max_steps than `before` does to a schedule under way, if anything."""
    if config.schedule == "step" or config.max_steps == before:
        return []
    return [
        f"schedule: of {before} steps when the checkpoint was saved, of {config.max_steps} from here on: "
        f"the {config.schedule} schedule's learning rates are those of the new length"
    ]
