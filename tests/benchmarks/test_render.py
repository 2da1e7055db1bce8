"""Tables and charts follow their files: a figure that changes, a file that goes, a place that is unknown."""

import copy
from dataclasses import asdict

import pytest

from benchmarks import charts, reading, render, tables, tables_of_tools
from engine.footprint import PARTS
from kernels.aot import Row

ENVIRONMENT = {
    "cpu": "EPYC", "cores": 2, "gpu": None, "system": "Linux", "python": "3.12", "versions": {"torch": "2.13.0"},
    "commit": "a" * 40, "changed": False, "date": "2026-11-23",
}  # fmt: skip
GPU = {"name": "NVIDIA H100 80GB HBM3", "memory_bytes": 80 << 30, "cuda": "13.0", "hip": None}
ROW = {
    "tokens_per_s": 3000.0, "step_s": 1.0, "step_s_quartiles": [0.9, 1.0, 1.2], "steps": 9, "mfu": None,
    "tokens_per_j": None, "peak_bytes": 700 << 20, "reserved_bytes": 700 << 20, "step_bytes": 130 << 20,
    "micro_batch_size": 16, "losses": [10.8, 10.0],
}  # fmt: skip


@pytest.fixture
def results():
    """A comparison on a CPU, a run on a card with a plan, attention on that card, and a copy."""
    config = {"preset": "13m", "model": {}, "optimizer": {"batch_tokens": 2048}, "strategy": {}}
    common = {
        "benchmark": "throughput", "environment": ENVIRONMENT, "config": config, "dtype": "float32",
        "n_parameters": 13_142_656, "processes": 1, "threads": 2, "gpu_memory_bytes": None, "card": None,
        "flops_per_token": 1, "peak_flops": None, "plan": None,
    }  # fmt: skip
    slow = ROW | {"tokens_per_s": 1500.0, "step_bytes": 2400 << 20}
    cpu = common | {"results": {"pilesmith": ROW, "classic": slow, "liger": "not run: needs a GPU"}}
    plan = {
        "name": "residual",
        "parts": {"weights": 4 << 30, "gradients": 4 << 30},
        "allocated_bytes": 8 << 30,
        "host_bytes": 0,
    }
    card = {"environment": ENVIRONMENT | {"gpu": GPU}, "gpu_memory_bytes": 24 << 30, "plan": plan}
    gpu = common | card | {"results": {"pilesmith": ROW | {"mfu": 0.55, "peak_bytes": int(8.4 * 2**30)}}}

    def case(op, implementation, seconds, **about):
        about = {
            "op": op,
            "implementation": implementation,
            "step": "forward",
            "dtype": "bfloat16",
            "flops": None,
            "bytes": None,
        } | about
        return {"name": f"test_{op}", "extra_info": about, "stats": {"min": seconds, "median": 2 * seconds}}

    lines = [
        case("attention", name, seconds * T / 1024, shape={"B": 1, "T": T, "H": 16, "D": 128}, flops=10**12)
        for name, seconds in (("pilesmith", 0.002), ("sdpa-flash", 0.003))
        for T in (1024, 2048)
    ]
    lines += [
        case("copy", "pytorch", 0.001, bytes=2 * 10**9, shape={}),
        case("layer_norm", "pilesmith", 0.002, bytes=10**9, shape={"rows": 4}),
    ]
    kernels = {"benchmark": "pytest-benchmark", "environment": ENVIRONMENT | {"gpu": GPU}, "benchmarks": lines}
    return {"throughput-13m-cpu": cpu, "throughput-13m-h100-24gb": gpu, "kernels-h100": kernels}


def test_a_table_holds_the_files_figures(results):
    text = tables.throughput(results, "", "throughput-13m-cpu")
    assert "| classic | 1,500 |" in text and "| 2.00 |" in text and "not run: needs a GPU" in text
    assert (
        "EPYC, 2 cores; PyTorch 2.13.0; 2026-11-23; commit aaaaaaaaa; "
        "[throughput-13m-cpu.json](results/throughput-13m-cpu.json)" in text
    )


