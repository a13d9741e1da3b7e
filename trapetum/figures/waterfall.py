"""The time of a token part by part, and the bridge from one run to another: where did my 4x go?"""

from collections.abc import Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from trapetum.figures.style import (
    FAINT,
    INK,
    ROOF_COLOUR,
    digits,
    new_figure,
    nothing,
    provenance,
    rgba,
    spread,
)
from trapetum.figures.walk import ORDER
from trapetum.waterfall import PARTS, Part, Run, compare

_COLOURS = (
    "#1f6fb2", "#7fb2d9", "#17a2a2", "#e08e0b", "#6a51a3", "#2a9d5c",
    "#4a4a4a", "#d4508b", "#8a5a2b", "#c9a227", "#8f9aa3",
)  # fmt: skip
TINTS = dict(zip(PARTS, _COLOURS, strict=True))
UNEXPLAINED = "not explained"
_KEY = "plain: measured by leaving it out · hatched: derived from bytes and counts"
_LEAST_SHOWN = 0.005  # of the token: a smaller gap is not drawn


def waterfall(
    first: Run | None, second: Run | None = None, title: str = "Where the time of a token goes"
) -> go.Figure:
    """The parts of one or two tokens side by side, part on part up to the measured time, each with its ideal line.

    Args:
        first, second: what `trapetum.waterfall.find` found; None where there is no measurement.
        title: above the figure.
    """
    found = [run for run in (first, second) if run]
    if not found:
        return nothing(title, "No token has been taken apart yet: `trapetum bench breakdown` does it.")
    figure = make_subplots(
        1, len(found), shared_yaxes=True, horizontal_spacing=0.05,
        subplot_titles=[_heading(run, found[0]) for run in found],
    )  # fmt: skip
    figure = new_figure(title, _subtitle(found), height=520, figure=figure)
    for column, run in enumerate(found, start=1):
        figure.add_trace(_rising(run), 1, column)
        figure.add_hline(y=run.ideal_us, line=_IDEAL_LINE, row=1, col=column)
    return _finish(figure)


def bridge(first: Run | None, second: Run | None, title: str = "") -> go.Figure:
    """From one token to another: what each part adds or saves, with the second's ideal line.

    Args:
        first, second: two runs that close; None where there is no measurement.
        title: above the figure; "" asks where the factor of the bytes went, e.g. `Where did my 4x go?`

    Raises:
        WaterfallError: the parts of a run do not add up to its token.
    """
    if first is None or second is None:
        return nothing(
            title or "From one token to another",
            "It takes two tokens taken apart: `trapetum bench breakdown` makes them.",
        )
    gain, fewer = digits(first.us / second.us), digits(first.ideal_us / second.ideal_us)
    ideal = f"<span style='color:{ROOF_COLOUR}'>ideal {digits(second.ideal_us)} us: bytes alone</span>"
    ratio = f"{gain} times faster, with {fewer} times fewer bytes of weights · {ideal}"
    title = title or f"Where did my {first.ideal_us / second.ideal_us:.0f}x go?"
    figure = new_figure(title, f"{_subtitle([first, second])}<br>{ratio}", height=540)
    figure.add_trace(_steps(compare(first, second)))
    figure.add_hline(y=second.ideal_us, line=_IDEAL_LINE)
    return _finish(figure)


def pairs(runs: Sequence[Run]) -> list[tuple[Run, Run]]:
    """The bridges worth a look among some runs: dense to codes at each stage, then from stage to stage.

    Args:
        runs: e.g. of `trapetum.waterfall.runs`, oldest first; of those that ran the same, the newest counts.

    Returns:
        pairs of the same model on the same device, those at the last stage first.
    """
    newest = {(_place(run), run.name): run for run in runs}
    made: list[tuple[Run, Run]] = []
    for place in dict.fromkeys(place for place, _ in newest):
        here = [run for (at, _), run in newest.items() if at == place]
        coded, dense = (
            [run for run in here if (run.token.method == "codebook") == is_coded]
            for is_coded in (True, False)
        )
        made += [
            (a, b) for b in reversed(_by_stage(coded)) for a in _by_stage(dense) if _stage(a) == _stage(b)
        ]
        for kind in (coded, dense):
            ladder = _by_stage(kind)
            made += [(a, b) for a, b in zip(ladder, ladder[1:], strict=False) if _weights(a) == _weights(b)]
    return made


def _place(run: Run) -> tuple:
    return run.token.device.get("name"), run.token.config.get("model")


def _stage(run: Run) -> str:
    return str(run.token.config.get("stage", ""))


def _weights(run: Run) -> tuple:
    return run.token.method, run.token.config.get("bits")


