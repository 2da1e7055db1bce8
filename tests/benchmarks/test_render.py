"""Tables and charts follow their files: a figure that changes, a file that goes, a place that is unknown."""

import copy

import pytest

from benchmarks import charts, render, tables

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
        "n_parameters": 13_142_656, "processes": 1, "threads": 2, "gpu_memory_bytes": None, "flops_per_token": 1, "peak_flops": None, "plan": None,
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
        "[throughput-13m-cpu.json](results/throughput-13m-cpu.json)"
        in text
    )


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


def test_stale_pages_and_charts_are_mended(results, tmp_path, monkeypatch):
    monkeypatch.setattr(render, "ROOT", tmp_path)
    monkeypatch.setattr(render, "PAGE", tmp_path / "RESULTS.md")
    monkeypatch.setattr(render, "CHART_FOLDER", tmp_path / "charts")
    (tmp_path / "README.md").write_text("<!-- results:chart throughput --><!-- /results:chart -->\n")
    (tmp_path / "charts").mkdir()
    (tmp_path / "charts" / "of-a-result-that-is-gone.png").write_bytes(b"")
    for mend in render.stale(results).values():
        mend()
    assert render.stale(results) == {}
    assert "![" in (tmp_path / "README.md").read_text()
    assert sorted(p.stem for p in (tmp_path / "charts").iterdir()) == ["attention", "memory", "models", "throughput"]
