"""The options of ``rating-train export``. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from rating_train.errors import one_error

ONNX_PRECISIONS = ("fp32", "fp16", "int8")


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What to export, and where.

    Attributes:
        run: run directory.
        out: folder to make; it must not exist.
        checkpoint: best, latest or a step.
        settings: ``section.key=value``, what is to differ from the run's configuration.
        onnx: precisions to write as ONNX graphs, of :data:`ONNX_PRECISIONS`.
        onnx_batch: items that a graph takes; 0 leaves it open.
        data: dataset to compare on; "" takes the run's.
        items: items to compare on.
        device: auto (a GPU if there is one), cuda or cpu.
        licence: licence of the weights, for the model card; "" takes the backbone's, where it is known.
    """

    run: str
    out: str
    checkpoint: str = "best"
    settings: tuple[str, ...] = ()
    onnx: tuple[str, ...] = ()
    onnx_batch: int = 0
    data: str = ""
    items: int = 256
    device: str = "auto"
    licence: str = ""


def check_options(options: ExportOptions) -> None:
    """Check the options before anything is loaded.

    Raises:
        UserError: all problems in one error.
    """
    problems = [
        f"--onnx {name} is not one of {', '.join(ONNX_PRECISIONS)}"
        for name in options.onnx
        if name not in ONNX_PRECISIONS
    ]
    if options.items < 64:
        problems.append(f"--items {options.items} is less than 64")
    if options.onnx_batch < 0:
        problems.append(f"--onnx-batch {options.onnx_batch} is negative")
    if problems:
        raise one_error(problems, where="export options")
