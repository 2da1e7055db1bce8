"""Measure a model's loss on a token file.

    python engine/evaluate.py --model_path runs/2b --data_file data/val/pile_dev.bin
    python engine/evaluate.py --model_path gpt2/ --data_file data/val/pile_dev.bin --tokens all --json

The model is what generate takes, and the sequences are those of training's validation, spread evenly over the file.
The standard error is over sequences. Bits a byte are those of all tokens over the bytes of their text, in which the end
of a document costs bits and has no bytes. The result goes to standard output, everything else to standard error.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import tiktoken
import torch

from engine.checkpoint import CheckpointError
from engine.command_line import CommandLine, ends_on_ctrl_c, positive
from engine.config import ConfigError, ReportConfig, require
from engine.data import Batch, DataError, TokenFile, validation_batches
from engine.device import DTYPES, choose_device, choose_dtype
from engine.formats import WeightsError
from engine.generate import model_line, note
from engine.model import GPT
from engine.tokenizer import load_encoding
from engine.weights import ACCEPTED, find_weights, load_model, require_tokenizer


@dataclass(frozen=True)
class Evaluation:
    """A loss in nats a token; standard_error: None of a single sequence; text_bytes: None where they are not known."""

    loss: float
    standard_error: float | None
    tokens: int
    sequences: int
    text_bytes: int | None
    seconds: float

    @property
    def perplexity(self) -> float:
        return torch.tensor(self.loss, dtype=torch.float64).exp().item()  # inf where math.exp raises

    @property
    def bits_per_token(self) -> float:
        return self.loss / math.log(2)

    @property
    def bits_per_byte(self) -> float | None:
        return self.bits_per_token * self.tokens / self.text_bytes if self.text_bytes else None

    def record(self) -> dict[str, Any]:
        """Return everything for JSON, which has no numbers that are not finite: None in their place."""
        derived = ("perplexity", "bits_per_token", "bits_per_byte")
        record = asdict(self) | {name: getattr(self, name) for name in derived}
        record["tokens_per_s"] = self.tokens / self.seconds
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in record.items()
        }

    def __str__(self) -> str:
        error = "" if self.standard_error is None else f" ± {self.standard_error:.4f}"
        bytes_ = "" if self.bits_per_byte is None else f"\nbits a byte: {self.bits_per_byte:.4f}"
        return (
            f"loss: {self.loss:.4f}{error} nats a token\nperplexity: {self.perplexity:.2f}\n"
            f"bits a token: {self.bits_per_token:.4f}{bytes_}"
        )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = CommandLine(__doc__)
    add = parser.add_argument
    add("--model_path", required=True, metavar="PATH", help=f"{ACCEPTED}; of a run the best checkpoint is taken")
    add("--data_file", required=True, metavar="FILE", help="prepared tokens")
    add(
        "--tokens",
        type=positive_or_all,
        default=ReportConfig().eval_tokens,
        metavar="N|all",
        help="about how many, in whole sequences [%(default)s]",
    )
    add("--block_size", type=positive, metavar="N", help="length of a sequence [the model's context]")
    add("--document_masking", action="store_true", help="attention stops at <|endoftext|>")
    add("--micro_batch_size", type=positive, default=8, metavar="N", help="sequences a forward pass [%(default)s]")
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:N [%(default)s]")
    add("--dtype", default="auto", choices=["auto", *DTYPES], help="of weights and computation [%(default)s]")
    add("--json", action="store_true", help="an object for programs instead of lines")
    return parser.parse_args(arguments)


def positive_or_all(text: str) -> int | None:
    """Return a whole number from 1 on, None for all."""
    return None if text == "all" else positive(text)


def load(options: argparse.Namespace) -> tuple[GPT, TokenFile]:
    """Return the model and the token file, which fit each other, and note what they are."""
    device, device_reason = choose_device(options.device)
    dtype, dtype_reason = choose_dtype(options.dtype, device)
    path, file = find_weights(options.model_path), TokenFile(options.data_file)
    require_tokenizer(path, file)
    model = load_model(path, device, dtype)
    context, rows = model.config.block_size, model.config.vocab_size
    length = options.block_size or context
    require(length <= context, f"--block_size {length}: {path} has a context of {context}")
    require(
        file.vocab_size <= rows,
        f"{file.path} has ids up to {file.vocab_size - 1} and {path} {rows} tokens: "
        "prepare the text with the tokenizer of its training",
    )
    file.check(rows)
    note(model_line(model, path, options.model_path))
    note(f"device: {device} ({device_reason}); dtype: {str(dtype).removeprefix('torch.')} ({dtype_reason})")
    note(f"data: {file}, of {file.tokenizer}")
    return model, file


def evaluate(model: GPT, batches: Iterable[Batch], encoding: tiktoken.Encoding | None, end_of_text: int) -> Evaluation:
    """Return the loss over the batches, whose sequences are of one length; without an encoding no bytes are known."""
    device = model.transformer["wte"].weight.device
    counts = np.zeros(model.config.vocab_size, np.int64)
    began, losses = time.perf_counter(), []
    with torch.no_grad():
        for batch in batches:
            counts += np.bincount(batch.targets.flatten().numpy(), minlength=len(counts))
            batch = (batch.pin() if device.type == "cuda" else batch).to(device)
            each = model(batch.tokens, batch.targets, doc_start=batch.doc_start, reduction="none")
            losses.append(each.view_as(batch.tokens).double().mean(1))
    of_sequences = torch.cat(losses).cpu()
    n = len(of_sequences)
    return Evaluation(
        loss=of_sequences.mean().item(),
        standard_error=of_sequences.std().item() / math.sqrt(n) if n > 1 else None,
        tokens=int(counts.sum()),
        sequences=n,
        text_bytes=None if encoding is None else text_bytes(counts, encoding, end_of_text),
        seconds=time.perf_counter() - began,
    )


def text_bytes(counts: np.ndarray, encoding: tiktoken.Encoding, end_of_text: int) -> int:
    """Return the bytes of so many tokens of each id; one that ends a document or is no token has none."""
    total = 0
    for token in np.flatnonzero(counts).tolist():
        with suppress(KeyError):
            total += int(counts[token]) * len(encoding.decode_single_token_bytes(token)) * (token != end_of_text)
    return total


def measure(options: argparse.Namespace) -> str:
    """Return what to print of the model that `--model_path` leads to on `--data_file`."""
    model, file = load(options)
    block_size = options.block_size or model.config.block_size
    batches = validation_batches(
        file,
        block_size=block_size,
        batch_size=options.micro_batch_size,
        tokens=options.tokens or len(file),
        document_masking=options.document_masking,
    )
    try:
        encoding = load_encoding(file.tokenizer)
    except ValueError as error:  # it cannot be downloaded, say
        encoding = None
        note(f"warning: without bits a byte: {error}")
    result = evaluate(model, batches, encoding, file.end_of_text)
    record = result.record() | {"block_size": block_size, "document_masking": options.document_masking}
    if options.json:
        return json.dumps(record, indent=1)
    sequences = f"{result.sequences:,} sequence{'s' * (result.sequences > 1)} of {block_size}"
    of_text = "" if result.text_bytes is None else f", {result.text_bytes:,} bytes of text"
    speed = f"{record['tokens_per_s']:,.0f} tokens/s"
    return f"{result}\nevaluated: {result.tokens:,} tokens in {sequences}{of_text}; {speed}"


@ends_on_ctrl_c()
def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        print(measure(options), flush=True)
    except (CheckpointError, ConfigError, DataError, WeightsError) as error:
        note(f"error: {error}")
        return 2
    except torch.OutOfMemoryError as error:
        what = str(error).partition("\n")[0]
        note(f"error: {what}\nfewer sequences a forward pass take less: --micro_batch_size 1")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
