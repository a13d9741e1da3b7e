"""Published facts about NVIDIA GPUs, V100 to B200 and GeForce RTX 30, 40 and 50. No torch.

Every entry names its document. Peaks are **dense** (NVIDIA's sheets often print twice that, for 2:4 sparsity), and for
tensor cores those with fp32 accumulation, which is what PyTorch's matrix products use. `fp32` is the ordinary cores.
A format that is missing is not supported, or not published for that card. A figure that is None is not published.
"""

import re
from dataclasses import dataclass

_GIB = 2**30
_MIB = 2**20


@dataclass(frozen=True)
class Gpu:
    """One card as its maker describes it.

    Attributes:
        name: e.g. `H100 SXM`.
        arch: CUDA architecture, e.g. `sm_90`.
        year: of the announcement.
        sms: streaming multiprocessors.
        boost_ghz: boost clock of the ordinary cores; None if unpublished.
        bandwidth_gbps: memory bandwidth in GB/s (1e9 bytes a second).
        l2_bytes: second-level cache; None if unpublished.
        memory_bytes: nominal capacity, GB of the sheet taken as GiB; a driver reports a little less.
        tdp_w: power limit as delivered.
        peak: dense TFLOP/s or TOP/s by format: fp32, tf32, fp16, bf16, fp8, int8, int4, fp4.
        source: the document.
        note: what a reader should know of these figures.
    """

    name: str
    arch: str
    year: int
    sms: int
    boost_ghz: float | None
    bandwidth_gbps: float
    l2_bytes: int | None
    memory_bytes: int
    tdp_w: float
    peak: dict[str, float]
    source: str
    note: str = ""


def _peaks(
    fp32, tf32=None, fp16=None, bf16=None, fp8=None, int8=None, int4=None, fp4=None
) -> dict[str, float]:
    return {name: value for name, value in locals().items() if value is not None}


def _server(name, arch, year, sms, boost_ghz, gbps, l2_mib, gib, tdp_w, peak, source, note="") -> Gpu:
    l2_bytes = None if l2_mib is None else int(l2_mib * _MIB)
    return Gpu(name, arch, year, sms, boost_ghz, gbps, l2_bytes, gib * _GIB, tdp_w, peak, source, note)


_V100_SHEET = (
    "NVIDIA Tesla V100 GPU Architecture whitepaper (WP-08608-001), GV100 table, and the V100 datasheet"
)
_T4_SHEET = "NVIDIA T4 datasheet and product brief PB-09256-001; L2 of TU104 from the Turing whitepaper"
_A100_SHEET = (
    "NVIDIA A100 Tensor Core GPU Architecture whitepaper, tables of peak rates and of data center GPUs"
)
_A100_80_SHEET = "NVIDIA A100 80GB datasheet; SMs, clock and L2 from the A100 whitepaper"
_A40_SHEET = "NVIDIA A40 datasheet; SMs and L2 of GA102 from the GA102 whitepaper"
_L4_SHEET = "NVIDIA L4 datasheet (prints rates with sparsity); L2 from the Ada whitepaper, version 2"
_L40S_SHEET = "NVIDIA L40S datasheet; L2 of AD102 from the Ada whitepaper"
_H100_SHEET = (
    "NVIDIA H100 Tensor Core GPU Architecture whitepaper, tables of peak rates and of data center GPUs"
)
_H200_SHEET = "NVIDIA H200 datasheet (prints rates with sparsity); SMs, clocks and L2 are the H100's"
_B200_SHEET = "NVIDIA Blackwell and DGX B200 datasheets; SMs and L2 as the CUDA driver reports them"

_A100_PEAK = _peaks(19.5, 156, 312, 312, int8=624, int4=1248)
_H100_SXM_PEAK = _peaks(66.9, 494.7, 989.4, 989.4, 1978.9, 1978.9)
_HOPPER_CLOCKS = "The tensor-core peaks are at 1.83 GHz, fp32 at 1.98 GHz."

