"""The planner: what it says fits, what it prefers and why, and what it says where nothing fits."""

from dataclasses import replace

import pytest

from engine.cards import CLASSIC, GiB, get
from engine.config import PRESETS, ConfigError, ModelConfig, from_dict
from engine.footprint import METHODS
from engine.memory import PREFERENCE, Plan, Setup, best_first, choose, nearest, plan, reason

TWO_B = ModelConfig(**PRESETS["2b"]["model"])
HOST = 64 * GiB


@pytest.fixture(scope="module")
def classic() -> dict[str, list[Plan]]:
    return {card.name: plan(TWO_B, card, HOST) for card in CLASSIC}


@pytest.mark.parametrize("card", CLASSIC, ids=lambda card: card.name)
def test_two_billion_parameters_train_on_every_card_of_the_classic_table(classic, card):
    chosen = choose(classic[card.name])
    assert chosen.fits and chosen.keeps_batch
    assert chosen.footprint.card_bytes <= chosen.card_limit < card.memory_bytes
    assert chosen.host_bytes <= HOST
    assert chosen.micro_batch_size * chosen.grad_accum * TWO_B.block_size == chosen.batch_tokens == 524_288
    assert chosen.dtype == ("bf16" if card.bf16_flops else "fp16")
    text = reason(chosen, classic[card.name])
    assert text.startswith(("Not chosen: fp32 weights and moments on the card", "Nothing more exact"))


def test_the_defaults_of_each_size_are_those_of_the_design(classic):
    chosen = {name: choose(plans) for name, plans in classic.items()}
    assert chosen["RTX 3090"].method.name == "residual"
    assert chosen["A100 40GB"].method.name == "residual"
    assert chosen["V100"].method.name == "stochastic"
    assert chosen["RTX 3080"].method.streamed
    assert choose(plan(TWO_B, get("A100 80GB"), HOST)).method.name == "resident"
    assert choose(plan(TWO_B, get("H100"), HOST)).recompute.kind == "none"


def test_exactness_goes_before_a_little_speed_and_fit_before_all(classic):
    plans = classic["RTX 3090"]
    fitting = [p for p in plans if p.fits and p.keeps_batch]
    assert plans[: len(fitting)] == fitting
    fastest = max(p.tokens_per_s for p in fitting)
    assert plans[0].tokens_per_s >= (1 - PREFERENCE) * fastest
    near = [p for p in fitting if p.tokens_per_s >= (1 - PREFERENCE) * fastest]
    assert plans[0].method.rank == min(p.method.rank for p in near)
    assert best_first(plans[::-1]) == plans


def test_updating_inside_the_backward_pass_changes_the_batch_and_comes_after_what_keeps_it(classic):
    for plans in classic.values():
        order = [p.keeps_batch for p in plans if p.fits]
        assert order == sorted(order, reverse=True)
        for p in plans:
            assert p.keeps_batch or (p.method.in_backward and p.grad_accum == 1)
    only = [p for p in classic["RTX 3080"] if p.method.name == "stochastic-in-backward"]
    chosen = choose(only)
    assert chosen.fits and chosen.batch_tokens == chosen.micro_batch_size * TWO_B.block_size
    assert "gradients are not clipped. It cannot accumulate" in reason(chosen, only)
    whole = choose([p for p in plan(TWO_B, get("H100"), HOST, batch_tokens=8192) if p.method.in_backward])
    assert whole.keeps_batch


def test_there_is_a_plan_for_each_method_and_way_of_recomputing(classic):
    names = {(p.method.name, p.recompute.kind) for p in classic["T4"]}
    assert names == {(m.name, kind) for m in METHODS for kind in ("none", "blocks", "selective", "offloaded")}
    partial = [p for p in classic["RTX 3090"] if 0 < p.recompute.layers < 24]
    assert {p.method.name for p in partial} == {m.name for m in METHODS}
    assert {p.recompute.kind for p in partial} == {"blocks", "selective", "offloaded"}
    asked = plan(TWO_B, get("RTX 3090"), HOST, recomputed_blocks=7)
    assert {p.recompute.layers for p in asked} == {0, 7}


def test_what_is_kept_of_recomputed_blocks_trades_time_for_memory():
    """With room, at one micro-batch: keeping attention is faster and larger, host memory smaller and no faster."""
    plans = plan(TWO_B, get("RTX 4090"), HOST, micro_batch_size=4)
    whole = {p.recompute.kind: p for p in plans if p.method.name == "stochastic" and p.recompute.layers == 24}
    assert whole["selective"].tokens_per_s > whole["blocks"].tokens_per_s >= whole["offloaded"].tokens_per_s
    held = [whole[kind].footprint.card_bytes for kind in ("selective", "blocks", "offloaded")]
    assert held == sorted(held, reverse=True)
    inputs = 4 * TWO_B.block_size * TWO_B.n_embd * 2
    assert (
        whole["blocks"].footprint.card["saved_activations"] - whole["offloaded"].footprint.card["saved_activations"]
        == 22 * inputs
    )
    assert 22 * inputs <= whole["offloaded"].footprint.host["saved_activations"] < 2 * 22 * inputs
    assert len({p.name for p in plans}) == len({p.title for p in plans}) == len(plans)


