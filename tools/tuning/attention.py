"""Attention and decoding, as tools/tune.py searches them: a case is the head's width."""

import functools
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import attention, attention_decode
from kernels.aot import Case
from kernels.attention import attention_reference
from kernels.attention_decode import decode_kernel
from kernels.attention_forward import KERNELS
from kernels.attention_tiles import element_case
from kernels.dispatch import CHIPS, Chip
from kernels.launch_configs import LaunchConfig, use_launch_config
from tools.tuning.cases import SHORT, Problem, Timed, Tunable, random, timed_backward, timed_forward, wrong

WIDTHS = (16, 32, 64, 128, 256)
# What results are judged at: odd lengths, of which descriptors take every fourth, and whole tiles.
LENGTHS = (97, 332, 1024)


@dataclass(frozen=True)
class Attention(Tunable):
    """streamed: the constant that says how long the two tiles are that each iteration loads; outputs: which results
    show the kernel's work; new_tokens: of a cache, 0 without one.
    """

    streamed: str = "KEYS"
    outputs: tuple[str, ...] = ("out",)
    new_tokens: int = 0

    def cases(self, chip: Chip) -> tuple[str, ...]:
        return tuple(map(str, WIDTHS)) if chip.triton and chip.tensor_cores else ()

    def usual(self, chip: Chip) -> tuple[str, ...]:
        return tuple(case for case in self.cases(chip) if case in ("64", "128"))

    def candidates(self, case: str, chip: Chip) -> list[LaunchConfig]:
        return [config for config in super().candidates(case, chip) if chip.tma or not config.get("TMA")]

    def current(self, case: str, chip: Chip) -> LaunchConfig:
        found = super().current(case, chip)
        return {key: found.get(key, 0) for key in self.space}  # tables of chips without TMA do not speak of it

    def shared_bytes(self, config: LaunchConfig, case: str) -> int:
        """The tiles in flight, in 16 bits."""
        return max(1, config["num_stages"] - 1) * 2 * config[self.streamed] * int(case) * 2

    def shipped(self, case: str, target: str) -> Case:
        """With documents, the harder variant."""
        width, dtype = int(case), SHORT[CHIPS[target].dtype]
        if self.new_tokens:
            return element_case(self.kernel, decode_kernel, target, dtype, width, shared=4, D=width)
        return element_case(self.kernel, KERNELS[self.kernel], target, dtype, width, docs=True, D=width)

    def to_compile(self, config: LaunchConfig, case: str, target: str) -> Case:
        """A candidate's tiles and TMA are in the signature, too: a case is made anew from it."""
        with use_launch_config(self.kernel, case, config):
            made = self.shipped(case, target)
        return replace(made, label=" ".join(f"{k}={v}" for k, v in config.items()))

    def wrong(self, case: str, device: torch.device, dtype: torch.dtype, lengths: tuple[int, ...] = LENGTHS) -> str:
        """Odd lengths, shared heads, documents, full tiles."""
        for length in lengths:
            for docs in (False,) if self.new_tokens else (False, True):
                problem = self.problem(2, length, 4, 2, int(case), device, dtype, docs)
                where = f"at length {length}{' with documents' if docs else ''}"
                fault = wrong(problem, self.outputs, where)
                if fault:
                    return fault
        return ""

    def speed(self, case: str, device: torch.device, dtype: torch.dtype, size: int) -> Timed:
        """16,384 tokens in sequences of `size`, heads that fill a width of 2048."""
        width, B = int(case), max(1, 16384 // size)
        H = max(1, 2048 // width)
        problem = self.problem(B, size, H, max(1, H // 4) if self.new_tokens else H, width, device, dtype, False)
        timed = timed_forward if self.outputs == ("out",) else timed_backward
        return timed(problem.ours, problem.inputs), {"B": B, "T": size, "H": H, "D": width}

    def problem(
        self, B: int, T: int, H: int, G: int, width: int, device: torch.device, dtype: torch.dtype, docs: bool
    ) -> Problem:
        """Attention over T tokens, or of the newest `new_tokens` to a cache of T."""
        new = min(self.new_tokens, T)
        q = random((B, new or T, H, width), device, dtype)
        k, v = (random((B, T, G, width), device, dtype, seed=seed) for seed in (2, 3))
        inputs = {"q": q, "k": k, "v": v}
        if new:
            ours = functools.partial(_decode, length=T)
            return Problem(inputs, ours, _decode_by_definition, backward=False)
        starts = documents(B, T, device) if docs else None
        ours, exact = (functools.partial(f, doc_start=starts) for f in (attention, attention_reference))
        return Problem(inputs, ours, exact)


def documents(B: int, T: int, device: torch.device) -> Tensor:
    """Return doc_start (B, T) of documents of about 50 tokens."""
    begins = torch.rand(B, T, device=device, generator=torch.Generator(device).manual_seed(4)) < 0.02
    positions = torch.arange(T, dtype=torch.int32, device=device).expand(B, T)
    return torch.where(begins, positions, 0).cummax(1).values


def _decode(q: Tensor, k: Tensor, v: Tensor, length: int) -> Tensor:
    return attention_decode(q, k, v, length)


def _decode_by_definition(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    length = k.shape[1]
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    mask = torch.ones(q.shape[1], length, dtype=torch.bool, device=q.device).tril(length - q.shape[1])
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)


_TILES = {
    "ROWS": (64, 128), "KEYS": (32, 64, 128), "num_warps": (4, 8), "num_stages": (1, 2, 3, 4), "EDGE_STAGES": (None, 1),
    "TMA": (0, 1),
}  # fmt: skip
_DECODE = {"KEYS": (32, 64, 128), "num_warps": (2, 4, 8), "num_stages": (1, 2, 3, 4), "EDGE_STAGES": (None,)}
_SIZES = (2048, 8192)
_FORWARD = Attention("attention_forward", _TILES, _SIZES)
TUNABLE: tuple[Tunable, ...] = (
    _FORWARD,
    replace(
        _FORWARD, kernel="attention_backward_q", space=_TILES | {"ROWS": (32, 64, 128)}, outputs=("dq",)
    ),
    replace(
        _FORWARD, kernel="attention_backward_kv", space=_TILES | {"ROWS": (16, 32, 64), "KEYS": (64, 128)},
        streamed="ROWS", outputs=("dk", "dv"),
    ),
    Attention("attention_decode", {"ROWS": (16,)} | _DECODE, _SIZES, new_tokens=1),
    Attention("attention_decode_many", {"ROWS": (32, 64)} | _DECODE, _SIZES, new_tokens=32),
)  # fmt: skip
