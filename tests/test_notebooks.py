"""Every notebook: its form as it is committed, and that it runs from top to bottom without a GPU."""

import ast
import re
import statistics

import nbformat
import pytest
from nbformat.v4 import upgrade

from trapetum.paths import NOTEBOOKS, ROOT

PATHS = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
PARAMETERS = {"profile", "device", "model", "records"}
PLOTLY = "application/vnd.plotly.v1+json"
WITHOUT_AXES = {"table", "parcoords", "pie", "sankey", "indicator"}

each_notebook = pytest.mark.parametrize("path", PATHS, ids=[path.stem for path in PATHS])


def read(path):
    return upgrade(nbformat.read(path, as_version=4))


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tagged(notebook, tag):
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]


def length(cell):
    """Lines of code, without blank ones and comments."""
    return sum(bool(line.strip()) and not line.strip().startswith("#") for line in cell.source.split("\n"))


def bound_names(cell):
    """Names that the cell assigns at its top level, loops and the throwaway `_` left out."""
    names = set()
    for statement in ast.parse(cell.source).body:
        targets = []
        if isinstance(statement, ast.Assign):
            targets = statement.targets
        elif isinstance(statement, ast.AnnAssign | ast.AugAssign):
            targets = [statement.target]
        elif isinstance(statement, ast.FunctionDef | ast.ClassDef):
            names.add(statement.name)
        stored = (node for target in targets for node in ast.walk(target) if isinstance(node, ast.Name))
        names |= {node.id for node in stored if isinstance(node.ctx, ast.Store)}
    return names - {"_"}


# As committed


@each_notebook
def test_the_title_is_a_question(path):
    first = read(path).cells[0]
    assert first.cell_type == "markdown"
    assert re.match(r"# [^\n]+\?\n", first.source), "the first cell is a heading that asks"


@each_notebook
def test_parameters_answer_and_self_check_are_tagged(path):
    notebook = read(path)
    (parameters,) = tagged(notebook, "parameters")
    assignments = ast.parse(parameters.source).body
    assert all(isinstance(a, ast.Assign) and isinstance(a.value, ast.Constant) for a in assignments)
    assert bound_names(parameters) >= PARAMETERS
    (answer,), (check,) = tagged(notebook, "answer"), tagged(notebook, "self-check")
    assert "book.answer(" in answer.source and "book.check(" in check.source
    assert notebook.cells.index(parameters) < notebook.cells.index(answer) < notebook.cells.index(check)


@each_notebook
def test_it_ends_with_exercises_whose_answers_are_folded(path):
    last = read(path).cells[-1]
    assert last.source.startswith("## Try it")
    assert "<details><summary>" in last.source and "</details>" in last.source


@each_notebook
def test_it_is_committed_without_outputs_and_with_stable_ids(path):
    raw = nbformat.read(path, as_version=4)
    assert all(not cell.outputs and cell.execution_count is None for cell in code_cells(raw))
    assert raw.metadata.kernelspec.name == "python3"
    assert raw.metadata.keys() <= {"kernelspec", "language_info"}
    ids = [cell.id for cell in raw.cells]
    assert len(set(ids)) == len(ids)


@each_notebook
def test_cells_are_short_and_prose_keeps_up(path):
    notebook = read(path)
    lengths = [length(cell) for cell in code_cells(notebook)]
    assert statistics.median(lengths) <= 7
    assert max(lengths) <= 20
    prose = [cell for cell in notebook.cells if cell.cell_type == "markdown"]
    assert len(prose) >= len(lengths) / 3


@each_notebook
def test_no_name_is_bound_in_two_cells(path):
    seen = {}
    for cell in code_cells(read(path)):
        for name in bound_names(cell):
            assert name not in seen, f"{name} is bound in {seen[name]} and in {cell.id}"
            seen[name] = cell.id


@each_notebook
def test_no_shell_and_no_installing(path):
    for cell in code_cells(read(path)):
        assert not re.search(r"^\s*[!%]", cell.source, re.MULTILINE)


