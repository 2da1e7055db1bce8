"""Token files, their order and their batches: nothing lost or twice, whatever the size and number of processes."""

import json
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data import (
    Batch,
    DataError,
    TokenFile,
    TrainingBatches,
    document_starts,
    permute,
    prefetch,
    validation_batches,
)

END = 50256


def write(path, tokens, dtype="<u2", /, **about) -> TokenFile:
    np.asarray(tokens).astype(dtype).tofile(path)
    if about:
        path.with_name(path.name + ".json").write_text(json.dumps({"format": 1, "dtype": np.dtype(dtype).name} | about))
    return TokenFile(path)


# Files


def test_a_file_of_nanogpt_is_read_as_it_is(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 50257, 1000)
    file = write(tmp_path / "train.bin", tokens)
    assert (file.tokenizer, file.vocab_size, file.end_of_text) == ("r50k_base", 50257, END)
    assert len(file) == 1000 and (np.asarray(file.tokens) == tokens).all()


def test_files_are_told_apart_by_a_part_of_their_tokens(tmp_path):
    tokens = np.arange(100_000) % 50_000
    first = write(tmp_path / "a.bin", tokens).fingerprint
    assert write(tmp_path / "b.bin", tokens).fingerprint == first and first["tokens"] == 100_000
    tokens[50:] = np.arange(100_000 - 50) % 50_000  # a document more at the beginning
    assert write(tmp_path / "c.bin", tokens).fingerprint["sample_sha256"] != first["sample_sha256"]
    assert write(tmp_path / "d.bin", [1, 2]).fingerprint != write(tmp_path / "e.bin", [1, 3]).fingerprint


def test_the_description_beside_it_is_followed(tmp_path):
    tokens = [5, 100_257, 70_000, 100_257, 1]
    about = dict(tokenizer="cl100k_base", vocab_size=100_277, end_of_text=100_257, tokens=5)
    file = write(tmp_path / "x.bin", tokens, "<u4", **about)
    assert (file.tokenizer, file.vocab_size) == ("cl100k_base", 100_277)
    batch = file.batch(np.array([0]), 4, document_masking=True)
    assert batch.tokens.tolist() == [tokens[:4]] and batch.targets.tolist() == [tokens[1:]]
    assert batch.doc_start.tolist() == [[0, 0, 2, 2]]


def test_files_that_cannot_be_used_say_why(tmp_path):
    with pytest.raises(
        DataError, match=r"x.bin is missing; make it with: .* \(--val_fraction 0.01 .*, or give the path where it is"
    ):
        TokenFile(tmp_path / "x.bin")
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(DataError, match="x.bin is empty"):
        TokenFile(tmp_path / "x.bin")
    (tmp_path / "x.bin").write_bytes(b"123")
    with pytest.raises(DataError, match="3 bytes, no whole number of .*uint16 tokens: it was cut off"):
        TokenFile(tmp_path / "x.bin")
    with pytest.raises(DataError, match="holds 10 tokens and x.bin.json says 12"):
        write(tmp_path / "x.bin", range(10), tokens=12)
    (tmp_path / "x.bin.json").write_text("{")
    with pytest.raises(DataError, match="x.bin.json is no JSON"):
        TokenFile(tmp_path / "x.bin")
    with pytest.raises(DataError, match="has 10 tokens, too few for one window of 10 and its last target"):
        write(tmp_path / "y.bin", range(10)).windows(10)


@pytest.mark.parametrize("name", ["x.jsonl", "x.txt", "x.jsonl.zst", "x.json", "x.parquet"])
def test_text_is_not_read_as_tokens(tmp_path, name):
    (tmp_path / name).write_bytes(b"text")
    with pytest.raises(DataError, match=f"{name} is text, not tokens: prepare it first"):
        TokenFile(tmp_path / name)


