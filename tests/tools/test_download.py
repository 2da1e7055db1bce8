"""Downloads by the real client from a hub on loopback that breaks, lies, and counts what it serves."""
import errno
import hashlib
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import filelock
import pytest
import zstandard
from huggingface_hub.utils import close_session

from tools import download as downloads
from tools import hub as hubs
from tools.download import REPOSITORY, SIZES, download, main
from tools.shards import Note, ShardError, read_note, write_note

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PROGRAM = Path(downloads.__file__)
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


def shard(seed: int, documents: int) -> bytes:
    """Return a `.jsonl.zst` of `documents` texts of about 2 kB, in several frames, that compresses to about half."""
    source = random.Random(seed)
    lines = [
        json.dumps({"text": source.randbytes(1000).hex() + " 你好", "meta": {"pile_set_name": "Noise"}}).encode()
        for _ in range(documents)
    ]
    parts = [b"\n".join([*lines[i : i + 100], b""]) for i in range(0, documents, 100)]
    return b"".join(zstandard.ZstdCompressor(write_checksum=True).compress(part) for part in parts)


def lines(content: bytes) -> list[bytes]:
    stream = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(content), read_across_frames=True)
    text = stream.read()
    assert text.endswith(b"\n")
    return text.split(b"\n")[:-1]


def text_bytes(some: list[bytes]) -> int:
    return sum(len(json.loads(line)["text"].encode()) for line in some)


FILES = {"val.jsonl.zst": shard(0, 60), "train/00.jsonl.zst": shard(1, 600), "train/01.jsonl.zst": shard(2, 400)}
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
    assert len(visible(train_dir)) == 2 * train_max and len(visible(val_dir)) == 2


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*") if not path.name.startswith("."))


def parts(folder: Path) -> list[Path]:
    return list(folder.glob("*.part"))


def lose_network(hub: Hub, folders: tuple[Path, Path], after: int, size: str | None = None) -> None:
    """Let a download of the first training shard end for good after so many of its bytes."""
    hub.break_after = after
    with pytest.MonkeyPatch.context() as impatient:
        impatient.setattr(hubs, "RETRIES", 0)
        with pytest.raises(ShardError, match="cannot reach .*00.jsonl.zst"):
            download(*folders, size=size, endpoint=hub.endpoint)
    hub.break_after = None


def test_whole_shards_and_a_rerun_that_asks_nothing(hub: Hub, folders: tuple[Path, Path]) -> None:
    download(*folders, train_max=2, endpoint=hub.endpoint)
    assert_complete(folders, train_max=2)
    assert hub.bytes_served == sum(map(len, FILES.values()))
    note = read_note(folders[0] / "01.jsonl.zst")
    assert (note.source, note.revision, note.file) == (REPOSITORY, COMMIT, "train/01.jsonl.zst")
    hub.forget()
    download(*folders, train_max=2, endpoint=hub.endpoint)
    assert hub.requests == []
    (folders[0] / "01.jsonl.zst").unlink()
    download(*folders, train_max=2, endpoint=hub.endpoint)
    assert hub.bytes_served == len(FILES["train/01.jsonl.zst"])  # that one and no other


def test_token_stays_on_the_hub(hub: Hub, folders: tuple[Path, Path]) -> None:
    download(*folders, endpoint=hub.endpoint)
    for _, path, _, token in hub.requests:
        assert token == (None if path.startswith("/storage/") else "Bearer hf_secret")


def test_broken_connections_are_taken_up_where_they_broke(hub: Hub, folders: tuple[Path, Path]) -> None:
    hub.break_after = 60_000
    download(*folders, endpoint=hub.endpoint)
    assert_complete(folders)
    assert hub.bytes_served == len(FILES["val.jsonl.zst"]) + len(TRAIN_00)
    assert hub.bodies == ["bytes=0-", "bytes=60000-", *(f"bytes={start}-" for start in range(0, len(TRAIN_00), 60_000))]
    assert len(hub.bodies) > 2 * hubs.RETRIES  # each with something new: none of them counts as a failure for good


def test_rerun_after_a_lost_network_fetches_the_rest(hub: Hub, folders: tuple[Path, Path]) -> None:
    lose_network(hub, folders, after=200_000)
    assert [part.stat().st_size for part in parts(folders[0])] == [200_000]
    assert not (folders[0] / "00.jsonl.zst").exists()
    hub.forget()
    download(*folders, endpoint=hub.endpoint)
    assert hub.bodies == ["bytes=200000-"]
    assert hub.bytes_served == len(TRAIN_00) - 200_000
    assert_complete(folders)


