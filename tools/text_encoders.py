"""Texts to token ids, by the name of the tokenizer."""
import functools
from collections.abc import Callable

import numpy as np

from engine.tokenizer import END_OF_TEXT, load_encoding
from tools.bpe import Encoder

Encode = Callable[[list[bytes]], np.ndarray]


class TextEncoder:
    """A tokenizer for all threads of a process; `encode()` makes each thread its own encoder.

    ValueError where the tokenizer is unknown or has no `<|endoftext|>`.
    """

    def __init__(self, name: str = "r50k_base") -> None:
        self.name = name
        self.ours = name in ("r50k_base", "gpt2")
        if self.ours:
            self.vocab_size, self.end_of_text = END_OF_TEXT + 1, END_OF_TEXT
            self._encoder = Encoder()
        else:
            self._encoding = load_encoding(name)
            self.vocab_size = self._encoding.n_vocab
            try:
                self.end_of_text = self._encoding.eot_token
            except KeyError:
                raise ValueError(f"tokenizer {name!r} has no <|endoftext|> to put between documents") from None
        self.dtype = np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")

    def encoder(self) -> Encode:
        """Return a function for one thread: UTF-8 texts to the ids of all of them, end_of_text after each."""
        return self._encode_ours() if self.ours else self._encode_with_tiktoken

    def _encode_ours(self) -> Encode:
        worker = self._encoder.worker()

        def encode(texts: list[bytes]) -> np.ndarray:
            ends = np.cumsum(np.fromiter(map(len, texts), np.int64, len(texts)))
            return worker.encode(np.frombuffer(b"".join(texts), np.uint8), ends).astype(self.dtype, copy=False)

        return encode

    def _encode_with_tiktoken(self, texts: list[bytes]) -> np.ndarray:
        documents = self._encoding.encode_ordinary_batch([text.decode() for text in texts], num_threads=1)
        for document in documents:
            document.append(self.end_of_text)
        return np.concatenate([np.array(document, self.dtype) for document in documents] or [np.empty(0, self.dtype)])


load_text_encoder = functools.cache(TextEncoder)  # its tables take a while to build
