"""Show what each way of training a model takes on a card: memory by part, time, and which to choose.

    python tools/plan.py --preset 2b --gpu rtx3090                       # every method on this card, and the choice
    python tools/plan.py --preset 2b --gpu rtx3090 --gpus 8 --host_memory 256GB
    python tools/plan.py --preset 2b --gpu all --picture plan.png        # the choice for each common card; or: every
    python tools/plan.py --preset 2b --gpu t4 --json                     # for programs
    python tools/plan.py --preset 2b --n_layer 30                        # another model: engine/train.py's flags of one
    python tools/plan.py --preset 2b --gpu rtx3080 --gpu_memory 12GB     # one that is not listed, as one that is

Without --gpu it plans for the GPU and the host memory that are here, or without a GPU for all. It ends with 1 where
nothing fits the one card.

Bytes are formulas checked against torch's memory tracker; times are estimates from published peaks and the shares of
them named in engine/step_time.py.
"""

import argparse
import dataclasses
import json
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from matplotlib.figure import Figure

from engine.cards import CARDS, CLASSIC, COMMON, Card, GiB, get, parse_memory
from engine.command_line import CommandLine, config_of, ends_on_ctrl_c, let_go_of_output, positive
from engine.config import PRESETS, ConfigError, ModelConfig, require, settings
from engine.device import card_of
from engine.device import host_memory as host_memory_here
from engine.footprint import METHODS, PARTS, Elements, Method
from engine.memory import GPUS_PER_MACHINE, Plan, Setup, choose, cost, nearest, passed_over, reason
from engine.placement import NO_DEEPSPEED

SHORT = {
    "weights": "weights", "gradients": "grads", "master_weights": "master", "optimizer_states": "states",
    "saved_activations": "saved", "working_layer": "layer", "loss_workspace": "loss", "communication": "buckets",
    "context": "context",
}  # fmt: skip
SCALES = (1, 2, 8, 64)
ASSUMED_HOST = "64GB"  # memory of a machine that is not this one
COLOURS = ("#1f4e79", "#2e86ab", "#5fa8d3", "#a9cfe8", "#e07a5f", "#f2a65a", "#f2cc8f", "#81b29a", "#bdbdbd")


LEGEND = """\
saved: activations for the backward pass; layer: one layer's work at a time; loss: the head's; buckets: what cards
exchange; context: the driver's, and fragmentation. card: all of these together; host: memory of one machine; micro:
sequences of a micro-batch; days/1e9: days for a billion tokens.
too large: for the card; host too small: for what lies there; changes the batch: it updates inside the backward pass and
cannot accumulate, so a step is one micro-batch."""
LEGEND_OF_CARDS = """\
GiB: what the card has for programs; card GiB, host GiB: what the choice takes of it, and of one machine's memory;
micro: sequences of a micro-batch; days/1e9: days for a billion tokens. \
--gpu NAME says why, and shows the other methods."""

Nearest = tuple[str, Plan] | None


def to_json(
    made: Plan | None, card: Card, preset: str, chosen: bool, why: str = "", near: Nearest = None
) -> dict[str, Any]:
    """Return a plan for programs: sizes in bytes of one card, host_bytes of one machine; engine/train.py's flags."""
    if made is None:
        fields = dict.fromkeys(("strategy", "micro_batch_size", "peak_bytes", "host_bytes", "tokens_per_s"))
        entry = {"gpu": card.name, "fits": False} | fields | {"chosen": False}
    else:
        entry = {
            "gpu": card.name,
            "fits": made.fits,
            "strategy": made.name,
            "micro_batch_size": made.micro_batch_size,
            "peak_bytes": made.footprint.card,
            "host_bytes": made.host_bytes,
            "tokens_per_s": round(made.tokens_per_s, 1),
            "chosen": chosen,
            "title": made.title,
            "dtype": made.dtype,
            "gpus": made.gpus,
            "grad_accum": made.grad_accum,
            "batch_tokens": made.batch_tokens,
            "card_bytes": made.footprint.card_bytes,
            "card_limit_bytes": made.card_limit,
            "host_parts_bytes": made.footprint.host,
            "step_s": {name: round(getattr(made.time, name), 4) for name in made.time.__dataclass_fields__},
            "communication_bytes": round(made.communication_bytes),
            "mfu": round(made.mfu, 3),
            "days_per_billion_tokens": round(made.days_per_billion_tokens, 3),
            "settings": made.settings,
            "flags": by_hand(made, preset),
        }
    if why:
        entry["reason"] = why
    if near:
        entry["nearest"] = {"change": near[0], "gpu": near[1].card.name, "strategy": near[1].name}
    return entry


