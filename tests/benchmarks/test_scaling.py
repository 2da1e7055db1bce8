"""Each axis changes its one thing; the paper part says what the planner says; the file is valid as it grows."""

import json

import pytest

from benchmarks import scaling
from benchmarks.measuring import Measured
from engine import cards
from engine.config import from_dict, preset
from engine.memory import choose, plan


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("axis", ["depth", "width", "length", "micro-batch"])
def test_an_axis_changes_one_thing(kind, axis):
    made = scaling.jobs(kind, axis, {})
    assert list(made) == scaling.AXES[kind][axis]
    shapes = [(j.config.model.n_layer, j.config.model.n_embd, j.config.model.block_size) for j in made.values()]
    varies = {"depth": 0, "width": 1, "length": 2}.get(axis)
    for i in range(3):
        assert len({shape[i] for shape in shapes}) == (len(made) if i == varies else 1)
    assert len({j.config.optimizer.batch_tokens for j in made.values()}) == 1
    assert {j.config.model.head_dim for j in made.values()} == {scaling.HEAD_DIM[kind]}
    for job in made.values():  # accumulation comes out even
        assert (
            job.config.optimizer.batch_tokens % (job.config.optimizer.micro_batch_size * job.config.model.block_size)
            == 0
        )


def test_processes_have_a_core_each():
    assert [(j.processes, j.threads) for j in scaling.jobs("cpu", "processes", {}).values()] == [(1, 1), (2, 1)]


def test_paper_is_the_planners():
    rows = scaling.on_paper("2b", ("H100",), 1 << 21)
    assert [row["gpus"] for row in rows] == [2**i for i in range(11)]
    assert all(later["tokens_per_s"] > sooner["tokens_per_s"] for sooner, later in zip(rows, rows[1:]))
    four = choose(
        plan(
            from_dict(preset("2b")).model, cards.get("H100"), 4 * scaling.PAPER_HOST_BYTES, gpus=4, batch_tokens=1 << 21
        )
    )
    assert rows[2]["tokens_per_s"] == four.tokens_per_s and rows[2]["plan"] == four.name


def test_a_run_from_the_command_line(tmp_path, monkeypatch, validate):
    def compare(jobs, device, warmup, steps):
        for name, job in jobs.items():
            yield name, Measured(job.config, None, {}, [], 1, 1, steps=[(0.5, 6.0)] * steps)

    monkeypatch.setattr(scaling, "compare", compare)
    monkeypatch.setitem(scaling.AXES["cpu"], "depth", [1, 2])
    monkeypatch.setattr(scaling, "PAPER_CARDS", ("H100",))
    file = tmp_path / "scaling.json"
    flags = ["--axes", "depth,paper", "--steps", "2", "--warmup", "1", "--batch_tokens", "1024"]
    assert scaling.main([*flags, "--out", str(file)]) == 0
    payload = json.loads(file.read_text())
    validate(payload, "scaling")
    one, two = payload["axes"]["depth"]
    assert two["n_parameters"] > one["n_parameters"] and two["flops_per_token"] > one["flops_per_token"]
    assert two["tokens_per_s"] == 2048.0 and len(payload["paper"]["rows"]) == 11


def test_mistakes_are_said(capsys):
    assert scaling.main(["--axes", "height"]) == 2
    assert "--axes knows depth" in capsys.readouterr().err
