"""States streamed from host memory: the same bits as states that stay, however parameters are cut."""

import pytest
import torch
import torch.nn as nn

from engine.command_line import parse
from engine.footprint import METHODS, predict
from engine.model import GPT
from engine.optimizer import AdamW, parameter_groups
from engine.streamed_adamw import HOST_SLAB_BYTES, HostMemory, StreamedAdamW, portions
from kernels.number_formats import BLOCK, GROUP
from tests.engine.conftest import state_bytes

UNIT = GROUP * BLOCK
SHAPES = [(300, 700), (129, 1001), (64, 48), (5, 3), (700,), (1, 65537)]  # some longer than a portion, odd ends
FORMATS = [
    {"weights": weights, "moments": moments}
    for weights in ("fp32", "residual", "stochastic")
    for moments in ("fp32", "bf16", "int8")
] + [{"weights": "residual", "moments": "int8", "dtype": torch.float16}]
NAMES = ["-".join(str(v).removeprefix("torch.") for v in f.values()) for f in FORMATS]


def make(cls: type, formats: dict, device: str = "cpu", **options) -> tuple[list[nn.Parameter], AdamW]:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator) * 0.02 for shape in SHAPES]
    parameters = [nn.Parameter(weight.to(device)) for weight in weights]
    return parameters, cls(parameter_groups(nn.ParameterList(parameters), 0.1), lr=1e-3, seed=5, **formats, **options)


def step(parameters: list[nn.Parameter], optimizer: AdamW, number: int, bad: bool = False) -> None:
    """One update by gradients in two parts, scaled as clipping and loss scaling do."""
    device = parameters[0].device
    generator = torch.Generator(device).manual_seed(100 + number)
    for p in parameters:
        parts = [torch.randn(p.shape, generator=generator, device=device).to(p.dtype) for _ in range(2)]
        p.grad = parts[0] + parts[1]
    grad_scale, found_inf = (torch.full((), value, device=device) for value in (0.37, float(bad)))
    optimizer.step(grad_scale=grad_scale, found_inf=found_inf)
    optimizer.zero_grad()


def bits(parameters: list[nn.Parameter], optimizer: AdamW) -> list[torch.Tensor]:
    return [t.clone() for p in parameters for t in (p.detach(), *(s for _, s in sorted(optimizer.state[p].items())))]


