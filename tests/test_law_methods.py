"""Laws by method from records: what is fitted, what is left out, and what two devices say when one is made from the other."""

import numpy as np
import plotly.graph_objects as go
import pytest

from trapetum import figures, law, law_methods, records
from trapetum.paths import RECORDS

H100 = {"name": "NVIDIA H100 80GB HBM3", "arch": "sm_90", "sms": 132, "clocks": {"after": {"sm_mhz": 1980}}}
H200 = {**H100, "name": "NVIDIA H200"}
SHAPES = ((3072, 768), (4096, 1024), (4096, 4096), (4096, 11008), (8192, 8192), (4096, 22016), (8192, 28672))
READ_GBPS = 3150.0
RATIO = 1.435
TRUTH = {  # method: bits, t0 us, bandwidth GB/s on the H100, and whether memory binds it
    "codebook": (4, 3.0, 2800.0, True),
    "linear-fp16": (16, 4.0, 2950.0, True),
    "tinygemm-int4": (4, 2.5, 2000.0, False),
    "read": (4, 1.7, 3150.0, True),
}


def timed(device, method, shape, us, bits, noise=0.0, rng=None, **config):
    rng = rng or np.random.default_rng(0)
    samples = (us * rng.normal(1, noise, 9)).tolist()
    config = {
        "in_features": shape[0],
        "out_features": shape[1],
        "bits": bits,
        "l2": "cold",
        "chain": "alone",
        **config,
    }
    config["bytes"] = law.gemv_bytes(*shape, "fp16" if bits == 16 else bits)
    return records.measured("gemv_time", samples, method, config, device, {}, utc="2026-11-21T00:00:00Z")


def card(device, faster=1.0, more_t0=0.0, noise=0.01):
    """A device whose times follow `TRUTH`, its memory `faster` times and its launches `more_t0` us slower."""
    rng, made = np.random.default_rng(3), []
    for method, (bits, t0, gbps, bound) in TRUTH.items():
        for shape in SHAPES:
            nbytes = law.gemv_bytes(*shape, "fp16" if bits == 16 else bits)
            us = t0 + more_t0 + law.floor_us(nbytes, gbps * (faster if bound else 1.0))
            made.append(timed(device, method, shape, us, bits, noise, rng))
    config = {"l2": "cold", "chain": "alone", "bytes": 1 << 30}
    made.append(records.measured("read_bandwidth", [READ_GBPS * faster], "read", config, device, {}))
    return made


def laws_of(found, name):
    return law_methods.method_laws(law_methods.single_products(found, name), n_boot=200)


@pytest.fixture(scope="module")
def both():
    found = card(H100) + card(H200, RATIO)
    return {name: laws_of(found, name) for name in ("H100 SXM", "H200")}, found


def test_each_method_gets_back_the_law_that_made_it(both):
    laws, _ = both
    for method, (_, t0, gbps, _) in TRUTH.items():
        label = {"codebook": "codebook 4-bit"}.get(method, method)
        found = laws["H100 SXM"][label]
        assert found.fit.t0_us == pytest.approx(t0, abs=0.15)
        assert found.fit.bandwidth_gbps == pytest.approx(gbps, rel=0.03)
        assert len(found.errors) == len(SHAPES) and found.typical_error < 0.03


def test_what_is_warm_suspect_batched_published_or_beside_is_not_a_single_product():
    shape = (4096, 4096)
    good = timed(H100, "codebook", shape, 6.0, 4)
    others = [
        timed(H100, "codebook", shape, 5.0, 4, l2="warm"),
        timed(H100, "codebook", shape, 5.1, 4, rows=4),
        timed(H100, "codebook", shape, 5.2, 4, batch=8),
        timed(H100, "codebook", shape, 5.3, 4, beside="dequantize-linear"),
        timed(H100, "codebook", shape, 5.4, 4).replace(suspect=True, why_suspect="too fast"),
        good.replace(kind="published", source="a page"),
    ]
    assert law_methods.single_products([good, *others]) == [good]
    assert law_methods.single_products([good], "H200") == []
    assert law_methods.single_products([good.replace(config={**good.config, "rows": 1})], "H100 SXM")


def test_a_newer_time_of_the_same_product_replaces_the_older():
    old, new = (timed(H100, "codebook", (4096, 4096), us, 4) for us in (6.0, 5.0))
    new = new.replace(utc="2026-12-01T00:00:00Z")
    assert law_methods.single_products([new, old]) == [new]


def test_methods_with_too_few_shapes_have_no_law():
    few = [timed(H100, "codebook", shape, 6.0, 4) for shape in SHAPES[:3]]
    assert law_methods.method_laws(few) == {}
    one_shape = [timed(H100, "read", (4096, 4096), 2.0 + bits, bits) for bits in (2, 3, 4, 8)]
    assert law_methods.method_laws(one_shape) == {}