def test_killed_process_goes_on_where_it_was(hub: Hub, folders: tuple[Path, Path]) -> None:
    hub.bytes_per_second = 1e6
    command = [sys.executable, PROGRAM, "--train_dir", folders[0], "--val_dir", folders[1]]
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        while not any(part.stat().st_size > 200_000 for part in parts(folders[0])):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        process.kill()
    (part,) = parts(folders[0])
    kept = part.stat().st_size
    hub.forget()
    hub.bytes_per_second = None
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert "SHA-256 verified" in finished.stdout
    assert hub.bodies == [f"bytes={kept}-"]
    assert_complete(folders)


def test_server_without_ranges(hub: Hub, folders: tuple[Path, Path]) -> None:
    hub.ignore_ranges, hub.break_after, hub.breaks = True, 300_000, 1
    download(*folders, endpoint=hub.endpoint)
    assert_complete(folders)


def test_altered_content_is_not_kept(hub: Hub, folders: tuple[Path, Path]) -> None:
    hub.alter = True
    with pytest.raises(ShardError, match="val.jsonl.zst arrived damaged"):
        download(*folders, endpoint=hub.endpoint)
    assert visible(folders[1]) == []
    hub.alter = False
    download(*folders, endpoint=hub.endpoint)
    assert_complete(folders)


def test_damaged_part_is_not_kept(hub: Hub, folders: tuple[Path, Path]) -> None:
    folders[0].mkdir()
    part = folders[0] / f"00.jsonl.zst.{hashlib.sha256(TRAIN_00).hexdigest()[:12]}.part"
    part.write_bytes(b"\0" + TRAIN_00[1:300_000])
    with pytest.raises(ShardError, match="00.jsonl.zst arrived damaged"):
        download(*folders, endpoint=hub.endpoint)
    assert visible(folders[0]) == []
    download(*folders, endpoint=hub.endpoint)
    assert_complete(folders)


def test_part_of_another_version_is_not_continued(hub: Hub, folders: tuple[Path, Path]) -> None:
    lose_network(hub, folders, after=200_000)
    hub.files = FILES | {"train/00.jsonl.zst": shard(7, 600)}
    download(*folders, endpoint=hub.endpoint)
    assert (folders[0] / "00.jsonl.zst").read_bytes() == hub.files["train/00.jsonl.zst"]


def test_shards_that_came_another_way_are_verified_not_fetched(hub: Hub, folders: tuple[Path, Path]) -> None:
    for folder, name in ((folders[0], "train/00.jsonl.zst"), (folders[1], "val.jsonl.zst")):
        folder.mkdir()
        (folder / Path(name).name).write_bytes(FILES[name])
    download(*folders, endpoint=hub.endpoint)
    assert hub.bytes_served == 0
    assert_complete(folders)


@pytest.mark.parametrize("content", [b"mine", bytes(len(TRAIN_00))])
@pytest.mark.parametrize("size", [None, "small"])
def test_a_persons_file_is_not_written_over(
    hub: Hub, folders: tuple[Path, Path], content: bytes, size: str | None
) -> None:
    folders[0].mkdir()
    (folders[0] / "00.jsonl.zst").write_bytes(content)
    with pytest.raises(ShardError, match="00.jsonl.zst is not .*nothing is written over it"):
        download(*folders, size=size, endpoint=hub.endpoint)
    assert (folders[0] / "00.jsonl.zst").read_bytes() == content
    assert hub.bytes_served == 0


def test_shortened_shard_is_not_taken_for_whole(hub: Hub, folders: tuple[Path, Path]) -> None:
    download(*folders, endpoint=hub.endpoint)
    file = folders[0] / "00.jsonl.zst"
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    os.truncate(file, 1000)
    os.utime(file, ns=times)
    with pytest.raises(ShardError, match="00.jsonl.zst is not"):
        download(*folders, endpoint=hub.endpoint)


def test_shard_of_another_dataset_is_not_written_over(hub: Hub, folders: tuple[Path, Path]) -> None:
    folders[0].mkdir()
    theirs = folders[0] / "00.jsonl.zst"
    theirs.write_bytes(b"theirs")
    digest = hashlib.sha256(b"theirs").hexdigest()
    write_note(theirs, Note(source="some/dataset", file="a.jsonl.zst", bytes=6, sha256=digest))
    with pytest.raises(ShardError, match="holds a.jsonl.zst of some/dataset"):
        download(*folders, endpoint=hub.endpoint)
    assert theirs.read_bytes() == b"theirs"


