"""The planner: which way of running a step fits a card and its host, how fast each is, and which to take and why.

`plan` weighs every method of engine/footprint.py with every way of recomputing and every micro-batch; `choose` takes
the best. Bytes come from engine/footprint.py, seconds from engine/step_time.py.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from engine.cards import CARDS, Card, GiB
from engine.config import ConfigError, ModelConfig, require
from engine.footprint import METHODS, Elements, Footprint, Method, Recompute, predict
from engine.model import flops_per_token
from engine.step_time import NETWORK_BYTES_S, StepTime, chip_of, communication_bytes, step_time

HOST_RESERVE_BYTES = 4 * GiB  # assumed: the system and other programs
CARD_RESERVE = 0.02  # of the card, assumed: what the estimate of context and fragmentation may be wrong by
GPUS_PER_MACHINE = 8
# A method that is preferred for its exactness may be this much slower than the fastest.
PREFERENCE = 0.10


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One way of running a step on a card: what it takes, how long, and whether it fits.

    micro_batch_size in sequences; batch_tokens: tokens a step over all cards, other than asked (`keeps_batch` False)
    where the method cannot accumulate. why: `reason`, of a plan that was chosen. footprint and host bytes are
    those of one process; `processes` of them share a machine.
    """

    card: Card
    model: ModelConfig
    method: Method
    recompute: Recompute
    dtype: str
    gpus: int
    gpus_per_machine: int
    network_bytes_s: float
    micro_batch_size: int
    grad_accum: int
    batch_tokens: int
    keeps_batch: bool
    footprint: Footprint
    card_limit: int
    host_limit: int
    why: str = ""

    @cached_property
    def time(self) -> StepTime:
        """The estimated time of a step; most plans are looked at for their memory alone."""
        return step_time(
            self.model, self.card, self.method, self.recompute, dtype=self.dtype, gpus=self.gpus,
            micro_batch_size=self.micro_batch_size, grad_accum=self.grad_accum,
            gpus_per_machine=self.gpus_per_machine, network_bytes_s=self.network_bytes_s,
        )  # fmt: skip

    @property
    def processes(self) -> int:
        """Those of one machine."""
        return min(self.gpus, self.gpus_per_machine)

    @property
    def host_bytes(self) -> int:
        return self.footprint.host_bytes * self.processes

    @property
    def fits_card(self) -> bool:
        return self.footprint.card_bytes <= self.card_limit

    @property
    def fits_host(self) -> bool:
        return self.host_bytes <= self.host_limit

    @property
    def fits(self) -> bool:
        return self.fits_card and self.fits_host

    @property
    def tokens_per_s(self) -> float:
        return self.batch_tokens / self.time.total

    @property
    def mfu(self) -> float:
        flops = flops_per_token(self.model, Elements.of(self.model).total)
        return self.tokens_per_s * flops / (self.gpus * self.card.peak_flops(self.dtype))

    @property
    def days_per_billion_tokens(self) -> float:
        return 1e9 / self.tokens_per_s / 86_400

    @property
    def communication_bytes(self) -> float:
        n = Elements.of(self.model).total
        return communication_bytes(self.method, n, self.dtype, self.gpus, self.grad_accum)

    @property
    def name(self) -> str:
        kind, layers, n = self.recompute.kind, self.recompute.layers, self.model.n_layer
        if kind == "none":
            return self.method.name
        added = "" if kind == "blocks" else f"-{kind}"
        return f"{self.method.name}+recompute{added}" + (f"-{layers}-of-{n}" if layers < n else "")

    @property
    def title(self) -> str:
        n = self.model.n_layer
        blocks = f"{'all' if self.recompute.layers == n else self.recompute.layers} of {n} blocks recomputed"
        done = {
            "none": "nothing recomputed",
            "blocks": blocks,
            "selective": f"{blocks} but for attention",
            "offloaded": f"{blocks} from inputs kept in host memory",
        }[self.recompute.kind]
        return f"{self.method.title}; {done}"

    @property
    def settings(self) -> dict[str, Any]:
        """The sections of a configuration that run this plan."""
        method = self.method
        strategy = {
            "strategy": "zero" if method.stage else "resident",
            "zero_stage": method.stage or None,
            "offload": "states" if method.streamed else method.offload,
            "weights": method.weights,
            "moments": method.moments,
            "optimizer_in_backward": method.in_backward,
            "activation_checkpointing": self.recompute.kind,
            "recomputed_blocks": self.recompute.layers or self.model.n_layer,
            "dtype": self.dtype,
        }
        optimizer = {"micro_batch_size": self.micro_batch_size, "batch_tokens": self.batch_tokens}
        return {"strategy": strategy, "optimizer": optimizer | ({"grad_clip": 0.0} if method.in_backward else {})}

    @property
    def flags(self) -> str:
        """engine/train.py's flags that ask for this plan, beside those of the model: with them no other is allowed."""
        implied = {"weights", "moments", "optimizer_in_backward"} if self.method.stage else {"zero_stage"}
        if self.recompute.kind == "none":
            implied.add("recomputed_blocks")
        if self.grad_accum > 1:  # which an update inside the backward pass never has
            implied.add("optimizer_in_backward")
        values = self.settings["strategy"] | self.settings["optimizer"]
        return " ".join(f"--{name} {value}" for name, value in values.items() if name not in implied)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What there is to plan for: a model and its batch, and cards with their hosts.

    host_memory: bytes of one machine, which has up to gpus_per_machine cards. batch_tokens: tokens a step, over all of
    them. micro_batch_size, in sequences, and dtype: None for the best. recomputed_blocks: this number, where any are.
    network_bytes_s: between machines. methods: to weigh. ConfigError where the batch does not divide into sequences,
    cards and micro-batches.
    """

    model: ModelConfig
    card: Card
    host_memory: int
    gpus: int = 1
    batch_tokens: int = 524_288
    micro_batch_size: int | None = None
    dtype: str | None = None
    recomputed_blocks: int | None = None
    gpus_per_machine: int = GPUS_PER_MACHINE
    network_bytes_s: float = NETWORK_BYTES_S
    methods: tuple[Method, ...] = METHODS

    def __post_init__(self) -> None:
        gpus, length, size = self.gpus, self.model.block_size, self.micro_batch_size
        require(self.network_bytes_s > 0, f"a network of {self.network_bytes_s:g} bytes a second moves nothing")
        sequences = self.batch_tokens // length
        require(
            sequences > 0 and self.batch_tokens % length == 0,
            f"batch_tokens ({self.batch_tokens}) must be a multiple of block_size ({length})",
        )
        require(
            sequences % gpus == 0,
            f"{sequences} sequences of {length} a step cannot be shared by {gpus} cards evenly: "
            f"--batch_tokens {max(1, sequences // gpus) * gpus * length} would do",
        )
        require(
            size is None or self.sequences % size == 0,
            f"micro_batch_size ({size}) must divide the {self.sequences} sequences of a card and step",
        )

    @property
    def sequences(self) -> int:
        """Those of one card and step."""
        return self.batch_tokens // self.model.block_size // self.gpus

    def plans(self) -> list[Plan]:
        """Return a plan for each method and way of recomputing, with its best micro-batch, best plan first."""
        divisors = [size for size in range(1, self.sequences + 1) if self.sequences % size == 0]
        sizes = [self.micro_batch_size] if self.micro_batch_size else divisors
        plans = []
        for method in self.methods:
            for options in _ways_to_recompute(self.model.n_layer, self.recomputed_blocks):
                made: list[Plan] = []
                for size in sizes:
                    # Each takes more than the one before, but for the whole batch at once, which accumulates nothing.
                    if not made or made[-1].fits or size == sizes[-1]:
                        made.append(self._first_that_fits(method, options, size))
                fitting = [p for p in made if p.fits]
                plans.append(max(fitting, key=_merit) if fitting else min(made, key=lambda p: p.footprint.card_bytes))
        return best_first(plans)

    def plan(self, method: Method, recompute: Recompute, micro_batch_size: int) -> Plan:
        """Return this one plan, whether it fits or not."""
        model, card = self.model, self.card
        grad_accum = 1 if method.in_backward else self.sequences // micro_batch_size
        dtype = self.dtype or best_dtype(card)
        common = dict(dtype=dtype, micro_batch_size=micro_batch_size, gpus=self.gpus)
        footprint = predict(
            model, method, recompute=recompute, accumulates=grad_accum > 1, chip=chip_of(card), **common
        )
        tokens = micro_batch_size * grad_accum * self.gpus * model.block_size
        return Plan(
            card=card, model=model, method=method, recompute=recompute, grad_accum=grad_accum, footprint=footprint,
            gpus_per_machine=self.gpus_per_machine, network_bytes_s=self.network_bytes_s, batch_tokens=tokens,
            keeps_batch=tokens == self.batch_tokens, card_limit=int(card.memory_bytes * (1 - CARD_RESERVE)),
            host_limit=max(0, self.host_memory - HOST_RESERVE_BYTES), **common,
        )  # fmt: skip

    def _first_that_fits(self, method: Method, options: list[Recompute], micro_batch_size: int) -> Plan:
        """Return the plan of the first option that fits, found by halving: each takes less than the one before it."""
        first, last = 0, len(options) - 1
        if not (least := self.plan(method, options[last], micro_batch_size)).fits:
            return least
        while first < last:
            middle = (first + last) // 2
            fits = self.plan(method, options[middle], micro_batch_size).fits
            first, last = (first, middle) if fits else (middle + 1, last)
        return self.plan(method, options[first], micro_batch_size)


def plan(model: ModelConfig, card: Card, host_memory: int, **options: Any) -> list[Plan]:
    """Return `Setup.plans` of these, and of its further fields in `options`."""
    return Setup(model=model, card=card, host_memory=host_memory, **options).plans()


def best_dtype(card: Card) -> str:
    """bf16 where the card multiplies it; else fp16, which is never slower than fp32 with fp32 accumulation."""
    return "bf16" if card.bf16_flops else "fp16"


def _ways_to_recompute(n_layer: int, asked: int | None) -> Iterator[list[Recompute]]:
    """Groups of alternatives, the fastest of each first."""
    yield [Recompute()]
    for kind in ("blocks", "selective", "offloaded"):
        yield [Recompute(kind, asked or n_layer)]
        if n_layer > 1 and not asked:
            yield [Recompute(kind, layers) for layers in range(1, n_layer)]


def _merit(p: Plan) -> tuple[bool, float]:
    return p.keeps_batch, p.tokens_per_s


def best_first(plans: list[Plan]) -> list[Plan]:
    """Sort: what fits and keeps the batch first; of these the most exact that is not much slower than the fastest."""
    fastest = max((p.tokens_per_s for p in plans if p.fits and p.keeps_batch), default=0.0)

    def order(p: Plan) -> tuple:
        if not p.fits:
            return 3, max(0, p.footprint.card_bytes - p.card_limit), p.host_bytes, p.name
        if not p.keeps_batch:
            return 2, -p.tokens_per_s, p.method.rank, p.name
        if p.tokens_per_s >= (1 - PREFERENCE) * fastest:
            return 0, p.method.rank, -p.tokens_per_s, p.name
        return 1, -p.tokens_per_s, p.method.rank, p.name

    return sorted(plans, key=order)


def choose(plans: list[Plan]) -> Plan | None:
    """Return the best plan that fits, of all or of those that are allowed; None where none does."""
    best = best_first(plans)[:1]  # of fewer plans another is the fastest
    return best[0] if best and best[0].fits else None


def reason(chosen: Plan, plans: list[Plan]) -> str:
    """Say why `chosen` of `plans`, best first, rather than what would be preferred to it, and what it costs."""
    others = passed_over(chosen, plans)
    first = "Not chosen: " + "; ".join(others) if others else "Nothing more exact is left to choose"
    return ". ".join([first, *cost(chosen, plans)]) + "."


def passed_over(chosen: Plan, plans: list[Plan]) -> list[str]:
    """Return the methods that are preferred to `chosen` of `plans`, best first, each with what speaks against it."""
    others, preferred = [], plans[: plans.index(chosen)]
    for method in METHODS:
        if method.rank >= chosen.method.rank or (method.stage and method.offload == "none" and chosen.gpus == 1):
            continue
        best = next((p for p in plans if p.method == method), None)
        if best is None:
            continue
        if not best.fits_card:
            others.append(f"{method.title}: would take {_gib(best.footprint.card_bytes)} GiB")
        elif not best.fits_host:
            others.append(f"{method.title}: would take {_gib(best.host_bytes)} GiB of host memory")
        elif best.keeps_batch:
            slower = f"{1 - best.tokens_per_s / chosen.tokens_per_s:.0%} slower"
            others.append(f"{method.title}: {'excluded by what is set' if best in preferred else slower}")
    return others


def cost(chosen: Plan, plans: list[Plan]) -> list[str]:
    """Return what the chosen plan gives up, a sentence each."""
    said = []
    whole = next((p for p in plans if p.method == chosen.method and p.recompute.kind == "none"), None)
    if chosen.recompute.kind != "none" and whole and not whole.fits:
        share = chosen.time.recompute / chosen.time.total
        kept = _gib(whole.footprint.card_bytes)
        said.append(f"With all activations kept it would take {kept} GiB; recomputing is {share:.0%} of the time")
    if chosen.method.in_backward:
        said.append("Updated inside the backward pass, gradients are not clipped")
    if not chosen.keeps_batch:
        said.append(f"It cannot accumulate: a step is {chosen.batch_tokens:,} tokens")
    return said


def _gib(size: float) -> str:
    return f"{size / GiB:.1f}"


def nearest(setup: Setup, accepts: Callable[[list[Plan]], list[Plan]] = lambda plans: plans) -> tuple[str, Plan] | None:
    """For what does not fit: the smallest change that makes it fit, in words, and its plan; None where none is found.

    Tried in this order: more host memory, shorter sequences, more cards, another card. accepts: which plans will do.
    """
    length, card = setup.model.block_size, setup.card
    memories = [size * GiB for size in (32, 48, 64, 96, 128, 192, 256, 512) if size * GiB > setup.host_memory]
    changes: list[tuple[str, dict[str, Any]]] = []
    changes += [(f"with {size // GiB} GiB of host memory", {"host_memory": size}) for size in memories]
    shorter = [length >> n for n in range(1, 5) if (length >> n) >= 128]
    changes += [
        (f"with sequences of {size} tokens", {"model": replace(setup.model, block_size=size)}) for size in shorter
    ]
    changes += [(f"with {setup.gpus * n} cards", {"gpus": setup.gpus * n}) for n in (2, 4, 8)]
    sizes = {c.label_gb: c for c in reversed(CARDS) if c.memory_bytes > card.memory_bytes}  # the first of each size
    changes += [(f"on the {sizes[size].name}", {"card": sizes[size]}) for size in sorted(sizes)]
    for words, change in changes:
        try:
            found = choose(accepts(replace(setup, **change).plans()))
        except ConfigError:
            continue
        if found:
            return words, found
    return None
