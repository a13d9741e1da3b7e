"""What all figures share: a colour for each method, a marker for each kind of number, and the words under a title."""

import colorsys
import textwrap
import zlib
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

import plotly.graph_objects as go
import plotly.io as pio

from trapetum.build import current_sha256s
from trapetum.paths import KERNELS
from trapetum.record_gate import is_stale
from trapetum.records import Record

# One colour a method, on every page: greys are dense weights, blues are ours, warm colours other int4 kernels.
PALETTE = {
    "linear-fp16": "#5b6670",
    "fp16": "#5b6670",
    "fp": "#5b6670",
    "linear-bf16": "#8f9aa3",
    "bf16": "#8f9aa3",
    "linear-fp32": "#b5a58c",
    "fp32": "#b5a58c",
    "mv-fp16": "#2f3a42",
    "mv-bf16": "#7a7266",
    "own-fp32": "#8a7a55",
    "own-fp16": "#4f7263",
    "own-int8": "#7fa08f",
    "dequantize-linear": "#a0577d",
    "dequantize-linear-bf16": "#c795b0",
    "read": "#111111",
    "codebook": "#1f6fb2",
    "codebook-exact": "#6a51a3",
    "codebook-int8": "#00838f",
    "additive": "#2a9d5c",
    "additive-2x8": "#2a9d5c",
    "additive-4x8": "#14613a",
    "trellis": "#b5367a",
    "tinygemm-int4": "#e08e0b",
    "torch-int4": "#c2571a",
    "torchao-int4": "#d49a4a",
    "torchao-int4wo-64": "#a86b00",
    "torchao-int8wo": "#d2691e",
    "torchao-int8dq": "#8f3f12",
    "torchao-fp6": "#b07d62",
    "torchao-autoquant": "#c23b22",
    "torchao-sparse-24": "#7d4f50",
    "transformers-eager": "#a39a88",
    "transformers-compiled": "#75695a",
    "marlin": "#c9a227",
    "gemlite": "#a3602f",
    "any-precision": "#7fa32a",
    "squeezellm": "#3f8f8f",
    "bitsandbytes-nf4": "#d96c4a",
    "llama.cpp": "#8c6bb1",
    "gpt-fast": "#d4508b",
    "qtip": "#e377c2",
    "aqlm": "#4d9e3a",
    "rtn": "#c8434f",
    "nf4": "#e08e0b",
    "lloyd": "#8a5a2b",
    "kmeans": "#1f6fb2",
    "kmeans-weighted": "#17a2a2",
    "rtn-128": "#e58a92",
    "rotation": "#8d6fb8",
    "gptq-codebook": "#7b6d00",
    "kmeans+sparse": "#7fb2dc",
    "lnq-guided+sparse": "#5aa57c",
    "study-codebook": "#d17c9b",
    "study-kmeans": "#d17c9b",
    "study-additive": "#9b5fb0",
    "codebook-prototype": "#6fa8dc",
    "no-linears": "#4a4a4a",
    "gptq": "#7b6d00",
    "lnq": "#2a9d5c",
    "lnq-guided": "#0b6b3a",
    "fp16-compiled": "#8a8f5c",
    "awq": "#9a3b3b",
    "marlin-awq": "#9a3b3b",
    "marlin-gptq": "#7b6d00",
    "exllama-v2": "#3d7ea6",
    "w8a8-int8": "#5e9c76",
    "w8a8-fp8": "#2f6f56",
    "calm-fp16": "#6d7f8b",
    "calm-fp8": "#7d6b91",
    "calm-4bit": "#3a8fb7",
    "quip#": "#b05a2e",
    "ganq": "#5577c2",
    "quarot-gptq": "#8d5524",
    "gptvq-1d": "#a88ac2",
    "study-kmeans-calibrated": "#b86f50",
    "study-kmeans-scaled": "#86a05a",
    "study-kmeans-awq": "#5d8aa8",
    "study-kmeans-incoherence": "#b59410",
}
_SHADES = {8: 0.5, 4: 0.0, 3: -0.3, 2: -0.55}