def by_hand(made: Plan, preset: str) -> str:
    """Return the flags with which engine/train.py runs this plan, whatever the planner would choose there."""
    shape, usual = dataclasses.asdict(made.model), dataclasses.asdict(ModelConfig(**PRESETS[preset]["model"]))
    changed = [f"--{name} {value}" for name, value in shape.items() if value != usual[name]]
    return " ".join([f"--preset {preset}", *changed, made.flags])


def launcher(made: Plan) -> str:
    """Return what starts engine/train.py on this plan's cards."""
    if made.gpus == 1:
        return "python"
    if made.gpus > made.gpus_per_machine:
        return "deepspeed --hostfile hosts"
    starts = "deepspeed --num_gpus" if find_spec("deepspeed") else "torchrun --nproc_per_node"  # which is PyTorch's
    return f"{starts} {made.gpus}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return columns lined up: to the right where a column holds numbers, words to the left."""
    columns = list(zip(header, *rows))
    right = [all(not cell or cell[0].isdigit() or cell == "-" for cell in column[1:]) for column in columns]
    widths = [max(map(len, column)) for column in columns]
    lines = ([f"{cell:{'>' if r else '<'}{w}}" for cell, r, w in zip(row, right, widths)] for row in (header, *rows))
    return "\n".join("  ".join(line).rstrip() for line in lines)


def gib(size: float) -> str:
    return f"{size / GiB:.1f}"


def small(size: float) -> str:
    return f"{size / GiB:.2f}" if size else "-"


def speed(made: Plan) -> str:
    return f"{made.tokens_per_s:,.0f}"


def days(count: float) -> str:
    return f"{count:.2f}" if count < 1 else f"{count:.1f}" if count < 100 else f"{count:,.0f}"


def one_of_each_method(plans: list[Plan], chosen: Plan | None) -> list[Plan]:
    """Return the choice, then the best plan of every other method: what fits first."""
    best = {p.method.name: p for p in reversed(plans)}
    if chosen:
        best[chosen.method.name] = chosen
    places = {id(p): i for i, p in enumerate(plans)}
    return sorted(best.values(), key=lambda p: (p is not chosen, not p.fits, places[id(p)]))


def state(made: Plan, chosen: Plan | None) -> str:
    """Return a plan's status in a word or two."""
    if made is chosen:
        return "chosen"
    if not made.fits:
        return "host too small" if made.fits_card else "too large"
    return "fits" if made.keeps_batch else "changes the batch"


def show_card(card: Card, plans: list[Plan], preset: str, chosen: Plan | None, near: Nearest) -> str:
    """Return the table of one card by method, the choice and its reason."""
    first = plans[0]
    lines = [
        (f"{first.gpus} x " if first.gpus > 1 else "")
        + f"{card.name}: {gib(card.memory_bytes)} GiB for programs, {card.bandwidth_bytes_s / 1e9:.0f} GB/s, "
        f"{first.dtype} at {card.peak_flops(first.dtype) / 1e12:.0f} TFLOPS; "
        f"{gib(first.host_limit)} GiB of host memory to use",
        *emulated([first]),
        *([] if any(p.method.stage for p in plans) else [NO_DEEPSPEED]),
        "",
    ]
    rows = []
    for p in one_of_each_method(plans, chosen):
        parts = [small(p.footprint.card[part]) for part in PARTS]
        took = [gib(p.footprint.card_bytes), gib(p.host_bytes), str(p.micro_batch_size), speed(p)]
        rows.append([p.name, *parts, *took, days(p.days_per_billion_tokens), state(p, chosen)])
    header = ["method, GiB by part", *SHORT.values(), "card", "host", "micro", "tokens/s", "days/1e9", ""]
    lines += [table(header, rows), "", LEGEND, ""]
    if chosen:
        billions, day = 20 * Elements.of(chosen.model).total / 1e9, chosen.days_per_billion_tokens
        others = passed_over(chosen, plans)
        lines += [
            f"Choice: {chosen.title}.",
            f"By hand: {launcher(chosen)} engine/train.py {by_hand(chosen, preset)}",
            "Not chosen:" if others else "Nothing more exact is left to choose.",
            *(f"  {other}" for other in others),
            *(f"{sentence}." for sentence in cost(chosen, plans)),
            f"Micro-batch {chosen.micro_batch_size} x {chosen.grad_accum} on each card, {chosen.batch_tokens:,} tokens "
            f"a step in {chosen.time.total:,.1f} s, MFU {chosen.mfu:.0%}. A billion tokens take {days(day)} days.",
            f"20 tokens a parameter, which is about the best use of as much arithmetic (Hoffmann et al., 2022), are "
            f"{billions:.1f} billion, and take {days(billions * day)} days.",
        ]
    else:
        lines += ["Nothing fits.", *([show_nearest(near)] if near else [])]
    return "\n".join(lines)


