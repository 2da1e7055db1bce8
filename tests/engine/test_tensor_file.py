"""Files written a tensor at a time are what the safetensors library writes and reads."""

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from engine.tensor_file import TensorFile

SHAPES = {"b.weight": (3, 5), "a": (), "空": (7,), "none": (0, 4), "c/exp_avg": (2, 3, 2)}


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def test_the_library_reads_what_was_written(tmp_path):
    file = TensorFile(tmp_path / "ours", SHAPES, {"tokenizer": "r50k_base"})
    for name, tensor in tensors().items():
        file.write(name, tensor)
    file.finish()
    save_file(tensors(), tmp_path / "theirs", metadata={"tokenizer": "r50k_base"})
    ours, theirs = load_file(tmp_path / "ours"), load_file(tmp_path / "theirs")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    with safe_open(tmp_path / "ours", framework="pt") as opened:
        assert opened.metadata() == {"tokenizer": "r50k_base"}


def test_other_dtypes_and_strides_become_fp32_in_order(tmp_path):
    matrix = torch.arange(6, dtype=torch.bfloat16).view(2, 3)
    file = TensorFile(tmp_path / "x", {"t": (3, 2)})
    file.write("t", matrix.t())
    assert torch.equal(load_file(tmp_path / "x")["t"], matrix.t().float())


def test_a_file_that_lacks_a_tensor_is_cut_off(tmp_path):
    file = TensorFile(tmp_path / "x", SHAPES)
    file.write("b.weight", tensors()["b.weight"])
    with pytest.raises(SafetensorError):
        load_file(tmp_path / "x")
    with pytest.raises(ValueError, match="a never came"):
        file.finish()


@pytest.mark.parametrize("name, shape", [("a", ()), ("b.weight", (5, 3))])
def test_what_is_not_due_is_refused(tmp_path, name, shape):
    file = TensorFile(tmp_path / "x", SHAPES)
    with pytest.raises(ValueError, match=r"comes where b.weight \(3, 5\) is due"):
        file.write(name, torch.zeros(shape))
