"""The benchmark measures what it says: contenders are one model, meters see what is there, the file is valid."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import contenders, measuring, meters, throughput
from benchmarks.contenders import CONTENDERS, Step, Unsupported, some_weights
from benchmarks.environment import environment
from benchmarks.measuring import Job, Measured, random_batches, summarise
from engine.cards import CARDS, get
from engine.command_line import parse
from engine.config import ConfigError, from_dict, merge, preset
from engine.distributed import Processes
from engine.model import GPT, flops_per_token
from engine.placement import settle

CPU = torch.device("cpu")
TINY = {
    "model": {"n_layer": 2, "n_embd": 32, "n_head": 2, "block_size": 16, "vocab_size": 96},
    "optimizer": {"batch_tokens": 64},
}
FLAGS = [
    "--preset", "13m", "--n_embd", "32", "--n_head", "2",
    "--block_size", "16", "--vocab_size", "96", "--batch_tokens", "64",
]  # fmt: skip


def tiny(name="gpt2", **model):
    config = from_dict(merge(preset(name), TINY, {"model": model}))
    return settle(config, CPU, torch.float32, Processes())[0]


def loss_of(name, config, weights=None):
    """The loss of a contender's first step, of another's with these weights of ours."""
    batches = random_batches(config, config.optimizer.micro_batch_size, 1, seed=1)
    step = CONTENDERS[name](config, CPU, torch.float32, 1, Processes())
    if weights:
        with torch.no_grad():
            for key, value in step.model.state_dict().items():
                source = weights[our_name(name, key)]
                flipped = name == "transformers" and key.endswith(("c_attn.weight", "c_fc.weight", "c_proj.weight"))
                value.copy_(source.T if flipped else source)
    return step(batches).item()


def our_name(name, key):
    first, _, rest = key.partition(".")
    if name == "transformers" or first == "lm_head":
        return key
    if first == "blocks":
        return "transformer.h." + rest.replace("mlp.0", "mlp.c_fc").replace("mlp.2", "mlp.c_proj")
    return f"transformer.{key}"


def our_weights(config):
    weights = dict(some_weights(GPT.outline(config.model), config.seed))
    return {"lm_head.weight": weights["transformer.wte.weight"]} | weights  # which a tied head has no weights beside


@pytest.mark.parametrize("name", ["pytorch", "transformers"])
@pytest.mark.parametrize("activation", ["gelu_tanh", "relu"])
def test_contenders_are_the_same_model(name, activation):
    config = tiny(activation=activation)
    assert loss_of(name, config, our_weights(config)) == pytest.approx(loss_of("pilesmith", config), rel=1e-5)


def test_rotary_contenders_agree():
    config = tiny("2b")
    assert loss_of("pytorch", config, our_weights(config)) == pytest.approx(loss_of("pilesmith", config), rel=1e-5)


def test_what_cannot_be_expressed_is_refused():
    with pytest.raises(Unsupported, match="learned positions only"):
        contenders.classic(tiny("2b"), CPU, torch.float32, 1, Processes())
    with pytest.raises(Unsupported, match="needs a GPU"):
        contenders.transformers_liger(tiny(), CPU, torch.float32, 1, Processes())


def test_a_steps_memory_is_what_it_adds():
    """Also where an earlier step has left its memory with the C library: many blocks, and one above them that stays."""
    kept = []

    def step():
        blocks = [torch.ones(1 << 20, dtype=torch.uint8) for _ in range(64)]
        kept.append(torch.ones(1 << 16, dtype=torch.uint8))
        return len(blocks)

    for _ in range(4):
        assert meters.step_bytes(step, CPU) == pytest.approx(64 << 20, rel=0.1)
    assert meters.energy_j(CPU) is None


def test_the_interpreter_is_never_timed(monkeypatch):
    monkeypatch.setattr(meters.dispatch, "interpreting", lambda: True)
    assert set(meters.kernels_in_use(CPU).values()) == {"torch"}  # it is set, but nothing runs in it
    with meters.dispatch.use_backend("triton"), pytest.raises(ConfigError, match="times mean nothing"):
        meters.kernels_in_use(CPU)


@pytest.mark.parametrize("name", ["transformers", "pytorch", "classic"])
@pytest.mark.parametrize("preset_name", ["gpt2", "2b"])
def test_contenders_have_our_parameters_and_operations(name, preset_name):
    """Within a hundredth, but for an output that is not tied; then the step says so, and counts its own."""
    config = tiny(preset_name, n_embd=64)
    if name == "classic" and config.model.positions != "learned":
        return
    ours = GPT.outline(config.model)
    step = CONTENDERS[name](config, CPU, torch.float32, 1, Processes())
    untied = name == "classic" and config.model.tie_head
    head = config.model.vocab_size * (config.model.n_embd + 1) if untied else 0
    assert step.n_parameters - head == pytest.approx(ours.num_parameters(), rel=0.01)
    assert step.differs == ("untied head, ReLU" if untied else "")
    batches = random_batches(config, config.optimizer.micro_batch_size, 1, seed=1)
    with FlopCounterMode(display=False) as theirs:
        step(batches)
    tokens, products = batches[0].tokens.numel(), theirs.get_total_flops()
    assert products == pytest.approx(tokens * step.flops_per_token, rel=0.1)
    assert step.flops_per_token == pytest.approx(flops_per_token(config.model, ours.num_parameters()), rel=0.1)


def test_a_comparison_from_the_command_line(tmp_path, capsys, validate):
    file = tmp_path / "out.json"
    options = [
        "--compare", "classic,transformers-liger", "--steps", "3", "--warmup", "1",
        "--gpu_memory", "rtx3090", "--out", str(file),
    ]  # fmt: skip
    assert throughput.main([*FLAGS, *options]) == 0
    payload = json.loads(file.read_text())
    validate(payload, "throughput")
    assert payload["results"]["transformers-liger"].startswith("not run: ")  # not installed, or here on a CPU
    assert payload["results"]["pilesmith"]["alloc_retries"] == 0
    sizes = [payload["results"][name]["n_parameters"] for name in ("pilesmith", "classic")]
    assert sizes == [payload["n_parameters"]] * 2 and payload["results"]["classic"]["differs"] == ""
    assert payload["kernels"]["attention"] == "torch" and payload["card"] is None
    assert payload["results"]["pilesmith"]["steps"] == payload["results"]["classic"]["steps"] == 3
    losses = payload["results"]["pilesmith"]["losses"]
    assert len(losses) == 1 + 1 + 3 and losses == sorted(losses, reverse=True)
    assert payload["config"]["optimizer"]["micro_batch_size"] == 4 and payload["gpu_memory_bytes"] > 20 * 2**30
    said = capsys.readouterr()
    assert "ours is" in said.out and "--gpu_memory rtx3090 is not imposed: no GPU here" in said.err


def test_a_contender_that_is_not_installed_takes_no_process(monkeypatch):
    monkeypatch.setattr(contenders.importlib.util, "find_spec", lambda name: name != "liger_kernel" or None)
    monkeypatch.setattr(measuring, "Running", None)
    job = Job("transformers-liger", from_dict(merge(preset("gpt2"), TINY)))
    assert dict(measuring.compare({"it": job}, CPU, 1, 1)) == {"it": "not run: liger-kernel is not installed"}
    assert contenders.not_installed("transformers") == contenders.not_installed("pytorch") == ""


@pytest.mark.slow
def test_a_contender_that_cannot_compile_is_named_and_why(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    config = from_dict(merge(preset("gpt2"), TINY))
    outcome = dict(measuring.compare({"it": Job("pytorch-compiled", config, threads=1)}, CPU, warmup=1, steps=1))["it"]
    assert outcome.startswith("failed: InductorError: InvalidCxxCompiler: No working C++ compiler")


def test_a_larger_device_does_as_a_card_would(tmp_path, validate, capsys):
    file = tmp_path / "out.json"
    assert throughput.main([*FLAGS, "--card", "t4", "--steps", "2", "--warmup", "1", "--out", str(file)]) == 0
    payload = json.loads(file.read_text())
    validate(payload, "throughput")
    assert (payload["card"], payload["dtype"], payload["gpu_memory_bytes"]) == ("T4", "float16", get("t4").memory_bytes)
    assert "the memory of --card t4 is not imposed: no GPU here" in capsys.readouterr().err
    assert payload["host_memory_bytes"] > 2**30 and meters.dispatch.chip(CPU).target == "cpu"


@pytest.mark.parametrize(
    "card, fused",
    [
        ("t4", (False, False, True)),
        ("rx6900xt", (False, False, False)),
        ("rx7900xtx", (True, True, True)),  # without a row of its own
        ("rtx3090", (True, True, True)),
    ],
)
def test_a_pretended_card_has_its_own_fused_attention(card, fused, monkeypatch):
    """Flash, cuDNN's, the efficient one: as set while a step runs, which is when PyTorch chooses."""
    cuda = torch.backends.cuda
    switches = [
        (cuda.flash_sdp_enabled, cuda.enable_flash_sdp),
        (cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp),
        (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp),
    ]
    before, seen, sent, asked = [on() for on, _ in switches], [], [], iter([1, 1, 0])

    def contender(*_):
        def step(batches):
            seen.append(tuple(on() for on, _ in switches))
            return torch.zeros(())

        return Step(step, None, 1, 1)

    monkeypatch.setitem(CONTENDERS, "it", contender)
    monkeypatch.setattr(measuring.os, "environ", dict(measuring.os.environ))
    job = Job("it", from_dict(merge(preset("gpt2"), TINY)), card=get(card), threads=torch.get_num_threads())
    try:
        measuring.measure(job, 0, 0, SimpleNamespace(recv=lambda: next(asked), send=sent.append))
    finally:
        meters.dispatch.force_chip(None)
        for (_, switch), on in zip(switches, before):
            switch(on)
    assert isinstance(sent[-1], Measured) and set(seen) == {fused} and len(seen) == 3


