"""Keep what the planner says of a preset on every card of the classic table, to be drawn and compared.

    python benchmarks/plans.py                                  # 2b, 64 GB of host memory
    python benchmarks/plans.py --preset gpt2-xl --out plan.json

What `python tools/plan.py --gpu all --json` prints of them. Predictions, and named so.
"""

import io
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path

from benchmarks.environment import RESULTS, environment, write_result
from engine.cards import CLASSIC, parse_memory
from engine.command_line import CommandLine, ends_on_ctrl_c
from engine.config import PRESETS
from tools import plan


@ends_on_ctrl_c()
def main(arguments: list[str] | None = None) -> int:
    parser = CommandLine(__doc__)
    parser.add_argument("--preset", default="2b", choices=list(PRESETS), help="the model [2b]")
    parser.add_argument("--host_memory", default="64GB", help="of the machine [64GB]")
    parser.add_argument("--out", type=Path, help="the JSON file to write [benchmarks/results/plan-PRESET.json]")
    options = parser.parse_args(arguments)
    printed = io.StringIO()
    command = ["--preset", options.preset, "--gpu", "all", "--host_memory", options.host_memory, "--json"]
    with redirect_stdout(printed):
        status = plan.main(command)
    if status:
        return status
    classic = {card.name for card in CLASSIC}
    plans = [entry for entry in json.loads(printed.getvalue()) if entry["gpu"] in classic]
    for entry in plans:
        print(f"{entry['gpu']:16} {entry['title'] if entry['fits'] else 'does not fit'}")
    payload = {
        "benchmark": "plan", "environment": environment(), "preset": options.preset,
        "host_memory_bytes": parse_memory(options.host_memory), "plans": plans,
    }  # fmt: skip
    write_result(options.out or RESULTS / f"plan-{options.preset}.json", payload)
    return 0


if __name__ == "__main__":
    sys.exit(main())
