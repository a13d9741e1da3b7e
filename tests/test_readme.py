"""The README's tables: numbers cited, blocks rewritten, nothing invented."""

import pytest

from trapetum import readme, records, verify

DEVICE = {"name": "NVIDIA H100 80GB HBM3", "arch": "sm_90", "memory_bytes": 1}
SQUARE = {"in_features": 4096, "out_features": 4096, "l2": "cold", "bytes": 8_500_000}


def time_of(method, us, **config):
    return records.measured(
        "gemv_time", [us], method, SQUARE | config, DEVICE, {}, utc="2026-01-01T00:00:00Z"
    )


def test_a_table_cites_every_number():
    dense = time_of("linear-fp16", 16.0, bits=16, chain="alone")
    ours = time_of("codebook", 4.0, bits=4, chain="alone")
    text = readme.fill("before\n<!-- table:gemv-gpu -->\nold\n<!-- end -->\nafter", [dense, ours])
    assert "old" not in text and text.startswith("before\n") and text.endswith("after")
    assert f"16.0<!-- record:{dense.id} -->" in text
    assert f"4.00x<!-- ratio:{dense.id}/{ours.id} -->" in text
    citations = verify.citations_in(text, "README.md")
    assert len(citations) == 3
    assert verify.check(citations, {r.id: r for r in (dense, ours)}, set()) == []


def test_what_was_not_measured_is_a_dash():
    text = readme.fill(
        "<!-- table:gemv-gpu -->\n<!-- end -->", [time_of("codebook", 4.0, bits=4, chain="alone")]
    )
    assert "| - |" in text


def test_an_unknown_table_is_named():
    with pytest.raises(KeyError, match="asks for table 'speed'"):
        readme.fill("<!-- table:speed -->\n<!-- end -->", [])


def test_the_readme_is_as_its_records_say():
    """`make readme` was run after the records changed."""
    known = records.latest(r for r in records.load(readme.RECORDS).records if not r.suspect)
    text = (readme.ROOT / "README.md").read_text()
    assert readme.fill(text, known) == text