def test_embedded_corpus_gives_way_to_the_pile(hub: Hub, folders: tuple[Path, Path]) -> None:
    for folder, name in ((folders[0], "00.jsonl.zst"), (folders[1], "val.jsonl.zst")):
        folder.mkdir()
        (folder / name).write_bytes(b"embedded")
        digest = hashlib.sha256(b"embedded").hexdigest()
        write_note(folder / name, Note(source="stdlib", bytes=8, sha256=digest))
    download(*folders, endpoint=hub.endpoint)
    assert_complete(folders)


def test_disk_space_is_checked_before_anything_is_fetched(
    hub: Hub, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = len(TRAIN_00) + len(FILES["val.jsonl.zst"])
    usage = shutil.disk_usage(folders[0].parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    with pytest.raises(ShardError, match="746 kB do not fit into the 746 kB free .*--train_max.*--size small"):
        download(*folders, endpoint=hub.endpoint)
    assert hub.bytes_served == 0 and not folders[0].exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed))
    download(*folders, endpoint=hub.endpoint)
    assert_complete(folders)


def test_what_is_there_needs_no_space(hub: Hub, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    lose_network(hub, folders, after=200_000)
    usage = shutil.disk_usage(folders[0].parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=len(TRAIN_00) - 200_000))
    download(*folders, endpoint=hub.endpoint)
    assert_complete(folders)


def test_disk_that_fills_up_on_the_way(hub: Hub, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    stream = hubs.stream

    def full(file: hubs.RemoteFile, start: int = 0) -> Iterator[bytes]:
        yield next(stream(file, start))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hubs, "stream", full)
    with pytest.raises(ShardError, match="the disk is full, writing .*val.jsonl.zst: free some space"):
        download(*folders, endpoint=hub.endpoint)
    assert len(parts(folders[1])) == 1
    monkeypatch.setattr(hubs, "stream", stream)
    download(*folders, endpoint=hub.endpoint)
    assert_complete(folders)


def test_second_download_into_the_same_folder_is_refused(hub: Hub, folders: tuple[Path, Path]) -> None:
    folders[1].mkdir()
    with filelock.FileLock(folders[1] / ".download.lock"):
        with pytest.raises(ShardError, match="another download is writing to"):
            download(*folders, endpoint=hub.endpoint)
    download(*folders, endpoint=hub.endpoint)
    assert_complete(folders)


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("small", 200_000), ("medium", 700_000), ("large", 1_500_000)):
        monkeypatch.setitem(SIZES, name, size)
    monkeypatch.setattr(downloads, "VAL_SHARE", 5)


def assert_start_of(path: str, taken: Path, size: int) -> None:
    """`taken` holds the first lines of `path`, as many as make `size` bytes of text and not one more."""
    got, whole = lines(taken.read_bytes()), lines(FILES[path])
    assert got == whole[: len(got)] and len(got) < len(whole)
    assert text_bytes(got[:-1]) < size <= text_bytes(got)
    note = read_note(taken)
    assert (note.whole, note.file, note.documents, note.text_bytes) == (False, path, len(got), text_bytes(got))


def test_size_takes_the_first_lines(hub: Hub, folders: tuple[Path, Path], sizes: None) -> None:
    download(*folders, size="small", endpoint=hub.endpoint)
    assert_start_of("train/00.jsonl.zst", folders[0] / "00.jsonl.zst", 200_000)
    assert_start_of("val.jsonl.zst", folders[1] / "val.jsonl.zst", 40_000)
    assert visible(folders[0]) == ["00.jsonl.zst", "00.jsonl.zst.json"]
    assert visible(folders[1]) == ["val.jsonl.zst", "val.jsonl.zst.json"]
    hub.forget()
    download(*folders, size="small", endpoint=hub.endpoint)
    assert hub.requests == []


def test_size_leaves_the_rest_on_the_hub(hub: Hub, folders: tuple[Path, Path], sizes: None) -> None:
    hub.bytes_per_second = 2e6  # else loopback's buffers swallow more than was asked for
    download(*folders, size="small", endpoint=hub.endpoint)
    assert hub.bytes_served < (len(TRAIN_00) + len(FILES["val.jsonl.zst"])) * 0.7


