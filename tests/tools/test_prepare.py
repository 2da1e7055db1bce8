"""Preparing: tiktoken's ids in the order of the inputs, whatever is in them; and what the program says."""

import gzip
import json
import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import zstandard

from engine.data import TokenFile
from tests.tools.conftest import TEXTS, command, ids, run_flags, texts, tokens, write_shard
from tools import prepare
from tools.prepare import find_inputs, main, summarize
from tools.preparing import pipeline, token_file
from tools.preparing.token_file import PrepareError, description_path, read_description


def test_documents_become_tiktokens_ids_in_order(tmp_path: Path) -> None:
    write_shard(tmp_path / "b.jsonl.zst", TEXTS)
    (tmp_path / "c.txt").write_text("no shard")
    (tmp_path / "a.jsonl").write_text('{"text": "first"}\n\n{"text": "second"}')
    with zstandard.open(tmp_path / "d.jsonl.zst", "wb") as file:
        file.write(b'{"text": "last"}\n')
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
        "text_key": "text",
        "split": None,
        "folder": ".",
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


def test_what_should_not_be_there_is_listed(tmp_path: Path) -> None:
    odd = ['{"text": "kept"}', '{"txt": 1}', '{"text": "half \\ud800"}', '{"text": "<|endoftext|>"}']
    lines = ["nonsense"] * 7 + odd
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    cut_off = write_shard(tmp_path / "b.jsonl.zst", texts(30))
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
    assert f"    {tmp_path}/a.jsonl:9: its keys are 'txt'" in report
    assert f"    {tmp_path}/a.jsonl:10: 1 in this text" in report
    assert f"    {tmp_path}/a.jsonl:11" in report
    assert report == summarize(tmp_path, prepare.prepare(find_inputs(tmp_path), out))  # a rerun says it again


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"content": "a", "id": 5}\n', "a.jsonl:1: its keys are 'content', 'id'"),
        ("a.jsonl", b'[{"text": "a"}]', "a.jsonl:1: the line is a list"),
        ("a.jsonl.zst", b'{"text": "a"}', "a.jsonl.zst:1: zstd decompress error: Unknown frame descriptor"),
        (
            "a.jsonl.zst",
            zstandard.compress(b'{"text": "a"}')[:-1],
            "a.jsonl.zst:1: the last zstd frame is not complete",
        ),
    ],
)
def test_where_there_is_no_text_the_reason_is_told(
    name: str, content: bytes, said: str, tmp_path: Path, capsys
) -> None:
    for path in (tmp_path / "train" / name, write_shard(tmp_path / "val" / name, TEXTS)):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    for _ in range(2):  # a rerun says it again
        assert main([*map(str, run_flags(tmp_path))]) == 2
        shown = capsys.readouterr()
        assert said in shown.out and f"no text in {name}: there is nothing to write" in shown.err
        assert ("--text_key names another" in shown.err) == ("a text:" in shown.out)


def test_texts_under_another_key(inputs: list[Path], tmp_path: Path) -> None:
    lines = b"".join(json.dumps({"content": text, "text": "title"}).encode() + b"\n" for text in TEXTS)
    for folder in ("train", "val"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.jsonl").write_bytes(lines)
    flags = [*map(str, run_flags(tmp_path))]
    for given, documents in ((["--text-key=content"], TEXTS), ([], ["title"] * len(TEXTS))):
        assert main([*flags, *given]) == 0
        assert tokens(tmp_path / "train.bin") == ids(documents)
    with pytest.raises(SystemExit, match="2"):
        main([*flags, '--text_key=a"b'])


def test_files_of_text_are_a_document_each(tmp_path: Path, capsys) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffline\r\n\n日本".encode())
    (tmp_path / "b.TXT.ZST").write_bytes(zstandard.compress(b"x" * 3_000_000))
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(TEXTS[3].encode()))
    (tmp_path / "d.txt").write_bytes(b"one\ntwo \xff")
    (tmp_path / "e.txt").touch()
    (tmp_path / "f.txt.gz").write_bytes(gzip.compress(b"cut off")[:-3])
    out = tmp_path / "out.bin"
    sources = prepare.prepare(find_inputs(tmp_path), out, max_data=1)
    assert tokens(out) == ids(["line\r\n\n日本", "x" * 3_000_000, TEXTS[3]])
    told = [line.strip().removeprefix(f"{tmp_path}/") for line in summarize(tmp_path, sources) if line[0] == " "]
    cut_off = "f.txt.gz:1: Compressed file ended before the end-of-stream marker was reached"
    assert told == [cut_off, "d.txt:2: byte 5", "e.txt:1", "c.txt.gz:1"]
    with pytest.raises(PrepareError, match=r"d.txt:2: not UTF-8"):
        prepare.prepare(find_inputs(tmp_path), out, strict=True)
    write_shard(tmp_path / "shard.JSONL.ZST", TEXTS)
    assert [path.name for path in find_inputs(tmp_path)] == ["shard.JSONL.ZST"]
    assert "a.txt, b.TXT.ZST, c.txt.gz and 3 more left out" in capsys.readouterr().out


