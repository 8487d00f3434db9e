"""The verb ``predict``: score all rows of an input, on any number of ranks, across kills, into one file."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rating_train.config.schema import Config
from rating_train.distributed.collectives import all_gather, on_main
from rating_train.distributed.world import World
from rating_train.errors import UserError
from rating_train.log import Progress
from rating_train.prediction.batches import claimed_parts, decoded_units, fetcher, read_units
from rating_train.prediction.decode import Decoded, Decoder
from rating_train.prediction.model import FoundModel, Scorer, find_model, load_scorer
from rating_train.prediction.options import PredictOptions, check_options
from rating_train.prediction.output import Summary, merge, merge_submission, part_text
from rating_train.prediction.rows import DatasetRows, Rows, SourceRows
from rating_train.prediction.work_dir import WorkDir
from rating_train.prepare.images.embedded import have_images
from rating_train.prepare.images.fetch_options import parse_fetch_options
from rating_train.prepare.images.stores import open_store
from rating_train.prepare.records.folders import expand_sources
from rating_train.training import setup

log = logging.getLogger(__name__)

#: Ranks end within a part of one another, and reading the input's end may take a while: longer than this is a hang.
_TIMEOUT_MINUTES = 120.0


@dataclass(frozen=True)
class Plan:
    """What rank 0 found out before the work begins."""

    found: FoundModel
    options: PredictOptions
    rows: int
    parts: int
    missing: list[int]
    claims: str
    stored_images: bool  # in a folder, an archive, or the sources themselves


def predict(options: PredictOptions) -> Summary | None:
    """Score all rows and write the output. A collective; the summary is that of rank 0, on all ranks.

    Returns:
        what was written, ``None`` if an earlier start had written everything and only had to tidy up.

    Raises:
        UserError: impossible options, no such model, unreadable sources, an unfinished prediction with other options,
            another command that writes the same output.
    """
    world, device = setup.join_job(timeout_minutes=_TIMEOUT_MINUTES, wanted=options.device)
    work = WorkDir(options.out)
    with contextlib.ExitStack() as held:
        plan = on_main(lambda: _plan(options, work, held))
        if plan is None:
            return None
        options = plan.options
        rows = _open_rows(options, plan.found.config)
        scorer = load_scorer(plan.found, device)
        _score_parts(plan, scorer, rows, work, world)
        return on_main(lambda: _finish(plan, scorer, work))


def _plan(options: PredictOptions, work: WorkDir, held: contextlib.ExitStack) -> Plan | None:
    options = dataclasses.replace(options, source=expand_sources(options.source))
    check_options(options)
    held.enter_context(work.locked())
    if work.is_merged():
        log.info("%s is complete: an earlier start was stopped while it tidied up", work.out)
        work.remove()
        return None
    found = find_model(Path(options.model), options.checkpoint, options.settings)
    task = found.config.task
    stored = bool(options.images) or have_images(options.source, options.reading(task))
    needed = bool(options.source) and "image" in found.config.model.inputs
    if needed and not stored and not options.fetch:
        raise UserError("neither --images nor --fetch is given", where="predict options")
    if options.submission and not task.is_default:
        raise UserError(
            f"a submission holds stars; this model predicts {task.target.name}", where="--submission"
        )
    if options.data and not options.split:
        options = dataclasses.replace(options, split=found.config.data.eval_split)
    work.belongs_to(_identity(options, found))
    rows = work.rows()
    if rows is None:
        log.info("counting the rows of the input")
        rows = _open_rows(options, found.config).count()
        work.note_rows(rows)
    parts = math.ceil(rows / options.part_rows)
    finished = work.finished()
    missing = [number for number in range(parts) if number not in finished]
    log.info(
        "%d rows in %d parts, %d of them finished; the model is %s",
        rows, parts, parts - len(missing), found.identity["model"],
    )  # fmt: skip
    return Plan(found, options, rows, parts, missing, work.new_claims(), stored)


def _identity(options: PredictOptions, found: FoundModel) -> dict[str, Any]:
    """All that the lines of a part depend on; the number of ranks and the file's format are not among it."""
    config = found.config
    return {
        **found.identity,
        **options.input_identity(),
        "part_rows": options.part_rows,
        "batch_items": options.batch_items,
        "precision": config.train.precision,
        "image_px": config.model_px,
        "stored_px": found.squares.size_px,
        "jpeg_quality": found.squares.jpeg_quality,
        "field_chars": config.data.field_chars,
        "text_tokens": config.data.text_tokens,
    }