def test_a_partly_recomputed_plan_recomputes_as_little_as_fits():
    card = get("V100")
    made = next(p for p in plan(TWO_B, card, HOST) if p.method.name == "stochastic" and 0 < p.recompute.layers < 24)
    fewer = replace(card, memory_bytes=int(made.footprint.card_bytes / 0.98) - 64 * 2**20)
    again = next(p for p in plan(TWO_B, fewer, HOST, micro_batch_size=made.micro_batch_size)
                 if p.method.name == "stochastic" and 0 < p.recompute.layers < 24)  # fmt: skip
    assert made.fits and again.fits and again.recompute.layers > made.recompute.layers


@pytest.mark.parametrize("gib", [10, 11, 16, 24, 40, 48, 80])
def test_what_fits_stays_within_the_memory_given(gib):
    card = replace(get("H100"), memory_bytes=gib * GiB)
    plans = plan(TWO_B, card, HOST)
    for p in plans:
        assert p.fits == (p.footprint.card_bytes <= 0.98 * gib * GiB and p.host_bytes <= HOST - 4 * GiB)
    assert choose(plans).fits


def test_more_memory_is_never_much_slower():
    cards = [replace(get("H100"), memory_bytes=gib * GiB) for gib in (10, 16, 24, 48, 80)]
    speeds = [choose(plan(TWO_B, card, HOST)).tokens_per_s for card in cards]
    assert all(more > (1 - PREFERENCE) * less for less, more in zip(speeds, speeds[1:]))


def test_chips_without_bf16_compute_in_fp16_and_may_be_told_otherwise():
    for name in ("V100", "T4", "Quadro RTX 8000", "GTX 1080 Ti", "P100"):
        assert {p.dtype for p in plan(TWO_B, get(name), HOST)} == {"fp16"}
    wide = choose(plan(TWO_B, get("GTX 1080 Ti"), HOST, dtype="fp32"))
    narrow = choose(plan(TWO_B, get("GTX 1080 Ti"), HOST))
    assert wide.dtype == "fp32" and narrow.tokens_per_s > wide.tokens_per_s


def test_settings_are_those_of_a_configuration(classic):
    for plans in [*classic.values(), plan(TWO_B, get("RTX 3090"), 8 * HOST, gpus=8)]:
        for p in plans:
            config = from_dict({"model": PRESETS["2b"]["model"], **p.settings})
            assert config.strategy.activation_checkpointing == p.recompute.kind
            assert config.optimizer.batch_tokens == p.batch_tokens


def test_several_cards_share_the_states_where_that_is_as_fast_and_copy_them_where_it_is_not():
    assert choose(plan(TWO_B, get("RTX 3090"), 8 * HOST, gpus=2)).method.name == "residual"
    assert choose(plan(TWO_B, get("H100"), 8 * HOST, gpus=8)).method.name == "resident"
    for gpus in (2, 8, 64):
        chosen = choose(plan(TWO_B, get("RTX 3090"), 8 * HOST, gpus=gpus))
        assert chosen.gpus == gpus and chosen.processes == min(gpus, 8)
        assert chosen.communication_bytes > 0
        assert chosen.batch_tokens == gpus * chosen.grad_accum * chosen.micro_batch_size * TWO_B.block_size


def test_a_batch_that_cannot_be_shared_is_refused_with_the_reason():
    card = get("H100")
    with pytest.raises(ConfigError, match="multiple of block_size"):
        plan(TWO_B, card, HOST, batch_tokens=1000)
    with pytest.raises(ConfigError, match="shared by 3 cards evenly: --batch_tokens 522240 would do"):
        plan(TWO_B, card, HOST, gpus=3)
    assert choose(plan(TWO_B, card, HOST, gpus=3, batch_tokens=522240))
    with pytest.raises(ConfigError, match=f"--batch_tokens {300 * 2048} would do"):
        plan(TWO_B, card, HOST, gpus=300)
    with pytest.raises(ConfigError, match="must divide the 256 sequences"):
        plan(TWO_B, card, HOST, micro_batch_size=3)


def test_where_nothing_fits_the_nearest_change_is_named():
    card = replace(get("RTX 3080"), memory_bytes=3 * GiB)
    assert choose(plan(TWO_B, card, HOST)) is None
    words, found = nearest(Setup(model=TWO_B, card=card, host_memory=HOST))
    assert found.fits and words == "on the GTX 1060 6GB"
    card = replace(card, memory_bytes=6 * GiB)
    words, found = nearest(Setup(model=TWO_B, card=card, host_memory=8 * GiB))
    assert found.fits and words == "with 64 GiB of host memory"
    assert [choose(plan(TWO_B, card, size * GiB)) for size in (8, 48, 64)] == [None, None, found]
    host_too_small = [p for p in plan(TWO_B, get("RTX 3080"), 16 * GiB) if p.method.stage]
    assert choose(host_too_small) is None
    huge = ModelConfig(n_layer=100, n_head=128, n_embd=16384, block_size=1024)
    assert nearest(Setup(model=huge, card=card, host_memory=HOST)) is None
