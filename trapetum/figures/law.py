"""Predictions against measurements, and the law `t0 + bytes / bandwidth` fitted to times."""

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from trapetum.figures.style import (
    FAINT,
    INK,
    KIND_SYMBOLS,
    LOG,
    ROOF_COLOUR,
    add_key,
    colour,
    digits,
    method_of,
    new_figure,
    nothing,
    place_legend,
    points,
    provenance,
    rgba,
    roof_name,
    spread,
)
from trapetum.law_methods import MethodLaw, label_of, shape_of
from trapetum.law_terms import Terms
from trapetum.records import Record

_TERM_COLOURS = {"launch": "#c9a227", "bytes": "#1f4e79", "instructions": "#b5367a", "latency": "#c8ced4"}
_DEVICE_COLOURS = (FAINT, "#c2571a", "#2a9d5c")


def predicted_vs_measured(rows: Sequence[Mapping], title: str = "Predicted against measured") -> go.Figure:
    """A scatter, log-log, of predictions against measurements with the diagonal and a band of 20 %.

    Args:
        rows: as `Workbook.compare` returns them: label, unit, predicted, measured (None is left out). More than eight are
            labelled on hover only.
        title: above the figure.
    """
    rows = [row for row in rows if row["measured"] is not None]
    if not rows:
        return nothing(title, "No prediction has been measured here.")
    units = sorted({row["unit"] for row in rows})
    figure = new_figure(title, f"{', '.join(units)} · measured against predicted (derived)", height=480)
    values = [row[key] for row in rows for key in ("predicted", "measured")]
    ends = np.array([min(values) / 1.6, max(values) * 1.6])
    band = {"line": {"width": 0}, "hoverinfo": "skip", "mode": "lines"}
    figure.add_trace(go.Scatter(x=ends, y=ends * 0.8, showlegend=False, **band))
    figure.add_trace(
        go.Scatter(x=ends, y=ends * 1.2, fill="tonexty", fillcolor="#eef1f4", name="±20 %", **band)
    )
    figure.add_trace(go.Scatter(x=ends, y=ends, **(roof_name("as predicted") | {"hoverinfo": "skip"})))
    mode = "markers+text" if len(rows) <= 8 else "markers"
    for unit in units:
        chosen = [row for row in rows if row["unit"] == unit]
        figure.add_trace(
            go.Scatter(
                x=[row["predicted"] for row in chosen], y=[row["measured"] for row in chosen], mode=mode,
                text=[row["label"] for row in chosen], textposition="top center", name=f"measured, {unit}",
                marker={"size": 11, "symbol": "circle", "color": "#1f6fb2" if unit == units[0] else "#c2571a"},
                hovertemplate="%{text}<br>predicted %{x:.4g}, measured %{y:.4g}<extra></extra>", textfont={"size": 11},
            )
        )  # fmt: skip
    figure.update_xaxes(title=f"predicted, {' or '.join(units)}", **LOG)
    figure.update_yaxes(title=f"measured, {' or '.join(units)}", **LOG)
    return place_legend(figure)


