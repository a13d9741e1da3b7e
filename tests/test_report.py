"""Runs: chapters are independent, a killed run is resumed, records are kept."""

import json
import shutil

import nbformat
import pytest
from nbformat import v4

from trapetum import machine, records, report

GOOD = """
from trapetum import records as rec
r = rec.measured("read_bandwidth", [100.0], "read", {"chapter": "%s"}, {"name": "test"}, {}, commit=None, dirty=None)
rec.append(f"{records}/%s.jsonl", [r])
"""


def write(folder, number, source):
    parameters = "profile = device = model = records = ''"
    cells = [
        v4.new_markdown_cell(f"# Question {number}?"),
        v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}),
        v4.new_code_cell(source),
    ]
    metadata = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}}
    nbformat.write(v4.new_notebook(cells=cells, metadata=metadata), folder / f"{number}_topic.ipynb")


@pytest.fixture
def workbook(tmp_path, monkeypatch):
    """Three tiny chapters in a workbook of their own; the second fails."""
    notebooks, runs, recorded = (tmp_path / n for n in ("notebooks", "runs", "recorded"))
    for folder in (notebooks, runs, recorded):
        folder.mkdir()
    monkeypatch.setattr(report, "NOTEBOOKS", notebooks)
    monkeypatch.setattr(report, "RUNS", runs)
    monkeypatch.setattr(report, "RECORDS", recorded)
    write(notebooks, "01", GOOD % ("01", "01"))
    write(notebooks, "02", "raise ValueError('no luck')")
    write(notebooks, "03", GOOD % ("03", "03"))
    write(notebooks, "90", "raise RuntimeError('not part of the default report')")
    return tmp_path


def request_for(chapters=None):
    return report.Request("smoke", "cpu", "builtin", chapters or report.choose_chapters(None))


@pytest.mark.notebook
def test_a_failing_chapter_leaves_the_others_alone_and_resume_redoes_only_it(workbook):
    folder, said = report.RUNS / "run", []
    assert report.run(request_for(), folder, say=said.append) == ["02"]
    state = json.loads((folder / "run.json").read_text())
    assert state["done"] == {"01": "", "02": "ValueError: no luck", "03": ""}
    page = (folder / "report.html").read_text()
    assert "This chapter stopped: ValueError: no luck" in page and 'id="c03"' in page
    assert [r.config["chapter"] for r in records.load(folder / "records.jsonl").records] == ["01", "03"]
    assert (report.RUNS / "latest").resolve() == folder.resolve()

    write(report.NOTEBOOKS, "02", GOOD % ("02", "02"))
    said.clear()
    assert report.run(request_for(), folder, resume=True, say=said.append) == []
    assert [line for line in said if "done before" in line] == [
        "[1/3] 01_topic: done before",
        "[3/3] 03_topic: done before",
    ]
    assert [r.config["chapter"] for r in records.load(folder / "records.jsonl").records] == ["01", "02", "03"]


@pytest.mark.notebook
def test_a_killed_chapter_leaves_no_half_records(workbook):
    folder = report.RUNS / "run"
    report.run(request_for(("01",)), folder, say=lambda line: None)
    state = json.loads((folder / "run.json").read_text())
    state["done"] = {}  # as if killed before the chapter was noted as done
    (folder / "run.json").write_text(json.dumps(state))
    report.run(request_for(("01",)), folder, resume=True, say=lambda line: None)
    assert len(records.load(folder / "records.jsonl").records) == 1


@pytest.mark.notebook
def test_saved_records_are_not_doubled(workbook):
    folder = report.RUNS / "run"
    report.run(request_for(("01",)), folder, say=lambda line: None)
    (target,) = report.save_records(folder)
    report.save_records(folder)
    assert (
        target.name == f"{report._slug(machine.describe('cpu')['name'])}.jsonl"
        and len(records.load(target).records) == 1
    )


def test_only_unknown_chapters_are_refused(workbook):
    with pytest.raises(report.ReportError, match=r"there is no chapter 77; the chapters are 01, 02, 03\."):
        report.choose_chapters("1,77")
    assert report.choose_chapters("3,1") == ("03", "01")


def test_nothing_to_resume_is_one_sentence(tmp_path, monkeypatch):
    runs = report.RUNS.parent / "papermill_runs" / ".none"
    monkeypatch.setattr(report, "RUNS", runs)
    with pytest.raises(report.ReportError, match="no run to resume"):
        report.latest_folder()
    shutil.rmtree(runs, ignore_errors=True)


def test_a_folder_that_is_no_run_is_one_sentence(tmp_path):
    with pytest.raises(report.ReportError, match="holds no run that can be resumed"):
        report.read_state(tmp_path)
