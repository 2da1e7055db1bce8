"""Progress off a terminal: a line a minute, with what the minute's rates leave to do."""

from types import SimpleNamespace

from tools import progress
from tools.progress import Progress


def test_a_log_has_a_line_a_minute(monkeypatch, capsys) -> None:
    now = [0.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with (
        Progress("train.bin", 1000, rates=("B/s of text", " tokens/s")) as prepared,
        Progress("00.jsonl.zst", 10**9) as fetched,
        Progress("quiet", 1000, shown=False) as quiet,
    ):
        for now[0], done in ((1, 500), (59, 0), (60, 100), (61, 100), (120, 100)):  # of what was there, most is faster
            prepared.add(done, 10**6 * done, 250_000 * done)
            fetched.add(done * 10**6)
            quiet.add(done)
    assert capsys.readouterr().out.splitlines() == [
        "train.bin: 60%, 10MB/s of text, 2.5M tokens/s, 00:40 left",
        "00.jsonl.zst: 60%, 10MB/s, 00:40 left",
        "train.bin: 80%, 3.33MB/s of text, 833k tokens/s, 01:00 left",
        "00.jsonl.zst: 80%, 3.33MB/s, 01:00 left",
    ]
