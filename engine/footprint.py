"""What a training step holds in memory, by formula: every way of keeping weights, states and activations.

The formulas follow the code: what the ops in kernels/ save for the backward pass, what DeepSpeed 0.19 allocates for
each stage (its tensors were counted, one and two processes), what autograd holds while gradients of a tied matrix meet.
What torch.compile saves instead is not in them. Sizes in bytes.
Shapes: B micro-batch, T tokens, C n_embd, H heads, V words, N parameters, n blocks.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

from engine.cards import GiB
from engine.config import ModelConfig
from engine.optimizer import MOMENT_BYTES, RESIDUAL_BYTES, Moments, Weights
from engine.strategy.activations import ON_DEVICE
from engine.streamed_adamw import HOST_SLAB_BYTES, PORTION, SLOTS
from kernels.adamw import CHUNK_ON_CARD, UNPACKED_BYTES
from kernels.cross_entropy import CPU_LOGITS_BYTES
from kernels.cross_entropy_gpu import LOGITS_BYTES, SLAB_BYTES, WORKSPACE_BYTES
from kernels.dispatch import Chip
from kernels.number_formats import BLOCK

MiB = 2**20
ITEMSIZE = {"fp32": 4, "bf16": 2, "fp16": 2}
PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "master_weights": "master weights",
    "optimizer_states": "optimizer states",
    "saved_activations": "saved activations",
    "working_layer": "one layer's work",
    "loss_workspace": "loss",
    "communication": "communication buckets",
    "context": "context and fragmentation",
}

# Assumed: a CUDA or ROCm context with its modules takes 0.3 to 0.6 GiB that no allocator sees.
CONTEXT_BYTES = GiB // 2
# Assumed: what comes and goes within a step is cut to whole 2 and 20 MiB blocks that do not all fit together again.
FRAGMENTATION, FRAGMENTATION_BYTES = 0.08, 192 * MiB
NCCL_BYTES = 256 * MiB  # assumed: NCCL's channels and their buffers, outside of the allocator, where cards talk
HOST_PROCESS_BYTES = 3 * GiB  # assumed: Python, torch, the CUDA libraries, the file's pages of one process
# A number of the largest parameter: a checkpoint is written a parameter at a time, its weight and both moments in fp32.
# More than it takes to make the weights (engine/strategy), a parameter at a time as well and in fp32.
SAVING_BYTES = 4 + 4 + 4
DEEPSPEED_BUCKET = 50_000_000  # elements that engine/strategy/zero.py has it send at once; its own 5e8 take 1 GB
DEEPSPEED_SWAPPED = 50_000_000  # elements from which on it has it update parameters on a drive together; its own is 1e9
DEEPSPEED_REDUCE = 500_000_000  # elements that its bf16 stage 1 reduces at once
DEEPSPEED_LIVE = 1_000_000_000  # elements of gathered parameters that stage 3 keeps


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way of keeping weights and optimizer states. Everything here is data: what runs, and what is preferred.

    rank: order of preference among methods of about equal speed, exactness first. weights and moments as in
    engine/optimizer.py. streamed: residuals and moments lie in pinned host memory (engine/streamed_adamw.py).
    in_backward: each gradient is used and freed in the backward pass, so there is no accumulation and no global
    clipping. stage: DeepSpeed's, 0 for ours; offload as in the config. nvme: to a drive (`on_nvme`).
    """

    name: str
    title: str
    rank: int
    weights: Weights = "fp32"
    moments: Moments = "fp32"
    streamed: bool = False
    in_backward: bool = False
    stage: int = 0
    offload: Literal["none", "optimizer", "params"] = "none"
    nvme: bool = False


def _resident(name: str, title: str, rank: int, **kinds: Any) -> Method:
    return Method(name=name, title=title, rank=rank, **kinds)


def _zero(stage: int, offload: str, rank: int) -> Method:
    moved = {"none": "", "optimizer": ", optimizer", "params": ", optimizer and parameters"}[offload]
    name = f"zero-{stage}" + (f"-offload-{offload}" if moved else "")
    title = f"DeepSpeed ZeRO stage {stage}{moved}" + (" in host memory" if moved else "")
    return Method(name=name, title=title, rank=rank, stage=stage, offload=offload)


