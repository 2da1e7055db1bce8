"""Kernels on rows, the loss and the optimizer, as tools/tune.py searches them: a case is a tile's width or a format."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from engine.model import rotary_tables
from kernels import aot
from kernels.adamw import adamw
from kernels.aot import Case, triton_targets
from kernels.cross_entropy_gpu import GPT2_WORDS, turn_in_triton
from kernels.dispatch import CHIPS, Chip, use_backend
from kernels.launch_configs import LaunchConfig
from kernels.number_formats import BLOCK, join, split
from kernels.rotary import rotary_reference
from kernels.rows import GPT_WIDTHS, tile_case
from tools.tuning.cases import (
    SHORT,
    Function,
    Problem,
    Timed,
    Tunable,
    random,
    timed_backward,
    timed_forward,
    wrong,
)  # fmt: skip

ODD_ROWS = 131  # that results are judged at
HEAD_WIDTHS = (64, 128)


@dataclass(frozen=True)
class Rows(Tunable):
    """op: as dispatch decides; module, label: where its compile case is, and how that begins; problem: (rows, width,
    device, dtype) -> Problem; outputs: which results show its work; widths: those of the presets; streams: how many
    tensors a pipelined loop loads, 0 without a loop; per_thread: numbers of a tile for each of its threads.
    """

    op: str = ""
    module: str = ""
    label: str = ""
    problem: Callable[[int, int, torch.device, torch.dtype], Problem] | None = None
    outputs: tuple[str, ...] = ("out",)
    widths: tuple[int, ...] = GPT_WIDTHS
    streams: int = 0
    per_thread: tuple[int, int] = (8, 64)

    def cases(self, chip: Chip) -> tuple[str, ...]:
        if chip.target not in triton_targets(self.op):
            return ()
        itemsize = getattr(torch, chip.dtype).itemsize
        return tuple(dict.fromkeys(tile_case(width, itemsize) for width in self.widths))

    def sensible(self, config: LaunchConfig, case: str) -> bool:
        least, most = self.per_thread
        return least <= self._numbers(config, case) / (32 * config["num_warps"]) <= most

    def shared_bytes(self, config: LaunchConfig, case: str) -> int:
        """The iterations of a pipelined loop that wait in shared memory."""
        itemsize = int(case.partition("x")[2])
        return (config.get("STAGES", 1) - 1) * self.streams * self._numbers(config, case) * itemsize

    def _numbers(self, config: LaunchConfig, case: str) -> int:
        return config.get("ROWS", 1) * config.get("BLOCK", _columns(case))

    def shipped(self, case: str, target: str) -> Case:
        end = f"_{SHORT[CHIPS[target].dtype]}"
        fixed = {} if "BLOCK" in self.space else {"BLOCK": _columns(case)}
        return next(
            made
            for made in aot.cases_of(self.module).values()
            if made.label.startswith(self.label) and end in made.label and target in made.chips()
            and fixed.items() <= made.constants.items()
        )  # fmt: skip

    def _width(self, case: str) -> int:
        return max(width for width in self.widths if tile_case(width, 1).partition("x")[0] == case.partition("x")[0])

    def wrong(self, case: str, device: torch.device, dtype: torch.dtype, rows: int = ODD_ROWS) -> str:
        """An odd number of rows; a width of the presets, and one a little smaller that no load is aligned for."""
        for width in (self._width(case), self._width(case) - 9):
            fault = wrong(self.problem(rows, width, device, dtype), self.outputs, f"at {rows} rows of {width}")
            if fault:
                return fault
        return ""

    def speed(self, case: str, device: torch.device, dtype: torch.dtype, size: int) -> Timed:
        problem = self.problem(size, self._width(case), device, dtype)
        timed = timed_forward if self.outputs == ("out",) else timed_backward
        return timed(problem.ours, problem.inputs), {"rows": size, "width": self._width(case)}


def _columns(case: str) -> int:
    return int(case.partition("x")[0])


def _norm(rows: int, width: int, device: torch.device, dtype: torch.dtype) -> Problem:
    """With a residual, the variant that loads the most."""

    def exact(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        s = x + residual
        return F.layer_norm(s, weight.shape, weight, bias), s

    shapes = {"x": (rows, width), "residual": (rows, width), "weight": (width,), "bias": (width,)}
    inputs = {name: random(shape, device, dtype, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    return Problem(inputs, kernels.add_layer_norm, exact)


def _softmax(rows: int, width: int, device: torch.device, dtype: torch.dtype) -> Problem:
    return Problem({"x": random((rows, width), device, dtype)}, kernels.softmax, lambda x: torch.softmax(x, -1))


def _activation(rows: int, width: int, device: torch.device, dtype: torch.dtype) -> Problem:
    inputs = {"x": random((rows, width), device, dtype), "bias": random((width,), device, dtype, seed=1)}
    ours: Function = lambda x, bias: kernels.bias_activation(x, bias, "gelu_tanh")
    return Problem(inputs, ours, lambda x, bias: F.gelu(x + bias, approximate="tanh"))


def _loss(rows: int, width: int, device: torch.device, dtype: torch.dtype) -> Problem:
    """`width` words. The loss of each token, so that no mean hides an error."""
    inputs = {"x": random((rows, 64), device, dtype), "weight": random((width, 64), device, dtype, seed=1) * 0.2}
    generator = torch.Generator(device).manual_seed(2)
    targets = torch.randint(width, (rows,), device=device, generator=generator)

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return kernels.linear_cross_entropy(x, weight, targets, reduction="none")

    def exact(x: Tensor, weight: Tensor) -> Tensor:
        logits = F.linear(x, weight)
        return F.cross_entropy(logits.to(torch.promote_types(x.dtype, torch.float32)), targets, reduction="none")

    return Problem(inputs, ours, exact)


class Loss(Rows):
    def speed(self, case: str, device: torch.device, dtype: torch.dtype, size: int) -> Timed:
        """Logits of `size` tokens into losses and gradients, in place: the values change, their number does not."""
        words = self._width(case)
        logits = random((size, -(-words // 16) * 16), device, dtype)[:, :words]
        targets = torch.randint(words, (size,), device=device)
        losses, lse = (torch.empty(size, device=device) for _ in range(2))
        scale = torch.ones((), device=device)

        def run() -> None:
            turn_in_triton(logits, targets, losses, lse, scale, -100, 0.0, 1.0, gradient=True)

        return run, {"tokens": size, "words": words}


class Rotary(Rows):
    """A case is the head's width."""

    def _numbers(self, config: LaunchConfig, case: str) -> int:
        return config["HEADS"] * _columns(case) // 2

    def shipped(self, case: str, target: str) -> Case:
        return next(c for c in aot.cases_of("rotary").values() if c.constants["D"] == self._width(case))

    def wrong(self, case: str, device: torch.device, dtype: torch.dtype, rows: int = ODD_ROWS) -> str:
        return wrong(self._problem(rows, case, device, dtype), self.outputs, f"at {rows} tokens")

    def speed(self, case: str, device: torch.device, dtype: torch.dtype, size: int) -> Timed:
        problem = self._problem(size, case, device, dtype)
        return timed_forward(problem.ours, problem.inputs), {"tokens": size, "width": self._width(case)}

    def _problem(self, tokens: int, case: str, device: torch.device, dtype: torch.dtype) -> Problem:
        D = self._width(case)
        H = max(1, 2048 // D)
        cos, sin = rotary_tables(tokens, D, device)
        about = {"n_head": 2 * H, "head_dim": D}
        return Problem(
            {"qkv": random((1, tokens, 3 * H * D), device, dtype)},
            lambda qkv: kernels.rotary(qkv, cos, sin, **about),
            lambda qkv: rotary_reference(qkv, cos, sin, **about),
        )


@dataclass(frozen=True)
class Optimizer(Tunable):
    """A case is a format of weights and moments, whose compile cases are labelled with it and perhaps a chip.

    Tensors whose addresses or sizes are odd have cases of their own, which are too rare to search.
    """

    def cases(self, chip: Chip) -> tuple[str, ...]:
        labels = (label for label, case in aot.cases_of("adamw").items() if chip.target in case.chips())
        return tuple(name for name in (label.partition(" ")[0] for label in labels) if not name.endswith("_odd"))

    def usual(self, chip: Chip) -> tuple[str, ...]:
        return tuple(case for case in self.cases(chip) if case.endswith("int8") or case == "fp32_moments_fp32")

    def shared_bytes(self, config: LaunchConfig, case: str) -> int:
        return 0

    def shipped(self, case: str, target: str) -> Case:
        labelled = aot.cases_of("adamw").items()
        return next(c for label, c in labelled if label.partition(" ")[0] == case and target in c.chips())

    def wrong(
        self, case: str, device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...] = (40_000, 3001)
    ) -> str:
        """Three steps of an aligned and an odd tensor, beside PyTorch's path: one number in a thousand may differ by
        more than rounding, where a random bit falls on its threshold.
        """
        masters = {}
        for path in ("torch", "triton"):
            state = State(case, sizes, device)
            with use_backend(path):
                for step in range(3):
                    state.step(step)
            masters[path] = state.masters()
        expected, found = masters["torch"], masters["triton"]
        apart = (found - expected).abs() > 1e-4 * State.LR + 2e-6 * expected.abs()
        share = (apart | ~found.isfinite()).float().mean().item()
        return f"{share:.1%} of the weights differ from PyTorch's" if share > 1e-3 else ""

    def speed(self, case: str, device: torch.device, dtype: torch.dtype, size: int) -> Timed:
        state = State(case, (size // 4,) * 4, device)
        return lambda: state.step(0), {"parameters": size}


class State:
    """Parameters of given sizes in the format that a case names, and a step of AdamW on them."""

    LR, BETAS = 1e-3, (0.9, 0.95)

    def __init__(self, case: str, sizes: tuple[int, ...], device: torch.device) -> None:
        weights, moments = case.split("_moments_")
        formats = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        dtype, residual = formats[weights.removesuffix("_residual")], weights.endswith("_residual")
        drawn = [random((n,), device, torch.float32, seed=i) * 0.02 for i, n in enumerate(sizes)]
        self.residuals = None
        self.weights = [w.to(dtype) for w in drawn]
        if residual:
            self.weights, self.residuals = map(list, zip(*(split(w, dtype) for w in drawn)))
        first, second = (torch.int8, torch.uint8) if moments == "int8" else (formats[moments],) * 2
        self.moments = [[torch.zeros_like(w, dtype=kind) for w in drawn] for kind in (first, second)]
        blocks = [w.new_zeros(-(-w.numel() // BLOCK), dtype=torch.uint8) for w in drawn]
        self.exponents = blocks if moments == "int8" else None
        self.steps = [w.new_zeros(()) for w in drawn]
        self.grads = [
            [random(w.shape, device, dtype, seed=100 * step + i) for i, w in enumerate(drawn)] for step in range(3)
        ]

    def step(self, number: int) -> None:
        adamw(
            self.weights, self.grads[number], *self.moments, self.steps, lr=self.LR, betas=self.BETAS, eps=1e-8,
            weight_decay=0.1, residuals=self.residuals, exponents=self.exponents, keys=list(range(len(self.weights))),
        )  # fmt: skip

    def masters(self) -> Tensor:
        """Return all weights as fp32."""
        if self.residuals is None:
            return torch.cat([w.float() for w in self.weights])
        return torch.cat([join(w, r) for w, r in zip(self.weights, self.residuals)])


_TILE = {"ROWS": (1, 2, 4, 8), "num_warps": (2, 4, 8, 16)}
_LOOP = _TILE | {"STAGES": (1, 2, 3, 4)}
_WIDE = {"ROWS": (1, 2, 4, 8), "BLOCK": (512, 1024, 2048), "num_warps": (2, 4, 8)}
_SIZES = (8192, 32768)
_INNER = tuple(4 * width for width in GPT_WIDTHS)  # of the MLP
_NORM = Rows("layer_norm_forward", _TILE, _SIZES, "layer_norm", "layer_norm", "forward", _norm)
_SOFTMAX = Rows("softmax_forward", _TILE, _SIZES, "softmax", "softmax", "forward", _softmax)
_ACTIVATION = Rows(
    "bias_activation_forward", _WIDE, _SIZES, "bias_activation", "activation", "forward_gelu_tanh", _activation,
    widths=_INNER,
)  # fmt: skip
TUNABLE: tuple[Tunable, ...] = (
    _NORM,
    replace(
        _NORM, kernel="layer_norm_backward", space=_LOOP, label="backward", outputs=("dx", "dweight", "dbias"),
        streams=3,
    ),
    _SOFTMAX,
    replace(_SOFTMAX, kernel="softmax_backward", label="backward", outputs=("dx",)),
    _ACTIVATION,
    replace(
        _ACTIVATION, kernel="bias_activation_backward", space=_WIDE | {"STAGES": (1, 2, 3, 4)},
        label="backward_gelu_tanh", outputs=("dx", "dbias"), streams=2,
    ),
    Loss(
        "cross_entropy", {"BLOCK": (1024, 2048, 4096, 8192), "STAGES": (1, 2, 3, 4), "num_warps": (4, 8, 16)},
        (1024, 4096), "cross_entropy", "cross_entropy", "both", _loss, ("out", "dx", "dweight"),
        widths=(GPT2_WORDS,), streams=1,
    ),
    Rotary(
        "rotary", {"HEADS": (2, 4, 8, 16, 32), "num_warps": (1, 2, 4, 8)}, _SIZES, "rotary", "rotary", "rotary",
        widths=HEAD_WIDTHS, per_thread=(2, 32),
    ),
    Optimizer("adamw", {"ROWS": (4, 8, 16, 32, 64), "num_warps": (2, 4, 8)}, (1 << 24, 1 << 27)),
)  # fmt: skip