def assert_identical(a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    for x, y in zip(a, b, strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y)


@pytest.mark.parametrize("formats", FORMATS, ids=NAMES)
@pytest.mark.parametrize("portion", [UNIT, 3 * UNIT])
def test_streamed_is_resident_bit_for_bit(formats, portion):
    """With a skipped step in between, which leaves everything as it was."""
    there, here = make(StreamedAdamW, formats, portion=portion), make(AdamW, formats)
    for number in range(4):
        before = bits(*there) if number == 2 else None
        for pair in (there, here):
            step(*pair, number, bad=number == 2)
        if before:
            assert_identical(bits(*there), before)
    assert_identical(bits(*there), bits(*here))


@pytest.mark.gpu
@pytest.mark.parametrize("formats", FORMATS, ids=NAMES)
def test_on_a_gpu_copies_race_with_updates_and_no_bit_changes(formats):
    """More portions than slots, steps launched without waiting, a computation between them that takes freed memory."""
    there, here = make(StreamedAdamW, formats, "cuda", portion=UNIT), make(AdamW, formats, "cuda")
    for pair in (there, here):
        for number in range(8):
            step(*pair, number, bad=number == 3)
            torch.randn(2048, 2048, device="cuda").exp_().sum()
    torch.cuda.synchronize()
    there[1].synchronize()
    assert all(slot.free is not None for slot in there[1]._slots)
    assert all(there[1].state[p]["exp_avg"].is_pinned() for p in there[0] if p.dim() >= 2)
    assert_identical([bit.cpu() for bit in bits(*there)], [bit.cpu() for bit in bits(*here)])
    for p, q in zip(there[0], here[0]):
        exported, expected = there[1].export_state(p), here[1].export_state(q)
        assert_identical(list(exported.values()), list(expected.values()))


@pytest.mark.parametrize("formats", FORMATS, ids=NAMES)
@pytest.mark.parametrize("way", [(StreamedAdamW, AdamW), (AdamW, StreamedAdamW), (StreamedAdamW, StreamedAdamW)])
def test_states_pass_between_streamed_and_resident(formats, way):
    """Through what a checkpoint holds."""
    extra = [{"portion": UNIT} if cls is StreamedAdamW else {} for cls in way]
    first = make(way[0], formats, **extra[0])
    for number in range(2):
        step(*first, number)
    second = make(way[1], formats, **extra[1])
    for p, q in zip(first[0], second[0]):
        second[1].import_state(q, **first[1].export_state(p), step=2)
    for pair in (first, second):
        step(*pair, 2)
    assert_identical(bits(*second), bits(*first))


def test_portions_cover_every_element_once_and_in_order():
    parameters = [torch.empty(shape) for shape in SHAPES]
    cut = list(portions(parameters, 2 * UNIT))
    ends = {id(p): 0 for p in parameters}
    for pieces in cut:
        reached = 0
        for piece in pieces:
            assert piece.start == ends[id(piece.parameter)] and piece.start % UNIT == 0
            assert piece.offset >= reached and piece.offset % BLOCK == 0
            reached = piece.offset + piece.stop - piece.start
            ends[id(piece.parameter)] = piece.stop
            assert piece.last == (piece.stop == piece.parameter.numel())
        assert reached <= 2 * UNIT
    assert all(ends[id(p)] == p.numel() for p in parameters)


def test_a_portion_that_cuts_groups_of_blocks_is_refused():
    with pytest.raises(ValueError, match="multiple of 65536"):
        make(StreamedAdamW, {}, portion=BLOCK)


def test_matrices_alone_lie_in_host_memory_and_share_slabs():
    parameters, optimizer = make(StreamedAdamW, {"weights": "residual", "moments": "int8"}, portion=UNIT)
    step(parameters, optimizer, 0)
    slabs = {slab.untyped_storage().data_ptr() for slab, _ in optimizer.host._slabs}
    for p in parameters:
        for key, state in optimizer.state[p].items():
            assert (state.untyped_storage().data_ptr() in slabs) == (p.dim() >= 2 and key != "step")


def test_memory_that_the_system_does_not_give_is_named(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("CUDA error: out of memory\nmore")

    monkeypatch.setattr(torch, "zeros", refuse)
    with pytest.raises(MemoryError, match="no 4 MiB of pinned host memory beside 0 MiB: CUDA error: out of memory$"):
        HostMemory(pinned=True).zeros((1 << 20,), torch.float32)


@pytest.mark.parametrize("preset", ["gpt2", "gpt2-xl", "2b", "3b"])
@pytest.mark.parametrize("moments", ["fp32", "int8"])
def test_the_planner_counts_what_the_host_allocates(preset, moments, monkeypatch):
    config = parse([f"--preset={preset}"])[0].model
    with torch.device("meta"):
        model = GPT(config)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    held = state_bytes(matrices, "residual", moments)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *a, pin_memory=False, **k: zeros(*a, **k, device="meta"))
    host = HostMemory(pinned=True)
    for p in matrices:
        host.zeros(tuple(p.shape), torch.int16)
    for p in matrices:
        for dtype in {"fp32": [torch.float32] * 2, "int8": [torch.int8, torch.uint8]}[moments]:
            host.zeros(tuple(p.shape), dtype)
        if moments == "int8":
            host.zeros((-(-p.numel() // BLOCK),), torch.uint8)
    assert all(slab.numel() == 1 << (slab.numel() - 1).bit_length() for slab, _ in host._slabs)
    method = next(m for m in METHODS if m.streamed and m.moments == moments)
    parts = predict(config, method, dtype="bf16", micro_batch_size=1).host
    counted = parts["master_weights"] + parts["optimizer_states"]
    assert held["residuals"] + held["moments"] <= host.bytes + 4 * len(matrices) and host.bytes <= counted
    assert counted - host.bytes <= 2 * HOST_SLAB_BYTES
