"""Train a GPT.

    python engine/train.py --preset 13m                          # on the embedded default text, on any machine
    python engine/train.py --preset gpt2 --train_file data/train/pile_train.bin --val_file data/val/pile_dev.bin
    deepspeed engine/train.py --preset 2b                        # the same program under DeepSpeed's launcher
    python engine/train.py --preset 13m --resume                 # go on where the run stopped
    python engine/train.py --preset 13m --resume auto            # the same, or begin: for scripts that restart
    python engine/train.py --init_from gpt2/ --run_dir runs/mine # begin with other weights, in their shape

Every field of engine/config.py is a flag; `--help` lists them.
"""

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from engine import checkpoint
from engine.cards import peak_flops
from engine.checkpoint import Progress
from engine.command_line import INTERRUPTED, ends_on_ctrl_c, parse
from engine.config import (
    Config,
    ConfigError,
    DataConfig,
    ModelConfig,
    changes,
    differences,
    load_file,
    model_flags,
    require,
)
from engine.data import Batch, DataError, TokenFile, TrainingBatches, open_files, prefetch, validation_batches
from engine.device import choose_device, choose_dtype, peak_memory
from engine.distributed import Processes
from engine.formats import WeightsError, resize_vocab
from engine.held_memory import by_part, gradient_bytes
from engine.memory import Plan
from engine.model import GPT, flops_per_token
from engine.placement import explain, settle
from engine.report import Report, human
from engine.sampling import sample_text
from engine.schedule import learning_rate, never_drops, new_length
from engine.strategy import Strategy, build
from engine.tokenizer import load_encoding
from engine.weights import find_weights, read_weights, require_tokenizer
from kernels import dispatch

EMBEDDED_DATA = Path("data/embedded")
EXIT_DIVERGED = 3
EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped and saved before its end, and may be started again
LESS_MEMORY = """\
The planner counts what other programs held of the card when the run began. To leave more of it: --micro_batch_size 1,
--activation_checkpointing blocks or --offload states; more of the host: a smaller --host_memory. tools/plan.py shows
what each takes; --resume goes on from the newest checkpoint."""


class Interrupt:
    """Within it SIGINT, SIGTERM or a file called `stop` in run_dir ask for a stop after the current step.

    A second signal of a kind stops at once. run_dir: the main process's, which looks for the file and says what a
    signal will do; None for the others. What lay there before is removed, and so is the file at the end.
    """

    def __init__(self, run_dir: str | None) -> None:
        self._file = Path(run_dir) / "stop" if run_dir is not None else None

    def __enter__(self) -> "Interrupt":
        self._signalled = False
        self._remove_file()
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._remove_file()

    @property
    def asked(self) -> bool:
        return self._signalled or (self._file is not None and self._file.exists())

    def _ask(self, number: int, frame: Any) -> None:
        says, self._signalled = self._file is not None and not self._signalled, True
        signal.signal(number, signal.SIG_DFL)
        if says:
            with suppress(OSError):  # print() may be what was interrupted
                os.write(2, b"\nstopping after this step; Ctrl-C again stops at once, without saving\n")

    def _remove_file(self) -> None:
        if self._file is not None:
            self._file.unlink(missing_ok=True)


@dataclass
class Run:
    """What a training run consists of; `config` is `asked` with every open choice made, on a card by `plan`.

    where: the line on its device and dtype. start_from: the checkpoint that it goes on from, and `abandoned` those of
    the run that came after that one. `report` is the main process's only.
    """

    config: Config
    asked: Config
    processes: Processes
    device: torch.device
    dtype: torch.dtype
    where: str
    plan: Plan | None
    data: TrainingBatches
    val_file: TokenFile
    validation: list[Batch]
    strategy: Strategy
    progress: Progress
    start_from: Path | None
    abandoned: list[Path]
    report: Report | None = None


def prepare_default_data(config: Config, processes: Processes) -> None:
    """Point a run without prepared data at the embedded default: this Python's own documentation, made on the spot."""
    files = config.data.train_file, config.data.val_file
    if any(Path(file).exists() for file in files) or files != (DataConfig().train_file, DataConfig().val_file):
        return
    config.data.train_file, config.data.val_file = str(EMBEDDED_DATA / "train.bin"), str(EMBEDDED_DATA / "val.bin")
    if processes.main and not all(Path(file).exists() for file in (config.data.train_file, config.data.val_file)):
        print(
            f"no prepared data at {files[0]}: building the embedded default, "
            f"this Python's own text, in {EMBEDDED_DATA}",
            flush=True,
        )
        folders = ["--train_dir", str(EMBEDDED_DATA / "train"), "--val_dir", str(EMBEDDED_DATA / "val")]
        outputs = ["--out_train_file", config.data.train_file, "--out_val_file", config.data.val_file]
        for command in (["tools.download", "--source", "stdlib", *folders], ["tools.prepare", *folders, *outputs]):
            code = subprocess.run([sys.executable, "-m", *command]).returncode
            if code in (-signal.SIGINT, INTERRUPTED):
                raise KeyboardInterrupt
            if code:
                raise DataError(f"python -m {' '.join(command)} failed; its message is above")
    processes.barrier()


