"""The four terms: known rates give known times, counted work overrides derived, and the longest one is said to bind."""

import math

import pytest

from trapetum import hardware, law, law_cards, law_terms, records
from trapetum.shapes import MODELS

H100 = {
    "name": "NVIDIA H100 80GB HBM3",
    "arch": "sm_90",
    "sms": 132,
    "clocks": {"before": {"sm_mhz": 345}, "after": {"sm_mhz": 1980, "max_sm_mhz": 1980}},
}
RATES = law_terms.Rates(3200.0, 1.7, 132, 1.98)


def product(us, method="codebook", bits=4, shape=(8192, 28672), **config):
    config = {"in_features": shape[0], "out_features": shape[1], "bits": bits, **config}
    config.setdefault("bytes", law.gemv_bytes(*shape, "fp16" if bits == 16 else bits))
    return records.measured("gemv_time", [us], method, config, H100, {})


def count(value, arch="sm_90", method="codebook", bits=4, **config):
    config = {"bits": bits, "arch": arch, **config}
    return records.derived(
        "instructions_per_weight", value, method, config, {"name": arch}, "a cubin", "counted"
    )


def test_the_issue_rate_is_four_warps_a_clock_and_the_lookups_one_wavefront():
    weights = (
        132 * 1980e6 * 1e-6 * 128
    )  # what all schedulers issue in one microsecond, at one instruction a weight
    issue, lookups = law_terms.Work(1.0, 0.0, ""), law_terms.Work(0.0, 1.0, "")
    assert law_terms.instructions_us(weights, issue, 132, 1.98) == pytest.approx(1)
    assert law_terms.instructions_us(weights, lookups, 132, 1.98) == pytest.approx(4)
    assert law_terms.weights_per_clock(issue) == 128 and law_terms.weights_per_clock(lookups) == 32


@pytest.mark.parametrize(("work", "sms"), [(None, 132), (law_terms.Work(1, 0, ""), None)])
def test_instructions_that_are_not_known_are_not_a_number(work, sms):
    assert math.isnan(law_terms.instructions_us(1e6, work, sms, 1.98))
    parted = law_terms.terms(product(40.0), law_terms.Rates(3200.0, 1.7, sms, 1.98), work)
    assert not parted.instructions_bind and parted.longer_us == parted.bytes_us


def test_terms_add_up_to_the_time_and_the_longest_binds():
    record = product(43.0)
    parted = law_terms.terms(record, RATES, law_terms.derived_work("codebook", 4))
    assert parted.launch_us + parted.longer_us + parted.latency_us == pytest.approx(43.0)
    assert parted.bytes_us == pytest.approx(record.config["bytes"] / 3200e3)
    assert parted.binds == "bytes" and parted.share("bytes") == pytest.approx(parted.bytes_us / 43)


@pytest.mark.parametrize(
    ("us", "work", "rates", "binds"),
    [
        (43.0, law_terms.Work(1.2, 0.5, ""), RATES, "bytes"),
        (43.0, law_terms.Work(1.2, 0.5, ""), RATES._replace(read_gbps=20_000.0), "latency"),
        (43.0, law_terms.Work(5.5, 0.5, ""), RATES._replace(read_gbps=4580.0), "instructions"),
        (90.0, law_terms.Work(1.2, 0.5, ""), RATES, "latency"),
        (43.0, law_terms.Work(0.1, 0.0, ""), RATES._replace(read_gbps=20_000.0, launch_us=30.0), "launch"),
    ],
)
def test_what_binds_follows_the_rates(us, work, rates, binds):
    assert law_terms.terms(product(us), rates, work).binds == binds


def test_counted_work_is_preferred_and_the_right_arch_row_and_bits_are_taken():
    derived = law_terms.derived_work("codebook", 4)
    counted = [
        count(2.5, "sm_80"),
        count(1.5, "sm_90"),
        count(9.0, rows=4),
        count(7.0, bits=2),
        count(8.0, method="ladder-6"),
    ]
    assert law_terms.work("codebook", 4, counted, "sm_90").instructions == 1.5
    assert law_terms.work("codebook", 4, counted, "sm_90").lookups == derived.lookups
    assert law_terms.work("codebook", 4, counted, "sm_80").instructions == 2.5
    assert law_terms.work("ladder-6", 4, counted, "sm_90").instructions == 8.0
    assert law_terms.work("codebook", 4, [], "sm_90") == derived
    assert law_terms.work("marlin", 4, counted, "sm_90") is None
    assert law_terms.work("codebook", 4, [count(1.5, lookups_per_weight=0.7)]).lookups == 0.7


def test_of_several_launch_shapes_the_cheapest_counts_and_of_one_the_newest():
    early = count(1.0, variant="A").replace(utc="2026-01-01T00:00:00Z")
    late = [
        count(v, variant=name).replace(utc="2026-02-01T00:00:00Z") for name, v in (("A", 1.4), ("B", 3.5))
    ]
    assert law_terms.work("codebook", 4, [*late, early], "sm_90").instructions == 1.4


