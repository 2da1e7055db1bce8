"""From shards to token files: against what reading the shards alone takes, on the same cores, in the same run.

    pytest benchmarks/test_prepare.py -s        # writes results/prepare.json

`bare` is the floor of any such program in Python: decompress, find the lines, parse each, touch its text. All take
turns, so that what else the machine does meets all of them.
"""

import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zstandard

from benchmarks.corpus import documents
from benchmarks.environment import RESULTS, environment, write_result
from tools import prepare
from tools.preparing import workers
from tools.preparing.chunks import CHUNK_BYTES, ChunkReader
from tools.preparing.shard_stream import ShardStream

SIZE_BYTES = 100_000_000
ROUNDS = 5
INPUTS = 4
DOCUMENT_BYTES = 200_000_000


class Line(msgspec.Struct):
    text: str


def parsers() -> dict[str, Callable[[bytes], str]]:
    """Return what is installed to get the text out of a line."""
    decode = msgspec.json.Decoder(Line).decode
    found = {"msgspec": lambda line: decode(line).text, "json": lambda line: json.loads(line)["text"]}
    if importlib.util.find_spec("orjson"):
        orjson = importlib.import_module("orjson")
        found["orjson"] = lambda line: orjson.loads(line)["text"]
    if importlib.util.find_spec("simdjson"):
        parser = importlib.import_module("simdjson").Parser()
        found["pysimdjson"] = lambda line: parser.parse(line)["text"]
    return found


def bare(path: Path, parser: str) -> int:
    """Read a shard as fast as Python's libraries do; return the characters of its texts."""
    parse, characters = parsers()[parser], 0
    buffer, rest = memoryview(bytearray(CHUNK_BYTES)), b""
    with open(path, "rb") as file, zstandard.ZstdDecompressor().stream_reader(file, read_size=1 << 20) as stream:
        while size := stream.readinto(buffer):
            *lines, rest = (rest + buffer[:size]).split(b"\n")
            for line in lines:
                characters += len(parse(line))
    return characters


def seconds(run: Callable[[], Any], clock: Callable[[], float]) -> float:
    start = clock()
    run()
    return clock() - start


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A shard of real text as the Pile's are: everything beyond ASCII escaped, zstd level 3."""
    path = tmp_path_factory.mktemp("shards") / "00.jsonl.zst"
    texts = [document.text for document in documents(SIZE_BYTES)]
    lines = "".join(json.dumps({"text": text, "meta": {"pile_set_name": "real"}}) + "\n" for text in texts)
    path.write_bytes(zstandard.compress(lines.encode(), 3))
    size = sum(len(text.encode()) for text in texts)
    return {"path": path, "bytes": size, "documents": len(texts), "compressed_bytes": path.stat().st_size}


@pytest.fixture(scope="module")
def prepared(shard, tmp_path_factory) -> Callable[..., None]:
    """prepared(threads, ..., inputs): prepare the shard, `inputs` times, in processes of so many threads."""
    folder = tmp_path_factory.mktemp("tokens")

    def run(*threads: int, inputs: int = 1) -> None:
        for path in folder.iterdir():
            path.unlink()
        links = [folder / f"{i}.jsonl.zst" for i in range(inputs)]
        for link in links:
            link.symlink_to(shard["path"])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(prepare, "shares", lambda workers, size: list(threads))
            prepare.prepare(links, folder / "train.bin", progress=False)

    run(1)  # builds the encoder's tables
    return run


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    """What the tests of this file found; written to results/prepare.json once all have."""
    return {}


@dataclass(frozen=True)
class Case:
    """`run` goes through the shard `times` times."""

    name: str
    run: Callable[[], Any]
    times: int = 1
    floor: bool = False


def take_turns(shard: dict[str, Any], cases: list[Case], clock: Callable[[], float]) -> dict[str, dict[str, float]]:
    """Return for each case MB/s of text and, of those that are no floor, the share of each floor that they reach."""
    rates = defaultdict(list)
    for _ in range(ROUNDS):
        for case in cases:
            rates[case.name].append(case.times * shard["bytes"] / 1e6 / seconds(case.run, clock))
    rows: dict[str, dict[str, float]] = {}
    print()
    for case in cases:
        rows[case.name] = {"mb_s": round(statistics.median(rates[case.name]), 1)}
        for floor in cases if not case.floor else ():
            if floor.floor:
                shares = (ours / theirs for ours, theirs in zip(rates[case.name], rates[floor.name]))
                rows[case.name][f"of {floor.name}"] = round(statistics.median(shares), 2)
        print(f"{case.name:40}", ", ".join(f"{key} {value}" for key, value in rows[case.name].items()))
    return rows


