"""The claims: every verdict follows from records and turns when the records do."""

import pytest

from trapetum import records
from trapetum.claims import CLAIMS, OUTCOMES, find, judge, judge_all, probes, table, text
from trapetum.claims.ceilings import sparse_gb
from trapetum.claims.evidence import Evidence, Verdict, shape_of
from trapetum.paths import PUBLISHED

H100 = {"name": "NVIDIA H100 80GB HBM3", "arch": "sm_90", "l2_bytes": 50 * 2**20}
RTX_4090 = {"name": "NVIDIA GeForce RTX 4090", "arch": "sm_89", "l2_bytes": 72 * 2**20}
CPU = {"name": "some CPU", "arch": "x86_64"}
SQUARE = dict(in_features=4096, out_features=4096)


@pytest.fixture(scope="module")
def published():
    return records.load(PUBLISHED).records


def made(quantity, value, method, device=H100, utc="2026-01-01T00:00:00Z", **config):
    return records.measured(quantity, [value], method, config, device, {}, utc=utc)


def outcome(number, rows, device=None):
    return judge(number, rows, device).outcome


def test_all_nineteen_are_there_and_judged(published):
    assert [claim.id for claim in CLAIMS] == list(range(1, 20))
    for claim, found in judge_all(published):
        assert found.outcome in OUTCOMES
        assert found.reason.endswith(".") and len(found.reason) > 30, claim.id
        assert claim.implies(published), claim.id


def test_published_figures_behind_a_claim_are_found(published):
    without = [claim.id for claim in CLAIMS if not claim.published(published)]
    assert without == [6, 7]  # an architecture table and code: no figures


def test_a_verdict_needs_the_published_figures():
    with pytest.raises(LookupError, match="load data/published/"):
        judge(8, [])


def test_arithmetic_verdicts_hold_on_any_machine(published):
    arithmetic = {claim.id for claim, found in judge_all(published) if found.basis == "arithmetic"}
    assert {2, 4, 8, 12, 13, 18} <= arithmetic


def test_what_needs_a_measurement_says_so(published):
    for number in (3, 7, 10, 17):
        found = judge(number, published)
        assert found.outcome == "not testable here" and found.basis == "nothing"
        assert "It needs" in found.reason


@pytest.mark.parametrize(("us", "expected"), [(395.0, "reproduced"), (95.0, "refuted")])
def test_a_prefill_product_on_an_h100_decides_claim_3(published, us, expected):
    run = made("gemm_time", us, "linear-fp16", rows=2048, **SQUARE)
    assert outcome(3, [*published, run]) == expected
    elsewhere = made("gemm_time", us, "linear-fp16", device=CPU, rows=2048, **SQUARE)
    assert outcome(3, [*published, elsewhere]) == "not testable here"


@pytest.mark.parametrize(("cold", "warm", "expected"), [(15.7, 8.0, "refuted"), (60.0, 38.0, "reproduced")])
def test_cold_and_warm_bracket_claim_5(published, cold, warm, expected):
    runs = [
        made("gemv_time", us, "linear-fp16", l2=l2, bytes=1, **SQUARE)
        for l2, us in (("cold", cold), ("warm", warm))
    ]
    found = judge(5, [*published, *runs])
    assert (found.outcome, found.basis) == (expected, "measured")
    assert set(found.records) >= set(runs)


def test_claim_1_is_refuted_by_marlins_own_products_and_saved_by_a_fast_decode(published):
    assert judge(1, published).basis == "published"
    fast = made("decode_speed", 525, "marlin", model="random:llama-2-7b", bits=4)
    assert outcome(1, [*published, fast]) == "reproduced"
    slow = made("decode_speed", 300, "marlin", model="random:llama-2-7b", bits=4)
    assert outcome(1, [*published, slow]) == "refuted"
    ours = made("decode_speed", 480, "codebook", model="random:llama-2-7b", bits=4)
    assert "480 tok/s (codebook)" in judge(1, [*published, ours]).reason


@pytest.mark.parametrize(("codes", "expected"), [(5.0, "refuted"), (15.5, "reproduced")])
def test_claim_9_compares_on_one_device(published, codes, expected):
    cold = dict(l2="cold", chain="alone", **SQUARE)
    dense = made("gemv_time", 15.7, "linear-fp16", **cold)
    ours = made("gemv_time", codes, "codebook", bits=4, **cold)
    assert outcome(9, [*published, dense, ours]) == expected
    other = made("gemv_time", codes, "codebook", device={**H100, "name": "NVIDIA H100 PCIe"}, bits=4, **cold)
    assert judge(9, [*published, dense, other]).basis == "published"