def law_fit(
    records: Sequence[Record],
    fit,
    held_out: Sequence[Record] = (),
    roof_gbps: float | None = None,
    title: str = "Time against bytes",
) -> go.Figure:
    """Times against bytes moved, the fitted line with its band, and the shapes left out of the fit.

    Args:
        records: `gemv_time` records that were fitted, with `config.bytes`.
        fit: a `trapetum.law.Fit` (t0_us, bandwidth_gbps, t0_interval, bandwidth_interval).
        held_out: records of the same method that were not fitted; ringed.
        roof_gbps: read bandwidth: the ideal line through the origin.
        title: above the figure.
    """
    everything = [*records, *held_out]
    if not records:
        return nothing(title, "No times with their bytes have been measured yet.")
    tint = colour(method_of(records[0]), records[0].config.get("bits"))
    figure = new_figure(title, provenance(everything, "us, median and p20 to p80"), height=480)
    x = np.linspace(0, 1.06 * max(r.config["bytes"] for r in everything), 80)
    if roof_gbps:
        figure.add_trace(
            go.Scatter(x=x / 1e6, y=x / roof_gbps / 1e3, **roof_name(f"ideal, {digits(roof_gbps)} GB/s"))
        )
    _draw_band(figure, x, fit, tint)
    law = f"fit: {digits(fit.t0_us)} us + bytes / {digits(fit.bandwidth_gbps)} GB/s"
    y = fit.t0_us + x / fit.bandwidth_gbps / 1e3
    line = {"mode": "lines", "line": {"color": tint, "width": 2}, "hoverinfo": "skip"}
    figure.add_trace(go.Scatter(x=x / 1e6, y=y, name=law, **line))
    for group, name, size in ((records, "fitted", 10), (held_out, "left out of the fit", 13)):
        if group:
            figure.add_trace(_times(group, name, tint, size))
    if held_out:
        figure.add_trace(_rings(held_out))
    figure.add_annotation(
        x=0, y=fit.t0_us, text=f"t0 = {digits(fit.t0_us)} us<br>({_interval(fit.t0_interval)})", ax=60, ay=-100,
        font={"size": 12},
    )  # fmt: skip
    figure.update_xaxes(title="bytes moved, MB", rangemode="tozero")
    figure.update_yaxes(title="time, us", rangemode="tozero")
    return add_key(figure, everything)


def _interval(pair: Sequence[float]) -> str:
    return f"{digits(pair[0])} to {digits(pair[1])}"


def _draw_band(figure: go.Figure, x: np.ndarray, fit, tint: str) -> None:
    low = fit.t0_interval[0] + x / fit.bandwidth_interval[1] / 1e3
    high = fit.t0_interval[1] + x / fit.bandwidth_interval[0] / 1e3
    edge = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip"}
    figure.add_trace(go.Scatter(x=x / 1e6, y=low, showlegend=False, **edge))
    name = f"both intervals (bandwidth {_interval(fit.bandwidth_interval)} GB/s)"
    figure.add_trace(
        go.Scatter(x=x / 1e6, y=high, fill="tonexty", fillcolor=rgba(tint, 0.15), name=name, **edge)
    )


def _times(records: Sequence[Record], name: str, tint: str, size: int) -> go.Scatter:
    x, y = [r.config["bytes"] / 1e6 for r in records], [r.value for r in records]
    return points(records, x, y, name, tint, size=size, error_y=spread(records))


def _rings(records: Sequence[Record]) -> go.Scatter:
    ring = {"symbol": "circle-open", "size": 22, "color": FAINT, "line": {"width": 2}}
    x, y = [r.config["bytes"] / 1e6 for r in records], [r.value for r in records]
    return go.Scatter(x=x, y=y, mode="markers", marker=ring, showlegend=False, hoverinfo="skip")


def method_and_shape(record: Record) -> str:
    """`codebook 4-bit, 8192 x 28672`: which product a record timed."""
    return f"{label_of(record)}, {_shape(record)}"


