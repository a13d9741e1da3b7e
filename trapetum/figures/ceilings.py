"""What a machine can do at best: its bandwidth, the roofline over it, and how it stands beside recorded machines."""

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go

from trapetum.figures.style import (
    FAINT,
    INK,
    OWN_DENSE,
    PALETTE,
    ROOF_COLOUR,
    add_key,
    colour,
    device_name,
    digits,
    label_of,
    method_of,
    new_figure,
    nothing,
    points,
    provenance,
    rgba,
    spread,
)
from trapetum.records import Record


def _size(nbytes: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= size:
            return f"{digits(nbytes / size)} {unit}"
    return f"{nbytes:.0f} B"


def ceilings(records: Sequence[Record], machine: Mapping, peak_gbps: float | None = None) -> go.Figure:
    """The machine's card: what it is, and how fast it reads, cold and warm, against the datasheet.

    Args:
        records: `read_bandwidth` records of this machine (GB/s); others are ignored.
        machine: the `device` of a record (`book.machine`).
        peak_gbps: the datasheet's bandwidth, if known: the roof.
    """
    found = [r for r in records if r.quantity == "read_bandwidth"]
    title = f"Ceilings of {machine.get('name', 'this machine')}"
    if not found:
        return nothing(title, "No read bandwidth has been measured yet: run the measuring cell above.")
    names = [f"{_read_name(r)}<br><b>{digits(r.value)} GB/s</b>" for r in found]
    figure = new_figure(title, _facts(machine), height=210 + 58 * len(found))
    figure.add_trace(
        go.Bar(
            y=names, x=[r.value for r in found], orientation="h", width=0.5, showlegend=False,
            marker_color=rgba(PALETTE["read"], 0.15), hoverinfo="skip",
        )
    )  # fmt: skip
    marks = points(found, [r.value for r in found], names, "read", PALETTE["read"], showlegend=False)
    marks.error_x = spread(found)
    figure.add_trace(marks)
    top = max([r.value for r in found] + ([peak_gbps] if peak_gbps else []))
    if peak_gbps:
        _vertical_roof(figure, peak_gbps, f"datasheet {digits(peak_gbps)} GB/s (published)")
    figure.update_xaxes(title="read bandwidth, GB/s", range=[0, 1.22 * top])
    figure.update_yaxes(autorange="reversed")
    figure.update_layout(margin_t=100)
    return add_key(figure, found)


def _read_name(record: Record) -> str:
    config = record.config
    threads = f", {config['threads']} threads" if config.get("threads") else ""
    moved = f" of {_size(config['bytes'])}" if config.get("bytes") else ""
    return f"{config.get('l2', '')} read{moved}{threads}".strip()


def _facts(machine: Mapping) -> str:
    facts = [str(machine["arch"])] if machine.get("arch") else []
    gpu = str(machine.get("arch", "")).startswith("sm_")
    if machine.get("sms"):
        facts.append(f"{machine['sms']} {'SMs' if gpu else 'threads'}")
    if machine.get("l2_bytes"):
        facts.append(f"{machine['l2_bytes'] / 2**20:.0f} MiB {'L2' if gpu else 'last-level cache'}")
    if machine.get("memory_bytes"):
        facts.append(f"{machine['memory_bytes'] / 2**30:.0f} GiB memory")
    if machine.get("power_limit_w"):
        facts.append(f"{machine['power_limit_w']:.0f} W limit")
    return " · ".join(facts)


def _vertical_roof(figure: go.Figure, x: float, text: str) -> None:
    figure.add_vline(
        x=x, line={"color": ROOF_COLOUR, "dash": "dash", "width": 2},
        annotation={"text": text, "font": {"color": ROOF_COLOUR, "size": 12}, "yanchor": "bottom"},
        annotation_position="top",
    )  # fmt: skip


def roofline(
    records: Sequence[Record],
    bandwidth_gbps: float,
    peaks: Mapping[str, float],
    device: str = "",
    batches: Sequence[int] = (1, 8, 64, 512),
) -> go.Figure:
    """Arithmetic intensity against throughput, log-log: where batch 1 sits, and how far the ridge is.

    Args:
        records: `gemv_time` records with `in_features`, `out_features`, `bytes` (and `batch` if above 1).
        bandwidth_gbps: the slope, GB/s (measured read bandwidth, or the datasheet's).
        peaks: flat roofs by format in TFLOP/s, e.g. `{"fp16": 989}`; empty where no compute roof is known.
        device: its name, for the title.
        batches: batch sizes whose fp16 weight-only intensity (= batch, FLOP a byte) is marked on the slope.
    """
    found = [r for r in records if r.quantity == "gemv_time" and r.config.get("bytes")]
    subtitle = provenance(found, "TFLOP/s") or f"{device}: no product measured yet, the roof alone"
    figure = new_figure(f"Roofline{' of ' + device if device else ''}", subtitle, height=500)
    ridges = {name: peak * 1e3 / bandwidth_gbps for name, peak in peaks.items()}
    last = 8 * max([*ridges.values(), *map(float, batches), 64.0])
    for number, (name, peak) in enumerate(peaks.items()):
        _draw_roof(figure, bandwidth_gbps, peak, f"roof {name}: {digits(peak)} TFLOP/s", last)
        _note(figure, ridges[name], peak, f"ridge {name}: {digits(ridges[name])} FLOP/B", -24 - 22 * number)
    if not peaks:
        _draw_roof(figure, bandwidth_gbps, None, f"bandwidth {digits(bandwidth_gbps)} GB/s", last)
    _draw_batches(figure, bandwidth_gbps, max(peaks.values(), default=None), batches)
    for method, group in _grouped(found).items():
        flops = [
            2.0 * r.config["in_features"] * r.config["out_features"] * r.config.get("batch", 1) for r in group
        ]
        x = [f / r.config["bytes"] for f, r in zip(flops, group, strict=True)]
        y = [f / r.value / 1e6 for f, r in zip(flops, group, strict=True)]
        figure.add_trace(
            points(group, x, y, method, colour(method_of(group[0]), group[0].config.get("bits")))
        )
    figure.update_xaxes(title="arithmetic intensity, FLOP per byte moved", type="log", dtick=1)
    figure.update_yaxes(title="TFLOP/s", type="log", dtick=1)
    return add_key(figure, found)


def _grouped(records: Sequence[Record]) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(label_of(record), []).append(record)
    return groups


def _draw_roof(figure: go.Figure, bandwidth_gbps: float, peak: float | None, name: str, last: float) -> None:
    x = np.geomspace(0.1, last, 120)
    y = np.minimum(x * bandwidth_gbps / 1e3, np.inf if peak is None else peak)
    line = {"color": ROOF_COLOUR, "dash": "dash", "width": 2}
    figure.add_trace(go.Scatter(x=x, y=y, mode="lines", name=name, line=line, hoverinfo="skip"))


def _draw_batches(
    figure: go.Figure, bandwidth_gbps: float, peak: float | None, batches: Sequence[int]
) -> None:
    roof = [min(b * bandwidth_gbps / 1e3, np.inf if peak is None else peak) for b in batches]
    text = [f"batch {b}" for b in batches]
    figure.add_trace(
        go.Scatter(
            x=list(batches), y=roof, mode="markers+text", text=text, textposition="bottom right",
            name="fp16 weights, derived", marker={"symbol": "triangle-up", "size": 10, "color": FAINT},
            textfont={"color": FAINT, "size": 11}, hovertemplate="%{text}: at most %{y:.4g} TFLOP/s<extra></extra>",
        )
    )  # fmt: skip


def _note(figure: go.Figure, x: float, y: float, text: str, up: int) -> None:
    figure.add_annotation(
        x=np.log10(x),
        y=np.log10(y),
        text=text,
        showarrow=True,
        ax=-110,
        ay=up,
        font={"size": 11, "color": INK},
    )


# Rows of the card: heading, unit, quantity, filters, whether more is better.
_SQUARE = {"in_features": 4096, "out_features": 4096}
_GROSS = {"accounting": "gross"}
_NO_CONTEST = ("read", "no-linears", "dequantize-linear")
# what a row says, its quantity, config it must have, and whether it is of our codes (True), dense (False) or either
_CARD = (
    ("read bandwidth, cold", "read_bandwidth", {}, None),
    ("GEMV 4096 x 4096, dense", "gemv_time", _SQUARE, False),
    ("GEMV 4096 x 4096, 4-bit codebook", "gemv_time", {**_SQUARE, "bits": 4}, True),
    ("decode, dense", "decode_speed", {}, False),
    ("decode, 4-bit codebook", "decode_speed", {"bits": 4}, True),
    ("energy a token, gross, dense", "energy_per_token", _GROSS, False),
    ("energy a token, gross, 4-bit codebook", "energy_per_token", {**_GROSS, "bits": 4}, True),
)


def your_machine(here: Sequence[Record], recorded: Sequence[Record], name: str = "this machine") -> go.Figure:
    """A table: this machine's best figure of each kind beside those of every recorded machine.

    Args:
        here: this run's records.
        recorded: records of other machines, or of earlier runs.
        name: this machine's name.
    """
    groups = {f"<b>{name}</b><br>this run": list(here)}
    for record in recorded:
        groups.setdefault(f"{device_name(record)}<br>recorded", []).append(record)
    columns = {
        heading: [_best(_alike(group), *row[1:]) for row in _CARD] for heading, group in groups.items()
    }
    columns = {heading: cells for heading, cells in columns.items() if set(cells) != {"-"}}
    if not columns:
        return nothing("Your machine beside recorded ones", "Nothing has been measured or recorded yet.")
    rows = zip(_CARD, zip(*columns.values(), strict=True), strict=True)
    kept = [(row[0], cells) for row, cells in rows if set(cells) != {"-"}]
    cells = [
        [heading for heading, _ in kept],
        *(list(column) for column in zip(*(c for _, c in kept), strict=True)),
    ]
    figure = new_figure(
        "Your machine beside recorded ones", "best unsuspect measured value; - means not measured"
    )
    figure.add_trace(
        _table(
            ["", *columns],
            cells,
            ["#ffffff", *("#e8f1fa" if "this run" in c else "#ffffff" for c in columns)],
        )
    )
    figure.update_layout(height=150 + 46 * len(kept), margin={"l": 10, "r": 10, "t": 70, "b": 10})
    return figure


def _alike(records: Sequence[Record]) -> list[Record]:
    """Without the decodes of other models than one that was decoded dense and in codes, the slowest such: like beside like."""
    decodes = [r for r in records if r.quantity == "decode_speed" and r.kind == "measured" and not r.suspect]
    coded = {r.config.get("model") for r in decodes if r.method == "codebook"}
    both = [r for r in decodes if r.method in OWN_DENSE and r.config.get("model") in coded]
    if not both:
        return list(records)
    model = min(both, key=lambda r: r.value).config.get("model")
    return [r for r in records if r.quantity != "decode_speed" or r.config.get("model") == model]


def _best(records: Sequence[Record], quantity: str, config: Mapping, ours: bool | None) -> str:
    def fits(r: Record) -> bool:
        right = r.quantity == quantity and r.kind == "measured" and not r.suspect
        cold = r.config.get("l2", "cold") == "cold"
        side = ours is None or ((r.method == "codebook") is ours and r.method not in _NO_CONTEST)
        dense = ours is not False or (r.config.get("bits") or 16) >= 16
        return right and cold and side and dense and all(r.config.get(k) == v for k, v in config.items())

    found = [r for r in records if fits(r)]
    if not found:
        return "-"
    pick = min if quantity in ("gemv_time", "energy_per_token") else max
    best = pick(found, key=lambda r: r.value)
    detail = ", ".join(str(best.config[k]) for k in ("model", "stage") if best.config.get(k))
    words = detail or ("" if best.method in ("read", "codebook") else best.method)
    return f"{digits(best.value)} {best.unit}" + (
        f"<br><span style='font-size:11px'>{words}</span>" if words else ""
    )


def _table(header: Sequence[str], columns: Sequence[Sequence[str]], fills: Sequence[str]) -> go.Table:
    align = ["left", *["center"] * (len(columns) - 1)]
    return go.Table(
        header={"values": list(header), "align": align, "fill_color": "#eef1f4", "font": {"size": 13}, "height": 42},
        cells={
            "values": list(columns), "align": align, "fill_color": list(fills), "height": 38,
            "line_color": "#e6e9ec", "font": {"size": 13, "color": INK},
        },
    )  # fmt: skip
