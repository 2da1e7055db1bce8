"""The GPUs that people train on, as data: memory, bandwidth, peak arithmetic, host link.

Peaks are the vendors' published figures for dense matrix products with fp32 accumulation, which is what training uses:
never the sparse figure, never GeForce's doubled rate with fp16 accumulation. Where a chip has no such unit, the entry
is the rate at which PyTorch multiplies that dtype there.
"""

import difflib
import re
from dataclasses import dataclass

import torch

GB, GiB, TFLOPS = 10**9, 2**30, 10**12
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# One direction, all lanes, after line coding.
PCIE3_X16, PCIE4_X8, PCIE4_X16, PCIE5_X8, PCIE5_X16 = 15.75e9, 15.75e9, 31.5e9, 31.5e9, 63.0e9


@dataclass(frozen=True, kw_only=True)
class Card:
    """One GPU as one device of torch.

    target: what kernels are compiled for, as in kernels/dispatch.py. memory_bytes: what the driver offers to a program,
    a little below the label (`label_gb`), the more so where error correction takes its sixteenth. bandwidth_bytes_s: of
    the device memory. bf16_flops (0 where bf16 is not native), fp16_flops, fp32_flops: peak FLOP/s, fp32 without TF32.
    pcie_bytes_s: to the host, link_bytes_s: to its like in one machine, each in one direction; bridges, which are sold
    apart and join a few cards, are not counted. device_names: further names that drivers give it. source: of the
    figures.
    """

    name: str
    target: str
    label_gb: int
    memory_bytes: int
    bandwidth_bytes_s: float
    bf16_flops: float
    fp16_flops: float
    fp32_flops: float
    pcie_bytes_s: float
    link_bytes_s: float
    device_names: tuple[str, ...] = ()
    source: str = ""

    def peak_flops(self, dtype: torch.dtype | str) -> float:
        """Peak FLOP/s in `dtype`: a torch dtype, or "bf16", "fp16", "fp32". Emulated bf16 runs at the rate of fp32."""
        name = DTYPE_NAMES.get(dtype, dtype)
        return getattr(self, f"{name}_flops") or self.fp32_flops


def _card(
    name: str, target: str, label_gb: int, gib: float, bandwidth_gb: float, peaks: tuple[float, float, float],
    pcie: float, source: str, *device_names: str, link_gb: float = 0,
) -> Card:  # fmt: skip
    """`gib`: total_memory as torch reports it; `peaks`: TFLOPS of bf16, fp16, fp32; `link_gb`: 0 is PCIe."""
    bf16, fp16, fp32 = (peak * TFLOPS for peak in peaks)
    return Card(
        name=name, target=target, label_gb=label_gb, memory_bytes=int(gib * GiB), bandwidth_bytes_s=bandwidth_gb * GB,
        bf16_flops=bf16, fp16_flops=fp16, fp32_flops=fp32, pcie_bytes_s=pcie, link_bytes_s=link_gb * GB or pcie,
        device_names=device_names, source=source,
    )  # fmt: skip


# Cores and boost clock are on the product page; two FLOPs a core and cycle in FP32.
_PASCAL_GEFORCE = "NVIDIA product page; FP16 is multiplied with FP32 arithmetic"
_TURING_GTX = "NVIDIA product page; no tensor cores, and no FP16 rate with FP32 accumulation is published: FP32's"
_TURING_GEFORCE = "NVIDIA Turing whitepaper, reference clocks, FP16 tensor with FP32 accumulate"
_TURING_PAGE = "NVIDIA product page; FP16 tensor rate halved, as GeForce cards accumulate in FP32"
_AMPERE_GEFORCE = "NVIDIA Ampere GA102 whitepaper, FP16 tensor with FP32 accumulate"
_AMPERE_PAGE = "NVIDIA product page, cores x boost clock; FP16 tensor with FP32 accumulate is twice FP32"
_AMPERE_DATASHEET = "NVIDIA datasheet, sparse figure halved"
_ADA_GEFORCE = "NVIDIA Ada whitepaper, FP16 tensor with FP32 accumulate"
_ADA_PAGE = "NVIDIA product page, cores x boost clock; FP16 tensor with FP32 accumulate is twice FP32"
_BLACKWELL_GEFORCE = "NVIDIA RTX Blackwell whitepaper, FP16 tensor with FP32 accumulate"
_BLACKWELL_PAGE = "NVIDIA product page, cores x boost clock; FP16 tensor with FP32 accumulate is twice FP32"
_RDNA2 = "AMD product page; packed FP16, no matrix cores"
_RDNA = "AMD product page"

