"""Compiling, of which Numba keeps the result on disk: done before any clock runs, and told where it takes its time."""

import functools
from contextlib import AbstractContextManager, nullcontext

import numpy as np
from numba.core import event

from tools.preparing.chunks import Chunk
from tools.preparing.json_lines import parse
from tools.preparing.text_encoders import TextEncoder


def told(shown: bool) -> AbstractContextManager:
    """Within it a person is told, once a program, that something is compiled and not only loaded."""
    return event.install_listener("numba:compile", _Listener()) if shown else nullcontext()


def compile_ahead(encoder: TextEncoder, *, json: bool) -> None:
    """Have what encodes compiled or loaded, and what reads lines of JSON where there will be any."""
    encoder.encoder()(np.empty(0, np.uint8), np.empty(0, np.int64))
    if json:
        line = bytearray(b'{"text":"a"}\n')
        parse(Chunk(line, len(line)))


class _Listener(event.Listener):
    def on_start(self, event: event.Event) -> None:
        _tell()

    def on_end(self, event: event.Event) -> None:
        pass


@functools.cache
def _tell() -> None:
    print("compiling the tokenizer, once: this takes about half a minute", flush=True)