def emulated(plans: list[Plan]) -> list[str]:
    """Return a line on the cards that have no arithmetic for bf16 and are to compute in it; none where all have it."""
    names = [p.card.name for p in plans if p.dtype == "bf16" and not p.card.bf16_flops]
    return (
        [f"bf16 is emulated on {', '.join(names)}, at the rate of fp32 at best: without --dtype it is fp16"]
        if names
        else []
    )


def needs_deepspeed(plans: Sequence[Plan | None]) -> list[str]:
    """Return a line on what is needed and not installed for these choices; none where nothing is."""
    names = list(dict.fromkeys(p.method.name for p in plans if p and p.method.stage))
    if find_spec("deepspeed") or not names:
        return []
    return [f"DeepSpeed is not installed here; for {', '.join(names)}: pip install deepspeed"]


def show_nearest(near: tuple[str, Plan]) -> str:
    return f"Nearest: {near[0]}, {near[1].title}, {speed(near[1])} tokens/s."


def show_scales(made: dict[int, Plan | None]) -> str:
    """Return what more cards bring: memory of one, what one sends in a step, speed."""
    rows = []
    alone = next((p for p in made.values() if p), None)  # or the fewest that do
    for gpus, p in made.items():
        if p is None:
            rows.append([f"{gpus}", "nothing fits", *[""] * 7])
            continue
        rows.append([
            f"{gpus}", p.name, gib(p.footprint.card_bytes), gib(p.host_bytes), f"{p.communication_bytes / 1e9:.1f}",
            f"{p.time.communication:.2f}", speed(p), f"{p.tokens_per_s / alone.tokens_per_s:.1f}",
            days(p.days_per_billion_tokens),
        ])  # fmt: skip
    header = ["cards", "choice", "card GiB", "host GiB", "GB sent", "s waited", "tokens/s", "times one", "days/1e9"]
    return table(header, rows)


def show_cards(made: dict[Card, tuple[Plan | None, list[Plan], Nearest]]) -> str:
    """Return a row for each card: the choice, or the nearest thing that fits."""
    rows = []
    for card, (chosen, _, near) in made.items():
        row = [card.name, gib(card.memory_bytes)]
        if chosen is None:
            rows.append([*row, "nothing fits" + (f"; {near[0]}: {near[1].name}" if near else ""), *[""] * 5])
            continue
        took = [str(chosen.micro_batch_size), gib(chosen.footprint.card_bytes), gib(chosen.host_bytes)]
        rows.append([*row, chosen.name, *took, speed(chosen), days(chosen.days_per_billion_tokens)])
    header = ["card", "GiB", "choice", "micro", "card GiB", "host GiB", "tokens/s", "days/1e9"]
    below = [LEGEND_OF_CARDS, *emulated([plans[0] for _, plans, _ in made.values()])]
    return "\n".join([table(header, rows), "", *below])


