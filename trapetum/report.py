"""`trapetum report`: execute the notebooks through papermill and bind them into one HTML page.

A run is a folder `papermill_runs/<utc>-<device>/`:

    run.json        what was asked (profile, device, model, chapters) and how each chapter ended
    notebooks/      the executed notebooks; one in progress ends in .part.ipynb
    records/        the records of each chapter; records.jsonl beside it holds them all once the run has ended
    report.html     the page

Chapters are independent: one that fails keeps its traceback in its section and the others go on. A killed run is
taken up with `--resume`, which redoes what is missing or failed.
"""

import html
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from trapetum import machine, records
from trapetum.build import write_atomically
from trapetum.paths import NOTEBOOKS, RECORDS, ROOT, RUNS

Say = Callable[[str], None]


class ReportError(RuntimeError):
    """A report cannot be made as asked; the message says why and what to do."""


@dataclass(frozen=True)
class Request:
    """What a run is asked to do; kept in `run.json` so that it can be resumed as it was asked."""

    profile: str
    device: str
    model: str
    chapters: tuple[str, ...]


def chapters_available() -> dict[str, Path]:
    """Notebooks of the default report by number: all but the 90s, which take longer and need more."""
    found = {p.name[:2]: p for p in sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))}
    return {number: path for number, path in found.items() if number < "90"}


def choose_chapters(only: str | None) -> tuple[str, ...]:
    """The chapter numbers meant by `--only 01,3,07`, or all.

    Raises:
        ReportError: a number that no notebook has.
    """
    available = chapters_available()
    if not only:
        return tuple(available)
    wanted = tuple(part.strip().zfill(2) for part in only.split(",") if part.strip())
    unknown = [number for number in wanted if number not in available]
    if unknown or not wanted:
        raise ReportError(
            f"there is no chapter {', '.join(unknown) or repr(only)}; the chapters are {', '.join(available)}."
        )
    return wanted


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40] or "machine"


def new_folder(device: str) -> Path:
    """The folder for a run that starts now."""
    utc = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    return RUNS / f"{utc}-{_slug(machine.describe(device)['name'])}"


def latest_folder() -> Path:
    """The newest run.

    Raises:
        ReportError: there is none.
    """
    runs = sorted(p.parent for p in RUNS.glob("*/run.json") if not p.parent.is_symlink())
    if not runs:
        raise ReportError(f"there is no run to resume in {RUNS.relative_to(ROOT)}/; leave out --resume.")
    return runs[-1]


def _write_state(folder: Path, state: dict) -> None:
    write_atomically(folder / "run.json", (json.dumps(state, indent=1) + "\n").encode())


def read_state(folder: Path) -> dict:
    """`run.json` of a run.

    Raises:
        ReportError: the folder holds no readable run.
    """
    try:
        return json.loads((folder / "run.json").read_text())
    except (OSError, ValueError) as error:
        raise ReportError(f"{folder} holds no run that can be resumed ({error}).") from error


def _point_latest(folder: Path) -> None:
    """Make `papermill_runs/latest` point to `folder`; a file system without links goes without."""
    if folder.parent != RUNS:
        return
    temporary = RUNS / f".latest-{os.getpid()}"
    try:
        temporary.symlink_to(folder.name)
        os.replace(temporary, RUNS / "latest")
    except OSError:
        temporary.unlink(missing_ok=True)


def _quiet_environment() -> None:
    """Progress bars and browser renderers have no place in a saved notebook."""
    os.environ["PLOTLY_RENDERER"] = "plotly_mimetype"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    os.environ["TQDM_DISABLE"] = "1"
    os.environ["TRAPETUM_LIVE"] = "0"
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def execute(number: str, folder: Path, request: Request) -> str:
    """Run one chapter into `folder/notebooks/`.

    Returns:
        the exception it stopped at as one line, or an empty string.
    """
    import papermill
    from traitlets.config import Config

    source = chapters_available()[number]
    done = folder / "notebooks" / source.name
    part = done.with_name(f"{done.stem}.part.ipynb")
    own_records = folder / "records" / f"{number}.jsonl"
    own_records.unlink(missing_ok=True)  # of an earlier, interrupted try
    done.unlink(missing_ok=True)
    error = ""
    try:
        papermill.execute_notebook(
            str(source),
            str(part),
            parameters={
                "profile": request.profile,
                "device": request.device,
                "model": request.model,
                "records": str(own_records.parent),
            },
            kernel_name="python3",
            progress_bar=False,
            cwd=str(ROOT),
            # a kernel on TCP could be read by others on this machine, and warns of it in every chapter
            config=Config(KernelManager={"transport": "ipc"}),
        )
    except papermill.exceptions.PapermillExecutionError as failure:
        error = f"{failure.ename}: {failure.evalue}".strip().split("\n")[0]
    os.replace(part, done)
    return error


def _merge_records(folder: Path) -> Path:
    parts = sorted((folder / "records").glob("*.jsonl"))
    merged = folder / "records.jsonl"
    write_atomically(merged, b"".join(p.read_bytes() for p in parts))
    return merged


