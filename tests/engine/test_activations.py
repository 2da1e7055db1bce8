"""Every way of recomputing gives the bits of the plain step; attention runs once; inputs leave and come back."""

import gc
import weakref

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from engine import checkpoint, train
from engine.config import ModelConfig
from engine.model import GPT
from engine.report import read_metrics
from engine.strategy.activations import ATTENTION_OPS, ON_DEVICE, HostInputs, in_words, recompute_blocks
from kernels import dispatch
from tests.engine.conftest import draw_weights

KINDS = ("blocks", "selective", "offloaded")
SHAPE = dict(n_layer=5, n_head=2, n_embd=32, block_size=32, vocab_size=64)


def model_of(dtype=torch.float32, weights=torch.float32, **changes) -> GPT:
    return draw_weights(GPT(ModelConfig(**(SHAPE | changes)), dtype)).to(weights)


def tokens_of(length: int = 32, rows: int = 2) -> torch.Tensor:
    return torch.randint(64, (rows, length), generator=torch.Generator().manual_seed(1))


def documents(length: int) -> torch.Tensor:
    starts = torch.zeros(2, length, dtype=torch.int32)
    starts[0, 10:], starts[0, 25:], starts[1, 20:] = 10, 25, 20
    return starts


def step(model, tokens, micro_batches: int = 2, **options) -> list[torch.Tensor]:
    """The losses of some micro-batches, and the sums of their gradients."""
    losses = []
    for n in range(micro_batches):
        losses.append(model(tokens.roll(n, 1), tokens, **options))
        losses[-1].backward()
    return [loss.detach() for loss in losses] + [p.grad for p in model.parameters()]


def assert_same(made: list[torch.Tensor], plain: list[torch.Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(made, plain, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "weights"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float16, torch.float16)],
)
@pytest.mark.parametrize(
    ("positions", "length", "masked"), [("rotary", 32, False), ("learned", 32, True), ("rotary", 160, True)]
)
def test_recomputing_changes_no_bit(kind, dtype, weights, positions, length, masked):
    tokens, shape = tokens_of(length), dict(block_size=length, positions=positions)
    options = {"doc_start": documents(length)} if masked else {}
    plain = step(model_of(dtype, weights, **shape), tokens, **options)
    for count in (1, 3, 5):
        model = model_of(dtype, weights, **shape)
        recompute_blocks(model, kind, count)
        assert_same(step(model, tokens, **options), plain)