def test_another_model_than_ours_is_told_apart(results):
    """Files from before a contender's size was kept render as they did: the test above."""
    classic = {"n_parameters": 163_132_032, "differs": "untied head, ReLU"}
    result = results["throughput-13m-cpu"]
    result["results"]["classic"] |= classic
    assert "| classic (163M, untied head, ReLU) | 1,500 |" in tables.throughput(results, "", "throughput-13m-cpu")
    result["results"]["classic"] |= {"n_parameters": result["n_parameters"] + 1, "differs": ""}
    assert "| classic | 1,500 |" in tables.throughput(results, "", "throughput-13m-cpu")


def test_a_profiled_step_is_told_from_one_without_the_profiler():
    part = {"part": "matmul", "share": 1.0, "forward_s": 1.0, "backward_s": 0.9, "seconds": 1.9}
    config = {"preset": "13m", "optimizer": {"batch_tokens": 2048}}
    times = {"step_s": 0.6, "profiled_step_s": 1.9, "threads": 2}
    result = {"benchmark": "profile", "environment": ENVIRONMENT, "config": config, "dtype": "float32", "parts": [part]}
    text = tables.profile({"profile-13m-cpu": result | times}, "")
    assert "2,048 tokens a step on 2 threads: 600 ms without the profiler; under it 1.9 s, of which:" in text
    assert charts.profile_data({"profile-13m-cpu": result | times})[0][0] == "13m, EPYC, 2 cores, 2 threads"


def test_prediction_stands_beside_measurement(results):
    assert "| residual | 8,192 MiB | 8,602 MiB |" in tables.memory(results, "")
    assert "measured is +5.0% of that" in tables.throughput(results, "")


def test_kernels_show_their_rate_and_the_best_other(results):
    text = tables.kernels(results, "")
    assert "| B 1, T 1,024, H 16, D 128 | forward | 2 ms | 3 ms | 500 TFLOP/s | 1.50 |" in text
    assert "500 GB/s, 25% of the copy" in text and "A copy moves 2 TB/s." in text


def test_places_are_filled_in_line_and_in_blocks(results):
    figures = "results.pilesmith.tokens_per_s results.classic.tokens_per_s"
    page = f"x <!-- results:ratio throughput-13m-cpu {figures} .1f -->?<!-- /results:ratio --> y"
    assert ">2.0<" in render.fill(page, results, "")
    block = "<!-- results:throughput throughput-13m-cpu -->old<!-- /results:throughput -->"
    filled = render.fill(block, results, "benchmarks/")
    assert "\n| classic |" in filled and "(benchmarks/results/" in filled and "old" not in filled
    assert render.fill(filled, results, "benchmarks/") == filled


def test_figures_of_keys_with_blanks_and_of_memory(results):
    found = results | {"prepare": {"all_cores": {"prepare, 4 shards": {"mb_s": 296.7}}}}
    assert tables.value(found, "", "prepare", "all_cores.prepare,%204%20shards.mb_s", ".0f") == "297"
    assert tables.value(found, "", "throughput-13m-cpu", "results.pilesmith.peak_bytes", "MiB") == "700 MiB"


def test_signed_numbers_lie_to_the_right_and_reasons_move_nothing(results):
    aligned = reading.table(["", "a", "b", "c"], [["x", "+0.01", "-", "fits"], ["y", "-0.01", "", "3"]])
    assert aligned.splitlines()[1] == "| --- | ---: | ---: | --- |"
    text = tables.throughput(results, "", "throughput-13m-cpu")
    assert "| liger: not run: needs a GPU |  |  |" in text and "| --- | ---: | ---: |" in text


