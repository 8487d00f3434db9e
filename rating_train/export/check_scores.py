"""Whether an exported folder scores as the checkpoint does: both score the same items, in processes of their own."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rating_train.config.task import PAPER, Target
from rating_train.errors import UserError
from rating_train.export import onnx_graph, reload
from rating_train.files import read_json
from rating_train.log import text_table
from rating_train.prediction.model import Scorer
from rating_train.prediction.rows import DatasetRows
from rating_train.prepare.images.square import grey_square
from rating_train.scoring.metrics import score
from rating_train.shards.manifest import read_manifest
from rating_train.shards.schema import PREDICT_SPLIT

LEAST_ITEMS = 64
_BLANK = grey_square(16)  # of an item without an image: not looked at
#: In the checkpoint's own precision the export runs the same operations, so the scores are equal (seen: 0). This bound
#: allows for kernels that are chosen otherwise in another process; a wrong pixel or token moves scores by far more.
SAME_PRECISION_STARS = 1e-4
#: fp32 against bf16: roundings of bf16, which the checkpoint was evaluated with. Beyond it, something else differs.
OTHER_PRECISION_STARS = 0.25
#: ONNX graphs against PyTorch in fp32. Of int8 the change is reported: how much it may cost is its user's decision.
GRAPH_STARS = {"fp32": 1e-4, "fp16": 0.1, "int8": math.inf}


@dataclass(frozen=True)
class Compared:
    """One way to run the exported model, against a reference on the same items.

    Attributes:
        what: what ran, for example ``AutoModel``.
        precision: fp32, bf16, int8 and so on.
        against: the reference.
        largest: largest difference of two scores, in the unit of the target.
        mean: mean difference, in the same unit.
        plcc: of these scores and the true ratings; ``None`` where it is undefined.
        plcc_change: PLCC minus the checkpoint's; ``None`` where either is undefined.
        bound: largest difference that is allowed; ``inf`` if it is only reported.
    """

    what: str
    precision: str
    against: str
    largest: float
    mean: float
    plcc: float | None
    plcc_change: float | None
    bound: float

    @property
    def ok(self) -> bool:
        """Whether the difference is within its bound; a NaN is not."""
        return self.largest <= self.bound


@dataclass(frozen=True)
class Items:
    """Items to compare on: stored samples, the checkpoint's scores, the true ratings.

    Attributes:
        fields: the text fields of a sample.
        target: what is predicted.
    """

    samples: list[dict[str, Any]]
    scores: list[float]
    ratings: list[float]
    fields: tuple[str, ...] = PAPER.field_names
    target: Target = PAPER.target

    @property
    def size(self) -> float:
        """The size of a difference that counts as much as one star does: a quarter of the scale, else of the scores."""
        if self.target.bounds is None or self.target.transform != "none":
            return max(map(abs, self.scores), default=1.0) or 1.0
        low, high = self.target.bounds
        return (high - low) / 4

    @property
    def plcc(self) -> float | None:
        """PLCC of the checkpoint on these items."""
        return score(self.scores, self.ratings).plcc

    def compared(
        self,
        what: str,
        precision: str,
        scores: Sequence[float],
        bound: float = math.inf,
        reference: tuple[str, Sequence[float]] | None = None,
    ) -> Compared:
        """Compare scores of the same items with the checkpoint's, or with those of a named reference."""
        against, expected = reference or ("checkpoint", self.scores)
        found = np.asarray(scores, dtype=np.float64)
        difference = np.abs(found - np.asarray(expected))
        plcc = score(found, self.ratings).plcc if np.isfinite(found).all() else None
        change = None if plcc is None or self.plcc is None else plcc - self.plcc
        largest, mean = float(difference.max()), float(difference.mean())
        return Compared(what, precision, against, largest, mean, plcc, change, bound)


def score_items(scorer: Scorer, data: str, split: str, count: int) -> Items:
    """Score the first items of a dataset with the checkpoint: of ``split``, then of its other splits.

    Raises:
        UserError: no dataset is there, or it has fewer than :data:`LEAST_ITEMS` items.
    """
    splits = [name for name in read_manifest(data)["splits"] if name != PREDICT_SPLIT]
    samples: list[dict[str, Any]] = []
    for name in sorted(splits, key=lambda name: name != split):
        rows = DatasetRows(data, name)
        samples += [row.sample for row in rows.read(0, min(rows.count(), count - len(samples))) if row.sample]
    if len(samples) < LEAST_ITEMS:
        raise UserError(
            f"the dataset has {len(samples)} items to compare the export on",
            where=data,
            expected=f"at least {LEAST_ITEMS}",
            fix="give another one with --data",
        )
    scores: list[float] = []
    for part in batches(samples):
        scores += scorer.predictor(scorer.collator(part)).tolist()
    return Items(
        samples,
        scores,
        [float(sample["rating"]) for sample in samples],
        scorer.inputs.prompt.words.names,
        scorer.found.config.task.target,
    )


