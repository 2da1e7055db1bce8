"""Time and memory go to the part of the model that spent them, forward and backward, and add up."""

import gzip
import json
from types import SimpleNamespace

import pytest
import torch

from engine.strategy.resident import Resident
from tools import profile_step
from tools.profiling.memory import HELD, MOST_POINTS, Timeline, timeline
from tools.profiling.parts import SCOPE, attribute, busy_seconds, scope, scoped, work_of

FLAGS = [
    "--preset", "gpt2", "--n_layer", "2", "--n_embd", "64", "--n_head", "2", "--block_size", "64",
    "--vocab_size", "256", "--batch_tokens", "512", "--micro_batch_size", "4", "--device", "cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    """A profiled step of a small GPT with two micro-batches: its folder and its tables."""
    folder = tmp_path_factory.mktemp("profile")
    assert profile_step.main([*FLAGS, "--warmup", "2", "--out", str(folder), "--json", str(folder / "copy.json")]) == 0
    return folder, json.loads((folder / "profile.json").read_text())


def test_every_part_has_its_time(profiled):
    _, payload = profiled
    parts = {row["part"]: row for row in payload["parts"]}
    for part in ("embedding", "norm", "attention", "matmul", "activation", "loss"):
        assert parts[part]["forward_s"] > 0 and parts[part]["backward_s"] > 0, part
    assert parts["optimizer"]["forward_s"] == parts["optimizer"]["backward_s"] == 0 < parts["optimizer"]["seconds"]


def test_parts_add_up_to_the_step(profiled):
    _, payload = profiled
    assert sum(row["seconds"] for row in payload["parts"]) == pytest.approx(payload["profiled_step_s"], rel=0.02)
    assert next(row["share"] for row in payload["parts"] if row["part"] == "other") < 0.5


def test_operations_know_their_work(profiled):
    _, payload = profiled
    N, C, V, layers, micro = 256, 64, 256, 2, 2
    operations = {(row["operation"], row["part"]): row for row in payload["operations"]}
    loss = operations["pilesmith::linear_cross_entropy", "loss"]
    assert loss["calls"] == micro and loss["flops"] == micro * 6 * N * C * V
    products = sum(row["flops"] for row in payload["operations"] if row["part"] == "matmul")
    assert products == micro * layers * 6 * N * 12 * C * C
    attention = sum(row["flops"] for row in payload["operations"] if row["part"] == "attention")
    assert attention == micro * layers * 3.5 * 2 * N * 64 * C


def test_files_are_written(profiled, capsys):
    folder, payload = profiled
    assert json.loads((folder / "copy.json").read_text()) == payload
    assert (folder / "memory.png").read_bytes().startswith(b"\x89PNG")
    with gzip.open(folder / "trace.json.gz", "rt") as file:
        assert any(event.get("name") == "part:attention" for event in json.load(file)["traceEvents"])


def test_memory_rises_by_what_is_saved_and_falls_again(profiled):
    _, payload = profiled
    n = 256 * 64 + 64 * 64 + 2 * (12 * 64 * 64 + 13 * 64) + 2 * 64
    memory = payload["memory"]
    assert memory["held_bytes"] == 12 * n
    assert memory["peak_bytes"] > 12 * n + 4 * n / 2  # gradients, at least half of them beside activations


def test_a_long_timeline_is_thinned_and_keeps_its_peak():
    totals = [i % 1000 for i in range(3000)]
    line = Timeline([i * 1e-3 for i in range(3000)], {HELD: [5] * 3000, "norm": totals}, 1.0)
    kept = line.to_dict()
    assert len(kept["seconds"]) == len(kept["held"]["norm"]) <= MOST_POINTS
    assert max(kept["held"]["norm"]) == 999 and kept["seconds"] == sorted(kept["seconds"])


def test_what_a_profiler_begins_with_is_no_part_of_the_step(tmp_path, monkeypatch):
    """On a GPU CUPTI starts, and ops enter torch.library, which takes seconds: in a step before the one that counts."""
    watched, run = [], Resident.forward_backward

    def forward_backward(*arguments):
        watched.append(torch.autograd._profiler_enabled())
        return run(*arguments)

    monkeypatch.setattr(Resident, "forward_backward", forward_backward)
    assert profile_step.main([*FLAGS, "--warmup", "1", "--out", str(tmp_path)]) == 0
    assert watched == [False, True, True]


def test_compile_is_refused(capsys):
    assert profile_step.main([*FLAGS, "--compile", "true"]) == 2
    assert "profile without it" in capsys.readouterr().err


def test_what_does_not_fit_is_said_in_a_line(tmp_path, capsys, monkeypatch):
    def measure(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore of it")

    monkeypatch.setattr(profile_step, "measure", measure)
    assert profile_step.main([*FLAGS, "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said == "error: out of memory: CUDA out of memory. Tried to allocate 20.00 GiB.: try --micro_batch_size 1\n"


def test_what_cannot_be_written_is_said_in_a_line(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    assert profile_step.main([*FLAGS, "--out", str(tmp_path / "file")]) == 2
    assert f"error: --out {tmp_path / 'file'} is a file: name a folder\n" in capsys.readouterr().err
    (tmp_path / "trace.json.gz").symlink_to("/dev/full")
    assert profile_step.main([*FLAGS, "--warmup", "1", "--out", str(tmp_path)]) == 2
    assert "error: [Errno 28] No space left on device" in capsys.readouterr().err
    assert profile_step.main([*FLAGS, "--warmups", "1"]) == 2
    assert "did you mean '--warmup'?" in capsys.readouterr().err


def test_recomputation_belongs_to_the_backward_pass(tmp_path):
    assert (
        profile_step.main([*FLAGS, "--activation_checkpointing", "true", "--warmup", "1", "--out", str(tmp_path)]) == 0
    )
    payload = json.loads((tmp_path / "profile.json").read_text())
    products = sum(row["flops"] for row in payload["operations"] if row["part"] == "matmul")
    assert products == 2 * 2 * 8 * 256 * 12 * 64 * 64  # a fourth pass


def test_backward_finds_its_forward():
    """Operations without a gradient of their own, such as a cast to the same type, see the next one's number."""

    class Pair(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = torch.nn.Embedding(8, 64), torch.nn.LayerNorm(64)

    model = Pair()
    model.first.forward, model.second.forward = (
        scoped(model.first.forward, "embedding"),
        scoped(model.second.forward, "norm"),
    )
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profiler:
        model.second((torch.sin(model.first(torch.arange(8))) * 2).float()).sum().backward()
    parts = attribute(profiler.events(), False, 4).parts
    assert parts["embedding"].backward > 0 and parts["norm"].backward > 0 and parts["other"].backward > 0
    named = {e.name: e for e in profiler.events()}
    norm = named["autograd::engine::evaluate_function: NativeLayerNormBackward0"]
    assert parts["norm"].backward == pytest.approx(1e-6 * norm.cpu_time_total, rel=1e-6)


def test_scope_leaves_other_modules_alone():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    before = model[0].forward
    scope(model)
    assert model[0].forward == before


def test_the_profiler_takes_a_scope_for_an_operation():
    """And so gives it the kernels that no other operation launches; a user's annotation gets none."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        scoped(torch.ones, "optimizer")(4)
    (event,) = (e for e in profiler.events() if e.name == SCOPE + "optimizer")
    assert not event.is_user_annotation and [child.name for child in event.cpu_children] == ["aten::ones"]


def test_busy_time_is_a_union():
    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU

    def event(start, end, device=cuda, annotation=False):
        return SimpleNamespace(
            time_range=SimpleNamespace(start=start, end=end), device_type=device, is_user_annotation=annotation
        )

    events = [event(0, 10), event(5, 12), event(20, 30), event(0, 100, cpu), event(0, 100, annotation=True)]
    assert busy_seconds(events) == pytest.approx(22e-6)


def test_kernel_time_counts_on_a_gpu():
    """A GPU's time is that of the kernels that an operation launched, wherever it launched them."""
    device = torch.autograd.DeviceType.CPU

    def event(name, kernels=(), children=(), sequence=-1):
        made = SimpleNamespace(
            name=name, kernels=[SimpleNamespace(duration=d) for d in kernels], cpu_children=list(children),
            sequence_nr=sequence, thread=1, fwd_thread=1, device_type=device, cpu_parent=None,
            input_shapes=[[4, 8], [8, 2]], self_cpu_time_total=1e6, cpu_time_total=1e6,
            time_range=SimpleNamespace(start=0, end=1),
        )  # fmt: skip
        for child in children:
            child.cpu_parent = made
        return made

    mm = event("aten::mm", kernels=[30.0, 10.0], sequence=7)
    forward = event(SCOPE + "activation", children=[event("aten::linear", children=[mm])])
    backward = event(
        "autograd::engine::evaluate_function: MmBackward0", children=[event("aten::mm", kernels=[60.0])], sequence=7
    )
    every = [forward, *forward.cpu_children, mm, backward, *backward.cpu_children]
    found = attribute(every, True, 2)
    assert found.parts["matmul"].forward == pytest.approx(40e-6) and found.parts["matmul"].backward == pytest.approx(
        60e-6
    )
    assert found.operations["aten::mm", "matmul"].calls == 2
    assert found.operations["aten::mm", "matmul"].seconds == pytest.approx(100e-6)


def test_work_by_hand():
    assert work_of("aten::addmm", [[5], [3, 4], [4, 5]], 2) == (2 * 3 * 4 * 5, 2 * (12 + 20 + 15))
    assert work_of("aten::bmm", [[7, 3, 4], [7, 4, 5]], 4) == (7 * 2 * 60, 4 * 7 * 47)
    assert work_of("pilesmith::attention", [[2, 8, 3, 16]] * 3, 2)[0] == 2 * 2 * 3 * 8 * 8 * 16
    assert work_of("pilesmith::attention_backward", [[2, 8, 3, 16]] * 4, 2)[0] == 5 * 2 * 3 * 8 * 8 * 16
    assert work_of("aten::_scaled_dot_product_flash_attention", [[2, 3, 8, 16]] * 3, 2) == work_of(
        "pilesmith::attention", [[2, 8, 3, 16]] * 3, 2
    )
    forward, backward = "pilesmith::attention", "pilesmith::attention_backward"
    packed = work_of("pilesmith::attention_packed", [[2, 8, 3, 5, 16]], 2)
    assert packed == work_of(forward, [[2, 8, 5, 16]] * 3, 2)
    packed = work_of("pilesmith::attention_packed_backward", [[2, 8, 5, 16], [2, 8, 3, 5, 16]], 2)
    assert packed == work_of(backward, [[2, 8, 5, 16]] * 4, 2)
    assert work_of("pilesmith::layer_norm", [[6, 10], [], [10]], 2) == (0, 2 * 60 * 2)
    assert work_of("pilesmith::layer_norm", [[6, 10], [6, 10], [10]], 2) == (0, 4 * 60 * 2)
    assert work_of("pilesmith::layer_norm_backward", [[6, 10], [6, 10], [6, 10], [10]], 2) == (0, 4 * 60 * 2)
    assert work_of("aten::native_layer_norm", [[6, 10]], 2) == (0, 2 * 60 * 2)
    assert work_of("aten::view", [[6, 10]], 2) is None


def test_memory_is_followed_by_address():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = scoped(lambda: torch.ones(1 << 20), "norm")()
        scoped(lambda: torch.ones(1 << 21), "attention")()
    line = timeline(profiler, "cpu", held_bytes=100)
    assert line.held["norm"][-1] == kept.nbytes and line.held["attention"][-1] == 0 and set(line.held[HELD]) == {100}
    assert line.peak[1] == 100 + (1 << 22) + (1 << 23)
