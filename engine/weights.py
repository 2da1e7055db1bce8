"""Weights in and out of files: a run, a checkpoint, safetensors, Hugging Face's folders, the classic script's `.pt`."""

import dataclasses
import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from engine import checkpoint
from engine.config import ConfigError, ModelConfig, require
from engine.data import TokenFile
from engine.formats import (
    State,
    WeightsError,
    compare,
    drop_tied,
    expected_state,
    from_classic,
    to_classic,
)
from engine.hugging_face import from_hugging_face, to_hugging_face
from engine.model import GPT
from engine.tokenizer_files import TOKENIZER_CONFIG_FILE, TOKENIZER_FILE
from engine.whole_file import whole_file

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
ACCEPTED = "a run, a checkpoint, a .safetensors, a GPT-2 or GPT-NeoX folder or a classic .pt"
_SCALARS = [
    "float16",
    "float32",
    "float64",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "bool",
]


def find_weights(path: str | Path) -> Path:
    """Return the file or folder that `path` leads to: for a run its best checkpoint, or the newest without a best."""
    path = Path(path)
    if not path.exists():
        raise WeightsError(f"{path} is missing; it can be {ACCEPTED}")
    if not path.is_dir() or (path / WEIGHTS_FILE).exists() or (path / INDEX_FILE).exists():
        return path
    found = checkpoint.best(path) or checkpoint.newest(path)
    if found is None:
        inside = [p for p in sorted(path.iterdir()) if (p / WEIGHTS_FILE).exists() or checkpoint.newest(p)]
        hint = f"; inside are {', '.join(map(str, inside))}: name one of them" if inside else ""
        raise WeightsError(f"{path} holds neither {WEIGHTS_FILE} nor a checkpoint (checkpoints/step_00000100){hint}")
    return found