def test_additive_codebooks_are_looked_up_each():
    two, four = (law_terms.derived_work(f"additive-{n}x8", 2 * n // 2) for n in (2, 4))
    assert four.lookups - two.lookups == pytest.approx(1.0)  # 16 bytes for 8 weights: half a bank a codebook
    assert (
        law_terms.weights_per_clock(two)
        < 32
        < law_terms.weights_per_clock(law_terms.derived_work("codebook", 4))
    )


def test_fewer_bits_are_no_less_work_a_weight_but_eight_are_more():
    two, four, eight = (law_terms.derived_work("codebook", bits) for bits in (2, 4, 8))
    assert two.instructions >= four.instructions and eight.instructions > 2 * four.instructions
    assert law_terms.derived_work("read", 8).instructions == pytest.approx(5 / 16)
    assert law_terms.derived_work("codebook", 5) is None


def test_rates_take_the_clock_under_load_and_know_no_work_on_a_cpu():
    assert law_terms.rates(H100, 3200, 1.7) == RATES
    idle = {**H100, "clocks": {}}
    assert law_terms.rates(idle, 3200, 1.7).clock_ghz == hardware.find("H100 SXM").boost_ghz
    cpu = {"name": "a CPU", "arch": "x86_64 avx2", "sms": 2}
    assert law_terms.rates(cpu, 30, -3.0) == law_terms.Rates(30, 0.0, None, None)


# Cards


FIT = law.Fit(3.0, 2800.0, (2.5, 3.5), (2700, 2900), 14, 0.5)


def card(name):
    return hardware.find(name)


def test_where_bytes_bind_a_product_moves_by_the_bandwidth_and_t0_stays():
    work = law_terms.derived_work("codebook", 4)
    there = law_cards.gemv_on(card("A40"), FIT, card("H100 SXM"), product(43.0), work)
    moved = FIT.bandwidth_gbps * card("A40").bandwidth_gbps / card("H100 SXM").bandwidth_gbps
    assert there.kind == "derived" and there.config["binds"] == "bytes" and there.unit == "us"
    assert there.value == pytest.approx(3 + law.floor_us(product(43.0).config["bytes"], moved), rel=1e-6)


def test_where_instructions_bind_more_bandwidth_buys_nothing():
    slow = law_terms.Work(6.0, 0.5, "")
    fit = law.Fit(3.0, 2000.0, (2.5, 3.5), (1900, 2100), 14, 0.5)
    here, there = (
        law_cards.gemv_on(card(c), fit, card("H100 SXM"), product(60.0), slow) for c in ("H100 SXM", "H200")
    )
    assert here.config["binds"] == there.config["binds"] == "instructions"
    assert there.value == pytest.approx(here.value)
    assert there.value == pytest.approx(3 + law.floor_us(product(60.0).config["bytes"], 2000), rel=1e-6)


def test_the_law_moves_a_decode_to_another_card_by_the_longer_term():
    shape, h100, rtx = MODELS["llama-2-7b"], card("H100 SXM"), card("RTX 4090")
    fit = law.Fit(1.0, 3000.0, (0.9, 1.1), (2900, 3100), 7, 0.1)
    work = law_terms.derived_work("codebook", 4)
    there = law_cards.speed_on(rtx, shape, "codebook-4", fit, h100, work=work)
    bound = rtx.bandwidth_gbps * 1e9 / shape.bytes_per_token("codebook-4", 256)
    assert there.kind == "derived" and 0.7 * bound < there.value < bound
    assert there.config["binds"] == "bytes" and there.config["bytes"] == shape.bytes_per_token(
        "codebook-4", 256
    )
    assert "RTX 4090" in there.device["name"] and rtx.source in there.source
    heavy = law_cards.speed_on(rtx, shape, "codebook-4", fit, h100, work=law_terms.Work(60.0, 0.5, ""))
    assert heavy.config["binds"] == "instructions" and heavy.value < there.value
    blind = law_cards.speed_on(rtx, shape, "codebook-4", fit, h100)
    assert blind.value == pytest.approx(there.value)
    with pytest.raises(ValueError, match="the format 'int5' is unknown"):
        law_cards.speed_on(rtx, shape, "int5", fit, h100)


def test_the_same_card_gets_its_own_fit_back():
    work = law_terms.derived_work("codebook", 4)
    same = law_cards.gemv_on(card("H100 SXM"), FIT, card("H100 SXM"), product(43.0), work)
    assert same.value == pytest.approx(FIT.predict(product(43.0).config["bytes"]))
    fast = law.Fit(3.0, 9999.0, (2.5, 3.5), (9000, 11_000), 14, 0.5)
    assert law_cards.excess(fast, card("H100 SXM"), 0.5, work) == 1.0