def set_up(config: Config, start_from: Path | None, processes: Processes) -> Run:
    """Build everything that `config` describes, with the states of the checkpoint to start from where there is one."""
    device, dtype, where = place(config, processes)
    asked = config  # saved as it is: a run may be resumed elsewhere, where other choices are better
    config, grad_accum, plan = settle(asked, device, dtype, processes)
    prepare_default_data(asked, processes)
    config.data = asked.data
    progress = Progress.of(start_from) if start_from else Progress()
    data, val_file, validation = open_data(config, processes, grad_accum, progress, pin=device.type == "cuda")
    strategy = build_strategy(config, processes, device, dtype, grad_accum, start_from, data.file)
    abandoned = checkpoint.later(config.run_dir, progress.step)
    run = Run(
        config, asked, processes, device, dtype, where, plan, data, val_file, validation,
        strategy, progress, start_from, abandoned,
    )  # fmt: skip
    if processes.main:
        run.report = begin_report(run)
    return run


def place(config: Config, processes: Processes) -> tuple[torch.device, torch.dtype, str]:
    """Return this process's device, connected to the others', the dtype of its computation, and a line on both."""
    device, device_reason = choose_device(config.strategy.device, processes.local_rank)
    if processes.world_size > 1:
        processes.connect(device)
    dispatch.set_backend(config.strategy.kernels)
    dtype, dtype_reason = choose_dtype(config.strategy.dtype, device)
    name = str(dtype).removeprefix("torch.")
    return device, dtype, f"device: {device} ({device_reason}); dtype: {name} ({dtype_reason})"


def open_data(
    config: Config, processes: Processes, grad_accum: int, progress: Progress, *, pin: bool
) -> tuple[TrainingBatches, TokenFile, list[Batch]]:
    """Return the training batches, which go on after what `progress` has seen, the validation file and its batches."""
    train_file, val_file = open_files(config.data, config.model)
    options, block_size = config.optimizer, config.model.block_size
    common = {"block_size": block_size, "document_masking": config.data.document_masking}
    common |= {"rank": processes.rank, "world_size": processes.world_size}
    data = TrainingBatches(
        train_file,
        micro_batch_size=options.micro_batch_size,
        grad_accum=grad_accum,
        seed=config.seed,
        first_sequence=(progress.tokens - progress.step * options.batch_tokens) // block_size,
        **common,
    )
    validation = validation_batches(
        val_file, batch_size=options.micro_batch_size, tokens=config.report.eval_tokens, **common
    )
    return data, val_file, [batch.pin() if pin else batch for batch in validation]


def build_strategy(
    config: Config,
    processes: Processes,
    device: torch.device,
    dtype: torch.dtype,
    grad_accum: int,
    start_from: Path | None,
    train_file: TokenFile,
) -> Strategy:
    """Return the strategy with the states of a checkpoint, with weights from elsewhere, or with those of the seed."""
    model = GPT.outline(config.model)
    if elsewhere := start_from or config.init_from:
        weights = weights_from(elsewhere, config.model, train_file, pad=not start_from)
    else:
        weights = model.initial_weights(torch.Generator().manual_seed(config.seed))
    strategy = build(config, model, processes, device, dtype, grad_accum, weights)
    if start_from:
        checkpoint.load(start_from, strategy)
    return strategy


def begin_report(run: Run) -> Report:
    """Save both configurations in the run's folder, and show what the run is."""
    config, folder = run.config, Path(run.config.run_dir)
    name = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else "cpu"
    n_parameters = GPT.outline(config.model).num_parameters()
    flops = flops_per_token(config.model, n_parameters)
    report = Report(config, run.progress.step, flops, peak_flops(name, run.dtype), run.processes.world_size)
    run.asked.save(folder / "config.json")
    config.save(folder / "resolved.json")
    report.say(f"{config.preset}: {n_parameters:,} parameters, {flops / 1e6:.1f} MFLOPs a token")
    for line in first_lines(run):
        report.say(line)
    return report


