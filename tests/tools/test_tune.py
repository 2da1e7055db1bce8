"""The search keeps only what is right, fits and is faster; what it keeps is what kernels are then launched with."""

import json
from concurrent.futures import Future
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from kernels import dispatch, launch_configs
from kernels.aot import Row
from kernels.dispatch import CHIPS
from tests.marks import slow_unless
from tools import tune
from tools.tune import TUNABLE, Trial, choose, keep, measure, prune, spread
from tools.tuning.cases import Problem
from tools.tuning.rows import State

CPU = torch.device("cpu")
FORWARD = TUNABLE["attention_forward"]


@pytest.mark.parametrize("kernel", TUNABLE)
@pytest.mark.parametrize("target", ["cuda:90", "cuda:86", "cuda:75", "hip:gfx942"])
def test_candidates_have_the_tables_fields(kernel, target):
    tunable, chip = TUNABLE[kernel], CHIPS[target]
    assert set(tunable.usual(chip)) <= set(tunable.cases(chip))
    assert bool(tunable.cases(chip)) == (chip.tensor_cores or not kernel.startswith("attention"))
    for case in tunable.cases(chip):
        current, candidates = tunable.current(case, chip), tunable.candidates(case, chip)
        assert all(c.keys() == current.keys() for c in candidates)
        assert len({json.dumps(c) for c in candidates}) == len(candidates) >= 10


@pytest.mark.parametrize("target", ["cuda:90", "cuda:86", "cuda:75", "hip:gfx942"])
@pytest.mark.parametrize("kernel", TUNABLE)
def test_nothing_that_ships_would_be_pruned(kernel, target):
    tunable, chip = TUNABLE[kernel], CHIPS[target]
    for case in tunable.cases(chip):
        assert tunable.shared_bytes(tunable.current(case, chip), case) <= chip.shared_bytes, case


def test_every_op_can_be_tuned():
    ops = {"attention": "attention_forward", "rotary": "rotary", "cross_entropy": "cross_entropy", "adamw": "adamw"}
    assert {ops.get(op, op if op in TUNABLE else f"{op}_forward") for op in dispatch.OPS} <= set(TUNABLE)


SMALL: dict[str, tuple[str, dict]] = {
    name: ("16", {"lengths": (33,)}) if name.startswith("attention") else ("1024x2", {"rows": 5}) for name in TUNABLE
} | {
    "bias_activation_forward": ("4096x2", {"rows": 3}),
    "bias_activation_backward": ("4096x2", {"rows": 3}),
    "cross_entropy": ("65536x2", {"rows": 3}),
    "rotary": ("64x2", {"rows": 2}),
    "adamw": ("bf16_residual_moments_int8", {"sizes": (4096, 300)}),
}  # fmt: skip


class Asked(dict):
    """Trials that note which (kernel, case) a launch asked for."""

    def __init__(self):
        self.keys_asked = set()

    def get(self, key):
        self.keys_asked.add(key)
        return super().get(key)


@pytest.mark.parametrize("kernel", slow_unless(lambda kernel: not kernel.startswith("attention_backward"), TUNABLE))
def test_every_kernel_is_launched_with_the_candidate_and_is_right(kernel, triton_here, monkeypatch):
    """The case's name is the one that the kernel itself looks up, and its configuration what it is launched with."""
    case, sizes = SMALL[kernel]
    asked = Asked()
    monkeypatch.setattr(launch_configs, "_trials", asked)
    config = TUNABLE[kernel].candidates(case, CHIPS["cuda:86"])[0]
    with launch_configs.use_launch_config(kernel, case, config):
        assert TUNABLE[kernel].wrong(case, CPU, torch.float16, **sizes) == ""
    assert (kernel, case) in asked.keys_asked
    broken = {key: value for key, value in config.items() if key not in ("ROWS", "HEADS", "BLOCK")}
    with launch_configs.use_launch_config(kernel, case, broken), pytest.raises((KeyError, TypeError)):
        TUNABLE[kernel].wrong(case, CPU, torch.float16, **sizes)


def test_tiles_that_cannot_fit_are_not_compiled():
    small, large = (
        {"ROWS": 64, "KEYS": keys, "num_warps": 4, "num_stages": 4, "EDGE_STAGES": None} for keys in (32, 128)
    )
    kept, refused = prune(FORWARD, [small, large], "128", CHIPS["cuda:86"])  # three pairs of tiles in flight, 99 KiB
    assert kept.refused == "" and refused.refused == "needs 192 KiB of shared memory or more, the chip has 99"
    assert prune(FORWARD, [large], "128", CHIPS["cuda:90"])[0].refused == ""  # 227 KiB


