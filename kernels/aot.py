"""Compile our kernels for chips that are not there and read what they cost: registers, stack, shared memory.

Each kernel file lists what it ships in `compile_cases()`. `compile_all()` compiles the lists in worker processes, since
the interpreter, which tests run under, and the compiler cannot share one; finished rows are cached.
"""

import hashlib
import importlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from queue import Empty, SimpleQueue

from kernels.dispatch import CHIPS, OPS, triton
from kernels.launch_configs import LaunchConfig, launch_config

MODULES = (
    "attention_forward", "attention_decode", "rotary", "layer_norm", "softmax", "cross_entropy", "activation", "adamw",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Case:
    """One kernel configuration that we ship.

    op: the name that dispatch decides on; label: unique within its file; kernel: the `@triton.jit` function;
    signature: argument -> "*fp16", "*i32", "i64", "fp32" ..., constexpr arguments left out; constants: the constexpr
    arguments, and None for pointers that are absent; divisible_by_16: the integer arguments that are multiples of 16 at
    run time (pointers always are); num_warps, num_stages: the launch; targets: the chips that it ships for,
    None for every chip where dispatch gives the op to Triton.
    """

    op: str
    label: str
    kernel: Callable
    signature: dict[str, str]
    constants: dict[str, object]
    divisible_by_16: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 3
    targets: tuple[str, ...] | None = None

    def chips(self) -> list[str]:
        """The targets to compile for."""
        return list(self.targets) if self.targets is not None else triton_targets(self.op)


def as_launched(case: Case, kernel: str, keys: Iterable[str], default: LaunchConfig) -> list[Case]:
    """`case` once for all chips that launch `kernel` with `default`, and once for each that has a better one.

    keys: what the table tells the configurations of this case apart by.
    """
    usual, tuned = [], []
    for target in case.chips():
        configs = {key: launch_config(CHIPS[target], kernel, key, default) for key in keys}
        usual += [target] * (default in configs.values())
        for key in (key for key, config in configs.items() if config != default):
            other = replace(case, label=f"{case.label} {key} {target}", targets=(target,))
            tuned.append(with_launch(other, configs[key]))
    return [with_launch(replace(case, targets=tuple(usual)), default)] * bool(usual) + tuned


def with_launch(case: Case, config: LaunchConfig) -> Case:
    """Return `case` launched with another configuration."""
    options = {k: config[k] for k in ("num_warps", "num_stages") if k in config}
    constants = {k: v for k, v in config.items() if k not in options}
    return replace(case, constants=case.constants | constants, **options)


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one configuration costs on one chip.

    load_bytes: the widest load of a thread from global memory, on NVIDIA; warning: what its assembler says of lost
    speed, as where Hopper's matrix instructions wait for each other. error: why it did not compile, else empty.
    """

    op: str
    label: str
    target: str
    num_warps: int
    num_stages: int
    registers: int = 0
    stack_bytes: int = 0
    spills: int = 0
    shared_bytes: int = 0
    shared_limit_bytes: int = 0
    load_bytes: int = 0
    tensor_cores: bool = False
    warning: str = ""
    error: str = ""

    @property
    def fault(self) -> str:
        """What keeps the configuration from shipping on this chip, or empty."""
        if self.error:
            return self.error
        if self.shared_bytes > self.shared_limit_bytes:
            return f"needs {self.shared_bytes} B of shared memory, the chip has {self.shared_limit_bytes}"
        if self.stack_bytes or self.spills:
            return f"spills: {self.stack_bytes} B of stack, {self.spills} registers"
        return self.warning


def triton_targets(op: str) -> list[str]:
    """The chips of the table on which dispatch gives `op` to Triton."""
    return [c.target for c in CHIPS.values() if c.triton and (c.tensor_cores or not OPS[op])]


def compile_case(case: Case, target: str) -> Row:
    """Compiles one configuration for one chip, here, with the interpreter off; no GPU is needed."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = _unwrap(case.kernel)
    kind, arch = target.split(":")
    gpu = GPUTarget(kind, int(arch) if kind == "cuda" else arch, CHIPS[target].warp_size)
    signature = {a: "constexpr" if a in case.constants else case.signature[a] for a in kernel.arg_names}
    divisible = [a for a in kernel.arg_names if signature[a][0] == "*" or a in case.divisible_by_16]
    # The launcher specialises on divisibility; without the same here, loads are narrower and kernels spill.
    attributes = {(kernel.arg_names.index(a),): [["tt.divisibility", 16]] for a in divisible}
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    head = {"op": case.op, "label": case.label, "target": target, **options}
    knobs, printed = triton.knobs, io.StringIO()
    try:
        with knobs.nvidia.scope(), knobs.compilation.scope(), redirect_stdout(printed):
            knobs.nvidia.dump_ptxas_log = knobs.compilation.always_compile = True  # what is cached has no log
            source = ASTSource(kernel, signature, case.constants, attributes)
            compiled = triton.compile(source, target=gpu, options=options)
    except Exception as failure:  # every stage of the compiler has its own kind
        return Row(**head, error=f"{type(failure).__name__}: {' '.join(str(failure).split())[:200]}")
    cost = _nvidia_cost(compiled.asm["ptx"], printed.getvalue()) if kind == "cuda" else _amd_cost(compiled)
    # Hopper keeps 1 KiB of shared memory for each block; the table's 227 KiB are what a block may ask for beside it.
    return Row(**head, shared_bytes=compiled.metadata.shared, shared_limit_bytes=CHIPS[target].shared_bytes, **cost)


def compile_all(
    jobs: Iterable[tuple[str, str, str]] | None = None, *, workers: int = 2, cache: Path | None = None
) -> list[Row]:
    """Compiles (module, label, target) jobs, by default every one that we ship, and returns their rows in order.

    workers: processes side by side; cache: a folder for finished rows (default: the user's cache folder).
    """
    jobs = list(all_jobs() if jobs is None else jobs)
    waiting: SimpleQueue[int] = SimpleQueue()
    for i in range(len(jobs)):
        waiting.put(i)
    rows: list[Row | None] = [None] * len(jobs)
    work = jobs, rows, waiting, cache or _cache_folder()
    threads = [threading.Thread(target=_feed, args=work) for _ in range(min(workers, len(jobs)))]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except KeyboardInterrupt:
        with suppress(Empty):  # the workers end with what they are at
            while True:
                waiting.get_nowait()
        raise
    if None in rows:
        raise RuntimeError("a compile worker ended early; its message is above")
    return rows


def all_jobs() -> list[tuple[str, str, str]]:
    """(module, label, target) of everything that every kernel file ships."""
    return [(m, case.label, target) for m in MODULES for case in cases_of(m).values() for target in case.chips()]


def cases_of(module: str) -> dict[str, Case]:
    """label -> case of one kernel file; none if the file has no kernels."""
    cases = getattr(importlib.import_module(f"kernels.{module}"), "compile_cases", list)()
    by_label = {case.label: case for case in cases}
    if len(by_label) != len(cases):
        raise ValueError(f"kernels/{module}.py: two compile cases share a label")
    return by_label


def _unwrap(kernel: Callable) -> Callable:
    while not isinstance(kernel, triton.runtime.JITFunction):
        kernel = kernel.fn  # autotune and heuristics wrap it
    return kernel


def _nvidia_cost(ptx: str, log: str) -> dict[str, object]:
    """log: what the assembler, ptxas, printed."""
    loads = re.findall(r"ld\.global[\w.:]*?(?:\.v(\d))?\.[bfsu](\d+)\b", ptx)
    copies = [16] * ("cp.async.cg" in ptx or "cp.async.bulk" in ptx)
    lost = re.search(r"Potential Performance Loss: (.*?)(?: in the function .*)?$", log, re.MULTILINE)
    return {
        "registers": int(re.search(r"Used (\d+) registers", log)[1]),
        "stack_bytes": int(re.search(r"(\d+) bytes stack frame", log)[1]),
        "load_bytes": max([int(count or 1) * int(bits) // 8 for count, bits in loads] + copies, default=0),
        "tensor_cores": "mma" in ptx,
        "warning": lost[1] if lost else "",
    }


def _amd_cost(compiled) -> dict[str, object]:
    assembly = compiled.asm["amdgcn"]
    registers, spills = (int(re.search(rf"\.{k}:\s*(\d+)", assembly)[1]) for k in ("vgpr_count", "vgpr_spill_count"))
    return {
        "registers": registers,
        "spills": spills,
        "tensor_cores": re.search("v_(mfma|wmma)", assembly) is not None,
    }


def _cache_folder() -> Path:
    users = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("PILESMITH_CACHE") or Path(users) / "pilesmith") / "compiled"


def _feed(jobs: list, rows: list, waiting: SimpleQueue, cache: Path) -> None:
    """Drives one worker process: one job to it, one row back, until none wait."""
    with tempfile.TemporaryDirectory() as scratch:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": scratch}
        command = [sys.executable, "-c", "from kernels.aot import serve; serve()", str(cache)]
        root = Path(__file__).parent.parent
        with subprocess.Popen(
            command, env=environment, cwd=root, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C reaches it as the end of its jobs
        ) as worker:  # fmt: skip
            while True:
                try:
                    i = waiting.get_nowait()
                except Empty:
                    worker.stdin.close()
                    return
                worker.stdin.write(json.dumps(jobs[i]) + "\n")
                worker.stdin.flush()
                answer = worker.stdout.readline()
                if not answer:
                    return
                rows[i] = Row(**json.loads(answer))


def serve() -> None:
    """The worker: jobs on standard input, rows on standard output; its argument is the cache folder."""
    cache = Path(sys.argv[1])
    cache.mkdir(parents=True, exist_ok=True)
    lists: dict[str, dict[str, Case]] = {}
    for line in sys.stdin:
        module, label, target = json.loads(line)
        if module not in lists:
            lists[module] = cases_of(module)
        print(json.dumps(asdict(_cached(lists[module][label], target, cache))), flush=True)


def _cached(case: Case, target: str, cache: Path) -> Row:
    what = [_unwrap(case.kernel).cache_key, triton.__version__, target, sorted(case.signature.items())]
    what += [[field.name for field in fields(Row)]]
    what += [sorted((k, str(v)) for k, v in case.constants.items()), case.divisible_by_16]
    what += [case.num_warps, case.num_stages, CHIPS[target].shared_bytes, case.op, case.label]
    file = cache / (hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32] + ".json")
    if file.exists():
        return Row(**json.loads(file.read_text()))
    row = compile_case(case, target)
    partial = file.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(asdict(row)))
    partial.replace(file)
    return row
