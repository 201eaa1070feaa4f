"""The look that a report's charts share, and the few kinds of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

__all__ = ["Line", "forest", "panels", "styled"]

# Okabe and Ito's colours, told apart by the colour-blind too; symbols and dashes go with them.
_COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#8C6D31",
)  # fmt: skip
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "cross", "triangle-down", "star")
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
_GREY = "#767676"
_ABOVE, _LEGEND_ROW = 45, 22  # pixels


@dataclass(frozen=True)
class Line:
    """One line of a panel.

    Attributes
    ----------
    name : str
        Lines of one name share colour, symbol and legend over all panels.
    x : sequence
        Numbers, or categories as strings.
    y : sequence of float
    error : sequence of float, optional
        Half the width of each error bar; NaN for none.
    marked : bool
        Whether points are marked.
    joined : bool
        Whether points are joined.
    reference : bool
        Whether it is not a result, but what results are read against.
    """

    name: str
    x: Sequence
    y: Sequence[float]
    error: Sequence[float] | None = None
    marked: bool = True
    joined: bool = True
    reference: bool = False


def styled(figure: go.Figure, height: int) -> go.Figure:
    """The figure in the report's look."""
    figure.update_layout(
        template="plotly_white",
        height=height,
        font={"family": "system-ui, sans-serif", "size": 13, "color": "#1a1a1a"},
        margin={"l": 10, "r": 10, "t": 40, "b": 10},
        colorway=_COLOURS,
        hoverlabel={"namelength": -1},
    )
    figure.update_xaxes(automargin=True, zerolinecolor=_GREY)
    figure.update_yaxes(automargin=True, zerolinecolor=_GREY)
    return figure


def panels(
    lines: Sequence[tuple[str, Sequence[Line]]],
    x_titles: Sequence[str],
    y_titles: Sequence[str],
    columns: int = 3,
    height: int = 300,
    grouped: bool = False,
    log_x: bool = False,
) -> go.Figure:
    """Small charts side by side, with one legend below them.

    Parameters
    ----------
    lines : sequence of (str, sequence of Line)
        Title and lines of each panel.
    x_titles, y_titles : sequence of str
        Of the axes: one for all panels, or one each.
    columns : int
        Panels in a row, at most.
    height : int
        Of a row, in pixels.
    grouped : bool
        Whether points of one category stand side by side.
    log_x : bool
    """
    columns = min(columns, len(lines))
    rows = -(-len(lines) // columns)
    figure = make_subplots(
        rows,
        columns,
        subplot_titles=[title for title, _ in lines],
        horizontal_spacing=0.25 / columns,
        vertical_spacing=min(0.9, 110 / (height * rows)) if rows > 1 else 0,
    )
    names = list(dict.fromkeys(line.name for _, panel in lines for line in panel))
    shown: set[str] = set()
    for index, (_, panel) in enumerate(lines):
        row, column = divmod(index, columns)
        for line in panel:
            figure.add_trace(
                _trace(line, names.index(line.name), line.name not in shown), row + 1, column + 1
            )
            shown.add(line.name)
        axis = {"row": row + 1, "col": column + 1}
        figure.update_xaxes(title_text=x_titles[index % len(x_titles)], **axis)
        if column == 0 or len(y_titles) > 1:
            figure.update_yaxes(title_text=y_titles[index % len(y_titles)], **axis)
        if panel and any(isinstance(value, str) for value in panel[0].x):
            # In the order of the values, also where one looks like a number.
            figure.update_xaxes(type="category", **axis)
        elif log_x:
            # Labels at 1, 2 and 5 times the powers of ten.
            figure.update_xaxes(type="log", dtick="D2", **axis)
    # Its rows below the plots: about as many entries in a row as fit.
    longest = max((len(name) for name in names), default=1)
    fitting = max(1, 1000 // (60 + 7 * longest))
    legend_rows = -(-len(names) // fitting) if len(names) > 1 else 0
    below = (55 if any(x_titles) else 30) + _LEGEND_ROW * legend_rows
    styled(figure, height * rows + _ABOVE + below)
    figure.update_layout(
        showlegend=len(names) > 1,
        legend={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0},
        margin={"t": _ABOVE, "b": below},
    )
    if grouped:
        figure.update_layout(scattermode="group", scattergap=0.4)
    figure.update_annotations(font_size=14)
    return figure


def _trace(line: Line, index: int, in_legend: bool) -> go.Scatter:
    colour = _GREY if line.reference else _COLOURS[index % len(_COLOURS)]
    dash = "dot" if line.reference else _DASHES[index // len(_COLOURS) % len(_DASHES)]
    error = None
    if line.error is not None and not np.isnan(np.asarray(line.error, dtype=float)).all():
        widths = [None if np.isnan(value) else float(value) for value in line.error]
        error = {"type": "data", "array": widths, "thickness": 1.3, "width": 3}
    modes = ["lines"] * line.joined + ["markers"] * (line.marked and not line.reference)
    return go.Scatter(
        x=list(line.x),
        y=[None if np.isnan(value) else float(value) for value in line.y],
        error_y=error,
        name=line.name,
        legendgroup=line.name,
        showlegend=in_legend,
        mode="+".join(modes),
        line={"color": colour, "width": 1.8, "dash": dash},
        marker={
            "color": colour,
            "size": 7,
            "symbol": _SYMBOLS[(index + index // len(_COLOURS)) % len(_SYMBOLS)],
        },
    )


def forest(
    labels: Sequence[str],
    intervals: Sequence[tuple[str, Sequence[tuple[float, float, float]]]],
    x_title: str,
) -> go.Figure:
    """Intervals row by row, several kinds of them one above the other.

    Parameters
    ----------
    labels : sequence of str
        From top to bottom.
    intervals : sequence of (str, sequence of (float, float, float))
        Name of each kind, and its mean, low and high by row; NaN where there is none.
    x_title : str
    """
    figure = go.Figure()
    for kind, (name, rows) in enumerate(intervals):
        # The kinds stand a little apart, so that none hides another.
        offset = (kind - (len(intervals) - 1) / 2) * 0.26
        mean, low, high = (np.array([row[part] for row in rows], dtype=float) for part in range(3))
        figure.add_scatter(
            x=[None if np.isnan(value) else value for value in mean],
            y=[index + offset for index in range(len(rows))],
            error_x={
                "type": "data",
                "symmetric": False,
                "array": list(np.nan_to_num(high - mean)),
                "arrayminus": list(np.nan_to_num(mean - low)),
                "thickness": 1.8,
                "width": 4,
            },
            mode="markers",
            name=name,
            customdata=list(labels),
            hovertemplate="%{customdata}: %{x:+.4f}<extra>" + name + "</extra>",
            marker={"color": _COLOURS[kind], "symbol": _SYMBOLS[kind], "size": 8},
        )
    styled(figure, 100 + 34 * len(labels))
    figure.add_vline(x=0, line_width=1.3, line_color=_GREY)
    figure.update_yaxes(
        tickvals=list(range(len(labels))),
        ticktext=list(labels),
        range=[len(labels) - 0.4, -0.6],
        zeroline=False,
    )
    figure.update_xaxes(title_text=x_title)
    figure.update_layout(
        legend={"orientation": "h", "y": 1, "yanchor": "bottom", "x": 0}, margin={"t": 50}
    )
    return figure
