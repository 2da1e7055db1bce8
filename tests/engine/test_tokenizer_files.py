"""The files of an encoding give its ids in transformers, which reads them as its own."""

import base64
import hashlib
import json
import random

import pytest
import tiktoken
from tiktoken_ext import openai_public

from engine.tokenizer import R50K_PATTERN, load_encoding, load_ranks
from engine.tokenizer_files import merges, tokenizer_files

TEXT = [
    *("Hello, world!", " hello", "it's WE'LL", "'s", "1234567", "٣𝟘½", "naïve café", "中文 日本語", "😀👍🏽", "\u0301"),
    *(" ", "    ", "\t", "\n", "\r\n", "\x85", "\xa0", "\u3000", "\u200b", "\0", " .", "--", "==", "def f(x):\n\t"),
    *("it's!\n", "it'S", "DON'T", "camelCase", "HTMLElement", " ǅ", "ʰ", "//\n/", " " * 25, " " * 30, "\n" + " " * 7),
]


def read_by_transformers(folder, encoding, model_type="gpt2"):
    from transformers import AutoTokenizer

    for name, content in tokenizer_files(encoding, 128).items():
        (folder / name).write_text(json.dumps(content))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return AutoTokenizer.from_pretrained(folder)


def ranks_of(name: str, sha256: str) -> dict[bytes, int]:
    """The ranks of p50k_base; for a larger encoding r50k's and a few more, up to its last, with a gap."""
    ranks = load_ranks()
    if name == "p50k_base":  # r50k's, and runs of spaces after the special token
        ranks |= {b" " * count: 50_255 + count for count in range(2, 26)}
        lines = b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())
        assert hashlib.sha256(lines).hexdigest() == sha256
        return ranks
    last = {"cl100k_base": 100_255, "o200k_base": 199_997}[name]
    ranks = {token: rank if rank < 30_000 else rank + last - 50_255 for token, rank in ranks.items()}
    return ranks | {b"!\n": 40_000, b"it's": 40_001, b"/\n": 40_002}  # which not every pattern splits


@pytest.fixture(scope="module", params=["r50k_base", "p50k_base", "cl100k_base", "o200k_base"])
def both(request, tmp_path_factory):
    """An encoding, with tiktoken's pattern and special tokens, and what transformers makes of its files."""
    name, model_type = request.param, "gpt2" if request.param == "r50k_base" else "gpt_neox"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openai_public, "load_tiktoken_bpe", lambda url, expected_hash: ranks_of(name, expected_hash))
        encoding = load_encoding() if name == "r50k_base" else tiktoken.Encoding(**getattr(openai_public, name)())
    return encoding, read_by_transformers(tmp_path_factory.mktemp("tokenizer"), encoding, model_type)


def test_ids_are_tiktokens_and_decode_to_the_text(both):
    encoding, theirs = both
    generator = random.Random(0)
    for text in TEXT + ["".join(generator.choices(TEXT, k=generator.randint(1, 30))) for _ in range(1000)]:
        ids = theirs(text)["input_ids"]
        assert ids == encoding.encode_ordinary(text), repr(text)
        assert theirs.decode(ids) == text


def test_special_tokens_are_one_id_and_end_a_text(both):
    encoding, theirs = both
    for special in encoding.special_tokens_set:
        text = f"a {special} b"
        assert theirs(text)["input_ids"] == encoding.encode(text, allowed_special="all")
    assert (theirs.eos_token_id, theirs.bos_token_id, theirs.unk_token_id) == (encoding.eot_token,) * 3
    assert len(theirs) == len(encoding._mergeable_ranks) + len(encoding.special_tokens_set)
    assert theirs.model_max_length == 128
    assert theirs.decode([50_303]) == ""  # of a model with padded rows, however unlikely


def test_merges_are_in_the_order_of_the_ranks():
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"ab": 256, b"bc": 257, b"abc": 258, b"abcabc": 259}
    assert merges(ranks) == [(b"a", b"b"), (b"b", b"c"), (b"ab", b"c"), (b"abc", b"abc")]


def test_an_encoding_that_no_merges_give_is_refused():
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"abc": 256}
    encoding = tiktoken.Encoding("odd", pat_str=R50K_PATTERN, mergeable_ranks=ranks, special_tokens={})
    with pytest.raises(ValueError, match="no merge of two tokens makes b'abc'"):
        tokenizer_files(encoding, 128)