def test_claim_10_needs_the_card_but_shows_the_mechanism(published):
    shape = dict(in_features=11008, out_features=4096, bits=4)
    here = [made("gemv_time", 35, "linear-fp16", l2="cold", **{**shape, "bits": 16})]
    here += [made("gemv_time", us, "codebook", l2=l2, **shape) for l2, us in (("cold", 10), ("warm", 5))]
    found = judge(10, [*published, *here])
    assert found.outcome == "not testable here"
    assert "3.5x with codes from memory" in found.reason and "7.0x with codes from the cache" in found.reason
    card = [r.replace(device=RTX_4090) for r in here]
    assert outcome(10, [*published, *card]) == "reproduced"
    card[1] = card[1].replace(value=20.0, samples=(20.0,), p20=20.0, p80=20.0)
    assert outcome(10, [*published, *card]) == "refuted"


@pytest.mark.parametrize(("codes", "expected"), [(400, "refuted"), (90, "reproduced")])
def test_claim_11_is_decided_by_the_graph(published, codes, expected):
    config = dict(model="random:llama-2-7b")
    rows = [
        made("decode_speed", 40, "fp16", stage="naive", **config),
        made("decode_speed", 30, "codebook", stage="naive", bits=4, **config),
        made("decode_speed", 170, "fp16", stage="graph", **config),
        made("decode_speed", codes, "codebook", stage="graph", bits=4, **config),
    ]
    assert outcome(11, [*published, *rows]) == expected


@pytest.mark.parametrize(("gain", "expected"), [(1.01, "refuted"), (1.6, "reproduced")])
def test_claim_12_yields_to_two_runtimes_in_turns(published, gain, expected):
    about = dict(stage="pdl", run="r1", interleaved=True)
    rows = [
        made("decode_speed", 500 * v, "codebook", runtime=r, beside=b, **about)
        for r, b, v in (("python", "c++", 1), ("c++", "python", gain))
    ]
    rows.append(made("speedup", gain, "codebook", runtime="c++", baseline="python", **about))
    found = judge(12, [*published, *rows])
    assert (found.outcome, found.basis) == (expected, "measured")
    assert set(found.records) == set(rows) and f"{gain:.2f}x" in found.reason


@pytest.mark.parametrize(
    "odd", [{"kv": "int8"}, {"world_size": 2}, {"rows": 4}, {"beside": "c++"}, {"interleaved": True}]
)
def test_only_plain_decodes_stand_for_a_stage(published, odd):
    config = dict(model="random:llama-2-7b", stage="graph")
    rows = [
        made("decode_speed", 170, "fp16", **config),
        made("decode_speed", 400, "codebook", bits=4, **config),
        made("decode_speed", 90, "codebook", bits=4, utc="2026-02-01T00:00:00Z", **config, **odd),
    ]
    assert outcome(11, [*published, *rows]) == "refuted"
    assert outcome(11, [*published, rows[0], rows[2]]) == judge(11, published).outcome
    faster = rows[2].replace(value=900.0, samples=(900.0,), p20=900.0, p80=900.0)
    assert "400 tok/s (codebook)" in judge(1, [*published, rows[1], faster]).reason


@pytest.mark.parametrize(("int4", "expected"), [(300, "refuted"), (90, "reproduced")])
def test_claim_18_is_decided_by_a_cache_of_ours(published, int4, expected):
    config = dict(model="random:llama-2-7b", stage="pdl", bits=4, context=16384)
    plain = made("context_speed", 150, "codebook", kv="fp16", **config)
    ours = made("context_speed", int4, "codebook", kv="int4", **config)
    found = judge(18, [*published, plain, ours])
    assert (found.outcome, found.basis) == (expected, "measured") and set(found.records) == {plain, ours}
    other = plain.replace(config={**plain.config, "stage": "fused"})
    assert judge(18, [*published, other, ours]).basis == "arithmetic"


def perplexities(better, method="kmeans-weighted"):
    text_of = dict(model="builtin", window=512, stride=256, tokens=8192, text_sha256="a")
    return [
        made("perplexity", 10.0, "fp", CPU, bits=16, **text_of),
        made("perplexity", 11.0, "lloyd", CPU, bits=4, **text_of),
        made("perplexity", better, method, CPU, bits=4, **text_of),
    ]


def test_claim_14_takes_a_measured_ladder_over_a_published_one(published):
    closed = judge(14, [*published, *perplexities(10.3)])
    assert (closed.outcome, closed.basis) == ("refuted", "measured") and "70 %" in closed.reason
    weak = judge(14, [*published, *perplexities(10.9)])
    assert weak.basis == "published"  # diagonal weights alone decide nothing
    assert outcome(14, [*published, *perplexities(10.9, "lnq-guided")]) == "reproduced"


def test_claim_14_never_mixes_protocols(published):
    rows = perplexities(10.3)
    rows[2] = rows[2].replace(config={**rows[2].config, "window": 1024})
    assert judge(14, [*published, *rows]).basis == "published"


@pytest.mark.parametrize(("joules", "expected"), [(1.0, "reproduced"), (2.0, "refuted")])
def test_claim_15_reads_gross_energy_of_one_gpu(published, joules, expected):
    config = dict(model="random:llama-2-7b", stage="graph", accounting="gross")
    rows = [
        made("energy_per_token", 2.6, "fp16", bits=16, **config),
        made("energy_per_token", joules, "codebook", bits=4, **config),
    ]
    found = judge(15, [*published, *rows])
    assert (found.outcome, found.basis) == (expected, "measured")
    other_stage = rows[1].replace(config={**rows[1].config, "stage": "naive"})
    assert judge(15, [*published, rows[0], other_stage]).basis == "published"


