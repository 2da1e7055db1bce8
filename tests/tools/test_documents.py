"""Documents: what every kind of bad line becomes, and that neither chunks nor places to go on from change anything."""
import json
import random
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from tools import documents
from tools.documents import Chunk, ChunkReader, Documents, parse
from tools.shard_stream import ShardStream

GOOD = b'{"text": "caf\xc3\xa9 \\u00e9\\n", "meta": {"pile_set_name": "Pile-CC"}}'
GOOD_TEXT = "café é\n".encode()

BAD_LINES = {
    "not JSON": (b"text: a", "not_json"),
    "cut off": (b'{"text": "a', "not_json"),
    "empty object": (b"{}", "no_text"),
    "no text": (b'{"txt": "a"}', "no_text"),
    "a list": (b'["text"]', "no_text"),
    "a string": (b'"text"', "no_text"),
    "text is a number": (b'{"text": 5}', "text_not_string"),
    "text is null": (b'{"text": null}', "text_not_string"),
    "text is a list": (b'{"text": ["a"]}', "text_not_string"),
    "empty text": (b'{"text": ""}', "empty_text"),
    "not UTF-8 in the text": (b'{"text": "a\xff"}', "not_utf8"),
    "two objects": (b'{"text": "a"} {"text": "b"}', "not_json"),
    "nested too deep": (b"[" * 200_000, "not_json"),
    "control character": (b'{"text": "a\x01"}', "not_json"),
    "unknown escape": (b'{"text": "\\q"}', "not_json"),
    "null bytes": (b"\0" * 30, "not_json"),
}
KEPT_LINES = {
    "lone high surrogate": (rb'{"text": "a\ud800b"}', "a\ufffdb", "lone_surrogate"),
    "lone low surrogate": (rb'{"text": "\udc00"}', "\ufffd", "lone_surrogate"),
    "two high surrogates": (rb'{"text": "\ud83d\ud83d\ude00"}', "\ufffd😀", "lone_surrogate"),
    "surrogate in UTF-8": (b'{"text": "a\xed\xa0\x80b"}', "a\ufffdb", "lone_surrogate"),
    "separator": (b'{"text": "a<|endoftext|>b"}', "a<|endoftext|>b", "separator_in_text"),
    "escaped separator": (rb'{"text": "\u003c|endoftext|>"}', "<|endoftext|>", "separator_in_text"),
    "surrogate pair": (rb'{"text": "\ud83d\ude00"}', "😀", None),
    "NaN elsewhere": (b'{"text": "a", "score": NaN}', "a", None),
    "byte order mark": (b'\xef\xbb\xbf{"text": "a"}', "a", None),
    "carriage return": (b'{"text": "a"}\r', "a", None),
    "text twice": (b'{"text": "a", "text": "b"}', "b", None),
    "escaped key": (rb'{"te\u0078t": "a"}', "a", None),
    "white space": (b'{"text": " \\n"}', " \n", None),
}


def parsed(content: bytes) -> Documents:
    return parse(Chunk(bytearray(content), len(content)))


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_line_is_left_out_and_told(name: str) -> None:
    line, kind = BAD_LINES[name]
    found = parsed(b"\n".join([GOOD, line, GOOD, b""]))
    assert (found.texts, found.lines) == ([GOOD_TEXT, GOOD_TEXT], 3)
    assert [(problem.kind, problem.line) for problem in found.problems] == [(kind, 2)]
    assert parsed(line).texts == []


@pytest.mark.parametrize("name", KEPT_LINES)
def test_odd_line_is_kept(name: str) -> None:
    line, text, kind = KEPT_LINES[name]
    for content, number in ((b"\n".join([GOOD, line, GOOD]), 2), (line, 1)):
        found = parsed(content)
        assert text.encode() in found.texts and len(found.texts) == (3 if number == 2 else 1)
        assert [(problem.kind, problem.line) for problem in found.problems] == ([(kind, number)] if kind else [])


def test_an_object_is_one_line() -> None:
    two_in_one = b'{"text": "a"}{"text": "b"}\n{"text":\n"c"}\n'
    assert [problem.kind for problem in parsed(two_in_one).problems] == ["not_json"] * 3


def test_blank_lines_are_passed_over_and_counted() -> None:
    found = parsed(b"\n" + GOOD + b"\n \t\r\n\n" + GOOD + b"\nx\n")
    assert found.texts == [GOOD_TEXT] * 2
    assert [problem.line for problem in found.problems] == [6]


def shard(folder: Path, content: bytes) -> Path:
    path = folder / "a.jsonl"
    path.write_bytes(content)
    return path


def read(reader: ChunkReader) -> tuple[list[bytes], list[tuple[str, int]], int, list[tuple[int, int]]]:
    """Read on to the end: texts, problems, lines, and the places after each chunk."""
    texts, problems, lines, places = [], [], 0, []
    while not reader.ended:
        found = parse(reader.next_chunk())
        texts += found.texts
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
    assert texts == parsed(b"\n".join(wanted)).texts


@pytest.mark.parametrize("followed", [b"", b"\n", b"\n" + GOOD + b"\nx"])
def test_a_line_that_is_too_long_is_left_out(tmp_path: Path, monkeypatch, followed: bytes) -> None:
    monkeypatch.setattr(documents, "MAX_LINE_BYTES", 5000)
    path = shard(tmp_path, GOOD + b"\n" + b"x" * 100_000 + followed)
    texts, problems, lines, places = read_shard(path, 1000)
    assert texts == [GOOD_TEXT] * (2 if GOOD in followed else 1)
    assert problems == [("line_too_long", 2), *([("not_json", 4)] if GOOD in followed else [])]
    assert (lines, places[-1][0]) == (4 if GOOD in followed else 2, path.stat().st_size)


def test_a_text_that_is_too_long_is_left_out(monkeypatch) -> None:
    monkeypatch.setattr(documents, "MAX_TEXT_BYTES", 5)
    monkeypatch.setattr(documents, "LONG_LINE_BYTES", 0)
    assert [problem.kind for problem in parsed(GOOD).problems] == ["line_too_long"]


PIECES = [*"a\\\"\n😀é中f0u /z\u2028\x01\x7f", "\\u", "\\ud83d", "\\ude00", "\\n"]


PIECED_TEXTS = st.lists(st.sampled_from(PIECES), max_size=60).map("".join) | st.text(max_size=60)


@given(PIECED_TEXTS, st.booleans(), st.integers(1, 9))
def test_long_lines_are_decoded_in_pieces(text: str, escaped: bool, piece_bytes: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "LONG_LINE_BYTES", 0)
        patch.setattr(documents, "PIECE_BYTES", piece_bytes)
        line = json.dumps({"a": 1, "text": text}, ensure_ascii=escaped).encode("utf-8", "surrogatepass")
        assert parsed(line).texts == ([text.encode()] if text else [])


def test_bad_long_lines(monkeypatch) -> None:
    monkeypatch.setattr(documents, "LONG_LINE_BYTES", 0)
    for name, (line, kind) in BAD_LINES.items():
        if name != "nested too deep":
            found = parsed(line)
            assert not found.texts and [problem.kind for problem in found.problems] == [kind], name
    assert [problem.kind for problem in parsed(rb'{"text": "a\ud800b"}').problems] == ["not_json"]
    assert parsed(b"   ").problems == []


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
    assert texts == parsed(lines).texts[: len(texts)]
    if content(b"x" * 100):
        assert len(texts) > 50