def test_bits_and_chains_are_methods_of_their_own_and_reads_are_one():
    made = [
        timed(H100, "codebook", (4096, 4096), 6.0, bits, chain=c) for bits in (4, 2) for c in ("alone", "pdl")
    ]
    made += [timed(H100, "read", (4096, 4096), 2.0, bits) for bits in (4, 2)]
    assert list(law_methods.by_method(made)) == [
        "codebook 2-bit", "codebook 2-bit (pdl)", "codebook 4-bit", "codebook 4-bit (pdl)", "read",
    ]  # fmt: skip
    exact = timed(H100, "codebook", (4096, 4096), 6.0, 4, path="exact")
    assert law_methods.label_of(exact) == "codebook-exact 4-bit"


def test_leaving_a_shape_out_leaves_out_all_its_times():
    made = [
        timed(H100, "read", shape, 2 + law.floor_us(law.gemv_bytes(*shape, b), 3000), b)
        for shape in SHAPES
        for b in (4, 2)
    ]
    slow = [r.replace(value=2 * r.value, samples=[2 * x for x in r.samples], p20=None, p80=None)
            if law_methods.shape_of(r) == (8192, 28672) else r for r in made]  # fmt: skip
    found = law_methods.method_laws(slow)["read"]
    worst = {law_methods.shape_of(r): e for r, e in zip(found.records, found.errors, strict=True)}
    assert worst[8192, 28672] == pytest.approx(-0.5, abs=0.02), "its other width must not have taught the fit"


def test_faster_memory_moves_the_slope_and_leaves_t0(both):
    laws, found = both
    ratio = law_methods.read_gbps(found, "H200") / law_methods.read_gbps(found, "H100 SXM")
    assert ratio == pytest.approx(RATIO)
    moved = law_methods.shifts(laws["H100 SXM"], laws["H200"])
    assert set(moved) == set(laws["H100 SXM"])
    assert all(s.t0_agrees and s.n == len(SHAPES) for s in moved.values())
    assert {k: s.moved(ratio) for k, s in moved.items()} == {
        "codebook 4-bit": "as", "linear-fp16": "as", "read": "as", "tinygemm-int4": "less",
    }  # fmt: skip
    words = law_methods.in_words(moved, ratio)
    assert "The fixed time agrees for all 4 methods." in words and "differs" not in words
    assert "moved by the memory's 1.435 for codebook 4-bit, linear-fp16 and read." in words
    assert "It did not move for tinygemm-int4 (1.0" in words
    rows = {row[0]: row for row in law_methods.shift_rows(moved, ratio)}
    assert rows["read"][2] == "agrees" and rows["tinygemm-int4"][4] == "not at all"
    assert all(len(row) == len(law_methods.SHIFT_HEADINGS) for row in rows.values())


def recorded_and_its_h200():
    """The recorded H100 times, and what they would be if the bytes at read speed were all that faster memory changes."""
    found = law_methods.single_products(records.load(RECORDS).records, "H100 SXM")
    h200 = {**found[0].device, "name": "NVIDIA H200"}

    def moved(r):
        saved = law.floor_us(r.config["bytes"], READ_GBPS) * (1 - 1 / RATIO)
        samples = [x - saved for x in r.samples]
        return r.replace(value=r.value - saved, samples=samples, p20=None, p80=None, device=h200)

    return found, [moved(r) for r in found if r.config["chain"] == "alone"]


def test_an_h200_made_from_the_recorded_h100_keeps_t0_and_moves_by_its_bytes():
    first, second = recorded_and_its_h200()
    before, after = law_methods.method_laws(first), law_methods.method_laws(second)
    moved = law_methods.shifts(before, after)
    assert {"codebook 4-bit", "linear-fp16", "read"} <= set(moved)
    for label, found in moved.items():
        slope = 1 / before[label].fit.bandwidth_gbps
        expected = slope / (slope - (1 - 1 / RATIO) / READ_GBPS)
        assert found.ratio == pytest.approx(expected, rel=0.03), label
        assert abs(found.t0_us) < 0.3, label


def test_a_launch_that_is_slower_there_is_told(both):
    found = card(H100) + card(H200, 1.7, more_t0=1.5)
    moved = law_methods.shifts(laws_of(found, "H100 SXM"), laws_of(found, "H200"))
    words = law_methods.in_words(moved, RATIO)
    assert not any(s.t0_agrees for s in moved.values())
    assert words.startswith(
        "The fixed time agrees for none of the methods. It differs for codebook 4-bit (+1."
    )
    assert "It moved more for codebook 4-bit (1." in words


def test_between_the_memory_and_nothing_is_part_of_the_way():
    moved = {
        name: law.Shift(0.0, ratio, (0, 0), (ratio - 0.03, ratio + 0.03), 7)
        for name, ratio in {"half": 1.2, "none": 1.0, "slower": 0.9, "full": RATIO}.items()
    }
    assert [row[4] for row in law_methods.shift_rows(moved, RATIO)] == [
        "part of the way", "not at all", "not at all", "as the memory",
    ]  # fmt: skip
    words = law_methods.in_words(moved, RATIO)
    assert "moved, but less, for half (1.20)" in words and "did not move for none (1.00) and slower" in words


def test_int8_arithmetic_on_codes_does_not_hide_their_bits():
    codes, weights = (timed(H100, m, (4096, 4096), 6.0, 4) for m in ("codebook-int8", "own-int8"))
    assert [law_methods.label_of(r) for r in (codes, weights)] == ["codebook-int8 4-bit", "own-int8"]