def test_what_is_no_token_file_is_found_in_a_sample(tmp_path):
    random = np.random.default_rng(0)
    (tmp_path / "text.bin").write_bytes(b"It was a dark and stormy night.\n" * 1000)
    with pytest.raises(DataError, match="text.bin is text, not tokens"):
        TokenFile(tmp_path / "text.bin").check(50304)
    (tmp_path / "noise.bin").write_bytes(random.bytes(100_000))
    with pytest.raises(DataError, match=r"noise.bin has id 65\d+ and the model 50304 tokens"):
        TokenFile(tmp_path / "noise.bin").check(50304)
    for length in (2, 1500, 300_000):
        write(tmp_path / "tokens.bin", random.integers(0, 50257, length) // 200).check(50304)
    write(tmp_path / "letters.bin", np.full(500, 0x6161), tokens=500).check(50304)  # what its JSON says goes


def test_a_run_of_more_than_four_epochs_is_warned_of(tmp_path):
    batches = TrainingBatches(
        write(tmp_path / "x.bin", range(101)), block_size=10, micro_batch_size=1, grad_accum=1, seed=1
    )
    assert batches.epochs_line(40) == "40 steps are 4 epochs of it"
    assert batches.epochs_line(41).startswith("41 steps are 4.1 epochs of it; warning: after four")


def test_windows_are_side_by_side_and_the_last_has_its_target(tmp_path):
    for length, count in ((9, 2), (12, 2), (13, 3)):
        file = write(tmp_path / f"{length}.bin", range(length))
        assert file.windows(4) == count
        batch = file.batch(np.array([count - 1, 0]), 4)
        last = 4 * (count - 1)
        assert batch.tokens.tolist() == [list(range(last, last + 4)), [0, 1, 2, 3]]
        assert batch.targets.tolist() == [list(range(last + 1, last + 5)), [1, 2, 3, 4]]
        assert batch.tokens.dtype == batch.targets.dtype == torch.int64 and batch.doc_start is None


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="needs sparse files")
def test_a_file_of_five_billion_tokens_opens_at_once_and_reads_right(tmp_path):
    tokens, block = 5 * 2**30, 1024
    path = tmp_path / "huge.bin"
    places = {0: 11, 2**31 + 7: 22, 2**32 + 1025: 33, tokens - block - 2: 44}
    with open(path, "wb") as file:
        file.truncate(2 * tokens)  # sparse: no disk is used
        for place, value in places.items():
            file.seek(2 * place)
            file.write(np.uint16(value).tobytes())
    began = time.process_time()
    file = TokenFile(path)
    batches = TrainingBatches(file, block_size=block, micro_batch_size=8, grad_accum=1, seed=1)
    numbers = batches.window_numbers(10**6)
    batches.step(10**6)
    assert time.process_time() - began < 2  # generous: it takes milliseconds
    assert len(file) == tokens and batches.windows == (tokens - 1) // block
    assert (numbers >= 0).all() and (numbers < batches.windows).all()
    for place, value in places.items():
        batch = file.batch(np.array([place // block]), block)
        assert batch.tokens.nonzero().tolist() == [[0, place % block]] and batch.tokens.max() == value


# Documents


def slow_document_starts(row: list[int], end: int) -> list[int]:
    starts, begin = [], 0
    for place, token in enumerate(row):
        starts.append(begin)
        if token == end:
            begin = place + 1
    return starts


@settings(deadline=None, derandomize=True)
@given(st.lists(st.lists(st.integers(0, 3), min_size=9, max_size=9), min_size=1, max_size=4), st.integers(0, 3))
def test_document_starts_against_the_slow_way(rows, end):
    starts = document_starts(np.array(rows), end)
    assert starts.dtype == np.int32 and starts.tolist() == [slow_document_starts(row, end) for row in rows]


# Order


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.integers(1, 5000), st.integers(0, 2**40), st.integers(0, 1000))
def test_the_order_is_a_permutation(size, seed, epoch):
    assert sorted(permute(np.arange(size), size, seed, epoch)) == list(range(size))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 15, 16, 17, 255, 256, 257, 65_535, 65_536, 65_537, 300_001])
