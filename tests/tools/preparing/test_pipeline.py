"""Many small inputs: looked at a few times each, encoded side by side, and passed over where another has them."""

import os
import threading
from pathlib import Path

import numpy as np
import pytest

from tests.tools.conftest import ids, tokens
from tools import prepare
from tools.preparing import pipeline
from tools.preparing.token_file import Source
from tools.preparing.workspace import Settings, Workspace


def write_texts(folder: Path, count: int, ending: str = "txt") -> list[Path]:
    folder.mkdir()
    for i in range(count):
        text = f"file {i}"
        (folder / f"{i:03}.{ending}").write_text(f'{{"text": "{text}"}}' if ending == "jsonl" else text)
    return sorted(folder.iterdir())


@pytest.mark.parametrize("ending", ["txt", "jsonl"])
def test_twice_as_many_inputs_are_twice_the_work(ending: str, tmp_path: Path, monkeypatch) -> None:
    looked, synced = [], []
    of, fsync = Source.of, os.fsync
    monkeypatch.setattr(Source, "of", lambda *named: (looked.append(named), of(*named))[1])
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append(file), fsync(file))[1])
    counts = []
    for count in (20, 40):
        inputs, out = write_texts(tmp_path / f"{count}", count, ending), tmp_path / f"{count}.bin"
        prepare.prepare(inputs, out, workers=1)
        assert tokens(out) == ids([f"file {i}" for i in range(count)])
        counts.append((len(looked), len(synced)))
        looked.clear(), synced.clear()
    assert counts[1][0] <= 2 * counts[0][0] and counts[1][1] == counts[0][1]


def test_text_files_are_encoded_side_by_side(tmp_path: Path, monkeypatch) -> None:
    parse_file, together = pipeline.parse_file, threading.Barrier(2)
    monkeypatch.setattr(pipeline, "parse_file", lambda chunk: (together.wait(10), parse_file(chunk))[1])
    prepare.prepare(write_texts(tmp_path / "texts", 4), tmp_path / "out.bin", workers=2)
    assert tokens(tmp_path / "out.bin") == ids([f"file {i}" for i in range(4)])


def test_a_text_file_that_another_process_has_is_not_read(tmp_path: Path, monkeypatch) -> None:
    inputs, out = write_texts(tmp_path / "texts", 2), tmp_path / "out.bin"
    workspace = Workspace(out, inputs, Settings(tokenizer="r50k_base"), np.dtype("<u2"))
    opened, stream = [], pipeline.ShardStream
    monkeypatch.setattr(pipeline, "ShardStream", lambda path: (opened.append(path), stream(path))[1])
    monkeypatch.setattr(prepare, "PATIENCE_S", 0)
    with workspace.locked(shared=True):
        segment = workspace.take(inputs[0], 0)
        with pytest.raises(prepare.PrepareError, match="another run is preparing .*000.txt"):
            prepare.prepare(inputs, out, workers=1, shard=(1, 1))
        segment.abandon()
    assert opened == inputs[1:]
