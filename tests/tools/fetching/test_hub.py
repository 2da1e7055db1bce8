"""The real client before a hub that breaks, refuses, is busy, out of reach or none at all."""

from pathlib import Path

import pytest

from tests.tools.conftest import FILES, TRAIN_00, Hub, assert_complete
from tools.download import REPOSITORY, download
from tools.fetching import hub as hubs
from tools.fetching.shards import ShardError


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


def test_server_without_ranges(hub: Hub, folders: tuple[Path, Path]) -> None:
    hub.ignore_ranges, hub.break_after, hub.breaks = True, 300_000, 1
    download(*folders, endpoint=hub.endpoint)
    assert_complete(folders)


@pytest.mark.parametrize(
    "status, advice",
    [
        (401, "the hub refuses .401.*HF_TOKEN"),
        (403, "the hub refuses .403.*HF_TOKEN"),
        (404, "the hub has no such dataset or file .404"),
        (500, "the hub is busy .500.*again in some minutes"),
        (418, "the hub answers 418: as the test wants it"),
    ],
)
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