def laws_by_method(
    laws: Mapping[str, Mapping[str, MethodLaw]],
    roofs: Mapping[str, float | None],
    title: str = "The law by method: fixed time, and bandwidth",
) -> go.Figure:
    """Fixed time and bandwidth of every method with their intervals, devices side by side; both are derived from fits.

    Args:
        laws: by device, then by label, from `trapetum.law_methods.method_laws`.
        roofs: read bandwidth by device, in GB/s: the ideal line of the right panel.
        title: above the figure.
    """
    laws = {device: found for device, found in laws.items() if found}
    labels = sorted({label for found in laws.values() for label in found})
    if not labels:
        return nothing(title, "No method has been timed on enough shapes to fit a law.")
    figure = make_subplots(1, 2, shared_yaxes=True, horizontal_spacing=0.03)
    subtitle = f"{', '.join(laws)} · derived: fits of measured times, 95 % intervals"
    new_figure(title, subtitle, 230 + (18 + 12 * len(laws)) * len(labels), figure)
    for number, (device, found) in enumerate(laws.items()):
        rows = [labels.index(label) + _aside(number, len(laws)) for label in found]
        fits, tint = [m.fit for m in found.values()], _DEVICE_COLOURS[number % len(_DEVICE_COLOURS)]
        t0s = [(fit.t0_us, fit.t0_interval) for fit in fits]
        bandwidths = [(fit.bandwidth_gbps, fit.bandwidth_interval) for fit in fits]
        figure.add_trace(_with_intervals(t0s, rows, list(found), device, tint, "us"), 1, 1)
        figure.add_trace(_with_intervals(bandwidths, rows, list(found), device, tint, "GB/s"), 1, 2)
        if roofs.get(device):
            text = f"{device} reads {digits(roofs[device])}"
            figure.add_vline(x=roofs[device], line={"color": tint, "dash": "dash", "width": 2}, row=1, col=2)
            figure.add_trace(
                go.Scatter(
                    x=[None], y=[None], **(roof_name(text) | {"line": {"color": tint, "dash": "dash"}})
                )
            )
    figure.update_xaxes(title="fixed time t0, us", col=1, row=1)
    figure.update_xaxes(title="bandwidth of the fit, GB/s", rangemode="tozero", col=2, row=1)
    figure.update_yaxes(range=[len(labels) - 0.4, -0.6], tickvals=list(range(len(labels))), ticktext=labels)
    return place_legend(figure)


def _aside(number: int, of: int) -> float:
    return (number - (of - 1) / 2) * 0.36


def _with_intervals(found, rows, names, device: str, tint: str, unit: str) -> go.Scatter:
    """Derived values with their intervals as horizontal bars."""
    values = [value for value, _ in found]
    error = {
        "type": "data", "symmetric": False, "thickness": 1.6, "width": 4, "color": tint,
        "array": [high - value for value, (_, high) in found],
        "arrayminus": [value - low for value, (low, _) in found],
    }  # fmt: skip
    text = [
        f"{name} on {device}: {digits(value)} {unit} ({_interval(pair)})"
        for name, (value, pair) in zip(names, found, strict=True)
    ]
    marker = {"symbol": KIND_SYMBOLS["derived"], "size": 10, "color": tint}
    return go.Scatter(
        x=values, y=rows, mode="markers", marker=marker, error_x=error, name=f"{device}, derived", text=text,
        hovertemplate="%{text}<extra></extra>", legendgroup=device, showlegend=unit == "us",
    )  # fmt: skip


def left_out_errors(
    laws: Mapping[str, Mapping[str, MethodLaw]],
    title: str = "Each shape, predicted by a law that did not see it",
) -> go.Figure:
    """Prediction error in per cent of every shape left out of its method's fit, a row a method and a panel a device.

    The band is 20 %; the dashed line is a perfect prediction.

    Args:
        laws: by device, then by label, from `trapetum.law_methods.method_laws`.
        title: above the figure.
    """
    laws = {device: found for device, found in laws.items() if found}
    every = [r for found in laws.values() for method in found.values() for r in method.records]
    if not every:
        return nothing(title, "No method has been timed on enough shapes to leave one out.")
    labels = sorted({label for found in laws.values() for label in found})
    figure = make_subplots(
        1, len(laws), shared_yaxes=True, horizontal_spacing=0.04, subplot_titles=list(laws)
    )
    height = 270 + 24 * len(labels)
    new_figure(title, provenance(every, "predicted / measured - 1, %"), height, figure)
    for column, found in enumerate(laws.values(), start=1):
        for label, method in found.items():
            figure.add_trace(_errors(method, labels.index(label)), 1, column)
        figure.add_vrect(x0=-20, x1=20, fillcolor="#eef1f4", line_width=0, layer="below", row=1, col=column)
        figure.add_vline(
            x=0, line={"color": ROOF_COLOUR, "dash": "dash", "width": 2}, layer="below", row=1, col=column
        )
    figure.update_xaxes(title="error of the prediction, %")
    figure.update_yaxes(range=[len(labels) - 0.4, -0.6], tickvals=list(range(len(labels))), ticktext=labels)
    figure.update_layout(margin_t=100)
    return add_key(figure, every)