# The table by which people have chosen a card for two billion parameters, in its order.
CLASSIC: tuple[Card, ...] = (
    _card("A100 40GB", "cuda:80", 40, 39.38, 1555, (312, 312, 19.5), PCIE4_X16, "NVIDIA A100 datasheet",
          "A100-SXM4-40GB", link_gb=300),
    _card("V100", "cuda:70", 16, 15.77, 900, (0, 125, 15.7), PCIE3_X16, "NVIDIA V100 datasheet, SXM2",
          "V100-SXM2-16GB", link_gb=150),
    _card("RTX 3090", "cuda:86", 24, 23.56, 936, (71.2, 71.2, 35.6), PCIE4_X16, _AMPERE_GEFORCE),
    _card("Quadro RTX 8000", "cuda:75", 48, 47.25, 672, (0, 130.5, 16.3), PCIE3_X16,
          "NVIDIA Turing whitepaper; Quadro accumulates in FP32 at the full rate"),
    _card("T4", "cuda:75", 16, 14.56, 320, (0, 65, 8.1), PCIE3_X16, "NVIDIA Turing whitepaper"),
    _card("RX 6900 XT", "hip:gfx1030", 16, 15.98, 512, (0, 46.08, 23.04), PCIE4_X16, _RDNA2),
    _card("Radeon VII", "hip:gfx906", 16, 15.98, 1024, (0, 27.7, 13.8), PCIE3_X16,
          "AMD product page; packed FP16, no matrix cores", "Vega 20"),
    _card("P100", "cuda:60", 16, 15.89, 732, (0, 9.3, 9.3), PCIE3_X16,
          "NVIDIA P100 datasheet, PCIe; FP16 is multiplied with FP32 arithmetic", "P100-PCIE-16GB"),
    _card("GTX 1080 Ti", "cuda:61", 11, 10.91, 484, (0, 11.3, 11.3), PCIE3_X16,
          "NVIDIA product page; FP16 is multiplied with FP32 arithmetic"),
    _card("RTX 3080", "cuda:86", 10, 9.77, 760, (59.5, 59.5, 29.8), PCIE4_X16, _AMPERE_GEFORCE),
)  # fmt: skip

