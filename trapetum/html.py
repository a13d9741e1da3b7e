"""Turn executed notebooks into one HTML page that needs nothing from outside.

nbconvert renders the cells. What it leaves to the network is done here: plotly's script is put into the page once and
each figure drawn by it, formulas become MathML, widget state (which no kernel will ever animate) is dropped.
"""

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nbformat
import plotly.io
from latex2mathml.converter import convert as to_mathml
from nbconvert import HTMLExporter
from nbconvert.filters import markdown2html
from plotly.offline import get_plotlyjs

_TEMPLATES = Path(__file__).parent / "templates"
_PLOTLY = "application/vnd.plotly.v1+json"
_WIDGET = "application/vnd.jupyter.widget-view+json"
_CODE = re.compile(r"(```.*?```|`[^`\n]*`)", re.DOTALL)
_FORMULA = re.compile(r"\$\$(.+?)\$\$|(?<![\\$\w])\$([^\s$](?:[^$\n]*[^\s$\\])?)\$(?![\w$])", re.DOTALL)


@dataclass(frozen=True)
class Chapter:
    """One executed notebook.

    Attributes:
        number: e.g. `"03"`; also the anchor in the page.
        title: the question it asks.
        body: its cells as HTML.
        answer: its Answer as HTML, empty if it has none.
        error: the exception it stopped at, empty if it ran through.
    """

    number: str
    title: str
    body: str
    answer: str
    error: str


def formulas_to_mathml(markdown: str) -> str:
    """Replace `$...$` and `$$...$$` outside code by MathML, which browsers draw without a script."""

    def converted(match: re.Match) -> str:
        block, inline = match.groups()
        return to_mathml((block or inline).strip(), display="block" if block else "inline")

    parts = _CODE.split(markdown)
    return "".join(p if p.startswith("`") else _FORMULA.sub(converted, p) for p in parts)


def _figure_html(figure: dict) -> str:
    drawn = {"data": figure.get("data", []), "layout": figure.get("layout", {})}
    return plotly.io.to_html(
        drawn,
        include_plotlyjs=False,
        full_html=False,
        validate=False,
        config={"displaylogo": False, "responsive": True},
    )


def _prepare_output(output: dict) -> dict | None:
    """An output ready for nbconvert, or None to leave it out."""
    data = output.get("data", {})
    if _WIDGET in data and _PLOTLY not in data:
        return None
    if _PLOTLY in data:
        output["data"] = {"text/html": _figure_html(data[_PLOTLY])}
    elif "text/markdown" in data:
        output["data"] = {"text/markdown": formulas_to_mathml(_joined(data["text/markdown"]))}
    return output


def _joined(text: str | list[str]) -> str:
    return text if isinstance(text, str) else "".join(text)


def _prepare(notebook: nbformat.NotebookNode) -> None:
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = formulas_to_mathml(cell.source)
        elif cell.cell_type == "code":
            kept = [_prepare_output(output) for output in cell.outputs]
            cell.outputs = [output for output in kept if output is not None]


def _tagged(notebook: nbformat.NotebookNode, tag: str) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]


def _answer(notebook: nbformat.NotebookNode) -> str:
    texts = [
        _joined(output.data["text/markdown"])
        for cell in _tagged(notebook, "answer")
        for output in cell.get("outputs", [])
        if "text/markdown" in output.get("data", {})
    ]
    return markdown2html("\n\n".join(t.removeprefix("**Answer.**").strip() for t in texts))


def error_of(notebook: nbformat.NotebookNode) -> str:
    """The exception an executed notebook stopped at, as `Name: message`, or an empty string."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.output_type == "error":
                return f"{output.ename}: {output.evalue}"
    return ""


def title_of(notebook: nbformat.NotebookNode) -> str:
    """The first heading of the notebook without its number."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and (found := re.search(r"^#\s+(.+)$", cell.source, re.MULTILINE)):
            return found[1].strip()
    return "untitled"


def read_chapter(path: Path) -> Chapter:
    """Render one executed notebook `NN_topic.ipynb`."""
    notebook = nbformat.read(path, as_version=4)
    title, error = title_of(notebook), error_of(notebook)
    _prepare(notebook)
    notebook.cells = [
        c
        for c in notebook.cells
        if not {"parameters", "injected-parameters"} & set(c.metadata.get("tags", []))
    ]
    exporter = HTMLExporter(template_name="chapter", extra_template_basedirs=[str(_TEMPLATES)])
    exporter.exclude_input_prompt = exporter.exclude_output_prompt = True
    body, _ = exporter.from_notebook_node(notebook)
    return Chapter(path.stem[:2], title, body, _answer(notebook), error)


def _answers_html(chapters: Sequence[Chapter]) -> str:
    items = [
        f'<li><a href="#c{c.number}">{html.escape(c.title)}</a>'
        + (f'<p class="failed">This chapter stopped: {html.escape(c.error)}</p>' if c.error else c.answer)
        + "</li>"
        for c in chapters
    ]
    return f'<ol class="answers">{"".join(items)}</ol>'


def _chapter_html(chapter: Chapter) -> str:
    banner = (
        f'<p class="failed">This chapter stopped: {html.escape(chapter.error)}</p>' if chapter.error else ""
    )
    return f'<section id="c{chapter.number}" class="chapter">{banner}{chapter.body}</section>'


def page(title: str, summary: str, chapters: Sequence[Chapter], card: dict | None = None) -> str:
    """The whole report.

    Args:
        title: of the page.
        summary: HTML under the title: machine, date, profile.
        chapters: in order.
        card: a plotly figure (as a dict) shown above the answers, or None.

    Returns:
        HTML with every script, style and figure inside.
    """
    contents = "".join(
        f'<li class="{"bad" if c.error else "good"}"><a href="#c{c.number}">{c.number} {html.escape(c.title)}</a></li>'
        for c in chapters
    )
    card_html = f'<section id="card">{_figure_html(card)}</section>' if card else ""
    style = (_TEMPLATES / "report.css").read_text()
    # plotly's script goes first: the figures' own scripts call it as the page is read
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{style}</style>\n<script>{get_plotlyjs()}</script></head>\n<body>\n"
        f'<nav><a class="top" href="#top">Trapetum</a><ol>{contents}</ol></nav>\n<main id="top">\n'
        f"<h1>{html.escape(title)}</h1>\n{summary}\n{card_html}\n"
        f'<section id="answers"><h2>Answers</h2>{_answers_html(chapters)}</section>\n'
        + "\n".join(_chapter_html(c) for c in chapters)
        + "\n</main></body></html>\n"
    )
