"""The object every notebook makes first: the records, the machine, and the words around a measurement.

A notebook asks, predicts, measures, compares and concludes; `Workbook` does the bookkeeping so that a cell
stays a few lines. It runs the same in front of a person (live) and under papermill (headless).
"""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from trapetum import hardware, machine
from trapetum import records as rec
from trapetum.paths import DATA
from trapetum.records import Record

PROFILES = ("smoke", "quick", "full")
WHERE = ("here", "recorded", "published", "any")


def is_live(records: str = "") -> bool:
    """Whether a person at a front end runs this kernel, so that sliders with a kernel behind them make sense.

    `TRAPETUM_LIVE=0` or `=1` decides; else a run that writes a records file is a report (headless), and
    JupyterLab, Voila and VS Code are recognised by what they put into the kernel's environment, which
    papermill does not.
    """
    forced = os.environ.get("TRAPETUM_LIVE")
    if forced is not None:
        return forced.strip().lower() not in ("", "0", "false", "no")
    if records:
        return False
    served_by_voila = os.environ.get("SERVER_SOFTWARE", "").startswith("voila")
    return served_by_voila or any(name in os.environ for name in ("JPY_SESSION_NAME", "VSCODE_PID"))


def significant(value: float, digits: int = 3) -> str:
    """`value` with `digits` significant digits, without an exponent between 1e-4 and 1e7: 4.30, 3190, 0.00120."""
    text = f"{value:#.{digits}g}".rstrip(".")
    return f"{float(text):.0f}" if "e+" in text and abs(value) < 1e7 else text