def _errors(method: MethodLaw, row: int) -> go.Scatter:
    first, x = method.records[0], [100 * e for e in method.errors]
    tint = colour(method_of(first), first.config.get("bits"))
    trace = points(method.records, x, [row] * len(x), method.label, tint, size=9, showlegend=False)
    pairs = zip(method.records, x, trace.text, strict=True)
    return trace.update(
        text=[f"<b>{_shape(r)}</b>: {e:+.0f} %<br>{text}" for r, e, text in pairs], opacity=0.8
    )


def _shape(record: Record) -> str:
    return "{} x {}".format(*shape_of(record))


def four_terms(
    terms: Mapping[str, Mapping[str, Sequence[tuple[Record, Terms]]]],
    shown: str = "codebook 4-bit",
    title: str = "Which term binds",
) -> go.Figure:
    """Stacked bars by shape: the shares of launch, bytes or instructions (the longer), and latency; a panel a device.

    A menu in the figure changes the method. A tick marks the shorter one of bytes and instructions, which hides behind
    the longer one.

    Args:
        terms: by device, then by label, from `trapetum.law_methods.terms_by_method`.
        shown: the method at first; the first one there is, if it has no times.
        title: above the figure.
    """
    terms = {device: found for device, found in terms.items() if found}
    labels = sorted({label for found in terms.values() for label in found})
    if not labels:
        return nothing(title, "No method has been timed on enough shapes to take its time apart.")
    shown = shown if shown in labels else labels[0]
    every = [r for found in terms.values() for rows in found.values() for r, _ in rows]
    tall = max(len({shape_of(r) for r, _ in rows}) for found in terms.values() for rows in found.values())
    figure = make_subplots(1, len(terms), horizontal_spacing=0.2, subplot_titles=list(terms))
    new_figure(title, provenance(every, "% of the measured time, terms derived"), 250 + 26 * tall, figure)
    owners = []
    for column, found in enumerate(terms.values(), start=1):
        for label, rows in found.items():
            for trace in _stacked(rows, label == shown):
                figure.add_trace(trace, 1, column)
                owners.append(label)
    _term_key(figure, owners)
    _method_menu(figure, labels, owners, shown)
    figure.update_layout(barmode="stack", barcornerradius=0, margin_t=130, legend_traceorder="normal")
    figure.update_xaxes(
        title="share of the measured time, %", range=[0, 128], tickvals=list(range(0, 101, 20))
    )
    figure.update_yaxes(autorange="reversed", type="category")
    return place_legend(figure)


def _one_a_shape(rows: Sequence[tuple[Record, Terms]]) -> list[tuple[Record, Terms]]:
    """A kernel that only reads has a record for each width of codes: the widest stands for its shape."""
    widest = {shape_of(r): (r, t) for r, t in sorted(rows, key=lambda pair: pair[0].config["bytes"])}
    return sorted(widest.values(), key=lambda pair: pair[0].config["bytes"])