def test_any_known_card_can_be_pretended() -> None:
    for card in CARDS:
        asked = throughput.what_is_asked(*throughput.parse_arguments([*FLAGS, f"--card={card.name}"]))
        assert asked.card == card and (asked.dtype == torch.bfloat16) == (card.bf16_flops > 0)


def test_settings_that_cannot_be_are_told_by_the_process_that_measures(monkeypatch):
    sent, config = [], from_dict(merge(preset("gpt2"), TINY, {"strategy": {"device": "cuda:7"}}))
    monkeypatch.setattr(measuring.os, "environ", dict(measuring.os.environ))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    job = Job("pilesmith", config, threads=torch.get_num_threads())
    measuring.measure(job, 0, 0, SimpleNamespace(recv=None, send=sent.append))
    assert sent[0].startswith("not run: --device cuda:7: this PyTorch")


def test_retried_allocations_are_those_of_the_timed_steps(monkeypatch):
    count, asked, sent = iter([5, 7, 7, 10]), iter([1, 1, 1, 0]), []
    monkeypatch.setattr(measuring, "alloc_retries", lambda device: next(count))
    monkeypatch.setattr(measuring.os, "environ", dict(measuring.os.environ))
    job = Job("pilesmith", from_dict(merge(preset("gpt2"), TINY)), threads=torch.get_num_threads())
    measuring.measure(job, 0, 0, SimpleNamespace(recv=lambda: next(asked), send=sent.append))
    assert summarise(sent[-1], None)["alloc_retries"] == 2 + 3
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: {"num_alloc_retries": 4})
    assert meters.alloc_retries(torch.device("cuda")) == 4 and meters.alloc_retries(CPU) == 0


