"""Preparing: tiktoken's ids in the order of the inputs, whatever is in them, stops it, or shares the work."""
import argparse
import errno
import itertools
import json
import os
import pty
import re
import resource
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import zstandard

from engine.data import TokenFile
from engine.tokenizer import END_OF_TEXT, load_encoding
from tools import parts, pipeline, prepare, text_encoders, workers
from tools.parts import Settings, Workspace
from tools.prepare import find_inputs, main, parse_shard, summarize
from tools.token_file import PrepareError, description_path, read_description

TEXTS = ["Hello, world!", "  \n\n\t x", "naïve café 中文 日本語 😀👍🏽", "<|endoftext|>", "1234567 it's WE'LL\r\n", "a" * 999]


def texts(count: int, seed: int = 0) -> list[str]:
    """Different documents, some short and some of a few kilobytes."""
    generator = np.random.default_rng(seed)
    words = " ".join(TEXTS).split(" ")
    sizes = generator.choice([1, 10, 100, 500], count, p=[0.3, 0.3, 0.3, 0.1])
    return [" ".join(generator.choice(words, size)) + f" {i}" for i, size in enumerate(sizes)]


def shard(path: Path, documents: list[str]) -> Path:
    lines = "".join(json.dumps({"text": text, "meta": {"pile_set_name": "test"}}) + "\n" for text in documents)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(zstandard.compress(lines.encode()))
    return path


def ids(documents: list[str]) -> list[int]:
    encoding = load_encoding()
    return [token for text in documents for token in [*encoding.encode_ordinary(text), END_OF_TEXT]]


def tokens(file: Path) -> list[int]:
    return np.fromfile(file, "<u2").tolist()


