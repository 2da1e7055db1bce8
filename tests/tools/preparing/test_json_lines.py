"""Lines to texts: what every kind of bad line becomes, and that compiled code reads a line as Python's parser does."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tools.preparing import json_lines
from tools.preparing.chunks import Chunk
from tools.preparing.json_lines import Documents, parse

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
    "a fraction behind the text": (b'{"text": "a".5}', "not_json"),
    "an exponent behind the text": (b'{"text": "a"e5}', "not_json"),
    "a string behind the text": (b'{"text": "a""b"}', "not_json"),
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


def texts_of(found: Documents) -> list[bytes]:
    return [text.tobytes() for text in np.split(found.text, found.ends)[:-1]]


def parsed(content: bytes, key: str = "text") -> tuple[list[bytes], list[tuple[str, int]], int]:
    """Return texts, problems and lines."""
    found = parse(Chunk(bytearray(content), len(content)), key)
    return texts_of(found), [(problem.kind, problem.line) for problem in found.problems], found.lines


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_line_is_left_out_and_told(name: str) -> None:
    line, kind = BAD_LINES[name]
    assert parsed(b"\n".join([GOOD, line, GOOD, b""])) == ([GOOD_TEXT, GOOD_TEXT], [(kind, 2)], 3)
    assert parsed(line) == ([], [(kind, 1)], 1)


@pytest.mark.parametrize("name", KEPT_LINES)
def test_odd_line_is_kept(name: str) -> None:
    line, text, kind = KEPT_LINES[name]
    text, problems = text.encode(), [kind] if kind else []
    assert parsed(b"\n".join([GOOD, line, GOOD])) == ([GOOD_TEXT, text, GOOD_TEXT], [(kind, 2) for kind in problems], 3)
    assert parsed(line) == ([text], [(kind, 1) for kind in problems], 1)


def test_an_object_is_one_line() -> None:
    two_in_one = b'{"text": "a"}{"text": "b"}\n{"text":\n"c"}\n'
    assert parsed(two_in_one) == ([], [("not_json", line) for line in (1, 2, 3)], 3)


def test_blank_lines_are_passed_over_and_counted() -> None:
    lines = b"\n" + GOOD + b"\n \t\r\n\n" + GOOD + b"\nx\n"
    assert parsed(lines) == ([GOOD_TEXT] * 2, [("not_json", 6)], 6)


# Lines that compiled code reads, that msgspec reads, and that Python's own parser does.
FORMS = {
    "text first": '{"text": %s, "meta": {}}',
    "no blank": '{"text":%s}',
    "text last": '{"meta": {}, "text": %s}',
    "another blank": '{"text" : %s}',
    "text in what follows": '{"text": %s, "meta": {"kind": "text"}}',
    "NaN": '{"text": %s, "a": NaN}',
}
PIECES = [*'a\\"\n😀é中f0u /z\u2028\x01\x7f|<', "\\u", "\\ud83d", "\\ude00", "\\n", "<|endoftext|>", "x" * 70]
PIECED_TEXTS = st.lists(st.sampled_from(PIECES), max_size=60).map("".join) | st.text(max_size=60)


@settings(deadline=None, derandomize=True)
@given(st.lists(st.tuples(PIECED_TEXTS, st.sampled_from(list(FORMS)), st.booleans()), max_size=9), st.integers(1, 4))
def test_texts_of_any_form_come_back(lines: list[tuple[str, str, bool]], at_once: int) -> None:
    content = "\n".join(FORMS[form] % json.dumps(text, ensure_ascii=escaped) for text, form, escaped in lines)
    kinds = [["empty_text", None, "separator_in_text"][bool(text) + ("<|endoftext|>" in text)] for text, *_ in lines]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_lines, "LINES", at_once)
        found = parsed(content.encode())
    problems = [(kind, number) for number, kind in enumerate(kinds, 1) if kind]
    assert found == ([text.encode() for text, *_ in lines if text], problems, len(lines))


@pytest.mark.parametrize("key", ["", "t", "content", "正文", "a longer key than a word"])
@pytest.mark.parametrize("name", [*BAD_LINES, *KEPT_LINES])
def test_another_key_is_read_the_same(name: str, key: str) -> None:
    line = (BAD_LINES | KEPT_LINES)[name][0]
    other = line.replace(b'"text"', f'"{key}"'.encode()).replace(
        rb"te\u0078t", "".join(f"\\u{ord(c):04x}" for c in key).encode()
    )
    for padding in (b"", b"\n" + b" " * 100):
        assert parsed(other + padding, key)[:2] == parsed(line + padding)[:2]


def as_python_reads(line: bytes) -> str | None:
    try:
        value = json.loads(line.decode("utf-8", "surrogatepass"))["text"]
    except (ValueError, TypeError, KeyError):
        return None
    return value if isinstance(value, str) else None


HALVES = dict.fromkeys(range(0xD800, 0xE000), "\ufffd")  # of surrogate pairs


MUTATIONS = st.sampled_from(  # what is put in place of a byte
    [b"", b'"', b"\\", b"\\u", b"\\u12", b"\\ud800", b"\x1f", b"\x7f", b"\xff", b"\xed\xa0\x80", b"\xc3"]
    + [b"}", b".5", b"e5"]
)


@settings(deadline=None, derandomize=True)
@given(PIECED_TEXTS, st.sampled_from(["text first", "no blank"]), st.booleans(), st.integers(0, 200), MUTATIONS)
def test_a_line_is_read_or_refused_as_python_does(text: str, form: str, escaped: bool, at: int, put: bytes) -> None:
    line = (FORMS[form] % json.dumps(text, ensure_ascii=escaped)).encode()
    line = line[:at] + put + line[at + 1 :]
    expected = as_python_reads(line)
    # At the end of a chunk, and with room behind it for whole blocks.
    for content in (line, line + b"\n" + b" " * 200):
        texts, problems, _ = parsed(content)
        if expected:
            assert texts == [expected.translate(HALVES).encode()]
        else:
            assert (texts, len(problems)) == ([], 1)


@pytest.mark.parametrize("padding", [0, 100])
def test_every_character_and_no_other_sequence_of_bytes(padding: int) -> None:
    """Each code point, escaped and not; each pair of bytes that may begin a character, with what may follow."""
    lines, texts = [], []
    for first in range(0, 0x110000, 64):
        text = "".join(chr(c) for c in range(first, first + 64) if not 0xD800 <= c < 0xE000)
        for escaped in (False, True) if text else ():
            lines.append(json.dumps({"text": text}, ensure_ascii=escaped).encode())
            texts.append(text.encode())
    assert parsed(b"\n".join(lines) + b"\n" + b" " * padding)[0] == texts
    kept = 0
    for first in range(0x80, 0x100):
        for second in range(0x80, 0x100):
            for rest in (b"", b"\x80", b"\x80\xbf", b"\x80\x7f"):
                content = bytes([first, second]) + rest
                try:
                    expected = [content.decode().encode()]
                except UnicodeDecodeError:
                    expected = None
                if expected or first != 0xED:  # else a surrogate, kept as U+FFFD
                    found = parsed(b'{"text": "%b"}' % content + b"\n" + b" " * padding)
                    assert found[0] == (expected or []), content
                    kept += bool(expected)
    assert kept > 2000


def test_other_texts_after_the_first_one_count() -> None:
    assert parsed(b'{"text": "a", "b": {"text": "c"}}')[0] == [b"a"]
    assert parsed(rb'{"text": "a", "te\u0078t": 5}') == ([], [("text_not_string", 1)], 1)
    assert parsed(rb'{"text": "a", "text": ""}') == ([], [("empty_text", 1)], 1)


def test_what_a_problem_says() -> None:
    content = b'{"text": {"a": 5}}\n[]\n{"text": "\xff"}\n{"text": "a\\ud800\\ud800"}'
    details = [problem.detail for problem in parse(Chunk(bytearray(content), len(content))).problems]
    assert details == ['it is {"a": 5}', "the line is a list", "byte 11: invalid start byte", "2 in this text"]


def test_a_text_that_is_too_long_is_left_out(monkeypatch) -> None:
    monkeypatch.setattr(json_lines, "MAX_TEXT_BYTES", 10)
    long = b"\n".join((form % f'"{"x" * 11}"').encode() for form in FORMS.values())
    texts, problems, _ = parsed(b"\n".join([GOOD, long, GOOD]))
    assert texts == [GOOD_TEXT] * 2
    assert problems == [("line_too_long", line) for line in range(2, 2 + len(FORMS))]


@settings(deadline=None, derandomize=True)
@given(st.lists(st.tuples(PIECED_TEXTS, st.sampled_from([f for f in FORMS if f != "NaN"]), st.booleans()), max_size=5))
def test_long_lines_are_read_the_same(lines: list[tuple[str, str, bool]]) -> None:
    content = "\n".join(FORMS[form] % json.dumps(text, ensure_ascii=escaped) for text, form, escaped in lines).encode()
    found = parsed(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_lines, "LONG_LINE_BYTES", 0)
        assert parsed(content) == found


def test_bad_long_lines(monkeypatch) -> None:
    monkeypatch.setattr(json_lines, "LONG_LINE_BYTES", 0)
    for name, (line, kind) in BAD_LINES.items():
        if name != "nested too deep":
            kind = "no_text" if name in ("a list", "a string") else kind
            assert parsed(line) == ([], [(kind, 1)], 1), name
    assert parsed(rb'{"text": "a\ud800b"}') == ([], [("not_json", 1)], 1)
    assert parsed(b"   ") == ([], [], 1)
