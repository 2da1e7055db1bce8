"""The typed configuration tree, and the presets."""

import dataclasses
import difflib
import json
import math
import re
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from engine.foreign_names import NAMES, REASONS
from engine.whole_file import whole_file

MAX_SEED = 2**63 - 1  # PyTorch's generators take no more


class ConfigError(ValueError):
    """A setting that cannot work; the message says which, why, and what to use instead."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """The shape of the GPT."""

    n_layer: int = field(default=1, metadata={"help": "transformer blocks"})
    n_head: int = field(default=8, metadata={"help": "attention heads a block"})
    n_embd: int = field(default=128, metadata={"help": "width of the residual stream"})
    block_size: int = field(default=128, metadata={"help": "context length, in tokens"})
    vocab_size: int = field(default=50304, metadata={"help": "rows of the embedding (r50k's 50257 rounded up to 64)"})
    positions: Literal["learned", "rotary"] = field(default="learned", metadata={"help": "position encoding"})
    activation: Literal["gelu_tanh", "gelu", "relu"] = field(default="gelu_tanh", metadata={"help": "of the MLP"})
    bias: bool = field(default=True, metadata={"help": "biases on the output projection and the MLP"})
    qkv_bias: bool = field(default=True, metadata={"help": "biases on query, key and value"})
    head_bias: bool = field(default=False, metadata={"help": "a bias on the language-model head"})
    tie_head: bool = field(default=True, metadata={"help": "share the head's matrix with the token embedding"})
    norm_eps: float = field(default=1e-5, metadata={"help": "LayerNorm's epsilon"})
    z_loss: float = field(
        default=0.0, metadata={"help": "weight of the squared log-partition in the loss (PaLM, 2022)"}
    )

    def __post_init__(self) -> None:
        for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size"):
            require(getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)}")
        require(
            self.n_embd % self.n_head == 0,
            f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head}); "
            f"{max(h for h in range(1, self.n_head + 1) if self.n_embd % h == 0)} heads would do",
        )
        for name in ("norm_eps", "z_loss"):
            require(
                0 <= getattr(self, name) < math.inf,
                f"{name} must be finite and not negative, got {getattr(self, name)}",
            )
        if self.positions == "rotary":
            require(self.head_dim % 2 == 0, f"rotary positions need an even head width, got {self.head_dim}")

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head


def differences(there: dict[str, Any], here: ModelConfig) -> list[str]:
    """List the settings that differ between another model and `here`, for which weights of one do not fit the other."""
    return [
        f"{k} is {there.get(k)} there and {v} here"
        for k, v in dataclasses.asdict(here).items()
        if k != "z_loss" and there.get(k) != v
    ]


def model_flags(there: ModelConfig, here: ModelConfig) -> str:
    """Return the flags that make `here` the other model."""
    asked, given = dataclasses.asdict(there), dataclasses.asdict(here)
    return " ".join(f"--{k} {_as_typed(v)}" for k, v in asked.items() if k != "z_loss" and given[k] != v)


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Where the tokens are and how they are cut."""

    train_file: str = field(default="data/train/pile_train.bin", metadata={"help": "prepared training tokens"})
    val_file: str = field(default="data/val/pile_dev.bin", metadata={"help": "prepared validation tokens"})
    document_masking: bool = field(default=False, metadata={"help": "attention stops at <|endoftext|>"})