def _open_rows(options: PredictOptions, config: Config) -> Rows:
    if options.data:
        return DatasetRows(options.data, options.split)
    return SourceRows(options.source, options.reading(config.task, config.model.inputs))


def _score_parts(plan: Plan, scorer: Scorer, rows: Rows, work: WorkDir, world: World) -> None:
    """Score the missing parts, shared out among the ranks as they come free. A collective."""
    options = plan.options
    store = open_store(options.images, sources=options.source) if plan.stored_images else None
    decoder = Decoder(scorer.collator, plan.found.squares, store, plan.found.config.task)
    fetched = fetcher(work, parse_fetch_options(options.fetch_set)) if options.fetch else None
    parts = claimed_parts(work, plan.claims, plan.missing)
    todo = read_units(rows, parts, options.part_rows, plan.rows, options.batch_items, fetched)
    left = sum(_rows_of(plan, number) for number in plan.missing)
    progress = Progress("predict", plan.rows, "rows", done=plan.rows - left) if world.is_main else None
    committed: list[int] = []
    decoded = decoded_units(decoder, todo, options.workers, pinned=scorer.predictor.device.type == "cuda")
    for number, lines, done in _scored(scorer, decoded):
        if lines is not None:
            work.commit(number, lines)
            committed.append(number)
        if progress is not None:
            share = min(done * world.size, left)  # the other ranks are about as fast
            left -= share
            progress.add(share)
    if progress is not None:
        progress.close()
    # Told, not listed: a shared file system may show another node's files late.
    finished = {number for numbers in all_gather(committed) for number in numbers}
    unfinished = sorted(set(plan.missing) - finished)
    if unfinished:
        raise UserError(
            f"{len(unfinished)} parts were taken and not finished, the first is part {unfinished[0]}",
            where=work.path,
            fix="run the same command again: it continues with them",
            on_all_ranks=True,
        )


def _finish(plan: Plan, scorer: Scorer, work: WorkDir) -> Summary:
    """Merge the parts into the output and remove them. Rank 0."""
    options = plan.options
    if options.submission:
        params, operations = scorer.cost(options.convention)
        summary = merge_submission(work, plan.parts, plan.rows, params, operations, options.fill)
    else:
        summary = merge(work, plan.parts, plan.rows)
    work.remove()
    return summary


def _rows_of(plan: Plan, number: int) -> int:
    return min(plan.options.part_rows, plan.rows - number * plan.options.part_rows)


def _scored(scorer: Scorer, units: Iterator[Decoded]) -> Iterator[tuple[int, str | None, int]]:
    """Yield (part, its lines once it is complete, rows scored) for each unit.

    The scores of a unit are waited for when the next one is under way, so that a GPU does not wait for this process.
    """
    ids: list[str] = []
    scores: list[float | None] = []
    reasons: list[str] = []

    def take(unit: Decoded, ratings: torch.Tensor | None) -> tuple[int, str | None, int]:
        values = iter([] if ratings is None else ratings.cpu().tolist())
        for item_id, reason in zip(unit.ids, unit.reasons, strict=True):
            score = None if reason else next(values)
            if score is not None and not math.isfinite(score):
                score, reason = None, f"score_not_finite: {score}"
            ids.append(item_id)
            scores.append(score)
            reasons.append(reason)
        if not unit.last:
            return unit.part, None, len(unit.ids)
        lines = part_text(ids, scores, reasons)
        for column in (ids, scores, reasons):
            column.clear()
        return unit.part, lines, len(unit.ids)

    waiting: tuple[Decoded, torch.Tensor | None] | None = None
    for unit in units:
        launched = scorer.predictor.launch(unit.batch) if unit.batch else None
        if waiting is not None:
            yield take(*waiting)
        waiting = (unit, launched)
    if waiting is not None:
        yield take(*waiting)