CARDS: tuple[Card, ...] = CLASSIC + (
    _card("GTX 1060 6GB", "cuda:61", 6, 5.93, 192, (0, 4.4, 4.4), PCIE3_X16, _PASCAL_GEFORCE, "GTX 1060"),
    _card("GTX 1070", "cuda:61", 8, 7.93, 256, (0, 6.5, 6.5), PCIE3_X16, _PASCAL_GEFORCE),
    _card("GTX 1080", "cuda:61", 8, 7.93, 320, (0, 8.9, 8.9), PCIE3_X16, _PASCAL_GEFORCE),
    _card("V100 PCIe", "cuda:70", 16, 15.77, 900, (0, 112, 14.0), PCIE3_X16, "NVIDIA V100 datasheet, PCIe",
          "V100-PCIE-16GB"),
    _card("V100 32GB", "cuda:70", 32, 31.74, 900, (0, 125, 15.7), PCIE3_X16, "NVIDIA V100 datasheet, SXM2",
          "V100-SXM2-32GB", link_gb=150),
    _card("P100 SXM2", "cuda:60", 16, 15.89, 732, (0, 10.6, 10.6), PCIE3_X16,
          "NVIDIA P100 datasheet, SXM2; FP16 is multiplied with FP32 arithmetic", "P100-SXM2-16GB", link_gb=80),
    _card("GTX 1650", "cuda:75", 4, 3.82, 128, (0, 3.0, 3.0), PCIE3_X16, _TURING_GTX),
    _card("GTX 1660", "cuda:75", 6, 5.61, 192, (0, 5.0, 5.0), PCIE3_X16, _TURING_GTX),
    _card("GTX 1660 Super", "cuda:75", 6, 5.61, 336, (0, 5.0, 5.0), PCIE3_X16, _TURING_GTX),
    _card("GTX 1660 Ti", "cuda:75", 6, 5.61, 288, (0, 5.4, 5.4), PCIE3_X16, _TURING_GTX),
    _card("RTX 2060", "cuda:75", 6, 5.61, 336, (0, 25.8, 6.5), PCIE3_X16, _TURING_PAGE),
    _card("RTX 2070", "cuda:75", 8, 7.60, 448, (0, 29.9, 7.5), PCIE3_X16, _TURING_GEFORCE),
    _card("RTX 2080", "cuda:75", 8, 7.60, 448, (0, 40.3, 10.1), PCIE3_X16, _TURING_GEFORCE),
    _card("RTX 2080 Ti", "cuda:75", 11, 10.57, 616, (0, 53.8, 13.4), PCIE3_X16, _TURING_GEFORCE),
    _card("Titan RTX", "cuda:75", 24, 23.46, 672, (0, 130.5, 16.3), PCIE3_X16,
          "NVIDIA product page; Titan RTX accumulates in FP32 at the full rate"),
    _card("RTX 3050", "cuda:86", 8, 7.79, 224, (18.2, 18.2, 9.1), PCIE4_X8, _AMPERE_PAGE),
    _card("RTX 3060", "cuda:86", 12, 11.63, 360, (25.5, 25.5, 12.7), PCIE4_X16, _AMPERE_PAGE),
    _card("RTX 3060 Ti", "cuda:86", 8, 7.66, 448, (32.4, 32.4, 16.2), PCIE4_X16, _AMPERE_PAGE),
    _card("RTX 3070", "cuda:86", 8, 7.66, 448, (40.6, 40.6, 20.3), PCIE4_X16, _AMPERE_GEFORCE),
    _card("RTX 3070 Ti", "cuda:86", 8, 7.66, 608, (43.5, 43.5, 21.7), PCIE4_X16, _AMPERE_PAGE),
    _card("RTX 3080 Ti", "cuda:86", 12, 11.63, 912, (68.2, 68.2, 34.1), PCIE4_X16, _AMPERE_PAGE),
    _card("RTX 3090 Ti", "cuda:86", 24, 23.56, 1008, (80.0, 80.0, 40.0), PCIE4_X16, _AMPERE_PAGE),
    _card("RTX A6000", "cuda:86", 48, 47.43, 768, (154.8, 154.8, 38.7), PCIE4_X16,
          "NVIDIA RTX A6000 datasheet, sparse figure halved"),
    _card("A10G", "cuda:86", 24, 22.06, 600, (70, 70, 35), PCIE4_X16, "NVIDIA A10G datasheet"),
    _card("A100 80GB", "cuda:80", 80, 79.15, 2039, (312, 312, 19.5), PCIE4_X16, "NVIDIA A100 datasheet",
          "A100-SXM4-80GB", link_gb=300),
    _card("RTX 4060", "cuda:89", 8, 7.63, 272, (30.2, 30.2, 15.1), PCIE4_X8, _ADA_GEFORCE),
    _card("RTX 4060 Ti", "cuda:89", 16, 15.57, 288, (44.1, 44.1, 22.1), PCIE4_X8, _ADA_GEFORCE),
    _card("RTX 4070", "cuda:89", 12, 11.60, 504, (58.3, 58.3, 29.1), PCIE4_X16, _ADA_GEFORCE),
    _card("RTX 4070 Super", "cuda:89", 12, 11.60, 504, (71.0, 71.0, 35.5), PCIE4_X16, _ADA_PAGE),
    _card("RTX 4070 Ti", "cuda:89", 12, 11.60, 504, (80.2, 80.2, 40.1), PCIE4_X16, _ADA_GEFORCE),
    _card("RTX 4070 Ti Super", "cuda:89", 16, 15.57, 672, (88.2, 88.2, 44.1), PCIE4_X16, _ADA_PAGE),
    _card("RTX 4080", "cuda:89", 16, 15.57, 716.8, (97.5, 97.5, 48.7), PCIE4_X16, _ADA_GEFORCE),
    _card("RTX 4080 Super", "cuda:89", 16, 15.57, 736, (104.4, 104.4, 52.2), PCIE4_X16, _ADA_PAGE),
    _card("RTX 4090", "cuda:89", 24, 23.51, 1008, (165.2, 165.2, 82.6), PCIE4_X16, _ADA_GEFORCE),
    _card("L4", "cuda:89", 24, 22.03, 300, (121, 121, 30.3), PCIE4_X16, "NVIDIA L4 datasheet, sparse figure halved"),
    _card("L40S", "cuda:89", 48, 44.39, 864, (366.4, 366.4, 91.6), PCIE4_X16,
          "NVIDIA L40S datasheet, half of the sparse figure; it prints 362.05 for the dense one"),
    _card("RTX 5060 Ti", "cuda:120", 16, 15.47, 448, (47.4, 47.4, 23.7), PCIE5_X8, _BLACKWELL_GEFORCE),
    _card("RTX 5070", "cuda:120", 12, 11.50, 672, (61.7, 61.7, 30.9), PCIE5_X16, _BLACKWELL_GEFORCE),
    _card("RTX 5070 Ti", "cuda:120", 16, 15.47, 896, (87.9, 87.9, 43.9), PCIE5_X16, _BLACKWELL_GEFORCE),
    _card("RTX 5080", "cuda:120", 16, 15.47, 960, (112.6, 112.6, 56.3), PCIE5_X16, _BLACKWELL_GEFORCE),
    _card("RTX 5090", "cuda:120", 32, 31.36, 1792, (209.5, 209.5, 104.8), PCIE5_X16, _BLACKWELL_GEFORCE),
    _card("H100", "cuda:90", 80, 79.10, 3350, (989.4, 989.4, 66.9), PCIE5_X16, "NVIDIA H100 whitepaper, SXM5",
          "H100 80GB HBM3", link_gb=450),
    _card("H100 PCIe", "cuda:90", 80, 79.10, 2000, (756, 756, 51.2), PCIE5_X16, "NVIDIA H100 whitepaper, PCIe"),
    _card("H100 NVL", "cuda:90", 94, 93.0, 3900, (835, 835, 60), PCIE5_X16,
          "NVIDIA H100 datasheet, sparse figure halved"),
    _card("H200", "cuda:90", 141, 139.80, 4800, (989.4, 989.4, 66.9), PCIE5_X16,
          "NVIDIA H200 datasheet, sparse figure halved", link_gb=450),
    _card("MI210", "hip:gfx90a", 64, 63.98, 1638, (181, 181, 45.3), PCIE4_X16, "AMD Instinct MI210 datasheet"),
    _card("MI250X", "hip:gfx90a", 64, 63.98, 1638, (191.5, 191.5, 47.9), PCIE4_X16,
          "AMD Instinct MI250X datasheet, one of its two dies: what torch sees as a device",
          "MI250X/MI250", link_gb=50),
    _card("MI300X", "hip:gfx942", 192, 191.98, 5300, (1307.4, 1307.4, 163.4), PCIE5_X16,
          "AMD Instinct MI300X datasheet", link_gb=448),
    _card("A100 80GB PCIe", "cuda:80", 80, 79.15, 1935, (312, 312, 19.5), PCIE4_X16, "NVIDIA A100 datasheet"),
    _card("A100 40GB PCIe", "cuda:80", 40, 39.38, 1555, (312, 312, 19.5), PCIE4_X16, "NVIDIA A100 datasheet",
          "A100-PCIE-40GB"),
    _card("RTX 2060 Super", "cuda:75", 8, 7.60, 448, (0, 28.7, 7.2), PCIE3_X16, _TURING_PAGE),
    _card("RTX 2070 Super", "cuda:75", 8, 7.60, 448, (0, 36.2, 9.1), PCIE3_X16, _TURING_PAGE),
    _card("RTX 2080 Super", "cuda:75", 8, 7.60, 496, (0, 44.6, 11.2), PCIE3_X16, _TURING_PAGE),
    _card("GTX 1070 Ti", "cuda:61", 8, 7.93, 256, (0, 8.2, 8.2), PCIE3_X16, _PASCAL_GEFORCE),
    _card("Titan Xp", "cuda:61", 12, 11.90, 547.7, (0, 12.1, 12.1), PCIE3_X16, _PASCAL_GEFORCE),
    _card("P40", "cuda:61", 24, 22.38, 346, (0, 11.8, 11.8), PCIE3_X16,
          "NVIDIA P40 datasheet; FP16 is multiplied with FP32 arithmetic"),
    _card("V100 PCIe 32GB", "cuda:70", 32, 31.74, 900, (0, 112, 14.0), PCIE3_X16, "NVIDIA V100 datasheet, PCIe",
          "V100-PCIE-32GB"),
    _card("V100S", "cuda:70", 32, 31.74, 1134, (0, 130, 16.4), PCIE3_X16, "NVIDIA V100 datasheet, V100S PCIe",
          "V100S-PCIE-32GB"),
    _card("A30", "cuda:80", 24, 23.59, 933, (165, 165, 10.3), PCIE4_X16, "NVIDIA A30 datasheet"),
    _card("A10", "cuda:86", 24, 21.99, 600, (125, 125, 31.2), PCIE4_X16, "NVIDIA A10 datasheet"),
    _card("A40", "cuda:86", 48, 44.34, 696, (149.7, 149.7, 37.4), PCIE4_X16, "NVIDIA A40 datasheet"),
    _card("RTX A2000 12GB", "cuda:86", 12, 11.73, 288, (31.9, 31.9, 8.0), PCIE4_X16, _AMPERE_DATASHEET),
    _card("RTX A4000", "cuda:86", 16, 15.73, 448, (76.7, 76.7, 19.2), PCIE4_X16, _AMPERE_DATASHEET),
    _card("RTX A4500", "cuda:86", 20, 19.57, 640, (94.6, 94.6, 23.7), PCIE4_X16, _AMPERE_DATASHEET),
    _card("RTX A5000", "cuda:86", 24, 23.55, 768, (111.1, 111.1, 27.8), PCIE4_X16, _AMPERE_DATASHEET),
    _card("L40", "cuda:89", 48, 44.40, 864, (181.05, 181.05, 90.5), PCIE4_X16, "NVIDIA L40 datasheet"),
    _card("RTX 6000 Ada", "cuda:89", 48, 47.38, 960, (364.2, 364.2, 91.1), PCIE4_X16,
          "NVIDIA RTX 6000 Ada datasheet, a quarter of the sparse FP8 figure", "RTX 6000 Ada Generation"),
    _card("RTX 4060 Ti 8GB", "cuda:89", 8, 7.62, 288, (44.1, 44.1, 22.1), PCIE4_X8, _ADA_GEFORCE),
    _card("RTX 4090 D", "cuda:89", 24, 23.51, 1008, (147.1, 147.1, 73.5), PCIE4_X16, _ADA_PAGE),
    _card("RTX 5060", "cuda:120", 8, 7.53, 448, (38.4, 38.4, 19.2), PCIE5_X8, _BLACKWELL_PAGE),
    _card("RTX PRO 6000 Blackwell", "cuda:120", 96, 94.97, 1792, (503.8, 503.8, 126.0), PCIE5_X16,
          "NVIDIA RTX PRO 6000 Blackwell datasheet, a quarter of the sparse FP8 figure",
          "RTX PRO 6000 Blackwell Workstation Edition"),
    _card("RX 6800", "hip:gfx1030", 16, 15.98, 512, (0, 32.33, 16.17), PCIE4_X16, _RDNA2),
    _card("RX 6800 XT", "hip:gfx1030", 16, 15.98, 512, (0, 41.47, 20.74), PCIE4_X16, _RDNA2),
    _card("RX 6950 XT", "hip:gfx1030", 16, 15.98, 576, (0, 47.31, 23.65), PCIE4_X16, _RDNA2),
    # What the driver calls both; the MI50 is the one that is about.
    _card("MI50", "hip:gfx906", 16, 15.98, 1024, (0, 26.5, 13.3), PCIE4_X16, "AMD Radeon Instinct MI50 datasheet",
          "MI60 / MI50"),
    _card("MI60", "hip:gfx906", 32, 31.98, 1024, (0, 29.5, 14.7), PCIE4_X16, "AMD Radeon Instinct MI60 datasheet"),
    _card("RX 7900 XTX", "hip:gfx1100", 24, 23.98, 960, (122.8, 122.8, 61.4), PCIE4_X16, _RDNA),
    _card("RX 7900 XT", "hip:gfx1100", 20, 19.98, 800, (103, 103, 51.5), PCIE4_X16, _RDNA),
    _card("W7900", "hip:gfx1100", 48, 47.98, 864, (122.6, 122.6, 61.3), PCIE4_X16, _RDNA, "PRO W7900"),
    _card("RX 7800 XT", "hip:gfx1101", 16, 15.98, 624, (74.6, 74.6, 37.3), PCIE4_X16, _RDNA),
    _card("RX 9070 XT", "hip:gfx1201", 16, 15.92, 640, (195, 195, 48.7), PCIE5_X16, _RDNA),
    _card("RX 9070", "hip:gfx1201", 16, 15.92, 640, (145, 145, 36.1), PCIE5_X16, _RDNA),
)  # fmt: skip

