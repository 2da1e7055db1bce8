"""Shards as bytes: every way of being cut off or damaged is noticed, and everything before the damage is delivered."""

import gzip
import hashlib
from pathlib import Path

import pytest
import zstandard

from tools.preparing.shard_stream import ShardStream

CONTENT = b"".join(b"line %d of some text that compresses a little\n" % (i * i) for i in range(60))
SKIPPABLE = (0x184D2A53).to_bytes(4, "little") + (7).to_bytes(4, "little") + b"unknown"


def compress(content: bytes, **options: bool) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(content)


def stream_compress(content: bytes) -> bytes:
    """A frame that does not say how long its content is, in blocks of its own choosing."""
    compressor = zstandard.ZstdCompressor(write_checksum=True).compressobj()
    parts = [compressor.compress(content[:900]), compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)]
    return b"".join([*parts, compressor.compress(content[900:]), compressor.flush()])


FRAMES = {
    "one frame": (compress(CONTENT),),
    "checksum": (compress(CONTENT, write_checksum=True),),
    "blocks": (stream_compress(CONTENT),),
    "several frames": (compress(CONTENT[:1000]), compress(CONTENT[1000:], write_checksum=True)),
    "empty frame": (compress(b""), compress(CONTENT)),
    "skippable frames": (SKIPPABLE, stream_compress(CONTENT), SKIPPABLE),
    "incompressible": (compress(hashlib.shake_256(b"x").digest(3000)),),
    "run of one byte": (compress(b"a" * 300_000),),
}


def read(path: Path, step: int = 1000) -> tuple[bytes, ShardStream]:
    content, buffer = b"", memoryview(bytearray(step))
    with ShardStream(path) as stream:
        while count := stream.readinto(buffer):
            content += buffer[:count]
    return content, stream


@pytest.mark.parametrize("name", FRAMES)
@pytest.mark.parametrize("step", [7, 1 << 20])
def test_zstd_frames_are_read_whole(name: str, step: int, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(b"".join(FRAMES[name]))
    content, stream = read(path, step)
    frames = [frame for frame in FRAMES[name] if frame != SKIPPABLE]
    expected = b"".join(zstandard.ZstdDecompressor().decompressobj().decompress(frame) for frame in frames)
    assert content == expected
    assert stream.fault is None
    assert stream.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert stream.consumed == path.stat().st_size


@pytest.mark.parametrize("name", FRAMES)
def test_a_file_cut_off_anywhere_but_between_frames_is_truncated(name: str, tmp_path: Path) -> None:
    whole = b"".join(FRAMES[name])
    ends = {sum(map(len, FRAMES[name][: i + 1])) for i in range(len(FRAMES[name]))}
    path = tmp_path / "a.jsonl.zst"
    for size in {*range(min(len(whole), 60)), *range(max(0, len(whole) - 60), len(whole) + 1), *ends}:
        path.write_bytes(whole[:size])
        _, stream = read(path)
        if size in ends:
            assert stream.fault is None, size
        else:
            assert stream.fault[0] == "truncated_file", size
            assert stream.sha256 is None


def test_all_that_is_before_the_damage_is_delivered(tmp_path: Path) -> None:
    frames = [compress(b"%05d\n" % i * 2000, write_checksum=True) for i in range(40)]
    damaged = bytearray(b"".join(frames))
    at = sum(map(len, frames[:30])) + len(frames[30]) - 2  # in a checksum
    damaged[at] ^= 1
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(damaged)
    content, stream = read(path, 1 << 22)
    assert stream.fault[0] == "corrupt_file"
    assert content.startswith(b"".join(b"%05d\n" % i * 2000 for i in range(30)))


@pytest.mark.parametrize(
    "content", [b"no zstd at all", b"\x28\xb5\x2f\xfd" + b"\xff" * 40, FRAMES["one frame"][0] + b"rest"]
)
def test_what_is_not_zstd_is_corrupt(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(content)
    assert read(path)[1].fault[0] == "corrupt_file"


def test_gzip(tmp_path: Path) -> None:
    whole = gzip.compress(CONTENT[:500]) + gzip.compress(CONTENT[500:])
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(whole)
    content, stream = read(path)
    assert (content, stream.fault) == (CONTENT, None)
    path.write_bytes(whole[:-9])
    content, stream = read(path)
    assert stream.fault[0] == "truncated_file" and content.startswith(CONTENT[:500])
    damaged = bytearray(whole)
    damaged[-6] ^= 1  # in the checksum
    path.write_bytes(damaged)
    assert read(path)[1].fault[0] == "corrupt_file"
    path.write_bytes(b"no gzip")
    assert read(path)[1].fault[0] == "corrupt_file"


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst", "a.jsonl.gz"])
def test_skipping(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes({".jsonl": CONTENT, ".zst": compress(CONTENT), ".gz": gzip.compress(CONTENT)}[path.suffix])
    with ShardStream(path) as stream:
        stream.skip(777)
        buffer = bytearray(100)
        assert stream.readinto(memoryview(buffer)) == 100
        assert buffer == CONTENT[777:877]
        stream.skip(1 << 30)
        assert stream.readinto(memoryview(buffer)) == 0
        assert stream.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
