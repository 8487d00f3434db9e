"""CES, the cost-efficiency score of the rating challenge: accuracy weighted by size and compute.

    C   = (params / 1e9)^0.5 * (flops / 20e9)^0.5
    E   = min(1 + 0.05 ln(1/C), 1.10)   if C <= 1
        = 1 / (1 + 2 ln C)              if C > 1
    CES = max(0, PLCC) * E(C)

The formula says "flops" without defining how to count them, and the choice moves E of the same model from
about 1.0 to about 0.6. So a CES is never a bare number here: every row names the convention that it was
counted in.

Source of the formula and of the published values: arXiv 2605.27737.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from rating_train.errors import UserError, one_error

REFERENCE_PARAMS = 1e9
REFERENCE_FLOPS = 20e9
MAX_EFFICIENCY = 1.10

PAPER_CONVENTION = "mac_linear"
STRICT_CONVENTION = "flop_attention"

#: Convention -> what it counts. One multiply-accumulate (MAC) is two floating-point operations.
CONVENTIONS: Mapping[str, str] = MappingProxyType(
    {
        "mac_linear": "MACs of linear and convolution layers (the paper's)",
        "mac_attention": "MACs of linear and convolution layers and of attention products",
        "flop_linear": "FLOPs (2 per MAC) of linear and convolution layers",
        "flop_attention": "FLOPs (2 per MAC) of linear and convolution layers and of attention products",
    }
)


@dataclass(frozen=True)
class CesRow:
    """CES in one convention.

    Attributes:
        convention: a key of :data:`CONVENTIONS`.
        label: what that convention counts, in words.
        params: number of parameters.
        count: operations per item in this convention (MACs or FLOPs).
        c: the cost factor C, dimensionless.
        e: the efficiency factor E(C), dimensionless.
        plcc: the correlation in the CES, or ``None`` if it is undefined.
        ces: max(0, plcc) * e, or ``None`` if plcc is ``None``.
    """

    convention: str
    label: str
    params: float
    count: float
    c: float
    e: float
    plcc: float | None
    ces: float | None


def cost_factor(params: float, flops: float) -> float:
    """Return the cost factor C of the formula above.

    Args:
        params: number of parameters (not millions).
        flops: operations per item (not billions), in the convention that the caller names.

    Raises:
        UserError: a number that is not finite or not positive.
    """
    problems = [
        f"{name} is {value}, expected a finite number above 0"
        for name, value in (("params", params), ("flops", flops))
        if not (math.isfinite(value) and value > 0)
    ]
    if problems:
        raise one_error(problems, where="CES cost")
    return math.sqrt(params / REFERENCE_PARAMS) * math.sqrt(flops / REFERENCE_FLOPS)


def efficiency(c: float) -> float:
    """Return E(C) of the formula above: at most 1.10, exactly 1 at C = 1, continuous, non-increasing.

    Raises:
        UserError: a C that is not finite or not positive.
    """
    if not (math.isfinite(c) and c > 0):
        raise UserError(f"C is {c}", where="CES efficiency", expected="a finite number above 0")
    if c <= 1:
        return min(1 + 0.05 * math.log(1 / c), MAX_EFFICIENCY)
    return 1 / (1 + 2 * math.log(c))


def ces_table(plcc: float | None, params: float, counts: Mapping[str, float]) -> list[CesRow]:
    """Compute CES in every convention of ``counts``.

    Args:
        plcc: Pearson correlation in [-1, 1], or ``None`` if it is undefined.
        params: number of parameters (not millions).
        counts: convention (a key of :data:`CONVENTIONS`) -> operations per item (not billions).

    Returns:
        One row per convention, in the order of :data:`CONVENTIONS`.

    Raises:
        UserError: an unknown convention, a PLCC outside [-1, 1], or a count that is not positive.
    """
    unknown = sorted(set(counts) - set(CONVENTIONS))
    if unknown:
        raise UserError(
            f"unknown counting convention {', '.join(map(repr, unknown))}",
            where="CES table",
            expected=f"one of {', '.join(CONVENTIONS)}",
        )
    # A little slack: a correlation computed elsewhere may exceed 1 by rounding.
    if plcc is not None and not abs(plcc) <= 1 + 1e-9:
        raise UserError(f"PLCC is {plcc}", where="CES table", expected="a number in [-1, 1], or none")
    rows = []
    for convention, label in CONVENTIONS.items():
        if convention not in counts:
            continue
        c = cost_factor(params, counts[convention])
        e = efficiency(c)
        ces = None if plcc is None else max(0.0, plcc) * e
        rows.append(CesRow(convention, label, params, counts[convention], c, e, plcc, ces))
    return rows
