"""The encoder returns tiktoken's ids, whatever the text, in linear time."""

import os
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tools.bpe
from engine.tokenizer import END_OF_TEXT, load_encoding
from tools.bpe import Encoder, Worker, memory
from tools.bpe.classes import load_code_point_classes, probe_code_point_classes

# What decides where pre-tokens end: letters, numbers and spaces of one to four bytes, contractions, marks, emoji.
PIECES = [
    *("a", "Z", "é", "ж", "中", "𝒳", "ا", "あ", "的", "word", " word", "ing", "的中文"),
    *("0", "7", "½", "٣", "𝟘", "2024", "Ⅷ"),
    *(" ", "  ", "\t", "\n", "\r\n", "\x0b", "\x0c", "\x1c"),
    *("\x85", "\xa0", "\u1680", "\u2003", "\u2028", "\u3000", "\u200b"),
    *("'", "'s", "'d", "'m", "'t", "'ll", "'ve", "'re", "'S", "'l", "'v", "''s", "’s", "'\u3000"),
    *(".", "--", "==", "_", "\0", "\x7f", "\u0301", "\ufeff", "<|endoftext|>"),
    *("\U0001f642", "\U0001f44d\U0001f3fd", "\U0010ffff"),
]


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder()


@pytest.fixture(scope="module")
def reference():
    return load_encoding()


