"""The workbook object: what it knows, keeps and says, live and headless."""

import pytest

from trapetum import records
from trapetum.workbook import Workbook, is_live, significant

GPU = {"name": "NVIDIA H100 80GB HBM3", "arch": "sm_90"}
OTHER_GPU = {"name": "NVIDIA L4", "arch": "sm_89"}


def measured(value=5.0, device=GPU, utc="2026-11-20T10:00:00Z", **config):
    config = {"in_features": 64, "out_features": 64, "l2": "cold", "chain": "alone", "bytes": 8192, **config}
    return records.measured("gemv_time", [value] * 3, "codebook", config, device, {}, utc=utc)


@pytest.fixture
def data(tmp_path):
    """A data folder with one published record and recordings of two GPUs."""
    folder = tmp_path / "data"
    paper = records.published(
        "decode_speed", 330, "gpt-fast", {"model": "m"}, {"name": "H100"}, "a page, table 1"
    )
    records.append(folder / "published" / "a.jsonl", [paper])
    later = measured(7.0, OTHER_GPU, "2026-11-21T10:00:00Z")
    records.append(folder / "records" / "gpus.jsonl", [measured(), later])
    return folder


@pytest.fixture
def book(data):
    return Workbook("01", profile="smoke", device="cpu", data=data)


def test_knows_published_and_recorded_records(book, capsys):
    assert [r.value for r in book.select("decode_speed", "published")] == [330]
    assert len(book.select("gemv_time", "recorded")) == 2
    assert book.select("gemv_time", "here") == []
    assert len(book.records) == 3
    with pytest.raises(ValueError, match="choose one of here"):
        book.select("gemv_time", "there")


def test_falls_back_on_an_h100_even_if_another_gpu_is_newer(book):
    assert book.recorded_gpu == GPU["name"]


def test_says_which_device_and_day_a_recording_is_from(book, capsys):
    (record,) = book.show_recorded("gemv_time", bits=None)
    assert record.value == 5.0
    out = capsys.readouterr().out
    assert "Recorded on NVIDIA H100 80GB HBM3 on 2026-11-20, not measured here" in out
    assert book.show_recorded("energy_per_token") == []
    assert "No GPU run has recorded energy_per_token" in capsys.readouterr().out


def test_own_records_come_before_recorded_ones(book):
    own = measured(3.0, {"name": "this CPU", "arch": "x86_64"})
    assert book.here_or_recorded("gemv_time")[0].value == 5.0
    book.measure([own])
    assert book.here_or_recorded("gemv_time") == [own]


def test_measured_records_go_to_the_runs_file_and_other_chapters_see_them(data, tmp_path, capsys):
    path = tmp_path / "run" / "records.jsonl"
    first = Workbook("01", "smoke", "cpu", records=str(path), data=data)
    good = measured(3.0)
    suspect = records.gate(measured(0.001), 100.0)
    first.measure([good, suspect])
    out = capsys.readouterr().out
    assert "2 records, 1 suspect" in out and suspect.why_suspect in out
    second = Workbook("02", "smoke", "cpu", records=str(path), data=data)
    assert second.select("gemv_time", "here") == [good, suspect]
    assert not second.live


