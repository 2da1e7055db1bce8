"""The code for GPUs, run on a pretended one: the same numbers as on a CPU, and nothing that only a GPU would show."""

import json
import re
from contextlib import nullcontext

import pytest
import torch
import torch.nn as nn
from torch import Tensor

from engine import evaluate, generate, train
from engine.command_line import parse
from engine.distributed import Processes
from engine.model import GPT
from engine.optimizer import AdamW, parameter_groups
from engine.report import read_metrics
from engine.strategy.activations import recompute_blocks
from engine.streamed_adamw import StreamedAdamW
from kernels import dispatch
from kernels.adamw import CHUNK_ON_CARD, UNPACKED_BYTES, adamw
from kernels.number_formats import BLOCK, GROUP
from tests.engine.conftest import gpt, save_model
from tests.pretended_card import pretended_card
from tests.pretended_streams import Stream

UNIT = GROUP * BLOCK
SHAPES = [(300, 700), (129, 1001), (64, 48), (700,), (1, 65537)]
# Kernels are Triton's; all but attention's; PyTorch's; Triton's, on AMD; all but attention's there.
HOPPER, TURING, PASCAL, CDNA, RDNA = "cuda:90", "cuda:75", "cuda:61", "hip:gfx942", "hip:gfx1030"
IN_BACKWARD = [
    "--weights=stochastic", "--moments=int8", "--optimizer_in_backward=true", "--micro_batch_size=0", "--grad_clip=0"
]  # fmt: skip


@pytest.fixture(autouse=True)
def decide_anew():
    """What dispatch knows of cuda:0 is the pretended card's."""
    dispatch.force_chip(None)
    yield
    dispatch.force_chip(None)


def losses(run_dir, *kinds: str) -> list[float]:
    return [r[key] for r in read_metrics(run_dir) for key in kinds if key in r]


@pytest.fixture
def small(tiny_flags, tmp_path) -> list[str]:
    """Two steps, a validation, a sample, a checkpoint; few tokens, since the interpreter is slow."""
    return [
        *tiny_flags,
        "--n_layer=3",
        "--max_steps=2",
        "--warmup_steps=1",
        "--eval_interval=2",
        "--batch_tokens=64",
        "--eval_tokens=32",
        "--micro_batch_size=1",
    ]