# fmt: off
# name, arch, year, SMs, boost GHz, GB/s, L2 MiB, memory GiB, W, peaks, source, note
_SERVERS = (
    _server("V100 SXM2", "sm_70", 2017, 80, 1.53, 900, 6, 16, 300,
            _peaks(15.7, fp16=125), _V100_SHEET, "Also with 32 GB."),
    _server("V100 PCIe", "sm_70", 2017, 80, 1.38, 900, 6, 16, 250,
            _peaks(14, fp16=112), _V100_SHEET, "Also with 32 GB."),
    _server("T4", "sm_75", 2018, 40, 1.59, 320, 4, 16, 70,
            _peaks(8.1, fp16=65, int8=130, int4=260), _T4_SHEET,
            "The datasheet says 300 GB/s, the product brief 320 (256 bits at 10 Gbit/s); the higher one is taken."),
    _server("A100 SXM 40GB", "sm_80", 2020, 108, 1.41, 1555, 40, 40, 400, _A100_PEAK, _A100_SHEET),
    _server("A100 PCIe 40GB", "sm_80", 2020, 108, 1.41, 1555, 40, 40, 250, _A100_PEAK, _A100_SHEET),
    _server("A100 SXM 80GB", "sm_80", 2020, 108, 1.41, 2039, 40, 80, 400, _A100_PEAK, _A100_80_SHEET),
    _server("A100 PCIe 80GB", "sm_80", 2021, 108, 1.41, 1935, 40, 80, 300, _A100_PEAK, _A100_80_SHEET),
    _server("A40", "sm_86", 2020, 84, 1.74, 696, 6, 48, 300,
            _peaks(37.4, 74.8, 149.7, 149.7, int8=299.3, int4=598.7), _A40_SHEET),
    _server("L4", "sm_89", 2023, 58, 2.04, 300, 48, 24, 72,
            _peaks(30.3, 60, 121, 121, 242.5, 242.5), _L4_SHEET),
    _server("L40S", "sm_89", 2023, 142, 2.52, 864, 96, 48, 350,
            _peaks(91.6, 183, 362.05, 362.05, 733, 733, 733), _L40S_SHEET),
    _server("H100 SXM", "sm_90", 2022, 132, 1.98, 3352, 50, 80, 700, _H100_SXM_PEAK, _H100_SHEET, _HOPPER_CLOCKS),
    _server("H100 PCIe", "sm_90", 2022, 114, 1.755, 2039, 50, 80, 350,
            _peaks(51.2, 378, 756, 756, 1513, 1513), _H100_SHEET,
            "The tensor-core peaks are at 1.62 GHz, fp32 at 1.755 GHz."),
    _server("H200", "sm_90", 2023, 132, 1.98, 4800, 50, 141, 700, _H100_SXM_PEAK, _H200_SHEET, _HOPPER_CLOCKS),
    _server("B200", "sm_100", 2024, 148, None, 8000, 126.5, 180, 1000,
            _peaks(75, 1100, 2250, 2250, 4500, 4500, fp4=9000), _B200_SHEET,
            "Older sheets say 192 GB and fp32 80; the driver's bus width and clock give 7672 GB/s."),
)
# fmt: on

# Operations for each clock and SM, dense, fp32 accumulation: from the whitepapers' tables of peak rates.
_AMPERE = ("sm_86", 2020, {"fp32": 256, "tf32": 256, "fp16": 512, "bf16": 512, "int8": 2048, "int4": 4096})
_ADA = ("sm_89", 2022, {**_AMPERE[2], "fp8": 1024})
_BLACKWELL = ("sm_120", 2025, {**{k: v for k, v in _ADA[2].items() if k != "int4"}, "fp4": 4096})

_WHITEPAPERS = {
    "sm_86": "NVIDIA Ampere GA102 GPU Architecture whitepaper",
    "sm_89": "NVIDIA Ada GPU Architecture whitepaper",
    "sm_120": "NVIDIA RTX Blackwell GPU Architecture whitepaper",
}

# name: generation, SMs, boost GHz, GB/s, L2 MiB, memory GiB, W
_GEFORCE_FACTS = {
    "RTX 3060": (_AMPERE, 28, 1.777, 360, 3, 12, 170),
    "RTX 3060 Ti": (_AMPERE, 38, 1.665, 448, 4, 8, 200),
    "RTX 3070": (_AMPERE, 46, 1.725, 448, 4, 8, 220),
    "RTX 3070 Ti": (_AMPERE, 48, 1.770, 608, 4, 8, 290),
    "RTX 3080": (_AMPERE, 68, 1.710, 760, 5, 10, 320),
    "RTX 3080 12GB": (_AMPERE, 70, 1.710, 912, 6, 12, 350),
    "RTX 3080 Ti": (_AMPERE, 80, 1.665, 912, 6, 12, 350),
    "RTX 3090": (_AMPERE, 82, 1.695, 936, 6, 24, 350),
    "RTX 3090 Ti": (_AMPERE, 84, 1.860, 1008, 6, 24, 450),
    "RTX 4060": (_ADA, 24, 2.460, 272, 24, 8, 115),
    "RTX 4060 Ti": (_ADA, 34, 2.535, 288, 32, 8, 160),
    "RTX 4070": (_ADA, 46, 2.475, 504, 36, 12, 200),
    "RTX 4070 SUPER": (_ADA, 56, 2.475, 504, 48, 12, 220),
    "RTX 4070 Ti": (_ADA, 60, 2.610, 504, 48, 12, 285),
    "RTX 4070 Ti SUPER": (_ADA, 66, 2.610, 672, 48, 16, 285),
    "RTX 4080": (_ADA, 76, 2.505, 717, 64, 16, 320),
    "RTX 4080 SUPER": (_ADA, 80, 2.550, 736, 64, 16, 320),
    "RTX 4090": (_ADA, 128, 2.520, 1008, 72, 24, 450),
    "RTX 5060": (_BLACKWELL, 30, 2.497, 448, None, 8, 145),
    "RTX 5060 Ti": (_BLACKWELL, 36, 2.572, 448, 32, 16, 180),
    "RTX 5070": (_BLACKWELL, 48, 2.512, 672, 48, 12, 250),
    "RTX 5070 Ti": (_BLACKWELL, 70, 2.452, 896, 48, 16, 300),
    "RTX 5080": (_BLACKWELL, 84, 2.617, 960, 64, 16, 360),
    "RTX 5090": (_BLACKWELL, 170, 2.407, 1792, 96, 32, 575),
}