def load_model(path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> GPT:
    """Return the model that `path` holds, in evaluation mode on `device`; weights and activations in dtype.

    path: a run folder, a checkpoint, a .safetensors file, a folder of Hugging Face's GPT-2 or GPT-NeoX, or a classic
    `.pt`. dtype None: as it is stored. WeightsError where the file is damaged, does not fit its model, or holds code.
    """
    config, state = read_weights(path)
    model = GPT.outline(config, dtype)
    state = {name: tensor.to(device, dtype) for name, tensor in state.items()}
    if config.tie_head:
        state["lm_head.weight"] = state["transformer.wte.weight"]
    model.load_state_dict(state, assign=True)
    if config.tie_head:  # assigning made two parameters of the one tensor
        model.lm_head.weight = model.transformer["wte"].weight
    return model.eval()


def read_weights(path: str | Path) -> tuple[ModelConfig, State]:
    """Return the model's shape and its state dict on the CPU under GPT's names, a tied head stored once.

    Takes what `load_model` takes and raises the same. Tensors may be backed by the file: do not write over it.
    """
    return _read(path, "cpu")


def read_shape(path: str | Path) -> ModelConfig:
    """Return the shape alone of what `read_weights` reads; raises the same, and leaves the numbers where they are."""
    return _read(path, "meta")[0]


def _read(path: str | Path, device: str) -> tuple[ModelConfig, State]:
    path = find_weights(path)
    try:
        if path.is_dir() or path.suffix == ".safetensors":
            return _read_safetensors(path, device)
        return from_classic(_read_pickle(path, device))
    except (WeightsError, ConfigError) as error:
        raise WeightsError(f"{path}: {error}") from None


def recorded_tokenizer(path: str | Path) -> str | None:
    """Return the name of the tokenizer that the weights at `path` were trained with, None where it is not recorded."""
    path = find_weights(path)
    file = path / WEIGHTS_FILE if path.is_dir() else path
    if file.suffix != ".safetensors" or not file.exists():
        return None
    try:
        with _opened(file) as opened:
            return (opened.metadata() or {}).get("tokenizer")
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None


def require_tokenizer(path: str | Path, data: TokenFile) -> None:
    """Raise ConfigError where another tokenizer is recorded of the weights at `path` than the one that made `data`."""
    tokenizer = recorded_tokenizer(path) or data.tokenizer
    require(
        tokenizer == data.tokenizer,
        f"{path} was trained on tokens of {tokenizer}, and {data.path} has those of {data.tokenizer}: "
        f"prepare the text with --tokenizer_name {tokenizer}",
    )


def check_target(
    out: str | Path, source: Path, *, is_folder: bool, overwrite: bool, with_tokenizer: bool = False
) -> None:
    """Raise WeightsError where writing weights to `out`, a file or a folder, would cost what is there.

    A file that exists is replaced where `overwrite` says so, but never what is read, `source`, nor what a run or a
    checkpoint holds: the next one to resume would train on from it. with_tokenizer: its files are written there too.
    """
    out, source = Path(out), source.resolve()
    own_names = (WEIGHTS_FILE, "config.json")  # which mean something to whoever reads the folder, there yet or not
    beside = (TOKENIZER_FILE, TOKENIZER_CONFIG_FILE) if with_tokenizer else ()
    for file in [out / name for name in own_names + beside] if is_folder else [out]:
        folder = file.parent.resolve()
        if not file.exists() and file.name not in own_names:
            continue
        if source in (file.resolve(), folder):
            raise WeightsError(f"{file} belongs to the weights that are read: write them elsewhere")
        if (folder / "state.json").exists():
            raise WeightsError(f"{folder} is a checkpoint, which --resume goes on from: write the weights elsewhere")
        if (folder / "resolved.json").exists() or checkpoint.checkpoints(folder):
            raise WeightsError(f"{folder} is a run, whose checkpoints hold its weights: write these elsewhere")
        if file.exists() and not overwrite:
            raise WeightsError(f"{file} exists: --overwrite replaces it")


def write_weights(path: str | Path, config: ModelConfig, state: State, tokenizer: str | None = None) -> Path:
    """Write the weights, as they are, to a .safetensors file, or to a folder as model.safetensors and config.json.

    The model's shape is in the file's metadata too, as "model_config", and the tokenizer's name. Returns the file.
    """
    path = Path(path)
    shape = dataclasses.asdict(config)
    if path.suffix != ".safetensors":
        _write_json(path / "config.json", {"model": shape})
        path = path / WEIGHTS_FILE
    about = {"model_config": json.dumps(shape)} | ({"tokenizer": tokenizer} if tokenizer else {})
    _write_safetensors(path, drop_tied(config, state), about)
    return path


def write_hugging_face(
    folder: str | Path,
    config: ModelConfig,
    state: State,
    format: str,
    *,
    vocab_size: int | None = None,
    encoding: tiktoken.Encoding | None = None,
    tokenizer: dict[str, dict[str, Any]] | None = None,
) -> Path:
    """Write a folder that transformers' AutoModelForCausalLM reads; see `hugging_face.to_hugging_face`.

    format: "gpt2" or "gpt-neox". encoding: what the model was trained with, None where that is not known. tokenizer:
    the content of further files for AutoTokenizer, by name (`tokenizer_files.tokenizer_files`). Returns the folder.
    """
    folder = Path(folder)
    about, state = to_hugging_face(config, state, format, vocab_size, encoding.eot_token if encoding else None)
    for name, content in ({"config.json": about} | (tokenizer or {})).items():
        _write_json(folder / name, content)
    metadata = {"format": "pt"} | ({"tokenizer": encoding.name} if encoding else {})
    _write_safetensors(folder / WEIGHTS_FILE, state, metadata)
    return folder


def write_classic(path: str | Path, config: ModelConfig, state: State) -> Path:
    """Write a `.pt` whose model_state_dict the classic script loads; see `formats.to_classic`."""
    path = Path(path)
    content = {"model_state_dict": to_classic(config, state)}
    _write(path, lambda part: torch.save(content, part))
    return path


def _read_safetensors(path: Path, device: str) -> tuple[ModelConfig, State]:
    folder, files = path.parent, [path]
    if path.is_dir():
        folder, files = path, [path / WEIGHTS_FILE]
        if not files[0].exists():  # Hugging Face's large models are several files
            index = _read_json(path / INDEX_FILE)["weight_map"]
            files = [path / name for name in sorted(set(index.values()))]
    state: State = {}
    for file in files:
        with _opened(file) as opened:
            metadata = opened.metadata() or {}
            state |= {name: _tensor(opened, name, device) for name in opened.keys()}
    if "model_config" in metadata:
        config = _model_config(json.loads(metadata["model_config"]))
    elif not (folder / "config.json").exists():
        raise WeightsError("says nothing about the model's shape, and there is no config.json beside it")
    else:
        about = _read_json(folder / "config.json")
        if "model" not in about:
            return from_hugging_face(about, state)
        config = _model_config(about["model"])
    compare(expected_state(config), state, "the file")
    return config, state


def _tensor(opened: safe_open, name: str, device: str) -> Tensor:
    if device == "meta":  # which safetensors does not have
        return torch.empty(opened.get_slice(name).get_shape(), device=device)
    return opened.get_tensor(name)


@contextmanager
def _opened(file: Path) -> Iterator[safe_open]:
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{file.name} cannot be read whole: {error}") from None


def _model_config(about: dict[str, Any]) -> ModelConfig:
    unknown = set(about) - {field.name for field in dataclasses.fields(ModelConfig)}
    if unknown:
        raise WeightsError(f"its model has settings that this version does not know: {', '.join(sorted(unknown))}")
    return ModelConfig(**about)


def _read_pickle(path: Path, device: str) -> State:
    """Return the state dict in a file of torch.save, of which nothing but tensors and plain values is ever loaded."""
    try:
        with torch.serialization.safe_globals(_numpy_scalars()):
            # Mapped, so that the optimizer's state beside the weights costs no memory.
            content = torch.load(path, map_location=device, weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch raises half a dozen types here
        reason = error.__context__ or error  # torch wraps it in advice to load the file anyway
        code = re.search(r"GLOBAL (\S+)", str(reason))
        if isinstance(error, pickle.UnpicklingError) and code:
            raise WeightsError(
                f"holds {code[1]}, and loading that could run code: refused. If its author is to be trusted, save "
                "model_state_dict alone, with torch.save, where the file was made"
            ) from None
        detail = " ".join(str(reason).split()[:30])
        raise WeightsError(
            f"is no whole PyTorch checkpoint ({type(reason).__name__}: {detail}); weights can be {ACCEPTED}"
        ) from None
    state = content.get("model_state_dict", content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        found = f"keys {', '.join(map(str, state))}" if isinstance(state, dict) else f"a {type(state).__name__}"
        raise WeightsError(f"holds no model_state_dict, but {found}")
    return state


def _numpy_scalars() -> list[Any]:
    """Globals allowed when unpickling NumPy scalars (NumPy 1 and 2), which losses may be; none of them runs code."""
    rebuild = np.float64(0).__reduce__()[0]
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    return [*((rebuild, name) for name in names), np.dtype, *(type(np.dtype(kind)) for kind in _SCALARS)]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path.name} cannot be read: {error}") from None


def _write_json(path: Path, content: dict[str, Any]) -> None:
    _write(path, lambda part: part.write_text(json.dumps(content, indent=2) + "\n"))


def _write_safetensors(path: Path, state: State, metadata: dict[str, str]) -> None:
    tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in state.items()}
    try:
        _write(path, lambda part: save_file(tensors, part, metadata=metadata))
    except SafetensorError as error:  # it wraps the system's errors
        raise WeightsError(f"{path} cannot be written: {error}") from None


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    """Write beside `path`, then rename, so that a full disk leaves what was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        partial.touch()
        mode = partial.stat().st_mode
        write(partial)
        partial.chmod(mode)  # safetensors makes files that only their owner may read
