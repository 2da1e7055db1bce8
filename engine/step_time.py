"""How long a training step takes on a card, estimated.

Matrix products and attention run at a share of the peak, the rest at a share of the memory's bandwidth, what crosses
PCIe or a network at a share of the link's speed, and nothing faster than the host launches it.

Every share has its source beside it or is called assumed. The estimate is for choosing between plans and for knowing
days from months; a measured tokens/s replaces it. (Williams et al., Roofline, 2009)
"""

from dataclasses import dataclass

from engine.cards import Card
from engine.config import ModelConfig
from engine.footprint import ITEMSIZE, Elements, Method, Recompute, itemsizes
from engine.optimizer import MOMENT_BYTES, RESIDUAL_BYTES
from engine.strategy.activations import ON_DEVICE
from kernels.dispatch import Chip, row_of

# Share of the peak that large matrix products reach, by compile target, and by name for cards held back by power.
MATMUL_SHARE = {
    "cuda:120": 0.85,  # LLMQ trains at 85% of it on a 5060 Ti, all else included (arXiv 2512.15306)
    "cuda:90": 0.70,  # LLMQ trains at 57-60% of it on an H100, all else included
    "cuda:89": 0.85,  # LLMQ trains at 75-81% of it on a 4090, all else included
    "cuda:86": 0.70,  # assumed; common trainers reach 55-63% on a 3090, all else included
    "cuda:80": 0.72,  # assumed
    "cuda:75": 0.55,  # assumed
    "cuda:70": 0.65,  # assumed
    "cuda:61": 0.85,  # assumed: plain fp32 units
    "cuda:60": 0.85,  # assumed: plain fp32 units
    "hip:gfx942": 0.54,  # AMD's own figure of what is achievable, 708 of 1307 TFLOPS
    "hip:gfx90a": 0.60,  # assumed
    "hip:gfx1030": 0.50,  # assumed
    "hip:gfx906": 0.60,  # assumed
}
POWER_LIMITED = {"T4": 0.45, "L4": 0.55, "L40S": 0.70}  # assumed: 70 W, 72 W, 350 W for a far larger peak
# Share of the peak in attention, forward and backward together, causal operations counted once.
ATTENTION_SHARE = {
    "cuda:90": 0.30,  # FlashAttention-2 on an H100 at D=128: 265 to 328 of 989 TFLOPS
    "cuda:80": 0.45,  # FlashAttention-2 on an A100 at D=128: 133 to 189 of 312 TFLOPS
}
ATTENTION_SHARE_BY_SDPA = {"flash": 0.50, "efficient": 0.25, "none": 0.15}  # assumed
BANDWIDTH_SHARE = 0.80  # assumed; 82 to 90% are published for softmax and norms
LINK_SHARE = 0.80  # assumed, of PCIe, NVLink and network
DRIVE_BYTES_S = 3e9  # assumed of a drive that ZeRO offloads to: reads and writes alike, for all processes of a machine
NETWORK_BYTES_S = 12.5e9  # assumed between machines: 100 Gb/s
HOST_ADAM_S = 1.3e9  # parameters a second, DeepSpeed's CPU Adam and torch's fused AdamW, measured on two cores
LAUNCH_S = 8e-6  # assumed: Python, autograd and driver for one op
FORWARD_OPS, BACKWARD_OPS = 14, 30  # of a block, counted in a trace of engine/model.py
# How often a block's memory-bound ops read or write a number for each of n_embd, a token.
FORWARD_TRAFFIC = 2 + 4 + 4 + 8 + 3  # norm; rotary of queries and keys; sum and norm; activation; sum
BACKWARD_TRAFFIC = 2 * FORWARD_TRAFFIC
REPEATED_MATMUL = 2 / 3  # of a block: all that the backward pass needs is there before the MLP's last product
UNFUSED = 1.6  # assumed: how much more PyTorch's own ops move than our kernels
LOGITS_TRAFFIC = {True: 6, False: 20}  # passes over the logits in bytes an element of 2: fused in Triton or not


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step, by what they are spent on; transfers count as far as nothing hides them."""

    matmul: float
    attention: float
    memory_bound: float
    launches: float
    recompute: float
    optimizer: float
    host_transfer: float
    communication: float

    @property
    def total(self) -> float:
        return sum(getattr(self, name) for name in self.__dataclass_fields__)


def chip_of(card: Card) -> Chip:
    """Return the row of kernels/dispatch.py that serves a card."""
    return row_of(card.target, bf16=card.bf16_flops > 0)


def step_time(
    model: ModelConfig,
    card: Card,
    method: Method,
    recompute: Recompute,
    *,
    dtype: str,
    micro_batch_size: int,
    grad_accum: int,
    gpus: int = 1,
    gpus_per_machine: int = 8,
    network_bytes_s: float = NETWORK_BYTES_S,
) -> StepTime:
    """Return the estimated time of a step of `grad_accum` micro-batches on each of `gpus` cards."""
    n, C, T, V = model.n_layer, model.n_embd, model.block_size, model.vocab_size
    chip, sizes = chip_of(card), Elements.of(model)
    w, a = itemsizes(method, dtype)
    tokens = micro_batch_size * T
    peak, bandwidth = card.peak_flops(dtype), card.bandwidth_bytes_s * BANDWIDTH_SHARE
    flops_s = peak * POWER_LIMITED.get(card.name, MATMUL_SHARE.get(card.target, 0.6))
    attention_flops_s = peak * ATTENTION_SHARE.get(card.target, ATTENTION_SHARE_BY_SDPA[chip.sdpa])
    unfused = 1.0 if chip.triton else UNFUSED

    forward = {
        "matmul": 2 * 12 * C * C * tokens / flops_s,
        "attention": 2 * C * T * tokens / attention_flops_s,  # causal: half of 4 C T
        "memory_bound": FORWARD_TRAFFIC * unfused * tokens * C * a / bandwidth,
    }
    matmul = n * 3 * forward["matmul"] + 6 * V * C * tokens / flops_s
    attention = n * 3.5 * forward["attention"]
    # Each micro-batch reads the weights, casts them where they are fp32, and adds its gradients to those before it.
    casting = 3 * (w + a) if w != a else 0
    memory_bound = (
        n * forward["memory_bound"] * (1 + BACKWARD_TRAFFIC / FORWARD_TRAFFIC)
        + LOGITS_TRAFFIC[chip.triton] * tokens * V * a / 2 / bandwidth
        + sizes.total * (a + 3 * w + casting) / bandwidth
    )
    again = forward | {"matmul": forward["matmul"] * REPEATED_MATMUL}
    if recompute.kind == "selective":
        again["attention"] = 0.0
    recomputed = recompute.layers * sum(again.values())
    device = matmul + attention + memory_bound + recomputed
    ops = n * (FORWARD_OPS + BACKWARD_OPS) + recompute.layers * FORWARD_OPS + 40
    launches = max(0.0, ops * LAUNCH_S - device)

    micro_transfer, step_transfer, host_adam = _host(method, sizes, dtype, card, gpus, gpus_per_machine)
    if recompute.kind == "offloaded":
        inputs = max(0, recompute.layers - ON_DEVICE) * tokens * C * a / (card.pcie_bytes_s * LINK_SHARE)
        micro_transfer += max(0.0, inputs - device / 3)  # out during the forward pass, back during the longer backward
    link = card.link_bytes_s * LINK_SHARE
    if gpus > gpus_per_machine:
        link = min(link, network_bytes_s * LINK_SHARE)
    communication = communication_bytes(method, sizes.total, dtype, gpus, grad_accum) / link
    # Gradients travel during the backward pass, two thirds of the time: ours in the last micro-batch, stage 1's after.
    hidden = {0: 1, 1: 0, 2: grad_accum, 3: grad_accum}[method.stage] * device * 2 / 3
    share = gpus if method.stage else 1
    on_card = not (method.stage and method.offload != "none")
    optimizer = _optimizer_bytes(method, w) * sizes.total / share / bandwidth if on_card else host_adam
    return StepTime(
        matmul=grad_accum * matmul,
        attention=grad_accum * attention,
        memory_bound=grad_accum * memory_bound,
        launches=grad_accum * launches,
        recompute=grad_accum * recomputed,
        optimizer=optimizer,
        host_transfer=grad_accum * micro_transfer + step_transfer,
        communication=max(0.0, communication - hidden),
    )


def communication_bytes(method: Method, n: int, dtype: str, gpus: int, grad_accum: int) -> float:
    """Return what one card sends in a step over n parameters, by ring algorithms (Rajbhandari et al., ZeRO, 2020)."""
    if gpus == 1:
        return 0.0
    passed, w = (gpus - 1) / gpus * n, ITEMSIZE[dtype]
    if method.stage == 0:
        return 2 * passed * itemsizes(method, dtype)[0]  # all-reduce of the gradients, once a step
    if method.stage == 1:
        return passed * (2 * 4 + w)  # all-reduce of fp32 gradients, all-gather of the weights
    if method.stage == 2:
        return passed * w * (grad_accum + 1)  # reduce-scatter of each micro-batch, all-gather of the weights
    return passed * w * 3 * grad_accum  # all-gather forward and backward, reduce-scatter


def _host(
    method: Method, sizes: Elements, dtype: str, card: Card, gpus: int, gpus_per_machine: int
) -> tuple[float, float, float]:
    """Seconds that PCIe and a drive take for each micro-batch and each step, and the host's AdamW for a step."""
    n, w, pcie = sizes.total, ITEMSIZE[dtype], card.pcie_bytes_s * LINK_SHARE
    if method.streamed:
        moved = RESIDUAL_BYTES[method.weights] + MOMENT_BYTES[method.moments]
        return 0.0, moved * n / pcie, 0.0  # in and out at the same time
    if method.stage == 0 or method.offload == "none":
        return 0.0, 0.0, 0.0
    share = n / gpus
    machine = share * min(gpus, gpus_per_machine)  # its processes share its memory and its drive
    host_adam = machine / HOST_ADAM_S
    if method.stage == 1:
        return 0.0, (4 + w) * share / pcie, host_adam
    # Stages 2 and 3 add each micro-batch's gradients to those in host memory: down and up again in fp32.
    micro = 2 * 4 * share / pcie
    if method.offload == "params":
        micro += 2 * w * share / pcie  # the weights, forward and backward
    step = w * share / pcie
    if method.nvme:  # weights, gradients and moments in and out for the update, which waits for them
        step += 2 * 4 * 4 * machine / DRIVE_BYTES_S
        if method.offload == "params":
            micro += 2 * w * machine / DRIVE_BYTES_S
            step += w * machine / DRIVE_BYTES_S
    return micro, step, host_adam


def _optimizer_bytes(method: Method, w: int) -> float:
    """What the update on the card reads and writes for each parameter, and the norm of the gradients before it."""
    if method.stage:
        return 4 + 4 + 2 * 4 + 2 * 8 + w
    return 2 * (w + w + RESIDUAL_BYTES[method.weights] + MOMENT_BYTES[method.moments])
