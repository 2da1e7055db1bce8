"""Files of a dataset on the Hugging Face hub, read from their start, resumed where an earlier read broke off.

`huggingface_hub` finds, authenticates and retries; what it does not do (2.x) is go on with a file that an earlier
process left half fetched: it throws such a file away, which at eleven gigabytes a shard is not acceptable.
"""

import errno
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, get_session, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,  # of httpx or httpx2, whichever this version of the client is built on
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

from tools.fetching.shards import ShardError

CHUNK_BYTES = 1 << 20
TIMEOUT_S = 30.0  # without a byte
RETRIES = 5  # in a row without a byte, each after twice the wait of the one before
WAIT_S = 1.0
BUSY = {408, 429, 500, 502, 503, 504}  # status codes that go away by themselves


@dataclass(frozen=True)
class RemoteFile:
    """One file of a dataset at one commit."""

    repository: str
    revision: str  # commit
    path: str
    bytes: int
    sha256: str
    endpoint: str | None = None

    def __str__(self) -> str:
        return f"{self.repository}/{self.path}"


def find_files(repository: str, paths: Iterable[str], *, endpoint: str | None = None) -> list[RemoteFile]:
    """Return `paths` as they are at the newest commit; ShardError where the hub doesn't have them all."""
    address = endpoint or constants.ENDPOINT
    with explained(f"{repository} on {address}"):
        try:
            info = HfApi(endpoint=endpoint).dataset_info(
                repository, revision="main", files_metadata=True, timeout=TIMEOUT_S
            )
            listed = {sibling.rfilename: sibling.lfs for sibling in info.siblings or ()}
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, HTTPError):
                raise
            raise ShardError(
                f"{address} answers, but not like a Hugging Face hub: check HF_ENDPOINT and the proxy settings"
            ) from error
    if missing := [path for path in paths if listed.get(path) is None]:
        raise ShardError(
            f"{repository} on {address} has no file {missing[0]} with a checksum: see what it holds under its Files tab"
        )
    return [
        RemoteFile(repository, info.sha, path, bytes=listed[path].size, sha256=listed[path].sha256, endpoint=endpoint)
        for path in paths
    ]


def read_through(file: RemoteFile, kept: Path) -> Iterator[bytes]:
    """Yield the bytes of `file` from its start: those that `kept` holds, then the hub's, which are added to it."""
    with open(kept, "a+b") as store:
        store.seek(0)
        while chunk := store.read(CHUNK_BYTES):
            yield chunk
        for chunk in stream(file, store.tell()):
            store.write(chunk)
            yield chunk


def stream(file: RemoteFile, start: int = 0) -> Iterator[bytes]:
    """Yield the hub's bytes of `file` from offset `start` on, taking up a broken connection where it broke."""
    failures = 0
    while start < file.bytes:
        try:
            for chunk in _request(file, start):
                start += len(chunk)
                failures = 0
                yield chunk
            problem: Exception = ConnectionError(f"the connection closed {file.bytes - start} bytes early")
        except HfHubHTTPError as error:
            if error.response.status_code not in BUSY:
                raise
            problem = error
        except HTTPError as error:
            problem = error
        if start < file.bytes:
            if failures == RETRIES:
                raise problem
            time.sleep(WAIT_S * 2**failures)
            failures += 1


def _request(file: RemoteFile, start: int) -> Iterator[bytes]:
    url = hf_hub_url(file.repository, file.path, repo_type="dataset", revision=file.revision, endpoint=file.endpoint)
    # Offsets count stored bytes, so nothing on the way may compress them again.
    headers = build_hf_headers() | {"Accept-Encoding": "identity", "Range": f"bytes={start}-"}
    with get_session().stream("GET", url, headers=headers, timeout=TIMEOUT_S) as response:
        hf_raise_for_status(response)
        unwanted = start if response.status_code == 200 else 0  # 200: the server ignored the range and sends it all
        for chunk in response.iter_raw():  # as it comes: larger pieces would lose their start to a broken connection
            if unwanted >= len(chunk):
                unwanted -= len(chunk)
                continue
            yield chunk[unwanted:]
            unwanted = 0


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn the errors of network, hub and disk into a ShardError that says what to do about them."""
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise ShardError(f"{what} was not asked for: HF_HUB_OFFLINE is set; unset it to download") from error
    except HfHubHTTPError as error:
        raise ShardError(f"{what}: {_describe(error)}") from error
    except (HTTPError, ConnectionError) as error:
        raise ShardError(
            f"cannot reach {what} ({str(error) or type(error).__name__}): check the network, the proxy settings and "
            "HF_ENDPOINT, then run the same command again; without a network, --source stdlib gives text to train on"
        ) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ShardError(
                f"the disk is full, writing {what}: free some space and run the same command again, it goes on "
                "from where it was; or take less with --size small"
            ) from error
        raise ShardError(f"cannot write {what}: {error}") from error


def _describe(error: HfHubHTTPError) -> str:
    status = error.response.status_code
    if isinstance(error, GatedRepoError):
        return f"access has to be granted first ({status}): ask for it on the dataset's page, then `hf auth login`"
    if status in (401, 403):
        return (
            f"the hub refuses ({status}): the name is wrong, or the dataset is private, or the token in use "
            "(HF_TOKEN or `hf auth login`) is not valid for it"
        )
    if status == 404:
        return "the hub has no such dataset or file (404): check the name and HF_ENDPOINT"
    if status in BUSY:
        return f"the hub is busy ({status}): run the same command again in some minutes, it goes on from where it was"
    return f"the hub answers {status}: {error.server_message or 'no reason given'}"
