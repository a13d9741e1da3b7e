"""Figures with a kernel behind them: sliders that move continuously and any pair of axes. Only for live notebooks.

Never build these under papermill: each FigureWidget stores five megabytes of JavaScript in the notebook.
"""

from collections.abc import Sequence
from itertools import zip_longest

import plotly.graph_objects as go

from trapetum.figures.pareto import add_key_of_shapes, legend_entry, methods, what
from trapetum.figures.pareto_state import (
    AXES,
    axes_layout,
    front_trace,
    points_trace,
    roof_trace,
    state,
)
from trapetum.figures.style import new_figure
from trapetum.figures.tradeoffs import Point, groups
from trapetum.figures.waterfall import bridge
from trapetum.waterfall import Run

CONTEXTS = (0, *(2**e for e in range(7, 18)))  # 0 stands for: as recorded


class ParetoExplorer:
    """The Pareto figure with a choice of device and model, of both axes, of context length and memory limit.

    Args:
        points: from `trapetum.figures.tradeoffs`.

    Attributes:
        box: the ipywidgets box to display.
        figure: the FigureWidget in it.

    Raises:
        ValueError: no points.
    """

    def __init__(self, points: Sequence[Point]):
        import ipywidgets

        self._groups = groups(points)
        if not self._groups:
            raise ValueError("there is no decode to explore: no record has a decode speed.")
        wide = {"style": {"description_width": "110px"}, "layout": {"width": "430px"}}
        places = [
            (f"{model} on {device} ({len(g)})", (device, model))
            for (device, model), g in self._groups.items()
        ]
        names = [(axis.name, key) for key, axis in AXES.items()]
        self.place = ipywidgets.Dropdown(options=places, description="model, device", **wide)
        self.x = ipywidgets.Dropdown(options=names[1:], description="across", **wide)
        self.y = ipywidgets.Dropdown(options=names, description="up", **wide)
        self.context = ipywidgets.SelectionSlider(
            options=[(f"{c:,}" if c else "as recorded", c) for c in CONTEXTS],
            description="context",
            **wide,
        )
        self.limit = ipywidgets.FloatLogSlider(
            value=200,
            min=-2,
            max=2.4,
            step=0.02,
            readout_format=".3g",
            description="limit, GB",
            **wide,
        )
        self.published = ipywidgets.Checkbox(value=True, description="published ones too", **wide)
        self._controls = (self.place, self.x, self.y, self.context, self.limit, self.published)
        # Drawn before it is wrapped: what is changed between wrapping and displaying never reaches the page.
        self.figure = go.FigureWidget(self._drawn())
        for control in self._controls:
            control.observe(lambda _: self.redraw(), "value")
        rows = [ipywidgets.HBox(pair) for pair in zip(self._controls[::2], self._controls[1::2], strict=True)]
        self.box = ipywidgets.VBox([*rows, self.figure])

    def _drawn(self) -> go.Figure:
        """The figure as the controls stand, with as many legend entries as the largest group has methods."""
        figure = new_figure("Pareto, live", height=640)
        figure.add_traces(self._traces())
        for _ in range(max(len(methods(group)) for group in self._groups.values())):
            legend_entry(figure, "", {"symbol": "square"})
        add_key_of_shapes(figure, [p for group in self._groups.values() for p in group])
        self._dress(figure)
        return figure

    def _axes(self) -> tuple[str, str]:
        """The chosen pair; an axis against itself shows nothing, so the second is then the first that differs."""
        x, y = self.x.value, self.y.value
        return x, y if y != x else next(axis for axis in AXES if axis != x)

    def _traces(self) -> list[go.Scatter]:
        points, (x, y), context = self.points(), self._axes(), self.context.value or None
        shown = state(points, x, y, context, self.limit.value)
        fronts = [front_trace(shown.front), front_trace(shown.front_of_all, "dot")]
        return [points_trace(points, shown), *fronts, roof_trace(points, x, y, context)]

    def _dress(self, figure: go.Figure) -> None:
        """Axes, the line under the title, and the methods of the legend."""
        points = self.points()
        figure.update_layout(axes_layout(*self._axes()))
        figure.layout.title.subtitle.text = what(points) if points else "nothing measured here"
        pool = figure.data[4 : 4 + max(len(methods(group)) for group in self._groups.values())]
        for number, (trace, entry) in enumerate(zip_longest(pool, methods(points).items())):
            name, tint = entry or ("", "#ffffff")
            trace.update(name=name, marker_color=tint, showlegend=number < len(methods(points)))

    def points(self) -> list[Point]:
        """The points of the chosen device and model, without the published ones if they are not wanted."""
        group = self._groups[self.place.value]
        return [p for p in group if self.published.value or p.kinds["tok_s"] != "published"]

    def redraw(self) -> None:
        """Move everything to where the controls say."""
        with self.figure.batch_update():
            for old, new in zip(self.figure.data[:4], self._traces(), strict=True):
                old.update(x=new.x, y=new.y, text=new.text, customdata=new.customdata, marker=new.marker)
            self._dress(self.figure)


class BridgeChooser:
    """The bridge between any two runs: a dropdown for each end.

    Args:
        runs: of `trapetum.waterfall.runs`; at least two.

    Attributes:
        box: the ipywidgets box to display.
        figure: the FigureWidget in it.

    Raises:
        ValueError: fewer than two runs.
    """

    def __init__(self, runs: Sequence[Run]):
        import ipywidgets

        if len(runs) < 2:
            raise ValueError(f"{len(runs)} runs make no bridge; take apart two tokens.")
        named = {f"{run.name}, {run.token.device.get('name')}, {run.token.utc}": run for run in runs}
        wide = {"style": {"description_width": "60px"}, "layout": {"width": "640px"}}
        self.first = ipywidgets.Dropdown(options=named, description="from", **wide)
        self.second = ipywidgets.Dropdown(options=named, value=runs[-1], description="to", **wide)
        self.figure = go.FigureWidget(self._drawn())
        for control in (self.first, self.second):
            control.observe(lambda _: self.redraw(), "value")
        self.box = ipywidgets.VBox([self.first, self.second, self.figure])

    def _drawn(self) -> go.Figure:
        return bridge(self.first.value, self.second.value)

    def redraw(self) -> None:
        """Draw the bridge between the chosen runs."""
        drawn = self._drawn()
        with self.figure.batch_update():
            self.figure.data[0].update(drawn.data[0].to_plotly_json())
            self.figure.layout.shapes = drawn.layout.shapes
            self.figure.layout.title = drawn.layout.title


def choose_bridge(book, runs: Sequence[Run]) -> BridgeChooser | None:
    """Display the chooser where a person can use it; elsewhere say so in a line and build nothing.

    Args:
        book: a `trapetum.workbook.Workbook`.
        runs: of `trapetum.waterfall.runs`.
    """
    if not (book.live and len(runs) > 1):
        print("Any two runs can be chosen in a running notebook; the menu of the figure above works without.")
        return None
    from IPython.display import display

    chooser = BridgeChooser(runs)
    display(chooser.box)
    return chooser


def explore(book, points: Sequence[Point]) -> ParetoExplorer | None:
    """Display the explorer where a person can use it; elsewhere say so in a line and build nothing.

    Args:
        book: a `trapetum.workbook.Workbook`.
        points: from `trapetum.figures.tradeoffs`.
    """
    if not (book.live and points):
        print("The live explorer needs a running notebook; the figure above works without.")
        return None
    from IPython.display import display

    explorer = ParetoExplorer(points)
    display(explorer.box)
    return explorer