@pytest.mark.parametrize(
    "chip, flags, tolerance",
    [
        pytest.param(HOPPER, ["--dtype=fp32"], 1e-5, marks=pytest.mark.slow),
        (
            HOPPER,
            [
                "--dtype=fp16",
                "--n_layer=2",
                "--activation_checkpointing=selective",
                "--recomputed_blocks=1",
                "--positions=rotary",
                "--document_masking=true",
            ],
            2e-3,
        ),
        pytest.param(TURING, ["--offload=states"], 2e-3, marks=pytest.mark.slow),
        (TURING, [*IN_BACKWARD, "--n_layer=2"], 4e-3),
        (PASCAL, ["--activation_checkpointing=offloaded", "--recomputed_blocks=3", "--document_masking=true"], 2e-3),
        pytest.param(
            PASCAL,
            ["--offload=states", "--activation_checkpointing=blocks", "--positions=rotary"],
            2e-3,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            CDNA,
            ["--dtype=fp16", "--weights=residual", "--moments=int8", "--micro_batch_size=2"],
            2e-3,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            RDNA,
            ["--document_masking=true", "--activation_checkpointing=selective", "--recomputed_blocks=3"],
            2e-3,
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda value: " ".join(flag.strip("-") for flag in value) if isinstance(value, list) else None,
)
def test_a_run_on_a_card_is_that_on_a_cpu(chip, flags, tolerance, small, tmp_path, monkeypatch):
    of_the_model = ("--n_layer", "--document_masking", "--positions", "--grad_clip")
    model = [flag for flag in flags if flag.split("=")[0] in of_the_model]
    assert train.main([*small, *model, f"--run_dir={tmp_path}/cpu"]) == 0
    with pretended_card(monkeypatch, chip):
        assert train.main([*small, *flags, "--device=cuda", f"--run_dir={tmp_path}/card"]) == 0
    expected, got = (losses(tmp_path / device, "loss", "val_loss") for device in ("cpu", "card"))
    assert len(expected) == 3 and got == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize(
    "flags",
    [pytest.param([], marks=pytest.mark.slow), ["--offload=states"]],
    ids=["states on the card", "streamed"],
)
def test_a_run_goes_on_elsewhere(flags, small, tmp_path, monkeypatch):
    """From a CPU to a card and back, each from the other's checkpoint: a run that never moved."""
    small += ["--weights=residual", "--moments=int8", "--schedule=step", "--sample_tokens=0"]
    assert train.main([*small, "--max_steps=6", f"--run_dir={tmp_path}/cpu"]) == 0
    for steps, device in ((2, ["--device=cpu"]), (4, ["--device=cuda", "--dtype=fp32", *flags]), (6, ["--device=cpu"])):
        with pretended_card(monkeypatch, PASCAL) if "--device=cuda" in device else nullcontext():
            assert train.main([*small, "--resume=auto", f"--max_steps={steps}", *device]) == 0
        monkeypatch.undo()
    assert losses(tmp_path / "run", "loss") == pytest.approx(losses(tmp_path / "cpu", "loss"), abs=1e-3)


@pytest.mark.parametrize("chip", [HOPPER, TURING, PASCAL])
def test_text_on_a_card_is_that_on_a_cpu(chip, small, tmp_path, monkeypatch, capsys):
    """Sampled, with a key-value cache, from a run of this vocabulary."""
    model = [
        "--vocab_size=50304",
        "--positions=rotary",
        "--n_layer=2",
        "--max_steps=1",
        "--warmup_steps=0",
        "--sample_tokens=0",
    ]
    assert train.main([*small, *model]) == 0
    asked = [
        f"--model_path={tmp_path}/run",
        "--input_text=The",
        "--max_new_tokens=6",
        "--num_samples=2",
        "--dtype=fp32",
        "--seed=3",
    ]
    texts = []
    for device in ("cpu", "cuda"):
        capsys.readouterr()
        with pretended_card(monkeypatch, chip) if device == "cuda" else nullcontext():
            assert generate.main([*asked, f"--device={device}"]) == 0
        texts.append(capsys.readouterr().out.split("tokens in")[0])
    assert texts[0] == texts[1] and len(texts[0]) > 20


@pytest.mark.parametrize("chip", [HOPPER, PASCAL])
def test_an_evaluation_on_a_card_is_that_on_a_cpu(chip, token_files, tmp_path, monkeypatch, capsys):
    weights = save_model(tmp_path / "m.safetensors", gpt(vocab_size=512, n_head=2, n_embd=32))
    asked = [f"--model_path={weights}", f"--data_file={token_files[1]}", "--tokens=160", "--dtype=fp32", "--json"]
    found = []
    for device in ("cpu", "cuda"):
        with pretended_card(monkeypatch, chip) if device == "cuda" else nullcontext():
            assert evaluate.main([*asked, "--document_masking", f"--device={device}"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    for name in ("loss", "standard_error", "bits_per_byte"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-4)


@pytest.mark.parametrize(
    "chip, flags",
    [
        (HOPPER, ["--n_layer=2", "--dtype=fp16", "--document_masking=true"]),
        (TURING, [*IN_BACKWARD, "--n_layer=2"]),
        pytest.param(TURING, ["--offload=states"], marks=pytest.mark.slow),
        (PASCAL, ["--activation_checkpointing=offloaded", "--recomputed_blocks=3", "--document_masking=true"]),
    ],
)
def test_python_waits_for_the_card_twice_a_step(chip, flags, small, monkeypatch):
    """For whether all was finite and for the norm, once everything has been launched; the first step makes tables."""
    config, _ = parse([*small, *flags, "--device=cuda"])
    with pretended_card(monkeypatch, chip) as card:
        run = train.set_up(config, None, Processes())
        for number in range(2):
            batches = [batch.pin() for batch in run.data.step(number)]
            card.waits.clear()
            loss = run.strategy.forward_backward(batches)
            assert not card.waits or number == 0
            card.waits.clear()
            run.strategy.step(loss)
        assert card.waits == {"aten._local_scalar_dense.default": 2}
        run.report.close()


def streamed_steps(overlapping: bool) -> list[Tensor]:
    """Weights and states after four steps, one skipped; `overlapping`: streamed, in more portions than slots."""
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter((torch.randn(shape, generator=generator) * 0.02).cuda()) for shape in SHAPES]
    cls, options = (StreamedAdamW, {"portion": UNIT}) if overlapping else (AdamW, {})
    optimizer = cls(
        parameter_groups(nn.ParameterList(parameters), 0.1), seed=5, weights="residual", moments="int8", **options
    )
    for number in range(4):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator).to("cuda", p.dtype)
        optimizer.step(found_inf=torch.full((), float(number == 2), device="cuda"))
        optimizer.zero_grad()
    return [t for p in parameters for t in optimizer.export_state(p).values()]


def recomputed_steps(overlapping: bool) -> list[Tensor]:
    """Losses and gradients of two steps; `overlapping`: the blocks' inputs go to host memory and come back."""
    config, _ = parse(
        ["--preset=13m", "--n_embd=32", "--n_head=2", "--n_layer=6", "--block_size=32", "--vocab_size=512"]
    )
    torch.manual_seed(0)
    model = GPT(config.model).cuda()
    if overlapping:
        recompute_blocks(model, "offloaded", 6)

    def break_off(grad: Tensor) -> None:
        raise InterruptedError

    losses = []
    for _ in range(2):
        tokens = torch.randint(0, 512, (2, 33)).cuda()
        hook = model.transformer["h"][3].mlp.c_fc.weight.register_hook(break_off)  # with an input on its way back
        with pytest.raises(InterruptedError):
            model(tokens[:, :-1], tokens[:, 1:].contiguous()).backward()
        hook.remove()
        model.zero_grad()
        losses.append(model(tokens[:, :-1], tokens[:, 1:].contiguous()))
        losses[-1].backward()
    return [t.detach().cpu() for t in (*losses, *(p.grad for p in model.parameters()))]


def leave_out(what: str | None, monkeypatch) -> None:
    waits = Stream.wait_event
    if what == "the computation's":
        monkeypatch.setattr(Stream, "wait_event", lambda self, event: None if self.main else waits(self, event))
    elif what == "a copy's for a copy":
        monkeypatch.setattr(
            Stream, "wait_event", lambda self, event: waits(self, event) if self.main or event.stream.main else None
        )
    elif what == "a copy's for the computation":
        monkeypatch.setattr(
            Stream, "wait_stream", lambda self, other: None if other.main else waits(self, other.record_event())
        )
    elif what == "pinned memory":
        empty, zeros = torch.empty, torch.zeros
        monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **k: empty(*a, **k))
        monkeypatch.setattr(torch, "zeros", lambda *a, pin_memory=False, **k: zeros(*a, **k))


MISSING = [None, "the computation's", "a copy's for the computation", "pinned memory"]


@pytest.mark.parametrize(
    "work, missing",
    [(work, missing) for work in (streamed_steps, recomputed_steps) for missing in MISSING]
    + [(streamed_steps, "a copy's for a copy")],
)
def test_copies_overlap_and_every_wait_is_needed(work, missing, monkeypatch):
    """With a kind of wait left out, or without pinned memory, the pretended card objects or the numbers are wrong."""
    with pretended_card(monkeypatch, PASCAL):
        expected = work(overlapping=False)
    monkeypatch.undo()
    with pytest.raises(AssertionError) if missing else nullcontext():
        with pretended_card(monkeypatch, PASCAL):
            leave_out(missing, monkeypatch)
            got = work(overlapping=True)
        assert len(got) == len(expected) and all(map(torch.equal, got, expected))


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--micro_batch_size=2"],
        ["--activation_checkpointing=selective", "--recomputed_blocks=4"],
        ["--weights=residual", "--moments=int8"],
        ["--weights=stochastic", "--moments=int8", "--optimizer_in_backward=true", "--grad_clip=0"],
        ["--offload=states", "--activation_checkpointing=blocks", "--recomputed_blocks=4"],
    ],
    ids=" ".join,
)
def test_a_run_holds_no_more_than_planned(flags, small, monkeypatch, capsys):
    """Counted tensor by tensor, from the states to the optimizer's step, where PyTorch's path of every op is taken."""
    shape = [
        "--n_embd=128",
        "--n_layer=4",
        "--block_size=64",
        "--vocab_size=2048",
        "--batch_tokens=256",
        "--micro_batch_size=4",
    ]
    states = (
        [] if any("weights" in flag or "offload" in flag for flag in flags) else ["--weights=fp32", "--moments=fp32"]
    )
    with pretended_card(monkeypatch, PASCAL) as card:
        assert (
            train.main([*small, *shape, *states, "--sample_tokens=0", "--eval_tokens=64", *flags, "--device=cuda"]) == 0
        )
    said = re.search(r"memory: predicted .* \((.*)%\)", capsys.readouterr().out)
    assert card.peak > 10e6 and -16 < float(said[1]) <= 1


