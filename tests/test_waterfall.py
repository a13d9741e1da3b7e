"""A token taken apart: parts that add up, a part dropped or counted twice is noticed, and the bridge of any two runs."""

import pytest

from trapetum import records, waterfall
from trapetum.shapes import MODELS, matrix_bytes
from trapetum.waterfall import WaterfallError

SHAPE = MODELS["llama-2-7b"]
CARD = {"name": "a card"}
# Two graphs and a tree with known parts, us.
FP16 = {"ideal bytes": 4100.0, "output head": 82.0, "kernel efficiency": 900.0, "launches": 300.0,
        "dispatch": 40.0, "attention and cache": 500.0, "norms": 200.0, "sampling": 30.0}  # fmt: skip
CODES = {"ideal bytes": 1015.0, "codebook overhead": 16.0, "output head": 82.0, "kernel efficiency": 420.0,
         "launches": 100.0, "dispatch": 5.0, "attention and cache": 120.0, "norms": 0.0, "sampling": 12.0}  # fmt: skip
TREE = {"ideal bytes": 1015.0, "codebook overhead": 16.0, "output head": 82.0, "kernel efficiency": 2000.0,
        "casts": 3000.0, "all but products": 18000.0}  # fmt: skip
DERIVED = {"ideal bytes", "codebook overhead", "output head", "kernel efficiency", "launches"}


def part(label, us, method, run, **config):
    base = {
        "model": "random:llama-2-7b",
        "bits": 4 if method == "codebook" else 16,
        "part": label,
        "run": run,
    }
    base |= {"context": 262.0, **config}
    if label in DERIVED:
        return records.derived("token_part", us, method, base, CARD, "a record", "a formula", utc=run)
    return records.measured("token_part", [us], method, base, CARD, {}, utc=run)


def made(parts, method, stage, run="2026-01-01T00:00:00Z", total=None):
    """The records of one run: its parts, the whole token, and what was split."""
    us = sum(parts.values()) if total is None else total
    rows = [part(label, value, method, run, stage=stage) for label, value in parts.items()]
    whole = [("token", us), ("products", 5000.0), ("what is left", 340.0)]
    return [*rows, *(part(label, value, method, run, stage=stage) for label, value in whole)]


def found(parts, method, stage, **more):
    return waterfall.find(made(parts, method, stage, **more), method)


def test_parts_add_up_to_the_token_and_come_in_order():
    run = found(dict(reversed(FP16.items())), "fp16", "graph").checked(1e-12)
    assert [p.label for p in run.parts] == [label for label in waterfall.PARTS if label in FP16]
    assert run.us == pytest.approx(sum(FP16.values())) and run.ideal_us == 4100
    assert run.name == "fp16, graph" and found(CODES, "codebook", "pdl").name == "4-bit codebook, pdl"
    assert {p.label for p in run.parts if p.kind == "derived"} == DERIVED & FP16.keys()


@pytest.mark.parametrize("dropped", [label for label, us in FP16.items() if us > 0.03 * sum(FP16.values())])
def test_a_dropped_part_is_noticed(dropped):
    rest = [r for r in made(FP16, "fp16", "graph") if r.config["part"] != dropped]
    with pytest.raises(WaterfallError, match="a part is missing or counted twice"):
        waterfall.find(rest).checked()


@pytest.mark.parametrize("label", FP16)
def test_a_part_counted_twice_is_noticed(label):
    again = part(label, FP16[label] + 1e-6, "fp16", "2026-01-01T00:00:00Z", stage="graph")
    with pytest.raises(WaterfallError, match=f"{label} is counted twice"):
        waterfall.find([*made(FP16, "fp16", "graph"), again]).checked()


@pytest.mark.parametrize(("off", "closes"), [(0.029, True), (0.031, False), (-0.029, True), (-0.031, False)])
def test_three_per_cent_are_tolerated(off, closes):
    total = sum(FP16.values()) / (1 - off)
    run = found(FP16, "fp16", "graph", total=total)
    assert run.missing_us == pytest.approx(off * total)
    if closes:
        run.checked()
    else:
        with pytest.raises(WaterfallError, match="3%"):
            run.checked()


def test_what_was_split_is_not_counted_beside_its_pieces():
    labels = {p.label for p in found(FP16, "fp16", "graph").parts}
    assert not labels & {"token", "products", "what is left"}


def test_a_repeated_file_counts_once():
    rows = made(FP16, "fp16", "graph")
    waterfall.find([*rows, *rows]).checked()


