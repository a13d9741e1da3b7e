"""What fewer bits cost: perplexity and weight error by bits and method."""

import textwrap
from collections.abc import Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from trapetum.figures.style import (
    LOG,
    ROOF_COLOUR,
    add_key,
    colour,
    digits,
    new_figure,
    nothing,
    points,
    provenance,
    spread,
)
from trapetum.records import Record


def bits_of(record: Record) -> float | None:
    """Bits a weight: with the overhead if the record says so, else the bits of a code."""
    return record.config.get("bits_per_weight") or record.config.get("bits")


def protocol_of(record: Record) -> str:
    """What makes two perplexities comparable: model, text, window, stride and number of tokens."""
    config = record.config
    parts = [str(config[key]) for key in ("model", "dataset", "text") if config.get(key)]
    if config.get("protocol"):
        parts.append(f"{config['protocol']}")
    counted = [f"{key} {config[key]}" for key in ("window", "stride", "tokens") if config.get(key)]
    return ", ".join([*parts, *([] if config.get("protocol") else counted)])


def perplexity_by_bits(
    records: Sequence[Record],
    published: Sequence[Record] = (),
    title: str = "Perplexity against bits a weight",
) -> go.Figure:
    """Perplexity against bits by method with intervals; published figures in panels of their own, one a protocol.

    Args:
        records: measured `perplexity` records of one protocol; method `fp` is the model as it is: the ideal line.
        published: published ones; each protocol with at least two methods has its own panel; two are shown,
            those that state their window first.
        title: above the figure.
    """
    panels = ([("measured: " + protocol_of(records[0]), list(records))] if records else []) + _panels(
        published
    )
    if not panels:
        return nothing(title, "No perplexity has been measured yet.")
    figure = make_subplots(
        1, len(panels), subplot_titles=[_broken(name) for name, _ in panels], horizontal_spacing=0.08
    )
    figure = new_figure(title, provenance([*records, *published], "perplexity, lower is better"), 500, figure)
    seen: set[str] = set()
    for column, (_, group) in enumerate(panels, start=1):
        _draw_panel(figure, column, group, seen)
    figure.update_xaxes(title="bits a weight", dtick=1)
    figure.update_yaxes(title="perplexity", col=1)
    figure.update_annotations(font_size=12)
    figure.update_layout(margin_t=130)
    return add_key(figure, [r for _, group in panels for r in group])


def _panels(published: Sequence[Record]) -> list[tuple[str, list[Record]]]:
    groups: dict[str, list[Record]] = {}
    for r in published:
        groups.setdefault(protocol_of(r), []).append(r)
    chosen = [(f"published: {name}", g) for name, g in groups.items() if len({r.method for r in g}) > 1]
    return sorted(chosen, key=lambda pair: (pair[1][0].config.get("window") is None, -len(pair[1])))[:2]


def _broken(text: str, width: int = 34) -> str:
    return "<br>".join(textwrap.wrap(text, width))


def _draw_panel(figure: go.Figure, column: int, group: Sequence[Record], seen: set[str]) -> None:
    for base in [r for r in group if r.method == "fp"][:1]:
        line = {"color": ROOF_COLOUR, "dash": "dash", "width": 2}
        note = {"text": f"unquantized {digits(base.value)}", "font": {"color": ROOF_COLOUR, "size": 11}}
        place = {"row": 1, "col": column, "exclude_empty_subplots": False}
        figure.add_hline(
            y=base.value, line=line, annotation=note, annotation_position="bottom right", **place
        )
    for method in dict.fromkeys(r.method for r in group if r.method != "fp"):
        rows = sorted((r for r in group if r.method == method and bits_of(r)), key=bits_of)
        if rows:
            more = {"legendgroup": method, "showlegend": method not in seen, "line": {"width": 1.3}}
            trace = points(
                rows, [bits_of(r) for r in rows], [r.value for r in rows], method, colour(method), **more
            )
            figure.add_trace(trace.update(mode="lines+markers", error_y=_interval(rows)), 1, column)
            seen.add(method)
    values = [r.value for r in group]
    if max(values) > 4 * min(values):
        figure.update_yaxes(row=1, col=column, **LOG)


def _interval(records: Sequence[Record]) -> dict | None:
    """Error bars from `config.interval`, the bootstrap's, where there is one."""
    if not all(_pair(r) for r in records):
        return None
    high = [max(0.0, r.config["interval"][1] - r.value) for r in records]
    low = [max(0.0, r.value - r.config["interval"][0]) for r in records]
    return {
        "type": "data",
        "symmetric": False,
        "array": high,
        "arrayminus": low,
        "thickness": 1.2,
        "width": 4,
    }


def _pair(record: Record) -> bool:
    return isinstance(record.config.get("interval"), (list, tuple)) and len(record.config["interval"]) == 2


def weight_error(records: Sequence[Record], title: str = "Weight error against bits a weight") -> go.Figure:
    """Relative squared weight error, log scale, against bits by method.

    Args:
        records: `weight_error` records, ||W - Q||^2 / ||W||^2.
        title: above the figure.
    """
    found = [r for r in records if r.quantity == "weight_error" and r.value > 0 and bits_of(r)]
    if not found:
        return nothing(title, "No weight error has been measured yet.")
    figure = new_figure(title, provenance(found, "||W - Q||² / ||W||², lower is better"))
    for method in dict.fromkeys(r.method for r in found):
        rows = sorted((r for r in found if r.method == method), key=bits_of)
        more = {"error_y": spread(rows), "line": {"width": 1.3}}
        trace = points(
            rows, [bits_of(r) for r in rows], [r.value for r in rows], method, colour(method), **more
        )
        figure.add_trace(trace.update(mode="lines+markers"))
    figure.update_xaxes(title="bits a weight", dtick=1)
    figure.update_yaxes(title="relative squared error", type="log", dtick=1, exponentformat="power")
    return add_key(figure, found)
