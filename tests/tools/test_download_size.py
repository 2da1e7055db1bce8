"""Downloads of the first so many bytes of text, `--size`: whole lines, no more of the shard than they need."""

import hashlib
import io
import json
from pathlib import Path

import pytest
import zstandard

from tests.tools.conftest import FILES, TRAIN_00, Hub, assert_complete, lose_network, part_files, visible_files
from tools import download as downloads
from tools.download import SIZES, download
from tools.fetching.shards import ShardError, read_note


def lines(content: bytes) -> list[bytes]:
    stream = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(content), read_across_frames=True)
    text = stream.read()
    assert text.endswith(b"\n")
    return text.split(b"\n")[:-1]


def text_bytes(some: list[bytes]) -> int:
    return sum(len(json.loads(line)["text"].encode()) for line in some)


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
    assert visible_files(folders[0]) == ["00.jsonl.zst", "00.jsonl.zst.json"]
    assert visible_files(folders[1]) == ["val.jsonl.zst", "val.jsonl.zst.json"]
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
    assert [part.stat().st_size for part in part_files(folders[0])] == [150_000]
    assert not list(folders[0].glob("*.tmp"))
    hub.forget()
    download(*folders, size="medium", endpoint=hub.endpoint)
    assert hub.bodies == ["bytes=150000-"]
    assert visible_files(folders[0]) == ["00.jsonl.zst", "00.jsonl.zst.json"]
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
    assert visible_files(folders[1]) == []


def test_altered_end_is_found_when_size_takes_it_all(hub: Hub, folders: tuple[Path, Path], sizes: None) -> None:
    # What a decoder skips can differ without any error but that of the hash.
    content = TRAIN_00 + b"\x50\x2a\x4d\x18\x04\0\0\0same"
    hub.files = FILES | {"train/00.jsonl.zst": content}
    folders[0].mkdir()
    part = folders[0] / f"00.jsonl.zst.{hashlib.sha256(content).hexdigest()[:12]}.part"
    part.write_bytes(content[:-4] + b"else")
    with pytest.raises(ShardError, match="00.jsonl.zst arrived damaged"):
        download(*folders, size="large", endpoint=hub.endpoint)
    assert visible_files(folders[0]) == []


def test_lines_without_text_are_passed_on(hub: Hub, folders: tuple[Path, Path], sizes: None) -> None:
    good = b'{"text": "%s"}\n' % (b"x" * 50_000)
    bad = b'{"text": 1}\nno json\n\n'
    hub.files = {name: zstandard.compress(bad + 20 * good) for name in FILES}
    download(*folders, size="small", endpoint=hub.endpoint)
    content = zstandard.ZstdDecompressor().stream_reader((folders[0] / "00.jsonl.zst").read_bytes()).read()
    assert content == bad + 4 * good
