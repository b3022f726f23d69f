"""Checks that no text or data in a figure is cut off or hidden, without comparing pixels."""

import itertools

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg


def check_panels(figure):
    """Draws a figure and checks its texts.

    All texts are whole, no legend covers data or another text, and no tick labels overlap.
    """
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    whole = figure.bbox.padded(1.0)
    for axes in figure.axes:
        texts = [axes.title, axes.xaxis.label, axes.yaxis.label]
        boxes = [text.get_window_extent(renderer) for text in texts if text.get_text()]
        for axis in (axes.xaxis, axes.yaxis):
            labels = _tick_boxes(axis, renderer)
            boxes += labels
            for one, next_one in itertools.pairwise(labels):
                assert not one.overlaps(next_one), f"tick labels of {axes.get_title()}"
        legend = axes.get_legend()
        if legend:
            box = legend.get_window_extent(renderer)
            boxes.append(box)
            assert not box.overlaps(axes.get_window_extent(renderer)), axes.get_title()
            assert not any(box.overlaps(other) for other in boxes[:-1]), axes.get_title()
        for box in boxes:
            assert whole.contains(box.x0, box.y0) and whole.contains(box.x1, box.y1), (
                f"a text of {axes.get_title()} is cut off"
            )


def _tick_boxes(axis, renderer):
    """The boxes of those tick labels of an axis that are shown."""
    low, high = sorted(axis.get_view_interval())
    edge = 1e-9 * (high - low)
    return [
        tick.label1.get_window_extent(renderer)
        for tick in axis.get_major_ticks()
        if tick.label1.get_visible()
        and tick.label1.get_text()
        and low - edge <= tick.get_loc() <= high + edge
    ]


def inside(axes, points):
    """Whether each of the points [n, 2] lies within the limits of the axes."""
    points = np.asarray(points, dtype=float)
    ends = np.array([sorted(axes.get_xlim()), sorted(axes.get_ylim())])
    return ((points >= ends[:, 0]) & (points <= ends[:, 1])).all(axis=1)