def first_lines(run: Run) -> Iterator[str]:
    """Yield what a run says before its first step of where, how and on what it trains."""
    config, asked, options = run.config, run.asked, run.config.optimizer
    yield run.where
    yield from kernel_lines(run.device)
    yield from explain(run.plan) if run.plan else ()
    if options.warmup_steps != asked.optimizer.warmup_steps:
        yield (
            f"schedule: a warm-up of {asked.optimizer.warmup_steps} steps is too long "
            f"for {options.max_steps}: shortened to {options.warmup_steps}"
        )
    yield from never_drops(options)
    yield f"strategy: {run.strategy.describe()}"
    if config.init_from and not run.start_from:
        yield f"weights: {find_weights(config.init_from)}"
    data = run.data
    yield (
        f"data: {data.file}; a step is {human(options.batch_tokens)} tokens: "
        f"{data.world_size} x {data.grad_accum} x {data.micro_batch_size} sequences of {data.block_size}"
    )
    yield f"data: {data.epochs_line(options.max_steps)}"
    yield f"validation: {run.val_file}"
    if run.val_file.path.samefile(data.file.path):
        yield (
            "warning: validation is on the training file, so its loss tells what was learnt by heart: "
            "name another --val_file, unless that is what you check"
        )
    if run.start_from:
        yield f"resumed from {run.start_from} at step {run.progress.step}"
        before = load_file(run.start_from / "config.json")
        lengthened = new_length(before["optimizer"]["max_steps"], options)
        if changed := changes(before, asked, except_for=("run_dir", *(["max_steps"] if lengthened else []))):
            yield f"changed since the checkpoint: {', '.join(changed)}"
        yield from lengthened
        trained_on = checkpoint.read_state(run.start_from).get("train_data")  # older checkpoints do not say
        if trained_on not in (None, data.file.fingerprint):
            yield (
                f"warning: {data.file.path} holds other tokens than the {trained_on['tokens']:,} "
                "that the checkpoint was trained on: some may come again, others never"
            )


def loop(run: Run, interrupt: Interrupt) -> int:
    """Train until max_steps, until asked to stop, or too many bad steps in a row; return the exit code."""
    config, strategy, progress, report = run.config, run.strategy, run.progress, run.report
    options = config.optimizer
    saved, first, stop = run.start_from, progress.step + 1, False
    steps = prefetch(run.data.step, progress.step, options.max_steps, pin=run.device.type == "cuda")
    if report:
        report.start_clock()
    began = time.perf_counter()  # before the data is there: a step that waits for it is a slow step
    for batches in steps:
        lr = learning_rate(progress.step, options)
        strategy.set_lr(lr)
        loss = strategy.forward_backward(batches)
        asked = torch.full((), float(interrupt.asked), device=run.device)  # torch.tensor would wait for the device
        loss, asked = run.processes.mean(torch.stack([loss, asked]))  # all stop if one was asked to
        progress.step += 1
        step = progress.step
        gradients = gradient_bytes(strategy.parameters.values(), run.device) if step == first else 0
        result = strategy.step(loss)

        progress.tokens += options.batch_tokens
        progress.bad_steps = progress.bad_steps + (not result.rescaled) if result.skipped else 0
        progress.val_loss = None
        stop, last = bool(asked > 0), step == options.max_steps
        if report:
            report.step(
                step, loss=loss.item(), lr=lr, grad_norm=result.grad_norm, skipped=result.skipped,
                step_s=time.perf_counter() - began, tokens=progress.tokens, memory_bytes=peak_memory(run.device),
            )  # fmt: skip
        if report and step == first:
            report.memory(by_part(strategy.parameters.values(), run.device, gradients))
        if progress.bad_steps == options.max_bad_steps:
            return diverged(config, saved, report)
        validating, saving = due(step, config.report.eval_interval), due(step, config.report.save_interval)
        if validating or last:
            validate(run)
        if saving or last or stop:
            saved = save(run, final=last or stop) or saved
        if report and (validating or saving):
            report.start_clock()
        stop = stop and not last
        if stop:
            break
        began = time.perf_counter()
    steps.close()
    if report:
        if stop:
            report.say(f"stopped as asked after step {progress.step}; go on with --resume")
        report.close()
        if run.plan:
            predicted, measured = run.plan.footprint.allocated_bytes, peak_memory(run.device)
            report.say(
                f"memory: predicted {predicted / 2**30:.2f} GiB, "
                f"measured {measured / 2**30:.2f} GiB ({measured / predicted - 1:+.1%})"
            )
        report.say(f"run: {config.run_dir}; newest checkpoint: {saved}")
    return EXIT_STOPPED if stop else 0


