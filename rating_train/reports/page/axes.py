"""Scales and ticks of a chart, and the SVG text of its frame."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 440.0, 270.0
LEFT, RIGHT, TOP, BOTTOM = 52.0, 14.0, 14.0, 40.0


def number(value: float) -> str:
    """Return a tick's number as people write it: ``0.25``, ``1,000``, ``2e-05``."""
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e5:
        text = f"{value:,.4f}".rstrip("0").rstrip(".")
        return text if text not in ("-0", "") else "0"
    return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Return round numbers within [low, high]: steps of 1, 2 or 5 times a power of ten."""
    span = high - low
    if not span > 0 or not math.isfinite(span):
        return [low]
    raw = span / about
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    found = [round(k * step, 12) for k in range(first, first + 4 * about) if k * step <= high + 1e-9 * span]
    return found or [low]


def log_ticks(low: float, high: float) -> list[float]:
    """Return powers of ten within [low, high], with 2 and 5 between them where there are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1,) if len(powers) > 4 else (1, 2, 5)
    found = [f * 10.0**p for p in powers for f in factors]
    inside = [v for v in found if low * 0.999 <= v <= high * 1.001]
    return inside if len(inside) <= 8 else inside[:: -(-len(inside) // 6)]


@dataclass(frozen=True)
class Axis:
    """One scale.

    Attributes:
        low: value at the start.
        high: value at the end.
        start: position of ``low``, in units of the drawing.
        end: position of ``high``.
        log: whether it is logarithmic.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """Return the position of a value, kept within the drawing."""
        f: Callable[[float], float] = math.log10 if self.log else float
        low, high = f(self.low), f(self.high)
        share = (f(max(value, self.low) if self.log else value) - low) / (high - low)
        return self.start + (self.end - self.start) * min(1.05, max(-0.05, share))

    def ticks(self, about: int = 5) -> list[float]:
        """Return where to draw lines."""
        return log_ticks(self.low, self.high) if self.log else ticks(self.low, self.high, about)


def axis(
    values: Sequence[float],
    start: float,
    end: float,
    *,
    log: bool = False,
    zero: bool = False,
    margin: float = 0.04,
) -> Axis:
    """Return a scale that holds all values, and 0 if asked for."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    log = log and low > 0
    if zero:
        low, high = min(0.0, low), max(0.0, high)
    if high <= low:
        pad = abs(low) * 0.1 or 1.0
        low, high = (low / 1.5, high * 1.5) if log else (low - pad, high + pad)
    elif log:
        low, high = low / (high / low) ** margin, high * (high / low) ** margin
    else:
        pad = margin * (high - low)
        low, high = (low if zero and low == 0 else low - pad), high + pad
    return Axis(low, high, start, end, log)


def svg(body: str, label: str, width: float = WIDTH, height: float = HEIGHT, kind: str = "plain") -> Markup:
    """Return a drawing that scales with the page, with its description for screen readers."""
    return Markup(
        f'<svg class="{kind}" viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(label)}" '
        f'preserveAspectRatio="xMidYMid meet">{body}</svg>'
    )


def text(x: float, y: float, content: str, anchor: str = "middle", kind: str = "") -> str:
    """Return one line of text."""
    style = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{style}>{escape(content)}</text>'


def frame(x: Axis, y: Axis, x_label: str, y_label: str, height: float = HEIGHT) -> str:
    """Return grid lines, numbers and names of both axes."""
    parts = []
    bottom = height - BOTTOM
    for v in y.ticks():
        at = y.at(v)
        parts.append(f'<line class="grid" x1="{x.start:.1f}" x2="{x.end:.1f}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(text(x.start - 6, at + 4, number(v), "end"))
    for v in x.ticks(6):
        at = x.at(v)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{y.end:.1f}" y2="{bottom:.1f}"/>')
        parts.append(text(at, bottom + 15, number(v)))
    parts.append(text((x.start + x.end) / 2, height - 6, x_label, kind="name"))
    if y_label:
        middle = (y.start + y.end) / 2
        parts.append(
            f'<text class="name" text-anchor="middle" transform="translate(12 {middle:.1f}) rotate(-90)">'
            f"{escape(y_label)}</text>"
        )
    return "".join(parts)
