"""The encoder against every other one, on the same real text, on one thread; its worst cases; its threads.

    pytest benchmarks/test_tokenizer.py -s      # whichever peers are installed; writes results/tokenizer.json

All encoders take turns, so that what else the machine does meets all of them. Times are seconds of CPU.
"""

import importlib.metadata
import importlib.util
import os
import shutil
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.corpus import documents
from benchmarks.environment import RESULTS, environment, write_result
from engine.tokenizer import END_OF_TEXT, R50K_PATTERN, VOCABULARY_FILE, load_encoding, load_ranks
from tools.bpe import Encoder, Worker

SIZE_BYTES = 40_000_000
BATCH_BYTES = 2_000_000  # what tools/prepare.py hands to a worker at once is of this order
ROUNDS = 3
SLOW_S = 10  # an encoder that takes longer for all of the text runs in one round only
WORST_BYTES = 50_000_000
DOCUMENT_BYTES = 200_000_000
Encode = Callable[[list[str]], Any]  # a batch of texts, one after another, on one thread


def json_tokenizer(folder: Path) -> str:
    """Write the vocabulary as Hugging Face's tokenizer.json; return its path."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    itself = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]  # bytes that GPT-2's files write as they are
    others = [byte for byte in range(256) if byte not in itself]
    letters = {byte: chr(byte) for byte in itself} | {byte: chr(0x100 + k) for k, byte in enumerate(others)}
    names = {id: "".join(letters[byte] for byte in token) for token, id in load_ranks().items()}
    merges = [(names[left], names[right]) for left, right in merge_ids()]
    vocabulary = {name: id for id, name in names.items()} | {"<|endoftext|>": END_OF_TEXT}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return str(path)


def merge_ids() -> list[tuple[int, int]]:
    """Return both parts of every merge, in the order of their ranks."""
    merges = Encoder().tables.merges
    merges = merges[merges != np.uint64(2**64 - 1)].tolist()
    return [(merge >> 32, merge >> 16 & 0xFFFF) for merge in sorted(merges, key=lambda merge: merge & 0xFFFF)]


def pilesmith(folder: Path) -> Encode:
    worker = Encoder().worker()
    return lambda texts: [worker.encode(*joined(texts))]


def tiktoken(folder: Path) -> Encode:
    encoding = load_encoding()
    return lambda texts: [encoding.encode_ordinary(text) for text in texts]


def tokenizers(folder: Path) -> Encode:
    tokenizer = importlib.import_module("tokenizers").Tokenizer.from_file(json_tokenizer(folder))
    return lambda texts: [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]


def gigatoken(folder: Path) -> Encode:
    tokenizer = importlib.import_module("gigatoken").Tokenizer.from_tiktoken(VOCABULARY_FILE, "gpt2", {})
    return lambda texts: tokenizer.encode_batch([text.encode() for text in texts], parallel=False)


def tuetoken(folder: Path) -> Encode:
    tokenizer = importlib.import_module("tuetoken").Tokenizer(json_tokenizer(folder))
    return lambda texts: [np.frombuffer(tokenizer.encode_to_bytes(text), np.uint32) for text in texts]


def kitoken(folder: Path) -> Encode:
    tokenizer = importlib.import_module("kitoken").Kitoken.from_tokenizers_file(json_tokenizer(folder))
    return lambda texts: [tokenizer.encode(text) for text in texts]


def tokie(folder: Path) -> Encode:
    tokenizer = importlib.import_module("tokie").Tokenizer.from_json(json_tokenizer(folder))
    return lambda texts: [tokenizer.encode_bytes(text.encode()) for text in texts]


def riptoken(folder: Path) -> Encode:
    core = importlib.import_module("riptoken").CoreBPE(load_ranks(), {"<|endoftext|>": END_OF_TEXT}, R50K_PATTERN)
    return lambda texts: [core.encode_ordinary(text) for text in texts]


def wordchipper(folder: Path) -> Encode:
    package = importlib.import_module("wordchipper")
    cache = folder / "openai" / "r50k_base"
    cache.mkdir(parents=True)
    shutil.copy(VOCABULARY_FILE, cache)
    os.environ["WORDCHIPPER_CACHE_DIR"] = str(folder)
    tokenizer = package.Tokenizer.from_pretrained("openai:r50k_base")
    return lambda texts: [tokenizer.encode(text) for text in texts]


ENCODERS = (pilesmith, tiktoken, gigatoken, tuetoken, kitoken, tokie, riptoken, wordchipper, tokenizers)


def batches(texts: list[str]) -> list[list[str]]:
    """Return texts about BATCH_BYTES at a time."""
    step = max(1, BATCH_BYTES * len(texts) // max(1, sum(len(text.encode()) for text in texts)))
    return [texts[first : first + step] for first in range(0, len(texts), step)]


def joined(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return texts as Worker.encode takes them."""
    contents = [text.encode() for text in texts]
    return np.frombuffer(b"".join(contents), np.uint8), np.cumsum([len(content) for content in contents])