class Calls(TorchDispatchMode):
    """Counts how often attention is computed, and how many of its outputs still exist."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[StorageWeakRef] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in ATTENTION_OPS:
            self.outputs.append(StorageWeakRef(out[0].untyped_storage()))
        return out

    @property
    def count(self) -> int:
        return len(self.outputs)

    @property
    def alive(self) -> int:
        return sum(not output.expired() for output in self.outputs)


@pytest.mark.parametrize("path", ["sdpa", "sdpa, documents", "chunked", "triton"])
def test_selective_recomputation_computes_attention_once(path):
    length, options = (160, {"doc_start": documents(160)}) if "documents" in path else (32, {})
    tokens = tokens_of(length, 2 if options else 1)
    calls = {}
    try:
        dispatch.force_chip("hip:gfx906" if path == "chunked" else None)
        with dispatch.use_backend("triton" if path == "triton" else "torch"):
            for kind in ("none", "blocks", "selective"):
                model = model_of(n_layer=2, block_size=length)
                recompute_blocks(model, kind, 2)
                with Calls() as calls[kind]:
                    made = step(model, tokens, 1, **options)
                if kind == "none":
                    plain = made
                assert_same(made, plain)
    finally:
        dispatch.force_chip(None)
    assert calls["selective"].count == calls["none"].count == (10 if "documents" in path else 2)
    assert calls["blocks"].count == 2 * calls["none"].count


def test_selective_recomputation_goes_backward_twice_and_leaves_nothing_behind():
    plain, model = model_of(), model_of()
    recompute_blocks(model, "selective", 5)
    gc.disable()  # what is kept must go by itself
    try:
        for each in (plain, model):
            with Calls() as calls:
                loss = each(tokens_of(), tokens_of())
            assert calls.count == calls.alive == 5
            loss.backward(retain_graph=True)
            loss.backward()
            with calls:
                loss = each(tokens_of(), tokens_of())  # a graph that nobody goes back through
            del loss
            assert calls.count == 10 and calls.alive == 0
    finally:
        gc.enable()
    assert_same([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])
    assert all("attend" not in vars(block.attn) for block in model.transformer["h"])
    with torch.no_grad():
        assert torch.equal(model(tokens_of()), plain(tokens_of()))


@pytest.mark.parametrize("kind", ["blocks", "selective"])
def test_a_compiled_model_is_one_graph(kind):
    plain, model = model_of(n_layer=2), model_of(n_layer=2)
    recompute_blocks(model, kind, 2, compiled=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager_decomp_partition")
    torch.testing.assert_close(step(compiled, tokens_of()), step(plain, tokens_of()), rtol=1e-5, atol=1e-6)


class LateCopies(HostInputs):
    """Copies as late as a stream may: when waited for, after all copies before; until then what they write is NaN.

    log: ("out" | "in", address in host memory) as copies begin. lost: device tensors that went before their copy was
    done. most: inputs that were on the device at a time.
    """

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.log: list[tuple[str, int]] = []
        self.lost: list[str] = []
        self.waiting: list[LateCopy] = []
        self.buffers: dict[int, torch.UntypedStorage] = {}
        self.most, self.inputs = 0, weakref.WeakSet()

    def _take_slot(self, x):
        slot = super()._take_slot(x)
        self.buffers[slot.untyped_storage().data_ptr()] = slot.untyped_storage()
        return slot

    def _copy(self, source, to):
        out = to.untyped_storage().data_ptr() in self.buffers
        self.log.append(("out" if out else "in", (to if out else source).data_ptr()))
        copy = LateCopy(self, source, to, out)
        self.waiting.append(copy)
        return copy

    def _pack(self, layer, x):
        item = super()._pack(layer, x)
        self.inputs.add(item)
        self._count()
        return item

    def _unpack(self, item):
        tensor = super()._unpack(item)
        self._count()
        return tensor

    def _count(self) -> None:
        self.most = max(self.most, sum(item.tensor is not None for item in self.inputs))


class LateCopy:
    def __init__(self, owner: LateCopies, source: torch.Tensor, to: torch.Tensor, out: bool) -> None:
        self.owner = owner
        self.source = source.clone() if out else source
        self.to = (lambda: to) if out else weakref.ref(to)
        to.fill_(torch.nan)

        def gone() -> None:
            if self in owner.waiting:
                owner.lost.append("out" if out else "in")

        weakref.finalize(source if out else to, gone)

    def wait(self) -> None:
        while self in self.owner.waiting:
            copy = self.owner.waiting.pop(0)
            if copy.to() is not None:
                copy.to().copy_(copy.source)


def offloaded(inputs: HostInputs, count: int, monkeypatch, **changes) -> GPT:
    monkeypatch.setattr("engine.strategy.activations.HostInputs", lambda n: inputs)
    model = model_of(**changes)
    recompute_blocks(model, "offloaded", count)
    return model


@pytest.mark.parametrize("count", [1, 2, 3, 6, 8])
def test_copies_may_take_as_long_as_they_like(count, monkeypatch):
    inputs = LateCopies(count)
    model, plain = offloaded(inputs, count, monkeypatch, n_layer=8), model_of(n_layer=8)
    for _ in range(2):
        assert_same(step(model, tokens_of()), step(plain, tokens_of()))
    assert not inputs.lost
    assert inputs.most == min(count, ON_DEVICE)
    assert not list(inputs.inputs)


def test_inputs_leave_in_order_and_come_back_one_block_ahead_into_buffers_made_once(monkeypatch):
    inputs = LateCopies(5)
    model = offloaded(inputs, 5, monkeypatch, n_layer=6)
    for layer, block in enumerate(model.transformer["h"]):
        block.ln_1.register_forward_pre_hook(lambda *_, layer=layer: inputs.log.append(("block", layer)))
    orders = []
    for _ in range(3):
        inputs.log.clear()
        step(model, tokens_of(), 1)
        layers = {address: n for n, address in enumerate(a for what, a in inputs.log if what == "out")}
        orders.append([f"{what} {n if what == 'block' else layers[n]}" for what, n in inputs.log])
    forward = ["out 0", "block 0", "out 1", "block 1", "out 2", "block 2", "block 3", "block 4", "block 5"]
    backward = ["block 4", "in 2", "block 3", "in 1", "block 2", "in 0", "block 1", "block 0"]
    assert orders == [forward + backward] * 3
    assert len(inputs.buffers) == 1 and inputs.host_bytes == 3 * 2 * 32 * 32 * 4


def test_only_the_last_inputs_are_still_on_the_device_when_the_loss_is_known():
    for kind, held in (("none", 8), ("blocks", 8), ("selective", 8), ("offloaded", ON_DEVICE)):
        model, inputs = model_of(n_layer=8), []
        recompute_blocks(model, kind, 8)
        for block in model.transformer["h"]:
            block.ln_1.register_forward_pre_hook(
                lambda _, arguments: inputs.append(StorageWeakRef(arguments[0].untyped_storage()))
            )
        loss = model(tokens_of(), tokens_of())
        assert [not x.expired() for x in inputs] == [False] * (8 - held) + [True] * held, kind
        loss.backward()
        del loss
        assert all(x.expired() for x in inputs), kind


def test_without_gradients_nothing_leaves(monkeypatch):
    inputs = LateCopies(5)
    model = offloaded(inputs, 5, monkeypatch)
    with torch.no_grad():
        assert torch.equal(model(tokens_of(), tokens_of()), model_of()(tokens_of(), tokens_of()))
    assert inputs.log == [] and inputs.host_bytes == 0


def test_several_graphs_other_lengths_and_a_backward_pass_that_breaks_off(monkeypatch):
    inputs = LateCopies(5)
    model, plain = offloaded(inputs, 5, monkeypatch), model_of()

    def both(use) -> None:
        made, expected = ([*use(each), *(p.grad for p in each.parameters())] for each in (model, plain))
        assert_same(made, expected)

    def interleaved(each) -> list[torch.Tensor]:
        losses = [each(tokens_of(length), tokens_of(length)) for length in (16, 32, 8)]
        for loss in losses:
            loss.backward()
        return losses

    def twice(each) -> list[torch.Tensor]:
        loss = each(tokens_of(), tokens_of())
        loss.backward(retain_graph=True)
        loss.backward()
        return [loss]

    both(interleaved)
    both(twice)
    abandoned = model(tokens_of(), tokens_of())
    repeats = iter([False, True])

    def broken(*_) -> None:
        if next(repeats):
            raise RuntimeError("out of memory")

    handle = model.transformer["h"][2].ln_1.register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        model(tokens_of(), tokens_of()).backward()
    handle.remove()
    del abandoned
    for each in (model, plain):
        each.zero_grad()
    before = inputs.host_bytes
    both(lambda each: step(each, tokens_of())[:2])
    assert not inputs.lost and inputs.host_bytes == before


def test_memory_that_the_system_does_not_give_is_named(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("CUDA error: out of memory\nmore")

    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(MemoryError, match="no 12 MiB of host memory for the inputs of blocks: CUDA error: out of mem"):
        HostInputs(ON_DEVICE + 3)._take_slot(torch.zeros(1 << 20))


@pytest.mark.slow
def test_runs_recompute_in_every_way_and_go_on_in_another(tiny_flags, tmp_path, capsys):
    def losses(run) -> dict[tuple[int, str], float]:
        records = read_metrics(tmp_path / run)
        return {(r["step"], key): r[key] for r in records for key in ("loss", "val_loss") if key in r}

    flags = [*tiny_flags, "--n_layer=4", "--micro_batch_size=2"]
    assert train.main([*flags, f"--run_dir={tmp_path}/none"]) == 0
    capsys.readouterr()
    for kind, count in (("blocks", 3), ("selective", 2), ("offloaded", 4)):
        asked = [f"--run_dir={tmp_path}/{kind}", f"--activation_checkpointing={kind}", f"--recomputed_blocks={count}"]
        assert train.main([*flags, *asked]) == 0
        assert losses(kind) == losses("none")
        assert in_words(kind, count) in capsys.readouterr().out
    begun = str(checkpoint.checkpoints(tmp_path / "selective")[0])
    again = ["--resume", begun, f"--run_dir={tmp_path}/again", "--activation_checkpointing=offloaded"]
    assert train.main(again) == 0
    assert losses("again") == {key: loss for key, loss in losses("none").items() if key[0] > 4}
