"""An encoding as the files that transformers' AutoTokenizer reads, made without transformers.

tiktoken has ranks of tokens, and the tokenizers library merges of pairs: each token of several bytes is the merge of
the two that byte-pair encoding with the ranks below its own leaves of it. Both then do the same merges in one order.
"""

import re
from itertools import pairwise
from typing import Any

import tiktoken

TOKENIZER_FILE, TOKENIZER_CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"


def tokenizer_files(encoding: tiktoken.Encoding, block_size: int) -> dict[str, dict[str, Any]]:
    """Return the content of tokenizer.json and of tokenizer_config.json, by name.

    block_size: the model's context, in tokens. ValueError for an encoding that merges cannot say exactly.
    """
    characters = _byte_characters()
    written = lambda token: "".join(characters[byte] for byte in token)
    ranks, specials = encoding._mergeable_ranks, encoding._special_tokens
    # The tokenizers library takes a possessive "{1,3}+" for a repetition; it ends its alternative: greedy is the same.
    pattern = re.sub(r"(\{\d+,\d+\})\+", r"\1", encoding._pat_str)
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            dict(id=id, content=text, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
            for text, id in sorted(specials.items(), key=lambda special: special[1])
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level | {"trim_offsets": False},
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            # Special ones too: an added token that is not here takes the next free id, not its own.
            "vocab": {written(token): id for token, id in ranks.items()} | specials,
            "merges": [f"{written(left)} {written(right)}" for left, right in merges(ranks)],
        },
    }
    end_of_text = encoding.decode([encoding.eot_token])
    about = {
        # By this class tokenizer.json is taken as it is; GPT-NeoX's own would normalise the text.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end_of_text,
        "eos_token": end_of_text,
        "unk_token": end_of_text,
        "model_max_length": block_size,
        "clean_up_tokenization_spaces": False,  # or decoding would remove the space before a full stop
    }
    return {TOKENIZER_FILE: tokenizer, TOKENIZER_CONFIG_FILE: about}


def merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Return the two tokens that each token of several bytes is made of, in the order of their ranks.

    ValueError where a token is not made of two, so that no list of merges gives tiktoken's ids.
    """
    made = []
    for token in sorted((token for token in ranks if len(token) > 1), key=ranks.__getitem__):
        parts = _encode(ranks, token, ranks[token])
        if len(parts) != 2:
            raise ValueError(f"no merge of two tokens makes {token!r}")
        made.append((parts[0], parts[1]))
    return made


def _encode(ranks: dict[bytes, int], token: bytes, limit: int) -> list[bytes]:
    """Return what byte-pair encoding with the ranks below `limit` leaves of `token`."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 1:
        rank, at = min((ranks.get(a + b, limit), i) for i, (a, b) in enumerate(pairwise(parts)))
        if rank >= limit:
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def _byte_characters() -> list[str]:
    """Return the printable character that stands for each byte in byte-level BPE files (GPT-2, 2019)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
