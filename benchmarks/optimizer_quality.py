"""Compare training with compact optimizer states to fp32 AdamW: final losses against the spread of the seeds.

    python benchmarks/optimizer_quality.py --train_file data/train/pile_train.bin --val_file data/val/pile_dev.bin
    nohup python benchmarks/optimizer_quality.py > quality.log &      # goes on where it stopped, however it was stopped
    python benchmarks/optimizer_quality.py --report                   # only write the results of what is there

Every run is `engine/train.py` itself on a CPU, at the lowest priority and on one thread, with a checkpoint every 200
steps. Runs with the same seed begin with the same weights and see the same text in the same order, so formats are
compared seed by seed. Results and a picture of their curves are written after each finished run. On several cores,
start it once for each of `--models` with an `--out` of its own, and at the end with `--report` for all.
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.chart_style import plain
from benchmarks.environment import RESULTS, environment, write_result
from engine.command_line import CommandLine, ends_on_ctrl_c, positive
from engine.data import TokenFile
from engine.report import read_metrics

ROOT = Path(__file__).parent.parent
TRAINING = ["--lr=2e-3", "--min_lr=2e-4", "--warmup_steps=50"]
MODELS = {
    "13m": ["--preset=13m", *TRAINING],
    "gpt-4-layers": ["--preset=gpt2", "--n_layer=4", "--n_head=4", "--n_embd=128", "--block_size=128", *TRAINING],
}
FORMATS = {  # weights, moments
    "fp32": ("fp32", "fp32"),
    "residual-int8": ("residual", "int8"),
    "stochastic-int8": ("stochastic", "int8"),
    "stochastic-bf16": ("stochastic", "bf16"),
    "fp32-int8": ("fp32", "int8"),
    "fp32-again": ("fp32", "fp32"),
}
REFERENCE = "fp32"
# Nothing that matters is different, so what these runs differ by from the reference is chance.
FLAGS = {"fp32-again": ["--weight_decay=0.100001"]}
LAST = 100  # steps whose mean is a run's final training loss
SAVE_INTERVAL = 200
BLOCK_TOKENS = 1 << 24  # counted at once: numpy counts a copy in 8 bytes a token

Curve = list[tuple[int, float]]


def runs(options: argparse.Namespace) -> list[tuple[str, str, int]]:
    """Return (model, format, seed) of every run, in an order that finishes whole seeds first."""
    return [(m, f, s) for s in options.seeds for m in options.models for f in options.formats]


def folder(options: argparse.Namespace, model: str, form: str, seed: int) -> Path:
    return Path(options.run_dir) / f"{model}_{options.steps}x{options.batch_tokens}" / form / f"seed_{seed}"


def curves(run: Path) -> tuple[Curve, Curve]:
    """Return (step, training loss) and (step, validation loss) of a run so far."""
    records = read_metrics(run)
    training = [(r["step"], r["loss"]) for r in records if r.get("loss") is not None]
    return training, [(r["step"], r["val_loss"]) for r in records if r.get("val_loss") is not None]


def finished(options: argparse.Namespace, model: str, form: str, seed: int) -> bool:
    _, validation = curves(folder(options, model, form, seed))
    return bool(validation) and validation[-1][0] == options.steps


def command(options: argparse.Namespace, model: str, form: str, seed: int) -> list[str]:
    weights, moments = FORMATS[form]
    settings = {
        "strategy": "resident",
        "device": "cpu",
        "dtype": "fp32",
        "weights": weights,
        "moments": moments,
        "seed": seed,
        "max_steps": options.steps,
        "batch_tokens": options.batch_tokens,
        "train_file": options.train_file,
        "val_file": options.val_file,
        "run_dir": folder(options, model, form, seed),
        "eval_interval": 5 * SAVE_INTERVAL,
        "eval_tokens": options.eval_tokens,
        "save_interval": SAVE_INTERVAL,
        "keep_checkpoints": 1,
        "log_interval": 100,
        "sample_tokens": 0,
        "tensorboard": "false",
    }
    flags = [f"--{name}={value}" for name, value in settings.items()]
    return [
        sys.executable,
        str(ROOT / "engine/train.py"),
        *MODELS[model],
        *flags,
        *FLAGS.get(form, []),
        "--resume=auto",
    ]


def train(options: argparse.Namespace, *run: Any) -> None:
    """Start or resume one run and wait for its end; SIGINT and SIGTERM let it save before this program ends."""
    environment_ = os.environ | {"OMP_NUM_THREADS": str(options.threads), "CUDA_VISIBLE_DEVICES": ""}
    # A session of its own: a Ctrl-C reaches the training once, through us, and not twice, which would stop it unsaved.
    child = subprocess.Popen(command(options, *run), env=environment_, start_new_session=True)
    stopped = []

    def stop(number: int, frame: Any) -> None:
        stopped.append(number)
        child.terminate()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    code = child.wait()
    for number, handler in before.items():
        signal.signal(number, handler)
    if stopped:
        sys.exit(128 + stopped[0])
    if code:
        sys.exit(f"error: {'/'.join(map(str, run))} ended with exit code {code}; its message is above")


def summary(options: argparse.Namespace) -> dict[str, Any]:
    """Return, for every model, each format's final losses and how far they are from the reference's.

    "difference": the mean over seeds of the final validation loss less the reference's with the same seed. "spread":
    the largest less the smallest final loss of the reference's seeds. "inside": |difference| <= spread; None where
    fewer than two seeds are finished in both. "curves": of each seed, the training loss smoothed at `curve_steps`.
    """
    models: dict[str, Any] = {}
    for model in options.models:
        final: dict[str, dict[int, tuple[float, float]]] = {}
        smoothed: dict[str, dict[str, list[float | None]]] = {}
        for form in options.formats:
            for seed in options.seeds:
                if finished(options, model, form, seed):
                    training, validation = curves(folder(options, model, form, seed))
                    last = statistics.fmean(loss for _, loss in training[-LAST:])
                    final.setdefault(form, {})[seed] = validation[-1][1], last
                    means = {step: round(loss, 4) for step, loss in smooth(training, LAST)}
                    kept = [means.get(step) for step in curve_steps(options.steps)]
                    smoothed.setdefault(form, {})[str(seed)] = kept
        reference = final.get(REFERENCE, {})
        of_seeds = [loss for loss, _ in reference.values()]
        spread = max(of_seeds) - min(of_seeds) if len(of_seeds) > 1 else None
        models[model] = {"spread": spread, "formats": {}}
        for form, losses in final.items():
            both = sorted(losses.keys() & reference.keys())
            difference = statistics.fmean(losses[s][0] - reference[s][0] for s in both) if both else None
            models[model]["formats"][form] = {
                "weights": FORMATS[form][0],
                "moments": FORMATS[form][1],
                "val_loss": {str(s): v for s, (v, _) in losses.items()},
                "train_loss": {str(s): t for s, (_, t) in losses.items()},
                "curves": smoothed[form],
                "difference": difference,
                "differences": {str(s): losses[s][0] - reference[s][0] for s in both},
                "inside": abs(difference) <= spread if len(both) > 1 and spread is not None else None,
            }
    return models


def unigram_loss(train_file: str, val_file: str) -> float:
    """Return the loss of the validation text, in nats per token, where words are only as frequent as in training."""
    train, val = (TokenFile(file).tokens for file in (train_file, val_file))
    n = 1 + max(int(train.max()), int(val.max()))
    seen = count_tokens(train, n) + 1
    return float(-np.average(np.log(seen / seen.sum()), weights=count_tokens(val, n)))


def count_tokens(tokens: np.ndarray, n: int) -> np.ndarray:
    """Return how often each number below `n` is among `tokens` (any length, unsigned), int64 (n,)."""
    blocks = (tokens[i : i + BLOCK_TOKENS] for i in range(0, len(tokens), BLOCK_TOKENS))
    return sum((np.bincount(block, minlength=n) for block in blocks), np.zeros(n, np.int64))


def lines(models: dict[str, Any]) -> list[str]:
    """Return the summary as text, a line for each model and format."""
    text = []
    for model, outcome in models.items():
        for form, result in outcome["formats"].items():
            losses = ", ".join(f"{loss:.4f}" for loss in result["val_loss"].values())
            line = f"{model:14} {form:16} validation loss {losses}"
            if form == REFERENCE:
                line += f" | spread {outcome['spread']:.4f}" if outcome["spread"] is not None else ""
            elif result["difference"] is not None:
                verdict = {True: " inside the spread", False: " OUTSIDE the spread", None: ""}[result["inside"]]
                line += f" | {result['difference']:+.4f} against {REFERENCE}{verdict}"
            text.append(line)
    return text


def smooth(curve: Curve, window: int) -> Curve:
    """Return the running mean over `window` steps, from the first full window on."""
    total, means = 0.0, []
    for i, (step, loss) in enumerate(curve):
        total += loss - (curve[i - window][1] if i >= window else 0.0)
        if i >= window - 1:
            means.append((step, total / window))
    return means


def curve_steps(steps: int) -> list[int]:
    """Return the steps of a run at which a result keeps its smoothed training loss: about a hundred."""
    return list(range(LAST, steps + 1, max(1, steps // 100)))


def curves_data(result: dict[str, Any]) -> Any:
    """[{title, steps, formats: {format: {seed: losses}}}], a panel a model; None of a result without curves."""
    settings, panels = result["settings"], []
    about = f"{settings['steps']} steps of {settings['batch_tokens']} tokens, {len(settings['seeds'])} seeds"
    for model, outcome in result["models"].items():
        formats = {form: row["curves"] for form, row in outcome["formats"].items() if "curves" in row}
        if formats:
            panels.append({"title": f"{model}, {about}", "steps": settings["curve_steps"], "formats": formats})
    return panels or None


def draw_curves(panels: Any) -> Figure:
    """A column for each panel: smoothed training losses, every run a line, and the difference to the reference."""
    figure = Figure(figsize=(6 * len(panels), 7), layout="constrained")
    axes = figure.subplots(2, len(panels), squeeze=False, sharex="col", height_ratios=(3, 2))
    colors = dict(zip(FORMATS, ("#252525", "#08519c", "#d94801", "#238b45", "#6a51a3", "#969696")))
    for (top, bottom), panel in zip(axes.T, panels):
        losses = {  # None is no number: the line has a gap there
            form: {seed: np.array(curve, float) for seed, curve in of_seeds.items()}
            for form, of_seeds in panel["formats"].items()
        }
        reference = losses.get(REFERENCE, {})
        for form, of_seeds in losses.items():
            for number, (seed, curve) in enumerate(of_seeds.items()):
                line = {"color": colors[form], "linewidth": 1, "alpha": 0.8}
                top.plot(panel["steps"], curve, label=form if number == 0 else None, **line)
                if form != REFERENCE and seed in reference:
                    bottom.plot(panel["steps"], curve - reference[seed], **line)
        if len(reference) > 1:  # what the seeds alone make
            spread = np.ptp(list(reference.values()), axis=0)
            for sign in (1, -1):
                label = "spread of the seeds" if sign == 1 else None
                bottom.plot(panel["steps"], sign * spread, color="#969696", linewidth=1, linestyle=":", label=label)
            bottom.legend(frameon=False)
        top.set_title(panel["title"], fontsize=10)
        top.set_ylabel(f"training loss, mean of {LAST} steps (nats per token)")
        bottom.set_ylabel(f"difference to {REFERENCE}, same seed")
        bottom.set_xlabel("step")
        bottom.axhline(0, color="#252525", linewidth=0.8)
        top.legend(frameon=False)
        for axis in (top, bottom):
            plain(axis)
    return figure


def report(options: argparse.Namespace) -> None:
    models = summary(options)
    kept = ("steps", "batch_tokens", "eval_tokens", "seeds")
    settings = {name: getattr(options, name) for name in kept} | {"flags": {m: MODELS[m] for m in options.models}}
    settings["curve_steps"] = curve_steps(options.steps)
    if all(Path(file).exists() for file in (options.train_file, options.val_file)):
        settings["train_tokens"] = len(TokenFile(options.train_file))
        settings["unigram_loss"] = unigram_loss(options.train_file, options.val_file)
    payload = {"benchmark": "optimizer_quality", "environment": environment(), "settings": settings, "models": models}
    write_result(Path(options.out), payload)
    if panels := curves_data(payload):
        draw_curves(panels).savefig(Path(options.out).with_suffix(".png"), dpi=110)
    print("\n".join(lines(models)), flush=True)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = CommandLine(__doc__)
    parser.add_argument("--train_file", default="data/embedded/train.bin", help="training tokens [%(default)s]")
    parser.add_argument("--val_file", default="data/embedded/val.bin", help="validation tokens [%(default)s]")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="[%(default)s]")
    default_formats = ["fp32", "fp32-again", "residual-int8", "stochastic-int8"]
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=default_formats, help="[%(default)s]")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="[%(default)s]")
    parser.add_argument("--steps", type=positive, default=2000, help="[%(default)s]")
    parser.add_argument("--batch_tokens", type=positive, default=1024, help="tokens a step [%(default)s]")
    parser.add_argument("--eval_tokens", type=positive, default=131_072, help="tokens of each validation [%(default)s]")
    parser.add_argument("--threads", type=positive, default=1, help="threads of a run [%(default)s]")
    parser.add_argument("--run_dir", default="runs/optimizer_quality", help="where the runs are [%(default)s]")
    parser.add_argument("--out", default=str(RESULTS / "optimizer_quality.json"), help="results; a picture beside it")
    parser.add_argument("--report", action="store_true", help="train nothing")
    options = parser.parse_args(arguments)
    for path in (options.train_file, options.val_file):
        if not options.report and not Path(path).exists():
            parser.error(f"{path} is missing: tools/prepare.py makes it; engine/train.py the default, at its start")
    return options


@ends_on_ctrl_c("interrupted; the same command goes on")
def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    os.nice(19)
    missing = [] if options.report else [run for run in runs(options) if not finished(options, *run)]
    for run in missing:
        print(f"{'/'.join(map(str, run))}:", flush=True)
        train(options, *run)
        report(options)
    if not missing:
        report(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
