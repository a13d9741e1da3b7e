"""The published figures: they load, say where they stand, and agree with each other where their documents do arithmetic."""

import re
from collections import Counter

import pytest

from trapetum import records
from trapetum.paths import PUBLISHED
from trapetum.shapes import MODELS

FILES = sorted(PUBLISHED.glob("*.jsonl"))


@pytest.fixture(scope="module")
def published():
    return records.load(PUBLISHED).records


def of(rows, document):
    return [r for r in rows if r.source.startswith(document)]


def test_every_line_loads_and_is_published():
    loaded = records.load(PUBLISHED)
    assert loaded.problems == []
    assert len(loaded.records) == sum(file.read_text().count("\n") for file in FILES)
    assert {r.kind for r in loaded.records} == {"published"}


def test_every_file_is_described():
    described = set(re.findall(r"`([\w-]+\.jsonl)`", (PUBLISHED / "README.md").read_text()))
    assert described == {file.name for file in FILES}


def test_no_figure_is_listed_twice(published):
    places = Counter(
        (r.source, r.quantity, r.method, records.to_json(r).split('"config"')[1]) for r in published
    )
    assert [place for place, n in places.items() if n > 1] == []


def test_every_source_names_a_place_in_its_document(published):
    assert [r.source for r in published if not re.search(r"\w, \S", r.source)] == []


def test_the_torchao_list_is_whole(published):
    rows = of(published, "torchao llama benchmark list")
    assert Counter(r.quantity for r in rows) == dict.fromkeys(
        ("decode_speed", "model_bandwidth", "decode_memory", "model_memory"), 43
    )
    assert all(r.device["name"] == "A100 SXM 80GB" for r in rows)


def test_torchao_bandwidth_is_speed_times_size(published):
    rows = {(r.source, r.quantity): r.value for r in of(published, "torchao llama benchmark list")}
    for source in {source for source, _ in rows}:
        expected = rows[source, "decode_speed"] * rows[source, "model_memory"]
        assert rows[source, "model_bandwidth"] == pytest.approx(expected, rel=0.01), source


def test_torchao_sizes_are_decimal_gigabytes_without_the_embedding(published):
    row = next(
        r
        for r in published
        if r.quantity == "model_memory" and r.method == "bf16" and r.config["model"] == "llama-2-7b"
    )
    shape = MODELS["llama-2-7b"]
    assert row.value == pytest.approx(2 * (shape.parameters - shape.embedding_weights) / 1e9, rel=0.001)


def test_speedups_of_the_study_follow_from_its_times(published):
    table = [r for r in of(published, "Trapetum benchmarks page") if "4096 x 4096 kernel table" in r.source]
    times = {r.source: r.value for r in table if r.quantity == "gemv_time"}
    dense = next(r.value for r in table if r.quantity == "gemv_time" and r.method == "linear-fp16")
    for row in (r for r in table if r.quantity == "speedup"):
        assert row.value == pytest.approx(dense / times[row.source], rel=0.01)


def test_carbon_follows_from_joules(published):
    rows = [r for r in of(published, "Trapetum benchmarks page") if "batch-1 decode table" in r.source]
    joules = {r.source: r.value for r in rows if r.quantity == "energy_per_token"}
    for row in (r for r in rows if r.quantity == "carbon_per_1k_tokens"):
        grams = joules[row.source] * 1000 / 3.6e6 * row.config["grid_g_per_kwh"]
        assert row.value == pytest.approx(grams, abs=0.01), row.source


def test_peers_of_the_notes_stay_below_the_cards_read_bandwidth(published):
    read = next(r.value for r in published if r.quantity == "read_bandwidth" and r.method == "read")
    rows = [r for r in of(published, "Trapetum project measurement notes") if r.device["name"] == "H100 SXM"]
    cold = [r for r in rows if r.quantity == "gemv_time" and r.config["l2"] == "cold" and r.method != "read"]
    assert len(cold) > 80
    assert [r for r in cold if records.implied_gbps(r) > 1.02 * read] == []


def test_nothing_published_is_faster_than_its_card(published):
    assert [(r.source, r.why_suspect) for r in published if r.suspect] == []