METHODS: tuple[Method, ...] = (
    _resident("resident", "fp32 weights and moments on the card", 0),
    _zero(1, "none", 1),
    _zero(2, "none", 1),
    _zero(3, "none", 1),
    _resident("residual", "16-bit weights and their int16 residuals, together fp32, and 8-bit moments", 2,
              weights="residual", moments="int8"),
    _resident("stochastic", "16-bit weights rounded stochastically and 8-bit moments", 3,
              weights="stochastic", moments="int8"),
    _resident("streamed", "16-bit weights on the card; residuals and fp32 moments streamed from host memory", 4,
              weights="residual", moments="fp32", streamed=True),
    _resident("streamed-int8", "16-bit weights on the card; residuals and 8-bit moments streamed from host memory", 4,
              weights="residual", moments="int8", streamed=True),
    _zero(1, "optimizer", 5),
    _zero(2, "optimizer", 5),
    _zero(3, "optimizer", 5),
    _zero(3, "params", 6),
    _resident("residual-in-backward", "16-bit weights, residuals, 8-bit moments, updated inside the backward pass", 7,
              weights="residual", moments="int8", in_backward=True),
    _resident("stochastic-in-backward", "16-bit weights, 8-bit moments, updated inside the backward pass", 8,
              weights="stochastic", moments="int8", in_backward=True),
)  # fmt: skip


def on_nvme(method: Method) -> Method:
    """Return a method of ZeRO stage 3 such that what it offloads lies on a drive; any other as it is."""
    if method.stage < 3 or method.offload == "none":
        return method
    name, title = method.name.replace("offload", "nvme"), method.title.replace("in host memory", "on a drive")
    return replace(method, name=name, title=title, nvme=True)


@dataclass(frozen=True)
class Recompute:
    """What the backward pass computes again, in the first `layers` blocks.

    kind "blocks": all but the block's input (Chen et al., 2016); "selective": all but the input and attention's output
    and log-sum-exp; "offloaded": as "blocks", the inputs, but for the last two, lying in pinned host memory until they
    are needed (engine/strategy/activations.py).
    """

    kind: Literal["none", "blocks", "selective", "offloaded"] = "none"
    layers: int = 0


@dataclass(frozen=True)
class Footprint:
    """Bytes by part in the fullest phase of a step, on the card and in host memory; `phase` names it."""

    card: dict[str, int]
    host: dict[str, int]
    phase: str

    @property
    def card_bytes(self) -> int:
        return sum(self.card.values())

    @property
    def allocated_bytes(self) -> int:
        """What torch.cuda.max_memory_allocated should say: all but the context and fragmentation."""
        return self.card_bytes - self.card["context"]

    @property
    def host_bytes(self) -> int:
        return sum(self.host.values())


@dataclass(frozen=True)
class Elements:
    """Numbers in the parts of a model: one block with its four matrices, the largest of these, a V x C matrix, all."""

    block: int
    largest: int
    head: int
    total: int

    @classmethod
    def of(cls, model: ModelConfig) -> "Elements":
        C, V = model.n_embd, model.vocab_size
        block = 12 * C * C + 4 * C + 3 * C * model.qkv_bias + 6 * C * model.bias
        positions = model.block_size * C * (model.positions == "learned")
        head = V * C * (not model.tie_head) + V * model.head_bias
        return cls(block, 4 * C * C, V * C, V * C + positions + model.n_layer * block + 2 * C + head)

    @property
    def parameter(self) -> int:
        """The largest parameter's."""
        return max(self.head, self.largest)


def itemsizes(method: Method, dtype: str) -> tuple[int, int]:
    """Return the bytes of a stored weight and of an activation when computing in `dtype`."""
    computed = ITEMSIZE[dtype]
    if method.stage:
        return computed, computed
    return (4 if method.weights == "fp32" else 2), computed


