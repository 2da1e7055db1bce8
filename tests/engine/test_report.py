"""The record of a run: numbers people read, a file that survives a kill, and what a resumed run keeps of it."""

import math
import os
import threading
from types import SimpleNamespace

import pytest
from matplotlib.figure import Figure

from engine import report as report_module
from engine.command_line import parse
from engine.report import Report, duration, human, read_metrics


@pytest.fixture
def config(tmp_path):
    flags = [
        "--preset=13m",
        f"--run_dir={tmp_path}/run",
        "--tensorboard=false",
        "--max_steps=100",
        "--batch_tokens=1024",
    ]
    return parse([*flags, "--log_interval=2"])[0]


def record(report: Report, step: int, loss: float = 5.0) -> None:
    report.step(
        step, loss=loss, lr=1e-3, grad_norm=1.0, skipped=False, step_s=0.5, tokens=step * 1024, memory_bytes=3 << 30
    )


@pytest.mark.parametrize(
    "number, text", [(0.5, "0.5"), (999, "999"), (999.9, "1k"), (12_345, "12.3k"), (7.5e6, "7.5M"), (2.017e9, "2.02G")]
)
def test_human(number, text):
    assert human(number) == text


@pytest.mark.parametrize("seconds, text", [(5, "00:05"), (125, "02:05"), (7384, "2:03:04"), (93_784, "1d 02:03")])
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_mfu_is_shown_only_where_the_peak_is_known(config, capsys):
    report = Report(config, 0, flops_per_token=10**9, peak_flops=10e12)
    record(report, 1)
    assert read_metrics(config.run_dir)[0]["mfu"] == pytest.approx(1024 / 0.5 * 1e9 / 10e12)
    assert "MFU" in capsys.readouterr().out
    report.close()
    report = Report(config, 0, flops_per_token=10**9, peak_flops=10e12, n_devices=4)
    record(report, 1)
    assert read_metrics(config.run_dir)[0]["mfu"] == pytest.approx(1024 / 0.5 * 1e9 / 40e12)
    assert "MFU" in capsys.readouterr().out
    report.close()
    report = Report(config, 0, flops_per_token=10**9, peak_flops=None)
    record(report, 1)
    assert "mfu" not in read_metrics(config.run_dir)[0]
    assert "MFU" not in capsys.readouterr().out


def test_a_validation_that_takes_long_is_announced(config, capsys):
    report = Report(config, 0, 1, None)
    report.validating(10**9)  # of a speed that is not known
    report.speed = 1000
    report.validating(30_000)
    assert capsys.readouterr().out == ""
    report.validating(360_000)
    assert capsys.readouterr().out == "validating on 360k tokens, about 02:00\n"


def test_the_first_step_of_a_resumed_run_is_shown_without_its_set_up(config, monkeypatch, capsys):
    now = iter([0.0, 100.0, 102.0, 103.0])
    monkeypatch.setattr(report_module.time, "perf_counter", lambda: next(now))
    report = Report(config, 6, 1, None)
    report.start_clock()
    record(report, 7)
    record(report, 8)
    shown = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in shown] == ["step   7/100", "step   8/100"]
    assert ["512 tokens/s" in shown[0], "1.02k tokens/s" in shown[1]] == [True, True]


def test_every_number_reaches_tensorboard(config):
    report, written = Report(config, 0, 1, None), {}
    report.board = SimpleNamespace(add_scalar=lambda key, value, step: written.update({key: value}))
    record(report, 3)
    assert written["tokens"] == 3 * 1024 and written["memory_bytes"] == 3 << 30 and written["loss"] == 5.0
    assert "step" not in written


def test_a_resumed_run_forgets_what_came_after_its_checkpoint(config):
    report = Report(config, 0, 1, None)
    for step in range(1, 8):
        record(report, step)
    report.validation(6, 4.5, None)
    with open(report.run_dir / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "lo')  # the kill came here
    report = Report(config, 6, 1, None)
    record(report, 7, loss=3.0)
    records = read_metrics(config.run_dir)
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6, 6, 7]
    assert records[-1]["loss"] == 3.0
    assert Report(config, 0, 1, None).records == []  # a run that begins anew keeps nothing


def test_the_picture_is_drawn_through_losses_that_are_not_finite(config):
    report = Report(config, 0, 1, None)
    for step in range(1, 30):
        record(report, step, loss=math.nan if step % 7 == 0 else 10 / step)
    report.validation(29, 0.4, "text")
    report.close()
    assert (report.run_dir / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "NaN" not in (report.run_dir / "metrics.jsonl").read_text()  # which JSON does not have
    assert read_metrics(config.run_dir)[6]["loss"] is None


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a disk that is full")
def test_a_full_disk_costs_the_record_and_not_the_run(config, monkeypatch, capsys):
    """Each part of the record meets it, TensorBoard's in its own thread; each says so once."""
    config.report.tensorboard = True
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    report = Report(config, 0, 1, None)
    report.file.close()
    report.file = open("/dev/full", "a", buffering=1)
    report.board.file_writer.event_writer._general_file_writer.filename = "/dev/full"
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: os.write(os.open("/dev/full", os.O_WRONLY), b"x"))
    for step in range(1, 5):
        record(report, step)
        report.validation(step, 4.5, "text")
        report.board.file_writer.event_writer._async_writer._worker.join(0.2)
    report.close()
    said = capsys.readouterr()
    for name in ("metrics.jsonl", "loss.png", "tensorboard"):
        assert said.out.count(f"could not write {report.run_dir / name}: [Errno 28] No space left on device") == 1
    assert not said.err