def test_the_report_has_the_chapters_0_to_8():
    assert [path.stem[:2] for path in PATHS if path.stem < "90"] == [f"0{n}" for n in range(9)]


# Run


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """Execute a notebook in the smoke profile on the CPU; all of them share one folder of records, as in a report."""
    import papermill

    folder = tmp_path_factory.mktemp("run")
    (folder / "records").mkdir()
    done = {}

    def execute(path):
        if path not in done:
            target = folder / path.name
            papermill.execute_notebook(
                str(path),
                str(target),
                parameters=_parameters(folder),
                kernel_name="python3",
                progress_bar=False,
                cwd=str(ROOT),
            )
            done[path] = nbformat.read(target, as_version=4)
        return done[path]

    return execute


def _parameters(folder):
    return {"profile": "smoke", "device": "cpu", "model": "builtin", "records": str(folder / "records")}


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """What `trapetum report` sets: no progress bars, figures as data, nobody at the front end; and one thread.

    With more threads than idle cores each of the many small products waits for the scheduler: minutes, not seconds.
    """
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("PLOTLY_RENDERER", "plotly_mimetype")
    monkeypatch.setenv("TRAPETUM_LIVE", "0")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def outputs(notebook):
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def figures(notebook):
    return [output.data[PLOTLY] for output in outputs(notebook) if PLOTLY in output.get("data", {})]


def axes(figure):
    """Axes that are drawn: those of traces with x and y, unless hidden."""
    layout = figure["layout"]
    for trace in figure["data"]:
        if trace["type"] in WITHOUT_AXES:
            continue
        for axis in ("x", "y"):
            name = f"{axis}axis{trace.get(f'{axis}axis', axis)[1:]}"
            if layout.get(name, {}).get("visible", True):
                yield name


def title(figure, axis):
    return (figure["layout"].get(axis, {}).get("title") or {}).get("text", "")


def without_numbers(figure):
    """Whether the figure is `style.nothing`: a sentence in place of numbers that no machine here has."""
    return not figure["data"] and bool(figure["layout"].get("annotations"))


def named(figure, axis):
    """Whether the axis has a title, or names (bars, methods) in place of a quantity, or shares a titled one's."""
    layout = figure["layout"].get(axis, {})
    traces = [t for t in figure["data"] if f"{axis[0]}axis{t.get(f'{axis[0]}axis', axis[0])[1:]}" == axis]
    categories = layout.get("ticktext") or any(
        isinstance(value, str) for t in traces for value in _listed(t.get(axis[0]))
    )
    return bool(title(figure, axis) or categories or layout.get("matches"))


def _listed(values):
    return values if isinstance(values, list) else []


@pytest.mark.notebook
@each_notebook
def test_it_runs_without_errors_or_spill(path, executed):
    notebook = executed(path)
    for output in outputs(notebook):
        assert output.output_type != "error"
        assert output.get("name") != "stderr", output.text
        assert "Warning" not in output.get("text", "")
    (answer,) = tagged(notebook, "answer")
    said = "".join(o.data["text/markdown"] for o in answer.outputs if "text/markdown" in o.get("data", {}))
    assert said.startswith("**Answer.**") and re.search(r"\d", said)
    (check,) = tagged(notebook, "self-check")
    ticks = "".join(o.get("text", "") for o in check.outputs)
    assert "✓" in ticks and "✗" not in ticks


@pytest.mark.notebook
@each_notebook
def test_its_figures_have_data_titles_and_units(path, executed):
    drawn = figures(executed(path))
    assert drawn
    for figure in drawn:
        heading = figure["layout"]["title"]["text"]
        assert heading
        if without_numbers(figure):
            continue
        assert figure["data"], heading
        assert figure["layout"]["title"]["subtitle"]["text"], (
            f"{heading}: no line that says unit, device and kind"
        )
        for axis in set(axes(figure)):
            assert named(figure, axis), f"{heading}: {axis} has no title"