def predict(
    model: ModelConfig,
    method: Method,
    *,
    dtype: str,
    micro_batch_size: int,
    recompute: Recompute = Recompute(),
    accumulates: bool = True,
    gpus: int = 1,
    chip: Chip | None = None,
    traced: bool = False,
) -> Footprint:
    """Return what one process of `gpus` holds in the fullest phase of a step over sequences of model.block_size.

    dtype: "bf16", "fp16" or "fp32". accumulates: gradients of an earlier micro-batch are there already. chip: a row of
    kernels/dispatch.py; None for a CPU. traced: as torch's memory tracker sees it, without what ops hold inside and
    with autograd adding gradients out of place, as it does under every dispatch mode.
    """
    sizes, pins = Elements.of(model), chip is not None
    if method.stage:
        states, host, extra = _deepspeed(model, method, sizes, dtype, gpus, pins)
    else:
        (states, host), extra = _ours(method, sizes, dtype), {}
    # With several processes the gradients lie in the buckets that are averaged, for good (strategy/data_parallel.py).
    accumulates = accumulates or gpus > 1
    phases = _phases(model, method, sizes, dtype, micro_batch_size, recompute, accumulates, chip, traced) | extra
    name, fullest = max(phases.items(), key=lambda item: sum(item[1].values()))
    card = {part: int(states.get(part, 0) + fullest.get(part, 0)) for part in PARTS}
    if chip is not None:
        passing = sum(size for part, size in fullest.items() if part not in ("weights", "gradients"))
        card["context"] = int(CONTEXT_BYTES + FRAGMENTATION_BYTES + FRAGMENTATION * passing + NCCL_BYTES * (gpus > 1))
    if recompute.kind == "offloaded":
        inputs = micro_batch_size * model.block_size * model.n_embd * ITEMSIZE[dtype]
        host = host | {"saved_activations": _on_host(max(0, recompute.layers - ON_DEVICE) * inputs, pins)}
    held = {part: int(size) for part, size in host.items()}
    held["process"] = HOST_PROCESS_BYTES + SAVING_BYTES * sizes.parameter
    return Footprint(card, held, name)


def states_bytes(model: ModelConfig, method: Method, dtype: str, gpus: int = 1) -> int:
    """Return what weights, gradients and optimizer states take where there is no card, whatever the batch."""
    sizes = Elements.of(model)
    if method.stage:
        states, host, _ = _deepspeed(model, method, sizes, dtype, gpus, False)
    else:
        states, host = _ours(method, sizes, dtype)
    gradients = 0 if method.in_backward or method.stage else itemsizes(method, dtype)[0] * sizes.total
    return int(sum(states.values()) + sum(host.values()) + gradients)


