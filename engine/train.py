"""Train a GPT.

    python engine/train.py --preset 13m                          # on the embedded default text, on any machine
    python engine/train.py --preset gpt2 --train_file data/train/pile_train.bin --val_file data/val/pile_dev.bin
    deepspeed engine/train.py --preset 2b                        # the same program under DeepSpeed's launcher
    python engine/train.py --preset 13m --resume                 # go on where the run stopped
    python engine/train.py --preset 13m --resume auto            # the same, or begin: for scripts that restart

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

import tiktoken
import torch
from torch import Tensor

from engine import checkpoint
from engine.cards import peak_flops
from engine.command_line import parse
from engine.config import Config, ConfigError, DataConfig, ModelConfig, differences, load_file, require
from engine.data import Batch, DataError, TokenFile, TrainingBatches, open_files, prefetch, validation_batches
from engine.device import choose_device, choose_dtype, peak_memory
from engine.distributed import Processes
from engine.formats import WeightsError
from engine.held_memory import by_part, gradient_bytes
from engine.memory import Plan
from engine.model import GPT, flops_per_token
from engine.placement import explain, settle
from engine.report import Report, human
from engine.sampling import sample_text
from engine.schedule import learning_rate, new_length
from engine.strategy import Strategy, build
from engine.tokenizer import load_encoding
from engine.weights import read_weights, recorded_tokenizer
from kernels import dispatch

EMBEDDED_DATA = Path("data/embedded")
EXIT_DIVERGED = 3
LESS_MEMORY = """\
The planner counts what other programs held of the card when the run began. To leave more of it: --micro_batch_size 1,
--activation_checkpointing blocks or --offload states; more of the host: a smaller \
--host_memory. tools/plan.py shows what
each takes; --resume goes on from the newest checkpoint."""


class Interrupt:
    """Within it SIGINT and SIGTERM ask for a stop after the current step, which `says` says; a second stops at once."""

    def __init__(self, says: bool = True) -> None:
        self._says = says

    def __enter__(self) -> "Interrupt":
        self.asked = False
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        self.asked = True
        signal.signal(number, signal.SIG_DFL)
        if self._says:
            with suppress(OSError):  # print() may be what was interrupted
                os.write(2, b"\nstopping after this step; Ctrl-C again stops at once, without saving\n")


@dataclass
class Run:
    """What a training run consists of; `config` is `asked` with every open choice made, on a card by `plan`.

    `report` is the main process's only.
    """

    config: Config
    asked: Config
    processes: Processes
    device: torch.device
    strategy: Strategy
    data: TrainingBatches
    validation: list[Batch]
    encoding: tiktoken.Encoding
    progress: dict[str, Any]
    report: Report | None
    plan: Plan | None


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
            if code := subprocess.run([sys.executable, "-m", *command]).returncode:
                why = (
                    "was interrupted"
                    if code in (-signal.SIGINT, 128 + signal.SIGINT)
                    else "failed; its message is above"
                )
                raise DataError(f"python -m {' '.join(command)} {why}")
    processes.barrier()


def set_up(config: Config, start_from: Path | None, processes: Processes) -> Run:
    """Build everything that `config` describes, with the states of the checkpoint to start from where there is one."""
    device, device_reason = choose_device(config.strategy.device, processes.local_rank)
    if processes.world_size > 1:
        processes.connect(device)
    dispatch.set_backend(config.strategy.kernels)
    dtype, dtype_reason = choose_dtype(config.strategy.dtype, device)
    asked = config  # saved as it is: a run may be resumed elsewhere, where other choices are better
    config, grad_accum, chosen = settle(asked, device, dtype, processes.world_size)
    prepare_default_data(asked, processes)
    config.data = asked.data
    train_file, val_file = open_files(config.data, config.model)
    micro_batch_size = config.optimizer.micro_batch_size
    common = {"block_size": config.model.block_size, "document_masking": config.data.document_masking}
    common |= {"rank": processes.rank, "world_size": processes.world_size}
    data = TrainingBatches(
        train_file, micro_batch_size=micro_batch_size, grad_accum=grad_accum, seed=config.seed, **common
    )
    validation = validation_batches(val_file, batch_size=micro_batch_size, tokens=config.report.eval_tokens, **common)
    if device.type == "cuda":
        validation = [batch.pin() for batch in validation]

    model = GPT.outline(config.model)
    n_parameters = model.num_parameters()
    if elsewhere := start_from or config.init_from:
        weights = weights_from(elsewhere, config.model, train_file)
    else:
        weights = model.initial_weights(torch.Generator().manual_seed(config.seed))
    strategy = build(config, model, processes, device, dtype, grad_accum, weights)
    progress: dict[str, Any] = {"step": 0, "tokens": 0, "val_loss": None, "bad_steps": 0}
    if start_from:
        saved = checkpoint.load(start_from, config, strategy)
        progress = {key: saved[key] for key in progress}
    progress["tokenizer"] = train_file.tokenizer

    report = None
    if processes.main:
        flops = flops_per_token(config.model, n_parameters)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        report = Report(config, progress["step"], flops, peak_flops(name, dtype))
        asked.save(Path(config.run_dir) / "config.json")
        config.save(Path(config.run_dir) / "resolved.json")
        report.say(f"{config.preset}: {n_parameters:,} parameters, {flops / 1e6:.1f} MFLOPs a token")
        report.say(f"device: {device} ({device_reason}); dtype: {str(dtype).removeprefix('torch.')} ({dtype_reason})")
        for line in kernel_lines(device):
            report.say(line)
        for line in explain(chosen) if chosen else ():
            report.say(line)
        if (warmup := config.optimizer.warmup_steps) != asked.optimizer.warmup_steps:
            report.say(
                f"schedule: a warm-up of {asked.optimizer.warmup_steps} steps is too long "
                f"for {config.optimizer.max_steps}: shortened to {warmup}"
            )
        report.say(f"strategy: {strategy.describe()}")
        report.say(
            f"data: {train_file}; a step is {human(config.optimizer.batch_tokens)} tokens: "
            f"{processes.world_size} x {grad_accum} x {micro_batch_size} sequences of {config.model.block_size}"
        )
        report.say(f"data: {data.epochs_line(config.optimizer.max_steps)}")
        report.say(f"validation: {val_file}")
        if start_from:
            report.say(f"resumed from {start_from} at step {progress['step']}")
            for line in new_length(load_file(start_from / "config.json")["optimizer"]["max_steps"], config.optimizer):
                report.say(line)
    encoding = load_encoding(train_file.tokenizer)
    return Run(config, asked, processes, device, strategy, data, validation, encoding, progress, report, chosen)


def loop(run: Run, interrupt: Interrupt) -> int:
    """Train until max_steps, a signal, or too many steps in a row that were not finite; return the exit code."""
    config, strategy, progress, report = run.config, run.strategy, run.progress, run.report
    options = config.optimizer
    saved, first = checkpoint.newest(config.run_dir), progress["step"] + 1
    steps = prefetch(run.data.step, progress["step"], options.max_steps, pin=run.device.type == "cuda")
    for batches in steps:
        began = time.perf_counter()
        lr = learning_rate(progress["step"], options)
        strategy.set_lr(lr)
        loss = strategy.forward_backward(batches)
        asked = torch.full((), float(interrupt.asked), device=run.device)  # torch.tensor would wait for the device
        loss, asked = run.processes.mean(torch.stack([loss, asked]))  # all stop if one was asked to
        step = progress["step"] + 1
        gradients = gradient_bytes(strategy.parameters.values(), run.device) if step == first else 0
        result = strategy.step(loss)

        bad_steps = progress["bad_steps"] + (not result.rescaled) if result.skipped else 0
        progress |= {
            "step": step,
            "tokens": progress["tokens"] + options.batch_tokens,
            "bad_steps": bad_steps,
            "val_loss": None,
        }
        stop, last = bool(asked > 0), step == options.max_steps
        if report:
            report.step(
                step, loss=loss.item(), lr=lr, grad_norm=result.grad_norm, skipped=result.skipped,
                step_s=time.perf_counter() - began, tokens=progress["tokens"], memory_bytes=peak_memory(run.device),
            )  # fmt: skip
        if report and step == first:
            report.memory(by_part(strategy.parameters.values(), run.device, gradients))
        if bad_steps == options.max_bad_steps:
            return diverged(config, report)
        validating, saving = due(step, config.report.eval_interval), due(step, config.report.save_interval)
        if validating or last:
            validate(run)
        if saving or last or stop:
            saved = save(run, final=last or stop)
        if report and (validating or saving):
            report.resume_clock()
        if stop and not last:
            if report:
                report.say(f"stopped by signal after step {step}; go on with --resume")
            break
    steps.close()
    if report:
        report.close()
        if run.plan:
            predicted, measured = run.plan.footprint.allocated_bytes, peak_memory(run.device)
            report.say(
                f"memory: predicted {predicted / 2**30:.2f} GiB, "
                f"measured {measured / 2**30:.2f} GiB ({measured / predicted - 1:+.1%})"
            )
        report.say(f"run: {config.run_dir}; newest checkpoint: {saved}")
    return 0


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
    run.progress["val_loss"] = loss / count
    sample = None
    # In every process, since ZeRO gathers parameters as they are used.
    if options.sample_tokens and math.isfinite(run.progress["val_loss"]):
        eager = getattr(module, "_orig_mod", module)  # a compiled model would compile again for each length
        sample = sample_text(eager, run.encoding, options.sample_prompt, options.sample_tokens, seed=run.config.seed)
    if run.report:
        run.report.validation(run.progress["step"], run.progress["val_loss"], sample)


def save(run: Run, final: bool) -> Path | None:
    """Write a checkpoint and return it; a full disk ends the run only where there is no later chance to save."""
    try:
        return checkpoint.save(run.asked, run.strategy, run.processes, run.progress)
    except checkpoint.CheckpointError as error:
        if final:
            raise
        if run.report:
            run.report.say(f"warning: {error}; training goes on")
        return checkpoint.newest(run.config.run_dir)


def weights_from(path: str | Path, config: ModelConfig, data: TokenFile) -> Iterator[tuple[str, Tensor]]:
    """Return the names and fp32 weights of any file that generate reads: a run, checkpoint, GPT-2 folder, classic .pt.

    ConfigError where they belong to another model than `config` describes, or were trained with another tokenizer than
    made `data`.
    """
    there, state = read_weights(path)
    other = differences(asdict(there), config)
    require(not other, f"{path} holds another model: {', '.join(other)}")
    tokenizer = recorded_tokenizer(path) or data.tokenizer
    require(
        tokenizer == data.tokenizer,
        f"{path} was trained on tokens of {tokenizer}, and {data.path} has those of {data.tokenizer}: "
        f"prepare the text with --tokenizer_name {tokenizer}",
    )
    return ((name, state.pop(name).float()) for name in list(state))


def kernel_lines(device: torch.device) -> list[str]:
    """Return a line for each reason that dispatch had, with the ops that it decided."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for op, backend, reason in dispatch.decisions(device):
        grouped.setdefault((backend, reason), []).append(op)
    return [f"kernels: {backend} ({reason}) for {', '.join(ops)}" for (backend, reason), ops in grouped.items()]


def due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def diverged(config: Config, report: Report | None) -> int:
    if report:
        good = checkpoint.newest(config.run_dir)
        report.close()
        report.say(
            f"stopped: loss or gradients were not finite in {config.optimizer.max_bad_steps} steps in a row; "
            + (f"the last good checkpoint is {good}" if good else "there is no checkpoint yet")
            + f"; go on with --resume and a lower --lr than {config.optimizer.lr:g}"
        )
    return EXIT_DIVERGED


def main(arguments: list[str] | None = None) -> int:
    processes = Processes.from_environment()
    try:
        config, options = parse(sys.argv[1:] if arguments is None else arguments)
        start_from = checkpoint.to_start_from(config.run_dir, options.resume)
        claim = checkpoint.claimed(config) if processes.main else nullcontext()
        with Interrupt(says=processes.main) as interrupt, claim:
            if start_from and (step := checkpoint.check(start_from)["step"]) >= config.optimizer.max_steps:
                if processes.main:
                    print(
                        f"step {step} of {config.optimizer.max_steps} is done: raise --max_steps to go on", flush=True
                    )
                return 0
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