def test_what_grows_is_said(results):
    shape = {"n_layer": 4, "n_embd": 128, "block_size": 128, "vocab_size": 512}
    config = {"model": shape, "optimizer": {"batch_tokens": 2048, "micro_batch_size": 8}}
    point = {"value": 1, "tokens_per_s": 10.0, "flops_per_token": 5, "step_bytes": 7, "threads": 1}
    result = {"benchmark": "scaling", "environment": ENVIRONMENT, "config": config, "dtype": "float32"}
    text = tables.scaling({"scaling-cpu": result | {"axes": {"processes": [point]}}}, "")
    assert "4 layers, width 128, 128 tokens a sequence, a vocabulary of 512, 2,048 tokens a step" in text
    assert "processes have 1 thread" in text


def test_hard_text_has_a_bound_and_threads_a_factor():
    encoder = {"version": None, "exact": True, "mb_s": 300.0, "mb_s_again": 400.0}
    encoder |= {"times_tiktoken": 20.0, "times_tiktoken_again": 30.0}
    result = {
        "benchmark": "tokenizer", "environment": ENVIRONMENT, "method": {"rounds": 3}, "text": {"bytes": 1 << 20},
        "encoders": {"pilesmith": encoder}, "threads": {"1": {"mb_s": 500.0}, "2": {"mb_s": 950.0}},
        "worst_cases": {name: {"mb_s": 50.0, "times_ordinary": t} for name, t in (("blanks", 4.9), ("digits", 8.0))},
    }  # fmt: skip
    text = tables.tokenizer({"tokenizer": result}, "")
    assert "1 thread 500.0 MB/s, 2 threads 950.0, 1.90 times one." in text
    assert "at most 5 times as long a byte as ordinary text; beyond that: digits." in text


def test_costs_of_compiled_kernels_are_a_page(results, tmp_path, monkeypatch):
    row = asdict(Row(op="softmax", label="fp16", target="cuda:86", num_warps=4, num_stages=1, registers=40))
    where = ENVIRONMENT | {"versions": {"torch": "2.13.0", "triton": "3.8.0"}}
    found = {"compiled_kernels": {"benchmark": "compiled_kernels", "environment": where, "rows": [row]}}
    monkeypatch.setattr(render, "COSTS", tmp_path / "costs.md")
    monkeypatch.setattr(render, "READMES", ())
    assert render.stale(found)[tmp_path / "costs.md"]() == "written"
    assert "| fp16 | 4 | 1 | 40 |" in (tmp_path / "costs.md").read_text()
    assert tmp_path / "costs.md" not in render.stale(found)


def test_launch_configurations_are_counted(tmp_path, monkeypatch):
    """Those of GPUs, and of them what was timed."""
    own = {"softmax_forward": {"64": {}, "128": {}}, "measured": {"softmax_forward": {"64": {}}}}
    monkeypatch.setattr(tables_of_tools.launch_configs, "config_targets", lambda: ["cpu", "cuda:86", "cuda:90"])
    monkeypatch.setattr(tables_of_tools.launch_configs, "config_table", lambda target: own)
    assert [tables.PLACES["launches"]({}, "", which) for which in ("shipped", "timed")] == ["4", "2"]


def test_a_changed_figure_makes_a_page_stale(results):
    page = render.fill("<!-- results:throughput -->\n<!-- /results:throughput -->", results, "")
    changed = copy.deepcopy(results)
    changed["throughput-13m-cpu"]["results"]["classic"]["tokens_per_s"] = 1501.0
    assert render.fill(page, changed, "") != page


def test_unknown_places_and_missing_files_are_errors(results):
    with pytest.raises(ValueError, match="no such place"):
        render.fill("<!-- results:speed --><!-- /results:speed -->", results, "")
    with pytest.raises(KeyError):
        render.fill("<!-- results:value gone steps --><!-- /results:value -->", results, "")


def test_without_results_the_command_is_named():
    for place in (
        "throughput",
        "memory",
        "kernels",
        "files",
        "scaling",
        "paper",
        "profile",
        "correctness",
        "tokenizer",
        "prepare",
        "quality",
        "compiled",
        "tune",
        "suite",
        "plans",
    ):
        assert tables.PLACES[place]({}, "").startswith("Not measured yet: `")
    assert render.page({}).startswith("# Results")


