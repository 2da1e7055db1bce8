"""Token files, windows and batches. A batch is a pure function of (seed, step, rank), so a run resumes without state.

A token file is flat little-endian uint16 (uint32 where a vocabulary needs it), `<|endoftext|>` after each document;
the JSON beside it (`X.bin.json`) says the rest. Without that JSON it is read as nanoGPT writes it: uint16, GPT-2's ids.
"""

import hashlib
import json
import math
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.config import DataConfig, ModelConfig
from engine.tokenizer import DEFAULT_TOKENIZER, END_OF_TEXT, canonical

_TEXTS = {".csv", ".gz", ".json", ".jsonl", ".md", ".parquet", ".tsv", ".txt", ".xz", ".zip", ".zst"}
_SAMPLED_WINDOWS, _SAMPLED_TOKENS = 64, 1024


class DataError(ValueError):
    """Data that cannot be used; the message says which file, what is wrong with it, and what to do."""


@dataclass(frozen=True)
class Batch:
    """tokens, targets: int64 (B, T). doc_start: int32 (B, T), the place where each token's document begins, or None."""

    tokens: Tensor
    targets: Tensor
    doc_start: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        moved = (
            None if t is None else t.to(device, non_blocking=True) for t in (self.tokens, self.targets, self.doc_start)
        )
        return Batch(*moved)

    def pin(self) -> "Batch":
        return Batch(*(None if t is None else t.pin_memory() for t in (self.tokens, self.targets, self.doc_start)))