def test_smaller_micro_batches_are_tried_for_others_where_one_does_not_fit(monkeypatch):
    tried = []

    def take_turns(jobs, warmup, steps, rounds):
        ((name, job),) = jobs.items()
        size = job.config.optimizer.micro_batch_size or 8
        tried.append(size)
        return {name: measuring.OutOfMemory("tried to allocate 20 GiB", size) if size > 2 else "fits"}

    monkeypatch.setattr(measuring, "take_turns", take_turns)
    config = from_dict(merge(preset("gpt2"), TINY))
    assert measuring.largest_that_fits("it", Job("pytorch", config), 1, 1) == "fits" and tried == [8, 4, 2]
    ours = measuring.largest_that_fits("it", Job("pilesmith", config), 1, 1)
    assert ours == "out of memory: tried to allocate 20 GiB" and tried == [8, 4, 2, 8]


def test_a_step_is_such_as_a_cpu_takes_in_a_minute(capsys):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")

    def tokens(flags: str, device: torch.device = cpu, processes: int = 1) -> int:
        return meters.within_minutes(parse(flags.split())[0], device, processes).optimizer.batch_tokens

    assert tokens("--preset=gpt2") == 8192
    assert "8,192 tokens, not 524,288" in capsys.readouterr().err
    assert tokens("--preset=gpt2", gpu) == 524_288
    assert tokens("--preset=gpt2 --batch_tokens=65536") == 65536
    assert tokens("--preset=13m") == 2048
    assert tokens("--preset=2b --micro_batch_size=3") == 3 * 2048
    assert tokens("--preset=2b --micro_batch_size=4", cpu, 2) == 8 * 2048


