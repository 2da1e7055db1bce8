"""How far a program has got: a bar on a terminal; elsewhere, as in a log, a line a minute."""

import threading
import time
from collections.abc import Sequence

from tqdm import tqdm

from engine.report import duration, human

LINE_S = 60
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


class Progress:
    """Shows what is done of `total`, how fast, and the time left; may be told from several threads.

    rates: of what else is counted, as they are written, such as "B/s of text"; without any, that of what is done.
    """

    def __init__(
        self, name: str, total: int, unit: str = "B", rates: Sequence[str] = (), *, shown: bool = True
    ) -> None:
        self._name, self._total, self._rates = name, total, rates or (f"{unit}/s",)
        self._lock = threading.Lock()
        self._done = 0
        self._bar = tqdm(
            total=total,
            desc=name,
            unit=unit,
            unit_scale=True,
            disable=None if shown else True,
            smoothing=0.05,
            bar_format=BAR if rates else None,
        )
        self._in_lines = shown and self._bar.disable
        self._begin(time.monotonic())

    def _begin(self, now: float) -> None:
        self._since, self._before, self._counts = now, self._done, [0] * len(self._rates)

    def add(self, done: int, *counts: int) -> None:
        """Note what was done since the last call, and as many counts as there are rates."""
        with self._lock:
            now = time.monotonic()
            seconds = max(now - self._since, 1e-3)
            self._done += done
            self._counts = [before + count for before, count in zip(self._counts, counts or (done,))]
            speeds = ", ".join(f"{human(n / seconds)}{rate}" for n, rate in zip(self._counts, self._rates))
            if self._in_lines and seconds >= LINE_S:
                left_s = (self._total - self._done) * seconds / max(self._done - self._before, 1)
                print(
                    f"{self._name}: {self._done / max(self._total, 1):.0%}, {speeds}, {duration(left_s)} left",
                    flush=True,
                )
                self._begin(now)
            if counts:
                self._bar.set_postfix_str(speeds, refresh=False)
            self._bar.update(done)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
