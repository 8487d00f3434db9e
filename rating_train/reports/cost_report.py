"""``rating-train cost``: parameters, operations, C, E and CES of a model, in every counting convention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rating_train.config.schema import PARTS
from rating_train.errors import UserError
from rating_train.log import text_table
from rating_train.model.architecture import Architecture
from rating_train.model.cost import ForwardCost, count_forward, count_parameters, image_tokens
from rating_train.scoring.ces import CONVENTIONS, PAPER_CONVENTION, CesRow, ces_table


@dataclass(frozen=True)
class CostReport:
    """The cost of one item.

    Attributes:
        image_px: side of the square image, in pixels; 0 of a model that reads none.
        visual_tokens: tokens of the image.
        text_tokens: all other tokens of the fixed sequence: template, fields and padding.
        parameters: part -> number of parameters, with ``backbone_total`` and ``total``.
        forward: operations of one forward pass.
        rows: C, E and CES in every convention.
        tiles_per_side: with tiling, the most tiles beside or above one another.
    """

    image_px: int
    visual_tokens: int
    text_tokens: int
    parameters: dict[str, int]
    forward: ForwardCost
    rows: list[CesRow]
    tiles_per_side: int = 0


def measure_cost(
    arch: Architecture, image_px: int, text_tokens: int, plcc: float | None, tiles_per_side: int = 0
) -> CostReport:
    """Compute the cost of one item in closed form.

    Args:
        arch: the backbone and its head.
        image_px: side of the square image, in pixels.
        text_tokens: tokens of the fixed sequence that are not visual: template, fields and padding.
        plcc: the Pearson correlation in the CES, or ``None``: then the CES is ``None``.
        tiles_per_side: with tiling, the most tiles beside or above one another.

    Raises:
        UserError: an image size that does not fit the patches, a text length below 0, a PLCC outside [-1, 1].
    """
    visual = image_tokens(arch, image_px, tiles_per_side)
    if text_tokens < 0:
        raise UserError(f"text length is {text_tokens} tokens", where="cost", expected="0 or more")
    parameters = count_parameters(arch, image_px)
    forward = count_forward(arch, image_px, visual + text_tokens, tiles_per_side)
    rows = ces_table(plcc, parameters["total"], forward.totals())
    return CostReport(image_px, visual, text_tokens, parameters, forward, rows, tiles_per_side)


def cost_report(
    arch: Architecture, image_px: int, text_tokens: int, plcc: float | None, tiles_per_side: int = 0
) -> str:
    """Return :func:`measure_cost` as text, rendered by :func:`render_cost`."""
    return render_cost(measure_cost(arch, image_px, text_tokens, plcc, tiles_per_side))


def render_cost(report: CostReport) -> str:
    """Return the report as plain text: one table after another, with a newline at the end."""
    sequence = report.visual_tokens + report.text_tokens
    image, side = f"image {report.image_px} x {report.image_px} px", report.tiles_per_side
    if not report.image_px:
        image = "no image"
    elif side:
        image += f" and at most {side} x {side} tiles of that size, with their markers,"
    lines = [
        f"Input of one item: {image} = {report.visual_tokens} visual tokens, + {report.text_tokens} text tokens "
        f"= sequence of {sequence}",
        "",
        *_operations_table(report),
        "",
        *_ces_lines(report.rows),
        "",
        "Conventions (one multiply-accumulate, MAC, is two FLOPs):",
        *(f"  {name:<15} {label}" for name, label in CONVENTIONS.items()),
        "Attention products are counted over the full T x T square. Left out everywhere: norms, activations,",
        "softmax, rotary angles, additions, the embedding look-up.",
    ]
    return "\n".join(lines) + "\n"


def _operations_table(report: CostReport) -> list[str]:
    header = ["part", "parameters", *(f"{name} (G)" for name in CONVENTIONS)]
    by_part = {name: report.forward.by_part(name) for name in CONVENTIONS}
    body = [
        [part, f"{report.parameters[part]:,}", *(f"{by_part[name][part] / 1e9:.3f}" for name in CONVENTIONS)]
        for part in PARTS
    ]
    totals = [f"{report.forward.total(name) / 1e9:.3f}" for name in CONVENTIONS]
    body.append(["total", f"{report.parameters['total']:,}", *totals])
    note = f"Backbone without the regression head: {report.parameters['backbone_total']:,} parameters."
    return [*text_table(header, body), note]


def _ces_lines(rows: Sequence[CesRow]) -> list[str]:
    header = ["convention", "operations (G)", "C", "E", "PLCC", "CES"]
    body = []
    for row in rows:
        mark = " (the paper's)" if row.convention == PAPER_CONVENTION else ""
        numbers = [f"{row.count / 1e9:.3f}", f"{row.c:.4f}", f"{row.e:.4f}"]
        body.append([row.convention + mark, *numbers, _optional(row.plcc), _optional(row.ces)])
    lines = text_table(header, body)
    if any(row.plcc is None for row in rows):
        lines.append("PLCC and CES: not given (CES = max(0, PLCC) x E needs a PLCC).")
    return lines


def _optional(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