def _geforce(name: str) -> Gpu:
    (arch, year, rates), sms, boost_ghz, gbps, l2_mib, gib, tdp_w = _GEFORCE_FACTS[name]
    return Gpu(
        name=name,
        arch=arch,
        year=year,
        sms=sms,
        boost_ghz=boost_ghz,
        bandwidth_gbps=gbps,
        l2_bytes=None if l2_mib is None else l2_mib * _MIB,
        memory_bytes=gib * _GIB,
        tdp_w=tdp_w,
        peak={fmt: round(rate * sms * boost_ghz / 1000, 1) for fmt, rate in rates.items()},
        source=f"NVIDIA's GeForce {name} specifications and the {_WHITEPAPERS[arch]}",
        note="Peaks are SMs x boost clock x the whitepaper's operations a clock and SM; year is the generation's.",
    )


GPUS: tuple[Gpu, ...] = (*_SERVERS, *map(_geforce, _GEFORCE_FACTS))

# How drivers and documents call the cards, after "NVIDIA", "Tesla" and "GeForce" are taken off, as whole-name patterns.
_SERVER_NAMES = {
    "V100 SXM2": r"V100(-SXM[23](-\d+GB)?| SXM2?)?",
    "V100 PCIe": r"V100[- ]PCIe(-\d+GB)?",
    "T4": r"T4",
    "A100 SXM 40GB": r"A100([- ]SXM4?)?[- ]40GB",
    "A100 PCIe 40GB": r"A100[- ]PCIe[- ]40GB|A100 40GB PCIe",
    "A100 SXM 80GB": r"A100|A100 SXM4?|A100([- ]SXM4?)?[- ]80GB",
    "A100 PCIe 80GB": r"A100 PCIe|A100 80GB PCIe|A100[- ]PCIe[- ]80GB",
    "A40": r"A40",
    "L4": r"L4",
    "L40S": r"L40S",
    "H100 SXM": r"H100|H100 SXM5?|H100 80GB HBM3|H100[- ]SXM5?[- ]80GB",
    "H100 PCIe": r"H100 PCIe|H100[- ]PCIe[- ]80GB",
    "H200": r"H200|H200 SXM",
    "B200": r"B200",
}


def _pattern(gpu: Gpu) -> str:
    """GeForce cards are called by their name, with or without the memory, e.g. `RTX 4060 Ti 16GB`."""
    if gpu.name in _SERVER_NAMES:
        return _SERVER_NAMES[gpu.name]
    base = gpu.name.removesuffix(" 12GB")
    return rf"{re.escape(base)}( \d+ ?GB)?"


_BY_PATTERN = tuple((re.compile(_pattern(gpu), re.IGNORECASE), gpu) for gpu in GPUS)


def find(name: str, memory_bytes: float | None = None) -> Gpu | None:
    """The card that NVML, torch or a document calls `name`.

    A name that leaves the variant open (`A100`, `RTX 3080`) gives the one with the nearest memory if `memory_bytes` is
    given, else the one named first in `GPUS` (`A100` alone is the SXM 80GB, `H100` the SXM). Laptop parts, MIG slices
    and cards that are not in the table give None: their figures are others.

    Args:
        name: e.g. `NVIDIA H100 80GB HBM3`, `Tesla T4`, `RTX 4090`.
        memory_bytes: the memory that the device reports.
    """
    bare = re.sub(r"\b(NVIDIA|Tesla|GeForce)\b", " ", name, flags=re.IGNORECASE)
    bare = re.sub(r"\s+", " ", bare).strip()
    exact = [gpu for gpu in GPUS if gpu.name.lower() == bare.lower()]
    found = [gpu for pattern, gpu in _BY_PATTERN if pattern.fullmatch(bare)]
    if memory_bytes is None:
        return next(iter(exact or found), None)
    return min(found, key=lambda gpu: abs(gpu.memory_bytes - memory_bytes), default=None)
