"""What one token reads, by part, and how fast it can be on a card: both follow from shapes and datasheets (derived)."""

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from trapetum import records
from trapetum.figures.style import (
    INK,
    add_key,
    colour,
    digits,
    label_of,
    new_figure,
    place_legend,
    points,
    provenance,
)
from trapetum.records import Record
from trapetum.shapes import FORMATS, ModelShape

_PART_COLOURS = {
    "attention weights": "#5b8fb9",
    "MLP weights": "#1f4e79",
    "output head": "#c2571a",
    "embedding row": "#8a5a2b",
    "KV cache": "#2a9d5c",
}


def token_bytes(
    shapes: Sequence[ModelShape],
    formats: Sequence[str] = ("fp16", "codebook-8", "codebook-4", "codebook-2"),
    context: int = 256,
    title: str = "What one token reads",
) -> go.Figure:
    """Stacked bars: the bytes that one token must read, by part, a panel a model and a bar a format.

    Args:
        shapes: the models.
        formats: of the linear layers, keys of `trapetum.shapes.FORMATS`; the head and the cache stay in fp16.
        context: tokens in the cache.
        title: above the figure.
    """
    names = [shape.name for shape in shapes]
    figure = make_subplots(1, len(shapes), subplot_titles=names, horizontal_spacing=0.14, shared_yaxes=True)
    subtitle = f"bytes of one token at context {context}, batch 1 · derived from the shapes"
    new_figure(title, subtitle, 190 + 50 * len(formats), figure)
    for column, shape in enumerate(shapes, start=1):
        _stack(figure, column, shape, formats, context)
    figure.update_yaxes(autorange="reversed")
    figure.update_layout(barmode="stack", margin_t=100, barcornerradius=0)
    return place_legend(figure)


def _stack(figure: go.Figure, column: int, shape: ModelShape, formats: Sequence[str], context: int) -> None:
    parts = [shape.parts_per_token(fmt, context) for fmt in formats]
    totals = [sum(part.values()) for part in parts]
    unit, scale = ("GB", 1e9) if max(totals) > 1e9 else ("MB", 1e6)
    for name, tint in _PART_COLOURS.items():
        share = [part[name] / total for part, total in zip(parts, totals, strict=True)]
        trace = go.Bar(
            y=list(formats), x=[part[name] / scale for part in parts], orientation="h", name=name, legendgroup=name,
            showlegend=column == 1, marker_color=tint, customdata=[100 * s for s in share],
            hovertemplate=f"{name}: %{{x:.4g}} {unit}, %{{customdata:.1f}} %<extra>%{{y}}</extra>",
        )  # fmt: skip
        figure.add_trace(trace, 1, column)
    ends = go.Scatter(
        x=[t / scale for t in totals], y=list(formats), mode="text", textposition="middle right", showlegend=False,
        text=[f" {digits(t / scale)} {unit}" for t in totals], textfont={"color": INK}, hoverinfo="skip", cliponaxis=False,
    )  # fmt: skip
    figure.add_trace(ends, 1, column)
    figure.update_xaxes(title=f"{unit} a token", range=[0, 1.28 * max(totals) / scale], row=1, col=column)


def speed_bound(read: Record, shape: ModelShape, fmt: str, context: int = 256) -> Record:
    """The tokens a second that a measured read bandwidth allows: bandwidth over the bytes of one token.

    An upper bound for batch 1 from memory: launches, attention arithmetic and norms come on top. A model whose weights
    fit a cache may pass it.

    Args:
        read: a `read_bandwidth` record in GB/s.
        shape, fmt, context: as for `ModelShape.bytes_per_token`.

    Returns:
        a derived `decode_speed` record in tok/s.
    """
    nbytes = shape.bytes_per_token(fmt, context)
    bits, n_codes = FORMATS[fmt]
    config = {
        "model": shape.name,
        "context": context,
        "bits": bits,
        "n_codes": n_codes or None,
        "bytes": nbytes,
    }
    method = "codebook" if n_codes else fmt
    formula = f"{digits(read.value)} GB/s / {nbytes} bytes"
    return records.derived(
        "decode_speed", 1e9 * read.value / nbytes, method, config, read.device, read.id, formula
    )


def cards(
    predicted: Sequence[Record], found: Sequence[Record] = (), title: str = "Cards that nobody here has"
) -> go.Figure:
    """Tokens a second by card: what the law derives, and beside it what was published or measured on such a card.

    Args:
        predicted: derived `decode_speed` records of one model.
        found: `decode_speed` records of the same model, measured or published.
        title: above the figure.
    """
    every = [*predicted, *found]
    names = list(dict.fromkeys(r.device["name"] for r in every))
    model = predicted[0].config["model"] if predicted else "no model"
    figure = new_figure(title, provenance(every, f"tok/s, {model}, batch 1"), 280 + 60 * len(names))
    for label, group in _by_label(every).items():
        rows = [names.index(r.device["name"]) for r in group]
        tint = colour(group[0].method, group[0].config.get("bits"))
        figure.add_trace(points(group, [r.value for r in group], rows, label, tint, size=12))
    figure.update_xaxes(title="tokens a second", rangemode="tozero")
    figure.update_yaxes(tickvals=list(range(len(names))), ticktext=names, range=[len(names) - 0.5, -0.5])
    figure.update_layout(margin_b=160)  # the legend of many methods
    return add_key(figure, every)


def _by_label(found: Sequence[Record]) -> Mapping[str, list[Record]]:
    groups: dict[str, list[Record]] = {}
    for record in found:
        groups.setdefault(label_of(record), []).append(record)
    return groups