@dataclass(kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW, its batch and its schedule."""

    max_steps: int = field(default=1000, metadata={"help": "optimizer steps in all"})
    batch_tokens: int = field(default=4096, metadata={"help": "tokens a step, over all processes and accumulation"})
    micro_batch_size: int = field(default=0, metadata={"help": "sequences a forward pass; 0: the largest that fits"})
    lr: float = field(default=1e-3, metadata={"help": "peak learning rate"})
    schedule: Literal["cosine", "wsd", "step"] = field(default="cosine", metadata={"help": "learning-rate schedule"})
    warmup_steps: int = field(default=50, metadata={"help": "linear warm-up"})
    min_lr: float = field(default=1e-4, metadata={"help": "where cosine and wsd end, and where step drops to"})
    decay_steps: int = field(default=0, metadata={"help": "wsd: length of the final decay; 0: a fifth of max_steps"})
    lr_decay_step: int = field(default=50_000, metadata={"help": "step: the last step at the peak rate"})
    weight_decay: float = field(default=0.1, metadata={"help": "decoupled, on matrices only"})
    beta1: float = field(default=0.9, metadata={"help": "decay of the first moment"})
    beta2: float = field(default=0.95, metadata={"help": "decay of the second moment"})
    adam_eps: float = field(default=1e-8, metadata={"help": "AdamW's epsilon"})
    grad_clip: float = field(default=1.0, metadata={"help": "largest global gradient norm; 0: no clipping"})
    max_bad_steps: int = field(default=5, metadata={"help": "non-finite steps in a row that stop the run"})

    def __post_init__(self) -> None:
        for name in ("max_steps", "batch_tokens", "lr", "max_bad_steps", "adam_eps"):
            require(getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)}")
        for name in (
            "micro_batch_size", "warmup_steps", "min_lr", "decay_steps", "lr_decay_step", "weight_decay", "grad_clip"
        ):  # fmt: skip
            require(getattr(self, name) >= 0, f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"{name} must be in [0, 1), got {getattr(self, name)}")
        for name in ("lr", "min_lr", "weight_decay", "grad_clip", "adam_eps"):
            require(math.isfinite(getattr(self, name)), f"{name} must be finite, got {getattr(self, name)}")
        require(self.min_lr <= self.lr, f"min_lr ({self.min_lr:g}) is above lr ({self.lr:g}); lower --min_lr as well")


@dataclass(kw_only=True, slots=True)
class StrategyConfig:
    """How a step is run, and what is given up for memory.

    What is "auto" or None is chosen at the start, by the planner where there is a card (engine/placement.py).
    """

    strategy: Literal["auto", "resident", "zero"] = field(
        default="auto", metadata={"help": "resident: whole states in each process; zero: DeepSpeed's, shared"}
    )
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda or cuda:N"})
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = field(default="auto", metadata={"help": "of the computation"})
    kernels: Literal["auto", "triton", "torch"] = field(default="auto", metadata={"help": "kernel backend"})
    compile: bool = field(default=False, metadata={"help": "torch.compile the model"})
    activation_checkpointing: Literal["auto", "none", "blocks", "selective", "offloaded"] = field(
        default="auto",
        metadata={
            "help": "what recomputed blocks keep: their input; attention too; their input, in host memory",
            "also": {True: "blocks", False: "none", None: "auto"},
        },
    )
    recomputed_blocks: int | None = field(
        default=None, metadata={"help": "how many blocks activation checkpointing recomputes, from the first on"}
    )
    weights: Literal["auto", "fp32", "residual", "stochastic"] = field(
        default="auto",
        metadata={
            "help": "resident: fp32; 16 bits and a residual, together the exact fp32; 16 bits, stochastic rounding"
        },
    )
    moments: Literal["auto", "fp32", "bf16", "int8"] = field(
        default="auto", metadata={"help": "resident: AdamW's moments; int8 is block-wise"}
    )
    optimizer_in_backward: bool | None = field(
        default=None, metadata={"help": "resident: update inside the backward pass and free each gradient at once"}
    )
    zero_stage: int | None = field(default=None, metadata={"help": "DeepSpeed ZeRO stage, 0 to 3"})
    offload: Literal["auto", "none", "states", "optimizer", "params"] = field(
        default="auto",
        metadata={
            "help": "what lives in host memory: states are streamed through the card's own update; optimizer, and "
            "params with it, are ZeRO's"
        },
    )
    host_memory: str = field(
        default="",
        metadata={"help": "host memory to plan with, such as 32GB; empty: all that this machine or container has"},
    )
    nvme_path: str = field(default="", metadata={"help": "ZeRO stage 3: offload to this folder instead of host memory"})
    deepspeed_config: str = field(default="", metadata={"help": "JSON file merged over the derived DeepSpeed config"})

    def __post_init__(self) -> None:
        stage = self.zero_stage
        require(stage is None or 0 <= stage <= 3, f"zero_stage must be 0, 1, 2 or 3, got {stage}")
        if self.offload == "params":
            require(stage in (None, 3), f"--offload params needs --zero_stage 3, got {stage}")
        if self.offload == "optimizer":
            require(stage != 0, "--offload optimizer needs --zero_stage 1, 2 or 3")
        if self.nvme_path:
            require(self.offload in ("optimizer", "params"), "--nvme_path needs --offload optimizer or params")
            require(stage == 3, f"--nvme_path needs --zero_stage 3, got {stage}")
        if self.compile:
            why = "inputs come back from host memory by hooks that no graph holds"
            require(
                self.activation_checkpointing != "offloaded",
                f"--activation_checkpointing offloaded cannot be compiled, {why}",
            )
        if self.strategy == "resident":
            require(stage is None, f"--zero_stage {stage} is ZeRO's: use --strategy zero")
            require(not self.deepspeed_config, "--deepspeed_config is ZeRO's: use --strategy zero")
        if self.strategy == "zero" or stage is not None or self.offload in ("optimizer", "params"):
            require(
                not self.compile, "--compile is the resident strategy's: DeepSpeed's engine runs the model as it is"
            )
            resident_only = (
                self.weights not in ("auto", "fp32")
                or self.moments not in ("auto", "fp32")
                or self.optimizer_in_backward
            )
            require(not resident_only, "--weights, --moments and --optimizer_in_backward are the resident strategy's")
        if self.strategy == "resident":
            require(
                self.offload in ("auto", "none", "states"), f"--offload {self.offload} is ZeRO's: use --strategy zero"
            )
        if self.offload == "states":
            require(
                self.strategy != "zero" and stage is None,
                "--offload states is the resident strategy's: use --offload optimizer",
            )
            why = "the states would come a parameter at a time, and late"
            require(not self.optimizer_in_backward, f"--offload states excludes --optimizer_in_backward: {why}")


@dataclass(kw_only=True, slots=True)
class ReportConfig:
    """What is shown, measured and kept while training."""

    log_interval: int = field(default=10, metadata={"help": "steps between printed lines"})
    eval_interval: int = field(default=250, metadata={"help": "steps between validations; 0: only at the end"})
    eval_tokens: int = field(default=65_536, metadata={"help": "tokens of each validation, the same every time"})
    save_interval: int = field(default=250, metadata={"help": "steps between checkpoints; 0: only at the end"})
    keep_checkpoints: int = field(default=2, metadata={"help": "newest checkpoints kept, beside the best; 0: all"})
    sample_prompt: str = field(default="The", metadata={"help": "what the sample at each validation continues"})
    sample_tokens: int = field(default=48, metadata={"help": "length of that sample; 0: none"})
    tensorboard: bool = field(default=True, metadata={"help": "write TensorBoard events"})

    def __post_init__(self) -> None:
        require(self.log_interval > 0, f"log_interval must be positive, got {self.log_interval}")
        for name in ("eval_interval", "save_interval", "keep_checkpoints", "sample_tokens"):
            require(getattr(self, name) >= 0, f"{name} must not be negative, got {getattr(self, name)}")
        require(self.eval_tokens > 0, f"eval_tokens must be positive, got {self.eval_tokens}")


@dataclass(kw_only=True, slots=True)
class Config:
    """One training run."""

    preset: str = field(default="13m", metadata={"help": "the named starting point"})
    run_dir: str = field(default="", metadata={"help": "where the run is written; empty: runs/<preset>"})
    init_from: str = field(
        default="",
        metadata={
            "help": "weights to begin with, and the shape where neither preset, file nor flag gives one: "
            "a run, a GPT-2 or GPT-NeoX folder, a .safetensors, a .pt"
        },
    )
    seed: int = field(default=1337, metadata={"help": "of the initial weights, the data order and the samples"})
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    report: ReportConfig = field(default_factory=ReportConfig)

    def __post_init__(self) -> None:
        if not self.run_dir:
            self.run_dir = f"runs/{self.preset}"
        require(self.seed >= 0, f"seed must not be negative, got {self.seed}")
        require(self.seed <= MAX_SEED, f"seed must be at most {MAX_SEED}, got {self.seed}")
        if self.strategy.optimizer_in_backward:
            why = "each gradient is used and freed inside the backward pass, before the others are known"
            require(
                self.optimizer.grad_clip == 0,
                f"--optimizer_in_backward cannot clip to a global norm, {why}: --grad_clip 0",
            )
        recomputed, n_layer = self.strategy.recomputed_blocks, self.model.n_layer
        require(
            recomputed is None or 0 < recomputed <= n_layer,
            f"recomputed_blocks must be 1 to n_layer ({n_layer}), got {recomputed}",
        )
        tokens, block = self.optimizer.batch_tokens, self.model.block_size
        require(
            tokens % block == 0,
            f"batch_tokens ({tokens}) must be a multiple of block_size ({block}); "
            f"{max(1, round(tokens / block)) * block} would do",
        )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def save(self, path: Path) -> None:
        with whole_file(path, synced=True) as partial:
            partial.write_text(json.dumps(self.to_dict(), indent=2) + "\n")


_GPT2 = dict(block_size=1024, positions="learned", activation="gelu_tanh")
_GPT2_TRAINING = dict(batch_tokens=524_288, max_steps=20_000, lr=6e-4, min_lr=6e-5, warmup_steps=700)
_BIG_REPORT = dict(eval_interval=250, eval_tokens=1_048_576, save_interval=250)
CLASSIC_MODEL = dict(  # train-llm-from-scratch's
    positions="learned", activation="relu", bias=True, qkv_bias=False, head_bias=True, tie_head=False, norm_eps=1e-5
)

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "13m": {
        "model": dict(n_layer=1, n_head=8, n_embd=128, block_size=128, **CLASSIC_MODEL),
        "optimizer": dict(batch_tokens=2048, max_steps=1000, lr=2e-3, min_lr=2e-4, warmup_steps=50),
    },
    "gpt2": {
        "model": dict(n_layer=12, n_head=12, n_embd=768, **_GPT2),
        "optimizer": _GPT2_TRAINING,
        "report": _BIG_REPORT,
    },
    "gpt2-medium": {
        "model": dict(n_layer=24, n_head=16, n_embd=1024, **_GPT2),
        "optimizer": _GPT2_TRAINING | dict(lr=4e-4, min_lr=4e-5),
        "report": _BIG_REPORT,
    },
    "gpt2-large": {
        "model": dict(n_layer=36, n_head=20, n_embd=1280, **_GPT2),
        "optimizer": _GPT2_TRAINING | dict(lr=3e-4, min_lr=3e-5),
        "report": _BIG_REPORT,
    },
    "gpt2-xl": {
        "model": dict(n_layer=48, n_head=25, n_embd=1600, **_GPT2),
        "optimizer": _GPT2_TRAINING | dict(lr=2e-4, min_lr=2e-5),
        "report": _BIG_REPORT,
    },
    "2b": {
        "model": dict(n_layer=24, n_head=20, n_embd=2560, block_size=2048, positions="rotary", activation="gelu_tanh"),
        "optimizer": _GPT2_TRAINING | dict(lr=2e-4, min_lr=2e-5, max_steps=80_000, warmup_steps=1000),
        "report": _BIG_REPORT,
    },
    "3b": {
        "model": dict(n_layer=64, n_head=16, n_embd=2048, block_size=512, **CLASSIC_MODEL),
        "optimizer": _GPT2_TRAINING | dict(lr=2e-4, min_lr=2e-5, max_steps=80_000, warmup_steps=1000),
        "report": _BIG_REPORT,
    },
}


_TRUTH = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


@dataclass(frozen=True)
class Setting:
    """A leaf of the tree: `section` is empty for the fields of Config itself; `optional` ones may be None, "auto".

    also: further values that a choice may be given by, True, False or None, and which each means.
    """

    section: str
    name: str
    kind: Any
    optional: bool
    help: str
    default: Any
    also: dict[bool | None, str]

    def convert(self, value: Any) -> Any:
        """Check `value`, a string from the command line or a value from JSON, against the field's type."""
        kind, text = self.kind, str(value).strip()
        if self.optional and (value is None or text == "auto"):
            return None
        if typing.get_origin(kind) is Literal:
            choices = typing.get_args(kind)
            text = self.also.get(None if value is None else _TRUTH.get(text.lower(), text), text)
            require(
                text in choices,
                f"{self.name} must be one of {', '.join(choices)}; got {text!r}{did_you_mean(text, choices)}",
            )
            return text
        if kind is bool:
            require(text.lower() in _TRUTH, f"{self.name} must be true or false, got {text!r}")
            return _TRUTH[text.lower()]
        if kind is str:
            require(isinstance(value, str), f"{self.name} must be a string, got {value!r}")
            return value
        try:
            if kind is int:
                number = float(text.replace("_", "")) if not text.lstrip("+-").replace("_", "").isdigit() else int(text)
                require(number == int(number), f"{self.name} must be a whole number, got {text!r}")
                return int(number)
            return float(text)
        except (ValueError, OverflowError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(
                f"{self.name} must be a {'whole number' if kind is int else 'number'}, got {text!r}"
            ) from None


def settings() -> dict[str, Setting]:
    """Return every leaf of the tree by its name."""
    found: dict[str, Setting] = {}

    def collect(cls: type, section: str) -> None:
        hints = typing.get_type_hints(cls)
        for f in dataclasses.fields(cls):
            if dataclasses.is_dataclass(hints[f.name]):
                collect(hints[f.name], f.name)
            else:
                assert f.name not in found, f"two settings are called {f.name}"
                kinds = [kind for kind in typing.get_args(hints[f.name]) if kind is not type(None)]
                optional = typing.get_origin(hints[f.name]) is types.UnionType
                kind = kinds[0] if optional else hints[f.name]
                found[f.name] = Setting(
                    section, f.name, kind, optional, f.metadata.get("help", ""), f.default, f.metadata.get("also", {})
                )

    collect(Config, "")
    return found


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return what to add to a message about an unknown word: the known one that was meant, or nothing."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def setting_meant(name: str, known: Iterable[str], dashes: str = "") -> str:
    """Return the same about the name of a setting, which may be another program's; `dashes`: before that of a flag."""
    known, foreign = list(known), name.lower()
    reason = REASONS.get(foreign, "")
    if reason and all(flag in known for flag in re.findall(r"--(\w+)", reason)):
        return f": {reason}"
    here = [own for own in NAMES.get(foreign, "").split() if own in known]
    near = 0.8 if foreign in NAMES else 0.5  # a name from elsewhere is hardly one of ours, mistyped
    here = here or difflib.get_close_matches(name, known, n=1, cutoff=near)
    return f"; did you mean '{dashes}{here[0]}'?" if here else ""


def from_dict(tree: dict[str, Any], source: str = "config") -> Config:
    """Build a Config from a (partial) nested dict; ConfigError names an unknown key and the nearest known one."""
    leaves = settings()
    sections = {f.section for f in leaves.values()} - {""}
    values: dict[str, dict[str, Any]] = {section: {} for section in sections | {""}}
    for key, value in tree.items():
        require(key not in sections or isinstance(value, dict), f"{source}: {key} must hold settings, got {value!r}")
        entries = value.items() if key in sections else [(key, value)]
        section = key if key in sections else ""
        for name, leaf in entries:
            if name not in leaves or leaves[name].section != section:
                where = f"{section}.{name}" if section else name
                known = [f.name for f in leaves.values() if f.section == section] + ([] if section else list(sections))
                home = leaves[name].section if name in leaves else None
                meant = setting_meant(name, known) if home is None else f"; {name} belongs {_place(home)}"
                raise ConfigError(f"{source}: unknown setting {where!r}{meant}")
            values[section][name] = leaves[name].convert(leaf)
    hints = typing.get_type_hints(Config)
    return Config(**values[""], **{section: hints[section](**values[section]) for section in sections})


def _place(section: str) -> str:
    return f"in {section!r}" if section else "outside the sections"


def merge(*trees: dict[str, Any]) -> dict[str, Any]:
    """Return the nested dicts laid over one another, later ones winning."""
    merged: dict[str, Any] = {}
    for tree in trees:
        for key, value in tree.items():
            both = isinstance(value, dict) and isinstance(merged.get(key), dict)
            merged[key] = merge(merged[key], value) if both else value
    return merged


def preset(name: str) -> dict[str, Any]:
    known = list(PRESETS)  # a list also takes what a file may hold in the name's place
    require(name in known, f"unknown preset {name!r}; known: {', '.join(known)}{did_you_mean(str(name), known)}")
    return {"preset": name, **PRESETS[name]}


def changes(before: dict[str, Any], after: Config, except_for: Iterable[str] = ()) -> list[str]:
    """List the settings that a saved configuration has otherwise than `after`, as "lr 0.0006 -> 0.001"."""
    now, listed = after.to_dict(), []
    for name, leaf in settings().items():
        then, here = (tree[leaf.section] if leaf.section else tree for tree in ({leaf.section: {}} | before, now))
        if name in then and then[name] != here[name] and name not in except_for:
            listed.append(f"{name} {_as_typed(then[name])} -> {_as_typed(here[name])}")
    return listed


def _as_typed(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "auto", True: "true", False: "false"}[value]
    return str(value) or "''"


def load_file(path: str | Path) -> dict[str, Any]:
    try:
        tree = json.loads(Path(path).read_text(encoding="utf-8-sig"))  # editors on Windows may begin it with a BOM
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from None
    except ValueError as error:  # JSONDecodeError, or bytes that are no UTF-8
        raise ConfigError(f"{path} is no JSON: {error}") from None
    require(isinstance(tree, dict), f"{path} must hold settings, got {tree!r}")
    return tree
