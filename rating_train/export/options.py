"""The options of ``rating-train export``, checked once with all problems in one error. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rating_train.config.fields import bound_problems, setting
from rating_train.errors import one_error


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What to export, and where. ``settings``: ``section.key=value`` that differ from the run's configuration."""

    run: str = setting(doc="run directory")
    out: str = setting(doc="folder to make; it must not exist")
    checkpoint: str = setting("best", "best, latest or a step")
    settings: tuple[str, ...] = ()
    onnx: tuple[Literal["fp32", "fp16", "int8"], ...] = setting((), "precisions to write as ONNX graphs too")
    onnx_batch: int = setting(0, "items that a graph takes; 0 leaves their number open", low=0)
    data: str = setting("", "dataset to compare on; by default the run's")
    items: int = setting(256, "items to compare on", low=64)
    device: Literal["auto", "cuda", "cpu"] = setting(
        "auto", "where both are scored; auto is a GPU if there is one"
    )
    licence: str = setting("", "licence for the model card; by default the backbone's, where it is known")


def check_options(options: ExportOptions) -> None:
    """Check the options before anything is loaded.

    Raises:
        UserError: all problems in one error.
    """
    if problems := list(bound_problems(options).values()):
        raise one_error(problems, where="export options")