def batches(samples: list[dict[str, Any]], count: int = reload.BATCH_ITEMS) -> Iterable[list[dict[str, Any]]]:
    """Yield samples in the batches that both sides score: in bf16, another batch may round otherwise."""
    return (samples[i : i + count] for i in range(0, len(samples), count))


def compare_reloaded(
    folder: Path, items: Items, own: str, device: torch.device
) -> tuple[list[Compared], list[float]]:
    """Load the folder in a process without this package, and compare its scores in the run's precision and in fp32.

    Args:
        folder: the exported folder.
        items: what the checkpoint scored.
        own: precision that the checkpoint was scored in: ``bf16``, ``fp32`` or ``autocast``.
        device: where the checkpoint was scored.

    Returns:
        The comparisons, and the scores in fp32.

    Raises:
        UserError: the folder cannot be loaded; the process's last lines are in the message.
    """
    precisions = [own] if own == "fp32" else [own, "fp32"]
    names = items.fields
    with tempfile.TemporaryDirectory(prefix="rating_train-export-") as temporary:
        work = Path(temporary)
        for number, sample in enumerate(items.samples):
            (work / f"{number}.jpg").write_bytes(sample.get("image") or _BLANK)
        lines = (json.dumps({name: sample[name] for name in names}) for sample in items.samples)
        (work / "items.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
        # The loader of remote code keeps a copy of it: here among what is removed.
        command = ["env", f"HF_MODULES_CACHE={work / 'modules'}", "HF_HUB_OFFLINE=1", sys.executable]
        paths = [reload.__file__, str(folder.resolve()), str(work), str(work / "scores.json")]
        command += [*paths, device.type, *precisions]
        done = subprocess.run(command, capture_output=True, text=True, cwd=work)
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.strip()][-1:] or [
                f"exit code {done.returncode}"
            ]
            raise UserError(
                f"the export cannot be loaded again ({said[0]}); nothing was written", where=folder
            )
        scores: Mapping[str, list[float]] = read_json(work / "scores.json")
    bounds = {own: SAME_PRECISION_STARS * items.size}
    compared = [
        items.compared(
            "AutoModel",
            precision,
            scores[precision],
            bounds.get(precision, OTHER_PRECISION_STARS * items.size),
        )
        for precision in precisions
    ]
    return compared, scores["fp32"]


def compare_graphs(
    folder: Path, items: Items, scorer: Scorer, precisions: Sequence[str], batch: int, fp32: list[float]
) -> list[Compared]:
    """Score the items with ONNX graphs, and compare with what PyTorch computes in fp32.

    Args:
        folder: of the graphs.
        items: what the checkpoint scored.
        scorer: for its collator.
        precisions: of the graphs.
        batch: items that a graph takes; 0: any number.
        fp32: scores of PyTorch.
    """
    compared = []
    for precision in precisions:
        predict = onnx_graph.open_graph(folder / onnx_graph.FILES[precision])
        scores: list[float] = []
        for part in batches(items.samples, batch or reload.BATCH_ITEMS):
            # A graph for a fixed number of items gets them: the last ones come again.
            filled = part + part[-1:] * (batch - len(part))
            scores += predict(scorer.collator(filled)).tolist()[: len(part)]
        bound = GRAPH_STARS[precision] * items.size
        compared.append(items.compared("ONNX", precision, scores, bound, ("AutoModel fp32", fp32)))
    return compared


def render(items: Items, own: str, compared: Sequence[Compared]) -> str:
    """Return the comparison as a table for a terminal and the model card."""
    header = ("what", "precision", "compared with", "largest difference", "mean", "PLCC", "change of PLCC")
    rows = [("checkpoint", own, "", "", "", _number(items.plcc), "")]
    for c in compared:
        change = "undefined" if c.plcc_change is None else f"{c.plcc_change:+.5f}"
        largest, mean = (f"{value:.2e}{items.target.suffix}" for value in (c.largest, c.mean))
        rows.append((c.what, c.precision, c.against, largest, mean, _number(c.plcc), change))
    return "\n".join(text_table(header, rows))


def check(compared: Sequence[Compared], folder: Path) -> None:
    """Refuse an export that does not score as the checkpoint.

    Raises:
        UserError: names each difference beyond its bound.
    """
    problems = [
        f"{c.what} in {c.precision} differs by up to {c.largest:.3g} (allowed: {c.bound:g})"
        for c in compared
        if not c.ok
    ]
    if problems:
        raise UserError(
            f"the export does not score as the checkpoint: {'; '.join(problems)}; nothing was written",
            where=folder,
        )


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.5f}"