def test_another_size_and_the_whole_replace_it(hub: Hub, folders: tuple[Path, Path], sizes: None) -> None:
    for size, wanted in (("small", 200_000), ("medium", 700_000)):
        download(*folders, size=size, endpoint=hub.endpoint)
        assert_start_of("train/00.jsonl.zst", folders[0] / "00.jsonl.zst", wanted)
    hub.forget()
    download(*folders, size="small", endpoint=hub.endpoint)  # there is more than that
    assert hub.requests == []
    download(*folders, endpoint=hub.endpoint)  # a part is not taken for the whole
    assert_complete(folders)
    hub.forget()
    download(*folders, size="large", endpoint=hub.endpoint)  # nor the whole for less
    assert hub.requests == []
    assert_complete(folders)


def test_size_goes_on_with_the_next_shard(hub: Hub, folders: tuple[Path, Path], sizes: None) -> None:
    download(*folders, train_max=2, size="large", endpoint=hub.endpoint)
    assert (folders[0] / "00.jsonl.zst").read_bytes() == TRAIN_00
    first = read_note(folders[0] / "00.jsonl.zst")
    assert first.whole and first.text_bytes == text_bytes(lines(TRAIN_00))
    assert_start_of("train/01.jsonl.zst", folders[0] / "01.jsonl.zst", 1_500_000 - first.text_bytes)
    assert read_note(folders[1] / "val.jsonl.zst").whole  # all of it is less than its share
    hub.forget()
    download(*folders, train_max=2, size="large", endpoint=hub.endpoint)
    assert hub.requests == []


def test_size_beyond_all_shards_takes_them_whole(hub: Hub, folders: tuple[Path, Path], sizes: None) -> None:
    download(*folders, size="large", endpoint=hub.endpoint)
    assert_complete(folders)
    hub.forget()
    download(*folders, size="large", endpoint=hub.endpoint)
    assert hub.requests == []


def test_interrupted_size_goes_on_and_writes_the_same(
    hub: Hub, folders: tuple[Path, Path], sizes: None, tmp_path: Path
) -> None:
    lose_network(hub, folders, after=150_000, size="medium")
    assert [part.stat().st_size for part in parts(folders[0])] == [150_000]
    assert not list(folders[0].glob("*.tmp"))
    hub.forget()
    download(*folders, size="medium", endpoint=hub.endpoint)
    assert hub.bodies == ["bytes=150000-"]
    assert visible(folders[0]) == ["00.jsonl.zst", "00.jsonl.zst.json"]
    download(tmp_path / "t", tmp_path / "v", size="medium", endpoint=hub.endpoint)
    assert lines((folders[0] / "00.jsonl.zst").read_bytes()) == lines((tmp_path / "t/00.jsonl.zst").read_bytes())


def test_size_leaves_a_longer_part_of_the_whole_alone(hub: Hub, folders: tuple[Path, Path], sizes: None) -> None:
    lose_network(hub, folders, after=600_000)
    hub.forget()
    download(*folders, size="small", endpoint=hub.endpoint)
    assert hub.bytes_served == 0
    download(*folders, endpoint=hub.endpoint)
    assert hub.bytes_served == len(TRAIN_00) - 600_000
    assert_complete(folders)


def test_size_of_altered_content_is_not_kept(hub: Hub, folders: tuple[Path, Path], sizes: None) -> None:
    hub.alter = True
    with pytest.raises(ShardError, match="val.jsonl.zst arrived damaged"):
        download(*folders, size="small", endpoint=hub.endpoint)
    assert visible(folders[1]) == []


def test_altered_end_is_found_when_size_takes_it_all(hub: Hub, folders: tuple[Path, Path], sizes: None) -> None:
    # What a decoder skips can differ without any error but that of the hash.
    content = TRAIN_00 + b"\x50\x2a\x4d\x18\x04\0\0\0same"
    hub.files = FILES | {"train/00.jsonl.zst": content}
    folders[0].mkdir()
    part = folders[0] / f"00.jsonl.zst.{hashlib.sha256(content).hexdigest()[:12]}.part"
    part.write_bytes(content[:-4] + b"else")
    with pytest.raises(ShardError, match="00.jsonl.zst arrived damaged"):
        download(*folders, size="large", endpoint=hub.endpoint)
    assert visible(folders[0]) == []