def test_claim_19_takes_our_own_kernel(published):
    read = made("read_bandwidth", 30.0, "read", CPU, l2="cold", bytes=10**9)
    run = made("gemv_time", 300.0, "codebook", CPU, l2="cold", bits=4, bytes=8_500_000, **SQUARE)
    found = judge(19, [*published, read, run])
    assert (found.outcome, found.basis) == ("refuted", "measured")
    assert "94 %" in found.reason


def test_suspect_measurements_decide_nothing(published):
    run = made("gemm_time", 395.0, "linear-fp16", rows=2048, **SQUARE)
    doubted = run.replace(suspect=True, why_suspect="too fast.")
    assert outcome(3, [*published, doubted]) == "not testable here"


def test_the_machine_at_hand_goes_first():
    other = made(
        "gemm_time", 1.0, "m", device={**H100, "name": "NVIDIA H100 PCIe"}, utc="2026-06-01T00:00:00Z"
    )
    here = made("gemm_time", 2.0, "m")
    assert Evidence([other, here]).measured("gemm_time")[0] is other
    assert Evidence([other, here], H100["name"]).measured("gemm_time")[0] is here


def test_shapes_are_recognised_however_the_model_is_named():
    names = ("random:llama-2-7b", "NousResearch/Llama-2-7b-hf", "llama-2-7b")
    assert {shape_of(made("decode_speed", 1.0, "m", model=name)) for name in names} == {"llama-2-7b"}


def test_sparse_fp4_counts_every_bit():
    assert sparse_gb(70e9, scales=False) == pytest.approx(26.25)
    assert sparse_gb(70e9) == pytest.approx(30.625)


def test_table_rows_suit_the_figure(published):
    from trapetum.figures import claims as draw

    rows = table(published)
    assert len(rows) == 19 and all(all(row.values()) for row in rows)
    assert draw(rows).data[0].cells.values[4][0].startswith(OUTCOMES)


def test_numbers_read_as_words():
    assert [text(x) for x in (0.0123456, 15.72, 3190.4, 8192)] == ["0.0123", "15.7", "3,190", "8,192"]


def test_unknown_numbers_and_outcomes_are_refused():
    with pytest.raises(ValueError, match="numbered 1 to 19"):
        find(20)
    with pytest.raises(ValueError, match="no verdict"):
        Verdict("maybe", "because.", "measured")


# Compiled formats


@pytest.fixture(scope="module")
def compiled():
    pytest.importorskip("cuda.bindings.nvrtc")
    return probes.compiled_formats()


def test_int4_is_native_on_ampere_and_emulated_on_hopper(compiled):
    count = {(r.config["format"], r.config["arch"]): r for r in compiled}
    assert count["int4", "sm_80"].value == count["int8", "sm_90"].value == 1
    hopper = count["int4", "sm_90"]
    assert hopper.value > 50 and hopper.config["matrix_instructions"] == 2
    assert count["b1", "sm_80"].value == 1


def test_claim_6_follows_the_compiler(published, compiled):
    assert outcome(6, [*published, *compiled]) == "refuted"
    assert outcome(6, published) == "not testable here"
    native = [r.replace(value=1.0) for r in compiled if r.config["format"] == "int4"]
    binary = [r.replace(value=150.0) for r in compiled if r.config["format"] == "b1"]
    assert outcome(6, [*published, *native, *binary]) == "reproduced"


def test_an_unknown_architecture_is_left_out(compiled):
    assert probes.compiled_formats(("sm_10",)) == []


def test_machine_code_wants_a_cubin(tmp_path):
    file = tmp_path / "no.cubin"
    file.write_bytes(b"hello")
    with pytest.raises(ValueError, match="no 64-bit ELF"):
        probes.machine_code(file)


@pytest.mark.parametrize(("accepted", "expected"), [(0.0, "refuted"), (1.0, "reproduced")])
def test_claim_7_follows_the_calls(published, accepted, expected):
    row = made(
        "call_accepted",
        accepted,
        "torch",
        call="torch._int_mm, 1 row",
        as_printed=True,
        error="" if accepted else "too few",
    )
    assert outcome(7, [*published, row]) == expected


# On a GPU


@pytest.mark.gpu
def test_probes_on_a_gpu(published):
    many, calls = probes.products_of_many_rows("smoke"), probes.calls_as_printed("smoke")
    assert {"linear-fp16", "linear-int8"} <= {r.method for r in many}
    tried = {r.config["call"]: r.value for r in calls}
    assert tried["torch._int_mm, 16 rows"] == 0 and tried["torch._int_mm, 32 rows"] == 1
    assert judge(7, [*published, *calls]).outcome == "refuted"
