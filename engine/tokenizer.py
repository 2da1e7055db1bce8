"""Encodings by name. GPT-2's `r50k_base` comes from the vocabulary in this package, never from the network."""

import base64
import functools
import hashlib
from pathlib import Path

import tiktoken

VOCABULARY_FILE = Path(__file__).parent / "vocabulary" / "r50k_base.tiktoken"
VOCABULARY_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"  # the hash tiktoken expects
R50K_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
END_OF_TEXT = 50256
DEFAULT_TOKENIZER = "r50k_base"


def load_ranks() -> dict[bytes, int]:
    """Return r50k_base's 50,256 tokens with their ranks; ValueError where the packaged file was altered."""
    content = VOCABULARY_FILE.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != VOCABULARY_SHA256:
        raise ValueError(
            f"{VOCABULARY_FILE} is damaged: sha256 {digest}, expected {VOCABULARY_SHA256}; reinstall pilesmith"
        )
    pairs = (line.split() for line in content.splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


def canonical(name: str) -> str:
    """Return the one of an encoding's names that is recorded and compared."""
    return DEFAULT_TOKENIZER if name == "gpt2" else name


@functools.cache
def load_encoding(name: str = DEFAULT_TOKENIZER) -> tiktoken.Encoding:
    """Return the encoding called `name`; ValueError where it is not known, or cannot be had.

    All but r50k_base and gpt2 are downloaded once.
    """
    if canonical(name) == DEFAULT_TOKENIZER:
        return tiktoken.Encoding(
            DEFAULT_TOKENIZER,
            pat_str=R50K_PATTERN,
            mergeable_ranks=load_ranks(),
            special_tokens={"<|endoftext|>": END_OF_TEXT},
        )
    if name not in tiktoken.list_encoding_names():
        raise ValueError(f"unknown tokenizer {name!r}; known: {', '.join(sorted(tiktoken.list_encoding_names()))}")
    try:
        return tiktoken.get_encoding(name)
    except OSError as error:  # one of requests', which names its request and has a page to say, or of the cache's disk
        request = getattr(error, "request", None)
        failure = f"of {request.url} failed ({type(error).__name__})" if request else f"failed ({error})"
        raise ValueError(
            f"the download that {name} needs {failure}: check network and proxy; {DEFAULT_TOKENIZER} needs none"
        ) from None
