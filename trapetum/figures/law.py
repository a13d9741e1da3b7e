"""Predictions against measurements, and the law `t0 + bytes / bandwidth` fitted to times."""

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go

from trapetum.figures.style import (
    FAINT,
    LOG,
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
from trapetum.records import Record


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
        x=0, y=fit.t0_us, text=f"t0 = {digits(fit.t0_us)} us<br>({_interval(fit.t0_interval)})", ax=70, ay=-45,
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
