"""What is kept of plans is what tools/plan.py prints, for every card of the classic table."""

import io
import json
from contextlib import redirect_stdout

from benchmarks import plans
from engine.cards import CLASSIC
from tools import plan


def test_what_is_kept_is_what_plan_prints(tmp_path, validate, monkeypatch):
    file, printed, main = tmp_path / "plan.json", io.StringIO(), plan.main

    def noted(command):
        with redirect_stdout(printed):
            status = main(command)
        print(printed.getvalue())
        return status

    monkeypatch.setattr(plan, "main", noted)
    assert plans.main(["--preset", "gpt2", "--host_memory", "32GB", "--out", str(file)]) == 0
    payload = json.loads(file.read_text())
    validate(payload, "plan")
    assert [entry["gpu"] for entry in payload["plans"]] == [card.name for card in CLASSIC]
    assert payload["plans"] == json.loads(printed.getvalue())[: len(CLASSIC)]


def test_mistakes_are_said(capsys):
    assert plans.main(["--host_memory", "much"]) == 2
    assert "no size of memory" in capsys.readouterr().err
