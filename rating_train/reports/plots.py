"""Figures without global state: no pyplot, no display, atomic writes. Imports matplotlib only to draw."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from rating_train.files import atomic_write_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def plain(text: str) -> str:
    """Return text that matplotlib shows literally: two dollar signs would be parsed as a formula, or fail."""
    return text.replace("$", r"\$")


def new_figure(width: float, height: float) -> Figure:
    """Return a figure of ``width`` x ``height`` inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG at 120 dots per inch, without the top and right spines of its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    for axes in (a for a in figure.axes if a.get_label() != "<colorbar>"):
        axes.spines[["top", "right"]].set_visible(False)
    png = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(png, format="png", dpi=120)
    atomic_write_bytes(path, png.getvalue())
