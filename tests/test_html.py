"""The page: figures, formulas and answers inside, nothing asked of the network."""

import re

import nbformat
import plotly.graph_objects as go
import pytest
from nbformat import v4

from trapetum import html

PLOT = {"application/vnd.plotly.v1+json": go.Figure(go.Scatter(y=[1, 3, 2])).to_plotly_json()}


def notebook(tmp_path, *cells, name="03_shapes.ipynb"):
    path = tmp_path / name
    made = v4.new_notebook(
        cells=[v4.new_markdown_cell("# Which shapes win?\nText with $T = t_0 + b$."), *cells]
    )
    made.metadata["widgets"] = {"application/vnd.jupyter.widget-state+json": {"state": {"big": "x" * 1000}}}
    nbformat.write(made, path)
    return path


def code(source, *outputs, tags=()):
    return v4.new_code_cell(source, outputs=list(outputs), metadata={"tags": list(tags)})


def display(data):
    return v4.new_output("display_data", data=data)


@pytest.fixture
def chapter(tmp_path):
    answer = display({"text/markdown": "**Answer.** The large ones, by 3.4x."})
    widget = display({"application/vnd.jupyter.widget-view+json": {"model_id": "m"}, "text/plain": "0%|"})
    return html.read_chapter(
        notebook(tmp_path, code("x = 1", display(PLOT), widget), code("a()", answer, tags=["answer"]))
    )


def test_chapter_parts(chapter):
    assert (chapter.number, chapter.title, chapter.error) == ("03", "Which shapes win?", "")
    assert "The large ones, by 3.4x." in chapter.answer and "Answer" not in chapter.answer
    assert "Plotly.newPlot" in chapter.body
    assert "0%|" not in chapter.body and "widget-state" not in chapter.body


def test_formulas_are_mathml(chapter):
    assert "<math" in chapter.body and "$T" not in chapter.body


def test_formulas_leave_code_and_prices_alone():
    assert html.formulas_to_mathml("`$x$` costs $5 and $6") == "`$x$` costs $5 and $6"
    assert "<math" in html.formulas_to_mathml("$$a = b$$")


def test_page_is_self_contained(chapter):
    page = html.page(
        "Trapetum on a card", "<p>summary</p>", [chapter], PLOT["application/vnd.plotly.v1+json"]
    )
    outside = re.findall(r'<(?:script|link|img|iframe)[^>]+(?:src|href)="([^"]*)"', page)
    assert [o for o in outside if not o.startswith("data:")] == []
    assert page.count("<title>Trapetum on a card</title>") == 1 and 'href="#c03"' in page
    assert len(page) < 10e6


def test_failed_chapter_shows_its_error(tmp_path):
    error = v4.new_output("error", ename="ValueError", evalue="no such shape", traceback=["trace <b>"])
    chapter = html.read_chapter(notebook(tmp_path, code("f()", error)))
    assert chapter.error == "ValueError: no such shape"
    page = html.page("t", "", [chapter])
    assert "This chapter stopped: ValueError: no such shape" in page
