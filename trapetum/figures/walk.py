"""The stages of a decode one after the other: bars that climb towards the byte bound, on one machine or on two."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from trapetum.figures.style import (
    INK,
    OWN_DENSE,
    ROOF_COLOUR,
    add_key,
    colour,
    digits,
    label_of,
    new_figure,
    nothing,
    points,
    provenance,
    rgba,
    spread,
)
from trapetum.records import Record

ORDER = ("naive", "cast_free", "lean", "graph", "fused", "pdl", "persistent")
_ASIDE = 0.2  # of a bar's middle from its stage's
_WIDTH = 0.36


@dataclass(frozen=True)
class Place:
    """What one machine made at each stage.

    Attributes:
        name: the machine, and when it was if not now.
        records: `decode_speed`, one a (method, stage), in the order of the stages.
        roof_gbps: read bandwidth, None if nobody knows it.
    """

    name: str
    records: tuple[Record, ...]
    roof_gbps: float | None = None

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages that were run, slowest first."""
        ran = {r.config["stage"] for r in self.records}
        return tuple(stage for stage in ORDER if stage in ran)

    def speed(self, stage: str, coded: bool) -> Record | None:
        """The record of a stage with 4-bit codes or with dense weights, of these the ones with fewest bits."""
        found = [r for r in self.records if r.config["stage"] == stage and (r.method == "codebook") == coded]
        return min(found, key=lambda r: (r.config["bits"], -r.value), default=None)

    def before(self, stage: str) -> str | None:
        """The stage that was run before `stage`, None for the first."""
        earlier = [s for s in self.stages if ORDER.index(s) < ORDER.index(stage)]
        return earlier[-1] if earlier else None

    def bound(self, record: Record) -> float | None:
        """Tokens a second if a token took only the reading of its bytes; None where either is not known."""
        nbytes = record.config.get("bytes")
        return self.roof_gbps * 1e9 / nbytes if self.roof_gbps and nbytes else None


def staged(records: Iterable[Record], model: str, coded_head: bool | None = None) -> tuple[Record, ...]:
    """The plain decodes of a model, the newest of each method and stage: one row, a 16-bit cache, no other program.

    Args:
        records: any.
        model: as in `config.model`.
        coded_head: whether the output head of a codebook model has codes; None takes either.
    """
    newest: dict[tuple, Record] = {}
    for r in records:
        if not (r.quantity == "decode_speed" and _plain(r, model, coded_head)):
            continue
        key = r.method, r.config["stage"]
        if key not in newest or (r.utc or "") >= (newest[key].utc or ""):
            newest[key] = r
    return tuple(sorted(newest.values(), key=lambda r: ORDER.index(r.config["stage"])))


def _plain(record: Record, model: str, coded_head: bool | None) -> bool:
    config, coded = record.config, record.method == "codebook"
    other = any(config.get(key) for key in ("interleaved", "runtime", "beside", "host"))
    return (
        config.get("model") == model
        and config.get("stage") in ORDER
        and config.get("kv") not in ("int8", "int4")
        and config.get("rows") in (None, 1)
        and (record.method in OWN_DENSE or (coded and config.get("bits") == 4))
        and (not coded or coded_head is None or (config.get("lm_head") == "codebook") == coded_head)
        and not other
    )


Guess = Mapping[tuple[str, bool], float]  # tok/s by (place, coded)


def stage_walk(
    places: Sequence[Place],
    stages: Sequence[str],
    guesses: Guess | None = None,
    title: str = "Decode, one stage after the other",
) -> go.Figure:
    """Tokens a second up to some stages, dense beside 4-bit codes; the axes reach to the byte bound from the start.

    Args:
        places: machines, one panel each.
        stages: those to show last, one a machine; those before them are paler.
        guesses: predicted tok/s, drawn as triangles.
        title: above the figure.
    """
    found = [(place, last) for place in places if (last := _last(place, stages))]
    if not found:
        return nothing(title, f"No machine on record has run {' or '.join(stages)} yet.")
    names = [f"<b>{place.name}</b>" for place, _ in found]
    figure = make_subplots(1, len(found), subplot_titles=names, horizontal_spacing=0.09)
    figure.update_annotations(font_size=13)
    shown = [r for place, last in found for r in _until(place, last)]
    models = ", ".join(dict.fromkeys(str(r.config["model"]) for r in shown))
    subtitle = f"{provenance(shown, 'tok/s at batch 1')}<br>{models}, mean contexts {_contexts(shown)} · %: of the byte bound"
    figure = new_figure(title, subtitle, 500, figure)
    for column, (place, last) in enumerate(found, start=1):
        _panel(figure, column, place, last, guesses or {})
    figure.update_yaxes(title="tok/s")
    add_key(figure, shown)
    return figure.update_layout(margin_t=130)