def join(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return texts as Worker.encode takes them."""
    documents = [text.encode() for text in texts]
    return np.frombuffer(b"".join(documents), np.uint8), np.cumsum([len(document) for document in documents])


def expect(reference, texts: list[str]) -> np.ndarray:
    """Return tiktoken's ids of texts, END_OF_TEXT after each."""
    ids = [id for text in texts for id in (*reference.encode_ordinary(text), END_OF_TEXT)]
    return np.array(ids, np.uint16)


def check(worker: Worker, reference, texts: list[str]) -> None:
    ids, expected = worker.encode(*join(texts)), expect(reference, texts)
    assert ids.dtype == np.uint16
    if not np.array_equal(ids, expected):
        for text in texts:
            assert worker.encode(*join([text])).tolist() == expect(reference, [text]).tolist(), ascii(text[:200])
        pytest.fail("documents influence each other")


def test_classes_are_those_of_the_installed_tiktoken():
    assert np.array_equal(load_code_point_classes(), probe_code_point_classes())


def test_every_code_point_alone_and_in_context(encoder, reference):
    characters = [chr(point) for point in range(0x110000) if not 0xD800 <= point < 0xE000]
    worker = encoder.worker()
    check(worker, reference, characters)
    check(worker, reference, ["".join(f"a{character}1 {character}.{character}\n" for character in characters)])


ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"])) | st.text(st.sampled_from(" \n\t'sdmltrve0aé\u3000\xa0"))


@settings(max_examples=150, deadline=None)
@given(st.lists(ANY_TEXT, max_size=8))
def test_any_unicode(encoder, reference, texts):
    check(encoder.worker(), reference, texts)


def test_mixtures_of_scripts_spaces_and_contractions(encoder, reference):
    rng = random.Random(3)
    worker = encoder.worker()
    lengths = (0, 1, 2, 3, 8, 30, 200)
    texts = ["".join(rng.choices(PIECES, k=rng.choice(lengths))) for _ in range(4000)]
    texts += ["".join(rng.choices(rng.sample(PIECES, 3), k=60)) for _ in range(2000)]
    texts += ["".join(rng.choices(PIECES, k=20_000))]
    check(worker, reference, texts)
    check(worker, reference, texts)  # out of the cache


def test_boundaries_of_blocks_and_chunks(encoder, reference):
    worker = encoder.worker()
    edges = (60, 61, 62, 63, 64, 65, 124, 127, 128, *range(memory.CHUNK_BYTES - 12, memory.CHUNK_BYTES + 4))
    tails = ("中 文", "\u3000a", " \u3000", "\xa0\xa0b", "'ll go", " 's", "  x", "\n\n", "😀😀", "½ 1", "'", "")
    texts = [("ab " * n)[:n] + tail + end for n in edges for tail in tails for end in ("", " end", "\n")]
    check(worker, reference, texts)


def test_a_document_is_encoded_as_if_alone(encoder, reference):
    texts = ["a", "b", "", " ", " ", "x  ", " y", "it'", "s", "'", "ll", "1", "2"]
    texts += ["\u3000", "\u3000z", "", "..", ".", "\n", ""]
    check(encoder.worker(), reference, texts)
    assert encoder.worker().encode(*join([])).size == 0
    assert encoder.worker().encode(*join(["", ""])).tolist() == [END_OF_TEXT, END_OF_TEXT]


def test_tokens_as_texts(encoder, reference):
    tokens = [reference.decode_single_token_bytes(id) for id in range(END_OF_TEXT)]
    texts = [token.decode() for token in tokens if token.decode(errors="ignore").encode() == token]
    check(encoder.worker(), reference, texts)


def test_real_text(encoder, reference):
    """The standard library's sources: 20 MB with names, indentation and tables in many scripts."""
    texts, size = [], 0
    for path in sorted(Path(random.__file__).parent.rglob("*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        texts.append(text)
        size += len(text)
        if size > 20_000_000:
            break
    check(encoder.worker(), reference, texts)


def test_a_full_cache_forgets_and_stays_exact(encoder, reference):
    """More different pre-tokens than the cache has rows, of every length that is cached, all of them twice."""
    rng = np.random.default_rng(4)
    lengths = rng.choice([9, 12, 14, 15] * 2 + [16, 30, 40, 41, 63, 64, 65, 100, 127, 128], 700_000)
    assert np.sum(lengths <= memory.SHORT_BYTES) > 1 << memory.SHORT_ROWS_LOG2
    ends = np.cumsum(lengths).tolist()
    letters = rng.integers(0x61, 0x7B, ends[-1], np.uint8).tobytes().decode()
    words = [letters[start:end] for start, end in zip([0, *ends], ends)]
    texts = [" ".join(words[first : first + 1000]) for first in range(0, len(words), 1000)]
    text, ends = join(texts)
    worker = encoder.worker()
    first, second = worker.encode(text, ends), worker.encode(text, ends)
    assert np.array_equal(first, second)
    few = texts[:: len(texts) // 20]
    check(worker, reference, few)


@pytest.mark.parametrize("window_bytes", [4, 16, 60, 300])
def test_long_pretokens_do_not_depend_on_the_window(encoder, reference, window_bytes):
    """Windows far smaller than the usual one: seams everywhere, many of which fail and ask for a larger window."""
    rng = random.Random(window_bytes)
    letters = "abcdefghijklmnopqrstuvwxyz"
    alphabets = ("a", "ab", "=", "=-", "0123456789", letters, "的一是不了", "😀👍", "éèà", "xX")
    for alphabet in alphabets:
        texts = ["".join(rng.choices(alphabet, k=rng.choice((70, 200, 999)))) for _ in range(8)]
        texts += ["".join(rng.choices((alphabet[:1] * 17, alphabet[-1:] * 5, alphabet), k=60))]
        for text in texts:
            check(Worker(encoder, window_bytes), reference, [text])
    worker = Worker(encoder, 4)
    check(worker, reference, ["a" * 3000 + " and " + "the" * 40])
    assert worker.window_bytes > 4


WORST = {
    "one letter": lambda n: "a" * n,
    "blanks": lambda n: " " * n,
    "line feeds": lambda n: "\n" * n,
    "alternating": lambda n: "ab" * (n // 2),
    "one emoji": lambda n: "😀" * (n // 4),
    "emoji": lambda n: "".join(random.Random(5).choices([chr(0x1F300 + k) for k in range(600)], k=n // 4)),
    "digits": lambda n: "".join(random.Random(6).choices("0123456789", k=n)),
    "letters": lambda n: "".join(random.Random(7).choices("abcdefghijklmnopqrstuvwxyz", k=n)),
    "Chinese": lambda n: "".join(chr(random.Random(8).randrange(0x4E00, 0x9FA0)) for _ in range(1000)) * (n // 3000),
    "apostrophes": lambda n: "'" * n,
    "contractions": lambda n: "'s'll" * (n // 5),
    "wide spaces": lambda n: "\u3000\xa0" * (n // 5),
    "random words": lambda n: " ".join(f"{random.Random(k).getrandbits(64):x}" for k in range(n // 17)),
}


@pytest.mark.parametrize("name", WORST)
def test_worst_cases_are_exact(encoder, reference, name):
    # tiktoken's own time grows with the square of a pre-token's length, or nearly; so its share is kept small.
    text = WORST[name](60_000)
    check(encoder.worker(), reference, [text, text[:1001] + " x", "x" + text[:999]])


def seconds_per_byte(worker: Worker, text: str) -> float:
    data, ends = join([text])
    start = time.thread_time()
    worker.encode(data, ends)
    return (time.thread_time() - start) / data.size


def assert_linear(encoder, name: str, size: int) -> None:
    worker = encoder.worker()
    words = [*PIECES, *dir(np), *dir(random), *dir(threading)]
    ordinary = " ".join(random.Random(9).choices(words, k=size // 8))
    seconds_per_byte(worker, ordinary[:1000])
    text = WORST[name](size)
    ratios = []
    for _ in range(5):  # others may use the machine: the best of a few
        ratios.append(seconds_per_byte(worker, text) / seconds_per_byte(worker, text[: size // 16]))
        if ratios[-1] < 2:
            return
    pytest.fail(f"sixteen times the {name} took {min(ratios):.1f} times as long a byte")


@pytest.mark.parametrize("name", WORST)
def test_time_is_linear(encoder, name):
    assert_linear(encoder, name, 2_000_000)


@pytest.mark.slow
@pytest.mark.parametrize("name", WORST)
def test_time_is_linear_in_50_megabytes(encoder, name):
    assert_linear(encoder, name, 50_000_000)


@pytest.mark.slow
def test_one_document_of_200_megabytes(encoder, reference):
    page = "".join(random.Random(10).choices(PIECES, k=100_000)) + "\n"
    repeats = 200_000_000 // len(page.encode())
    worker = encoder.worker()
    ids = worker.encode(*join([page * repeats]))
    twice = expect(reference, [page * 2])
    once = expect(reference, [page])
    assert np.array_equal(ids[: once.size - 10], once[:-10])
    assert ids.size > (twice.size - once.size) * (repeats - 2)
    assert reference.decode_bytes(ids[:-1].tolist()) == page.encode() * repeats
    assert worker.window_bytes == memory.WINDOW_BYTES


def test_the_cache_compares_all_bytes(encoder, reference):
    """Pre-tokens of one length that differ in the middle, which is not in their hash, or at the end."""
    for n in (16, 22, 32, 38, 39, 40, 63, 126):  # and a blank before them
        middles = ["a" * at + letters + "a" * (n - at - 3) for at in range(n - 3) for letters in ("bcd", "the", "ing")]
        numbers = (f"{k:07}".translate(str.maketrans("0123456789", "ghijklmnop")) for k in range(3000))
        check(
            encoder.worker(), reference, [" ".join(middles), " ".join("a" * (n - 7) + letters for letters in numbers)]
        )


def test_ids_that_no_row_has_room_for(encoder, reference):
    runs = np.random.default_rng(5).integers(0x1F300, 0x1F600, (4000, 30))
    texts, worker = [" ".join("".join(map(chr, run)) for run in runs)], encoder.worker()
    check(worker, reference, texts)
    check(worker, reference, texts)


def test_no_row_of_the_cache_lies_in_two_lines():
    assert all(memory.new_scratch().cache.ctypes.data % 64 == 0 for _ in range(4))


def test_threads_have_workers_of_their_own(encoder, reference):
    texts = ["".join(random.Random(k).choices(PIECES, k=3000)) for k in range(8)]
    expected = [expect(reference, [text]) for text in texts]
    results: dict[int, list[np.ndarray]] = {}

    def run(k: int) -> None:
        worker = encoder.worker()
        results[k] = [worker.encode(*join([text])) for text in texts]

    threads = [threading.Thread(target=run, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ids in results.values():
        assert all(np.array_equal(one, other) for one, other in zip(ids, expected, strict=True))


def test_the_gil_is_released(encoder):
    text, ends = join(["".join(random.Random(11).choices(PIECES, k=2_000_000))])
    worker = encoder.worker()
    worker.encode(*join(["compiled"]))
    ticks, done = 0, threading.Event()

    def run() -> None:
        worker.encode(text, ends)
        done.set()

    thread = threading.Thread(target=run)
    thread.start()
    while not done.wait(0.001):
        ticks += 1
    thread.join()
    assert ticks >= 5


def test_encode_ordinary(encoder, reference):
    for text in ("", "Hello world", "  naïve\n\n", "<|endoftext|>", "a" * 5000):
        assert encoder.encode_ordinary(text) == reference.encode_ordinary(text)


def test_arrays_of_other_kinds(encoder, reference):
    expected = expect(reference, ["abc def"])
    text = np.frombuffer(b"abc def", np.uint8)
    worker = encoder.worker()
    assert np.array_equal(worker.encode(text.copy(), np.array([7], np.int32)), expected)
    assert np.array_equal(worker.encode(np.repeat(text, 2)[::2], [7]), expected)


@pytest.mark.parametrize("ends", [[3], [5], [3, 2, 4], [-1, 4], []])
def test_ends_that_do_not_fit_are_refused(encoder, ends):
    with pytest.raises(ValueError, match="ends must rise from 0 to the text's 4 bytes"):
        encoder.worker().encode(np.frombuffer(b"abcd", np.uint8), np.array(ends, np.int64))


def test_text_of_another_type_is_refused(encoder):
    with pytest.raises(ValueError, match="uint8"):
        encoder.worker().encode(np.zeros(4, np.int64), np.array([4]))


def test_a_vocabulary_that_bpe_cannot_make_is_refused(monkeypatch):
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"abc": 256}
    monkeypatch.setattr(tools.bpe, "load_ranks", lambda: ranks)
    with pytest.raises(ValueError, match="token 256, b'abc', does not come from merging two tokens of lower rank"):
        Encoder()


def test_start_up_is_quick(encoder):
    start = time.process_time()
    Encoder().worker()
    assert time.process_time() - start < 1


@pytest.mark.slow
def test_what_is_compiled_is_kept_until_any_of_its_files_changes(tmp_path):
    shutil.copytree(
        Path(tools.bpe.__file__).parent, tmp_path / "tools/bpe", ignore=shutil.ignore_patterns("__pycache__")
    )
    (tmp_path / "tools/__init__.py").touch()
    program = 'from tools.bpe import Encoder; print(Encoder().encode_ordinary("it\'s"))'
    paths = os.pathsep.join([str(tmp_path), str(Path(tools.__file__).parents[1])])

    def ids():
        environment = os.environ | {"PYTHONPATH": paths, "NUMBA_CACHE_DIR": str(tmp_path / "compiled")}
        command = [sys.executable, "-c", program]
        return subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True).stdout

    def compiled():
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "compiled").rglob("*.nbc")}

    first, kept = ids(), compiled()
    assert kept and ids() == first and compiled() == kept
    file = tmp_path / "tools/bpe/pretokens.py"
    file.write_text(file.read_text().replace("return 2\n", "return 0\n"))  # no more contractions of two characters
    assert ids() != first and compiled() != kept
