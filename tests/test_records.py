"""Records: what is refused, what survives a round trip or a killed writer, and the plausibility gate."""

import json
import multiprocessing
import os
import statistics
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trapetum import records
from trapetum.records import Ceilings, Record, RecordError

CONFIG = {
    "in_features": 4096,
    "out_features": 4096,
    "bits": 4,
    "l2": "cold",
    "chain": "alone",
    "bytes": 8.0e6,
}
DEVICE = {
    "name": "NVIDIA H100 80GB HBM3",
    "arch": "sm_90",
    "l2_bytes": 50 * 2**20,
    "clocks": {"sm_mhz": 1980},
}
SOFTWARE = {"python": "3.11.7", "torch": "2.11.0"}
SHA = "ab" * 32


def make(samples=(5.0, 4.0, 4.5), quantity="gemv_time", method="codebook", config=CONFIG, **more):
    return records.measured(quantity, samples, method, config, DEVICE, SOFTWARE, **more)


def read_bandwidth(gbps, **more):
    return make([gbps], "read_bandwidth", "read", {"bytes": 4 * 2**30, "l2": "cold"}, **more)


json_scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
)
json_objects = st.dictionaries(
    st.text(),
    st.recursive(
        json_scalars,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    ),
    max_size=4,
)
positive = st.floats(min_value=1e-9, max_value=1e12)


@st.composite
def any_record(draw):
    return records.measured(
        draw(st.sampled_from(sorted(records.QUANTITIES))),
        draw(st.lists(positive, min_size=1, max_size=8)),
        draw(st.text(min_size=1).map(lambda text: f"m{text}m")),
        draw(json_objects),
        {**draw(json_objects), "name": "some device"},
        draw(json_objects),
        kernel_sha256=draw(st.none() | st.just(SHA)),
        commit=draw(st.none() | st.text()),
        dirty=draw(st.none() | st.booleans()),
        source=draw(st.text()),
    )


@settings(deadline=None)
@given(any_record())
def test_json_round_trip_keeps_every_field_and_the_id(record):
    line = records.to_json(record)
    assert "\n" not in line
    again = records.from_json(line)
    assert again == record and again.id == record.id and records.to_json(again) == line


@settings(max_examples=30, deadline=None)
@given(st.lists(any_record(), max_size=4))
def test_file_round_trip(tmp_path_factory, written):
    path = tmp_path_factory.mktemp("records") / "run.jsonl"
    path.touch()
    for record in written:
        records.append(path, record)
    loaded = records.load(path)
    assert loaded.problems == []
    assert loaded.records == list({record.id: record for record in written}.values())


def test_json_line_has_exactly_the_fields_of_a_record():
    names = (
        "id quantity value unit samples p20 p80 n kind method config device software "
        "kernel_sha256 commit dirty utc source suspect why_suspect"
    ).split()
    assert list(json.loads(records.to_json(make()))) == names
    assert sorted(Record.__dataclass_fields__) == sorted(names)


def test_measured_takes_the_median_and_the_spread():
    record = make(samples=[5, 1, 3, 2, 4, 6])
    assert (record.value, record.p20, record.p80, record.n) == (3.5, 2.0, 5.0, 6)
    assert record.unit == "us" and record.kind == "measured" and record.samples == (5, 1, 3, 2, 4, 6)


@settings(deadline=None)
@given(st.lists(positive, min_size=1), st.floats(0, 100))
def test_percentile_stays_inside_and_meets_the_median(samples, percent):
    found = records.percentile(samples, percent)
    assert min(samples) <= found <= max(samples) or found == pytest.approx(min(samples))
    assert records.percentile(samples, 50) == pytest.approx(statistics.median(samples))


def test_value_can_be_given_where_it_is_not_the_median():
    record = make([5.3, 5.6, 5.5], "perplexity", "kmeans", {"window": 2048}, value=5.47)
    assert record.value == 5.47 and record.p20 == pytest.approx(5.38)