#: Methods of dense decodes by the own engine, as `trapetum.bench.variants` names them.
OWN_DENSE = ("fp32", "bf16", "fp16")
KIND_SYMBOLS = {"measured": "circle", "published": "diamond", "derived": "triangle-up"}
ROOF_COLOUR = "#b3261e"
DEAD_END = "#8a6f5a"  # kernels of the ladder that no later rung starts from
INK, FAINT = "#1d2329", "#6b757e"
FONT = "Inter, 'Segoe UI', Helvetica, Arial, sans-serif"


def colour(method: str, bits: float | None = None) -> str:
    """The colour of a method; of ours, fewer bits are darker. Rungs of the ladder have the codebook's, dead ends their own.

    A method that is not in `PALETTE` gets a colour made from its name, always the same.
    """
    if method.startswith("ladder-"):  # rungs are steps towards `codebook`
        return DEAD_END if "dead" in method else PALETTE["codebook"]
    base = PALETTE.get(method) or _from_name(method)
    return _shaded(base, _SHADES.get(bits, 0.0)) if method in ("codebook", "codebook-exact") else base


def _from_name(method: str) -> str:
    number = zlib.crc32(method.encode())
    channels = colorsys.hls_to_rgb(number % 360 / 360, 0.36 + 0.12 * (number // 360 % 2), 0.5)
    return "#" + "".join(f"{round(255 * c):02x}" for c in channels)


def _shaded(colour: str, amount: float) -> str:
    """`colour` moved towards white (amount > 0) or black (amount < 0)."""
    target = 255 if amount > 0 else 0
    channels = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(c + (target - c) * abs(amount)):02x}" for c in channels)


def rgba(colour: str, alpha: float) -> str:
    """A `#rrggbb` colour with an opacity."""
    return f"rgba({int(colour[1:3], 16)},{int(colour[3:5], 16)},{int(colour[5:7], 16)},{alpha})"


def method_of(record: Record) -> str:
    """The method as it is coloured: the exact arithmetic of the codebook counts as one of its own."""
    return "codebook-exact" if record.config.get("path") == "exact" else record.method


def label_of(record: Record, chain: bool = True) -> str:
    """A record's method as a reader sees it, e.g. `codebook 4-bit (pdl)`."""
    words = [method_of(record)]
    bits, dtype = record.config.get("bits"), record.config.get("dtype")
    says_it = method_of(record).endswith(("fp16", "bf16", "fp32")) or method_of(record) == "fp"
    if record.method.startswith("transformers-") and dtype:
        words.append(dtype)  # two of them have 16 bits
    elif bits is not None and not says_it:
        words.append(f"{bits:g}-bit")
    if record.config.get("n_codes") == 64:
        words.append("64 codes")
    if chain and record.config.get("chain") == "pdl":
        words.append("(pdl)")
    return " ".join(words)


def decode_label(record: Record) -> str:
    """`label_of` a decode, with what is unusual of its cache and its steps, e.g. `codebook 4-bit, kv int8, 4 rows`."""
    return ", ".join([label_of(record), *unusual(record.config)])


def unusual(config: Mapping) -> list[str]:
    """In words, how a decode differs from one on one card with a 16-bit cache and one token a step."""
    kv, rows, cards = config.get("kv"), config.get("rows") or 1, config.get("world_size") or 1
    words = [(f"kv {kv}", kv in ("int8", "int4")), (f"{rows} rows", rows > 1), (f"{cards} cards", cards > 1)]
    return [word for word, so in words if so]


def by_itself(record: Record) -> bool:
    """Whether a decode was timed alone: not in turns with another one, nor as one side of a comparison."""
    return not record.config.get("beside") and not record.config.get("interleaved")


def stale(record: Record) -> bool:
    """Whether the record was measured with a kernel whose source has changed since."""
    return is_stale(record, _current)


def _current(_method: str) -> set[str]:
    files = sorted(path for path in KERNELS.rglob("*") if path.suffix in (".c", ".cu", ".h"))
    return _hashes(tuple(path.stat().st_mtime_ns for path in files))


@lru_cache(maxsize=4)
def _hashes(_edited: tuple[int, ...]) -> set[str]:
    return current_sha256s()


def symbol(record: Record) -> str:
    """Marker of a record: its shape says the kind; hollow is suspect, a dot inside is stale."""
    hollow, dot = ("-open" if record.suspect else ""), ("-dot" if stale(record) else "")
    return KIND_SYMBOLS[record.kind] + hollow + dot


def digits(value: float, n: int = 3) -> str:
    """`value` with n significant digits and thousands separated: 4.30, 3,190, 0.00120."""
    text = f"{value:#.{n}g}".rstrip(".")
    return f"{float(text):,.0f}" if "e+" in text and abs(value) < 1e9 else text


def describe(record: Record) -> str:
    """The hover text of a record: value, spread, kind, device, what it takes to repeat it, and its id."""
    spread = f" (p20 {digits(record.p20)}, p80 {digits(record.p80)}, n {record.n})" if record.p20 else ""
    config = ", ".join(f"{k} {_short(v)}" for k, v in record.config.items() if v is not None)
    lines = [
        f"<b>{label_of(record)}</b>: {digits(record.value, 4)} {record.unit}{spread}",
        f"{record.kind}{' ' + record.utc[:10] if record.utc else ''}, {device_name(record)}",
        *_wrapped(config),
        *(_wrapped(record.source) if record.kind != "measured" else []),
        *([f"<b>suspect</b>: {record.why_suspect}"] if record.suspect else []),
        *(["<b>stale</b>: the kernel's source has changed since"] if stale(record) else []),
        f"record {record.id}",
    ]
    return "<br>".join(line for line in lines if line)


def _short(value) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _wrapped(text: str, width: int = 80) -> list[str]:
    return textwrap.wrap(text, width)


def device_name(record: Record) -> str:
    """The device's name, shortened of the words that carry nothing."""
    name = str(record.device.get("name") or "device not said")
    for word in ("NVIDIA GeForce ", "NVIDIA ", "(R)", "(TM)", " HBM3", " HBM2e", " Processor", " CPU"):
        name = name.replace(word, "")
    return " ".join(name.split())


# A log axis that spans a few decades: whole numbers at 1, 2, 3 and 5, where plotly would write bare digits.
_TICKS = [float(f"{m}e{e}") for e in range(-7, 8) for m in (1, 2, 3, 5)]
LOG = {"type": "log", "tickvals": _TICKS, "ticktext": [f"{t:g}" for t in _TICKS]}


def provenance(records: Iterable[Record], unit: str = "") -> str:
    """The line under a title: unit, kinds, devices and days of the numbers shown."""
    records = list(records)
    devices = sorted({device_name(r) for r in records})
    days = sorted({r.utc[:10] for r in records if r.utc and r.kind == "measured"})
    kinds = [kind for kind in KIND_SYMBOLS if any(r.kind == kind for r in records)]
    when = "" if not days else f" {days[0]}" if len(days) == 1 else f" {days[0]} to {days[-1]}"
    made = [kind + when if kind == "measured" else kind for kind in kinds]
    shown = devices if len(devices) <= 3 else [*devices[:2], f"{len(devices) - 2} more"]
    return " · ".join(part for part in (unit, ", ".join(shown), ", ".join(made)) if part)


_TEMPLATE = go.layout.Template(pio.templates["plotly_white"])
for _axis in (_TEMPLATE.layout.xaxis, _TEMPLATE.layout.yaxis):
    _axis.title.font = {"size": 13, "color": INK}


def new_figure(
    title: str, subtitle: str = "", height: int = 440, figure: go.Figure | None = None
) -> go.Figure:
    """An empty figure (or `figure`) in the house's dress: white, dark text, legend below."""
    figure = figure or go.Figure()
    figure.update_layout(
        template=_TEMPLATE,
        title={
            "text": title,
            "x": 0.01,
            "y": 0.985,
            "yref": "container",
            "yanchor": "top",
            "font": {"size": 18, "color": INK},
            "subtitle": {"text": subtitle, "font": {"size": 12, "color": FAINT}},
        },
        font={"family": FONT, "size": 13, "color": INK},
        paper_bgcolor="white",
        plot_bgcolor="white",
        height=height,
        margin={"l": 70, "r": 30, "t": 80, "b": 60},
        legend={"orientation": "h", "y": -0.18, "yanchor": "top", "x": 0, "font": {"size": 12}},
        hoverlabel={"align": "left", "bgcolor": "white", "font": {"size": 12, "color": INK}},
        barcornerradius=3,
        barmode="overlay",
    )
    axes = {"gridcolor": "#e6e9ec", "linecolor": "#aab2b9", "automargin": True, "zeroline": False}
    figure.update_xaxes(ticks="outside", **axes)
    figure.update_yaxes(**axes)
    return figure


def nothing(title: str, sentence: str) -> go.Figure:
    """A figure that says in its middle why there is no number to draw."""
    figure = new_figure(title, height=220)
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    figure.add_annotation(
        text=sentence,
        x=0.5,
        y=0.5,
        xref="paper",
        yref="paper",
        showarrow=False,
        font={"size": 14, "color": FAINT},
    )
    return figure


def points(records: Sequence[Record], x: Sequence, y: Sequence, name: str, colour: str, **more) -> go.Scatter:
    """Records as markers at (x, y): shape by kind, hollow if suspect, dotted if stale, hover text from the record."""
    marker = {
        "symbol": [symbol(r) for r in records],
        "color": colour,
        "size": more.pop("size", 11),
        "line": {"width": [2 if r.suspect else 1 for r in records], "color": colour},
    }
    hover = {"text": [describe(r) for r in records], "hovertemplate": "%{text}<extra></extra>"}
    return go.Scatter(x=list(x), y=list(y), mode="markers", name=name, marker=marker, **{**hover, **more})


def spread(records: Sequence[Record], scale=lambda value: value) -> dict | None:
    """Error bars from p20 to p80 of records whose plotted value is `scale(value)`, or None without any spread."""
    if not any(r.p20 for r in records):
        return None
    low = [min(scale(r.p20 or r.value), scale(r.p80 or r.value)) for r in records]
    high = [max(scale(r.p20 or r.value), scale(r.p80 or r.value)) for r in records]
    middle = [scale(r.value) for r in records]
    return {
        "type": "data",
        "symmetric": False,
        "array": [max(0.0, h - m) for h, m in zip(high, middle, strict=True)],
        "arrayminus": [max(0.0, m - x) for x, m in zip(low, middle, strict=True)],
        "thickness": 1.2,
        "width": 3,
        "color": INK,
    }


def place_legend(figure: go.Figure, gap_px: int = 60) -> go.Figure:
    """Put the legend `gap_px` pixels below the axes, whatever the figure's height."""
    margin = figure.layout.margin
    return figure.update_layout(legend_y=-gap_px / (figure.layout.height - margin.t - margin.b))


def add_key(figure: go.Figure, records: Iterable[Record], gap_px: int = 60) -> go.Figure:
    """Legend entries that explain the markers, one for each kind drawn, and for suspect and stale ones; places it."""
    records = list(records)
    entries = [(kind, mark) for kind, mark in KIND_SYMBOLS.items() if any(r.kind == kind for r in records)]
    if any(r.suspect for r in records):
        entries.append(("suspect", "circle-open"))
    if any(stale(r) for r in records):
        entries.append(("stale", "circle-open-dot"))
    for name, mark in entries:
        key = {"symbol": mark, "color": FAINT, "size": 10, "line": {"width": 1.5, "color": FAINT}}
        figure.add_trace(
            go.Scatter(x=[None], y=[None], mode="markers", name=name, marker=key, hoverinfo="skip")
        )
    return place_legend(figure, gap_px)


def roof_name(text: str) -> dict:
    """The dress of the ideal line: a dashed red line called `text` in the legend."""
    line = {"color": ROOF_COLOUR, "dash": "dash", "width": 2}
    return {
        "mode": "lines",
        "name": text,
        "line": line,
        "hovertemplate": f"{text}: %{{y:.4g}}<extra></extra>",
    }
