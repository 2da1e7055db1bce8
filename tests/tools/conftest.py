"""What the tests of tools share: texts, shards of them and the ids that they become; a hub on loopback."""

import hashlib
import json
import random
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
import zstandard
from huggingface_hub.utils import close_session

from engine.tokenizer import END_OF_TEXT, load_encoding
from tools import prepare
from tools.download import REPOSITORY, download
from tools.fetching import hub as hubs
from tools.fetching.shards import ShardError, read_note
from tools.preparing import pipeline, workers, workspace
from tools.preparing.workspace import Settings

TEXTS = [
    "Hello, world!", "  \n\n\t x", "naïve café 中文 日本語 😀👍🏽", "<|endoftext|>", "1234567 it's WE'LL\r\n", "a" * 999
]  # fmt: skip


def texts(count: int, seed: int = 0) -> list[str]:
    """Different documents, some short and some of a few kilobytes."""
    generator = np.random.default_rng(seed)
    words = " ".join(TEXTS).split(" ")
    sizes = generator.choice([1, 10, 100, 500], count, p=[0.3, 0.3, 0.3, 0.1])
    return [" ".join(generator.choice(words, size)) + f" {i}" for i, size in enumerate(sizes)]


def write_shard(path: Path, documents: list[str]) -> Path:
    lines = "".join(json.dumps({"text": text, "meta": {"pile_set_name": "test"}}) + "\n" for text in documents)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(zstandard.compress(lines.encode()))
    return path


def ids(documents: list[str]) -> list[int]:
    encoding = load_encoding()
    return [token for text in documents for token in [*encoding.encode_ordinary(text), END_OF_TEXT]]


def tokens(file: Path) -> list[int]:
    return np.fromfile(file, "<u2").tolist()


