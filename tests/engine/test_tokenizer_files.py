"""The files of an encoding give its ids in transformers, which reads them as its own."""

import json
import random

import pytest
import tiktoken

from engine.tokenizer import R50K_PATTERN, load_encoding, load_ranks
from engine.tokenizer_files import merges, tokenizer_files

CL100K_PATTERN = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"""
    r"""|\s+(?!\S)|\s"""
)
TEXT = [
    *("Hello, world!", " hello", "it's WE'LL", "'s", "1234567", "٣𝟘½", "naïve café", "中文 日本語", "😀👍🏽", "\u0301"),
    *(" ", "    ", "\t", "\n", "\r\n", "\x85", "\xa0", "\u3000", "\u200b", "\0", " .", "--", "==", "def f(x):\n\t"),
]


def read_by_transformers(folder, encoding, model_type="gpt2"):
    from transformers import AutoTokenizer

    for name, content in tokenizer_files(encoding, 128).items():
        (folder / name).write_text(json.dumps(content))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module", params=["r50k_base", "another"])
def both(request, tmp_path_factory):
    """An encoding and what transformers makes of its files."""
    encoding, model_type = load_encoding(), "gpt2"
    if request.param == "another":  # with another way to split, a gap in its ids, and several special tokens
        ranks = {token: rank + 3 * (rank > 30_000) for token, rank in load_ranks().items()}
        ranks[b"!\n"] = 50_290  # which r50k's way would split
        specials = {"<|endoftext|>": 30_002, "<|fim_prefix|>": 50_300}
        encoding = tiktoken.Encoding("other", pat_str=CL100K_PATTERN, mergeable_ranks=ranks, special_tokens=specials)
        model_type = "gpt_neox"
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