def test_what_spills_is_refused():
    row = Row(
        op="attention",
        label="",
        target="cuda:86",
        num_warps=4,
        num_stages=1,
        registers=255,
        stack_bytes=64,
        shared_limit_bytes=1 << 20,
    )
    compiled = [Future(), Future()]
    compiled[0].set_result(row)
    compiled[1].set_result(replace(row, stack_bytes=0))
    submitted = iter(compiled)
    pool = SimpleNamespace(submit=lambda *_: next(submitted))
    configs = [{"ROWS": 64}, {"ROWS": 32}, {"ROWS": 128}]
    trials = tune.compile_trials(
        FORWARD, [Trial(configs[0]), Trial(configs[1]), Trial(configs[2], "too large")], "64", "cuda:86", pool
    )
    assert [t.refused.partition(":")[0] for t in trials] == ["spills", "", "too large"]
    assert trials[2].row is None


def test_the_wrong_are_never_timed_and_the_fastest_wins():
    seconds = {1: (2.0, 2.0), 2: (0.1, 0.1), 3: (1.0, 3.0), 4: (3.0, 1.0), 5: (1.0, 1.5)}
    timed = []

    def time(config):
        timed.append(config["ROWS"])
        return seconds[config["ROWS"]]

    trials = [Trial({"ROWS": n}) for n in seconds] + [Trial({"ROWS": 6}, "spills")]
    trials = measure(trials, lambda config: "dq is off by 3" if config["ROWS"] == 2 else "", time)
    assert timed == [1, 3, 4, 5]
    best, before = choose(trials, {"ROWS": 1})
    assert best.config == {"ROWS": 5} and before.config == {"ROWS": 1}  # over all lengths together, not at one
    assert choose([Trial({"ROWS": 1}, "spills")], {"ROWS": 1}) == (None, None)


@pytest.mark.parametrize(
    "seconds, kept, gain, said",
    [(0.5, 2, 2.0, "2.00 times the speed"), (0.999, 1, 1.0, "as fast as any"), (None, 1, 1.0, "as fast as any")],
)
def test_what_is_kept_is_clearly_faster_than_the_tables_own(seconds, kept, gain, said, capsys):
    trials = [Trial({"ROWS": 1}, seconds=(1.0,)), Trial({"ROWS": 2}, "" if seconds else "wrong")]
    trials[1] = replace(trials[1], seconds=(seconds,) if seconds else ())
    current, where = (
        {"ROWS": 1},
        {"gpu": {"name": "L4"}, "versions": dict.fromkeys(("torch", "triton"), "3"), "date": ""},
    )
    winner = tune.decide(trials, current, tune.summary("softmax", "64", trials, current)["gain"])
    assert winner.config == {"ROWS": kept} and said in capsys.readouterr().out
    shapes = [{"rows": 8}]
    figures = tune.figures_of(winner, trials, current, shapes, CHIPS["cuda:89"], where | {"commit": None})
    assert (figures["gain"], figures["before_s"], figures["refused"]) == (gain, [1.0], int(seconds is None))
    assert tune.decide([Trial(current, "spills")], current, None) is None


def test_what_does_not_run_is_refused_and_ends_nothing(triton_here):
    """Refused as it is launched, at the sizes it is verified at or, with larger strides, at those it is timed at."""
    from triton.runtime.errors import OutOfResources

    def fails(wanted, error, config):
        if config["ROWS"] == wanted:
            raise error

    def verify(config):
        fails(1, OutOfResources(240000, 232448, "shared memory"), config)
        return ""

    def time(config):
        fails(2, RuntimeError("an illegal memory access\nmore of it"), config)
        fails(3, OutOfResources(70000, 65536, "registers"), config)
        fails(4, RuntimeError(), config)
        return (1.0,)

    refused = [t.refused for t in measure([Trial({"ROWS": n}) for n in range(1, 6)], verify, time)]
    assert refused[0].startswith("does not run: out of resource: shared memory, Required: 240000")
    assert refused[1] == "does not run: an illegal memory access"
    assert refused[2].startswith("does not run: out of resource: registers")
    assert refused[3:] == ["does not run: RuntimeError", ""]