def test_a_chart_carries_the_digest_of_its_data(results, tmp_path):
    drawn = {name: chart.data(results) for name, chart in charts.CHARTS.items()}
    assert {name for name, data in drawn.items() if data} == {"throughput", "models", "attention", "memory"}
    for name in ("throughput", "models", "attention", "memory"):
        path = tmp_path / f"{name}.png"
        render.save(charts.CHARTS[name].draw(drawn[name]), path, render.digest(drawn[name]))
        assert render.drawn_from(path) == render.digest(drawn[name])
    changed = copy.deepcopy(results)
    changed["throughput-13m-cpu"]["results"]["classic"]["tokens_per_s"] = 1501.0
    assert render.digest(charts.CHARTS["throughput"].data(changed)) != render.digest(drawn["throughput"])


@pytest.fixture
def tools_results():
    """A search with a gain and one without, a suite, and plans of which one does not fit."""
    trial = {"config": {"ROWS": 2}, "refused": None, "seconds": [0.001], "registers": 40, "shared_bytes": 0}
    trials = [trial | {"fate": fate} for fate in ("left", "left", "wrong", "faulty", "too large")]
    search = {"kernel": "softmax_forward", "case": "1024x2", "current": {"ROWS": 2}, "gain": 1.25, "trials": trials}
    searches = [search, search | {"case": "2048x2", "gain": None}]
    common = {"environment": ENVIRONMENT}
    chip = {"chip": "H100", "target": "cuda:90", "dry_run": False, "limit": None}
    tune = {"benchmark": "tune", "searches": searches} | chip
    part = {"name": "kernels", "command": "python x", "status": "done", "seconds": 9.0, "file": "k.json", "message": ""}
    late = part | {"name": "2b", "status": "out of time", "message": "after 60 s"}
    suite = {"benchmark": "suite", "seconds": 69.0, "parts": [part, late]}
    plan = {
        "gpu": "T4", "fits": True, "strategy": "stochastic", "title": "16-bit weights", "micro_batch_size": 1,
        "host_bytes": 0, "peak_bytes": dict.fromkeys(PARTS, 0) | {"weights": 4 << 30, "context": 1 << 29},
        "card_limit_bytes": 14 << 30, "tokens_per_s": 1234.5,
    }  # fmt: skip
    lacking = {"gpu": "GTX 1080 Ti", "fits": False} | dict.fromkeys(
        ("strategy", "micro_batch_size", "peak_bytes", "host_bytes", "tokens_per_s")
    )
    plans = {"benchmark": "plan", "preset": "2b", "host_memory_bytes": 64 << 30, "plans": [plan, lacking]}
    return {"tune-h100": common | tune, "suite-cpu": common | suite, "plan-2b": common | plans}


def test_searches_suites_and_plans_are_told(tools_results, validate):
    for result in tools_results.values():
        validate(result, result["benchmark"])
    places = tables.PLACES
    assert "| `softmax_forward` 1024x2 | `ROWS=2` | 2 | 1 | 1 | 1 | 1.25 |" in places["tune"](tools_results, "")
    assert "| 2b | out of time | 9 | after 60 s |" in places["suite"](tools_results, "")
    text = places["plans"](tools_results, "")
    assert "| T4 | 16-bit weights | 4.5 of 14.0 | 1,234 |" in text and "| GTX 1080 Ti | does not fit |" in text


@pytest.mark.parametrize("name", ["tune", "suite", "plan"])
def test_searches_suites_and_plans_are_drawn(name, tools_results, tmp_path):
    data = charts.CHARTS[name].data(tools_results)
    render.save(charts.CHARTS[name].draw(data), tmp_path / "chart.png", render.digest(data))
    assert render.drawn_from(tmp_path / "chart.png") == render.digest(data)
    assert charts.CHARTS[name].data({}) is None


def test_the_plans_that_are_drawn_are_those_of_2b(tools_results):
    """However many files of plans there are."""
    other = tools_results["plan-2b"] | {"preset": "13m"}
    data = charts.CHARTS["plan"].data({"plan-13m": other} | tools_results)
    assert data["title"].startswith("2b: ") and charts.CHARTS["plan"].data({"plan-13m": other}) is None


