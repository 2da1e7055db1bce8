"""Texts to token ids, by the name of the tokenizer."""

import functools
from collections.abc import Callable

import numpy as np

from engine.tokenizer import DEFAULT_TOKENIZER, END_OF_TEXT, canonical, load_encoding
from tools.bpe import Encoder

Encode = Callable[[np.ndarray, np.ndarray], np.ndarray]


class TextEncoder:
    """A tokenizer for all threads of a process; `encode()` makes each thread its own encoder.

    ValueError where the tokenizer is unknown or has no `<|endoftext|>`.
    """

    def __init__(self, name: str = DEFAULT_TOKENIZER) -> None:
        self.name = name
        self.ours = canonical(name) == DEFAULT_TOKENIZER
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
        """Return a function for one thread: documents to the ids of all of them, end_of_text after each.

        It takes text, uint8 (n,), UTF-8 end to end, and ends, int64 (documents,), where each ends.
        """
        return self._encode_ours() if self.ours else self._encode_with_tiktoken

    def _encode_ours(self) -> Encode:
        worker = self._encoder.worker()
        return lambda text, ends: worker.encode(text, ends).astype(self.dtype, copy=False)

    def _encode_with_tiktoken(self, text: np.ndarray, ends: np.ndarray) -> np.ndarray:
        texts = [part.tobytes().decode() for part in np.split(text, ends[:-1])] if ends.size else []
        documents = self._encoding.encode_ordinary_batch(texts, num_threads=1)
        for document in documents:
            document.append(self.end_of_text)
        return np.concatenate([np.array(document, self.dtype) for document in documents] or [np.empty(0, self.dtype)])


load_text_encoder = functools.cache(TextEncoder)  # its tables take a while to build