def test_the_order_is_a_permutation_around_powers_of_two(size):
    order = permute(np.arange(size), size, 1337, 2)
    assert (np.bincount(order, minlength=size) == 1).all()


@pytest.mark.parametrize("size", [2**32 - 1, 2**32 + 1, 10**12, 2**61 + 12_345])
def test_the_order_of_sizes_no_memory_could_hold(size):
    some = np.unique(np.random.default_rng(0).integers(0, size, 20_000))
    order = permute(some, size, 3, 0)
    assert len(np.unique(order)) == len(some) and order.min() >= 0 and order.max() < size
    assert np.corrcoef(some, order)[0, 1] == pytest.approx(0, abs=0.03)
    assert order.mean() / size == pytest.approx(0.5, abs=0.02)


def test_the_order_looks_random():
    size = 10_007
    order = permute(np.arange(size), size, 5, 0)
    assert abs(np.corrcoef(np.arange(size), order)[0, 1]) < 0.04
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.04
    assert (np.abs(np.diff(order)) == 1).mean() < 0.002  # neighbours stay neighbours by chance alone
    assert 0 <= (order == np.arange(size)).sum() < 8
    others = [permute(np.arange(size), size, seed, epoch) for seed, epoch in ((5, 1), (6, 0))]
    assert all((other == order).mean() < 0.002 for other in others)


def order_of(file, steps, **changes) -> list[list[int]]:
    options = dict(block_size=4, micro_batch_size=3, grad_accum=2, seed=11) | changes
    batches = TrainingBatches(file, **options)
    return [batches.window_numbers(step).tolist() for step in steps]