def test_lines_without_text_are_passed_on(hub: Hub, folders: tuple[Path, Path], sizes: None) -> None:
    good = b'{"text": "%s"}\n' % (b"x" * 50_000)
    bad = b'{"text": 1}\nno json\n\n'
    hub.files = {name: zstandard.compress(bad + 20 * good) for name in FILES}
    download(*folders, size="small", endpoint=hub.endpoint)
    content = zstandard.ZstdDecompressor().stream_reader((folders[0] / "00.jsonl.zst").read_bytes()).read()
    assert content == bad + 4 * good


@pytest.mark.parametrize("status, advice", [
    (401, "the hub refuses .401.*HF_TOKEN"),
    (403, "the hub refuses .403.*HF_TOKEN"),
    (404, "the hub has no such dataset or file .404"),
    (500, "the hub is busy .500.*again in some minutes"),
    (418, "the hub answers 418: as the test wants it"),
])
def test_refusals_of_the_listing(hub: Hub, folders: tuple[Path, Path], status: int, advice: str) -> None:
    hub.statuses = [status]
    with pytest.raises(ShardError, match=f"{REPOSITORY} on {hub.endpoint}: {advice}"):
        download(*folders, endpoint=hub.endpoint)
    assert not folders[0].exists()


@pytest.mark.parametrize("status", [403, 404])
def test_refusals_of_a_file(hub: Hub, folders: tuple[Path, Path], status: int) -> None:
    listing = hubs.find_files(REPOSITORY, ["val.jsonl.zst"], endpoint=hub.endpoint)
    hub.statuses = [status]
    with pytest.raises(ShardError, match=f"val.jsonl.zst: .*{status}"), hubs.explained(str(listing[0])):
        list(hubs.stream(listing[0]))
    assert len(hub.requests) == 2  # not asked again: it wouldn't help


def test_busy_hub_is_asked_again(hub: Hub) -> None:
    (file,) = hubs.find_files(REPOSITORY, ["val.jsonl.zst"], endpoint=hub.endpoint)
    hub.statuses = [503, 429, 503]
    assert b"".join(hubs.stream(file)) == FILES["val.jsonl.zst"]
    hub.statuses = [503] * 100
    with pytest.raises(ShardError, match="the hub is busy .503"), hubs.explained(str(file)):
        list(hubs.stream(file))
    assert len(hub.statuses) == 100 - 1 - hubs.RETRIES


def test_missing_shard(hub: Hub, folders: tuple[Path, Path]) -> None:
    with pytest.raises(ShardError, match="has no file train/02.jsonl.zst"):
        download(*folders, train_max=3, endpoint=hub.endpoint)
    assert hub.bytes_served == 0


def test_something_else_answers(hub: Hub, folders: tuple[Path, Path]) -> None:
    hub.page = b"<html>Please log in to the guest network</html>"
    with pytest.raises(ShardError, match="not like a Hugging Face hub: check HF_ENDPOINT"):
        download(*folders, endpoint=hub.endpoint)


def test_hub_out_of_reach(hub: Hub, folders: tuple[Path, Path]) -> None:
    hub.server.server_close()
    with pytest.raises(ShardError, match=f"cannot reach {REPOSITORY} on {hub.endpoint}.*--source stdlib"):
        download(*folders, endpoint=hub.endpoint)


def test_offline_mode(hub: Hub, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hubs.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ShardError, match="HF_HUB_OFFLINE is set"):
        download(*folders, endpoint=hub.endpoint)


@pytest.mark.parametrize("arguments, message", [
    (["--train_max", "31"], "--train_max 31: the Pile has training shards 1 to 30"),
    (["--train_max", "0"], "--train_max 0: the Pile has training shards 1 to 30"),
    (["--train_dir", "one", "--val_dir", "one"], "name two folders"),
    (["--source", "stdlib", "--train_dir", "one", "--val_dir", "one"], "name two folders"),
    (["--source", "stdlib", "--train_dir", "file/train"], "cannot write file/train and data/val: .*Not a directory"),
])
def test_what_a_person_reads(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert main(arguments) == 1
    assert re.search(message, capsys.readouterr().err)


def test_size_is_not_for_the_embedded_corpus(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--source", "stdlib", "--size", "small"])
    assert "--size is for the Pile" in capsys.readouterr().err


def test_interrupt(hub: Hub, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(downloads, "find_files", interrupted)
    assert main(["--train_dir", str(folders[0]), "--val_dir", str(folders[1])]) == 130