def test_one_core(shard, prepared, result):
    """CPU seconds, so one core's worth of everything, however many threads there are."""
    floors = [Case(f"bare, {name}", partial(bare, shard["path"], name), floor=True) for name in parsers()]
    parts = [Case("zstd and lines alone", partial(cut, shard["path"])), Case("prepare", lambda: prepared(1))]
    result["one_core"] = take_turns(shard, floors + parts, time.process_time)


def cut(path: Path) -> None:
    """Decompress a shard and find the ends of its chunks."""
    with ShardStream(path) as stream:
        reader = ChunkReader(stream)
        while not reader.ended:
            reader.spare.append(reader.next_chunk().data)


def test_all_cores(shard, prepared, result):
    """Wall clock. The floors: one process as any program in Python, and one on each core with a shard of its own."""
    cores = workers.available_cores()
    with ProcessPoolExecutor(cores) as pool:

        def bare_everywhere(parser: str) -> None:
            list(pool.map(bare, [shard["path"]] * cores, [parser] * cores))

        bare_everywhere("json")  # starts the processes
        cases = []
        for name in parsers():
            cases.append(Case(f"bare, {name}", partial(bare, shard["path"], name), floor=True))
            cases.append(Case(f"bare, {name}, {cores} processes", partial(bare_everywhere, name), cores, floor=True))
        ways = {"": workers.shares(cores, 1 << 40), ", a process for each core": [1] * cores, ", one process": [cores]}
        for inputs, shards in ((1, "one shard"), (INPUTS, f"{INPUTS} shards")):
            for way, threads in ways.items():
                if way != ", one process" or cores > workers.THREADS:  # else it is the default
                    run = partial(prepared, *threads, inputs=inputs)
                    cases.append(Case(f"prepare, {shards}{way}", run, inputs))
        result["all_cores"] = {"cores": cores} | take_turns(shard, cases, time.perf_counter)


def test_start(tmp_path, result):
    """Wall clock of the whole program on next to nothing: what it takes to start, the kernels being compiled."""
    for name in ("train", "val"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jsonl").write_text('{"text": "a"}\n')
    flags = [f"--{name}_dir={tmp_path / name}" for name in ("train", "val")]
    found = []
    for i in range(ROUNDS + 1):
        outputs = [f"--out_{name}_file={tmp_path / name}{i}.bin" for name in ("train", "val")]
        command = [sys.executable, "-m", "tools.prepare", *flags, *outputs]
        found.append(seconds(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL), time.perf_counter))
    result["start_s"] = round(statistics.median(found[1:]), 2)
    print(f"\nstart: {result['start_s']} s")


def test_memory(shard, tmp_path, result):
    """The most memory of the process, with a shard like any other and with one document of 200 MB."""
    peaks = {"the shard": _peak_bytes(shard["path"], tmp_path / "a.bin")}
    path = tmp_path / "00.jsonl.zst"
    unit = json.dumps("naïve café 中文 😀👍 and more of it\n" * 1000)[1:-1].encode()
    with zstandard.open(path, "wb") as file:
        file.write(b'{"text": "')
        for _ in range(DOCUMENT_BYTES // len(unit)):
            file.write(unit)
        file.write(b'"}\n')
    peaks["one document of 200 MB"] = _peak_bytes(path, tmp_path / "b.bin")
    result["peak_bytes"] = peaks
    print("\nmemory:", ", ".join(f"{name}: {size / 1e6:.0f} MB" for name, size in peaks.items()))


def _peak_bytes(path: Path, out_file: Path) -> int:
    """Prepare in a process of its own, whose first line is that no larger process's peak counts as its own."""
    code = (
        "import sys; open('/proc/self/clear_refs', 'w').write('5'); from pathlib import Path;"
        "from tools.prepare import prepare; prepare([Path(sys.argv[1])], Path(sys.argv[2]), progress=False);"
        "print([line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')][0])"
    )
    done = subprocess.run([sys.executable, "-c", code, path, out_file], check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1]) * 1024


def test_write_result(shard, result):
    if set(result) >= {"one_core", "all_cores", "start_s", "peak_bytes"}:
        method = {
            "clock": "CPU seconds of the process for one core, wall clock for all cores",
            "rounds": ROUNDS,
            "statistic": "median; shares are of the same round",
            "bare": "decompress, find the lines, parse each; the text is not encoded and nothing is written",
            "prepare": "the encoder's tables are there already, but not in helper processes, which start each time",
        }
        text = {key: value for key, value in shard.items() if key != "path"}
        content = {"benchmark": "prepare", "environment": environment(), "method": method, "text": text} | result
        write_result(RESULTS / "prepare.json", content)
