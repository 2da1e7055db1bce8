"""What was found in the inputs that should not be there, in words."""

from collections.abc import Sequence
from pathlib import Path

from tools.preparing.chunks import KINDS
from tools.preparing.token_file import Source, listed

MAX_LISTED = 20  # inputs whose lines are listed of each kind of problem


def summarize(folder: Path, sources: Sequence[Source]) -> list[str]:
    """Return lines on what was found in the inputs that should not be there: counts by kind, and the first lines."""
    lines = []
    for kind, meaning in KINDS.items():
        affected = [source for source in sources if kind in source.examples]
        if not affected:
            continue
        count = sum((source.skipped | source.noted)[kind] for source in affected)
        lines.append(f"{count} x {meaning}:")
        for source in affected[:MAX_LISTED]:
            for line, detail in source.examples[kind]:
                lines.append(f"    {folder / source.file}:{line}{f': {detail}' if detail else ''}")
            more = (source.skipped | source.noted)[kind] - len(source.examples[kind])
            if more:
                lines.append(f"    and {more} more in {source.file}")
        if others := affected[MAX_LISTED:]:
            lines.append(f"    and more in {listed([source.file for source in others])}")
    return lines