def test_every_window_comes_once_an_epoch(tmp_path):
    file = write(tmp_path / "x.bin", range(4 * 35 + 3))  # 35 windows, 6 a step: epochs end within steps
    stream = sum(order_of(file, range(35)), [])  # six epochs
    epochs = [stream[i : i + 35] for i in range(0, len(stream), 35)]
    assert len(epochs) == 6 and all(sorted(epoch) == list(range(35)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    batches = TrainingBatches(file, block_size=4, micro_batch_size=3, grad_accum=2, seed=11)
    assert batches.epoch(35) == 6.0


@pytest.mark.parametrize("before, after", [(3, 5), (5, 2)])
def test_another_batch_goes_on_where_the_last_one_ended(tmp_path, before, after):
    file = write(tmp_path / "x.bin", range(4 * 100 + 3))  # 100 windows
    first = order_of(file, range(10), micro_batch_size=before, grad_accum=1)
    offset = 10 * before - 10 * after
    rest = order_of(file, range(10, 60), micro_batch_size=after, grad_accum=1, first_sequence=offset)
    assert sorted(sum(first + rest, [])[:100]) == list(range(100))
    batches = TrainingBatches(file, block_size=4, micro_batch_size=after, grad_accum=1, seed=1, first_sequence=offset)
    assert batches.epoch(10) == before / 10


def test_a_batch_depends_on_seed_and_step_alone(tmp_path):
    file = write(tmp_path / "x.bin", range(4 * 1000 + 1))
    straight = order_of(file, range(200))
    assert order_of(TokenFile(file.path), [150, 3, 199]) == [straight[150], straight[3], straight[199]]
    assert order_of(file, [0], seed=12) != [straight[0]]


@pytest.mark.parametrize(
    "world_size, micro, accum", [(1, 12, 1), (1, 3, 4), (2, 3, 2), (2, 6, 1), (3, 2, 2), (4, 3, 1), (12, 1, 1)]
)
def test_a_step_is_the_same_set_whatever_the_number_of_processes(tmp_path, world_size, micro, accum):
    file = write(tmp_path / "x.bin", range(4 * 100 + 1))
    alone = order_of(file, range(20), micro_batch_size=12, grad_accum=1)
    options = dict(micro_batch_size=micro, grad_accum=accum, world_size=world_size)
    parts = [order_of(file, range(20), rank=rank, **options) for rank in range(world_size)]
    assert [sum(step, []) for step in zip(*parts)] == alone


def test_a_step_is_its_micro_batches(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 50, 4 * 100 + 1)
    file = write(tmp_path / "x.bin", tokens, vocab_size=50, end_of_text=7)
    batches = TrainingBatches(file, block_size=4, micro_batch_size=3, grad_accum=2, seed=1, document_masking=True)
    rows = iter(batches.window_numbers(5).tolist())
    step = batches.step(5)
    assert len(step) == 2
    for batch in step:
        assert batch.tokens.shape == batch.targets.shape == batch.doc_start.shape == (3, 4)
        for row, targets, starts in zip(batch.tokens, batch.targets, batch.doc_start):
            place = 4 * next(rows)
            assert row.tolist() == tokens[place : place + 4].tolist()
            assert targets.tolist() == tokens[place + 1 : place + 5].tolist()
            assert starts.tolist() == slow_document_starts(row.tolist(), 7)


# Validation


def test_validation_is_the_same_windows_spread_over_the_file(tmp_path):
    file = write(tmp_path / "x.bin", range(4 * 1000 + 1))

    def windows(**options):
        batches = list(validation_batches(file, block_size=4, batch_size=16, tokens=400, **options))
        assert all(batch.tokens.shape[0] <= 16 for batch in batches)
        return [int(row[0]) // 4 for batch in batches for row in batch.tokens]

    alone = windows()
    assert alone == list(range(0, 1000, 10)) == windows()
    shared = [windows(rank=rank, world_size=3) for rank in range(3)]
    assert {len(part) for part in shared} == {33} and len(set(sum(shared, []))) == 99


def test_validation_takes_no_window_twice_from_a_short_file(tmp_path):
    file = write(tmp_path / "x.bin", range(4 * 7 + 1))
    batches = list(validation_batches(file, block_size=4, batch_size=3, tokens=10**6))
    assert [len(batch.tokens) for batch in batches] == [3, 3, 1]
    assert len({int(row[0]) for batch in batches for row in batch.tokens}) == 7
    with pytest.raises(DataError, match="7 windows of 4 tokens, fewer than the 8 processes"):
        validation_batches(file, block_size=4, batch_size=3, tokens=10**6, world_size=8)


# Prefetching


def fake(step: int) -> list[Batch]:
    return [Batch(torch.tensor([[step]]), torch.tensor([[step + 1]]))]


def prefetching() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_prefetch_keeps_the_order_and_ends_its_thread():
    steps = [batches[0].tokens.item() for batches in prefetch(fake, 5, 40, pin=False)]
    assert steps == list(range(5, 40)) and not prefetching()
    assert list(prefetch(fake, 3, 3, pin=False)) == [] and not prefetching()


def test_prefetch_runs_ahead_but_not_away():
    made = []
    batches = prefetch(lambda step: made.append(step) or fake(step), 0, 1000, pin=False, depth=2)
    next(batches)
    deadline = time.monotonic() + 5
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert made == [0, 1, 2, 3]  # one taken, two ready, one in the making
    batches.close()
    assert not prefetching()


def test_prefetch_raises_what_was_raised_in_its_thread_after_what_came_before():
    def produce(step):
        if step == 3:
            raise OSError("the disk went away")
        return fake(step)

    seen = []
    with pytest.raises(OSError, match="the disk went away"):
        for batches in prefetch(produce, 0, 10, pin=False):
            seen.append(batches[0].tokens.item())
    assert seen == [0, 1, 2] and not prefetching()


def test_prefetch_does_not_keep_a_program_from_ending():
    program = """
import torch
from engine.data import Batch, prefetch
batches = prefetch(lambda step: [Batch(torch.zeros(1), torch.zeros(1))], 0, 1000, pin=False)
next(batches)
raise SystemExit(7)
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # Two, since a thread that is killed at exit aborts the program only more often than not.
    both = [subprocess.Popen([sys.executable, "-c", program], env=environment) for _ in range(2)]
    assert [process.wait(timeout=60) for process in both] == [7, 7]