def spoil(monkeypatch, name, change):
    """Our kernels give what PyTorch does, with `name` changed: interpreted ones would take long to say the same."""

    def by_ours(problem):
        results = problem.by_pytorch()
        results[name] = change(results[name].contiguous().clone())
        return results

    monkeypatch.setattr(Problem, "by_ours", by_ours)


def off_by(much):
    def change(values):
        values.view(-1)[-1] += much
        return values

    return change


@pytest.mark.parametrize(
    "kernel, name",
    [
        ("attention_forward", "out"), ("attention_backward_q", "dq"), ("attention_backward_kv", "dk"),
        ("layer_norm_forward", "out"), ("layer_norm_backward", "dbias"), ("softmax_backward", "dx"),
        ("bias_activation_forward", "out"), ("cross_entropy", "dweight"), ("rotary", "out"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused(kernel, name, triton_here, monkeypatch):
    case, sizes = SMALL[kernel]
    spoil(monkeypatch, name, off_by(0.5))
    assert TUNABLE[kernel].wrong(case, CPU, torch.float16, **sizes).startswith(f"{name} is off by 0.")


def test_an_optimizer_that_is_wrong_is_refused(triton_here, monkeypatch):
    exact = State.masters
    monkeypatch.setattr(State, "masters", lambda state: exact(state) + (0.01 if state.steps[0].item() else 0) * first())
    first = iter([1.0, 0.0]).__next__
    fault = TUNABLE["adamw"].wrong("fp32_moments_fp32", CPU, torch.float16, sizes=(4096,))
    assert fault == "100.0% of the weights differ from PyTorch's"


def test_not_a_number_is_wrong(triton_here, monkeypatch):
    spoil(monkeypatch, "out", lambda values: values * float("nan"))
    assert "nan" in FORWARD.wrong("16", CPU, torch.float16, lengths=(33,))


def test_a_candidate_is_what_the_kernel_is_launched_with_and_only_then():
    chip, config = CHIPS["cuda:86"], {"ROWS": 1, "KEYS": 2, "num_warps": 3, "num_stages": 4, "EDGE_STAGES": None}
    before = launch_configs.launch_config(chip, "attention_forward", 64)
    with launch_configs.use_launch_config("attention_forward", 64, config):
        assert launch_configs.launch_config(chip, "attention_forward", 64) == config
    assert launch_configs.launch_config(chip, "attention_forward", 64) == before != config


@pytest.fixture
def own_configs(tmp_path, monkeypatch):
    """An empty folder in place of kernels/configs/."""

    def forget():
        launch_configs.config_table.cache_clear()
        launch_configs.config_target.cache_clear()

    monkeypatch.setattr(launch_configs, "CONFIGS", tmp_path)
    forget()
    yield tmp_path
    forget()


def test_the_winner_is_kept_and_launched(own_configs):
    base = {
        "attention_forward": {"64": {"ROWS": 64}, "128": {"ROWS": 32}},
        "measured": {"attention_forward": {"64": {"gain": 9}}},
    }
    (own_configs / "cuda_86.json").write_text(json.dumps(base))
    keep(CHIPS["cuda:89"], "attention_forward", "64", {"ROWS": 128}, {"gain": 1.2, "device": "RTX 4090"})
    assert launch_configs.launch_config(CHIPS["cuda:89"], "attention_forward", 64) == {"ROWS": 128}
    assert launch_configs.launch_config(CHIPS["cuda:89"], "attention_forward", 128) == {"ROWS": 32}  # from the nearest
    assert launch_configs.launch_config(CHIPS["cuda:86"], "attention_forward", 64) == {"ROWS": 64}
    written = json.loads((own_configs / "cuda_89.json").read_text())
    assert written["measured"] == {"attention_forward": {"64": {"gain": 1.2, "device": "RTX 4090"}}}  # not another's


def test_a_winner_by_descriptors_leaves_the_pointers_their_tile(own_configs):
    old = {"ROWS": 64, "KEYS": 128}
    (own_configs / "cuda_90.json").write_text(json.dumps({"attention_backward_kv": {"64": old}}))
    for rows in (32, 16):
        keep(CHIPS["cuda:90"], "attention_backward_kv", "64", {"ROWS": rows, "KEYS": 64, "TMA": 1}, {"gain": 1.2})
        assert launch_configs.launch_config(CHIPS["cuda:90"], "attention_backward_kv", 64)["ROWS"] == rows
        assert launch_configs.launch_config(CHIPS["cuda:90"], "attention_backward_kv_pointers", 64) == old


@pytest.mark.parametrize("kernel", ["attention_forward", "attention_backward_q", "attention_backward_kv"])
@pytest.mark.parametrize("tma", [0, 1])
def test_a_candidate_is_compiled_with_its_own_tiles_and_way_to_load_them(kernel, tma):
    config = {"ROWS": 32, "KEYS": 16, "num_warps": 4, "num_stages": 2, "EDGE_STAGES": None, "TMA": tma}
    case = TUNABLE[kernel].to_compile(config, "64", "cuda:90")
    assert case.signature["k"] == ("tensordesc<bf16[1,1,16,64]>" if tma else "*bf16")
    assert (case.constants["ROWS"], case.constants["KEYS"], case.constants["TMA"]) == (32, 16, tma)


def test_what_was_tuned_can_be_tuned_again(own_configs):
    """Once its table has a format of AdamW, its compile case is labelled with the chip."""
    chip, tunable = CHIPS["cuda:86"], TUNABLE["adamw"]
    table = {"adamw": {"bf16_residual_moments_int8": {"ROWS": 8, "num_warps": 4}}}
    for family in ("cuda_86", "hip_gfx942", "cpu"):
        (own_configs / f"{family}.json").write_text("{}")
    before = tunable.cases(chip)
    launch_configs.write_config_table("cuda:86", table)
    assert sorted(tunable.cases(chip)) == sorted(before) and "bf16_residual_moments_int8" in tunable.usual(chip)
    assert tunable.current("bf16_residual_moments_int8", chip)["ROWS"] == 8


def test_candidates_are_thinned_evenly():
    assert spread([{"ROWS": n} for n in range(10)], 3) == [{"ROWS": 0}, {"ROWS": 3}, {"ROWS": 6}]
    assert len(spread([{"ROWS": n} for n in range(10)], None)) == 10


def test_the_limit_counts_what_is_beside_the_tables_own(monkeypatch, capsys):
    """As --help has it."""
    with pytest.raises(SystemExit):
        tune.main(["--help"])
    assert "N candidates beside the table's own" in " ".join(capsys.readouterr().out.split())
    monkeypatch.setattr(tune, "compile_trials", lambda tunable, trials, *rest: trials)
    options = SimpleNamespace(limit=1, dry_run=True)
    found = tune.tune(FORWARD, "128", CHIPS["cuda:86"], CPU, options, None)
    own, other = (trial["config"] for trial in found["trials"])
    assert own == found["current"] != other


def test_a_dry_run_compiles_for_a_chip_that_is_not_here(start, triton_here):
    flags = [
        "--dry_run", "--chip", "cuda:86", "--kernels", "softmax_forward",
        "--cases", "1024x2", "--limit", "1", "--workers", "1",
    ]  # fmt: skip
    process = start("tools/tune.py", *flags)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "softmax_forward, 1024x2: of 2 candidates" in output
    assert "registers" in output and "compiles" in output


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "no GPU here; --dry_run --chip cuda:86"),
        (["--kernels", "gelu"], "--kernels knows attention_forward"),
        (["--dry_run"], "needs --chip"),
        (["--dry_run", "--chip", "cuda:12"], "no such chip; known: cuda:90"),
        (["--dry_run", "--chip", "cuda:120"], "where cuda:89 serves it: --chip cuda:89"),
        (["--dry_run", "--chip", "cuda:87"], "where cuda:86 serves it: --chip cuda:86"),
        (["--dry_run", "--chip", "hip:gfx1100"], "no such chip; known: cuda:90"),
        (["--chip", "cuda:86"], "goes with --dry_run"),
        (
            ["--dry_run", "--chip", "cuda:86", "--cases", "128,642"],
            "--cases 642: no such case on cuda:86; cases of these",
        ),
        (["--dry_run", "--chip", "cuda:75", "--kernels", "attention_forward"], "there: none"),
    ],
)
def test_mistakes_are_said(flags, message, capsys, monkeypatch, triton_here):
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    with pytest.raises(SystemExit) as ended:
        tune.main(flags)
    assert ended.value.code == 2 and message in capsys.readouterr().err


@pytest.fixture
def triton_here():
    if not dispatch.TRITON_PRESENT:
        pytest.skip("Triton is not installed")
