"""The class of every code point, as the encoder needs it: letter, number, white space or other.

python tools/bpe/classes.py    # reads the classes out of the installed tiktoken, rewrites code_point_classes.txt
"""

import itertools
from pathlib import Path

import numpy as np
import tiktoken

CLASSES_FILE = Path(__file__).parent / "code_point_classes.txt"
OTHER, LETTER, NUMBER, SPACE = 0, 1, 2, 3
CLASS_NAMES = {LETTER: "letter", NUMBER: "number", SPACE: "space"}
CODE_POINTS = 0x110000


def probe_code_point_classes() -> np.ndarray:
    """Return the class of every code point, uint8 (0x110000,), as the installed tiktoken's own regex engine sees it.

    An encoding whose pattern is `\\p{L}` alone and whose tokens are single bytes returns exactly the letters of a text.
    """
    classes = np.full(CODE_POINTS, OTHER, np.uint8)
    byte_ranks = {bytes([byte]): byte for byte in range(256)}
    surrogates = range(0xD800, 0xE000)
    text = "".join(chr(point) for point in range(CODE_POINTS) if point not in surrogates)
    for kind, pattern in ((LETTER, r"\p{L}"), (NUMBER, r"\p{N}"), (SPACE, r"\s")):
        probe = tiktoken.Encoding("probe", pat_str=pattern, mergeable_ranks=byte_ranks, special_tokens={})
        members = bytes(probe.encode_ordinary(text)).decode()
        classes[np.frombuffer(members.encode("utf-32-le"), "<u4")] = kind
    return classes


def write_code_point_classes(classes: np.ndarray) -> None:
    """Write uint8 (0x110000,) classes as lines of `first last class`; code points in no line are of class OTHER."""
    edges = [0, *(np.flatnonzero(np.diff(classes.astype(np.int8))) + 1).tolist(), CODE_POINTS]
    lines = [
        f"{first:04X} {end - 1:04X} {CLASS_NAMES[int(classes[first])]}\n"
        for first, end in itertools.pairwise(edges)
        if classes[first] != OTHER
    ]
    CLASSES_FILE.write_text("".join(lines), encoding="ascii")


def load_code_point_classes() -> np.ndarray:
    """Return the class of every code point, uint8 (0x110000,), from the packaged file."""
    kinds = {name: kind for kind, name in CLASS_NAMES.items()}
    classes = np.full(CODE_POINTS, OTHER, np.uint8)
    for line in CLASSES_FILE.read_text(encoding="ascii").splitlines():
        first, last, name = line.split()
        classes[int(first, 16) : int(last, 16) + 1] = kinds[name]
    return classes


if __name__ == "__main__":
    write_code_point_classes(probe_code_point_classes())
