"""Train a GPT.

    python engine/train.py --preset 13m                          # on the embedded default text, on any machine
    python engine/train.py --preset gpt2 --train_file data/train/pile_train.bin --val_file data/val/pile_dev.bin
    deepspeed engine/train.py --preset 2b                        # the same program under DeepSpeed's launcher
    python engine/train.py --preset 13m --resume                 # go on where the run stopped

Every field of engine/config.py is a flag; `--help` lists them.
"""
import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from engine import checkpoint
from engine.cards import peak_flops
from engine.config import Config, ConfigError, DataConfig, parse, require
from engine.data import Batch, DataError, TokenFile, TrainingBatches, prefetch, validation_batches
from engine.device import choose_device, choose_dtype, peak_memory
from engine.distributed import Processes
from engine.sampling import sample_text
from engine.model import GPT, flops_per_token
from engine.report import Report, human
from engine.schedule import learning_rate
from engine.strategy import Strategy, build
from engine.tokenizer import load_encoding
from kernels import dispatch

EMBEDDED_DATA = Path("data/embedded")
CPU_MICRO_BATCH_TOKENS = 8192  # beyond this a CPU gains nothing and the activations leave its caches
EXIT_DIVERGED = 3


class Interrupt:
    """SIGINT and SIGTERM ask for a stop after the step under way; a second one stops at once."""

    def __init__(self) -> None:
        self.signal = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_DFL)
        self.signal = number


