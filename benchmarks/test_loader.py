"""The way of tokens from the file into a step: windows in shuffled order, against nanoGPT's and a DataLoader's."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.data import TokenFile, TrainingBatches, prefetch

TOKENS, BLOCK, SEQUENCES = 50_000_000, 1024, 64
STEPS = 8


@pytest.fixture(scope="module")
def token_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 MB of tokens, a document about every 500."""
    path = tmp_path_factory.mktemp("tokens") / "train.bin"
    generator = np.random.default_rng(0)
    tokens = generator.integers(50256, size=TOKENS, dtype=np.uint16)
    tokens[generator.integers(TOKENS, size=TOKENS // 500)] = 50256
    tokens.tofile(path)
    return path


def ours(path: Path, document_masking: bool = False) -> TrainingBatches:
    return TrainingBatches(
        TokenFile(path), block_size=BLOCK, micro_batch_size=SEQUENCES, grad_accum=1, seed=1, rank=0, world_size=1,
        document_masking=document_masking,
    )  # fmt: skip


def pilesmith(path: Path) -> Iterator[None]:
    data, step = ours(path), 0
    while True:
        data.step(step)
        step += 1
        yield


def pilesmith_documents(path: Path) -> Iterator[None]:
    data, step = ours(path, document_masking=True), 0
    while True:
        data.step(step)
        step += 1
        yield


def pilesmith_prefetch(path: Path) -> Iterator[None]:
    for _ in prefetch(ours(path).step, 0, 10**9, pin=False):
        yield


def nanogpt(path: Path) -> Iterator[None]:
    """get_batch of nanoGPT's train.py: random places with replacement, the file opened anew for each batch."""
    while True:
        data = np.memmap(path, dtype=np.uint16, mode="r")
        places = torch.randint(len(data) - BLOCK, (SEQUENCES,)).tolist()
        torch.stack([torch.from_numpy(data[i : i + BLOCK].astype(np.int64)) for i in places])
        torch.stack([torch.from_numpy(data[i + 1 : i + 1 + BLOCK].astype(np.int64)) for i in places])
        yield


class Windows(torch.utils.data.Dataset):
    def __init__(self, path: Path) -> None:
        self.tokens = np.memmap(path, dtype=np.uint16, mode="r")

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // BLOCK

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        row = torch.from_numpy(self.tokens[index * BLOCK : (index + 1) * BLOCK + 1].astype(np.int64))
        return row[:-1], row[1:]


def dataloader(path: Path) -> Iterator[None]:
    """torch's DataLoader, shuffled, in this process."""
    while True:
        for _ in torch.utils.data.DataLoader(Windows(path), SEQUENCES, shuffle=True, drop_last=True):
            yield


LOADERS = {
    "pilesmith": pilesmith,
    "pilesmith, documents apart": pilesmith_documents,
    "pilesmith, a thread ahead": pilesmith_prefetch,
    "nanogpt": nanogpt,
    "dataloader": dataloader,
}


@pytest.mark.parametrize("implementation", LOADERS)
def test_batches(measure: Callable[..., None], token_file: Path, implementation: str) -> None:
    batches = LOADERS[implementation](token_file)
    shape = {"sequences": SEQUENCES, "block_size": BLOCK}

    def run() -> None:
        for _ in range(STEPS):
            next(batches)

    try:
        measure(
            run, op="batches", step="forward", implementation=implementation, shape=shape, dtype="uint16",
            tokens=STEPS * SEQUENCES * BLOCK,
        )  # fmt: skip
    finally:
        batches.close()


def test_open(measure: Callable[..., None], token_file: Path) -> None:
    shape = {"tokens": TOKENS}
    measure(
        lambda: TokenFile(token_file).windows(BLOCK),
        op="open",
        step="forward",
        implementation="pilesmith",
        shape=shape,
        dtype="uint16",
    )