@pytest.mark.parametrize("weights", ["residual", "stochastic"])
def test_what_the_optimizer_unpacks_is_what_the_planner_counts(weights, monkeypatch):
    """Of a matrix of three chunks, on a card without Triton, in the number formats that take most."""
    with pretended_card(monkeypatch, PASCAL) as card:
        parameter = nn.Parameter(torch.zeros(3 * CHUNK_ON_CARD // 1024, 1024).cuda())
        optimizer = AdamW([parameter], weights=weights, moments="int8", dtype=torch.float16)
        optimizer.allocate_states()
        parameter.grad = torch.zeros_like(parameter)
        torch.cuda.reset_peak_memory_stats()
        held = card.allocated
        optimizer.step(found_inf=torch.zeros((), device="cuda"))
        assert 0.95 < (card.peak - held) / (UNPACKED_BYTES[weights] * CHUNK_ON_CARD) <= 1


def test_what_a_card_refuses(monkeypatch):
    x = torch.ones(4)
    with pretended_card(monkeypatch, HOPPER):
        y = torch.ones(4, device="cuda")
        assert y.device == torch.device("cuda", 0) and y.is_cuda and (y + 1).cpu().tolist() == [2] * 4
        with pytest.raises(RuntimeError, match="same device, found cuda:0 .* cpu"):
            y + x
        with pytest.raises(TypeError, match="to numpy"):
            y.numpy()
        with pytest.raises(RuntimeError, match="only dense CPU tensors"):
            y.pin_memory()
        with pytest.raises(ValueError, match="cannot be accessed from Triton"):
            adamw(
                [y],
                [y.clone()],
                [y.clone()],
                [y.clone()],
                [y[0].clone()],
                lr=1.0,
                betas=(0.9, 0.9),
                eps=1.0,
                weight_decay=0.0,
                grad_scale=x[:1],
            )