def draw(bars: Sequence[tuple[str, dict[str, int], float, str]], title: str) -> Figure:
    """Return a picture of memory by part, a bar for each (label, bytes by part, bytes of the card, words beside it)."""
    figure = Figure(figsize=(11, 1.6 + 0.42 * len(bars)), layout="constrained")
    axes = figure.subplots()
    for row, (_, sizes, limit, words) in enumerate(bars):
        left = 0.0
        for part, colour in zip(PARTS, COLOURS, strict=True):
            size = sizes[part] / GiB
            axes.barh(row, size, left=left, color=colour, label=PARTS[part] if row == 0 else None, height=0.7)
            left += size
        ends = [row - 0.45, row + 0.45]
        axes.plot([limit / GiB] * 2, ends, color="black", linewidth=2, label="memory of the card" if row == 0 else None)
        axes.text(max(left, limit / GiB) + 0.3, row, words, va="center", fontsize=8)
    axes.set_yticks(range(len(bars)), [label for label, *_ in bars], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel("GiB at the fullest moment of a step")
    axes.set_xlim(0, axes.get_xlim()[1] * 1.12)
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    return figure


def bar(label: str, made: Plan, card: Card) -> tuple[str, dict[str, int], float, str]:
    """Return what `draw` shows of a plan."""
    return label, made.footprint.card, card.memory_bytes, f"{speed(made)} tokens/s" if made.fits else "does not fit"


def parse_arguments(arguments: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Return what is asked, and the flags that are left, which are the model's."""
    models = ", ".join(f"--{field.name}" for field in dataclasses.fields(ModelConfig))
    models = textwrap.fill(f"engine/train.py's flags of a model change the preset's: {models}", 120)
    parser = CommandLine(f"{__doc__}\n{models}")
    add = parser.add_argument
    add("--preset", required=True, choices=list(PRESETS))
    add(
        "--gpu",
        metavar="NAME",
        help="such as rtx3090; all: the classic ten and common ones; every: whatever is known [the one here, or all]",
    )
    add("--gpus", type=positive, default=1, metavar="N", help="how many of them [1]")
    add(
        "--host_memory",
        metavar="SIZE",
        help=f"of one machine [this one's for the GPU that is here, else {ASSUMED_HOST}]",
    )
    add("--gpu_memory", metavar="SIZE", help="other than the card's: so a listed card stands for one that is not")
    add("--block_size", type=positive, metavar="N", help="tokens of a sequence; without it the preset's")
    add("--batch_tokens", type=positive, metavar="N", help="tokens a step; without it the preset's")
    add("--micro_batch_size", type=positive, metavar="N", help="sequences; without it the best that fits")
    add("--dtype", choices=["bf16", "fp16", "fp32"], help="of the computation; without it the card's best")
    add("--gpus_per_machine", type=positive, default=GPUS_PER_MACHINE, metavar="N", help=f"[{GPUS_PER_MACHINE}]")
    add("--network_gbit", type=float, default=100.0, metavar="X", help="Gb/s between machines [100]")
    add("--json", action="store_true", help="a list for programs instead of tables")
    add("--picture", metavar="FILE", help="draw memory by part, as .png, .svg or .pdf")
    return parser.parse_known_args(arguments)


def model_of(asked: argparse.Namespace, flags: list[str]) -> ModelConfig:
    """Return the preset's model, changed by engine/train.py's flags of a model. ConfigError for any other flag."""
    fields = [field.name for field in dataclasses.fields(ModelConfig)]
    training = {*settings(), "config", "resume"} - set(fields)
    for flag in flags:
        name = flag.removeprefix("--").partition("=")[0]
        trains = flag.startswith("--") and name in training
        require(not trains, f"{flag} is for training: beside its own flags plan takes a model's, {', '.join(fields)}")
    return config_of([f"--preset={asked.preset}", *flags], asked, fields).model


@ends_on_ctrl_c()
def main(arguments: list[str] | None = None) -> int:
    asked, flags = parse_arguments(arguments)
    try:
        return run(asked, flags)
    except BrokenPipeError:
        let_go_of_output()
        return 0
    except (ConfigError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(asked: argparse.Namespace, flags: list[str]) -> int:
    cards = cards_of(asked.gpu)
    if asked.gpu_memory:
        cards = tuple(replace(card, memory_bytes=parse_memory(asked.gpu_memory)) for card in cards)
    preset = PRESETS[asked.preset]
    model = model_of(asked, flags)
    if asked.block_size:
        model = replace(model, block_size=asked.block_size)
    host_memory, origin = host_of(asked)
    batch_tokens = preset["optimizer"]["batch_tokens"] if asked.batch_tokens is None else asked.batch_tokens
    common = dict(
        model=model,
        host_memory=host_memory,
        gpus=asked.gpus,
        batch_tokens=batch_tokens,
        dtype=asked.dtype,
        micro_batch_size=asked.micro_batch_size,
        gpus_per_machine=asked.gpus_per_machine,
        network_bytes_s=asked.network_gbit * 1e9 / 8,
        methods=methods_of(asked),
    )
    made = {}
    for card in cards:
        setup = Setup(card=card, **common)
        plans = setup.plans()
        chosen = choose(plans)
        made[card] = chosen, plans, None if chosen else nearest(setup)
    millions = Elements.of(model).total / 1e6
    shape = f"sequences of {model.block_size}, {batch_tokens:,} tokens a step"
    title = f"{' '.join([asked.preset, *flags])}: {millions:,.0f} M parameters, {shape}"
    if len(cards) > 1:
        bars = [bar(card.name, made[card][0] or made[card][1][0], card) for card in cards[: len(CLASSIC)]]
        entries = [
            to_json(chosen, card, asked.preset, True, reason(chosen, plans))
            if chosen
            else to_json(None, card, asked.preset, False, near=near)
            for card, (chosen, plans, near) in made.items()
        ]
        text, choices = show_cards(made), [chosen for chosen, *_ in made.values()]
    else:
        ((card, (chosen, plans, near)),) = made.items()
        shown = one_of_each_method(plans, chosen)
        bars = [bar(p.name + (" (chosen)" if p is chosen else ""), p, card) for p in shown]
        entries = [to_json(p, card, asked.preset, p is chosen, reason(p, plans) if p is chosen else "") for p in plans]
        if near:
            entries[0] = to_json(plans[0], card, asked.preset, False, near=near)
        text = show_card(card, plans, asked.preset, chosen, near)
        machine = f"{asked.gpus_per_machine} to a machine, {gib(host_memory)} GiB of its memory for each"
        text += f"\n\nMore of them, up to {machine}:\n"
        more = scales(setup)
        text, choices = text + show_scales(more), [chosen, *more.values()]
        title += f" on {asked.gpus} x {card.name}" if asked.gpus > 1 else f" on {card.name}"
    if asked.picture:
        draw(bars, title).savefig(asked.picture, dpi=150)
    text += "".join(f"\n\n{line}" for line in needs_deepspeed(choices))
    entries = [entry | {"host_memory_bytes": host_memory} for entry in entries]
    title += f"; {gib(host_memory)} GiB of host memory, {origin}"
    print(json.dumps(entries, indent=1) if asked.json else f"{title}\n{text}", flush=True)
    return 0 if len(cards) > 1 or chosen else 1


def cards_of(name: str | None) -> tuple[Card, ...]:
    """Return the cards to plan for: the one that is called `name`, or many; without a name the GPU that is here."""
    if is_here(name):
        return (card_of(torch.device("cuda", 0)),)
    if name in (None, "all"):
        return COMMON
    if name == "every":
        return CARDS
    try:
        return (get(name),)
    except ValueError as error:
        example = "one that is not listed is planned for as one that is, such as --gpu rtx3080 --gpu_memory 12GB"
        raise ValueError(f"{error}; {example}") from None


def host_of(asked: argparse.Namespace) -> tuple[int, str]:
    """Return the bytes of host memory to plan with, and whose they are: for the GPU that is here, as training does."""
    if asked.host_memory:
        return parse_memory(asked.host_memory), "asked for"
    if is_here(asked.gpu):
        return host_memory_here(), "this machine's"
    return parse_memory(ASSUMED_HOST), "assumed"


def methods_of(asked: argparse.Namespace) -> tuple[Method, ...]:
    """Return the methods to weigh: as training does, for the GPU that is here without those that are not installed."""
    everything = not is_here(asked.gpu) or find_spec("deepspeed")
    return METHODS if everything else tuple(m for m in METHODS if not m.stage)


def is_here(name: str | None) -> bool:
    """Whether the card to plan for is the GPU that is here."""
    return name is None and torch.cuda.is_available()


def scales(setup: Setup) -> dict[int, Plan | None]:
    """Return the choice for several numbers of cards; numbers that cannot share the batch are left out."""
    made = {}
    for gpus in SCALES:
        here = setup.host_memory * min(gpus, setup.gpus_per_machine)
        try:
            made[gpus] = choose(replace(setup, gpus=gpus, host_memory=here).plans())
        except ConfigError:
            continue
    return made


if __name__ == "__main__":
    sys.exit(main())