def _stacked(rows: Sequence[tuple[Record, Terms]], visible: bool) -> list[go.Bar | go.Scatter]:
    """One method's bars on one device: a trace a term, the time at the end, and the hidden tick."""
    rows = _one_a_shape(rows)
    names, found = [_shape(r) for r, _ in rows], [t for _, t in rows]
    hover = [_says(r, t) for r, t in rows]
    bars = [
        go.Bar(
            y=names, x=[100 * max(_drawn_share(t, term), 0.0) for t in found], orientation="h", width=0.62,
            marker_color=tint, name=term, showlegend=False, visible=visible, text=hover, textposition="none",
            hovertemplate="%{text}<extra></extra>",
        )
        for term, tint in _TERM_COLOURS.items()
    ]  # fmt: skip
    ends = [max(100.0, 100 * (t.launch_us + t.longer_us) / t.time_us) for t in found]
    bars.append(
        go.Scatter(
            x=ends, y=names, mode="text", text=[f" {digits(t.time_us)} us" for t in found],
            textposition="middle right", textfont={"size": 11, "color": INK}, hoverinfo="skip", showlegend=False,
            visible=visible, cliponaxis=False,
        )
    )  # fmt: skip
    hidden = [(n, t) for n, t in zip(names, found, strict=True) if not np.isnan(t.instructions_us)]
    tick = {"symbol": "line-ns-open", "size": 14, "line": {"width": 2}}
    for term in ("instructions", "bytes"):
        kept = [(n, t) for n, t in hidden if t.instructions_bind == (term == "bytes")]
        shorter = [100 * (t.launch_us + getattr(t, f"{term}_us")) / t.time_us for _, t in kept]
        bars.append(
            go.Scatter(
                x=shorter, y=[n for n, _ in kept], mode="markers", name=f"{term}, hidden", showlegend=False,
                visible=visible, hoverinfo="skip", marker={**tick, "color": "#ff9ecb" if term == "instructions" else "#9ecbff"},
            )
        )  # fmt: skip
    return bars


def _drawn_share(t: Terms, term: str) -> float:
    """The share as drawn: of bytes and instructions the longer one only."""
    if term in ("bytes", "instructions") and t.instructions_bind == (term == "bytes"):
        return 0.0
    share = t.share(term)
    return 0.0 if np.isnan(share) else share


def _says(record: Record, t: Terms) -> str:
    lines = [
        f"<b>{_shape(record)}</b>: {digits(t.time_us)} us, {t.binds} bind"
        + ("s" if t.binds in ("launch", "latency") else "")
    ]
    known = {
        "launch": t.launch_us,
        "bytes": t.bytes_us,
        "instructions": t.instructions_us,
        "latency": t.latency_us,
    }
    lines += [
        f"{name} {digits(us) + ' us' if not np.isnan(us) else 'not known'}" for name, us in known.items()
    ]
    return "<br>".join([*lines, f"record {record.id}"])


def _term_key(figure: go.Figure, owners: list[str]) -> None:
    """Legend entries of the terms and of the two ticks, which stay while the method changes."""
    for term, tint in _TERM_COLOURS.items():
        mark = {"symbol": "square", "size": 12, "color": tint}
        figure.add_trace(
            go.Scatter(x=[None], y=[None], mode="markers", marker=mark, name=term, hoverinfo="skip")
        )
        owners.append("")
    for term, tint in (("instructions", "#ff9ecb"), ("bytes", "#9ecbff")):
        mark = {"symbol": "line-ns-open", "size": 14, "color": tint, "line": {"width": 2}}
        name = f"{term}, hidden behind the longer"
        figure.add_trace(
            go.Scatter(x=[None], y=[None], mode="markers", marker=mark, name=name, hoverinfo="skip")
        )
        owners.append("")


def _method_menu(figure: go.Figure, labels: Sequence[str], owners: Sequence[str], shown: str) -> None:
    buttons = [
        {
            "label": label,
            "method": "restyle",
            "args": [{"visible": [owner in ("", label) for owner in owners]}],
        }
        for label in labels
    ]
    place = {"x": 1, "xanchor": "right", "y": 1, "yanchor": "bottom", "pad": {"b": 34}}
    figure.update_layout(
        updatemenus=[{"buttons": buttons, "active": labels.index(shown), "showactive": True, **place}]
    )