@pytest.fixture
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments of a few kilobytes, so that small inputs have many."""
    cut = {"chunk_bytes": 8000, "segment_chunks": 3}
    monkeypatch.setattr(prepare, "Settings", lambda **given: Settings(**given, **cut))
    monkeypatch.setattr(parts, "MERGED_AT_ONCE", 2)
    monkeypatch.setattr(workers, "BYTES_A_PROCESS", 100)


@pytest.fixture
def inputs(tmp_path: Path) -> list[Path]:
    """Three shards of different sizes; the second has a few bad lines."""
    folder = tmp_path / "shards"
    found = [shard(folder / f"{i:02}.jsonl.zst", texts(count, i)) for i, count in enumerate((60, 25, 40))]
    lines = zstandard.ZstdDecompressor().decompressobj().decompress(found[1].read_bytes())
    found[1].write_bytes(zstandard.compress(b"x\n" + lines + b'{"text": ""}\n{"text": "\\ud800"}'))
    return found


@pytest.fixture
def expected() -> list[int]:
    return ids([*texts(60, 0), *texts(25, 1), "\ufffd", *texts(40, 2)])


def test_documents_become_tiktokens_ids_in_order(tmp_path: Path) -> None:
    paths = [shard(tmp_path / "b.jsonl.zst", TEXTS), tmp_path / "a.jsonl", tmp_path / "c.jsonl.gz"]
    paths[1].write_text('{"text": "first"}\n\n{"text": "second"}')
    with zstandard.open(tmp_path / "d.jsonl.zst", "wb") as file:
        file.write(b'{"text": "last"}\n')
    paths[2].unlink(missing_ok=True)
    assert [path.name for path in find_inputs(tmp_path)] == ["a.jsonl", "b.jsonl.zst", "d.jsonl.zst"]
    out = tmp_path / "out.bin"
    prepare.prepare(find_inputs(tmp_path), out)
    documents = ["first", "second", *TEXTS, "last"]
    assert tokens(out) == ids(documents)
    description = json.loads(description_path(out).read_bytes())
    assert description | {"sources": None} == {
        "format": 1,
        "tokenizer": "r50k_base",
        "vocab_size": 50257,
        "end_of_text": 50256,
        "dtype": "uint16",
        "tokens": len(ids(documents)),
        "documents": len(documents),
        "bytes": sum(len(text.encode()) for text in documents),
        "max_data": None,
        "sources": None,
    }
    assert [(source["file"], source["documents"]) for source in description["sources"]] == [
        ("a.jsonl", 2),
        ("b.jsonl.zst", len(TEXTS)),
        ("d.jsonl.zst", 1),
    ]
    assert description["sources"][1]["noted"] == {"separator_in_text": 1}
    assert not (tmp_path / "out.bin.parts").exists()
    file = TokenFile(out)
    assert (len(file), file.tokenizer, file.vocab_size) == (description["tokens"], "r50k_base", 50257)


@pytest.mark.parametrize("workers_", [1, 2, 3, 9])
def test_any_number_of_workers_gives_the_same_bytes(
    inputs: list[Path], expected: list[int], small_segments: None, tmp_path: Path, workers_: int
) -> None:
    out = tmp_path / "out.bin"
    prepare.prepare(inputs, out, workers=workers_)
    assert tokens(out) == expected
    description = read_description(out)
    assert [source.skipped for source in description.sources] == [{}, {"not_json": 1, "empty_text": 1}, {}]
    assert description.sources[1].noted["lone_surrogate"] == 1
    reference = tmp_path / "reference.bin"
    prepare.prepare(inputs, reference, workers=1)
    assert description_path(out).read_bytes() == description_path(reference).read_bytes()


def test_helpers_share_one_shard(small_segments: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "THREADS", 1)
    started, original = [], workers._start
    monkeypatch.setattr(workers, "_start", lambda job: (started.append(job), original(job))[1])
    documents = texts(300)
    out = tmp_path / "out.bin"
    prepare.prepare([shard(tmp_path / "a.jsonl.zst", documents)], out, workers=3)
    assert len(started) == 2
    assert tokens(out) == ids(documents)


def test_what_should_not_be_there_is_listed(tmp_path: Path) -> None:
    odd = ['{"text": "kept"}', '{"txt": 1}', '{"text": "half \\ud800"}', '{"text": "<|endoftext|>"}']
    lines = ["nonsense"] * 7 + odd
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    cut_off = shard(tmp_path / "b.jsonl.zst", texts(30))
    cut_off.write_bytes(cut_off.read_bytes()[:-1])
    out = tmp_path / "out.bin"
    sources = prepare.prepare(find_inputs(tmp_path), out)
    assert tokens(out)[: len(ids(["kept"]))] == ids(["kept"])
    report = summarize(tmp_path, sources)
    detail = "Expecting value: line 1 column 1 (char 0)"
    assert report[:8] == [
        "1 x the file is cut off in this line, which is left out:",
        f"    {tmp_path}/b.jsonl.zst:30: the last zstd frame is not complete",
        "7 x not JSON:",
        *[f"    {tmp_path}/a.jsonl:{line}: {detail}" for line in range(1, 6)],
    ]
    assert "    and 2 more in a.jsonl" in report
    assert f"    {tmp_path}/a.jsonl:9" in report  # no `text`
    assert f"    {tmp_path}/a.jsonl:10: 1 in this text" in report
    assert f"    {tmp_path}/a.jsonl:11" in report
    assert report == summarize(tmp_path, prepare.prepare(find_inputs(tmp_path), out))  # a rerun says it again


BAD_ENDS = {
    "not JSON": ("x", "not JSON"),
    "no text": ("{}", "no object with a `text`"),
    "surrogate": (r'{"text": "\udfff"}', "half a surrogate pair"),
    "empty": ('{"text": ""}', "is empty"),
}


@pytest.mark.parametrize("name", BAD_ENDS)
def test_strict_stops_at_the_first_loss(name: str, small_segments: None, tmp_path: Path) -> None:
    line, meaning = BAD_ENDS[name]
    good = [json.dumps({"text": text}) for text in texts(20)]
    (tmp_path / "a.jsonl").write_text("\n".join([*good, '{"text": "<|endoftext|> is no loss"}']))
    (tmp_path / "b.jsonl").write_text("\n".join([*good, line, *good, "and another"]))
    out = tmp_path / "out.bin"
    with pytest.raises(PrepareError, match=rf"b\.jsonl:21: .*{meaning}"):
        prepare.prepare(find_inputs(tmp_path), out, strict=True)
    assert not out.exists()
    prepare.prepare(find_inputs(tmp_path), out)
    with pytest.raises(PrepareError, match=r"b\.jsonl:21: "):
        prepare.prepare(find_inputs(tmp_path), out, strict=True)


def test_a_limit_is_for_each_input(tmp_path: Path, small_segments: None) -> None:
    paths = [shard(tmp_path / f"{name}.jsonl.zst", texts(50, seed)) for seed, name in enumerate("ab")]
    out = tmp_path / "out.bin"
    for limit in (7, 40, 1000, 7):
        prepare.prepare(paths, out, max_data=limit)
        assert tokens(out) == ids([*texts(50, 0)[:limit], *texts(50, 1)[:limit]])
        assert read_description(out).max_data == limit


def test_a_finished_file_is_left_alone(inputs: list[Path], tmp_path: Path, capsys, monkeypatch) -> None:
    out = tmp_path / "out.bin"
    prepare.prepare(inputs, out)

    def written() -> list[tuple[int, int]]:
        return [(path.stat().st_ino, path.stat().st_mtime_ns) for path in (out, description_path(out))]

    before = written()
    monkeypatch.setattr(pipeline.ShardStream, "__init__", None)  # nothing is read
    os.utime(inputs[0])  # a copy has another time and the same content
    prepare.prepare(inputs, out)
    assert "nothing to do" in capsys.readouterr().out
    assert written() == before
    assert not (tmp_path / "out.bin.parts").exists()


def test_a_changed_input_is_done_again(inputs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out.bin"
    prepare.prepare(inputs, out)
    shard(inputs[2], texts(3, 9))
    prepare.prepare(inputs, out)
    assert tokens(out) == ids([*texts(60, 0), *texts(25, 1), "\ufffd", *texts(3, 9)])


def test_one_more_shard_takes_the_time_of_one_shard(inputs, expected, tmp_path: Path, monkeypatch, capsys) -> None:
    out = tmp_path / "out.bin"
    prepare.prepare(inputs[:2], out)
    opened = []
    original = pipeline.ShardStream.__init__
    monkeypatch.setattr(
        pipeline.ShardStream, "__init__", lambda stream, path: (opened.append(path), original(stream, path))[1]
    )
    prepare.prepare(inputs, out, workers=1)
    assert opened == inputs[2:]
    assert "keeping what it has of 00.jsonl.zst, 01.jsonl.zst" in capsys.readouterr().out
    assert tokens(out) == expected


TOUCHES_THE_DISK = (
    (os, "replace"),
    (os, "fsync"),
    (os, "open"),
    (Path, "unlink"),
    (parts, "write_all"),
    (parts, "append_file"),
    (shutil, "rmtree"),
)


def run_and_die(run: Callable[[], object], point: int, counted: Path | None = None) -> bool:
    """Run in a process that kills itself before it touches the disk for the `point`-th time; return whether it did.

    counted: where to write how often it touched the disk.
    """
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    touched = itertools.count()
    try:
        for place, name in TOUCHES_THE_DISK:

            def touch(*arguments, original=getattr(place, name), **options):
                if next(touched) == point:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*arguments, **options)

            setattr(place, name, touch)
        run()
        if counted:
            counted.write_text(str(next(touched)))
    finally:
        os._exit(0)


@pytest.mark.parametrize("step", [12, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_any_point_it_goes_on_from_there(inputs, expected, small_segments, tmp_path: Path, step: int) -> None:
    reference = tmp_path / "reference.bin"
    run_and_die(lambda: prepare.prepare(inputs, reference, workers=2), -1, tmp_path / "count")
    points = int((tmp_path / "count").read_text())
    folder = tmp_path / "out"
    out = folder / "out.bin"

    def run() -> None:
        prepare.prepare(inputs, out, workers=2)

    for point in [*range(0, points - 12, step), *range(points - 12, points)]:  # at the end the names are given
        folder.mkdir()
        if point % 2:  # over a file of something else, of the same size
            np.fromfile(reference, "<u2")[::-1].tofile(out)
            description_path(out).write_bytes(description_path(reference).read_bytes().replace(b'"00.', b'"99.'))
        run_and_die(run, point)
        run_and_die(run, point // 3)  # killed a second time, earlier
        if (description := read_description(out)) and description.sources[0].file == "00.jsonl.zst":
            assert tokens(out) == expected
        run()
        assert tokens(out) == expected
        assert description_path(out).read_bytes() == description_path(reference).read_bytes()
        assert len(list(folder.iterdir())) == 2
        shutil.rmtree(folder)


def test_what_a_killed_run_left_does_not_outlast_other_settings(inputs, small_segments, tmp_path: Path) -> None:
    out = tmp_path / "out.bin"
    run_and_die(lambda: prepare.prepare(inputs, out, workers=1), 150)
    assert (tmp_path / "out.bin.parts" / "merged").stat().st_size > 1000
    prepare.prepare(inputs[:1], out, max_data=2)
    assert tokens(out) == ids(texts(60, 0)[:2])


def test_what_is_merged_is_not_done_again(inputs, small_segments, tmp_path: Path) -> None:
    out = tmp_path / "out.bin"
    prepare.prepare(inputs, out, shard=(1, 1))
    settings = prepare.Settings(tokenizer="r50k_base")
    workspace = Workspace(out, inputs, settings, np.dtype("<u2"))
    before = [workspace.reach(source) for source in inputs]
    workspace.merge()
    assert not list((tmp_path / "out.bin.parts").glob("*.tokens"))
    assert all(place.ended for place in before) and [workspace.reach(source).ended for source in inputs] == [True] * 3
    assert workspace.place_after(inputs[1], 0).ended and workspace.take(inputs[1], 0) is None


def command(*arguments: object, cut: bool = True) -> list[str]:
    """The program, with small segments."""
    start = (
        "import functools, sys; from tools import prepare as p, workers; workers.BYTES_A_PROCESS = 100;"
        f"p.Settings = functools.partial(p.Settings, chunk_bytes=8000, segment_chunks=3) if {cut} else p.Settings;"
        "sys.exit(p.main(sys.argv[1:]))"
    )
    return [sys.executable, "-c", start, *map(str, arguments)]


def folders(root: Path) -> list[object]:
    """The flags of a run on root/train and root/val."""
    return [
        *("--train_dir", root / "train", "--out_train_file", root / "train.bin"),
        *("--val_dir", root / "val", "--out_val_file", root / "val.bin"),
    ]


def children(pid: int) -> set[int]:
    """The processes that a process has started, from the system's list."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.add(int(entry.parent.name))
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_a_killed_run_with_helpers_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    documents = [texts(150, seed) for seed in range(4)]
    for i, content in enumerate(documents):
        shard(tmp_path / "train" / f"{i}.jsonl.zst", content)
    shard(tmp_path / "val" / "val.jsonl.zst", TEXTS)
    run = command(*folders(tmp_path), "--workers", 8)
    process = subprocess.Popen(run, stdout=subprocess.DEVNULL)
    helpers: set[int] = set()
    while not (helpers and list(tmp_path.glob("train.bin.parts/*.tokens"))):
        assert process.poll() is None
        helpers |= children(process.pid)
        time.sleep(0.001)
    process.kill()
    process.wait()
    finished = subprocess.run(run, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert tokens(tmp_path / "train.bin") == ids([text for content in documents for text in content])
    assert tokens(tmp_path / "val.bin") == ids(TEXTS)
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{pid}").exists() for pid in helpers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in helpers)


def test_a_helper_that_dies_leaves_its_work_to_others(tmp_path: Path, small_segments: None, monkeypatch) -> None:
    documents = texts(300)
    started = workers._start

    def start_and_kill(job):
        process = started(job)
        process.kill()
        return process

    monkeypatch.setattr(workers, "_start", start_and_kill)
    out = tmp_path / "out.bin"
    prepare.prepare([shard(tmp_path / "a.jsonl.zst", documents)], out, workers=8)
    assert tokens(out) == ids(documents)


def test_two_runs_on_one_output_refuse_each_other(inputs, expected, tmp_path: Path) -> None:
    out = tmp_path / "out.bin"
    workspace = Workspace(out, inputs, Settings(tokenizer="r50k_base"), np.dtype("<u2"))
    with workspace.locked(shared=False):
        for options in ({}, {"shard": (1, 3)}):
            with pytest.raises(PrepareError, match="another run is preparing .*out.bin"):
                prepare.prepare(inputs, out, **options)
    with workspace.locked(shared=True):  # shares go together with each other only
        prepare.prepare(inputs, out, shard=(1, 3))
        with pytest.raises(PrepareError, match="another run"):
            prepare.prepare(inputs, out)
    prepare.prepare(inputs, out)
    assert tokens(out) == expected


def test_the_same_share_twice_at_once_is_refused(inputs, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(prepare, "PATIENCE_S", 0.2)
    out = tmp_path / "out.bin"
    workspace = Workspace(out, inputs, Settings(tokenizer="r50k_base"), np.dtype("<u2"))
    with workspace.locked(shared=True):
        segment = workspace.take(inputs[0], 0)
        with pytest.raises(PrepareError, match="another run is preparing .*00.jsonl.zst"):
            prepare.prepare(inputs, out, shard=(1, 3))
        segment.abandon()
        prepare.prepare(inputs, out, shard=(1, 3))


@pytest.mark.parametrize("megabytes", [0.02, 0.15, 0.35])
def test_a_full_disk_keeps_what_is_done(inputs, expected, small_segments, tmp_path: Path, megabytes: float) -> None:
    out = tmp_path / "out.bin"
    child = os.fork()
    if child == 0:
        # A limit on the size of a file is met in write() as a full disk is, with another number.
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(megabytes * 1e6),) * 2)
        try:
            prepare.prepare(inputs, out, workers=2)
        except PrepareError as error:
            os._exit(28 if "no room left" in str(error) and "run the same command again" in str(error) else 1)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 28
    assert not out.exists()
    folder = tmp_path / "out.bin.parts"
    kept = Workspace(out, inputs, Settings(tokenizer="r50k_base", chunk_bytes=8000, segment_chunks=3), np.dtype("<u2"))
    done = sum(kept.made(source).tokens for source in inputs)
    assert done > 1000 or megabytes == 0.02
    assert not list(folder.glob("*.part"))
    prepare.prepare(inputs, out, workers=2)
    assert tokens(out) == expected


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_is_full_when_merging(inputs, expected, small_segments, tmp_path, monkeypatch, number) -> None:
    out = tmp_path / "out.bin"
    original, left = os.copy_file_range, iter(range(6))

    def copy_file_range(*arguments: int) -> int:
        if next(left, None) is None:
            raise OSError(number, os.strerror(number))
        return original(*arguments)

    monkeypatch.setattr(os, "copy_file_range", copy_file_range)
    with pytest.raises(PrepareError, match="no room left for .*out.bin"):
        prepare.prepare(inputs, out, workers=1)
    monkeypatch.setattr(os, "copy_file_range", original)
    prepare.prepare(inputs, out, workers=1)
    assert tokens(out) == expected