def encode_all(encode: Encode, parts: list[list[str]]) -> None:
    """Encode batch after batch; as when files are made, ids are dropped before the next."""
    for texts in parts:
        encode(texts)


def cpu_seconds(run: Callable[[], Any]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


@pytest.fixture(scope="module")
def corpus() -> dict[str, Any]:
    found = documents(SIZE_BYTES)
    kinds: dict[str, dict[str, int]] = defaultdict(lambda: {"documents": 0, "bytes": 0, "not_ascii_bytes": 0})
    for document in found:
        content = np.frombuffer(document.text.encode(), np.uint8)
        kinds[document.kind]["documents"] += 1
        kinds[document.kind]["bytes"] += content.size
        kinds[document.kind]["not_ascii_bytes"] += int((content > 127).sum())
    texts = [document.text for document in found if "<|endoftext|>" not in document.text]
    return {"texts": texts, "kinds": dict(kinds), "bytes": sum(len(text.encode()) for text in texts)}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Callable[[], Encode]]:
    """How to make each encoder that this environment has; one thread each."""
    os.environ |= {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    found = {}
    for make in ENCODERS:
        if make in (pilesmith, tiktoken) or importlib.util.find_spec(make.__name__):
            found[make.__name__] = lambda make=make: make(tmp_path_factory.mktemp(make.__name__))
    return found


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    """What the tests of this file found; written to results/tokenizer.json once all have."""
    return {}


@pytest.mark.parametrize("make", ENCODERS, ids=lambda make: make.__name__)
def test_encoder(benchmark, corpus, installed, make):
    """The first 4 MB, for pytest-benchmark's own table."""
    if make.__name__ not in installed:
        pytest.skip(f"{make.__name__} is not installed")
    texts = corpus["texts"][: len(corpus["texts"]) // 10]
    encode = installed[make.__name__]()
    encode(texts[:10])
    benchmark.extra_info["bytes"] = sum(len(text.encode()) for text in texts)
    benchmark.pedantic(lambda: encode(texts), rounds=3)


def test_ratios(corpus, installed, result):
    """All of the text, by an encoder that has seen nothing, then once more by the same; the encoders take turns."""
    texts, expected = corpus["texts"], load_encoding()
    parts = batches(texts)
    rates: dict[str, dict[str, list[float]]] = defaultdict(lambda: {"first": [], "again": []})
    exact = {}
    for name, make in installed.items():
        ids = np.concatenate([np.asarray(one, np.uint32) for one in make()(texts[:200])])
        wanted = [id for text in texts[:200] for id in expected.encode_ordinary(text)]
        exact[name] = ids[ids != END_OF_TEXT].tolist() == wanted
    for _ in range(ROUNDS):
        for name, make in installed.items():
            if rates[name]["first"] and rates[name]["first"][0] < corpus["bytes"] / 1e6 / SLOW_S:
                continue
            encode = make()
            for which in ("first", "again"):
                rates[name][which].append(corpus["bytes"] / 1e6 / cpu_seconds(lambda: encode_all(encode, parts)))
    rows = {}
    for name, found in rates.items():
        base = rates["tiktoken"]
        rows[name] = {
            "version": None if name == "pilesmith" else importlib.metadata.version(name),
            "exact": exact[name],
            "mb_s": round(statistics.median(found["first"]), 1),
            "mb_s_again": round(statistics.median(found["again"]), 1),
            "times_tiktoken": round(statistics.median(map(ratio, found["first"], base["first"])), 2),
            "times_tiktoken_again": round(statistics.median(map(ratio, found["again"], base["again"])), 2),
        }
    best = max((name for name in rows if name != "pilesmith"), key=lambda name: rows[name]["mb_s"])
    result["text"] = {"bytes": corpus["bytes"], "documents": len(texts), "kinds": corpus["kinds"]}
    result["encoders"] = rows
    result["times_fastest_peer"] = {
        "peer": best,
        "first": round(statistics.median(map(ratio, rates["pilesmith"]["first"], rates[best]["first"])), 2),
        "again": round(statistics.median(map(ratio, rates["pilesmith"]["again"], rates[best]["again"])), 2),
    }
    print(f"\n{'encoder':12} {'MB/s':>8} {'again':>8} {'x tiktoken':>11} {'again':>8}  exact")
    for name, row in sorted(rows.items(), key=lambda item: -item[1]["mb_s"]):
        times = f"{row['times_tiktoken']:11.2f} {row['times_tiktoken_again']:8.2f}"
        print(f"{name:12} {row['mb_s']:8.1f} {row['mb_s_again']:8.1f} {times}  {'yes' if row['exact'] else 'no'}")
    assert exact["pilesmith"]


def ratio(ours: float, theirs: float) -> float:
    return ours / theirs


def worst_cases() -> dict[str, Callable[[int], bytes]]:
    """Return texts of about n bytes that are hard on a byte pair encoder."""
    rng = np.random.default_rng(1)

    def draw(alphabet: str, n: int) -> bytes:
        characters = np.array([character.encode() for character in alphabet])  # all of as many bytes
        return characters[rng.integers(characters.size, size=n // characters.itemsize, dtype=np.uint16)].tobytes()

    return {
        "one letter": lambda n: b"a" * n,
        "blanks": lambda n: b" " * n,
        "alternating letters": lambda n: b"ab" * (n // 2),
        "random letters": lambda n: draw("abcdefghijklmnopqrstuvwxyz", n),
        "random digits": lambda n: draw("0123456789", n),
        "random bases": lambda n: draw("ACGT", n),
        "one emoji": lambda n: "😀".encode() * (n // 4),
        "random emoji": lambda n: draw("".join(chr(0x1F300 + k) for k in range(600)), n),
        "random Chinese characters": lambda n: draw("".join(chr(0x4E00 + k) for k in range(20_000)), n),
        "random words of hexadecimal digits": lambda n: rng.bytes(n // 17 * 8).hex(" ", 8).encode(),
        "apostrophes": lambda n: b"'" * n,
    }


def test_worst_cases(corpus, result):
    """Time per byte of one document, against ordinary text before and after it, all to a worker that is new to it."""
    encoder, ordinary = Encoder(), [joined(texts) for texts in batches(corpus["texts"])]

    def ordinary_seconds() -> float:
        worker = encoder.worker()
        return cpu_seconds(lambda: [worker.encode(*batch) for batch in ordinary]) / corpus["bytes"]

    rows = {}
    page = "".join(corpus["texts"][::10]).encode()
    cases = worst_cases() | {"ordinary text, one document": lambda n: page * (DOCUMENT_BYTES // len(page))}
    print(f"\n{'worst case':36} {'MB':>5} {'MB/s':>8} {'time a byte, of ordinary text':>30}")
    for name, make in cases.items():
        content = np.frombuffer(make(WORST_BYTES), np.uint8)
        worker, before = encoder.worker(), ordinary_seconds()
        seconds = cpu_seconds(lambda: worker.encode(content, np.array([content.size]))) / content.size
        slower = seconds / ((before + ordinary_seconds()) / 2)
        rows[name] = {"bytes": content.size, "mb_s": round(1e-6 / seconds, 1), "times_ordinary": round(slower, 2)}
        print(f"{name:36} {content.size / 1e6:5.0f} {rows[name]['mb_s']:8.1f} {slower:30.2f}")
    result["worst_cases"] = rows


def test_threads(corpus, result):
    """Wall clock: the same text by each of n threads, against one thread alone, in turns."""
    encoder, ordinary = Encoder(), [joined(texts) for texts in batches(corpus["texts"])]
    cores = len(os.sched_getaffinity(0))
    counts = sorted({1, *(2**k for k in range(1, 8) if 2**k <= cores), cores})
    workers = [encoder.worker() for _ in range(cores)]

    def run(worker: Worker) -> None:
        for batch in ordinary:
            worker.encode(*batch)

    rates = defaultdict(list)
    for _ in range(ROUNDS):
        for count in counts:
            threads = [threading.Thread(target=run, args=(worker,)) for worker in workers[:count]]
            start = time.perf_counter()
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            rates[count].append(count * corpus["bytes"] / 1e6 / (time.perf_counter() - start))
    result["threads"] = {count: {"mb_s": round(max(found), 1)} for count, found in rates.items()}
    print("\nthreads: " + ", ".join(f"{count}: {row['mb_s']:.0f} MB/s" for count, row in result["threads"].items()))


def test_write_result(result):
    if set(result) >= {"encoders", "worst_cases", "threads"}:
        method = {
            "clock": "CPU seconds of the process; wall clock for threads, the best of the rounds",
            "load_average": os.getloadavg()[0],  # of a machine that others use; threads mean nothing above the cores
            "rounds": ROUNDS,
            "batch_bytes": BATCH_BYTES,  # given to an encoder at once; the ids of one batch are dropped before the next
            "statistic": "median; ratios are of the same round",
            "first": "an encoder made for the round, nothing cached; `again`: the same encoder, the same text",
        }
        found = {"benchmark": "tokenizer", "environment": environment(), "method": method} | result
        write_result(RESULTS / "tokenizer.json", found)
