"""The windows behind an energy figure: joules, clocks and temperature of each, so that a drift can be seen."""

from collections.abc import Iterable, Sequence

import plotly.graph_objects as go

from trapetum.figures.style import (
    add_key,
    colour,
    digits,
    label_of,
    method_of,
    new_figure,
    nothing,
    points,
    provenance,
)
from trapetum.figures.walk import ORDER
from trapetum.records import Record

WINDOW_HEADINGS = (
    "decode",
    "window",
    "J a token",
    "degrees C before",
    "degrees C after",
    "MHz before",
    "MHz after",
)


def window_rows(record: Record) -> list[list]:
    """One row a window under `WINDOW_HEADINGS`; "not logged" where a record does not say.

    Args:
        record: `energy_per_token` with one sample a window, and states before and after each in config.
    """
    before, after = (_states(record, key) for key in ("before", "after"))
    rows = []
    for number, joules in enumerate(record.samples):
        states = [s[number] if number < len(s) else {} for s in (before, after)]
        degrees = [_said(s.get("temperature")) for s in states]
        clocks = [_said(s.get("sm_mhz", s.get("cpu_mhz"))) for s in states]
        rows.append([name_of(record), str(number + 1), joules, *degrees, *clocks])
    return rows


def _states(record: Record, key: str) -> list[dict]:
    found = record.config.get(key)
    return found if isinstance(found, list) else []


def _said(value) -> str:
    return "not logged" if value is None else f"{value:g}"


def name_of(record: Record) -> str:
    """Method and stage of a record, e.g. `codebook 4-bit, graph`."""
    return ", ".join(str(word) for word in (label_of(record), record.config.get("stage")) if word)


def logged_range(records: Iterable[Record]) -> str:
    """The temperatures and clocks seen around all windows, e.g. `31 to 58 degrees C, 1755 to 1980 MHz`; "" if none were."""
    states = [s for r in records for key in ("before", "after") for s in _states(r, key)]
    said = []
    for unit, keys in (("degrees C", ("temperature",)), ("MHz", ("sm_mhz", "cpu_mhz"))):
        seen = [s[key] for s in states for key in keys if s.get(key) is not None]
        said += [f"{min(seen):g} to {max(seen):g} {unit}"] if seen else []
    return ", ".join(said)


def by_stage(records: Iterable[Record]) -> dict[str, Record]:
    """The newest record of each method and stage by its name, in the order of the stages."""
    newest: dict[str, Record] = {}
    for r in sorted(records, key=lambda r: r.utc or ""):
        newest[name_of(r)] = r
    stages = {stage: number for number, stage in enumerate(ORDER)}
    return dict(sorted(newest.items(), key=lambda item: stages.get(item[1].config.get("stage"), len(stages))))


def energy_windows(records: Sequence[Record], title: str = "Window by window") -> go.Figure:
    """Joules a token of each window over the median of its run: a trend upwards is a device that warms up.

    Args:
        records: measured `energy_per_token` records of one accounting, with one sample a window.
        title: above the figure.
    """
    found = [r for r in records if r.quantity == "energy_per_token" and r.samples]
    if not found:
        return nothing(title, "No energy was measured window by window, here or on the recorded GPU.")
    figure = new_figure(title, provenance(found, "J a token of a window over the run's median"), 400)
    for r in found:
        tint, x = colour(method_of(r), r.config.get("bits")), list(range(1, len(r.samples) + 1))
        ratios = [sample / r.value for sample in r.samples]
        text = [f"{name_of(r)}, window {n}: {digits(j)} J a token" for n, j in zip(x, r.samples, strict=True)]
        marks = points([r] * len(x), x, ratios, name_of(r), tint, text=text)
        figure.add_trace(marks.update(mode="lines+markers", line={"color": tint, "width": 1}))
    most = max(len(r.samples) for r in found)
    figure.update_xaxes(title="window", tickvals=list(range(1, most + 1)))
    figure.update_yaxes(title="J a token over the median", tickformat=".3f")
    return add_key(figure, found)