def derive_batch(config: Config, world_size: int, device: torch.device) -> tuple[int, int]:
    """Return (micro_batch_size, grad_accum) in sequences for one process; ConfigError where they do not come out even."""
    sequences = config.optimizer.batch_tokens // config.model.block_size
    require(
        sequences % world_size == 0,
        f"batch_tokens ({config.optimizer.batch_tokens}) is {sequences} sequences, which {world_size} processes cannot share evenly",
    )
    mine, micro = sequences // world_size, config.optimizer.micro_batch_size
    if micro:
        require(mine % micro == 0, f"micro_batch_size ({micro}) must divide the {mine} sequences of a process and step")
    else:
        fits = max(1, CPU_MICRO_BATCH_TOKENS // config.model.block_size)
        micro = max(size for size in range(1, min(mine, fits) + 1) if mine % size == 0)
    return micro, mine // micro


def prepare_default_data(config: Config, processes: Processes) -> None:
    """Point a run without prepared data at the embedded default: this Python's own documentation, made on the spot."""
    files = config.data.train_file, config.data.val_file
    if any(Path(file).exists() for file in files) or files != (DataConfig().train_file, DataConfig().val_file):
        return
    config.data.train_file, config.data.val_file = str(EMBEDDED_DATA / "train.bin"), str(EMBEDDED_DATA / "val.bin")
    if processes.main and not all(Path(file).exists() for file in (config.data.train_file, config.data.val_file)):
        print(f"no prepared data at {files[0]}: building the embedded default, this Python's own text, in {EMBEDDED_DATA}", flush=True)
        folders = ["--train_dir", str(EMBEDDED_DATA / "train"), "--val_dir", str(EMBEDDED_DATA / "val")]
        outputs = ["--out_train_file", config.data.train_file, "--out_val_file", config.data.val_file]
        for command in (["tools.download", "--source", "stdlib", *folders], ["tools.prepare", *folders, *outputs]):
            if subprocess.run([sys.executable, "-m", *command]).returncode:
                raise DataError(f"python -m {' '.join(command)} failed; its message is above")
    processes.barrier()


@torch.no_grad()
def validate(strategy: Strategy, batches: list[Batch], processes: Processes, device: torch.device) -> float:
    """Return the mean loss over every process's validation batches."""
    strategy.module.eval()
    total = torch.zeros(2, device=device)  # loss times tokens, tokens
    for batch in batches:
        batch = batch.to(device)
        loss = strategy.module(batch.tokens, batch.targets, doc_start=batch.doc_start)
        total += torch.stack([loss.float() * batch.tokens.numel(), torch.tensor(float(batch.tokens.numel()), device=device)])
    strategy.module.train()
    loss, count = processes.mean(total).tolist()
    return loss / count


def train(config: Config, resume: str | None, processes: Processes) -> int:
    """Run the training that `config` describes and return the exit code; `resume` is None, "latest" or a checkpoint."""
    interrupt = Interrupt()
    device, device_reason = choose_device(config.strategy.device, processes.local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if processes.world_size > 1:
        processes.connect(device)
    dispatch.set_backend(config.strategy.kernels)
    dtype, dtype_reason = choose_dtype(config.strategy.dtype, device)
    start_from = find_checkpoint(config, resume)
    prepare_default_data(config, processes)
    train_file, val_file = TokenFile(config.data.train_file), TokenFile(config.data.val_file)
    for file in (train_file, val_file):
        require(file.vocab_size <= config.model.vocab_size, f"{file.path} has ids up to {file.vocab_size - 1}: set --vocab_size {math.ceil(file.vocab_size / 64) * 64}")
    micro_batch_size, grad_accum = derive_batch(config, processes.world_size, device)
    common = dict(block_size=config.model.block_size, rank=processes.rank, world_size=processes.world_size, document_masking=config.data.document_masking)
    data = TrainingBatches(train_file, micro_batch_size=micro_batch_size, grad_accum=grad_accum, seed=config.seed, **common)
    validation = validation_batches(val_file, batch_size=micro_batch_size, tokens=config.report.eval_tokens, **common)

    model = GPT(config.model)
    model.init_weights(torch.Generator().manual_seed(config.seed))
    n_parameters = model.num_parameters()
    strategy = build(config, model, processes, device, dtype, grad_accum)
    progress: dict[str, Any] = {"step": 0, "tokens": 0, "val_loss": None, "bad_steps": 0}
    if start_from:
        progress |= {key: value for key, value in checkpoint.load(start_from, config, strategy).items() if key in progress}

    flops = flops_per_token(config.model, n_parameters)
    report = None
    if processes.main:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        report = Report(config, progress["step"], flops, peak_flops(name, dtype))
        config.save(Path(config.run_dir) / "config.json")
        report.say(f"{config.preset}: {n_parameters:,} parameters, {flops / 1e6:.1f} MFLOPs a token")
        report.say(f"device: {device} ({device_reason}); dtype: {str(dtype).removeprefix('torch.')} ({dtype_reason})")
        for line in kernel_lines(device):
            report.say(line)
        report.say(f"strategy: {strategy.describe()}")
        report.say(
            f"data: {train_file.path}, {human(len(train_file))} tokens; a step is {human(config.optimizer.batch_tokens)} tokens: "
            f"{processes.world_size} x {grad_accum} x {micro_batch_size} sequences of {config.model.block_size}"
        )
        if start_from:
            report.say(f"resumed from {start_from} at step {progress['step']}")
    encoding = load_encoding(train_file.tokenizer)

    steps = prefetch(data.step, progress["step"], config.optimizer.max_steps, pin=device.type == "cuda")
    saved = start_from if start_from and checkpoint.read_state(start_from)["step"] == progress["step"] else None
    if report:
        report.resume_clock()
    for batches in steps:
        began = time.perf_counter()
        lr = learning_rate(progress["step"], config.optimizer)
        loss = strategy.forward_backward(batches)
        loss, asked = processes.mean(torch.stack([loss, torch.tensor(float(interrupt.signal != 0), device=device)]))
        result = strategy.step(lr, loss)
        progress["step"] += 1
        progress["tokens"] += config.optimizer.batch_tokens
        progress["val_loss"] = None
        progress["bad_steps"] = progress["bad_steps"] + 1 if result.skipped else 0
        step, stop = progress["step"], bool(asked > 0)
        if report:
            report.step(
                step, loss=loss.item(), lr=lr, grad_norm=result.grad_norm, skipped=result.skipped,
                step_s=time.perf_counter() - began, tokens=progress["tokens"], memory_bytes=peak_memory(device),
            )  # fmt: skip
        if progress["bad_steps"] == config.optimizer.max_bad_steps:
            return diverged(config, report)
        last = step == config.optimizer.max_steps
        if last or due(step, config.report.eval_interval):
            progress["val_loss"] = validate(strategy, validation, processes, device)
            sample = None
            if config.report.sample_tokens:  # every process, since ZeRO gathers parameters as they are used
                sample = sample_text(strategy.module, encoding, config.report.sample_prompt, config.report.sample_tokens, seed=config.seed)
            if report:
                report.validation(step, progress["val_loss"], sample)
        if last or stop or due(step, config.report.save_interval):
            saved = save(config, strategy, processes, progress, report, final=last or stop)
        if report and (due(step, config.report.eval_interval) or due(step, config.report.save_interval)):
            report.resume_clock()
        if stop and not last:
            if report:
                report.say(f"stopped by signal after step {step}; checkpoint: {saved}; go on with --resume")
            break
    steps.close()
    if report:
        report.close()
        report.say(f"run: {config.run_dir}; newest checkpoint: {saved}")
    return 0


def kernel_lines(device: torch.device) -> list[str]:
    """Return a line for each reason that dispatch had, with the ops that it decided."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for op, backend, reason in dispatch.decisions(device):
        grouped.setdefault((backend, reason), []).append(op)
    return [f"kernels: {backend} ({reason}) for {', '.join(ops)}" for (backend, reason), ops in grouped.items()]


def due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def save(config: Config, strategy: Strategy, processes: Processes, progress: dict[str, Any], report: Report | None, final: bool) -> Path | None:
    """Write a checkpoint; a full disk ends the run only where there is no later chance to save."""
    try:
        return checkpoint.save(config, strategy, processes, progress, config.report.keep_checkpoints)
    except checkpoint.CheckpointError as error:
        if final:
            raise
        if report:
            report.say(f"warning: {error}; training goes on")
        return checkpoint.newest(config.run_dir)


def find_checkpoint(config: Config, resume: str | None) -> Path | None:
    """Return the checkpoint to start from; a folder that holds a run is not overwritten without --resume."""
    newest = checkpoint.newest(config.run_dir)
    if resume is None:
        require(newest is None, f"{config.run_dir} already holds a run: --resume goes on with it, --run_dir NAME starts another")
        return None
    return newest if resume == "latest" else Path(resume)


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
        return train(config, options.resume, processes)
    except (ConfigError, DataError, checkpoint.CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    finally:
        processes.close()


if __name__ == "__main__":
    sys.exit(main())
