"""Chunks: that neither they nor places to go on from change anything, and what is in the way is told."""

import json
import random
from pathlib import Path

import pytest
import zstandard

from tests.tools.preparing.test_json_lines import BAD_LINES, GOOD, GOOD_TEXT, parsed, texts_of
from tools.preparing import chunks
from tools.preparing.chunks import ChunkReader
from tools.preparing.json_lines import parse
from tools.preparing.shard_stream import ShardStream


def shard(folder: Path, content: bytes) -> Path:
    path = folder / "a.jsonl"
    path.write_bytes(content)
    return path


def read(reader: ChunkReader) -> tuple[list[bytes], list[tuple[str, int]], int, list[tuple[int, int]]]:
    """Read on to the end: texts, problems, lines, and the places after each chunk."""
    texts, problems, lines, places = [], [], 0, []
    while not reader.ended:
        found = parse(reader.next_chunk())
        texts += texts_of(found)
        problems += [(problem.kind, lines + problem.line) for problem in found.problems]
        lines += found.lines
        places.append((reader.position, reader.objects))
    return texts, problems, lines, places


def read_shard(path: Path, chunk_bytes: int, max_objects: int | None = None):
    with ShardStream(path) as stream:
        return read(ChunkReader(stream, chunk_bytes, max_objects))


@pytest.fixture
def mixture(tmp_path: Path) -> tuple[Path, list[bytes], list[tuple[str, int]]]:
    """A shard of good, bad and blank lines, from very short to longer than a chunk: its texts and problems."""
    generator = random.Random(0)
    lines, texts, problems = [], [], []
    for number in range(1, 400):
        kind = generator.random()
        if kind < 0.1:
            lines.append(b" " * generator.randrange(3))
        elif kind < 0.2:
            line, problem = generator.choice([case for case in BAD_LINES.values() if len(case[0]) < 100])
            lines.append(line)
            problems.append((problem, number))
        else:
            text = "aé😀\n"[generator.randrange(4)] * generator.choice([1, 5, 60, 700])
            lines.append(json.dumps({"text": text}, ensure_ascii=generator.random() < 0.5).encode())
            texts.append(text.encode())
    return shard(tmp_path, b"\n".join(lines)), texts, problems


@pytest.mark.parametrize("chunk_bytes", [1, 13, 64, 1000, 1 << 20])
def test_chunks_change_nothing(mixture, chunk_bytes: int) -> None:
    path, expected_texts, expected_problems = mixture
    texts, problems, lines, places = read_shard(path, chunk_bytes)
    assert (texts, problems, lines) == (expected_texts, expected_problems, 399)
    assert places[-1][0] == path.stat().st_size


@pytest.mark.parametrize("max_objects", [None, 150])
def test_going_on_from_any_place(mixture, max_objects: int | None) -> None:
    path = mixture[0]
    texts, _, lines, places = read_shard(path, 500, max_objects)
    for at in range(0, len(places) - 1, 3):
        for first in (0, at // 2, at + 1):  # read so many chunks before skipping
            with ShardStream(path) as stream:
                reader = ChunkReader(stream, 500, max_objects)
                before = [parse(reader.next_chunk()) for _ in range(first)]
                reader.skip_to(*places[at])
                rest, _, lines_after, places_after = read(reader)
                assert places_after == places[at + 1 :]
                assert rest == texts[len(texts) - len(rest) :]
                if first == at + 1:
                    assert sum(found.lines for found in before) + lines_after == lines


@pytest.mark.parametrize("max_objects", [1, 2, 57, 10_000])
@pytest.mark.parametrize("chunk_bytes", [10, 1 << 20])
def test_a_limit_counts_lines_that_are_not_blank(mixture, max_objects: int, chunk_bytes: int) -> None:
    path, *_ = mixture
    wanted = [line for line in path.read_bytes().split(b"\n") if line.strip()][:max_objects]
    texts, problems, *_ = read_shard(path, chunk_bytes, max_objects)
    assert len(texts) + len(problems) == len(wanted)
    assert texts == parsed(b"\n".join(wanted))[0]


@pytest.mark.parametrize("followed", [b"", b"\n", b"\n" + GOOD + b"\nx"])
def test_a_line_that_is_too_long_is_left_out(tmp_path: Path, monkeypatch, followed: bytes) -> None:
    monkeypatch.setattr(chunks, "MAX_LINE_BYTES", 5000)
    path = shard(tmp_path, GOOD + b"\n" + b"x" * 100_000 + followed)
    texts, problems, lines, places = read_shard(path, 1000)
    assert texts == [GOOD_TEXT] * (2 if GOOD in followed else 1)
    assert problems == [("line_too_long", 2), *([("not_json", 4)] if GOOD in followed else [])]
    assert (lines, places[-1][0]) == (4 if GOOD in followed else 2, path.stat().st_size)


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("truncated.jsonl.zst", lambda compressed: compressed[:-20], "truncated_file"),
        ("corrupt.jsonl.zst", lambda compressed: compressed[:-4] + b"abcd", "corrupt_file"),
        ("empty.jsonl.zst", lambda compressed: b"", "truncated_file"),
    ],
)
def test_damage_is_told_with_its_line_and_what_is_before_it_kept(tmp_path: Path, name: str, content, kind: str) -> None:
    lines = b"".join(json.dumps({"text": random.Random(i).randbytes(3000).hex()}).encode() + b"\n" for i in range(100))
    path = tmp_path / name
    path.write_bytes(content(zstandard.ZstdCompressor(write_checksum=True).compress(lines)))
    texts, problems, *_ = read_shard(path, 5000)
    assert problems == [(kind, len(texts) + 1)]
    assert texts == parsed(lines)[0][: len(texts)]
    if content(b"x" * 100):
        assert len(texts) > 50