def test_runs_are_kept_apart_and_the_newest_is_found():
    old = made({**FP16, "ideal bytes": 9000.0, "casts": 50.0}, "fp16", "graph", "2025-01-01T00:00:00Z")
    new = made(FP16, "fp16", "graph", "2026-02-01T00:00:00Z")
    run = waterfall.find([*new, *old], "fp16", stage="graph").checked()
    assert run.us == pytest.approx(sum(FP16.values())) and run.of("casts") == 0
    assert len(waterfall.runs([*new, *old])) == 2
    assert waterfall.find(new, "codebook") is waterfall.find(new, "fp16", stage="pdl") is None


def test_two_whole_tokens_or_a_strange_part_are_refused():
    rows = made(FP16, "fp16", "graph")
    with pytest.raises(WaterfallError, match="2 whole tokens"):
        waterfall.runs([*rows, part("token", 1.0, "fp16", "2026-01-01T00:00:00Z", stage="graph")])
    with pytest.raises(WaterfallError, match="there is no part 'magic'"):
        waterfall.runs([*rows, part("magic", 1.0, "fp16", "2026-01-01T00:00:00Z", stage="graph")])


PAIRS = [
    (("fp16", "graph", FP16), ("codebook", "pdl", CODES)),
    (("codebook", "naive", TREE), ("codebook", "pdl", CODES)),
    (("fp16", "graph", FP16), ("codebook", "naive", TREE)),
]


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_the_bridge_leads_exactly_from_one_to_the_other(one, other):
    runs = [
        found(parts, method, stage, total=1.01 * sum(parts.values())) for method, stage, parts in (one, other)
    ]
    first, *steps, last = waterfall.compare(*runs)
    assert first.us + sum(s.us for s in steps) == pytest.approx(last.us, rel=1e-12)
    assert (first.label, last.label) == (runs[0].name, runs[1].name)
    assert len({s.label for s in steps}) == len(steps)
    backwards = {s.label: s.us for s in waterfall.compare(*reversed(runs))[1:-1]}
    assert backwards == pytest.approx({s.label: -s.us for s in steps})


def test_the_bridge_says_what_each_part_adds():
    steps = {
        s.label: s for s in waterfall.compare(found(FP16, "fp16", "graph"), found(CODES, "codebook", "pdl"))
    }
    assert steps["ideal bytes"].us == 1015 - 4100 and steps["codebook overhead"].us == 16
    assert steps["ideal bytes"].kind == "derived" and steps["norms"].kind == "measured"
    assert "all but products" not in steps and "not explained" not in steps


def test_a_tree_is_compared_by_what_it_can_leave_out():
    steps = {
        s.label: s
        for s in waterfall.compare(found(TREE, "codebook", "naive"), found(CODES, "codebook", "pdl"))
    }
    rest = sum(CODES[k] for k in ("launches", "dispatch", "attention and cache", "norms", "sampling"))
    assert steps["all but products"].us == pytest.approx(rest - 18000)
    assert steps["all but products"].kind == "derived" and steps["casts"].us == -3000
    assert "launches" not in steps and "norms" not in steps


def test_the_bridge_refuses_a_run_that_does_not_close():
    with pytest.raises(WaterfallError, match="fp16, graph: the parts add up"):
        waterfall.compare(found(FP16, "fp16", "graph", total=9000.0), found(CODES, "codebook", "pdl"))


def test_parts_are_checked_against_a_decode_of_its_own():
    run = found(CODES, "codebook", "pdl")
    config = {**run.token.config, "part": None}
    speed = records.measured("decode_speed", [1e6 / (1.02 * run.us)], "codebook", config, CARD, {})
    assert waterfall.explained(run, speed) == pytest.approx(1 / 1.02)
    for key, other in (("stage", "graph"), ("context", 12.0), ("bits", 3)):
        with pytest.raises(WaterfallError, match=f"the token has {key}"):
            waterfall.explained(run, speed.replace(config={**config, key: other}))


def test_product_bytes_are_the_weights_in_their_formats():
    codes = waterfall.product_bytes("codebook", 4, "fp16", "fp16", SHAPE)
    assert codes["ideal bytes"] == SHAPE.linear_weights // 2
    per_layer = sum(2 * 16 * outputs for _, _, outputs in SHAPE.linears())
    assert codes["codebook overhead"] == SHAPE.layers * per_layer
    assert codes["output head"] == 2 * SHAPE.lm_head_weights
    coded = waterfall.product_bytes("codebook", 4, "fp16", "codebook", SHAPE)
    assert coded["output head"] == matrix_bytes(SHAPE.hidden, SHAPE.vocab, "codebook-4")
    dense = waterfall.product_bytes("bf16", 16, "bf16", "bf16", SHAPE)
    assert dense["ideal bytes"] == 2 * SHAPE.linear_weights and dense["codebook overhead"] == 0