def test_energy_is_nvmls(monkeypatch):
    device = torch.device("cuda", 0)
    millijoules = iter([5000, 12500])
    nvml = SimpleNamespace(
        NVMLError=KeyError, nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=lambda uuid: {"GPU-12ab": "it"}[uuid],
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(millijoules) if handle == "it" else 0,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    uuid = "12ab"
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=uuid))
    meters._nvml_handle.cache_clear()
    try:
        assert (meters.energy_j(device), meters.energy_j(device)) == (5.0, 12.5)
        meters._nvml_handle.cache_clear()
        uuid = "of another"
        assert meters.energy_j(device) is None
        meters._nvml_handle.cache_clear()
        monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed
        assert meters.energy_j(device) is None
    finally:
        meters._nvml_handle.cache_clear()


@pytest.mark.slow  # DeepSpeed in two processes
def test_two_processes_share_a_batch():
    config = from_dict(merge(preset("gpt2"), TINY, {"optimizer": {"micro_batch_size": 1}}))
    job = Job("pilesmith", config, processes=2, threads=1)
    measured = dict(measuring.compare({"two": job}, CPU, warmup=1, steps=1))["two"]
    assert isinstance(measured, Measured) and len(measured.steps) == 1
    assert measured.config.strategy.strategy == "zero"


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--compare", "megatron"], "--compare knows pilesmith"),
        (["--gpu_memory", "lots"], "no size of memory"),
        (["--host_memory", "lots"], "--host_memory: 'lots' is no size of memory"),
        (["--stepz", "3"], "unknown flag '--stepz'; did you mean '--steps'"),
        (["--n_heads", "3"], "did you mean '--n_head'"),
        (["--processes", "2", "--compare"], "one process"),
    ],
)
def test_mistakes_are_said(flags, message, capsys):
    assert throughput.main([*FLAGS, *flags]) == 2
    assert message in capsys.readouterr().err


def test_summary():
    measured = Measured(
        tiny(), None, {}, [6.0, 5.0], 9, 10, step_bytes=7, steps=[(2.0, 4.0), (1.0, 3.0), (4.0, 2.0)], energy_j=30.0
    )
    measured.saw(10, 20)
    measured.saw(8, 30)
    row = summarise(measured, peak_flops_s=640.0)
    assert row["tokens_per_s"] == 32.0 and row["mfu"] == 0.5 and row["tokens_per_j"] == pytest.approx(6.4)
    assert (row["peak_bytes"], row["reserved_bytes"], row["step_bytes"]) == (10, 30, 7)
    assert row["losses"] == [6.0, 5.0, 4.0, 3.0, 2.0] and row["micro_batch_size"] == 4
    assert row["step_s_quartiles"] == [1.5, 2.0, 3.0]


def test_a_result_on_a_cpu_names_no_gpu_that_was_not_used(monkeypatch):
    """On a machine with a GPU, `--device cpu`: no GPU in the file, and the contenders take turns."""
    gpu = SimpleNamespace(name="H100", total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    assert environment(CPU)["gpu"] is None and environment()["gpu"] is None
    assert environment(torch.device("cuda", 0))["gpu"]["name"] == "H100"
    monkeypatch.setattr(measuring, "take_turns", lambda jobs, warmup, steps, rounds: {"it": f"{rounds} rounds"})
    assert dict(measuring.compare({"it": None}, CPU, 1, 1)) == {"it": f"{measuring.ROUNDS} rounds"}
