"""Compiling before the work: all that a run needs, and told where it is not only loaded."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tools.conftest import TEXTS, run_flags, write_shard
from tools.preparing import compiling
from tools.preparing.text_encoders import load_text_encoder

MODULE = """
from numba import njit

@njit(cache=True)
def add(a, b):
    return a + b
"""


@pytest.mark.parametrize("shown", [True, False])
def test_what_is_compiled_is_told_once_and_what_is_kept_never(shown: bool, tmp_path: Path, capsys) -> None:
    file = tmp_path / "compiled.py"
    file.write_text(MODULE)
    for kept in (False, True):
        compiling._tell.cache_clear()
        spec = importlib.util.spec_from_file_location("compiled", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        with compiling.told(shown):
            assert module.add(1, 2) == 3 and module.add(1.5, 2) == 3.5
        told = shown and not kept
        assert capsys.readouterr().out.count("compiling the tokenizer, once") == told


PROGRAM = """
import sys
from tools import prepare
from tools.bpe.kernels import encode
from tools.preparing.json_lines import read_lines

class Progress(prepare.Progress):
    def __init__(self, *arguments, **options):
        print([len(function.signatures) for function in (encode, read_lines)])
        super().__init__(*arguments, **options)

prepare.Progress = Progress
code = prepare.main(sys.argv[1:])
print([len(function.signatures) for function in (encode, read_lines)])
sys.exit(code)
"""


def test_nothing_is_left_to_compile_when_the_clock_of_the_bar_starts(tmp_path: Path) -> None:
    for folder in ("train", "val"):
        write_shard(tmp_path / folder / "a.jsonl.zst", TEXTS)
    command = [sys.executable, "-c", PROGRAM, *map(str, run_flags(tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line[0] == "["] == ["[1, 1]"] * 3


def test_a_folder_of_texts_compiles_nothing_that_reads_json(monkeypatch) -> None:
    monkeypatch.setattr(compiling, "parse", lambda chunk: 1 / 0)
    compiling.compile_ahead(load_text_encoder(), json=False)
    with pytest.raises(ZeroDivisionError):
        compiling.compile_ahead(load_text_encoder(), json=True)
