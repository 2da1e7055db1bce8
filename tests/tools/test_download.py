"""Downloads of whole shards: resumed, verified, never twice, over nobody's file; and what the program says."""

import errno
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import filelock
import pytest

from tests.tools.conftest import (
    COMMIT,
    FILES,
    TRAIN_00,
    Hub,
    assert_complete,
    lose_network,
    noise_shard,
    part_files,
    visible_files,
)
from tools import download as downloads
from tools.download import REPOSITORY, download, main
from tools.fetching import hub as hubs
from tools.fetching.shards import Note, ShardError, read_note, write_note

PROGRAM = Path(downloads.__file__)


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


def test_rerun_after_a_lost_network_fetches_the_rest(hub: Hub, folders: tuple[Path, Path]) -> None:
    lose_network(hub, folders, after=200_000)
    assert [part.stat().st_size for part in part_files(folders[0])] == [200_000]
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
        while not any(part.stat().st_size > 200_000 for part in part_files(folders[0])):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        process.kill()
    (part,) = part_files(folders[0])
    kept = part.stat().st_size
    hub.forget()
    hub.bytes_per_second = None
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert "SHA-256 verified" in finished.stdout
    assert hub.bodies == [f"bytes={kept}-"]
    assert_complete(folders)


def test_altered_content_is_not_kept(hub: Hub, folders: tuple[Path, Path]) -> None:
    hub.alter = True
    with pytest.raises(ShardError, match="val.jsonl.zst arrived damaged"):
        download(*folders, endpoint=hub.endpoint)
    assert visible_files(folders[1]) == []
    hub.alter = False
    download(*folders, endpoint=hub.endpoint)
    assert_complete(folders)


def test_damaged_part_is_not_kept(hub: Hub, folders: tuple[Path, Path]) -> None:
    folders[0].mkdir()
    part = folders[0] / f"00.jsonl.zst.{hashlib.sha256(TRAIN_00).hexdigest()[:12]}.part"
    part.write_bytes(b"\0" + TRAIN_00[1:300_000])
    with pytest.raises(ShardError, match="00.jsonl.zst arrived damaged"):
        download(*folders, endpoint=hub.endpoint)
    assert visible_files(folders[0]) == []
    download(*folders, endpoint=hub.endpoint)
    assert_complete(folders)


def test_part_of_another_version_is_not_continued(hub: Hub, folders: tuple[Path, Path]) -> None:
    lose_network(hub, folders, after=200_000)
    hub.files = FILES | {"train/00.jsonl.zst": noise_shard(7, 600)}
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
    with pytest.raises(ShardError, match="746kB do not fit into the 746kB free .*--train_max.*--size small"):
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
    assert len(part_files(folders[1])) == 1
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


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--train_max", "31"], "--train_max 31: the Pile has training shards 1 to 30"),
        (["--train_max", "0"], "--train_max 0: the Pile has training shards 1 to 30"),
        (["--train_dir", "one", "--val_dir", "one"], "name two folders"),
        (["--source", "stdlib", "--train_dir", "one", "--val_dir", "one"], "name two folders"),
        (
            ["--source", "stdlib", "--train_dir", "file/train"],
            "cannot write file/train and data/val: .*Not a directory",
        ),
    ],
)
def test_what_a_person_reads(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert main(arguments) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("part", [["--size", "small"], ["--train_max", "3"]])
def test_the_embedded_corpus_is_taken_whole(part: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--source", "stdlib", *part])
    assert "--size and --train_max are for the Pile" in capsys.readouterr().err


def test_ctrl_c_says_one_line(hub: Hub, folders: tuple[Path, Path]) -> None:
    hub.bytes_per_second = 1e6
    command = [sys.executable, "-m", "tools.download", "--train_dir", folders[0], "--val_dir", folders[1]]
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        while not any(part.stat().st_size > 200_000 for part in part_files(folders[0])):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert (process.wait(30), process.stderr.read()) == (130, "interrupted; the same command goes on\n")


def test_interrupt(hub: Hub, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(downloads, "find_files", interrupted)
    assert main(["--train_dir", str(folders[0]), "--val_dir", str(folders[1])]) == 130