def test_id_is_twelve_hex_digits_and_depends_on_content_only():
    when = "2026-01-31T12:00:00Z"
    one, same = make(utc=when), make(utc=when, config=dict(reversed(CONFIG.items())))
    assert one.id == same.id and len(one.id) == 12 and int(one.id, 16) >= 0
    assert hash(one) == hash(same)
    assert make(utc=when, config={**CONFIG, "bits": 3}).id != one.id


def test_published_figures_keep_their_id_from_run_to_run():
    def claim():
        return records.published(
            "decode_speed", 135, "trapetum", {}, {"name": "RTX 4090"}, "benchmarks, table 1"
        )

    assert claim() == claim() and claim().utc is None and claim().unit == "tok/s"


def test_derived_keeps_formula_and_inputs():
    record = records.derived(
        "speedup", 3.3, "codebook", {"baseline": "linear-fp16"}, {}, "0123456789ab", "a / b"
    )
    assert record.source == "a / b; from 0123456789ab"
    with pytest.raises(RecordError, match="its inputs and its formula"):
        records.derived("speedup", 3.3, "codebook", {}, {}, "0123456789ab", "")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "guessed"}, "kind must be one of measured, published, derived, not 'guessed'"),
        ({"quantity": "speed"}, "quantity 'speed' is unknown; the quantities are read_bandwidth"),
        ({"unit": "ms"}, "gemv_time is in us, not 'ms'"),
        ({"method": ""}, "method must be a name"),
        ({"method": " codebook"}, "method must be a name"),
        ({"value": float("nan")}, "value must be finite"),
        ({"value": "4.3"}, "value must be a number, not '4.3'"),
        ({"value": True}, "value must be a number, not True"),
        ({"value": 0.0}, "gemv_time cannot be 0 us"),
        ({"value": -1.0}, "gemv_time cannot be -1 us"),
        ({"samples": "4.3"}, "samples must be a list"),
        ({"samples": (1.0, float("inf"))}, "samples must be finite"),
        ({"samples": (), "n": 0}, "needs its samples"),
        ({"n": 7}, "n is 7 but there are 3 samples"),
        ({"n": 3.0}, "n must be a count"),
        ({"p20": 9.0}, r"p20 \(9.0\) is above p80"),
        ({"p20": None}, "p20 and p80 go together"),
        ({"config": []}, r"config must be an object, not \[\]"),
        ({"config": {4: 1}}, "config has the key 4"),
        ({"config": {"x": object()}}, "config holds what JSON cannot"),
        ({"config": {"x": float("nan")}}, "config holds what JSON cannot"),
        ({"device": {}}, "needs device.name"),
        ({"kernel_sha256": "abc"}, "kernel_sha256 must be 64 hex digits or null, not 'abc'"),
        ({"commit": 7}, "commit must be a string or null"),
        ({"dirty": "no"}, "dirty must be true, false or null"),
        ({"utc": None}, "needs utc"),
        ({"utc": "yesterday"}, "utc must be like 2026-01-31T12:00:00Z, not 'yesterday'"),
        ({"utc": "2026-13-01T00:00:00Z"}, "utc must be like"),
        ({"source": None}, "source must be a string"),
        ({"suspect": True}, "suspect and why_suspect go together"),
        ({"suspect": 1}, "suspect must be true or false"),
        ({"kind": "published"}, "a published record needs a source"),
        ({"kind": "derived", "source": "  "}, "a derived record needs a source"),
    ],
)
def test_broken_rules_are_refused_with_a_sentence(changes, words):
    with pytest.raises(RecordError, match=words):
        make().replace(**changes)


def test_energy_net_of_idle_may_be_negative_and_weight_error_zero():
    assert make([-0.01], "energy_per_token").value == -0.01
    assert make([0.0], "weight_error").value == 0.0
    with pytest.raises(RecordError, match="weight_error cannot be -0.1"):
        make([-0.1], "weight_error")


def test_no_samples_is_refused_by_name():
    with pytest.raises(RecordError, match="gemv_time of codebook: .* at least one sample"):
        make([])