def _ours(method: Method, sizes: Elements, dtype: str) -> tuple[dict, dict]:
    """Bytes of the states of our own strategy on the card and on the host."""
    n, stored = sizes.total, itemsizes(method, dtype)[0]
    moments = MOMENT_BYTES[method.moments] + (1 / BLOCK if method.moments == "int8" else 0)
    card = {"weights": stored * n}
    parts = {"master_weights": RESIDUAL_BYTES[method.weights], "optimizer_states": moments}
    if not method.streamed:
        return card | {part: size * n for part, size in parts.items()}, {}
    passing = min(SLOTS, -(-n // PORTION)) * min(PORTION, n)  # elements
    host = {part: size * n for part, size in parts.items()}
    # The slabs that they are cut from: what is left of the last and of those before it.
    host["optimizer_states"] += min(2 * HOST_SLAB_BYTES, sum(host.values()))
    return card | {part: size * passing for part, size in parts.items()}, host


def _deepspeed(
    model: ModelConfig, method: Method, sizes: Elements, dtype: str, gpus: int, pins: bool
) -> tuple[dict, dict, dict]:
    """The same of DeepSpeed with fp32 accumulation of gradients, as zero.py configures it, and its further phases."""
    n, share, w = sizes.total, sizes.total / gpus, ITEMSIZE[dtype]
    # A flat buffer of the bucket's length, two where communication overlaps; and the gradients that wait to be reduced,
    # as they are, flattened and in fp32.
    bucket = w * DEEPSPEED_BUCKET * (2 if gpus > 1 else 1) + 8 * min(DEEPSPEED_BUCKET, n)
    in_double = 8 * sizes.head / (gpus if method.stage == 3 else 1)  # the norm of the largest gradient is taken in fp64
    if method.stage == 3:
        # Nothing stays that comes from a drive: a parameter, and the next while the one before it is let go.
        live = 2 * sizes.parameter if method.nvme and method.offload == "params" else DEEPSPEED_LIVE
        gathered = w * min(n, live) if gpus > 1 or method.offload == "params" else 0
        weights = gathered + (w * share if method.offload != "params" else 0)
    else:
        gathered, weights = 0, w * n
    card = {"weights": weights, "communication": bucket}
    if method.offload == "none":
        card |= {"master_weights": 4 * share, "optimizer_states": 8 * share}
        if method.stage == 1 and dtype == "bf16":
            # BF16_Optimizer keeps all gradients twice and, at the end, reduces them in two dtypes at once.
            card["gradients"] = (4 + w) * n
            return card, {}, {"reduce": {"communication": (4 + w) * min(n, DEEPSPEED_REDUCE)}}
        card["gradients"] = 4 * (n if method.stage == 1 else share)
        # Another copy of gradients: stage 1's averages, stage 3's of a group of parameters, fp32 ones that are scaled.
        copied = {1: 4 * share, 2: 4 * share * (dtype == "fp32"), 3: 4 * min(share, DEEPSPEED_LIVE)}[method.stage]
        # What was gathered, and other processes' gradients where the communication overlaps, have been let go by then.
        gone = 4 * (n - share) if method.stage == 1 else 0
        return card, {}, {"update": {"weights": -gathered, "gradients": -gone, "communication": max(copied, in_double)}}
    if method.stage == 1:
        card["gradients"] = 4 * n
    if method.nvme:
        # The accumulated gradients stay. What is updated together has, one group at a time, an update's gradient, four
        # pinned buffers for weight, gradient and moments, and in the first step new moments. Each of five buffers takes
        # whatever parameter is read; one more takes a group's that are written.
        group = min(share, max(sizes.head, DEEPSPEED_SWAPPED + (sizes.largest if model.tie_head else sizes.parameter)))
        read = 5 * sizes.parameter / gpus + group if method.offload == "params" else 0
        host = {"gradients": _on_host(4 * share, pins) + 4 * group, "optimizer_states": (4 + 2) * 4 * group}
        return card, host | {"weights": w * read}, {"norm": {"communication": in_double}}
    staging = w * sizes.parameter if method.stage < 3 else 0  # one parameter on its way, at both ends
    card["communication"] += staging

    def matrices(itemsize: int) -> int:
        """A tensor for each matrix, or one process's part of it."""
        C = model.n_embd
        block = sum(_on_host(itemsize * m * C * C / gpus, pins) for m in (3, 1, 4, 4))
        return model.n_layer * block + (1 if model.tie_head else 2) * _on_host(itemsize * sizes.head / gpus, pins)

    # Pinned: flat partitions, each parameter's accumulated gradient; and stage 3's parameters one by one before they
    # are pinned as a whole, since pinned memory is kept once it is free.
    host = {
        "weights": _on_host(w * share, pins) if method.offload == "params" or method.stage < 3 else 0,
        "gradients": _on_host(4 * share, pins) + matrices(4) + _on_host(staging, pins),
        "master_weights": _on_host(4 * share, pins),
        "optimizer_states": 8 * share,
    }
    if method.offload == "params" and pins:
        host["weights"] += matrices(w)
    return card, host, {"norm": {"communication": in_double}}


def _on_host(size: float, pins: bool) -> int:
    """What host memory takes for a tensor: pinned for a card, by torch's caching allocator, the next power of two."""
    return 1 << (int(size) - 1).bit_length() if pins and size > 0 else int(size)


def _phases(
    model: ModelConfig, method: Method, sizes: Elements, dtype: str, B: int, recompute: Recompute,
    accumulates: bool, chip: Chip | None, traced: bool,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Bytes beyond the states in each phase of a step that can be the fullest."""
    n, C = model.n_layer, model.n_embd
    w, a = itemsizes(method, dtype)
    cast = a if w != a else 0  # 16-bit copies of fp32 weights live as long as the backward pass needs them
    rows = B * model.block_size
    stream, statistics = rows * C * a, rows * 4  # one residual stream; one fp32 number a token
    tied = sizes.head * w * model.tie_head  # the head's gradient waits for that of the embedding
    # A block saves its input, the normed input, queries, keys and values, attention's output, the sum, the normed sum,
    # the MLP's hidden layer before and after the activation: 1 + 1 + 3 + 1 + 1 + 1 + 4 + 4; and statistics in fp32.
    whole = 16 * stream + (model.n_head + 4) * statistics + 12 * C * C * cast
    attended = stream + model.n_head * statistics
    again = {"none": 0, "blocks": stream, "selective": stream + attended, "offloaded": stream}[recompute.kind]

    def saved(blocks: int) -> int:
        first = min(blocks, recompute.layers)
        here = min(first, ON_DEVICE) if recompute.kind == "offloaded" else first
        return here * again + (blocks - first) * whole

    # Beyond what it saved, a block's backward pass holds at most: the gradients of its output and of the activation
    # with that of a weight; or after these the weight's gradient in both dtypes.
    work = max(5 * stream + sizes.largest * a, stream + sizes.largest * (a + (w if cast else 0)))
    if chip is not None and chip.sdpa == "none" and not traced:
        # Attention in chunks: fp32 sums of two gradients and four chunks of scores, when the MLP's part is gone.
        scores = min(64 * MiB, 4 * rows * model.block_size * model.n_head)
        work = max(work, (2 * 4 // a - 2) * stream + 4 * scores)

    def gradients(blocks_done: int, head_done: bool) -> int:
        """Gradients that exist by then, in the backward pass of our own strategy."""
        if method.stage or method.in_backward:
            return 0
        if accumulates:
            return w * sizes.total
        return w * (blocks_done * sizes.block + (sizes.head if head_done and not model.tie_head else 0))

    def unpacked(elements: int) -> int:
        """What the optimizer's PyTorch path unpacks of a matrix at once: weight, gradient, moments, random numbers."""
        compact = method.weights != "fp32" and chip is not None and not chip.triton
        return UNPACKED_BYTES[method.weights] * min(CHUNK_ON_CARD, elements) if compact else 0

    def updating(elements: int) -> int:
        """What the update of a matrix adds where it is made as soon as there is a gradient."""
        return unpacked(elements) if method.in_backward else 0

    workspace = 0 if traced else _loss_workspace(model, rows, a, chip)
    head = sizes.head * a
    scaled = 2 * 4 * min(sizes.head, SLAB_BYTES // a) if a < 4 else 0  # rounded in place, a slab in fp32 at a time
    phases = {
        "loss": {
            "gradients": gradients(0, False),
            "saved_activations": saved(n) + stream + 2 * statistics,
            "loss_workspace": 2 * stream + head + sizes.head * cast + workspace,
        },
        "head's backward": {
            "gradients": gradients(0, False),
            "saved_activations": saved(n) + stream,
            "loss_workspace": 2 * stream + head + max(sizes.head * w if cast else 0, scaled),
            "working_layer": 0 if model.tie_head else updating(sizes.head),
        },
    }
    for i in {n - 1, max(0, recompute.layers - 1), 0}:
        phases[f"block {i}'s backward"] = {
            "gradients": gradients(n - 1 - i, True) + tied,
            "saved_activations": saved(i + 1),
            "working_layer": work + (whole - again if i < recompute.layers else 0) + updating(sizes.largest),
        }
    matrices = (3 if traced else 2) if model.tie_head else 1  # the embedding's gradient, the head's, their sum
    phases["embedding's backward"] = {
        "gradients": gradients(n, True) + matrices * sizes.head * w,
        "working_layer": stream + (rows * C * w if cast else 0) + updating(sizes.head),
    }
    all_gradients = 0 if method.stage or method.in_backward else w * sizes.total
    phases["update"] = {"gradients": all_gradients, "working_layer": unpacked(max(sizes.head, sizes.largest))}
    return phases


def _loss_workspace(model: ModelConfig, rows: int, a: int, chip: Chip | None) -> int:
    """What linear_cross_entropy holds beside its inputs and outputs."""
    V, C = model.vocab_size, model.n_embd
    if chip is None:
        wide = 2 * 4 * V * C if a < 4 else 0
        return wide + 2 * rows * C * 4 + min(CPU_LOGITS_BYTES, rows * V * 4)
    per_logit = a + (4 if a < 4 and not chip.triton else 0)
    sums = min((V - V // 2) * C * 4, WORKSPACE_BYTES) if a < 4 else 0
    return min(LOGITS_BYTES, rows * V * per_logit) + sums + 2 * min(SLAB_BYTES, 4 * V * C)