class TokenFile:
    """A memory-mapped token file; opening takes the same time and memory whatever its size."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if path == "" or self.path.is_dir():
            raise DataError(f"{str(path)!r} is no file; give the .bin that python tools/prepare.py makes")
        if not self.path.exists():
            raise DataError(
                f"{path} is missing; make it with: python tools/prepare.py (--val_fraction 0.01 where all text is to "
                "train on), or give the path where it is"
            )
        description = self.path.with_name(self.path.name + ".json")
        self.described = description.exists()
        if not self.described and self.path.suffix in _TEXTS:
            raise self._is_text()
        try:
            about = json.loads(description.read_text()) if self.described else {}
        except ValueError as error:
            raise DataError(f"{description} is no JSON: {error}; prepare {path} again") from None
        self.tokenizer: str = canonical(about.get("tokenizer", DEFAULT_TOKENIZER))
        self.vocab_size: int = about.get("vocab_size", END_OF_TEXT + 1)
        self.end_of_text: int = about.get("end_of_text", END_OF_TEXT)
        dtype = np.dtype(about.get("dtype", "uint16")).newbyteorder("<")
        size = self.path.stat().st_size
        if size % dtype.itemsize:
            raise DataError(
                f"{path} has {size} bytes, no whole number of {dtype} tokens: it was cut off; prepare it again"
            )
        if "tokens" in about and about["tokens"] != size // dtype.itemsize:
            raise DataError(
                f"{path} holds {size // dtype.itemsize} tokens "
                f"and {description.name} says {about['tokens']}; prepare it again"
            )
        if size == 0:
            raise DataError(f"{path} is empty; prepare it again")
        self.tokens = np.memmap(self.path, dtype=dtype, mode="r")

    def __len__(self) -> int:
        return len(self.tokens)

    def __str__(self) -> str:
        assumed = (
            ""
            if self.described
            else f", read as GPT-2's ids in uint16: there is no {self.path.name}.json to say otherwise"
        )
        return f"{self.path}, {len(self):,} tokens{assumed}"

    def check(self, vocab_size: int) -> None:
        """Raise DataError where ids go beyond a model's vocabulary, by the file's JSON or a sample of its windows."""
        rows, highest = math.ceil(self.vocab_size / 64) * 64, self.vocab_size - 1
        if self.vocab_size > vocab_size:
            raise DataError(f"{self.path} has ids up to {highest}: set --vocab_size {rows}")
        sample = self._sample()
        if not self.described and b"\0" not in sample.tobytes():  # ids below 256 are among the commonest
            raise self._is_text()
        if sample.max() >= vocab_size:
            raise DataError(
                f"{self.path} has id {sample.max()} and the model {vocab_size} tokens: "
                "it is damaged, or no token file; prepare it"
            )

    @cached_property
    def fingerprint(self) -> dict[str, int | str]:
        """What tells the file from others without reading all of it."""
        return {"tokens": len(self), "sample_sha256": hashlib.sha256(self._sample().tobytes()).hexdigest()}

    def _sample(self) -> np.ndarray:
        """Return tokens of windows spread evenly over the file."""
        places = np.linspace(0, max(0, len(self) - _SAMPLED_TOKENS), _SAMPLED_WINDOWS, dtype=np.int64)
        return np.stack([self.tokens[place : place + _SAMPLED_TOKENS] for place in places.tolist()])

    def _is_text(self) -> DataError:
        return DataError(f"{self.path} is text, not tokens: prepare it first, with python tools/prepare.py")

    def windows(self, block_size: int) -> int:
        """Return how many windows of block_size tokens and the one that follows fit side by side."""
        count = (len(self.tokens) - 1) // block_size
        if count < 1:
            raise DataError(
                f"{self.path} has {len(self)} tokens, too few for one window of {block_size} and its last target"
            )
        return count

    def batch(self, windows: np.ndarray, block_size: int, document_masking: bool = False) -> Batch:
        """Return the windows with these numbers, in this order."""
        rows = np.stack([self.tokens[w * block_size : (w + 1) * block_size + 1] for w in windows.tolist()]).astype(
            np.int64
        )
        starts = torch.from_numpy(document_starts(rows[:, :-1], self.end_of_text)) if document_masking else None
        tokens = torch.from_numpy(rows)
        return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), starts)


def open_files(data: DataConfig, model: ModelConfig) -> tuple[TokenFile, TokenFile]:
    """Return the training and the validation file, whose tokens `model` has and one tokenizer made; else DataError."""
    train_file, val_file = files = TokenFile(data.train_file), TokenFile(data.val_file)
    for file in files:
        file.check(model.vocab_size)
    if val_file.tokenizer != train_file.tokenizer:
        made = f"{val_file.path} was made with {val_file.tokenizer}, {train_file.path} with {train_file.tokenizer}"
        raise DataError(f"{made}: prepare one of them again")
    return files


def document_starts(tokens: np.ndarray, end_of_text: int = END_OF_TEXT) -> np.ndarray:
    """Return int32 (B, T): for each token the position at which its document begins; end_of_text ends a document."""
    positions = np.arange(1, tokens.shape[1] + 1, dtype=np.int32)
    ends = np.where(tokens == end_of_text, positions, 0)  # where the next document would begin
    starts = np.zeros_like(ends)
    np.maximum.accumulate(ends[:, :-1], axis=1, out=starts[:, 1:])
    return starts


def permute(indices: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """Return where each of `indices` (uint64, < size) goes in a pseudo-random permutation of range(size).

    A four-round Feistel network on the smallest even number of bits that holds `size`, walked along its cycle until the
    value is in range again (Black & Rogaway, 2002): constant memory, under four walks on average, any size below 2^62.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
    keys = np.random.SeedSequence([seed, epoch]).generate_state(4, np.uint64)
    values = indices.astype(np.uint64)
    outside = np.ones(len(values), bool)
    while outside.any():
        left, right = values[outside] >> shift, values[outside] & mask
        for key in keys:
            mixed = (right ^ key) * np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(32))) & mask)
        values[outside] = (left << shift) | right
        outside = values >= np.uint64(size)
    return values.astype(np.int64)


