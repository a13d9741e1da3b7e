"""The README's table of targets: the worst case decides, a miss says why."""

import pytest

from trapetum import readme_targets as targets
from trapetum.readme import cited, ratio
from trapetum.records import measured

H100 = {"name": "NVIDIA H100", "arch": "sm_90"}


def timed(us, method, shape=(4096, 4096), **config):
    sizes = {"in_features": shape[0], "out_features": shape[1], "l2": "cold"}
    return measured("gemv_time", [us] * 3, method, {**sizes, **config}, device=H100, software={}, utc="2026-01-01T00:00:00Z")


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
    text = targets.table([one, four], targets.h100, cited, ratio)
    assert f"2.00x<!-- ratio:{four.id}/{one.id} -->" in text
    assert "| <= 1.15 |" in text and "missed: each further row" in text


def test_nothing_measured_is_no_table():
    assert targets.table([], targets.h100, cited, ratio) == ""
    assert targets.h200([]) == targets.cpu([]) == []
