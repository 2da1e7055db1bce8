"""Real text from what a machine has already: manual pages, translations, web pages, Python and C sources."""

import gettext
import gzip
import hashlib
import site
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

SHARE = Path("/usr/share")
MAX_DOCUMENT_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Document:
    kind: str
    text: str


def read_plain(path: Path) -> str:
    """Return a UTF-8 text file's content."""
    return path.read_text(encoding="utf-8")


def read_manual(path: Path) -> str:
    """Return a manual page's source, gzipped or not."""
    return gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else read_plain(path)


def read_catalog(path: Path) -> str:
    """Return the translated messages of a gettext catalog, one after another."""
    with path.open("rb") as file:
        catalog = gettext.GNUTranslations(file)
    return "\n".join(message for key, message in catalog._catalog.items() if key)


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of text: its share of the whole, where its files are and how one is read."""

    name: str
    share: float
    roots: tuple[Path, ...]
    patterns: tuple[str, ...]
    read: Callable[[Path], str]


def kinds() -> list[Kind]:
    """Return the kinds of text looked for; one that a machine lacks leaves its share to the others."""
    packages = tuple(Path(folder) for folder in site.getsitepackages())
    libraries = (Path(sysconfig.get_path("stdlib")), *packages)
    manuals = SHARE / "man"
    languages = tuple(sorted(folder for folder in manuals.glob("*") if not folder.name.startswith("man")))
    sections = tuple(sorted(manuals.glob("man[1-9]")))
    includes = (Path("/usr/include"), *packages)
    return [
        Kind("manual pages, English", 0.20, sections, ("*.gz", "*.[1-9]"), read_manual),
        Kind("manual pages, other languages", 0.20, languages, ("*.gz", "*.[1-9]"), read_manual),
        Kind("translations", 0.10, (SHARE / "locale",), ("*.mo",), read_catalog),
        Kind("HTML", 0.20, (SHARE / "doc", Path("/usr/lib"), *packages), ("*.html",), read_plain),
        Kind("Python", 0.20, libraries, ("*.py",), read_plain),
        Kind("C and C++", 0.10, includes, ("*.h", "*.hpp"), read_plain),
    ]


def texts_of(kind: Kind) -> Iterator[str]:
    """Yield the different texts of a kind, in an order that mixes folders and depends on nothing but their paths."""
    paths = {path for root in kind.roots for pattern in kind.patterns for path in root.rglob(pattern)}
    seen = set()
    for path in sorted(paths, key=lambda path: hashlib.sha256(str(path).encode()).digest()):
        try:
            text = kind.read(path)[:MAX_DOCUMENT_BYTES]
            digest = hashlib.sha256(text.encode()).digest()
        except (OSError, UnicodeError):  # a dangling link, another encoding
            continue
        if text and digest not in seen:
            seen.add(digest)
            yield text


def documents(size_bytes: int) -> list[Document]:
    """Return about size_bytes of UTF-8, the kinds by their shares and taking turns; less where a machine has less."""
    rest = {kind: texts_of(kind) for kind in kinds()}
    chosen: dict[Kind, list[Document]] = {kind: [] for kind in rest}
    missing = size_bytes
    while missing > 0 and rest:
        shares = sum(kind.share for kind in rest)
        for kind, texts in list(rest.items()):
            budget = missing * kind.share / shares
            while budget > 0:
                text = next(texts, None)
                if text is None:
                    del rest[kind]
                    break
                chosen[kind].append(Document(kind.name, text))
                budget -= len(text.encode())
        missing = size_bytes - sum(len(document.text.encode()) for group in chosen.values() for document in group)
    turns = zip_longest(*chosen.values())
    return [document for turn in turns for document in turn if document is not None]
