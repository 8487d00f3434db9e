"""What is looked at before a job opens its data, downloads anything or builds a model: local files and numbers only."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from rating_train import run_dir
from rating_train.checkpoint import store
from rating_train.checkpoint.resume import named_checkpoint
from rating_train.config.phases import check_stages, stage_configs
from rating_train.config.resolve import BatchPlan, plan_batch, source_shares
from rating_train.config.schema import Config
from rating_train.data.mixture import Mixture
from rating_train.data.workers.memory_need import batch_bytes, image_bytes
from rating_train.distributed import world as worlds
from rating_train.distributed.collectives import all_gather
from rating_train.distributed.world import World
from rating_train.errors import UserError, one_error
from rating_train.files import make_folder
from rating_train.model.architecture import KNOWN_ARCHITECTURES, Architecture, read_architecture
from rating_train.model.cost import activation_bytes, image_tokens
from rating_train.model.custom_loss import CustomLoss, load_custom_loss
from rating_train.processes import available_memory
from rating_train.shards.manifest import read_manifest, refuse_squares, refuse_unlike
from rating_train.shards.task import check_task_of_run
from rating_train.training.trackers import PACKAGES
from rating_train.weights.warm_start import check_source

log = logging.getLogger(__name__)

T = TypeVar("T")

_GIB = 2**30


def check_job(config: Config, run: Path, resume: str, world: World, device: torch.device) -> None:
    """Refuse what cannot be trained, with all problems in one error. Rank 0.

    Raises:
        UserError: ``resume`` names no checkpoint; the run directory cannot be made; the dataset, a split, a custom loss
            or the backbone's folder is missing; the batch does not divide, is larger than the split or does not fit in
            memory; the image does not divide; ``model.init_from`` is missing or has another width; a phase trains
            nothing of a model that lacks a part.
    """
    problems: list[UserError] = []

    def attempt(check: Callable[[], T]) -> T | None:
        try:
            return check()
        except UserError as e:
            problems.append(e)
            return None

    if resume not in ("auto", "never", "must"):
        attempt(lambda: named_checkpoint(resume))
    attempt(lambda: check_run_folder(run))
    attempt(lambda: check_data(config))
    if store.steps_present(run / run_dir.CHECKPOINTS_DIR):
        attempt(lambda: check_task_of_run(config, run))
    attempt(lambda: load_custom_loss(config.loss))
    attempt(lambda: check_optimizer(config))
    attempt(lambda: check_trackers(config))
    plan = attempt(lambda: plan_batch(config.batch.global_items, config.batch.micro_items, world.size))
    architecture = attempt(lambda: local_architecture(config))
    side = config.data.tiles_per_side
    visual = attempt(lambda: image_tokens(architecture, config.model_px, side)) if architecture else None
    if config.model.init_from and not store.steps_present(run / run_dir.CHECKPOINTS_DIR):
        attempt(lambda: check_source(config.model, architecture))
    attempt(lambda: check_stages(config))
    if plan is not None and not problems:
        attempt(lambda: check_memory(config, plan, visual or 0, architecture, world, device))
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise one_error([str(e) for e in problems], where=f"the configuration of {run}")


def check_optimizer(config: Config) -> None:
    """Refuse an optimizer whose package is not installed.

    Raises:
        UserError: see above.
    """
    if config.optim.kind == "adamw_8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "bitsandbytes is not installed",
            where="optim.kind=adamw_8bit",
            fix="pip install 'rating_train[eightbit]', or set optim.kind=adamw",
        )


def check_trackers(config: Config) -> None:
    """Refuse a tracker whose packages are not installed.

    Raises:
        UserError: see above; all that is missing in one error.
    """
    wanted = {package: name for name in config.tracking for package in PACKAGES.get(name, ())}
    missing = [package for package in wanted if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed",
            where=f"tracking: [{', '.join(config.tracking)}]",
            fix=f"pip install 'rating_train[tracking]', or leave out {wanted[missing[0]]}",
        )


def check_run_folder(run: Path) -> None:
    """Refuse a run directory that cannot be made or written; nothing is made yet.

    Raises:
        UserError: a part of its path is a file, or the nearest folder that exists cannot be written.
    """
    nearest = next(path for path in (run, *run.absolute().parents) if os.path.lexists(path))
    fix = "set runs_dir to a folder that all nodes can write to"
    if not nearest.is_dir():
        raise UserError(f"the run directory cannot be made: {nearest} is not a directory", where=run, fix=fix)
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"the run directory cannot be made: {nearest} cannot be written", where=run, fix=fix)


def make_run_folder(run: Path) -> None:
    """Make the run directory. Rank 0, after :func:`check_job`.

    Raises:
        UserError: the file system refuses.
    """
    try:
        for folder in run_dir.folders(run):
            make_folder(folder)
    except OSError as e:
        fix = "set runs_dir to a folder that all nodes can write to"
        raise UserError(f"the run directory cannot be made ({e.strerror})", where=run, fix=fix) from e


def check_data(config: Config) -> None:
    """Refuse local datasets that are missing, lack a split, cannot be mixed, or are smaller than one global batch.

    Raises:
        UserError: see above; all that is missing in one error.
    """
    data, sources = config.data, config.data.train_sources
    wanted = {source: {"train_split": data.train_split} for source in sources}
    wanted.setdefault(data.eval_source, {})["eval_split"] = data.eval_split
    manifests, problems = {}, []
    for source, splits in wanted.items():
        if source.remote:
            continue  # its manifest is fetched later
        try:
            manifests[source] = _manifest_with(splits, source.path)
        except UserError as e:
            problems.append(e)
    if problems:
        raise problems[0] if len(problems) == 1 else one_error([str(e) for e in problems], where="data")
    if not all(source in manifests for source in sources):
        return
    entries = [manifests[source]["splits"][data.train_split] for source in sources]
    items = [entry.get("items") for entry in entries]
    if not all(isinstance(count, int) for count in items):
        return  # the manifest is damaged, which is found when the split is opened
    paths = [source.path for source in sources]
    refuse_unlike(paths, [manifests[source] for source in sources])
    if data.tiling_px:
        refuse_squares(paths, [manifests[source] for source in sources])
    Mixture(items, source_shares(sources)).refuse_tiny_shares(paths)
    check_batch_fits(config.batch.global_items, sum(items), data.train_split)


def _manifest_with(splits: dict[str, str], path: str) -> dict[str, Any]:
    """Return the manifest of a local dataset that has these splits: setting -> name."""
    manifest = read_manifest(path)
    missing = [f"data.{key}={name}" for key, name in splits.items() if name not in manifest["splits"]]
    if missing:
        raise UserError(
            f"the dataset has no split {', '.join(missing)}",
            where=path,
            expected=f"one of {', '.join(manifest['splits'])}",
            fix="set data.train_split and data.eval_split, or prepare with another --val-fraction",
        )
    return manifest


def check_batch_fits(global_items: int, items: int, split: str) -> None:
    """Refuse a global batch that is larger than the split.

    Raises:
        UserError: one step would read items twice.
    """
    if global_items > items:
        raise UserError(
            f"a global batch of {global_items:,} items is larger than the split {split!r}, which has {items:,}",
            where="batch.global_items",
            expected=f"at most {items:,}",
            fix=f"set batch.global_items to {items:,} or less",
        )


def custom_loss_of_all(config: Config) -> CustomLoss | None:
    """Load the function that ``loss.kind`` names on this rank; ``None`` for a built-in loss. A collective.

    Raises:
        UserError: some rank, perhaps on another node, cannot load it, or loads another file than rank 0.
    """
    if not config.loss.is_custom:
        return None
    loss, failure = None, ""
    try:
        loss = load_custom_loss(config.loss)
    except UserError as e:
        failure = str(e)
    found = all_gather((loss.sha256 if loss else "", failure))
    wrong = [rank for rank, one in enumerate(found) if one[1] or one[0] != found[0][0]]
    if wrong:
        what = found[wrong[0]][1] or f"the file of the loss is not that of rank 0 (sha256 {found[0][0][:12]})"
        raise UserError(
            f"rank {wrong[0]}: {what}",
            where=f"loss.kind={config.loss.kind}",
            fix="put the file into a folder that all nodes see",
            on_all_ranks=True,
        )
    return loss


def local_architecture(config: Config) -> Architecture | None:
    """Return the backbone's shape where no network is needed for it, else ``None``.

    Raises:
        UserError: ``model.backbone`` is a path, and no folder with a config.json is there.
    """
    backbone = config.model.backbone
    if Path(backbone).is_dir() or backbone in KNOWN_ARCHITECTURES:
        return read_architecture(config.model)
    if backbone.startswith(("/", "./", "../", "~")) or Path(backbone).exists():
        raise UserError(
            "the backbone's folder is not there",
            where=f"model.backbone={backbone}",
            expected="a folder with config.json and model.safetensors, or a hub id",
            fix="check the path, or make a small model with `rating-train demo`",
        )
    return None


def check_memory(
    config: Config,
    plan: BatchPlan,
    visual: int,
    architecture: Architecture | None,
    world: World,
    device: torch.device,
) -> None:
    """Refuse a batch that cannot fit in memory, by an estimate from below.

    Counted: the items of one step of one rank in host memory, and what the backward pass of one micro-batch keeps on
    the device. Weights, optimizer state and attention are not: what passes may still be too large.

    Raises:
        UserError: with the estimate, the memory that is there, and what to change.
    """
    tokens = (config.data.text_tokens if config.model_fields else 0) + visual
    host = batch_bytes(plan.rank_items, image_bytes(config, config.data.train_sources[0]), tokens)
    available = available_memory() // world.local_size
    if host > available:
        raise UserError(
            f"one step of a rank reads {plan.rank_items:,} items, at least {host / _GIB:.1f} GiB; "
            f"{available / _GIB:.1f} GiB of memory are available to it",
            where="batch.global_items",
            fix="lower batch.global_items, or start more ranks",
        )
    if architecture is None:
        return
    kept = plan.micro_items * max(
        activation_bytes(
            architecture,
            config.model_px,
            tokens,
            freeze=phase.model.freeze,
            bf16=config.train.precision == "bf16",
            gradient_checkpointing=config.model.gradient_checkpointing,
            tiles_per_side=config.data.tiles_per_side,
        )
        for phase in stage_configs(config)
    )
    if device.type == "cuda":
        available = torch.cuda.get_device_properties(device).total_memory
    if kept > available:
        raise UserError(
            f"the backward pass of a micro-batch of {plan.micro_items:,} items keeps at least {kept / _GIB:.1f} GiB; "
            f"a rank has {available / _GIB:.1f} GiB",
            where="batch.micro_items",
            expected=f"at most {max(1, plan.micro_items * available // kept):,} by this estimate",
            fix="set batch.micro_items lower (the rest is accumulation), or model.gradient_checkpointing=true",
        )


def missing_cores(world: World, workers: int) -> list[str]:
    """Return the nodes whose ranks may use fewer cores than they have processes, in words. A collective.

    Args:
        world: this process's place.
        workers: DataLoader workers of each rank; a rank needs one core for itself and one for each of them.
    """
    if not hasattr(os, "sched_getaffinity"):  # Linux alone says which cores a process may use
        own: set[int] = set(range(os.cpu_count() or 1))
    else:
        own = os.sched_getaffinity(0)
    nodes: dict[str, tuple[int, set[int]]] = {}
    for name, cores in all_gather((worlds.node_name(), own)):
        ranks, union = nodes.get(name, (0, set()))
        nodes[name] = ranks + 1, union | cores
    return [
        f"{name}: {len(cores)} cores for {ranks} ranks with {workers} DataLoader workers each"
        for name, (ranks, cores) in nodes.items()
        if len(cores) < ranks * (workers + 1)
    ]


def warn_of_missing_cores(config: Config, world: World) -> None:
    """Log one warning where DataLoader workers have to share cores. A collective."""
    short = missing_cores(world, config.data.workers)
    if short and world.is_main:
        log.warning(
            "%s%s: loading may be slower than training. Under Slurm give --cpus-per-task=%d; or set data.workers lower",
            "; ".join(short[:3]), f"; and {len(short) - 3} more nodes" if len(short) > 3 else "",
            config.data.workers + 1,
        )  # fmt: skip