BAD_ENDS = {
    "not JSON": ("x", "not JSON"),
    "no text": ("{}", "no object with a text"),
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
    paths = [write_shard(tmp_path / f"{name}.jsonl.zst", texts(50, seed)) for seed, name in enumerate("ab")]
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
    for input in inputs[:2]:
        os.utime(input, (1, 1))  # a copy has another time and the same content
    token_file._tell.cache_clear()
    assert "hashes" not in capsys.readouterr().out
    prepare.prepare(inputs, out)
    said = capsys.readouterr().out
    assert "nothing to do" in said and said.count("by their hashes") == 1
    assert written() == before
    assert not (tmp_path / "out.bin.parts").exists()


def test_a_changed_input_is_done_again(inputs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out.bin"
    prepare.prepare(inputs, out)
    write_shard(inputs[2], texts(3, 9))
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


def test_an_input_that_changes_meanwhile_is_refused(inputs, tmp_path: Path, monkeypatch) -> None:
    original = pipeline.parse

    def parse(chunk, text_key):
        os.utime(inputs[1], (1, 1))
        return original(chunk, text_key)

    monkeypatch.setattr(pipeline, "parse", parse)
    with pytest.raises(PrepareError, match="01.jsonl.zst changed while it was read"):
        prepare.prepare(inputs[1:2], tmp_path / "out.bin")


def test_another_tokenizer_takes_nothing_over(inputs, expected, tmp_path: Path) -> None:
    out = tmp_path / "out.bin"
    prepare.prepare(inputs, out, "gpt2")
    assert read_description(out).tokenizer == "gpt2"
    prepare.prepare(inputs[:1], out, shard=(1, 1), max_data=2)
    prepare.prepare(inputs, out)
    assert (read_description(out).tokenizer, tokens(out)) == ("r50k_base", expected)


def test_what_was_prepared_from_other_inputs_is_not_replaced(tmp_path: Path) -> None:
    own, other = (write_shard(tmp_path / folder / "a.jsonl.zst", texts(5, seed)) for seed, folder in enumerate("xy"))
    out = tmp_path / "out.bin"
    prepare.prepare([own], out)
    with pytest.raises(
        PrepareError, match=rf"out.bin was prepared from a.jsonl.zst in {tmp_path}/x, .* {tmp_path}/y: "
    ):
        prepare.prepare([other], out)
    assert tokens(out) == ids(texts(5, 0))
    prepare.prepare([other], out, overwrite=True)
    assert tokens(out) == ids(texts(5, 1))
    moved = other.parent.rename(tmp_path / "moved") / other.name
    added = write_shard(tmp_path / "moved" / "b.jsonl.zst", texts(5, 2))
    prepare.prepare([moved, added], out)  # elsewhere now, but the same
    moved.unlink()
    prepare.prepare([added], out)  # no longer all, but of the same folder
    assert tokens(out) == ids(texts(5, 2))


def test_a_file_that_was_not_prepared_is_not_replaced(inputs: list[Path], tmp_path: Path) -> None:
    content = inputs[0].read_bytes()
    with pytest.raises(PrepareError, match="00.jsonl.zst is one of the shards"):
        prepare.prepare(inputs, inputs[0], overwrite=True)
    for note in (None, '{"source": "the note of a shard"}'):
        if note:
            description_path(inputs[0]).write_text(note)
        with pytest.raises(PrepareError, match="00.jsonl.zst is there already, .*: move it away"):
            prepare.prepare(inputs[1:], inputs[0], overwrite=True)
    assert inputs[0].read_bytes() == content


def test_outputs_are_looked_at_before_anything_is_prepared(tmp_path: Path, capsys) -> None:
    for folder in ("train", "val"):
        write_shard(tmp_path / folder / "a.jsonl.zst", TEXTS)
    flags = [str(flag) for flag in run_flags(tmp_path)]
    with pytest.raises(SystemExit, match="2"):
        main([*flags, f"--out_val_file={tmp_path}/val/../train.bin"])
    assert "train.bin: name two files" in capsys.readouterr().err
    (tmp_path / "val.bin").write_bytes(b"precious")
    assert main(flags) == 2
    assert "val.bin is there already" in capsys.readouterr().err
    assert not (tmp_path / "train.bin").exists() and (tmp_path / "val.bin").read_bytes() == b"precious"


@pytest.mark.parametrize(
    "names", [("00.jsonl", "00.jsonl.zst"), ("00.JSONL.GZ", "00.jsonl.zst"), ("a.txt", "a.txt.gz")]
)
def test_an_input_that_lies_there_twice_is_refused(names: tuple[str, str], tmp_path: Path) -> None:
    for name in (*names, "a.jsonlines", "00.json"):
        (tmp_path / name).touch()
    with pytest.raises(PrepareError, match=f"{names[0]} and {names[1]}: the same (shard|text) twice. move one away"):
        find_inputs(tmp_path)


def test_hundreds_of_inputs_are_not_all_named(tmp_path: Path, capsys) -> None:
    for i in range(24):
        (tmp_path / f"{i:02}.txt").write_text(f"{i} <|endoftext|>")
    out = tmp_path / "out.bin"
    with pytest.raises(PrepareError, match="24 of 24 inputs are not done: 00.txt, 01.txt, 02.txt and 21 more. Prepare"):
        prepare.prepare(find_inputs(tmp_path), out, merge=True)
    sources = prepare.prepare(find_inputs(tmp_path), out)
    assert summarize(tmp_path, sources)[-2:] == [
        f"    {tmp_path}/19.txt:1",
        "    and more in 20.txt, 21.txt, 22.txt and 1 more",
    ]
    (tmp_path / "24.txt").write_text("one more")
    capsys.readouterr()
    prepare.prepare(find_inputs(tmp_path), out)
    assert "keeping what it has of 00.txt, 01.txt, 02.txt and 21 more\n" in capsys.readouterr().out


def test_an_input_given_twice_is_refused(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.jsonl.zst", TEXTS)
    with pytest.raises(PrepareError, match="a.jsonl.zst is given twice"):
        prepare.prepare([path, path], tmp_path / "out.bin")
    with pytest.raises(PrepareError, match="no inputs"):
        prepare.prepare([], tmp_path / "out.bin")


def test_the_program(tmp_path: Path) -> None:
    write_shard(tmp_path / "train" / "00.jsonl.zst", texts(50))
    write_shard(tmp_path / "val" / "val.jsonl.zst", TEXTS)
    done = subprocess.run(command(*run_flags(tmp_path), cut=False), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert tokens(tmp_path / "train.bin") == ids(texts(50))
    assert tokens(tmp_path / "val.bin") == ids(TEXTS)
    assert f"{tmp_path}/val/val.jsonl.zst:4\n" in done.stdout  # TEXTS has a separator


ERRORS = {
    "no folder": ([], r"train does not exist\. .*python tools/download.py"),
    "empty folder": (["train"], r"train holds no shards .*python tools/download.py"),
    "no val": (["train/a.jsonl"], r"val does not exist.*; to validate on some of .*/train: --val_fraction 0.01\n"),
    "a file": (["train/a.jsonl", f"--train_dir={__file__}"], r"test_prepare.py is a file: name its folder"),
    "another ending": (["train/a.json"], r"train holds no shards .*\.jsonl.* and no texts \(\.txt, "),
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
    assert main([*map(str, run_flags(tmp_path)), *[flag for flag in given if flag.startswith("--")]]) == 2
    error = capfd.readouterr().err
    assert re.search(message, error) and error.startswith("error: ")


@pytest.mark.skipif(sys.platform != "linux", reason="needs a pseudo-terminal")
def test_a_terminal_shows_rates_and_time_left(tmp_path: Path) -> None:
    write_shard(tmp_path / "train" / "00.jsonl.zst", texts(50))
    write_shard(tmp_path / "val" / "val.jsonl.zst", TEXTS)
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (25, 120))
    subprocess.run(command(*run_flags(tmp_path)), stdout=subprocess.DEVNULL, stderr=theirs, check=True)
    os.close(theirs)
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert re.search(r"train.bin: 100%.*<.*B/s of text, .* tokens/s", shown)


@pytest.mark.slow
def test_memory_stays_far_under_two_gigabytes(tmp_path: Path) -> None:
    """Three documents of 200 MB, of the kind that takes most: with an emoji a str has four bytes a character."""
    unit = json.dumps(" ".join(TEXTS[:3]) * 1000, ensure_ascii=False)[1:-1].encode()
    path = tmp_path / "train" / "00.jsonl.zst"
    path.parent.mkdir()
    with zstandard.open(path, "wb") as file:
        for _ in range(3):
            file.write(b'{"text": "')
            for _ in range(200_000_000 // len(unit) + 1):
                file.write(unit)
            file.write(b'"}\n')
    write_shard(tmp_path / "val" / "val.jsonl.zst", TEXTS)
    # A child's peak begins with what its parent holds, which here may be gigabytes: so it is a small program's.
    program = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    run = [sys.executable, "-c", program, *map(str, command(*run_flags(tmp_path), "--workers", 2, cut=False))]
    assert int(subprocess.check_output(run)) * 1024 < 1.2e9
