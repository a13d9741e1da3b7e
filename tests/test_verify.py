"""Citations: found, checked against records, and refused when stale, suspect or wrong."""

import pytest

from trapetum import records, verify


def record(value=3087.4, **changes):
    fields = dict(
        quantity="read_bandwidth",
        samples=[value],
        method="read",
        config={},
        device={"name": "a card"},
        software={},
        commit="abc",
        dirty=False,
    )
    return records.measured(**(fields | changes))


def check(text, *known, hashes=frozenset()):
    citations = verify.citations_in(text, "page")
    return verify.check(citations, {r.id: r for r in known}, set(hashes))


def test_a_right_number_passes():
    r = record()
    assert check(f"reads 3087 GB/s<!-- record:{r.id} --> cold", r) == []
    assert check(f"reads 3090 GB/s<!-- record:{r.id} --> cold", r) == []


def test_a_wrong_number_is_named_with_its_line():
    r = record()
    (problem,) = check(f"\nreads 3187 GB/s<!-- record:{r.id} -->", r)
    assert problem.startswith("page:2: 3187 is printed but the record says 3087.4")


def test_an_unknown_record_is_refused():
    (problem,) = check("3087 GB/s<!-- record:0123456789ab -->")
    assert "no record 0123456789ab" in problem


def test_a_stale_record_is_refused():
    r = record(kernel_sha256="0" * 64)
    (problem,) = check(f"3087 GB/s<!-- record:{r.id} -->", r, hashes={"1" * 64})
    assert "older kernel" in problem
    assert check(f"3087 GB/s<!-- record:{r.id} -->", r, hashes={"0" * 64}) == []


def test_a_suspect_record_is_refused():
    r = record().replace(suspect=True, why_suspect="more than the card has")
    (problem,) = check(f"3087 GB/s<!-- record:{r.id} -->", r)
    assert "suspect: more than the card has" in problem


def test_a_ratio_is_computed_from_two_records():
    a, b = record(300.0), record(100.0)
    assert check(f"3.0x<!-- ratio:{a.id}/{b.id} -->", a, b) == []
    assert check(f"3.2x<!-- ratio:{a.id}/{b.id} -->", a, b)


@pytest.mark.parametrize(
    ("value", "printed", "holds"),
    [
        (4.304, "4.30", True),
        (4.306, "4.30", False),
        (3187, "3190", True),
        (3187, "3200", True),
        (3187, "3100", False),
        (0.5, "1", True),
    ],
)
def test_rounding(value, printed, holds):
    assert verify.rounds_to(value, printed) is holds


def test_the_repository_verifies():
    _, problems = verify.verify()
    assert problems == []