def test_numpy_values_become_plain_ones():
    numpy = pytest.importorskip("numpy")
    record = make(numpy.array([1.0, 2.0]), config={"bits": numpy.int64(4), "shape": (1, 2)})
    assert record.config == {"bits": 4, "shape": [1, 2]}
    assert records.from_json(records.to_json(record)) == record


def test_a_record_keeps_its_own_copy_of_what_it_was_given():
    config = dict(CONFIG)
    record = make(config=config)
    config["bits"] = 2
    assert record.config["bits"] == 4


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "not JSON"),
        ("[1]", "a record is a JSON object, not list"),
        ("{}", "missing fields: id, quantity"),
        ('{"value": NaN}', "NaN is no finite number"),
        ("[" * 100_000, "not JSON"),
        ('{"value": 1' + "0" * 5000 + "}", "not JSON"),
    ],
)
def test_lines_that_are_no_record(line, words):
    with pytest.raises(RecordError, match=words):
        records.from_json(line)


def test_edited_line_is_noticed():
    line = records.to_json(make()).replace('"bits": 4', '"bits": 3')
    with pytest.raises(RecordError, match="the line was edited"):
        records.from_json(line)


def test_unknown_field_and_empty_id_are_refused():
    content = json.loads(records.to_json(make()))
    with pytest.raises(RecordError, match="missing fields: none; unknown: colour"):
        records.from_json(json.dumps({**content, "colour": "red"}))
    with pytest.raises(RecordError, match="id is empty"):
        records.from_json(json.dumps({**content, "id": ""}))


def test_bad_lines_are_reported_with_file_and_number_and_the_rest_loads(tmp_path):
    path = tmp_path / "run.jsonl"
    first, second = make(), make([9.0])
    lines = [
        records.to_json(first).encode(),
        b"<<<<<<< HEAD",
        b"",
        b"\xff\xfe",
        records.to_json(second).encode(),
    ]
    path.write_bytes(b"\n".join(lines) + b"\n")
    loaded = records.load(tmp_path)
    assert loaded.records == [first, second]
    assert [(p.path, p.line) for p in loaded.problems] == [(path, 2), (path, 4)]
    assert str(loaded.problems[0]).startswith(f"{path}:2: not JSON")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_damage_makes_load_raise_or_lose_other_lines(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("damage") / "run.jsonl"
    kept, broken = make([3.0]), make([4.0])
    line = bytearray(records.to_json(broken).encode())
    where = data.draw(st.integers(0, len(line) - 1))
    cut = data.draw(st.booleans())
    damage = data.draw(st.integers(0, 255).filter(lambda byte: byte != line[where] and byte != 10))
    line = line[:where] if cut else line[:where] + bytes([damage]) + line[where + 1 :]
    path.write_bytes(bytes(line) + b"\n" + records.to_json(kept).encode() + b"\n")
    loaded = records.load(path)
    assert kept in loaded.records
    assert all(record in (kept, broken) for record in loaded.records), "a damaged line was believed"
    assert all(problem.line == 1 for problem in loaded.problems)


def test_missing_path_is_a_problem_not_an_exception(tmp_path):
    loaded = records.load(tmp_path / "nothing.jsonl", tmp_path)
    assert loaded.records == [] and len(loaded.problems) == 1
    assert str(loaded.problems[0]) == f"{tmp_path}/nothing.jsonl: cannot be read: No such file or directory."


def test_repeated_records_load_once(tmp_path):
    record = make()
    records.append(tmp_path / "a.jsonl", record)
    records.append(tmp_path / "sub" / "b.jsonl", [record, make([7.0])])
    assert len(records.load(tmp_path).records) == 2


def test_append_closes_a_line_that_was_cut_off(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text(records.to_json(make())[:50])
    records.append(path, make([2.0]))
    loaded = records.load(path)
    assert [r.value for r in loaded.records] == [2.0]
    assert [p.line for p in loaded.problems] == [1]


def test_append_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "run.jsonl"
    records.append(path, make())
    before = path.read_bytes()
    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: write(handle, data[:40]))
    with pytest.raises(OSError, match="only 40 of"):
        records.append(path, make([2.0]))
    assert path.read_bytes() == before


def test_append_of_nothing_makes_no_file(tmp_path):
    records.append(tmp_path / "run.jsonl", [])
    assert list(tmp_path.iterdir()) == []


def _append_many(path, start):
    for value in range(start, start + 25):
        records.append(path, make([value], source="x" * 20_000))


def test_writers_side_by_side_lose_nothing(tmp_path):
    path = tmp_path / "run.jsonl"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_append_many, args=(path, 1 + 25 * i)) for i in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    loaded = records.load(path)
    assert loaded.problems == []
    assert sorted(r.value for r in loaded.records) == list(range(1, 76))