@torch.no_grad()
def validate(run: Run) -> None:
    """Record the mean loss over every process's validation windows, and a sample of text."""
    module, options = run.strategy.module, run.config.report
    if run.report:
        run.report.validating(sum(batch.tokens.numel() for batch in run.validation) * run.processes.world_size)
    module.eval()
    total = torch.zeros(2, device=run.device)  # loss times tokens, tokens
    for batch in run.validation:
        batch = batch.to(run.device)
        loss, count = module(batch.tokens, batch.targets, doc_start=batch.doc_start), batch.tokens.numel()
        total += torch.stack([loss.float() * count, torch.tensor(float(count), device=run.device)])
    module.train()
    loss, count = run.processes.mean(total).tolist()
    run.progress.val_loss = loss / count
    sample = None
    # In every process, since ZeRO gathers parameters as they are used.
    if options.sample_tokens and math.isfinite(run.progress.val_loss):
        encoding = load_encoding(run.data.file.tokenizer)
        eager = getattr(module, "_orig_mod", module)  # a compiled model would compile again for each length
        sample = sample_text(eager, encoding, options.sample_prompt, options.sample_tokens, seed=run.config.seed)
    if run.report:
        run.report.validation(run.progress.step, run.progress.val_loss, sample)


def save(run: Run, final: bool) -> Path | None:
    """Write a checkpoint and return it; None where the disk is full and there will be a later chance to save."""
    file = run.data.file
    try:
        saved = checkpoint.save(
            run.asked, run.strategy, run.processes, run.progress, file.tokenizer, run.abandoned, file.fingerprint
        )
    except checkpoint.CheckpointError as error:
        if final:
            raise
        if run.report:
            run.report.say(f"warning: {error}; training goes on")
        return None
    run.abandoned = [path for path in run.abandoned if path != saved and path.exists()]
    return saved


def weights_from(
    path: str | Path, config: ModelConfig, data: TokenFile, *, pad: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Return the names and fp32 weights of any file that generate reads: a run, a Hugging Face folder, a classic .pt.

    pad: add the rows that round an embedding up to a multiple of 64, as GPT-2's 50257 to the 50304 of the presets.
    ConfigError where they belong to another model than `config` describes, or were trained with another tokenizer than
    made `data`.
    """
    there, state = read_weights(path)
    if pad and config.vocab_size == math.ceil(there.vocab_size / 64) * 64:
        there, state = resize_vocab(there, state, config.vocab_size)
    other = differences(asdict(there), config)
    require(not other, f"{path} holds another model: {', '.join(other)}; its flags: {model_flags(there, config)}")
    require_tokenizer(path, data)
    return ((name, state.pop(name).float()) for name in list(state))


def kernel_lines(device: torch.device) -> list[str]:
    """Return a line for each reason that dispatch had, with the ops that it decided."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for op, backend, reason in dispatch.decisions(device):
        grouped.setdefault((backend, reason), []).append(op)
    return [f"kernels: {backend} ({reason}) for {', '.join(ops)}" for (backend, reason), ops in grouped.items()]


def due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def diverged(config: Config, good: Path | None, report: Report | None) -> int:
    if report:
        report.close()
        report.say(
            f"stopped: loss or gradients were not finite in {config.optimizer.max_bad_steps} steps in a row; "
            + (f"the last good checkpoint is {good}" if good else "there is no checkpoint yet")
            + f"; go on with --resume and a lower --lr than {config.optimizer.lr:g}"
        )
    return EXIT_DIVERGED


@ends_on_ctrl_c()
def main(arguments: list[str] | None = None) -> int:
    """Train as the command line asks; return 0 at the end, 2 where that cannot be, EXIT_STOPPED or EXIT_DIVERGED."""
    processes = Processes.from_environment()
    try:
        config, options = parse(sys.argv[1:] if arguments is None else arguments)
        start_from = checkpoint.to_start_from(config.run_dir, options.resume)
        claim = checkpoint.claimed(config) if processes.main else nullcontext()
        with claim, Interrupt(config.run_dir if processes.main else None) as interrupt:
            if start_from and (step := checkpoint.check(start_from)["step"]) >= config.optimizer.max_steps:
                if processes.main:
                    print(
                        f"step {step} of {config.optimizer.max_steps} is done: raise --max_steps to go on", flush=True
                    )
                return 0
            if processes.main:
                checkpoint.require_space(config)
                if options.shape_from_weights:
                    print(f"shape: that of {config.init_from}; the other settings are {config.preset}'s", flush=True)
            code = loop(set_up(config, start_from, processes), interrupt)
        processes.barrier()
        return code
    except (ConfigError, DataError, WeightsError, checkpoint.CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except (torch.OutOfMemoryError, MemoryError) as error:
        what = str(error).partition("\n")[0] or "out of memory"
        print(f"error: {what}\n{LESS_MEMORY}", file=sys.stderr, flush=True)
        return 2
    finally:
        processes.close()


def leave(code: int) -> NoReturn:
    """End the program, with DeepSpeed at once.

    It keeps gloo's threads, and these now and then abort a Python that ends.
    """
    if "deepspeed" in sys.modules:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    leave(main())
