"""How far preparing has got: a bar, on terminals only."""

import threading
import time

from tqdm import tqdm

from tools.pipeline import Work


class Progress:
    """Shows bytes of input done, MB/s of text, tokens/s and time left; may be told from several threads."""

    def __init__(self, name: str, total_bytes: int, shown: bool = True) -> None:
        self._lock = threading.Lock()
        self._started = time.monotonic()
        self._text_bytes = self._tokens = 0
        self._bar = tqdm(
            total=total_bytes,
            desc=name,
            unit="B",
            unit_scale=True,
            disable=None if shown else True,
            smoothing=0.05,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
        )

    def add(self, work: Work) -> None:
        with self._lock:
            self._text_bytes += work.bytes
            self._tokens += work.tokens
            seconds = max(time.monotonic() - self._started, 1e-3)
            text, tokens = self._text_bytes / seconds / 1e6, self._tokens / seconds / 1e6
            self._bar.set_postfix_str(f"{text:.0f} MB/s of text, {tokens:.1f} M tokens/s", refresh=False)
            self._bar.update(work.consumed)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