def test_nothing_is_written_without_a_records_path(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    Workbook("01", "smoke", "cpu", data=data).measure([measured()])
    assert sorted(tmp_path.rglob("*")) == before


def test_a_bad_line_is_named_and_the_rest_is_there(data, capsys):
    path = data / "records" / "gpus.jsonl"
    path.write_text(path.read_text() + "not a record\n")
    book = Workbook("01", "smoke", "cpu", data=data)
    assert len(book.recorded) == 2
    assert "gpus.jsonl:3" in capsys.readouterr().out


def test_works_with_no_records_at_all(tmp_path):
    book = Workbook("01", "smoke", "cpu", data=tmp_path / "nowhere")
    assert book.records == [] and book.recorded_gpu is None and book.problems == []


def test_predictions_are_compared_once(book, monkeypatch):
    texts = []
    monkeypatch.setattr("trapetum.workbook._markdown", texts.append)
    book.predict("small", 4.0, "us")
    book.predict("large", 9.0, "us")
    rows = book.compare({"small": measured(5.0)})
    assert [(r["measured"], r["ratio"]) for r in rows] == [(5.0, 1.25), (None, None)]
    assert (
        "| small | 4.00 us | 5.00 us | 1.25 |" in texts[0] and "| large | 9.00 us | not known |" in texts[0]
    )
    with pytest.raises(KeyError, match="predicted since the last comparison"):
        book.compare({"small": 5.0})


def test_a_comparison_needs_the_predicted_unit_and_label(book):
    book.predict("speed", 100.0, "tok/s")
    with pytest.raises(ValueError, match="predicted in tok/s but measured in us"):
        book.compare({"speed": measured()})
    with pytest.raises(KeyError, match="sped"):
        book.compare({"sped": 1.0})


def test_a_failed_check_raises_only_headless(book, capsys):
    book.live = False
    book.check(True, "all is well")
    assert "✓ all is well" in capsys.readouterr().out
    with pytest.raises(AssertionError, match="all is lost"):
        book.check(False, "all is lost")
    book.live = True
    book.check(False, "all is lost")
    assert "✗ all is lost" in capsys.readouterr().out


def test_cites_with_the_unit(book):
    assert book.cite(measured(4.3)) == "4.30 us"
    assert book.cite(measured(4.3), digits=2) == "4.3 us"
    ratio = records.published("perplexity", 5.47, "fp", {}, {}, "a page")
    assert book.cite(ratio) == "5.47"


@pytest.mark.parametrize(
    "value, digits, text",
    [(3190.4, 3, "3190"), (4.3, 3, "4.30"), (123.0, 3, "123"), (0.0012, 3, "0.00120"), (12345678.0, 3, "1.23e+07"),
     (0.0, 3, "0.00"), (-4.256, 3, "-4.26"), (99.96, 3, "100"), (float("inf"), 3, "inf")],
)  # fmt: skip
def test_significant_digits(value, digits, text):
    assert significant(value, digits) == text


def test_roof_prefers_what_was_measured_on_the_device(book):
    config = {"bytes": 4e9, "l2": "cold"}
    book.measure([records.measured("read_bandwidth", [3190.0] * 3, "read", config, GPU, {})])
    assert book.roof_gbps(GPU["name"]) == 3190
    assert 250 < book.roof_gbps("NVIDIA L4") < 350
    assert book.roof_gbps("a CPU nobody measured") is None


def test_live_means_a_front_end_and_no_report(monkeypatch):
    for name in ("TRAPETUM_LIVE", "JPY_SESSION_NAME", "VSCODE_PID", "SERVER_SOFTWARE"):
        monkeypatch.delenv(name, raising=False)
    assert not is_live()
    monkeypatch.setenv("SERVER_SOFTWARE", "voila/0.5.13")
    assert is_live() and not is_live("run/records.jsonl")
    monkeypatch.setenv("TRAPETUM_LIVE", "0")
    assert not is_live()
    monkeypatch.delenv("SERVER_SOFTWARE")
    monkeypatch.setenv("TRAPETUM_LIVE", "1")
    assert is_live("run/records.jsonl")


def test_wrong_words_are_refused(data):
    with pytest.raises(ValueError, match="choose one of smoke, quick, full"):
        Workbook("01", profile="fast", data=data)
    with pytest.raises(ValueError, match="not 'gpu'"):
        Workbook("01", device="gpu", data=data)


def test_figures_are_shown_as_data_that_the_report_can_draw(book, monkeypatch):
    import plotly.graph_objects as go

    bundles = []
    monkeypatch.setattr("IPython.display.display", lambda bundle, raw: bundles.append(bundle))
    book.show(go.Figure(go.Scatter(x=[1], y=[2])))
    (bundle,) = bundles
    assert list(bundle) == ["application/vnd.plotly.v1+json"]


def test_a_chapter_measures_only_what_no_chapter_has(book, capsys):
    here = {**book.machine}
    made = []

    def make():
        made.append(1)
        return [measured(3.0, here), measured(9.0, here, in_features=128)]

    assert [r.value for r in book.once("gemv_time", make, in_features=64)] == [3.0]
    assert [r.value for r in book.once("gemv_time", make, in_features=64)] == [3.0]
    assert len(made) == 1
    assert "measured by an earlier chapter" in capsys.readouterr().out


def test_a_gpu_is_the_recorded_one_else_the_published(book, capsys):
    assert [r.value for r in book.on_gpu("gemv_time")] == [5.0]
    assert "Recorded on" in capsys.readouterr().out
    book.recorded.clear()
    note = records.published("gemv_time", 6.0, "read", {"l2": "cold"}, {"name": "H100 SXM"}, "a note")
    book.published.append(note)
    assert book.on_gpu("gemv_time") == [note]
    assert "Published for an H100 SXM, not measured here: 1 gemv_time" in capsys.readouterr().out


def test_tables_put_numbers_on_the_right(book, monkeypatch):
    shown = []
    monkeypatch.setattr("trapetum.workbook._markdown", shown.append)
    book.table(["what", "GB/s"], [["read", 34.1234], ["copy", 3]])
    assert shown == ["| what | GB/s |\n|:--|--:|\n| read | 34.1 |\n| copy | 3 |"]