_BY_NAME = {card.name: card for card in CARDS}
# The classic table and what most people train on or rent today.
COMMON: tuple[Card, ...] = CLASSIC + tuple(
    _BY_NAME[name]
    for name in (
        "RTX A6000", "A10G", "A100 80GB", "RTX 4060", "RTX 4060 Ti", "RTX 4070", "RTX 4070 Super", "RTX 4070 Ti",
        "RTX 4070 Ti Super", "RTX 4080", "RTX 4080 Super", "RTX 4090", "L4", "L40S", "RTX 5060 Ti", "RTX 5070",
        "RTX 5070 Ti", "RTX 5080", "RTX 5090", "H100", "H200", "MI210", "MI300X",
    )
)  # fmt: skip

_FAMILY = re.compile(r"\b(nvidia|amd|geforce|tesla|quadro|radeon|instinct|rtx|gtx|rx)(?=a?\d|pro|\b)")


def _canonical(name: str) -> str:
    """What makes names equal: NVIDIA GeForce RTX 3090, rtx3090 and 3090 are "3090"; Ti and Laptop GPU stay."""
    lowered = name.lower().replace("radeon vii", "radeonvii").replace("titan rtx", "titanrtx")
    return re.sub(r"[^a-z0-9]", "", _FAMILY.sub(" ", lowered))


