"""Our operations and what would be used in their place, forward and backward, at GPT's shapes.

On a GPU each call takes the chip longer than it takes Python to make the next one, and calls follow one another without
a wait, so that it is the kernel that is timed; its tensors are larger than the chip's cache, as in training. On a CPU
the shapes are small. `bytes` is what must be read and written once, `flops` what must be computed; the copy says how
fast memory really is.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from engine.config import from_dict, preset
from engine.device import choose_dtype
from engine.model import GPT, rotary_tables
from engine.optimizer import AdamW
from kernels.attention import attention_reference

GPU = torch.cuda.is_available()
WIDTHS = (768, 1600, 2560) if GPU else (768,)
ELEMENTS = 2**28 if GPU else 2048 * 768  # of each tensor of rows, at every width
ATTENTION = (
    [(32768 // T, T, 2048 // D, D) for D in (128, 64) for T in (1024, 2048, 4096, 16384)] if GPU else [(2, 256, 6, 64)]
)
HEADS = [(8192, 50304, 768), (8192, 50304, 2560)] if GPU else [(512, 50304, 128)]
OPTIMIZED_PRESET = "gpt2-medium" if GPU else "13m"

Run = Callable[..., Tensor]


@pytest.fixture(scope="module")
def dtype(device: torch.device) -> torch.dtype:
    return choose_dtype("auto", device)[0]


@pytest.fixture
def passes(measure: Callable[..., None], device: torch.device, dtype: torch.dtype) -> Callable[..., None]:
    """passes(run, inputs, step, ...): time `run(*inputs)`, or its backward pass, or both."""

    def passes(run: Run, inputs: list[Tensor], step: str, **about: Any) -> None:
        try:
            outputs = _outputs(run, inputs)
        except (RuntimeError, NotImplementedError) as error:
            if about["implementation"] == "pilesmith" or isinstance(error, torch.OutOfMemoryError):
                raise
            pytest.skip(f"not here: {str(error).splitlines()[0]}")
        grads = [torch.randn_like(o) for o in outputs]
        wanted = [x for x in inputs if x.requires_grad]

        def forward() -> None:
            with torch.no_grad():
                run(*inputs)

        def backward() -> None:
            torch.autograd.grad(outputs, wanted, grads, retain_graph=True)

        def both() -> None:
            torch.autograd.grad(_outputs(run, inputs), wanted, grads)

        name = str(dtype).removeprefix("torch.")
        measure({"forward": forward, "backward": backward, "both": both}[step], step=step, dtype=name, **about)

    return passes


def _outputs(run: Run, inputs: list[Tensor]) -> list[Tensor]:
    result = run(*inputs)
    return list(result) if isinstance(result, tuple) else [result]


def _random(*shape: int, device: torch.device, dtype: torch.dtype, grad: bool = True) -> Tensor:
    return torch.randn(shape, device=device, dtype=dtype, requires_grad=grad)


@functools.cache
def _compiled(run: Run) -> Run:
    return torch.compile(run, dynamic=False)


def _liger(name: str) -> Any:
    if not GPU:
        pytest.skip("Liger-Kernel needs a GPU")
    functions = pytest.importorskip("liger_kernel.transformers.functional")
    if not hasattr(functions, name):
        pytest.skip(f"this Liger-Kernel has no {name}")
    return getattr(functions, name)


def test_copy(measure: Callable[..., None], device: torch.device) -> None:
    source = torch.empty(2**30 if GPU else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    about = dict(op="copy", step="forward", implementation="pytorch", shape={"bytes": len(source)}, dtype="uint8")
    measure(lambda: target.copy_(source), bytes=2 * len(source), **about)


def _sdpa(backend: str) -> Run:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    return run


def _flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return _compiled(flex_attention)(q, k, v, block_mask=_causal_blocks(q.shape[2], q.device)).transpose(1, 2)


@functools.cache
def _causal_blocks(length: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device=str(device))


ATTENTIONS: dict[str, Run] = {
    "pilesmith": kernels.attention,
    "sdpa-flash": _sdpa("FLASH_ATTENTION"),
    "sdpa-cudnn": _sdpa("CUDNN_ATTENTION"),
    "sdpa-efficient": _sdpa("EFFICIENT_ATTENTION"),
    "flex": _flex,
    "whole scores": attention_reference,
}


@pytest.mark.parametrize("step", ["forward", "backward"])
@pytest.mark.parametrize("shape", ATTENTION, ids=lambda shape: "-".join(map(str, shape)))
@pytest.mark.parametrize("implementation", ATTENTIONS)
def test_attention(
    passes: Callable[..., None], device: torch.device, dtype: torch.dtype, shape: tuple, step: str, implementation: str
) -> None:
    B, T, H, D = shape
    if implementation == "whole scores" and GPU:
        pytest.skip("slower than any other by a wide margin")
    if implementation == "flex" and (D != 128 or not GPU):
        pytest.skip("compiles for half a minute a shape")
    qkv = [_random(B, T, H, D, device=device, dtype=dtype) for _ in range(3)]
    flops = 2 * B * H * T * T * D * (1 if step == "forward" else 2.5)  # causal: half of the square
    passes(
        ATTENTIONS[implementation], qkv, step, op="attention", implementation=implementation,
        shape={"B": B, "T": T, "H": H, "D": D}, flops=int(flops), bytes=None,
    )  # fmt: skip


def _layer_norm_liger(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _liger("liger_layer_norm")(x, weight, bias, 1e-5)


def _layer_norm_torch(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias)


def _add_layer_norm_torch(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    s = x + residual
    return F.layer_norm(s, weight.shape, weight, bias), s


def _softmax_torch(x: Tensor) -> Tensor:
    return torch.softmax(x, -1)


def _softmax_liger(x: Tensor) -> Tensor:
    return _liger("liger_softmax")(x)


def _bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    return kernels.bias_activation(x, bias, "gelu_tanh")


def _bias_gelu_torch(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias, approximate="tanh")


def rows_of(width: int) -> int:
    """Return as many rows as have ELEMENTS, in a multiple that a batch of sequences has too."""
    return ELEMENTS // width // 64 * 64


@dataclass(frozen=True)
class RowOp:
    """An operation on rows: what runs it ("compiled" is PyTorch's, compiled), its inputs, the tensors that it moves."""

    runs: dict[str, Run]
    tensors: int  # (rows, width), inputs
    vectors: int  # (width,), inputs
    moves: dict[str, int]  # tensors read and written at least, by pass


ROW_OPS = {
    "layer_norm": RowOp(
        {"pilesmith": kernels.layer_norm, "pytorch": _layer_norm_torch, "liger": _layer_norm_liger},
        tensors=1, vectors=2, moves={"forward": 2, "backward": 3},
    ),
    "add_layer_norm": RowOp(
        {"pilesmith": kernels.add_layer_norm, "pytorch": _add_layer_norm_torch},
        tensors=2, vectors=2, moves={"forward": 4, "backward": 4},
    ),
    "softmax": RowOp(
        {"pilesmith": kernels.softmax, "pytorch": _softmax_torch, "liger": _softmax_liger},
        tensors=1, vectors=0, moves={"forward": 2, "backward": 3},
    ),
    "bias_activation": RowOp(
        {"pilesmith": _bias_gelu, "pytorch": _bias_gelu_torch},
        tensors=1, vectors=1, moves={"forward": 2, "backward": 3},
    ),
}  # fmt: skip


@pytest.mark.parametrize("step", ["forward", "backward"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(
    "op, implementation", [(op, name) for op, row in ROW_OPS.items() for name in (*row.runs, "compiled")]
)
def test_rows(
    passes: Callable[..., None],
    device: torch.device,
    dtype: torch.dtype,
    op: str,
    implementation: str,
    width: int,
    step: str,
) -> None:
    about = ROW_OPS[op]
    run = about.runs.get(implementation) or _compiled(about.runs["pytorch"])
    if op == "bias_activation":  # the MLP's inner width
        width *= 4
    rows = rows_of(width)
    inputs = [_random(rows, width, device=device, dtype=dtype) for _ in range(about.tensors)]
    inputs += [_random(width, device=device, dtype=dtype) for _ in range(about.vectors)]
    passes(
        run, inputs, step, op=op, implementation=implementation, shape={"rows": rows, "width": width},
        bytes=about.moves[step] * rows * width * dtype.itemsize,
    )  # fmt: skip


def _rotary_torch(qkv: Tensor, cos: Tensor, sin: Tensor, *, n_head: int, head_dim: int) -> Tensor:
    heads = qkv.unflatten(2, (-1, head_dim))
    left, right = heads[:, :, :n_head].chunk(2, -1)
    cos, sin = cos[:, None].to(qkv.dtype), sin[:, None].to(qkv.dtype)
    turned = torch.cat((left * cos - right * sin, right * cos + left * sin), -1)
    return torch.cat((turned, heads[:, :, n_head:]), 2).flatten(2)


@pytest.mark.parametrize("implementation", ["pilesmith", "pytorch", "compiled"])
def test_rotary(measure: Callable[..., None], device: torch.device, dtype: torch.dtype, implementation: str) -> None:
    B, T, H, D = (32, 2048, 20, 128) if GPU else (2, 256, 6, 64)
    run = {"pilesmith": kernels.rotary, "pytorch": _rotary_torch}.get(implementation) or _compiled(_rotary_torch)
    qkv = _random(B, T, 3 * H * D, device=device, dtype=dtype, grad=False)
    cos, sin = rotary_tables(T, D, device)
    about = dict(op="rotary", step="forward", implementation=implementation, shape={"B": B, "T": T, "H": H, "D": D})
    moved = 2 * 2 * B * T * H * D * dtype.itemsize  # queries and keys, read and written
    measure(
        lambda: run(qkv, cos, sin, n_head=2 * H, head_dim=D),
        bytes=moved,
        dtype=str(dtype).removeprefix("torch."),
        **about,
    )


def _whole_logits(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight).float(), targets)


def _linear_cross_entropy_torch(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    if not hasattr(F, "linear_cross_entropy"):
        pytest.skip("PyTorch has it since 2.13")
    return F.linear_cross_entropy(x, weight, targets)


LOSSES: dict[str, Run | None] = {
    "pilesmith": kernels.linear_cross_entropy,
    "pytorch": _whole_logits,
    "compiled": None,
    "pytorch-fused": _linear_cross_entropy_torch,
    "liger": lambda x, weight, targets: _liger("liger_fused_linear_cross_entropy")(x, weight, targets),
}


@pytest.mark.parametrize("tokens, words, width", HEADS)
@pytest.mark.parametrize("implementation", LOSSES)
def test_linear_cross_entropy(
    passes: Callable[..., None], device: torch.device, dtype: torch.dtype, tokens: int, words: int, width: int,
    implementation: str,
) -> None:  # fmt: skip
    x = _random(tokens, width, device=device, dtype=dtype)
    weight = (_random(words, width, device=device, dtype=dtype, grad=False) * 0.02).requires_grad_()
    targets = torch.randint(words, (tokens,), device=device)
    run = LOSSES[implementation] or _compiled(_whole_logits)
    passes(
        run, [x, weight, targets], "both", op="linear_cross_entropy", implementation=implementation,
        shape={"tokens": tokens, "words": words, "width": width}, flops=6 * tokens * words * width,
    )  # fmt: skip


# name: (optimizer, its options, bytes a parameter that an update must move: weight, gradient, both moments)
OPTIMIZERS: dict[str, tuple[Any, dict[str, Any], int]] = {
    "pilesmith": (AdamW, {}, 28),
    "pytorch-fused": (torch.optim.AdamW, {"fused": True}, 28),
    "pytorch-foreach": (torch.optim.AdamW, {"foreach": True}, 28),
    "pilesmith, bf16 with residual, int8": (AdamW, {"weights": "residual", "moments": "int8"}, 14),
    "pilesmith, bf16 stochastic, int8": (AdamW, {"weights": "stochastic", "moments": "int8"}, 10),
}


@pytest.mark.parametrize("implementation", OPTIMIZERS)
def test_adamw(measure: Callable[..., None], device: torch.device, implementation: str) -> None:
    make, options, bytes_per_parameter = OPTIMIZERS[implementation]
    with device:
        model = GPT(from_dict(preset(OPTIMIZED_PRESET)).model)
    optimizer = make(model.parameters(), lr=1e-4, weight_decay=0.1, **options)
    n = model.num_parameters()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-3
    about = dict(op="adamw", step="forward", implementation=implementation, shape={"parameters": n}, dtype="float32")
    measure(optimizer.step, bytes=bytes_per_parameter * n, **about)