def test_implied_bandwidth():
    assert records.implied_gbps(make([4.0])) == pytest.approx(2000)
    decode = make([200.0], "decode_speed", config={"bytes": 5e9})
    assert records.implied_gbps(decode) == pytest.approx(1000)
    assert records.implied_gbps(read_bandwidth(3190)) == 3190
    assert records.implied_gbps(make([100.0], "dequant_bandwidth")) == 100
    assert records.implied_gbps(make([4.0], config={})) is None
    assert records.implied_gbps(make([5.5], "perplexity")) is None


def test_gate_refuses_more_than_the_peak():
    record = records.gate(make([2.0]), peak_gbps=3350)
    assert record.suspect and record.id != make([2.0]).id
    assert (
        record.why_suspect
        == "It implies 4000 GB/s of memory traffic, more than the device's peak of 3350 GB/s."
    )
    assert records.from_json(records.to_json(record)) == record


@pytest.mark.parametrize(("gbps", "suspect"), [(3190, False), (3190 * 1.019, False), (3190 * 1.021, True)])
def test_gate_allows_two_percent_over_a_cold_read(gbps, suspect):
    record = records.gate(read_bandwidth(gbps), peak_gbps=3350, cold_read_gbps=3190)
    assert record.suspect is suspect
    assert ("1.02 times the 3190 GB/s" in record.why_suspect) is suspect


def test_gate_lets_a_warm_cache_exceed_memory_but_not_beyond_its_size():
    warm = {**CONFIG, "l2": "warm"}
    assert not records.gate(make([1.0], config=warm), 3350, 3190).suspect
    beyond = {**warm, "bytes": DEVICE["l2_bytes"] + 100e6}
    assert not records.gate(make([40.0], config=beyond), 3350).suspect
    assert "beyond the cache" in records.gate(make([20.0], config=beyond), 3350).why_suspect


def test_gate_judges_a_warm_record_whole_when_the_cache_size_is_unknown():
    record = make([1.0], config={**CONFIG, "l2": "warm"}).replace(device={"name": "unknown card"})
    assert records.gate(record, 3350).suspect


def test_gate_judges_published_figures_too():
    claim = records.published(
        "gemv_time", 30, "torch-mv-fp16", {"bytes": 33.6e6}, {"name": "RTX 4090"}, "page, table 3"
    )
    assert records.gate(claim, peak_gbps=1008).suspect
    assert not records.gate(claim.replace(value=40), peak_gbps=1008).suspect


def test_gate_leaves_alone_what_it_cannot_judge():
    for record in (make([1e-3], "perplexity"), make([1.0], config={})):
        assert records.gate(record, 3350, 3190) is record
    assert not records.gate(make([0.001]), None, None).suspect


def test_gate_keeps_an_earlier_verdict():
    record = make().replace(suspect=True, why_suspect="The fan had stopped.")
    assert records.gate(record, 1.0) is record


def test_measured_applies_the_gate():
    assert make([2.0], gate=Ceilings(3350, 3190)).suspect
    assert not make([4.0], gate=Ceilings(3350, 3190)).suspect


