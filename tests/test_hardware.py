"""The GPU table: names are recognised, peaks are the dense ones, and each figure fits the others."""

import dataclasses

import pytest

from trapetum import hardware
from trapetum.hardware import GPUS, find

FORMATS = {"fp32", "tf32", "fp16", "bf16", "fp8", "int8", "int4", "fp4"}


@pytest.mark.parametrize(
    ("reported", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("H100", "H100 SXM"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA A100-SXM4-40GB", "A100 SXM 40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 SXM 80GB"),
        ("A100-SXM4-40GB", "A100 SXM 40GB"),
        ("NVIDIA A100-PCIE-40GB", "A100 PCIe 40GB"),
        ("NVIDIA A100 80GB PCIe", "A100 PCIe 80GB"),
        ("NVIDIA A40", "A40"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("Tesla T4", "T4"),
        ("Tesla V100-SXM2-16GB", "V100 SXM2"),
        ("Tesla V100-SXM2-32GB", "V100 SXM2"),
        ("Tesla V100-PCIE-16GB", "V100 PCIe"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("RTX 4090", "RTX 4090"),
        ("GeForce RTX 3060 Ti", "RTX 3060 Ti"),
        ("NVIDIA GeForce RTX 3060", "RTX 3060"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "RTX 4070 Ti SUPER"),
        ("NVIDIA GeForce RTX 4070 SUPER", "RTX 4070 SUPER"),
        ("NVIDIA GeForce RTX 5060 Ti", "RTX 5060 Ti"),
        ("nvidia geforce rtx 5090", "RTX 5090"),
    ],
)
def test_names_of_drivers_and_documents(reported, name):
    assert find(reported).name == name


@pytest.mark.parametrize(
    "reported",
    [
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA H100 NVL",
        "NVIDIA RTX 6000 Ada Generation",
        "NVIDIA L40",
        "NVIDIA A10G",
        "Tesla V100S-PCIE-32GB",
        "NVIDIA GeForce GTX 1080",
        "Intel(R) Xeon(R) Processor",
        "",
    ],
)
def test_other_cards_are_not_taken_for_these(reported):
    assert find(reported) is None


def test_memory_decides_between_cards_of_one_name():
    assert find("NVIDIA GeForce RTX 3080").bandwidth_gbps == 760
    assert find("NVIDIA GeForce RTX 3080", memory_bytes=10.0e9).bandwidth_gbps == 760
    assert find("NVIDIA GeForce RTX 3080", memory_bytes=12.6e9).bandwidth_gbps == 912
    assert find("NVIDIA H100 80GB HBM3", memory_bytes=85.0e9).name == "H100 SXM"
    assert find("GeForce GTX 1080", memory_bytes=8.0e9) is None


def test_every_card_finds_itself_and_nothing_is_named_twice():
    assert [find(gpu.name).name for gpu in GPUS] == [gpu.name for gpu in GPUS]
    assert len({gpu.name for gpu in GPUS}) == len(GPUS)


def test_the_cards_that_the_workbook_speaks_of_are_there():
    wanted = ["V100", "T4", "A100", "A40", "L4", "L40S", "H100", "H200", "B200"]
    wanted += [f"RTX {generation}0{tier}0" for generation in (3, 4, 5) for tier in (6, 7, 8, 9)]
    assert all(find(name) for name in wanted)


@pytest.mark.parametrize(
    ("name", "fp32", "fp16", "int8"),  # as printed in the whitepapers' tables, dense, fp32 accumulation
    [
        ("RTX 3090", 35.6, 71, 284),
        ("RTX 3080", 29.8, 59.5, 238),
        ("RTX 3070", 20.3, 40.6, 162.6),
        ("RTX 4090", 82.6, 165.2, 660.6),
        ("RTX 4080", 48.7, 97.5, 389.9),
        ("RTX 5090", 104.8, 209.5, 838),
        ("RTX 5080", 56.3, 112.6, 450.2),
    ],
)
def test_computed_peaks_agree_with_the_whitepapers(name, fp32, fp16, int8):
    peak = find(name).peak
    assert (peak["fp32"], peak["fp16"], peak["int8"]) == pytest.approx((fp32, fp16, int8), rel=3e-3)


@pytest.mark.parametrize(
    ("name", "ai_tops"), [("RTX 5090", 3352), ("RTX 5080", 1801), ("RTX 5070 Ti", 1406), ("RTX 5070", 988)]
)
def test_advertised_tops_are_twice_the_dense_fp4_peak(name, ai_tops):
    assert 2 * find(name).peak["fp4"] == pytest.approx(ai_tops, rel=2e-3)


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_figures_of_a_card_fit_together(gpu):
    assert set(gpu.peak) <= FORMATS and gpu.source and gpu.arch.startswith("sm_")
    assert 2017 <= gpu.year <= 2025 and 20 <= gpu.sms <= 200 and 70 <= gpu.tdp_w <= 1000
    assert 200 < gpu.bandwidth_gbps <= 8000 and gpu.memory_bytes >= 8 * 2**30
    ranked = [gpu.peak[fmt] for fmt in ("fp32", "tf32", "fp16", "int8") if fmt in gpu.peak]
    assert ranked == sorted(ranked), "a narrower format is never slower"
    if gpu.boost_ghz:
        per_clock = 128 if gpu.arch in ("sm_70", "sm_75", "sm_80") else 256
        assert gpu.peak["fp32"] == pytest.approx(per_clock * gpu.sms * gpu.boost_ghz / 1000, rel=0.02)


def test_peaks_are_dense():
    assert find("H100").peak["fp16"] == 989.4 and find("B200").peak["fp4"] == 9000
    assert find("A100").peak["int8"] == 624 and find("L4").peak["fp16"] == 121


def test_formats_follow_the_generation():
    assert all("bf16" not in find(name).peak for name in ("V100", "T4"))
    assert all(("fp8" in gpu.peak) == (int(gpu.arch[3:]) >= 89) for gpu in GPUS)
    assert all(("fp4" in gpu.peak) == (int(gpu.arch[3:]) >= 100) for gpu in GPUS)
    assert all("int4" not in gpu.peak for gpu in GPUS if int(gpu.arch[3:]) >= 90)


def test_h200_is_the_h100_with_faster_memory():
    h100, h200 = find("H100"), find("H200")
    assert h200.peak == h100.peak and h200.sms == h100.sms and h200.l2_bytes == h100.l2_bytes
    assert h200.bandwidth_gbps / h100.bandwidth_gbps == pytest.approx(1.43, abs=0.01)


def test_a_card_is_a_constant():
    with pytest.raises(dataclasses.FrozenInstanceError):
        hardware.GPUS[0].sms = 1