class Workbook:
    """One chapter's view of the records and of this machine.

    Args:
        chapter: the notebook's number, e.g. `"01"`.
        profile: `"smoke"`, `"quick"` or `"full"`: how much is measured.
        device: `"auto"`, `"cpu"` or `"cuda"`.
        model: the model the chapter works on: `"builtin"`, a hub id, a directory, or `"random:<shape>"`.
        records: a folder, where each chapter of a run has a file of its own and reads the others', or one JSON
            Lines file; `""` keeps this run's records in memory.
        data: folder with `records/` and `published/`.

    Attributes:
        device: `"cpu"` or `"cuda"`: where this chapter measures.
        live: whether widgets with a kernel behind them may be shown.
        here, recorded, published: lists of records: of this run, of `data/records/`, of `data/published/`.
        problems: lines that could not be read, with file and line number.

    Raises:
        ValueError: an unknown profile or device.
        RuntimeError: `device="cuda"` where there is no usable GPU.
    """

    def __init__(
        self,
        chapter: str,
        profile: str = "quick",
        device: str = "auto",
        model: str = "builtin",
        records: str = "",
        data: Path = DATA,
    ):
        if profile not in PROFILES:
            raise ValueError(f"profile is {profile!r}; choose one of {', '.join(PROFILES)}.")
        self.chapter, self.profile, self.model = chapter, profile, model
        self._run = Path(records) if records else None
        is_file = self._run is None or self._run.suffix == ".jsonl"
        self.path = self._run if is_file else self._run / f"{chapter}.jsonl"
        self.device = machine.choose_device(device)
        self.live = is_live(records)
        self._predictions: list[tuple[str, float, str]] = []
        self._read(Path(data))
        self._greet()

    def _read(self, data: Path) -> None:
        def known(path: Path | None) -> list[Record]:
            if path is None or not path.exists():
                return []
            loaded = rec.load(path)
            self.problems += loaded.problems
            return list(loaded.records)

        self.problems: list[rec.Problem] = []
        self.recorded, self.published = known(data / "records"), known(data / "published")
        self.here = known(self._run)

    def _greet(self) -> None:
        name = self.machine["name"]
        print(f"Chapter {self.chapter}, profile {self.profile}: measures on {name} ({self.device}).")
        if self.device == "cpu" and self.recorded_gpu:
            print(f"Where a GPU is needed: what was recorded on {self.recorded_gpu}, labelled so.")
        for problem in self.problems:
            print(f"Left out: {problem}")

    # The machine

    @cached_property
    def machine(self) -> dict:
        """This machine as the `device` of a record: name, arch, memory, clocks, ..."""
        return machine.describe(self.device)

    @property
    def gpu(self) -> hardware.Gpu | None:
        """The published facts of this machine's GPU, or None on a CPU or an unknown GPU."""
        return hardware.find(self.machine["name"]) if self.device == "cuda" else None

    @property
    def recorded_gpu(self) -> str | None:
        """Name of the GPU to fall back on: the H100 recorded last, else the GPU recorded last, else None."""
        on_gpu = [r for r in self.recorded if r.kind == "measured" and _on_gpu(r)]
        latest = max(on_gpu, key=lambda r: ("H100" in r.device["name"], r.utc or ""), default=None)
        return latest.device["name"] if latest else None

    def roof_gbps(self, device: str | None = None) -> float | None:
        """Highest read bandwidth measured on `device` (default: this machine), else the published peak, GB/s.

        Returns:
            GB/s, or None when neither is known: a CPU whose bandwidth no chapter has measured yet.
        """
        name = device or self.machine["name"]
        measured = rec.select(self.here + self.recorded, quantity="read_bandwidth", device=name)
        values = [r.value for r in measured if not r.suspect]
        gpu = hardware.find(name)
        return max(values) if values else gpu.bandwidth_gbps if gpu else None

    # Records

    @property
    def records(self) -> list[Record]:
        """Every record known: published, recorded, and this run's."""
        return [*self.published, *self.recorded, *self.here]

    def measure(self, measured: Sequence[Record]) -> list[Record]:
        """Keep `measured` in this run (and its file), print one line about them, and return them."""
        measured = list(measured)
        if self.path and measured:
            rec.append(self.path, measured)
        self.here += measured
        suspect = [r for r in measured if r.suspect]
        print(f"{len(measured)} records" + (f", {len(suspect)} suspect:" if suspect else ", none suspect."))
        for reason in sorted({r.why_suspect for r in suspect if r.why_suspect}):
            print(f"  {reason}")
        return measured

    def select(self, quantity: str, where: str = "any", **filters) -> list[Record]:
        """Records of `quantity` from `where` ("here", "recorded", "published", "any").

        Args:
            quantity: e.g. `"gemv_time"`.
            where: which records to look at.
            **filters: `method=`, `kind=`, `device=` (a name) and any key of `config`.

        Raises:
            ValueError: an unknown `where`.
        """
        if where not in WHERE:
            raise ValueError(f"where is {where!r}; choose one of {', '.join(WHERE)}.")
        pool = self.records if where == "any" else getattr(self, where)
        return rec.select(pool, quantity=quantity, **filters)

    def show_recorded(self, quantity: str, **filters) -> list[Record]:
        """Records of `quantity` made earlier on the recorded GPU; prints which device and when, or that none are."""
        device = filters.pop("device", None) or self.recorded_gpu
        found = self.select(quantity, "recorded", device=device, **filters) if device else []
        if found:
            dates = sorted({(r.utc or "an unknown day")[:10] for r in found})
            days = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
            print(f"Recorded on {device} on {days}, not measured here: {len(found)} {quantity} records.")
        else:
            print(f"No GPU run has recorded {quantity} in data/records/ yet.")
        return found

    def here_or_recorded(self, quantity: str, **filters) -> list[Record]:
        """This run's records on this machine if there are any, else the recorded GPU's, announced as such."""
        return self.select(quantity, "here", **filters) or self.show_recorded(quantity, **filters)

    def once(self, quantity: str, make: Callable[[], Sequence[Record]], **filters) -> list[Record]:
        """This run's records of `quantity` on this machine; only if no chapter has measured any, those `make` makes.

        Args:
            quantity: e.g. `"read_bandwidth"`.
            make: a call of `trapetum.bench`, e.g. `lambda: bench.bandwidth(book.device, book.profile)`.
            **filters: as for `select`.
        """
        filters = {"device": self.machine["name"], **filters}
        found = self.select(quantity, "here", **filters)
        if found:
            print(f"{len(found)} {quantity} records of this run, measured by an earlier chapter.")
            return found
        return rec.select(self.measure(make()), quantity=quantity, **filters)

    def on_gpu(self, quantity: str, **filters) -> list[Record]:
        """Records of one GPU, announced: of this run if it measures on one, else recorded, else published for an H100.

        A repeated measurement is there once, with its newest record.
        """
        on_this = {"device": self.machine["name"], **filters}
        here = self.select(quantity, "here", **on_this) if self.device == "cuda" else []
        found = here or self.show_recorded(quantity, **filters)
        if found:
            return rec.latest(found)
        notes = self.select(quantity, "published", device="H100 SXM", **filters)
        print(f"Published for an H100 SXM, not measured here: {len(notes)} {quantity} records.")
        return rec.latest(notes)

    # Words

    def table(self, headings: Sequence[str], rows: Sequence[Sequence]) -> None:
        """Display rows as a table; numbers get three significant digits and stand on the right."""
        numeric = [all(isinstance(row[i], (int, float)) for row in rows) for i in range(len(headings))]
        lines = [
            f"| {' | '.join(headings)} |",
            "|" + "|".join("--:" if right else ":--" for right in numeric) + "|",
        ]
        for row in rows:
            cells = [significant(cell) if isinstance(cell, float) else str(cell) for cell in row]
            lines.append(f"| {' | '.join(cells)} |")
        _markdown("\n".join(lines))

    def predict(self, label: str, value: float, unit: str) -> float:
        """Note a prediction to be compared later, print it, and return `value`."""
        self._predictions.append((label, float(value), unit))
        print(f"Predicted: {label}: {significant(value)} {unit}")
        return value

    def compare(self, measured: Mapping[str, float | Record | None], heading: str = "measured") -> list[dict]:
        """Display predicted, measured and their ratio for the predictions since the last comparison.

        Args:
            measured: by the prediction's label: a record, a number in the predicted unit, or None (not measured).

            heading: of the second column, where the numbers are not this run's measurements.

        Returns:
            a row a prediction: label, unit, predicted, measured or None, ratio (measured / predicted) or None.

        Raises:
            KeyError: a label that was not predicted, or nothing was predicted.
            ValueError: a record in another unit than was predicted.
        """
        known = [label for label, _, _ in self._predictions]
        unknown = [label for label in measured if label not in known]
        if unknown or not known:
            raise KeyError(
                f"no prediction is called {unknown}; predicted since the last comparison: {known}."
            )
        rows = [_compared(*prediction, measured.get(prediction[0])) for prediction in self._predictions]
        self._predictions = []
        _markdown(_comparison_table(rows, heading))
        return rows

    def takeaway(self, text: str) -> None:
        """Display the one sentence to keep of a section, set apart."""
        _markdown(f"> **Takeaway.** {text}")

    def answer(self, text: str) -> None:
        """Display the chapter's answer; its cell has the tag `answer`, so that the report can collect it."""
        _markdown(f"**Answer.** {text}")

    def check(self, condition: bool, message: str) -> None:
        """Self-check: print a tick or a cross before `message`.

        Raises:
            AssertionError: the condition does not hold, and nobody is there to read the cross (headless).
        """
        if not condition and not self.live:
            raise AssertionError(message)
        print(f"{'✓' if condition else '✗'} {message}")

    def cite(self, record: Record, digits: int = 3) -> str:
        """A record's value with its unit, e.g. `"4.31 us"`."""
        return f"{significant(record.value, digits)} {record.unit}".strip()

    def show(self, figure) -> None:
        """Display a plotly figure in the form that JupyterLab, Voila, VS Code and the report can draw."""
        figure.show(renderer="plotly_mimetype")


def _on_gpu(record: Record) -> bool:
    return str(record.device.get("arch", "")).startswith("sm_")


def _compared(label: str, predicted: float, unit: str, measured: float | Record | None) -> dict:
    if isinstance(measured, Record):
        if measured.unit != unit:
            raise ValueError(f"{label!r} was predicted in {unit} but measured in {measured.unit}.")
        measured = measured.value
    ratio = measured / predicted if measured is not None and predicted else None
    return {"label": label, "unit": unit, "predicted": predicted, "measured": measured, "ratio": ratio}


def _comparison_table(rows: Sequence[dict], heading: str) -> str:
    lines = [f"| | predicted | {heading} | {heading} / predicted |", "|:--|--:|--:|--:|"]
    for row in rows:
        predicted, measured, ratio = (row[key] for key in ("predicted", "measured", "ratio"))
        found = "not known" if measured is None else f"{significant(measured)} {row['unit']}"
        quotient = "" if ratio is None else f"{ratio:.2f}"
        lines.append(f"| {row['label']} | {significant(predicted)} {row['unit']} | {found} | {quotient} |")
    return "\n".join(lines)


def _markdown(text: str) -> None:
    from IPython.display import Markdown, display

    display(Markdown(text))