@pytest.fixture
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments of a few kilobytes, so that small inputs have many."""
    cut = {"chunk_bytes": 8000, "segment_chunks": 3}
    monkeypatch.setattr(prepare, "Settings", lambda **given: Settings(**given, **cut))
    for module in (workspace, pipeline):
        monkeypatch.setattr(module, "MERGED_BYTES", 10_000)
    monkeypatch.setattr(workers, "BYTES_A_PROCESS", 100)


@pytest.fixture
def inputs(tmp_path: Path) -> list[Path]:
    """Three shards of different sizes; the second has a few bad lines."""
    folder = tmp_path / "shards"
    found = [write_shard(folder / f"{i:02}.jsonl.zst", texts(count, i)) for i, count in enumerate((60, 25, 40))]
    lines = zstandard.ZstdDecompressor().decompressobj().decompress(found[1].read_bytes())
    found[1].write_bytes(zstandard.compress(b"x\n" + lines + b'{"text": ""}\n{"text": "\\ud800"}'))
    return found


@pytest.fixture
def expected() -> list[int]:
    return ids([*texts(60, 0), *texts(25, 1), "\ufffd", *texts(40, 2)])


def command(*arguments: object, cut: bool = True) -> list[str]:
    """The program, with small segments."""
    start = (
        "import functools, sys; from tools import prepare as p; from tools.preparing import workers;"
        "workers.BYTES_A_PROCESS = 100;"
        f"p.Settings = functools.partial(p.Settings, chunk_bytes=8000, segment_chunks=3) if {cut} else p.Settings;"
        "sys.exit(p.main(sys.argv[1:]))"
    )
    return [sys.executable, "-c", start, *map(str, arguments)]


def run_flags(root: Path) -> list[object]:
    """The flags of a run on root/train and root/val."""
    return [
        *("--train_dir", root / "train", "--out_train_file", root / "train.bin"),
        *("--val_dir", root / "val", "--out_val_file", root / "val.bin"),
    ]


COMMIT = "0123456789abcdef0123456789abcdef01234567"
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


@dataclass
class Hub:
    """What the server holds, how it behaves, and what it was asked."""

    repository: str
    files: dict[str, bytes]
    break_after: int | None = None  # bytes of a body before the connection is cut
    breaks: int = 10**9  # how many bodies are cut so
    statuses: list[int] = field(default_factory=list)  # answered to the next requests instead of what they ask for
    alter: bool = False  # send other bytes than those listed
    ignore_ranges: bool = False
    bytes_per_second: float | None = None
    page: bytes | None = None  # answer everything with this, as a captive portal does
    requests: list[tuple[str, str, str | None, str | None]] = field(default_factory=list)  # method, path, range, token
    bytes_served: int = 0

    def __enter__(self) -> "Hub":
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def bodies(self) -> list[str | None]:
        """The ranges that storage was asked for, in order."""
        return [range_ for _, path, range_, _ in self.requests if path.startswith("/storage/")]

    def forget(self) -> None:
        self.requests.clear()
        self.bytes_served = 0


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.requests.append(("GET", path, self.headers["Range"], self.headers["Authorization"]))
        resolve = f"/datasets/{hub.repository}/resolve/{COMMIT}/"
        if hub.page is not None:
            self.answer(200, hub.page, {"Content-Type": "text/html"})
        elif hub.statuses:
            self.answer(hub.statuses.pop(0), b'{"error": "as the test wants it"}')
        elif path == f"/api/datasets/{hub.repository}/revision/main":
            siblings = [self.sibling(name, content) for name, content in hub.files.items()]
            listing = {"id": hub.repository, "sha": COMMIT, "siblings": siblings}
            self.answer(200, json.dumps(listing).encode(), {"Content-Type": "application/json"})
        elif path.startswith(resolve) and path.removeprefix(resolve) in hub.files:
            # As the hub does, large files come from storage under another host name.
            content = hub.files[path.removeprefix(resolve)]
            digest = hashlib.sha256(content).hexdigest()
            self.answer(
                302,
                headers={
                    "Location": f"http://localhost:{hub.port}/storage/{digest}",
                    "X-Repo-Commit": COMMIT,
                    "X-Linked-Size": str(len(content)),
                    "X-Linked-ETag": f'"{digest}"',
                },
            )
        elif path.startswith("/storage/"):
            self.send_stored(path.removeprefix("/storage/"))
        else:
            self.answer(404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})

    @staticmethod
    def sibling(name: str, content: bytes) -> dict:
        lfs = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        return {"rfilename": name, "size": len(content), "blobId": "0" * 40, "lfs": lfs}

    def answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def send_stored(self, digest: str) -> None:
        hub = self.hub
        content = next(content for content in hub.files.values() if hashlib.sha256(content).hexdigest() == digest)
        if hub.alter:
            content = bytes(byte ^ 1 for byte in content)
        start = 0
        if self.headers["Range"] and not hub.ignore_ranges:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("ETag", f'"{digest}"')
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        cut = hub.break_after is not None and hub.breaks > 0 and len(content) - start > hub.break_after
        end = start + hub.break_after if cut else len(content)
        hub.breaks -= cut
        step = 1 << 14
        for offset in range(start, end, step):
            piece = content[offset : min(offset + step, end)]
            try:
                self.wfile.write(piece)
            except ConnectionError:  # the client has what it wanted
                return
            hub.bytes_served += len(piece)
            if hub.bytes_per_second:
                time.sleep(len(piece) / hub.bytes_per_second)
        self.close_connection = cut


def noise_shard(seed: int, documents: int) -> bytes:
    """Return a `.jsonl.zst` of `documents` texts of about 2 kB, in several frames, that compresses to about half."""
    source = random.Random(seed)
    lines = [
        json.dumps({"text": source.randbytes(1000).hex() + " 你好", "meta": {"pile_set_name": "Noise"}}).encode()
        for _ in range(documents)
    ]
    parts = [b"\n".join([*lines[i : i + 100], b""]) for i in range(0, documents, 100)]
    return b"".join(zstandard.ZstdCompressor(write_checksum=True).compress(part) for part in parts)


FILES = {
    "val.jsonl.zst": noise_shard(0, 60),
    "train/00.jsonl.zst": noise_shard(1, 600),
    "train/01.jsonl.zst": noise_shard(2, 400),
}
TRAIN_00 = FILES["train/00.jsonl.zst"]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on loopback; the client has a token, no proxy, no patience, and reads in small pieces."""
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(hubs.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hubs, "WAIT_S", 0.001)
    monkeypatch.setattr(hubs, "CHUNK_BYTES", 1 << 14)
    close_session()  # one made earlier may have read other proxies
    with Hub(REPOSITORY, FILES) as server:
        yield server
    close_session()


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "train", tmp_path / "val"


def assert_complete(folders: tuple[Path, Path], train_max: int = 1) -> None:
    """The folders hold the whole shards, their notes, and nothing else."""
    train_dir, val_dir = folders
    for i in range(train_max):
        assert (train_dir / f"{i:02}.jsonl.zst").read_bytes() == FILES[f"train/{i:02}.jsonl.zst"]
        assert read_note(train_dir / f"{i:02}.jsonl.zst").whole
    assert (val_dir / "val.jsonl.zst").read_bytes() == FILES["val.jsonl.zst"]
    assert len(visible_files(train_dir)) == 2 * train_max and len(visible_files(val_dir)) == 2


def visible_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*") if not path.name.startswith("."))


def part_files(folder: Path) -> list[Path]:
    return list(folder.glob("*.part"))


def lose_network(hub: Hub, folders: tuple[Path, Path], after: int, size: str | None = None) -> None:
    """Let a download of the first training shard end for good after so many of its bytes."""
    hub.break_after = after
    with pytest.MonkeyPatch.context() as impatient:
        impatient.setattr(hubs, "RETRIES", 0)
        with pytest.raises(ShardError, match="cannot reach .*00.jsonl.zst"):
            download(*folders, size=size, endpoint=hub.endpoint)
    hub.break_after = None