def _by_stage(runs: Sequence[Run]) -> list[Run]:
    known = [run for run in runs if _stage(run) in ORDER]
    return sorted(known, key=lambda run: (_weights(run), ORDER.index(_stage(run))))


def bridges(runs: Sequence[Run], title: str = "From one token to another") -> go.Figure:
    """The bridges among some runs, one at a time: a menu in the figure chooses, also in a saved page.

    Args:
        runs: on any devices and of any models; see `pairs`.
        title: above the figure.

    Raises:
        WaterfallError: the parts of a run do not add up to its token.
    """
    chosen = pairs(runs)
    if not chosen:
        return nothing(title, "It takes two tokens taken apart: `trapetum bench breakdown` makes them.")
    drawn = [bridge(a, b, title) for a, b in chosen]
    figure = go.Figure(drawn[0])
    for other in drawn[1:]:
        figure.add_trace(other.data[0].update(visible=False))
    buttons = [_button(number, drawn, pair) for number, pair in enumerate(chosen)]
    place = {
        "x": 1,
        "xanchor": "right",
        "y": 1.02,
        "yanchor": "bottom",
        "bgcolor": "white",
        "showactive": True,
    }
    return figure.update_layout(updatemenus=[{"buttons": buttons, **place}], margin_t=170)


def _button(number: int, drawn: Sequence[go.Figure], pair: tuple[Run, Run]) -> dict:
    """One entry of the menu: the trace of its pair, with its subtitle and its ideal line."""
    layout = drawn[number].layout
    change = {
        "title.subtitle.text": layout.title.subtitle.text,
        "shapes": [shape.to_plotly_json() for shape in layout.shapes],
    }
    visible = [other == number for other in range(len(drawn))]
    label = f"{pair[0].name} to {pair[1].name}"
    return {"label": label, "method": "update", "args": [{"visible": visible}, change]}


_IDEAL_LINE = {"color": ROOF_COLOUR, "dash": "dash", "width": 2}


def _subtitle(found: Sequence[Run]) -> str:
    every = [r for run in found for r in (run.token, *run.records)]
    context = " and ".join(dict.fromkeys(f"{run.token.config['context']:g}" for run in found))
    return f"{provenance(every, f'us a token at a context of {context}')}<br>{_KEY}"


def _heading(run: Run, first: Run) -> str:
    ratio = "" if run is first else f", {first.us / run.us:.2f} times faster"
    ideal = f"<span style='color:{ROOF_COLOUR}'>ideal {digits(run.ideal_us)} us: bytes alone</span>"
    return f"<b>{run.name}</b>: {digits(run.us)} us{ratio}<br>{ideal}"


def _closed(run: Run) -> list[Part]:
    """The parts, and what they do not explain if that is above half a per cent of the token."""
    gap = run.missing_us
    closes = abs(gap) <= _LEAST_SHOWN * run.us
    return [*run.parts, *([] if closes else [Part(UNEXPLAINED, gap, "derived")])]


def _rising(run: Run) -> go.Bar:
    parts, bases, height = _closed(run), [], 0.0
    for part in parts:
        bases.append(height)
        height += part.us
    total = Part("<b>token</b>", run.us, run.token.kind)
    bars = _bars([*parts, total], [*bases, 0.0])
    rows = [*run.records, *[run.token] * (len(parts) + 1 - len(run.records))]
    return bars.update(error_y=spread(rows))


def _steps(steps: Sequence[Part]) -> go.Bar:
    bases, height = [0.0], steps[0].us
    for step in steps[1:-1]:
        bases.append(height)
        height += step.us
    return _bars(steps, [*bases, 0.0])


def _bars(parts: Sequence[Part], bases: Sequence[float]) -> go.Bar:
    tints = [TINTS.get(p.label, FAINT if p.label == UNEXPLAINED else rgba(INK, 0.75)) for p in parts]
    return go.Bar(
        x=[p.label for p in parts], y=[p.us for p in parts], base=list(bases),
        marker={"color": tints, "pattern": {"shape": ["/" if p.kind == "derived" else "" for p in parts]}},
        text=[digits(p.us) for p in parts], textposition="outside", cliponaxis=False,
        customdata=[p.kind for p in parts],
        hovertemplate="%{x}: %{y:.4g} us, %{customdata}<extra></extra>",
    )  # fmt: skip


def _finish(figure: go.Figure) -> go.Figure:
    figure.update_yaxes(rangemode="tozero")
    figure.layout.yaxis.title.text = "time of a token, us"
    figure.update_xaxes(tickangle=-35)
    figure.update_annotations(font_size=14)
    return figure.update_layout(margin_t=150, showlegend=False)
