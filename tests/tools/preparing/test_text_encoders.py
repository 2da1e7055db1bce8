"""Tokenizers other than r50k_base: ids as wide as they need, and a separator."""

import re
from pathlib import Path

import pytest
import requests
import tiktoken

from engine.data import TokenFile
from tests.tools.conftest import TEXTS, run_flags, write_shard
from tools import prepare
from tools.preparing import text_encoders
from tools.preparing.token_file import read_description


@pytest.mark.parametrize(("size", "dtype"), [(1 << 16, "uint16"), ((1 << 16) + 1, "uint32")])
def test_other_tokenizers_have_the_width_their_ids_need(size: int, dtype: str, tmp_path: Path, monkeypatch) -> None:
    ranks = {bytes([i]): i for i in range(256)} | {b"abc"[i : i + 2]: 256 + i for i in range(2)}
    special = {"<|endoftext|>": size - 1}
    encoding = tiktoken.Encoding("other", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens=special)
    monkeypatch.setattr(text_encoders, "load_encoding", lambda name: encoding)
    monkeypatch.setattr(prepare, "load_text_encoder", text_encoders.TextEncoder)
    out = tmp_path / "out.bin"
    prepare.prepare([write_shard(tmp_path / "a.jsonl.zst", TEXTS)], out, "other")
    file = TokenFile(out)
    assert read_description(out).dtype == dtype
    assert (file.tokenizer, file.end_of_text, file.vocab_size) == ("other", size - 1, size)
    assert file.tokens.tolist() == [i for text in TEXTS for i in [*encoding.encode_ordinary(text), size - 1]]


def test_a_tokenizer_without_a_separator_is_refused(tmp_path: Path, monkeypatch) -> None:
    ranks = {bytes([i]): i for i in range(256)}
    encoding = tiktoken.Encoding("bare", pat_str=".", mergeable_ranks=ranks, special_tokens={})
    monkeypatch.setattr(text_encoders, "load_encoding", lambda name: encoding)
    with pytest.raises(ValueError, match="'bare' has no <|endoftext|>"):
        text_encoders.TextEncoder("bare")


def test_a_vocabulary_that_cannot_be_had(tmp_path: Path, monkeypatch, capsys) -> None:
    def refuse(url: str) -> None:
        raise requests.ConnectionError("a page of reasons", request=requests.Request("GET", url).prepare())

    monkeypatch.setattr(requests, "get", refuse)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    for folder in ("train", "val"):
        write_shard(tmp_path / folder / "a.jsonl.zst", ["text"])
    assert prepare.main([*map(str, run_flags(tmp_path)), "--tokenizer_name=cl100k_base"]) == 2
    assert re.fullmatch(
        r"error: the download that cl100k_base needs of https://\S+cl100k_base.tiktoken failed "
        r"\(ConnectionError\): check network and proxy; r50k_base needs none\n",
        capsys.readouterr().err,
    )