def test_without_a_second_device_nothing_is_said():
    laws = laws_of(card(H100), "H100 SXM")
    assert law_methods.shifts(laws, {}) == {}
    assert "nothing can be said yet" in law_methods.in_words({}, RATIO)
    one = {"read": law.Shift(0.0, RATIO, (0, 0), (RATIO, RATIO), 7)}
    assert "for the one method, read." in law_methods.in_words(one, RATIO)
    assert law_methods.read_gbps([], "H200") is None


def test_memory_shares_pair_the_same_products(both):
    _, found = both
    sides = [law_methods.single_products(found, name) for name in ("H100 SXM", "H200")]
    shares = law_methods.memory_shares(*sides, RATIO, shapes=((8192, 28672),))
    by_label = {law_methods.label_of(a): share for a, _, share in shares}
    assert set(by_label) == {"codebook 4-bit", "linear-fp16", "read", "tinygemm-int4"}
    assert by_label["linear-fp16"] == pytest.approx(0.97, abs=0.06)
    assert by_label["tinygemm-int4"] == pytest.approx(0.0, abs=0.06)
    assert len(law_methods.memory_shares(*sides, RATIO)) == len(TRUTH) * len(SHAPES)


def test_terms_take_the_launch_of_the_reads_and_the_counted_work(both):
    laws, found = both
    count = records.derived(
        "instructions_per_weight",
        50.0,
        "codebook",
        {"bits": 4, "arch": "sm_90"},
        {"name": "sm_90"},
        "a cubin",
        "counted",
    )
    plain = law_methods.terms_by_method(laws["H100 SXM"], READ_GBPS)
    heavy = law_methods.terms_by_method(laws["H100 SXM"], READ_GBPS, [count])
    assert plain["read"][0][1].launch_us == pytest.approx(laws["H100 SXM"]["read"].fit.t0_us)
    largest = plain["codebook 4-bit"][-1][1]
    assert largest.binds == "bytes" and heavy["codebook 4-bit"][-1][1].binds == "instructions"
    assert np.isnan(plain["tinygemm-int4"][-1][1].instructions_us)
    rows = law_methods.binding_rows(plain)
    assert [row[0].replace("\u00a0", " ") for row in rows] == list(plain)
    assert all(len(row) == len(law_methods.BINDING_HEADINGS) for row in rows)
    codes = rows[list(plain).index("codebook 4-bit")]
    assert codes[1].startswith("launch") and codes[3].startswith("bytes") and f"of {len(SHAPES)}" in codes[4]
    assert law_methods.tally(plain["linear-fp16"]).startswith("bytes ")
    assert f"of {len(SHAPES)}" in law_methods.tally(plain["linear-fp16"])


def test_a_law_is_a_row_with_its_intervals(both):
    laws, _ = both
    rows = law_methods.law_rows(laws["H100 SXM"], READ_GBPS)
    assert all(len(row) == len(law_methods.LAW_HEADINGS) for row in rows)
    (read,) = [row for row in rows if row[0] == "read"]
    assert abs(float(read[3].removesuffix("\u00a0%")) - 100) <= 2
    assert law_methods.law_rows(laws["H100 SXM"], None)[0][3] == "not\u00a0known"
    assert {law_methods.shape_of(r) for r in law_methods.largest(laws["H100 SXM"])} == {(8192, 28672)}


def words(figure):
    return str(figure.to_plotly_json())


def test_figures_show_both_cards_and_say_when_there_is_nothing(both):
    laws, _ = both
    terms = {name: law_methods.terms_by_method(found, READ_GBPS) for name, found in laws.items()}
    for figure in (
        figures.laws_by_method(laws, {"H100 SXM": READ_GBPS, "H200": None}),
        figures.left_out_errors(laws),
        figures.four_terms(terms),
    ):
        assert figure.data and "H100 SXM" in words(figure) and "H200" in words(figure)
    for empty in (
        figures.laws_by_method({}, {}),
        figures.left_out_errors({}),
        figures.four_terms({"H200": {}}),
    ):
        assert not empty.data and empty.layout.annotations


def test_the_menu_of_terms_shows_one_method_at_a_time(both):
    laws, _ = both
    terms = {"H100 SXM": law_methods.terms_by_method(laws["H100 SXM"], READ_GBPS)}
    figure = figures.four_terms(terms, "linear-fp16")
    (menu,) = figure.layout.updatemenus
    assert menu.buttons[menu.active].label == "linear-fp16"
    assert list(menu.buttons[menu.active].args[0]["visible"]) == [t.visible is not False for t in figure.data]
    bars = [t for t in figure.data if isinstance(t, go.Bar) and t.visible]
    assert {bar.name for bar in bars} == {"launch", "bytes", "instructions", "latency"}
    drawn = np.sum([bar.x for bar in bars], axis=0)
    assert np.all(drawn >= 100 - 1e-6) and np.all(drawn < 110)
    assert figures.four_terms(terms, "never heard of").layout.updatemenus[0].active == 0
