"""The card table: names as drivers and people write them, and figures that agree with one another."""

import re

import pytest
import torch

from engine.cards import CARDS, CLASSIC, GiB, find, get, peak_flops
from kernels.dispatch import CHIPS


@pytest.mark.parametrize(
    ("device_name", "name"),
    [
        ("NVIDIA GeForce RTX 3090", "RTX 3090"),
        ("NVIDIA GeForce RTX 3090 Ti", "RTX 3090 Ti"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "RTX 4070 Ti Super"),
        ("NVIDIA GeForce GTX 1080 Ti", "GTX 1080 Ti"),
        ("NVIDIA GeForce RTX 3060", "RTX 3060"),
        ("NVIDIA GeForce RTX 2080 Ti", "RTX 2080 Ti"),
        ("NVIDIA GeForce GTX 1660 SUPER", "GTX 1660 Super"),
        ("NVIDIA GeForce GTX 1060 6GB", "GTX 1060 6GB"),
        ("NVIDIA TITAN RTX", "Titan RTX"),
        ("Quadro RTX 8000", "Quadro RTX 8000"),
        ("Tesla T4", "T4"),
        ("Tesla V100-SXM2-16GB", "V100"),
        ("Tesla V100-SXM2-32GB", "V100 32GB"),
        ("Tesla P100-PCIE-16GB", "P100"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB PCIe"),
        ("NVIDIA A100-PCIE-40GB", "A100 40GB PCIe"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "RTX PRO 6000 Blackwell"),
        ("NVIDIA TITAN Xp", "Titan Xp"),
        ("AMD Radeon RX 7900 XTX", "RX 7900 XTX"),
        ("AMD Radeon PRO W7900", "W7900"),
        ("AMD Instinct MI250X/MI250", "MI250X"),
        ("AMD Instinct MI60 / MI50", "MI50"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA RTX A6000", "RTX A6000"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200", "H200"),
        ("AMD Radeon RX 6900 XT", "RX 6900 XT"),
        ("AMD Radeon VII", "Radeon VII"),
        ("AMD Instinct MI300X", "MI300X"),
    ],
)
def test_a_drivers_name_finds_its_card(device_name, name):
    assert find(device_name).name == name


@pytest.mark.parametrize(
    "name",
    [
        "cpu",
        "",
        "NVIDIA GeForce RTX 3080 Laptop GPU",
        "NVIDIA GeForce RTX 2050",
        "NVIDIA TITAN V",
        "GeForce GTX TITAN",
    ],
)
def test_an_unlisted_device_is_unknown_rather_than_guessed(name):
    assert find(name) is None
    assert peak_flops(name, torch.float32) is None


def test_people_may_leave_out_the_family_and_spaces():
    assert get("rtx3090") is get("RTX 3090") is get("3090")
    assert get("radeonvii") is get("Radeon VII")
    assert get("a100-40gb").label_gb == 40
    names = {"rtx6000ada": "RTX 6000 Ada", "7900xtx": "RX 7900 XTX", "a5000": "RTX A5000", "rtxa5000": "RTX A5000"}
    names |= {"rtxpro6000blackwell": "RTX PRO 6000 Blackwell", "titanxp": "Titan Xp"}
    assert {typed: get(typed).name for typed in names} == names


def test_bridges_are_not_counted():
    assert get("a100-pcie-40gb").link_bytes_s == get("a100 80gb pcie").link_bytes_s == get("a100-40gb").pcie_bytes_s
    assert get("a100 80gb pcie").bandwidth_bytes_s < get("a100 80gb").bandwidth_bytes_s


@pytest.mark.parametrize(
    ("typed", "meant"), [("a100", "A100 40GB or A100 80GB"), ("rtx3091", "RTX 3090"), ("H10", "H100")]
)
def test_a_misspelt_card_names_the_nearest(typed, meant):
    with pytest.raises(ValueError, match=meant):
        get(typed)


@pytest.mark.parametrize("typed", ["rtx2061", "gtx1050ti", "rtx3060m", "rx580", "t4000", "m40", "titan v", "rtx6000"])
def test_a_suggestion_is_of_the_same_series(typed):
    """Whatever is spelled alike: an RTX 2061 is no RTX 3060, and an RX 580 no RTX 5080."""
    with pytest.raises(ValueError) as error:
        get(typed)
    meant = re.findall(r"\w*?X (\d+)", str(error.value).partition("did you mean")[2])
    series = {"rtx2061": "20", "gtx1050ti": "10", "rtx3060m": "30", "rtx6000": "60"}.get(typed)
    assert {number[:-2] for number in meant} == ({series} if series else set())
    assert series or "known: " in str(error.value)


def test_every_name_means_one_card():
    for card in CARDS:
        assert get(card.name) is card
        for name in card.device_names:
            assert find(name) is card


def test_the_classic_table_comes_first_and_in_its_order():
    assert [card.label_gb for card in CLASSIC] == [40, 16, 24, 48, 16, 16, 16, 16, 11, 10]
    assert CARDS[: len(CLASSIC)] == CLASSIC


def test_figures_agree_with_one_another():
    for card in CARDS:
        assert 0.89 * card.label_gb <= card.memory_bytes / GiB <= card.label_gb, card.name
        assert card.fp16_flops >= card.fp32_flops > 1e12, card.name
        assert card.bf16_flops in (0, card.fp16_flops), card.name
        assert 1e11 < card.bandwidth_bytes_s < 6e12 and 1e10 < card.pcie_bytes_s < card.bandwidth_bytes_s, card.name
        if card.target in CHIPS:
            assert CHIPS[card.target].bf16 == (card.bf16_flops > 0), card.name


def test_peaks_are_dense_and_accumulate_in_fp32():
    # Not 142, which is with fp16 accumulation, nor 284, which is sparse.
    assert peak_flops("NVIDIA GeForce RTX 3090", torch.bfloat16) == 71.2e12
    assert peak_flops("NVIDIA GeForce RTX 4090", torch.bfloat16) == pytest.approx(165.2e12)
    assert peak_flops("NVIDIA H100 80GB HBM3", torch.bfloat16) == pytest.approx(989.4e12)
    for name, half, single in (("RTX 3060", 25.5e12, 12.7e12), ("RTX 2080 Ti", 53.8e12, 13.4e12)):
        assert (peak_flops(name, torch.float16), peak_flops(name, torch.float32)) == (half, single)
    assert peak_flops("NVIDIA L4", "bf16") == 121e12
    assert peak_flops("Tesla T4", torch.float16) == 65e12
    assert peak_flops("Tesla T4", torch.bfloat16) == peak_flops("Tesla T4", torch.float32)  # emulated
