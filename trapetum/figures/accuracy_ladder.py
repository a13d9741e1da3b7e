"""The accuracy ladder in one chart: how much of round-to-nearest's loss each method leaves, by bits and model."""

from collections.abc import Sequence
from dataclasses import dataclass

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from trapetum.figures.accuracy import bits_of, losses, protocol_of
from trapetum.figures.style import (
    ROOF_COLOUR,
    add_key,
    colour,
    describe,
    digits,
    new_figure,
    nothing,
    provenance,
    symbol,
)
from trapetum.records import Record, latest

#: From the bottom of the ladder to its top: without data, with data, and with more bytes or another kernel.
LADDER_ORDER = ("rtn", "rtn-128", "nf4", "lloyd", "kmeans", "rotation", "kmeans-weighted", "awq", "gptq-codebook", "lnq") + (
    "lnq-guided", "kmeans+sparse", "lnq-guided+sparse", "additive", "trellis"
)  # fmt: skip


#: Those that store codes and one codebook a channel and nothing else: the same bytes and the same kernel.
SAME_BYTES = ("rtn", "nf4", "lloyd", "kmeans", "kmeans-weighted", "awq", "gptq-codebook", "lnq", "lnq-guided")
_ROW_PX, _GAP_PX, _FRAME_PX = 24, 62, 230
_TICKS = (0.01, 0.1, 1, 3, 10, 30, 100, 300, 1000)


@dataclass(frozen=True)
class Share:
    """What a method leaves of round-to-nearest's loss at the same bits.

    Attributes:
        record: the method's record.
        left: the share, 1 for all of it.
        interval: of `left`: of a perplexity 95 % of paired bootstraps over windows; of a divergence the least and the largest
            seed; None where there is none.
    """

    record: Record
    left: float
    interval: tuple[float, float] | None


def shares(records: Sequence[Record]) -> list[Share]:
    """The shares of one protocol's `perplexity` or `kl_divergence` records, without round-to-nearest's own.

    Args:
        records: all of one quantity, model, text, window and stride.

    Returns:
        one for each record at whose bits round-to-nearest lost something.

    Raises:
        ValueError: more than one quantity or protocol, which do not compare.
    """
    if len({r.quantity for r in records}) > 1:
        raise ValueError(
            f"{', '.join(sorted({r.quantity for r in records}))} do not compare; give one quantity."
        )
    if records and records[0].quantity == "kl_divergence":
        return _divergence_shares(records)
    found = [x for x in losses(records) if x.left is not None and x.record.method != "rtn"]
    return [Share(x.record, x.left, x.left_interval) for x in found]


def _divergence_shares(records: Sequence[Record]) -> list[Share]:
    protocols = {protocol_of(r) for r in records}
    if len(protocols) > 1:
        raise ValueError(
            f"divergences of {len(protocols)} protocols do not compare: {'; '.join(sorted(protocols))}."
        )
    worst = {bits_of(r): r.value for r in records if r.method == "rtn" and r.value > 0}
    made = []
    for r in records:
        nearest = worst.get(bits_of(r))
        if nearest and r.method != "rtn":
            spread = (min(r.samples) / nearest, max(r.samples) / nearest) if r.n > 1 else None
            made.append(Share(r, r.value / nearest, spread))
    return made


def accuracy_ladder(
    records: Sequence[Record],
    published: Sequence[Record] = (),
    title: str = "What is left of the round-to-nearest loss",
) -> go.Figure:
    """The share of round-to-nearest's loss that each method leaves: a row of panels a protocol, a panel a number of bits.

    Args:
        records: measured `perplexity` or `kl_divergence` records (one of the two), of any number of protocols.
        published: published `perplexity` records, which have rows of their own where they hold a round-to-nearest.
        title: above the figure.
    """
    rows = [
        (_named(group), found) for group in _by_protocol([*records, *published]) if (found := shares(group))
    ]
    if not rows:
        return nothing(
            title, "No ladder with round-to-nearest and an unquantized model has been measured yet."
        )
    bits = sorted({x.record.config["bits"] for _, found in rows for x in found}, reverse=True)
    methods = [m for m in _ordered({x.record.method for _, found in rows for x in found})]
    heights = [max(3, len({x.record.method for x in found})) for _, found in rows]
    pixels = _ROW_PX * sum(heights) + _GAP_PX * (len(rows) - 1)
    figure = make_subplots(
        len(rows), len(bits), shared_xaxes=True, shared_yaxes=True, horizontal_spacing=0.03,
        vertical_spacing=_GAP_PX / pixels, row_heights=heights, column_titles=[f"{b:g} bits" for b in bits],
    )  # fmt: skip
    shown = [x.record for _, found in rows for x in found]
    what = "rise of the loss" if shown[0].quantity == "perplexity" else "divergence from the full model"
    figure.update_annotations(yshift=20)  # the bits, above the first row's name
    figure = new_figure(
        title, provenance(shown, f"{what}, share of round-to-nearest's, lower is better"),
        pixels + _FRAME_PX, figure,
    )  # fmt: skip
    for at, (name, found) in enumerate(rows, start=1):
        _draw_row(figure, at, name, found, bits, methods)
    figure.update_xaxes(
        type="log", tickvals=_TICKS, ticktext=[f"{t:g}" for t in _TICKS], tickangle=0, showticklabels=True
    )
    figure.update_xaxes(title="% left", row=len(rows))
    figure.update_layout(showlegend=True, margin={"l": 150, "t": 130, "b": 100})
    return add_key(figure, shown, 75)


