"""How a training run went: the losses over the tokens it saw."""

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from trapetum.figures.style import new_figure

_LINES = {"train_loss": ("training", "#9aa4ad"), "validation_loss": ("validation", "#d1862b")}
_HELD_OUT = ("held out", "#2b6cb0")


def losses(
    rows: Sequence[Mapping], device: str, kept: Mapping | None = None, title: str = "Loss"
) -> go.Figure:
    """Training, validation and held-out loss against tokens seen; hover shows the time and the learning rate.

    Args:
        rows: of a training log (`trapetum.builtin.read_log`).
        device: where it ran, for the subtitle.
        kept: the row whose weights were kept, marked by a vertical line.
        title: of the figure.
    """
    figure = new_figure(title, f"nats per token · {device} · measured")
    for key, (name, colour) in {**_LINES, "heldout_loss": _HELD_OUT}.items():
        seen = [row for row in rows if row[key] is not None]
        figure.add_scatter(
            x=[row["tokens"] / 1e6 for row in seen],
            y=[row[key] for row in seen],
            name=name,
            mode="lines+markers",
            marker={"symbol": "circle", "size": 6, "color": colour},
            customdata=[[row["seconds"], row["learning_rate"]] for row in seen],
            hovertemplate="%{y:.3f} after %{customdata[0]:.0f} s, learning rate %{customdata[1]:.1e}",
        )
    if kept:
        x = kept["tokens"] / 1e6
        figure.add_vline(x=x, line={"dash": "dot", "color": _HELD_OUT[1]}, annotation_text="kept")
    figure.update_xaxes(title="tokens seen, millions")
    figure.update_yaxes(title="loss, nats per token")
    return figure
