"""The search keeps only what is right, fits and is faster; what it keeps is what dispatch then reads."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from kernels import dispatch
from kernels.aot import Row
from kernels.dispatch import CHIPS
from tools import tune, tune_cases
from tools.tune import Trial, choose, keep, measure, prune, spread
from tools.tune_cases import TUNABLE, wrong

CPU = torch.device("cpu")
FORWARD = TUNABLE["attention_forward"]


@pytest.mark.parametrize("kernel", TUNABLE)
@pytest.mark.parametrize("target", ["cuda:90", "cuda:86", "hip:gfx942"])
def test_candidates_have_the_tables_fields(kernel, target):
    shipped = dispatch.launch_config(CHIPS[target], kernel, 64)
    candidates = TUNABLE[kernel].candidates()
    assert all(c.keys() == shipped.keys() for c in candidates)
    assert len({json.dumps(c) for c in candidates}) == len(candidates) > 30


@pytest.mark.parametrize("target", dispatch.config_targets())
@pytest.mark.parametrize("kernel", TUNABLE)
def test_nothing_that_ships_would_be_pruned(kernel, target):
    if target != "cpu":
        for width in tune_cases.WIDTHS:
            shipped = dispatch.launch_config(CHIPS[target], kernel, width)
            assert TUNABLE[kernel].shared_bytes(shipped, width) <= CHIPS[target].shared_bytes, width


def test_tiles_that_cannot_fit_are_not_compiled():
    small, large = (
        {"ROWS": 64, "KEYS": keys, "num_warps": 4, "num_stages": 4, "EDGE_STAGES": None} for keys in (32, 128)
    )
    kept, refused = prune(FORWARD, [small, large], 128, CHIPS["cuda:86"])  # three pairs of tiles in flight, 99 KiB
    assert kept.refused == "" and refused.refused == "needs 192 KiB of shared memory or more, the chip has 99"
    assert prune(FORWARD, [large], 128, CHIPS["cuda:90"])[0].refused == ""  # 227 KiB


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
    rows = iter([row, replace(row, stack_bytes=0)])
    pool = SimpleNamespace(submit=lambda *a: SimpleNamespace(result=lambda row=next(rows): row))
    configs = [{"ROWS": 64}, {"ROWS": 32}, {"ROWS": 128}]
    trials = tune.compile_trials(
        FORWARD, [Trial(configs[0]), Trial(configs[1]), Trial(configs[2], "too large")], 64, "cuda:86", pool
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


@pytest.mark.parametrize("kernel", TUNABLE)
def test_what_is_right_passes(kernel, triton_here):
    assert wrong(TUNABLE[kernel], 16, CPU, torch.float16, lengths=(33,)) == ""


@pytest.mark.parametrize(
    "kernel, name", [("attention_forward", "out"), ("attention_backward_q", "dq"), ("attention_backward_kv", "dk")]
)
def test_what_is_wrong_is_refused(kernel, name, triton_here, monkeypatch):
    exact = tune_cases.Inputs.run

    def run(inputs, attend):
        results = exact(inputs, attend)
        if attend == inputs.ours:
            results[name] = results[name].clone()
            results[name][0, -1, 0, 0] += 0.05
        return results

    monkeypatch.setattr(tune_cases.Inputs, "run", run)
    assert wrong(TUNABLE[kernel], 16, CPU, torch.float16, lengths=(33,)).startswith(f"{name} is off by 0.0")


def test_not_a_number_is_wrong(triton_here, monkeypatch):
    exact = tune_cases.Inputs.run
    spoil = lambda inputs, attend: {
        k: v * float("nan") if attend == inputs.ours else v for k, v in exact(inputs, attend).items()
    }  # noqa: E731
    monkeypatch.setattr(tune_cases.Inputs, "run", spoil)
    assert "nan" in wrong(FORWARD, 16, CPU, torch.float16, lengths=(33,))


def test_a_candidate_is_what_the_kernel_is_launched_with_and_only_then():
    chip, config = CHIPS["cuda:86"], {"ROWS": 1, "KEYS": 2, "num_warps": 3, "num_stages": 4, "EDGE_STAGES": None}
    before = dispatch.launch_config(chip, "attention_forward", 64)
    with dispatch.use_launch_config("attention_forward", 64, config):
        assert dispatch.launch_config(chip, "attention_forward", 64) == config
    assert dispatch.launch_config(chip, "attention_forward", 64) == before != config


@pytest.fixture
def own_configs(tmp_path, monkeypatch):
    """An empty folder in place of kernels/configs/."""

    def forget():
        dispatch.config_table.cache_clear()
        dispatch.config_target.cache_clear()

    monkeypatch.setattr(dispatch, "CONFIGS", tmp_path)
    forget()
    yield tmp_path
    forget()


def test_the_winner_is_kept_and_read_by_dispatch(own_configs):
    base = {
        "attention_forward": {"64": {"ROWS": 64}, "128": {"ROWS": 32}},
        "measured": {"attention_forward": {"64": {"gain": 9}}},
    }
    (own_configs / "cuda_86.json").write_text(json.dumps(base))
    keep(CHIPS["cuda:89"], "attention_forward", "64", {"ROWS": 128}, {"gain": 1.2, "device": "RTX 4090"})
    assert dispatch.launch_config(CHIPS["cuda:89"], "attention_forward", 64) == {"ROWS": 128}
    assert dispatch.launch_config(CHIPS["cuda:89"], "attention_forward", 128) == {"ROWS": 32}  # from the nearest
    assert dispatch.launch_config(CHIPS["cuda:86"], "attention_forward", 64) == {"ROWS": 64}
    written = json.loads((own_configs / "cuda_89.json").read_text())
    assert written["measured"] == {"attention_forward": {"64": {"gain": 1.2, "device": "RTX 4090"}}}  # not another's


def test_candidates_are_thinned_evenly():
    assert spread([{"ROWS": n} for n in range(10)], 3) == [{"ROWS": 0}, {"ROWS": 3}, {"ROWS": 6}]
    assert len(spread([{"ROWS": n} for n in range(10)], None)) == 10


def test_a_dry_run_compiles_for_a_chip_that_is_not_here(start, triton_here):
    flags = [
        "--dry_run",
        "--chip",
        "cuda:86",
        "--kernels",
        "attention_forward",
        "--widths",
        "128",
        "--limit",
        "4",
        "--workers",
        "1",
    ]
    process = start("tools/tune.py", *flags)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "attention_forward, width 128: of 5 candidates" in output
    assert "registers" in output and "compiles" in output and "of shared memory or more, the chip has 99" in output


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "no GPU here; --dry_run --chip cuda:86"),
        (["--kernels", "softmax"], "--kernels knows attention_forward"),
        (["--dry_run"], "needs --chip"),
        (["--dry_run", "--chip", "cuda:12"], "no such chip"),
        (["--chip", "cuda:86"], "goes with --dry_run"),
        (["--widths", "48"], "--widths knows 16"),
    ],
)
def test_mistakes_are_said(flags, message, capsys, monkeypatch, triton_here):
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    assert tune.main(flags) == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def triton_here():
    if not dispatch.TRITON_PRESENT:
        pytest.skip("Triton is not installed")