def protocol_key(record: Record) -> tuple:
    """What two records must share for their losses to compare: protocol, the very tokens, and the device that scored them."""
    return record.kind, protocol_of(record), record.config.get("text_sha256"), record.device.get("name")


def _by_protocol(records: Sequence[Record]) -> list[list[Record]]:
    groups: dict[tuple, list[Record]] = {}
    for r in records:
        groups.setdefault(protocol_key(r), []).append(r)
    return list(groups.values())


def newest_ladders(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Of each model the ladder with the most methods, then the most rungs, then the newest.

    A rung that was repeated counts once, as it was last.

    Args:
        records: `perplexity` records, of any models, protocols and devices.

    Returns:
        by model, the records of one protocol on one device, with `fp` and `rtn` among them.
    """
    found: dict[str, list[Record]] = {}
    for group in _by_protocol([r for r in records if r.quantity == "perplexity" and not r.suspect]):
        group = latest(group)
        model, methods = group[0].config.get("model"), {r.method for r in group}
        if {"fp", "rtn"} <= methods and _worth(group) > _worth(found.get(model, [])):
            found[model] = group
    return found


def _worth(group: Sequence[Record]) -> tuple[int, int, str]:
    """More methods, then more rungs, then newer."""
    return len({r.method for r in group}), len(group), max((r.utc or "" for r in group), default="")


def of_ladder(ladder: Sequence[Record], records: Sequence[Record], quantity: str) -> list[Record]:
    """The newest records of another quantity of the same rungs: of the same model, device and calibration seeds.

    Args:
        ladder: `perplexity` records of one protocol.
        records: where to look.
        quantity: e.g. `kl_divergence`, `layer_error` or `bits_per_weight`.
    """
    rungs = {_rung(r) for r in ladder}
    scored = (
        {key: ladder[0].config.get(key) for key in ("window", "stride", "text", "text_sha256")}
        if ladder
        else {}
    )
    same = [r for r in records if r.quantity == quantity and _rung(r) in rungs and r.kind == ladder[0].kind]
    return latest(r for r in same if "window" not in r.config or scored.items() <= r.config.items())


def _rung(r: Record) -> tuple:
    return (
        r.method,
        r.config.get("model"),
        r.config.get("bits"),
        r.config.get("outliers"),
        r.device.get("name"),
    )


def _named(group: Sequence[Record]) -> str:
    config = group[0].config
    sizes = [f"{key} {config[key]}" for key in ("window", "stride", "tokens") if config.get(key)]
    return f"<b>{group[0].kind}: {config.get('model', '')}</b>, {', '.join(sizes)}"


def _ordered(methods: set[str]) -> list[str]:
    known = [m for m in LADDER_ORDER if m in methods]
    return [*known, *sorted(methods - set(known))]


def _draw_row(
    figure: go.Figure, at: int, name: str, found: Sequence[Share], bits: Sequence[int], methods: Sequence[str]
) -> None:
    here = [m for m in methods if any(x.record.method == m for x in found)]
    for column, b in enumerate(bits, start=1):
        points = [x for x in found if x.record.config["bits"] == b]
        for x in sorted(points, key=lambda x: methods.index(x.record.method)):
            figure.add_trace(_point(x), at, column)
        gone = [x.record.method for x in points if x.left <= 0]
        if gone:
            note = {"text": f"no loss: {', '.join(gone)}", "font": {"size": 11}, "showarrow": False}
            figure.add_annotation(
                x=0.02, y=0.02, xref="x domain", yref="y domain", xanchor="left", row=at, col=column, **note
            )
        figure.add_vline(x=100, line={"color": ROOF_COLOUR, "dash": "dash", "width": 2}, row=at, col=column)
    figure.update_yaxes(row=at, col=1, categoryorder="array", categoryarray=here[::-1])
    where = {
        "xref": "x domain",
        "yref": "y domain",
        "xanchor": "left",
        "yanchor": "bottom",
        "row": at,
        "col": 1,
    }
    figure.add_annotation(text=name, x=0, y=1, showarrow=False, font={"size": 12}, **where)


def _point(x: Share) -> go.Scatter:
    """A method's share in per cent with its interval; a share that is not above 0 has no place on a log axis."""
    method, value = x.record.method, 100 * x.left
    low, high = x.interval or (x.left, x.left)
    marker = {"symbol": symbol(x.record), "color": colour(method), "size": 11}
    bars = {
        "type": "data", "symmetric": False, "thickness": 1.4, "width": 4, "color": colour(method),
        "array": [max(0.0, 100 * high - value)], "arrayminus": [min(max(0.0, value - 100 * low), 0.9 * max(value, 0.0))],
    }  # fmt: skip
    text = f"<b>{digits(value)} % of rtn's left</b>" + (
        f", {digits(100 * low)} to {digits(100 * high)} %" if x.interval else ""
    )
    return go.Scatter(
        x=[value if value > 0 else None],
        y=[method],
        mode="markers",
        name=method,
        marker=marker,
        error_x=bars,
        text=[f"{text}<br>{describe(x.record)}"],
        hovertemplate="%{text}<extra></extra>",
        showlegend=False,
    )
