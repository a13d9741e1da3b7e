"""Decode speed against the bytes of a token, under the line that a card's bandwidth draws."""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from trapetum.figures.style import (
    add_key,
    colour,
    label_of,
    method_of,
    new_figure,
    nothing,
    points,
    provenance,
    roof_name,
)
from trapetum.records import Record


def speed_by_bytes(
    records: Sequence[Record], roof_gbps: float, title: str = "Tokens a second by bytes a token"
) -> go.Figure:
    """One marker a decode: bytes of one token across, tokens a second up, and the roof `bandwidth / bytes`.

    Args:
        records: `decode_speed` records of one card; those without `config.bytes` are left out.
        roof_gbps: the card's read bandwidth in GB/s.
        title: above the figure.
    """
    drawn = [r for r in records if r.config.get("bytes")]
    if not drawn:
        return nothing(title, "No decode with its bytes is on record.")
    figure = new_figure(title, provenance(drawn, "tok/s"), 470)
    by_name: dict[str, list[Record]] = {}
    for record in drawn:
        by_name.setdefault(label_of(record), []).append(record)
    for name, group in by_name.items():
        x, y = [r.config["bytes"] / 1e9 for r in group], [r.value for r in group]
        figure.add_trace(points(group, x, y, name, colour(method_of(group[0]), group[0].config.get("bits"))))
    sizes = [r.config["bytes"] / 1e9 for r in drawn]
    line = np.geomspace(0.8 * min(sizes), 1.2 * max(sizes), 60)
    figure.add_trace(go.Scatter(x=line, y=roof_gbps / line, **roof_name(f"roof: {roof_gbps:,.0f} GB/s")))
    add_key(figure, drawn)
    figure.update_xaxes(title="GB read for one token", type="log")
    figure.update_yaxes(title="tokens a second, batch 1", type="log")
    return figure
