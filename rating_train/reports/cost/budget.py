"""What a cost affords: the PLCC that a CES needs, and the largest image and text with C <= 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rating_train.log import text_table
from rating_train.model.accounting import SHOWN, image_sizes, item_cost, longest_affordable, plcc_needed
from rating_train.model.architecture import Architecture
from rating_train.model.cost import visual_tokens
from rating_train.reports.cost.prompt_lengths import COVERED, Lengths

CES_LEVELS = (0.3, 0.4, 0.5, 0.6, 0.7)
_LARGEST_PX = 768
_SHORTEST_TEXT = 48  # tokens: the template and a few words


def needed_lines(arch: Architecture, image_px: int, text_tokens: int) -> list[str]:
    """Return a table: the PLCC at which the configuration has a CES, in both conventions."""
    cost = item_cost(arch, image_px, visual_tokens(arch, image_px) + text_tokens)
    header = ["CES", *(f"PLCC needed, {name} [{convention}]" for convention, name in SHOWN.items())]
    body = []
    for ces in CES_LEVELS:
        needed = [plcc_needed(ces, cost.parameters, cost.padded[convention]) for convention in SHOWN]
        body.append([f"{ces:.2f}", *("out of reach" if v is None else f"{v:.4f}" for v in needed)])
    return text_table(header, body)


def affordable_lines(
    arch: Architecture, image_px: int, measured: Mapping[int, Lengths] | None = None
) -> list[str]:
    """Return a table: for each image side, the most text tokens with C <= 1, and the largest measured L that fits.

    Args:
        arch: the backbone and its head.
        image_px: the configured side, which is marked; 0 of a model that reads no image.
        measured: L -> lengths on the data; ``None`` leaves L out.
    """
    least = 2 * arch.vision.patch * arch.scale_factor
    sizes = [px for px in image_sizes(arch, _LARGEST_PX) if px >= least] if image_px else [0]
    header = ["image (px)", "visual tokens"]
    for convention, name in SHOWN.items():
        header.append(f"text tokens, {name} [{convention}]")
        if measured:
            header.append("largest L")
    body = []
    for px in sizes:
        visual = visual_tokens(arch, px)
        line = [f"{px}{' (configured)' if px == image_px else ''}", f"{visual}"]
        for convention in SHOWN:
            longest = longest_affordable(arch, px, convention, visual + _SHORTEST_TEXT)
            line.append("C > 1" if longest is None else f"{longest - visual:,}")
            if measured:
                line.append("-" if longest is None else _largest(measured, longest - visual))
        body.append(line)
    lines = text_table(header, body)
    if measured:
        lines.append(
            f"largest L: of those measured ({', '.join(map(str, sorted(measured)))}), the largest at which the text "
            f"tokens hold {100 * COVERED:g} % of the items uncut"
        )
    return lines


def _largest(measured: Mapping[int, Lengths], tokens: int) -> str:
    fitting: Sequence[int] = [chars for chars, found in measured.items() if found.needed() <= tokens]
    return f"{max(fitting)}" if fitting else "none"