class TrainingBatches:
    """The training order: every window once an epoch, shuffled anew each epoch, split over the processes.

    first_sequence: where step 0 begins in that order; not 0, and perhaps negative, where the earlier steps of a run had
    another number of sequences, so that its later ones neither leave out windows nor repeat them.
    """

    def __init__(
        self,
        file: TokenFile,
        *,
        block_size: int,
        micro_batch_size: int,
        grad_accum: int,
        seed: int,
        first_sequence: int = 0,
        rank: int = 0,
        world_size: int = 1,
        document_masking: bool = False,
    ) -> None:
        self.file, self.block_size, self.document_masking = file, block_size, document_masking
        self.micro_batch_size, self.grad_accum = micro_batch_size, grad_accum
        self.seed, self.first_sequence, self.rank, self.world_size = seed, first_sequence, rank, world_size
        self.windows = file.windows(block_size)
        self.sequences = micro_batch_size * grad_accum * world_size  # a step

    def window_numbers(self, step: int) -> np.ndarray:
        """Return the windows of this process for `step`, int64 (grad_accum * micro_batch_size,).

        All processes' parts laid end to end are the step's sequences, the same whatever the number of processes.
        """
        mine = self.sequences // self.world_size
        first = self.first_sequence + step * self.sequences + self.rank * mine
        places = np.arange(first, first + mine, dtype=np.int64)
        epochs = places // self.windows
        numbers = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            inside = epochs == epoch
            numbers[inside] = permute(places[inside] % self.windows, self.windows, self.seed, epoch)
        return numbers

    def step(self, step: int) -> list[Batch]:
        """Return the micro-batches of `step` for this process."""
        numbers = self.window_numbers(step).reshape(self.grad_accum, self.micro_batch_size)
        return [self.file.batch(row, self.block_size, self.document_masking) for row in numbers]

    def epoch(self, step: int) -> float:
        """Return how often the data has been gone through before `step`."""
        return (self.first_sequence + step * self.sequences) / self.windows

    def epochs_line(self, steps: int) -> str:
        """Return what to say of a run of this many steps: beyond about four epochs repeated text teaches little.

        So Muennighoff et al., Scaling Data-Constrained Language Models, 2023.
        """
        many = "; warning: after four, text teaches little more: prepare more of it, or lower --max_steps"
        return f"{steps} steps are {self.epoch(steps):.2g} epochs of it" + (many if self.epoch(steps) > 4 else "")


def validation_batches(
    file: TokenFile,
    *,
    block_size: int,
    batch_size: int,
    tokens: int,
    rank: int = 0,
    world_size: int = 1,
    document_masking: bool = False,
) -> Iterator[Batch]:
    """Return this process's part of about `tokens` tokens in windows spread evenly over the file, always the same.

    The number of windows is cut to a multiple of world_size, so every process has as many as the others. DataError at
    once where there are too few; batches are read as they are asked for.
    """
    available = file.windows(block_size)
    count = min(available, max(world_size, tokens // block_size)) // world_size * world_size
    if count == 0:
        raise DataError(
            f"{file.path} has {available} windows of {block_size} tokens, fewer than the {world_size} processes"
        )
    chosen = (np.arange(count, dtype=np.int64) * available // count)[rank::world_size]
    return (
        file.batch(chosen[i : i + batch_size], block_size, document_masking) for i in range(0, len(chosen), batch_size)
    )


def prefetch(
    produce: Callable[[int], list[Batch]], first: int, last: int, *, pin: bool, depth: int = 2
) -> Iterator[list[Batch]]:
    """Yield produce(first) ... produce(last - 1), made ahead by a thread that keeps `depth` of them ready.

    What `produce` raises is raised here. Closing the generator, or the program's end, ends the thread.
    """
    ready: queue.Queue = queue.Queue(maxsize=depth)
    stop = threading.Event()
    program = threading.main_thread()

    def put(item: object) -> bool:
        while not stop.is_set() and program.is_alive():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for step in range(first, last):
                batches = produce(step)
                if not put([batch.pin() for batch in batches] if pin else batches):
                    return
        except BaseException as error:
            put(error)

    # Not a daemon: Python kills those as a program ends, and with PyTorch loaded that often aborts it.
    thread = threading.Thread(target=work, name="prefetch")
    thread.start()
    try:
        for _ in range(first, last):
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()
