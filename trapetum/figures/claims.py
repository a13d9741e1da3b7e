"""The claims table: what was published, what it implies, what a machine says, and the verdict."""

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from trapetum.figures.style import INK, new_figure, nothing

VERDICTS = {"reproduced": "#dff0e1", "refuted": "#f8dcdc", "not testable": "#eceff1", "partly": "#fdf1d3"}


def claims(rows: Sequence[Mapping[str, str]], title: str = "Claims and verdicts") -> go.Figure:
    """A table of claims, each row tinted by its verdict.

    Args:
        rows: mappings with `who`, `claim`, `implies`, `measured`, `verdict`; the verdict starts with one of
            `VERDICTS`, and may go on: `not testable: needs an RTX 4090`.
        title: above the table.

    Raises:
        ValueError: a verdict starts with none of the known words.
    """
    if not rows:
        return nothing(title, "No claim has been examined yet.")
    tints = [_tint(row["verdict"]) for row in rows]
    keys = ("who", "claim", "implies", "measured", "verdict")
    columns = [[str(row.get(key, "")) for row in rows] for key in keys]
    counts = {word: sum(row["verdict"].startswith(word) for row in rows) for word in VERDICTS}
    figure = new_figure(title, ", ".join(f"{n} {word}" for word, n in counts.items() if n))
    figure.add_trace(
        go.Table(
            columnwidth=[10, 30, 26, 26, 18],
            header={"values": ["who", "claim (published)", "implies (derived)", "what was measured", "verdict"],
                    "align": "left", "fill_color": "#eef1f4", "height": 32, "font": {"size": 13}},
            cells={"values": columns, "align": "left", "fill_color": [["#ffffff"] * len(rows)] * 4 + [tints],
                   "line_color": "#e6e9ec", "height": 26, "font": {"size": 12, "color": INK}},
        )
    )  # fmt: skip
    lines = sum(
        max(-(-len(str(row.get(k, ""))) // w) for k, w in zip(keys, (12, 38, 33, 33, 22), strict=True))
        for row in rows
    )
    figure.update_layout(
        height=150 + 16 * lines + 10 * len(rows), margin={"l": 10, "r": 10, "t": 100, "b": 10}
    )
    return figure


def _tint(verdict: str) -> str:
    for word, tint in VERDICTS.items():
        if verdict.startswith(word):
            return tint
    raise ValueError(f"the verdict {verdict!r} must start with one of {', '.join(VERDICTS)}.")