def test_the_newest_prediction_for_more_cards_is_drawn():
    def scaling(date, speed):
        rows = [{"card": "H100", "gpus": 1, "tokens_per_s": speed}] if speed else []
        paper = {"preset": "2b", "batch_tokens": 2048, "rows": rows}
        return {"benchmark": "scaling", "environment": ENVIRONMENT | {"date": date}, "paper": paper, "axes": {}}

    found = {"a": scaling("2026-11-01", 1.0), "b": scaling("2026-11-03", 2.0), "c": scaling("2026-11-04", 0)}
    assert charts.CHARTS["scaling-paper"].data(found)["cards"] == {"H100": [[1, 2.0]]}


def test_every_lines_points_have_a_tick():
    lines = [{"label": str(values), "points": [[v, 100.0, 1] for v in values]} for values in ((3, 6, 48), (1, 2))]
    (axes,) = charts.draw_scaling({"axis": "depth", "lines": lines}).axes
    assert axes.get_xticks().tolist() == [1, 2, 3, 6, 48]


def test_cards_of_one_size_are_told_apart_in_charts(results):
    run = results["throughput-13m-h100-24gb"] | {"gpu_memory_bytes": 16 << 30}
    found = {name: run | {"card": card} for name, card in (("a", "V100"), ("b", "T4"), ("c", None))}
    names = [place for _, place, _ in charts.models_data(found)]
    assert names == ["H100 80GB HBM3, as V100, 16 GiB", "H100 80GB HBM3, as T4, 16 GiB", "H100 80GB HBM3, 16 GiB"]
    assert [label for label, *_ in charts.memory_data(found)] == [
        "13m, as V100, 16 GiB",
        "13m, as T4, 16 GiB",
        "13m, 16 GiB",
    ]


@pytest.mark.parametrize("colour, ink", [("#08519c", "white"), ("#a1d99b", "black"), ("#636363", "white")])
def test_ink_is_readable(colour, ink):
    assert charts.readable_on(colour) == ink


def test_what_a_card_did_is_named(results):
    card = results["throughput-13m-h100-24gb"]
    card["card"], card["results"]["pilesmith"]["losses"] = "RTX 3090", [10.9, 9.5, 8.25]
    assert ", as RTX 3090" in tables.throughput(results, "")
    assert "10.90 to 8.25 in 3 steps" in tables.memory(results, "")


def test_retried_allocations_are_told_where_there_were_any(results):
    assert "retried" not in tables.throughput(results, "") + tables.memory(results, "")
    results["throughput-13m-h100-24gb"]["results"]["pilesmith"]["alloc_retries"] = 2
    assert "(900 ms to 1.2 s), 2 allocations retried |" in tables.throughput(results, "")
    assert "| 3,000, 2 allocations retried |" in tables.memory(results, "")


def test_stale_pages_and_charts_are_mended(results, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(render, "ROOT", tmp_path)
    monkeypatch.setattr(render, "PAGE", tmp_path / "RESULTS.md")
    monkeypatch.setattr(render, "CHART_FOLDER", tmp_path / "charts")
    (tmp_path / "README.md").write_text("<!-- results:chart throughput --><!-- /results:chart -->\n")
    (tmp_path / "charts").mkdir()
    (tmp_path / "charts" / "of-a-result-that-is-gone.png").write_bytes(b"")
    monkeypatch.setattr(render, "load", lambda: results)
    assert render.main(["--check"]) == 1 and "README.md: stale" in capsys.readouterr().out
    assert render.main([]) == 0 and render.stale(results) == {}
    said = capsys.readouterr().out
    assert "README.md: written\n" in said and "charts/of-a-result-that-is-gone.png: deleted" in said
    assert "![" in (tmp_path / "README.md").read_text()
    assert sorted(p.stem for p in (tmp_path / "charts").iterdir()) == ["attention", "memory", "models", "throughput"]