def _last(place: Place, stages: Sequence[str]) -> str | None:
    ran = [stage for stage in place.stages if stage in stages]
    return ran[-1] if ran else None


def _until(place: Place, last: str) -> list[Record]:
    """Dense and coded of each stage up to `last`."""
    stages = place.stages[: place.stages.index(last) + 1]
    pairs = [place.speed(stage, coded) for coded in (False, True) for stage in stages]
    return [r for r in pairs if r]


def _contexts(records: Sequence[Record]) -> str:
    known = sorted({round(r.config["context"]) for r in records if r.config.get("context") is not None})
    return " to ".join(str(c) for c in dict.fromkeys((known[0], known[-1]))) if known else "not said"


def _panel(figure: go.Figure, column: int, place: Place, last: str, guesses: Guess) -> None:
    known = [name for name in (r.name for r in figure.data if r.name)]
    for coded in (False, True):
        rows = [r for r in _until(place, last) if (r.method == "codebook") == coded]
        if rows:
            _bars(figure, column, place, rows, last, label_of(rows[0]) not in known)
            _bound(figure, column, place, rows)
        if (place.name, coded) in guesses:
            _guess(figure, column, place, last, coded, guesses[place.name, coded])
    highest = [b for r in place.records if (b := place.bound(r))] + [r.value for r in place.records]
    figure.update_yaxes(range=[0, 1.16 * max(highest)], row=1, col=column)
    ticks = list(range(len(place.stages)))
    figure.update_xaxes(
        tickvals=ticks, ticktext=place.stages, range=[-0.6, ticks[-1] + 0.6], row=1, col=column
    )


def _middle(place: Place, stage: str, coded: bool) -> float:
    return place.stages.index(stage) + (_ASIDE if coded else -_ASIDE)


def _bars(figure, column, place: Place, rows: Sequence[Record], last: str, named: bool) -> None:
    coded, tint = rows[0].method == "codebook", colour(rows[0].method, rows[0].config.get("bits"))
    x, name = [_middle(place, r.config["stage"], coded) for r in rows], label_of(rows[0])
    strong = [rgba(tint, 0.75 if r.config["stage"] == last else 0.25) for r in rows]
    bars = go.Bar(
        x=x, y=[r.value for r in rows], width=_WIDTH, name=name, legendgroup=name, showlegend=named,
        hoverinfo="skip", marker={"color": strong, "line": {"color": tint, "width": 1.2}},
    )  # fmt: skip
    marks = points(rows, x, [r.value for r in rows], name, tint, size=7, showlegend=False, legendgroup=name)
    figure.add_traces([bars, marks.update(error_y=spread(rows))], rows=1, cols=column)
    for place_x, r in zip(x, rows, strict=True):
        _write(figure, column, place, place_x, r, r.config["stage"] == last)


def _write(figure, column, place: Place, x: float, record: Record, now: bool) -> None:
    bound = place.bound(record)
    share = f"<br>{record.value / bound:.0%}" if now and bound else ""
    size = 12 if now else 10
    figure.add_annotation(
        x=x, y=record.p80 or record.value, text=f"<b>{digits(record.value)}</b>{share}", showarrow=False,
        yshift=9, yanchor="bottom", font={"size": size, "color": INK}, bgcolor="rgba(255,255,255,0.8)",
        row=1, col=column,
    )  # fmt: skip


def _bound(figure, column, place: Place, rows: Sequence[Record]) -> None:
    bounds = [place.bound(r) for r in rows]
    if None in bounds:
        return
    name = "byte bound: read bandwidth over the bytes of a token"
    known = any(trace.name == name for trace in figure.data)
    xs, ys = [], []
    coded = rows[0].method == "codebook"
    for r, bound in zip(rows, bounds, strict=True):
        middle = _middle(place, r.config["stage"], coded)
        xs += [middle - _WIDTH / 2, middle + _WIDTH / 2, None]
        ys += [bound, bound, None]
    line = {"color": ROOF_COLOUR, "dash": "dash", "width": 2}
    figure.add_trace(
        go.Scatter(
            x=xs, y=ys, mode="lines", name=name, legendgroup="bound", showlegend=not known, line=line,
            hovertemplate="byte bound %{y:.4g} tok/s<extra></extra>",
        ), 1, column,
    )  # fmt: skip


def _guess(figure, column, place: Place, stage: str, coded: bool, tok_s: float) -> None:
    known = any(trace.name == "predicted" for trace in figure.data)
    marker = {"symbol": "x-thin", "size": 10, "line": {"color": INK, "width": 2.5}}
    figure.add_trace(
        go.Scatter(
            x=[_middle(place, stage, coded) - _WIDTH / 2], y=[tok_s], mode="markers", name="predicted", marker=marker,
            legendgroup="predicted", showlegend=not known, hovertemplate="predicted %{y:.4g} tok/s<extra></extra>",
        ), 1, column,
    )  # fmt: skip
