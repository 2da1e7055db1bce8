"""What a run shows and writes: console lines, metrics.jsonl, TensorBoard events, loss.png."""

import json
import math
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from engine.config import Config
from engine.whole_file import whole_file

LONG_S = 10  # a silence of this many seconds is explained beforehand


def human(number: float, unit: str = "") -> str:
    """Return `number` with three digits and a decimal prefix: 12345 -> "12.3k"."""
    for limit, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit * 0.9995:
            return f"{number / limit:.3g}{prefix}{unit}"
    return f"{number:.3g}{unit}"


def duration(seconds: float) -> str:
    """Return seconds as "1d 02:03", "2:03:04" or "03:04"."""
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d {h:02}:{m:02}"
    return f"{h}:{m:02}:{s:02}" if h else f"{m:02}:{s:02}"


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """Return metrics.jsonl's records; a last line cut short by a kill is left out."""
    records = []
    path = Path(run_dir) / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


class Report:
    """Keeps the record of a run, on the main process only. `first_step` steps are done: later ones are forgotten.

    MFU, the model's FLOPs in a second over the hardware's, is that of all `n_devices` together, as is the speed;
    peak_flops is that of one of them, None where it is not known.
    The record never ends the run: what the disk refuses is warned of once, and then done without.
    """

    def __init__(
        self, config: Config, first_step: int, flops_per_token: int, peak_flops: float | None, n_devices: int = 1
    ) -> None:
        self.config, self.run_dir, self.first_step = config, Path(config.run_dir), first_step
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops and n_devices * peak_flops
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.records = [r for r in read_metrics(self.run_dir) if r["step"] <= first_step] if first_step else []
        with whole_file(self.run_dir / "metrics.jsonl") as partial:
            partial.write_text("".join(json.dumps(r) + "\n" for r in self.records))
        self.file = open(self.run_dir / "metrics.jsonl", "a", buffering=1)
        self.board = None
        if config.report.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # seconds to import: only where it is wanted

            self.board = SummaryWriter(self.run_dir / "tensorboard", purge_step=first_step + 1)
            threading.excepthook = _without_disk_errors  # its thread's come back at the next call
        self.dropped: set[str] = set()
        self.start_clock()
        self.speed: float | None = None  # tokens a second, over the last interval

    def say(self, text: str) -> None:
        print(text, flush=True)

    def step(
        self,
        step: int,
        *,
        loss: float,
        lr: float,
        grad_norm: float,
        skipped: bool,
        step_s: float,
        tokens: int,
        memory_bytes: int,
    ) -> None:
        """Record the `step`-th step (1 is the first); `tokens` is the run's total.

        step_s: the seconds that it took, with those that it waited for its data.
        """
        batch_tokens = self.config.optimizer.batch_tokens
        record = {"step": step, "loss": loss, "lr": lr, "grad_norm": grad_norm, "step_s": step_s, "tokens": tokens}
        record |= {"tokens_per_s": batch_tokens / step_s, "memory_bytes": memory_bytes}
        mfu = self._mfu(batch_tokens / step_s)
        if mfu is not None:
            record["mfu"] = mfu
        if skipped:
            record["skipped"] = True
        self._write(record)
        self.interval_tokens += batch_tokens
        last = self.config.optimizer.max_steps
        if step % self.config.report.log_interval == 0 or step in (self.first_step + 1, last) or skipped:
            now = time.perf_counter()
            self.speed = self.interval_tokens / (now - self.interval_start)
            self.interval_start, self.interval_tokens = now, 0
            left = (last - step) * batch_tokens / self.speed
            mfu = self._mfu(self.speed)
            parts = [
                f"step {step:>{len(str(last))}}/{last}",
                f"loss {loss:.4f}",
                f"lr {lr:.2e}",
                f"grad norm {grad_norm:.3f}",
            ]
            parts += [f"{human(self.speed)} tokens/s"] + ([f"MFU {mfu:.1%}"] if mfu is not None else [])
            parts += [f"{memory_bytes / 2**30:.2f} GiB", f"{duration(left)} left"]
            self.say(" | ".join(parts) + (" | skipped: not finite" if skipped else ""))

    def memory(self, parts: dict[str, int]) -> None:
        """Show what the first step of this run held, in bytes by part."""
        shown = ", ".join(f"{part} {size / 2**30:.2f}" for part, size in parts.items())
        self.say(f"memory: {sum(parts.values()) / 2**30:.2f} GiB at the peak of the first step: {shown}")

    def validating(self, tokens: int) -> None:
        """Announce a long validation, reckoned from the speed of training, whose forward pass is a third."""
        seconds = tokens / (3 * self.speed) if self.speed else 0
        if seconds > LONG_S:
            self.say(f"validating on {human(tokens)} tokens, about {duration(seconds)}")

    def validation(self, step: int, loss: float, sample: str | None) -> None:
        self._write({"step": step, "val_loss": loss} | ({"sample": sample} if sample is not None else {}))
        self.say(f"step {step}: validation loss {loss:.4f}")
        if sample is not None:
            self.say(f"  {sample!r}")
            if self.board:
                self._attempt("tensorboard", lambda: self.board.add_text("sample", sample, step))
        self._attempt("loss.png", self.draw)

    def start_clock(self) -> None:
        """Leave the time since the last step (set-up, validation, checkpoint) out of the speed."""
        self.interval_start, self.interval_tokens = time.perf_counter(), 0

    def draw(self) -> None:
        """Write loss.png: training loss, smoothed and raw, validation loss, and the learning rate below."""
        training = [
            (r["step"], math.nan if r["loss"] is None else r["loss"], r["lr"]) for r in self.records if "loss" in r
        ]
        if len(training) < 2:
            return
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        steps, losses, rates = zip(*training)
        validation = [(r["step"], r["val_loss"]) for r in self.records if r.get("val_loss") is not None]
        figure = Figure(figsize=(9, 6), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
        top.plot(steps, losses, color="#9ecae1", linewidth=0.8, label="training, each step")
        top.plot(steps, _smooth(losses), color="#08519c", linewidth=1.8, label="training, smoothed")
        if validation:
            top.plot(*zip(*validation), color="#d94801", marker="o", markersize=4, linewidth=1.2, label="validation")
            top.annotate(
                f"{validation[-1][1]:.3f}",
                validation[-1],
                textcoords="offset points",
                xytext=(-4, 8),
                ha="right",
                color="#d94801",
            )
        top.set_ylabel("cross-entropy (nats per token)")
        top.set_title(f"{self.config.preset}: {human(steps[-1] * self.config.optimizer.batch_tokens)} tokens")
        top.grid(alpha=0.25)
        top.legend(frameon=False)
        bottom.plot(steps, rates, color="#636363", linewidth=1.2)
        bottom.set_ylabel("learning rate")
        bottom.set_xlabel("step")
        bottom.grid(alpha=0.25)
        with whole_file(self.run_dir / "loss.png") as partial:
            figure.savefig(partial, format="png")

    def close(self) -> None:
        self._attempt("loss.png", self.draw)
        self._attempt("metrics.jsonl", self.file.close)
        if self.board:
            self._attempt("tensorboard", self.board.close)

    def _write(self, record: dict[str, Any]) -> None:
        # JSON has no NaN: what is not finite is null in the file.
        record = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self.records.append(record)
        self._attempt("metrics.jsonl", lambda: self.file.write(json.dumps(record) + "\n"))
        if self.board:
            self._attempt("tensorboard", lambda: self._write_scalars(record))

    def _write_scalars(self, record: dict[str, Any]) -> None:
        for key, value in record.items():
            if key != "step" and isinstance(value, int | float):
                self.board.add_scalar(key, value, record["step"])

    def _attempt(self, name: str, write: Callable[[], Any]) -> None:
        """Write to the file or folder `name` of the run, unless the disk refused it before."""
        if name in self.dropped:
            return
        try:
            write()
        except OSError as error:
            self.dropped.add(name)
            self.say(f"warning: could not write {self.run_dir / name}: {error}; training goes on without it")
            if name == "metrics.jsonl":
                with suppress(OSError):  # what it could not write is still in its buffer
                    self.file.close()

    def _mfu(self, tokens_per_s: float) -> float | None:
        return None if self.peak_flops is None else tokens_per_s * self.flops_per_token / self.peak_flops


def _without_disk_errors(arguments: threading.ExceptHookArgs) -> None:
    if not issubclass(arguments.exc_type, OSError):
        threading.__excepthook__(arguments)


def _smooth(values: tuple[float, ...]) -> list[float]:
    """Return the exponential moving average over about a fiftieth of the curve; what is not finite is passed over."""
    weight = max(0.5, 1 - 50 / len(values))
    average, norm, smoothed = 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            average, norm = weight * average + (1 - weight) * value, weight * norm + (1 - weight)
        smoothed.append(average / norm if norm else value)
    return smoothed