def _series(canonical: str) -> str:
    """What cards of one generation share: their letters, and the number without its last two digits."""
    letters, number = re.match(r"([a-z]*)(\d*)", canonical).groups()
    return letters + number[:-2]


def find(device_name: str) -> Card | None:
    """Return the card whose name this is, as `torch.cuda.get_device_name` says it; None for one that is not listed.

    A name shared by two memory sizes gives the listed one: ask the device for its memory.
    """
    wanted = _canonical(device_name)
    return next((card for card in CARDS if wanted in map(_canonical, (card.name, *card.device_names))), None)


def get(name: str) -> Card:
    """Return the card that a person calls `name`: rtx3090, RTX 3090 or 3090. ValueError with the nearest names.

    These are of its own series: a card of another is spelled alike, and is not alike.
    """
    card = find(name)
    if card is None:
        names = {_canonical(card.name): card.name for card in CARDS}
        wanted = _canonical(name)
        series = [key for key in names if _series(key) == _series(wanted)]
        near = [key for key in names if wanted and key.startswith(wanted)]
        near = near or [key for key in series if wanted.startswith(key)]
        near = near or difflib.get_close_matches(wanted, series, n=3, cutoff=0.5)
        meant = "did you mean " + " or ".join(names[key] for key in near) + "?"
        raise ValueError(f"unknown GPU {name!r}; {meant if near else 'known: ' + ', '.join(names.values())}")
    return card


def peak_flops(device_name: str, dtype: torch.dtype | str) -> float | None:
    """Return the peak FLOP/s of a device in `dtype` with fp32 accumulation, or None where the card is not listed."""
    card = find(device_name)
    return card.peak_flops(dtype) if card else None


def parse_memory(text: str) -> int:
    """Return what "24GB", "24GiB" or "24" says, in bytes: memory is sold in units of 2^30, whatever the label says.

    A card's name means what its driver offers to programs. ValueError for anything else.
    """
    number = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT])I?B?)?\s*", text.upper())
    if number:
        return int(float(number[1]) * 2 ** (10 * " KMGT".index(number[2] or "G")))
    card = find(text)
    if card is None:
        raise ValueError(f"{text!r} is no size of memory such as 24GB, nor a card such as rtx3090")
    return card.memory_bytes
