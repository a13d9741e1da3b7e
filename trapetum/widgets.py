"""Figures with a kernel behind them: sliders that move continuously and any pair of axes. Only for live notebooks.

Never build these under papermill: each FigureWidget stores five megabytes of JavaScript in the notebook.
"""

from collections.abc import Sequence

import plotly.graph_objects as go

from trapetum.figures.pareto import add_legend, what
from trapetum.figures.pareto_state import (
    AXES,
    axes_layout,
    front_trace,
    points_trace,
    roof_line,
    roof_trace,
    state,
)
from trapetum.figures.style import new_figure
from trapetum.figures.tradeoffs import Point, groups

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
            description="memory limit, GB",
            **wide,
        )
        self.published = ipywidgets.Checkbox(value=True, description="published ones too", **wide)
        self._controls = (self.place, self.x, self.y, self.context, self.limit, self.published)
        self.figure = go.FigureWidget(self._empty())
        for control in self._controls:
            control.observe(lambda _: self.redraw(), "value")
        rows = [ipywidgets.HBox(pair) for pair in zip(self._controls[::2], self._controls[1::2], strict=True)]
        self.box = ipywidgets.VBox([*rows, self.figure])
        self.redraw()

    def _empty(self) -> go.Figure:
        figure = new_figure("Pareto, live", height=600)
        nothing = state([], "memory_gb", "tok_s", None, None)
        figure.add_trace(points_trace([], nothing))
        figure.add_trace(front_trace(nothing.front))
        figure.add_trace(front_trace(nothing.front_of_all, "dot"))
        figure.add_trace(roof_trace([], "memory_gb", "tok_s", None))
        add_legend(figure, [p for group in self._groups.values() for p in group])
        return figure

    def points(self) -> list[Point]:
        """The points of the chosen device and model, without the published ones if they are not wanted."""
        group = self._groups[self.place.value]
        return [p for p in group if self.published.value or p.kinds["tok_s"] != "published"]

    def redraw(self) -> None:
        """Move everything to where the controls say."""
        points, x, y = self.points(), self.x.value, self.y.value
        if x == y:  # an axis against itself shows nothing: take the first that differs
            y = next(axis for axis in AXES if axis != x)
        shown = state(points, x, y, self.context.value or None, self.limit.value)
        new = [points_trace(points, shown), front_trace(shown.front), front_trace(shown.front_of_all, "dot")]
        with self.figure.batch_update():
            for old, trace in zip(self.figure.data, new, strict=False):
                old.update(x=trace.x, y=trace.y, text=trace.text, customdata=trace.customdata)
            self.figure.data[0].marker = new[0].marker
            roof = self.figure.data[3]
            roof.x, roof.y = roof_line(points, x, y, self.context.value or None)
            self.figure.update_layout(axes_layout(x, y))
            self.figure.layout.title.subtitle.text = what(points) if points else "nothing measured here"


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