def save_records(folder: Path) -> list[Path]:
    """Append the run's records to `data/records/<device>.jsonl`, where the recorded machines are kept.

    Returns:
        the files: one a machine, since a GPU's chapter may measure its host's CPU too. What belongs to no machine
        (a kernel compiled for another card) goes with the run's own.
    """
    loaded = records.load(folder / "records.jsonl").records
    own = read_state(folder)["machine"]["name"]
    by_device: dict[Path, list[records.Record]] = {}
    for record in loaded:
        name = record.device["name"] if record.device.get("memory_bytes") else own
        by_device.setdefault(RECORDS / f"{_slug(name)}.jsonl", []).append(record)
    for target, found in by_device.items():
        known = {r.id for r in records.load(target).records} if target.exists() else set()
        records.append(target, [r for r in found if r.id not in known])
    return list(by_device)


def _summary_html(state: dict) -> str:
    described, software = state["machine"], state["software"]
    rows = {
        "Machine": f"{described['name']} ({described.get('arch', '')})",
        "Measured": f"{state['started']} UTC, profile {state['profile']}, {state['seconds']:.0f} s",
        "Model": state["model"],
        "Software": ", ".join(f"{k} {v}" for k, v in software.items() if v),
        "Commit": f"{(state['commit'] or 'unknown')[:12]}{' with uncommitted changes' if state['dirty'] else ''}",
    }
    cells = "".join(f"<tr><td>{k}</td><td>{html.escape(str(v))}</td></tr>" for k, v in rows.items())
    return f'<table class="summary">{cells}</table>'


def _card(folder: Path) -> dict | None:
    """'Your machine against recorded ones' as a plotly figure."""
    from trapetum import figures

    here = records.load(folder / "records.jsonl").records
    recorded = records.load(RECORDS).records if RECORDS.is_dir() else []
    figure = figures.your_machine(here, recorded)
    return figure.to_plotly_json() if figure else None


def _executed(folder: Path) -> list[Path]:
    found = sorted((folder / "notebooks").glob("*.ipynb"))
    return [p for p in found if not p.name.endswith(".part.ipynb")]


def bind(folder: Path) -> Path:
    """Write `report.html` from the executed notebooks of `folder`."""
    from trapetum.html import page, read_chapter

    state = read_state(folder)
    chapters = [read_chapter(p) for p in _executed(folder)]
    title = f"Trapetum on {state['machine']['name']}"
    target = folder / "report.html"
    write_atomically(target, page(title, _summary_html(state), chapters, _card(folder)).encode())
    return target


def _start(folder: Path, request: Request) -> dict:
    described = machine.describe(machine.choose_device(request.device))
    state = {
        "profile": request.profile,
        "device": request.device,
        "model": request.model,
        "chapters": list(request.chapters),
        "done": {},
        "started": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "seconds": 0.0,
        "machine": described,
        "software": machine.software(),
        **machine.git_state(),
    }
    (folder / "notebooks").mkdir(parents=True, exist_ok=True)
    (folder / "records").mkdir(exist_ok=True)
    _write_state(folder, state)
    return state


@contextmanager
def _short_runtime_dir() -> Iterator[None]:
    """Kernels' sockets in a temporary folder, since a socket's path may have 107 characters at most."""
    before = os.environ.get("JUPYTER_RUNTIME_DIR")
    with tempfile.TemporaryDirectory(prefix="trapetum-") as folder:
        os.environ["JUPYTER_RUNTIME_DIR"] = folder
        try:
            yield
        finally:
            os.environ.pop("JUPYTER_RUNTIME_DIR")
            if before is not None:
                os.environ["JUPYTER_RUNTIME_DIR"] = before


def run(request: Request, folder: Path, resume: bool = False, say: Say = print) -> list[str]:
    """Execute the chapters, then bind the page.

    Args:
        request: what to run; on `resume` what `run.json` says is run instead.
        folder: the run's folder.
        resume: keep the chapters that ended well.
        say: takes each progress line.

    Returns:
        the numbers of the chapters that failed.
    """
    _quiet_environment()
    state = read_state(folder) if resume else _start(folder, request)
    request = Request(state["profile"], state["device"], state["model"], tuple(state["chapters"]))
    for position, number in enumerate(request.chapters, 1):
        name = chapters_available()[number].stem
        if state["done"].get(number) == "":
            say(f"[{position}/{len(request.chapters)}] {name}: done before")
            continue
        say(f"[{position}/{len(request.chapters)}] {name} ...")
        began = time.perf_counter()
        with _short_runtime_dir():
            error = execute(number, folder, request)
        took = time.perf_counter() - began
        state["done"][number] = error
        state["seconds"] += took
        _write_state(folder, state)
        say(f"      {'stopped: ' + error if error else 'done'} ({took:.0f} s)")
    _merge_records(folder)
    bind(folder)
    _point_latest(folder)
    return [number for number in request.chapters if state["done"].get(number)]


def failures_as_text(failed: Sequence[str]) -> str:
    """The sentence that names the chapters that failed."""
    return f"chapter {', '.join(failed)} failed; the report shows where, and the other chapters are complete."