@pytest.mark.parametrize("number", [errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, None])
def test_a_system_that_copies_no_file_ranges(inputs, expected, small_segments, tmp_path, monkeypatch, number) -> None:
    def copy_file_range(*arguments: int) -> int:
        raise OSError(number, os.strerror(number))

    if number is None:
        monkeypatch.delattr(os, "copy_file_range")
    else:
        monkeypatch.setattr(os, "copy_file_range", copy_file_range)
    prepare.prepare(inputs, tmp_path / "out.bin")
    assert tokens(tmp_path / "out.bin") == expected


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_shares_put_together_are_the_whole(inputs, expected, small_segments, tmp_path: Path, count: int) -> None:
    whole, out = tmp_path / "whole.bin", tmp_path / "out.bin"
    prepare.prepare(inputs, whole)
    for i in range(count, 0, -1):
        if i < count:
            missing = [path.name for path in inputs if (inputs.index(path) % count) < i]
            with pytest.raises(PrepareError, match=f"{len(missing)} of 3 inputs are not done: {', '.join(missing)}"):
                prepare.prepare(inputs, out, merge=True)
        prepare.prepare(inputs, out, shard=(i, count))
        assert not out.exists()
    prepare.prepare(inputs, out, merge=True)
    assert out.read_bytes() == whole.read_bytes()
    assert description_path(out).read_bytes() == description_path(whole).read_bytes()
    prepare.prepare(inputs, out, shard=(1, count))  # nothing to do