def test_stale_when_the_kernel_has_changed():
    record = make(kernel_sha256=SHA)
    assert not records.is_stale(record, {"codebook": SHA})
    assert records.is_stale(record, {"codebook": "cd" * 32})
    assert not records.is_stale(record, {"codebook": {SHA, "cd" * 32}})
    assert records.is_stale(record, lambda method: {"codebook": "cd" * 32}[method])
    assert not records.is_stale(record, {}) and not records.is_stale(record, lambda method: None)
    assert not records.is_stale(make(), {"codebook": SHA})


def test_select_filters_by_field_device_and_config():
    four, three = make(), make(config={**CONFIG, "bits": 3, "l2": "warm"})
    claim = records.published("decode_speed", 135, "trapetum", {"bits": 4}, {"name": "RTX 4090"}, "page")
    everything = [four, three, claim]
    assert records.select(everything, quantity="gemv_time") == [four, three]
    assert records.select(everything, kind="published", device="RTX 4090") == [claim]
    assert records.select(everything, device="RTX 409") == []
    assert records.select(everything, bits=4) == [four, claim]
    assert records.select(everything, bits=(3, 4), l2="cold") == [four]
    assert records.select(everything, l2=None) == [claim]
    assert records.select(everything, method={"codebook"}, suspect=False) == [four, three]


def test_frame_flattens_nested_fields():
    pytest.importorskip("pandas")
    table = records.frame([make(), records.published("perplexity", 5.47, "fp", {"window": 2048}, {}, "page")])
    assert table["config.bits"].iloc[0] == 4 and table["device.clocks.sm_mhz"].iloc[0] == 1980
    assert table["config.window"].iloc[1] == 2048 and len(table) == 2
    empty = records.frame([])
    assert len(empty) == 0 and "value" in empty.columns


def test_layer_one_imports_no_torch():
    modules = ["records", "machine", "shapes", "law", "hardware", "pareto"]
    code = (
        f"import sys\nimport {', '.join('trapetum.' + m for m in modules)}\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_latest_drops_repeats_but_not_other_subjects():
    old = make([5.0], utc="2026-11-20T10:00:00Z")
    new = make([6.0], config={**CONFIG, "threads": 2}, utc="2026-11-21T10:00:00Z")
    warm = make([3.0], config={**CONFIG, "l2": "warm"}, utc="2026-11-19T10:00:00Z")
    exact = make([9.0], config={**CONFIG, "path": "exact"}, utc="2026-11-19T10:00:00Z")
    assert records.latest([new, warm, old, exact]) == [new, warm, exact]
    assert records.latest([old, new]) == [new]


APART = (
    "interleaved",
    "runtime",
    "baseline",
    "baseline_dtype",
    "dtype",
    "world_size",
    "way",
    "rows",
    "beside",
)


@pytest.mark.parametrize("name", APART)
def test_latest_keeps_runs_of_another_kind(name):
    alone = make([5.0], utc="2026-11-20T10:00:00Z")
    one, other = (
        make([v], config={**CONFIG, name: said}, utc=f"2026-11-2{v}T10:00:00Z")
        for v, said in ((1, "a"), (2, "b"))
    )
    again = make([4.0], config={**CONFIG, name: "a"}, utc="2026-11-23T10:00:00Z")
    assert records.latest([alone, one, other]) == [alone, one, other]
    assert records.latest([alone, one, other, again]) == [alone, again, other]


def test_explain_says_every_part_of_a_record():
    rows = {field: said for field, said, _ in records.explain(make(commit="0123456789abcdef", dirty=True))}
    assert rows["quantity, value, unit"] == "gemv_time: 4.5 us"
    assert "n 3" in rows["p20, p80, n"] and "in_features 4096" in rows["config"]
    assert rows["commit"] == "0123456789, with uncommitted changes"
    note = records.published("gemv_time", 6.0, "read", {}, {"name": "H100"}, "a note")
    assert dict((f, s) for f, s, _ in records.explain(note))["p20, p80, n"] == "one figure, n 0"
