"""The README's table of targets: the worst case decides, a miss says why."""

import pytest

from trapetum import readme_decode_targets as decodes
from trapetum import readme_targets as targets
from trapetum import records
from trapetum.paths import PUBLISHED
from trapetum.readme_cells import cited, ratio
from trapetum.records import measured

H100 = {"name": "NVIDIA H100", "arch": "sm_90"}


def timed(us, method, shape=(4096, 4096), **config):
    sizes = {"in_features": shape[0], "out_features": shape[1], "l2": "cold"}
    return measured(
        "gemv_time",
        [us] * 3,
        method,
        {**sizes, **config},
        device=H100,
        software={},
        utc="2026-01-01T00:00:00Z",
    )


CHAIN = ((4096, 12288), (11008, 4096), (4096, 22016))


@pytest.mark.parametrize(("slowest", "met"), [(10.0, True), (30.0, False)])
def test_the_worst_shape_decides(slowest, met):
    records = []
    for shape, us in zip(CHAIN, (10.0, slowest, 10.0), strict=True):
        records += [timed(40.0, "linear-fp16", shape), timed(us, "codebook", shape, bits=4, chain="pdl")]
    (found,) = [t for t in targets.h100(records) if t.bound == 3.5]
    assert found.met is met
    assert found.case.where == ("11008 x 4096" if not met else "4096 x 12288")
    assert found.case.value == pytest.approx(40 / slowest)


def test_a_miss_says_why_and_cites_its_records():
    one = timed(10.0, "codebook", bits=4, chain="alone", rows=1, beside="batch")
    four = measured(
        "gemm_time",
        [20.0] * 3,
        "codebook",
        {**one.config, "rows": 4},
        device=H100,
        software={},
        utc="2026-01-01T00:00:00Z",
    )
    text = targets.table(targets.h100([one, four]), cited, ratio)
    assert f"2.00x<!-- ratio:{four.id}/{one.id} -->" in text
    assert "| <= 1.15 |" in text and "missed: each further row" in text


def test_nothing_measured_is_no_table():
    assert targets.table([], cited, ratio) == ""
    assert targets.h100([]) == targets.h200([]) == targets.cpu([]) == []
    assert decodes.h100([]) == decodes.cpu([]) == []


# Whole decodes

SEVEN = {
    "model": "random:llama-2-7b",
    "new_tokens": 512,
    "prompt_tokens": 6,
    "dtype": "fp16",
    "read_gbps": 3000.0,
}
CODES = {"bits": 4, "linears": "codebook", "lm_head": "fp16", "bytes": 3_000_000_000}
DENSE = {"bits": 16, "linears": "dense", "bytes": 12_000_000_000}


def made(quantity, value, method, stage, *configs, **config):
    whole = SEVEN | {"stage": stage}
    for more in (*configs, config):
        whole = whole | more
    return measured(quantity, [value], method, whole, device=H100, software={}, utc="2026-01-01T00:00:00Z")


def found(rows, what, published=()):
    (target,) = [t for t in decodes.h100(rows, published) if t.what == what]
    return target


@pytest.mark.parametrize(("speed", "met"), [(500, True), (470, False)])
def test_the_decode_targets_follow_the_fastest_plain_decode(speed, met):
    ours, graph = (
        made("decode_speed", speed, "codebook", "pdl", CODES),
        made("decode_speed", 175, "fp16", "graph", DENSE),
    )
    memory = made("decode_memory", 3.9, "codebook", "pdl", CODES)
    odd = [
        made("decode_speed", 990, "codebook", "pdl", CODES, **more)
        for more in ({"rows": 4}, {"kv": "int8"}, {"beside": "c++"}, {"new_tokens": 128})
    ]
    rows = [ours, graph, memory, *odd]
    assert [
        found(rows, what).met for what in ("decode, 4-bit, 512 tokens, tok/s", "the same over own fp16 graph")
    ] == [met, met]
    assert found(rows, "the same over own fp16 graph").case.bottom is graph
    share = found(rows, "the same, share of the byte bound")
    assert share.case.value == pytest.approx(speed / 1000) and not share.met
    assert found(rows, "peak memory of the 512 tokens, GB").met
    text = targets.table(decodes.h100(rows), cited, ratio)
    assert (
        "| >= 480 (goal 600, stretch 700) |" in text
        and f"{speed}<!-- record:{ours.id} --> tok/s, {speed / 1000:.2f}" in text
    )
    assert "| J/token, own fp16 over 4-bit, gross | >= 2.5 (goal 3) | not measured | | |" in text


def test_the_published_bar_is_gpt_fasts_330():
    published = records.load(PUBLISHED).records
    target = found(
        [made("decode_speed", 500, "codebook", "pdl", CODES)],
        "the same over gpt-fast int4 (published)",
        published,
    )
    assert target.case.bottom.value == 330 and target.case.bottom.kind == "published" and target.met


def test_a_stage_that_lost_misses():
    rows = [
        made("decode_speed", v, "codebook", stage, CODES)
        for stage, v in (("naive", 30), ("cast_free", 40), ("graph", 300), ("fused", 290))
    ]
    each = found(rows, "each stage over the one before, 4-bit")
    assert not each.met and each.case.where == "fused over graph"


@pytest.mark.parametrize(("joules", "met"), [(1.0, True), (1.2, False)])
def test_energy_is_held_against_the_thriftiest_dense_stage(joules, met):
    rows = [made("decode_speed", 500, "codebook", "pdl", CODES)]
    for method, stage, value, config in (
        ("fp16", "graph", 2.8, DENSE),
        ("fp16", "pdl", 2.6, DENSE),
        ("codebook", "pdl", joules, CODES),
    ):
        rows.append(made("energy_per_token", value, method, stage, config, accounting="gross"))
    target = found(rows, "J/token, own fp16 over 4-bit, gross")
    assert target.met is met and target.case.top.value == 2.6


def test_caches_are_compared_at_their_context():
    rows = [made("decode_speed", 500, "codebook", "pdl", CODES)]
    for kv, context, value in (
        ("fp16", 4096, 300),
        ("int8", 4096, 360),
        ("fp16", 16384, 100),
        ("int8", 16384, 135),
    ):
        rows.append(made("context_speed", value, "codebook", "pdl", CODES, kv=kv, context=context))
    assert found(rows, "int8 cache over fp16 cache, 4096 tokens").case.value == pytest.approx(1.2)
    assert not found(rows, "int8 cache over fp16 cache, 16384 tokens").met
    assert found(rows, "int4 cache over fp16 cache, 16384 tokens").case is None


def test_what_took_turns_is_read_from_its_ratio():
    turn = {"interleaved": True, "run": "r"}
    rows = [made("decode_speed", 500, "codebook", "pdl", CODES)]
    rows.append(
        made(
            "speedup", 0.96, "codebook", "pdl", CODES, turn, runtime="c++", baseline="python", beside="python"
        )
    )
    assert not found(rows, "C++ program over Python").met
    on_cpu = [made("speedup", 9.0, "codebook", "lean", CODES, turn, baseline="transformers-eager fp32")]
    best, fp32 = decodes.cpu([*rows, *on_cpu])
    assert fp32.met and fp32.bound == 8.5 and best.case is None
    assert f"9.00x<!-- record:{on_cpu[0].id} -->" in targets.table([fp32], cited, ratio)