def test_shares_of_machines_with_their_own_copies(inputs, expected, small_segments, tmp_path: Path) -> None:
    machines = []
    for i in (1, 2):
        folder = tmp_path / f"machine{i}"
        copies = [Path(shutil.copy(path, folder)) for path in inputs if folder.mkdir(exist_ok=True) or True]
        for path in copies:
            os.utime(path, (i, i))  # each downloaded them at another time
        prepare.prepare(copies, folder / "out.bin", shard=(i, 2))
        machines.append((copies, folder / "out.bin"))
    (copies, out), (_, other) = machines
    for path in (other.parent / "out.bin.parts").iterdir():
        shutil.copy(path, out.parent / "out.bin.parts")
    prepare.prepare(copies, out, merge=True)
    assert tokens(out) == expected


def test_a_damaged_segment_is_made_again(inputs, expected, small_segments, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out.bin"
    prepare.prepare(inputs, out, shard=(1, 1))
    path = sorted((tmp_path / "out.bin.parts").glob("01*.tokens"))[1]
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(PrepareError, match="1 of 3 inputs are not done: 01.jsonl.zst"):
        prepare.prepare(inputs, out, merge=True)
    assert "01.jsonl.zst: damaged" in capsys.readouterr().out
    prepare.prepare(inputs, out)
    assert tokens(out) == expected


def test_an_input_that_changes_meanwhile_is_refused(inputs, tmp_path: Path, monkeypatch) -> None:
    original = pipeline.parse

    def parse(chunk):
        os.utime(inputs[1], (1, 1))
        return original(chunk)

    monkeypatch.setattr(pipeline, "parse", parse)
    with pytest.raises(PrepareError, match="01.jsonl.zst changed while it was read"):
        prepare.prepare(inputs[1:2], tmp_path / "out.bin")


@pytest.mark.parametrize(("size", "dtype"), [(1 << 16, "uint16"), ((1 << 16) + 1, "uint32")])
def test_other_tokenizers_have_the_width_their_ids_need(size: int, dtype: str, tmp_path: Path, monkeypatch) -> None:
    ranks = {bytes([i]): i for i in range(256)} | {b"abc"[i : i + 2]: 256 + i for i in range(2)}
    special = {"<|endoftext|>": size - 1}
    encoding = tiktoken.Encoding("other", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens=special)
    monkeypatch.setattr(text_encoders, "load_encoding", lambda name: encoding)
    monkeypatch.setattr(prepare, "load_text_encoder", text_encoders.TextEncoder)
    out = tmp_path / "out.bin"
    prepare.prepare([shard(tmp_path / "a.jsonl.zst", TEXTS)], out, "other")
    file = TokenFile(out)
    assert read_description(out).dtype == dtype
    assert (file.tokenizer, file.end_of_text, file.vocab_size) == ("other", size - 1, size)
    assert file.tokens.tolist() == [i for text in TEXTS for i in [*encoding.encode_ordinary(text), size - 1]]


def test_another_tokenizer_takes_nothing_over(inputs, expected, tmp_path: Path) -> None:
    out = tmp_path / "out.bin"
    prepare.prepare(inputs, out, "gpt2")
    assert read_description(out).tokenizer == "gpt2"
    prepare.prepare(inputs[:1], out, shard=(1, 1), max_data=2)
    prepare.prepare(inputs, out)
    assert (read_description(out).tokenizer, tokens(out)) == ("r50k_base", expected)


def test_a_tokenizer_without_a_separator_is_refused(tmp_path: Path, monkeypatch) -> None:
    ranks = {bytes([i]): i for i in range(256)}
    encoding = tiktoken.Encoding("bare", pat_str=".", mergeable_ranks=ranks, special_tokens={})
    monkeypatch.setattr(text_encoders, "load_encoding", lambda name: encoding)
    with pytest.raises(ValueError, match="'bare' has no <|endoftext|>"):
        text_encoders.TextEncoder("bare")


def test_the_program(tmp_path: Path) -> None:
    shard(tmp_path / "train" / "00.jsonl.zst", texts(50))
    shard(tmp_path / "val" / "val.jsonl.zst", TEXTS)
    done = subprocess.run(command(*folders(tmp_path), cut=False), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert tokens(tmp_path / "train.bin") == ids(texts(50))
    assert tokens(tmp_path / "val.bin") == ids(TEXTS)
    assert f"{tmp_path}/val/val.jsonl.zst:4\n" in done.stdout  # TEXTS has a separator


ERRORS = {
    "no folder": ([], r"train does not exist .*python tools/download.py"),
    "empty folder": (["train"], r"train holds no shards .*python tools/download.py"),
    "no val": (["train/a.jsonl"], r"val does not exist"),
    "unknown tokenizer": (
        ["train/a.jsonl", "val/a.jsonl", "--tokenizer_name=r60k"],
        r"unknown tokenizer 'r60k'; known: .*r50k_base",
    ),
    "no text at all": (["train/a.jsonl", "val/a.jsonl"], r"no text in a.jsonl: there is nothing to write"),
    "output in a file": (["train/a.jsonl", "val/a.jsonl", "--out_train_file=/dev/null/x"], r"/dev/null"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_to_do(name: str, tmp_path: Path, capfd) -> None:
    given, message = ERRORS[name]
    for path in [tmp_path / path for path in given if not path.startswith("--")]:
        path.parent.mkdir(exist_ok=True)
        path.write_text("nonsense") if path.suffix else path.mkdir()
    assert main([*map(str, folders(tmp_path)), *[flag for flag in given if flag.startswith("--")]]) == 1
    error = capfd.readouterr().err
    assert re.search(message, error) and error.startswith("prepare.py: ")


def test_inputs_of_one_name_are_refused(tmp_path: Path) -> None:
    paths = [shard(tmp_path / folder / "a.jsonl.zst", TEXTS) for folder in "xy"]
    with pytest.raises(PrepareError, match="two inputs are called a.jsonl.zst"):
        prepare.prepare(paths, tmp_path / "out.bin")
    with pytest.raises(PrepareError, match="no inputs"):
        prepare.prepare([], tmp_path / "out.bin")


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "-1/2", "1/0", "²/3"])
def test_shares_are_numbered_from_one(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="as in 2/4"):
        parse_shard(text)


@pytest.mark.parametrize(
    ("count", "gigabytes", "expected_"),
    [(1, 9, [1]), (3, 9, [3]), (4, 9, [2, 2]), (11, 9, [3, 3, 3, 2]), (12, 0.2, [4, 4, 4]), (12, 0.001, [12])],
)
def test_processes_have_a_few_threads_each(count: int, gigabytes: float, expected_: list[int]) -> None:
    assert workers.shares(count, int(gigabytes * 2**30)) == expected_


def test_cores_of_a_control_group(monkeypatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    for content, cores in (("max 100000", 16), ("250000 100000", 2), ("50000 100000", 1), ("3200000 100000", 16)):
        monkeypatch.setattr(Path, "read_text", lambda path, content=content: content)
        assert workers.available_cores() == cores


@pytest.mark.skipif(sys.platform != "linux", reason="needs a pseudo-terminal")
def test_a_terminal_shows_rates_and_time_left(tmp_path: Path) -> None:
    shard(tmp_path / "train" / "00.jsonl.zst", texts(50))
    shard(tmp_path / "val" / "val.jsonl.zst", TEXTS)
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (25, 120))
    subprocess.run(command(*folders(tmp_path)), stdout=subprocess.DEVNULL, stderr=theirs, check=True)
    os.close(theirs)
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert re.search(r"train.bin: 100%.*<.*MB/s of text, .* M tokens/s", shown)


@pytest.mark.slow
def test_memory_stays_far_under_two_gigabytes(tmp_path: Path) -> None:
    """Three documents of 200 MB, of the kind that takes most: with an emoji a str has four bytes a character."""
    unit = json.dumps(" ".join(TEXTS[:3]) * 1000, ensure_ascii=False)[1:-1].encode()
    path = tmp_path / "train" / "00.jsonl.zst"
    path.parent.mkdir()
    with zstandard.open(path, "wb") as file:  # in pieces: a child's peak begins with that of the process it comes from
        for _ in range(3):
            file.write(b'{"text": "')
            for _ in range(200_000_000 // len(unit) + 1):
                file.write(unit)
            file.write(b'"}\n')
    shard(tmp_path / "val" / "val.jsonl.zst", TEXTS)
    process = subprocess.Popen(command(*folders(tmp_path), "--workers", 2, cut=False), stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert usage.ru_maxrss * 1024 < 1.2e9
