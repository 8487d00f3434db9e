"""Where a configuration comes from: defaults < `base:` chain < the YAML file < `--set a.b=v`.

All problems of all sources are collected and raised in one :class:`~rating_train.errors.UserError`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from rating_train.config.fields import Rule, broken_rules, read
from rating_train.config.phases import stage_problems
from rating_train.config.schema import LOSSES, PARTS, Config, to_dict
from rating_train.config.task import task_problems
from rating_train.config.yaml_reader import parse_setting, parse_yaml
from rating_train.errors import UserError, one_error
from rating_train.extensions import load_extensions
from rating_train.files import retry

BASE_KEY = "base"
_MAX_BASES = 16


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file with its `base:` chain, apply `a.b=v` overrides, and return the frozen result.

    Raises:
        UserError: a file that is missing, unreadable or not valid YAML; or (all together) unknown keys, wrong
            types, values out of bounds, and settings that exclude each other.
    """
    merged: dict[str, Any] = {}
    for layer in _chain(Path(path)):
        _merge(merged, layer)
    problems: dict[str, str] = {}
    for text in overrides:
        _apply_override(merged, text, problems)
    if not merged and not problems:
        raise UserError(
            "the configuration is empty",
            where=path,
            fix="give at least `name: NAME` and `data: {path: DATA}`",
        )
    return config_from_dict(merged, path, problems)


def config_from_dict(
    values: Mapping[str, Any], where: str | Path = "configuration", problems: dict[str, str] | None = None
) -> Config:
    """Return the frozen configuration of a nested mapping; defaults fill the rest.

    Args:
        values: sections and settings.
        where: what to name in the error.
        problems: key -> sentence of what is already known to be wrong.
    """
    problems = dict(problems or {})
    data = values.get("data")
    if isinstance(data, Mapping) and data.get("sources") and "path" not in data:
        values = {**values, "data": {**data, "path": ""}}  # the default of `path` is not one more dataset
    config = read(Config, values, problems)
    if not problems:
        load_extensions(config.extensions)
    found = [*problems.values(), *broken_rules(config, _RULES, problems)]
    found += stage_problems(values.get("stages"), config, problems)
    if not any(key.startswith("task") for key in problems):
        found += [f"task: {problem}" for problem in task_problems(config.task)]
    if found:
        fix = "see configs/base.yaml: every key, its unit and its default"
        raise one_error(found, where=where, fix=fix)
    return config


def dump_config(config: Config) -> str:
    """Return the configuration as YAML, every field written."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def _chain(path: Path, seen: tuple[Path, ...] = ()) -> list[dict[str, Any]]:
    """Return the layers of a file, its furthest base first."""
    if len(seen) > _MAX_BASES:
        raise UserError(f"more than {_MAX_BASES} `base:` files in a chain", where=path)
    try:
        content = parse_yaml(_read(path))
    except ValueError as e:  # UnicodeDecodeError is one
        raise UserError(f"not valid YAML ({e})", where=path) from e
    if path.resolve() in seen:  # only now: a symbolic link to itself cannot be resolved, and is refused above
        raise UserError("`base:` files form a circle", where=" -> ".join(map(str, (*seen, path))))
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise UserError(
            "a configuration is a mapping of sections", where=path, expected="`data:`, `model:`, ..."
        )
    base = content.pop(BASE_KEY, None)
    if base is not None and not isinstance(base, str):
        raise UserError(f"`{BASE_KEY}:` is not the path of a file", where=path, expected="one path")
    layers = [] if base is None else _chain(path.parent / base, (*seen, path.resolve()))
    return [*layers, content]


def _read(path: Path) -> str:
    fix = "give the path of a YAML file"
    try:
        # Every rank reads it at a start, often from the disk of the checkpoints: a moment's error must not end that.
        return retry(lambda: _content(path, fix), path)
    except FileNotFoundError as e:
        raise UserError("configuration file not found", where=path, fix=fix) from e
    except OSError as e:
        raise UserError(f"the configuration cannot be read ({e.strerror or e})", where=path, fix=fix) from e


def _content(path: Path, fix: str) -> str:
    if path.is_dir():
        raise UserError("the configuration is a directory", where=path, fix=fix)
    if path.exists() and not path.is_file():
        raise UserError("the configuration is not a regular file", where=path, fix=fix)
    return path.read_text("utf-8")


def _merge(target: dict[str, Any], layer: Mapping[str, Any]) -> None:
    for key, value in layer.items():
        if isinstance(value, dict):  # copied: two keys may hold one object by an alias
            child = target.get(key)
            target[key] = child if isinstance(child, dict) else {}
            _merge(target[key], value)
        else:
            target[key] = value


def _apply_override(target: dict[str, Any], text: str, problems: dict[str, str]) -> None:
    key, equals, raw = text.partition("=")
    if not equals or not key.strip():
        problems[f"--set {text}"] = f"--set {text!r} is not of the form a.b=value"
        return
    *parents, last = key.strip().split(".")
    for name in parents:
        child = target.get(name)
        if not isinstance(child, dict):
            child = target[name] = {}
        target = child
    target[last] = parse_setting(raw)


def _is_remote(where: str) -> bool:
    return "://" not in where or where.startswith(("s3://", "gs://", "file://"))


#: MODULE:FUNCTION, as ``losses:my_loss`` or ``package.losses:my_loss``.
_IMPORTABLE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")

_RULES = (
    Rule(
        "name",
        lambda c: c.name and "/" not in c.name and not c.name.startswith(".") and c.name.isprintable(),
        "`name` is {c.name!r}, expected a plain folder name",
    ),
    Rule(
        "data.path data.sources",
        lambda c: not (c.data.path and c.data.sources),
        "`data.path` and `data.sources` are both given, expected one of them (data.path='' undoes that of a base file; "
        "`data.eval_path` is the dataset to evaluate on)",
    ),
    Rule(
        "data.path data.sources",
        lambda c: c.data.path or c.data.sources,
        "neither `data.path` nor `data.sources` is given",
    ),
    Rule("data.sources", lambda c: all(s.path for s in c.data.sources), "`data.sources`: one has no `path`"),
    Rule(
        "data.sources",
        lambda c: len({s.path for s in c.data.sources}) == len(c.data.sources),
        "`data.sources`: two have the same `path`, expected one with the sum of their weights",
    ),
    Rule(
        "data.sources data.remote data.cache_limit_mb",
        lambda c: not c.data.sources or not (c.data.remote or c.data.cache_limit_mb),
        "`data.remote` and `data.cache_limit_mb` are given beside `data.sources`, expected in each of the sources",
    ),
    Rule(
        "data.sources",
        lambda c: all(_is_remote(s.remote) for s in c.data.sources),
        "`data.sources`: a `remote` is not s3://, gs://, file:// or a directory",
    ),
    Rule(
        "data.remote",
        lambda c: _is_remote(c.data.remote),
        "`data.remote` is {c.data.remote!r}, expected s3://, gs://, file:// or a directory",
    ),
    Rule(
        "data.sources data.remote data.cache_limit_mb",
        lambda c: all(s.remote or not s.cache_limit_mb for s in (c.data, *c.data.sources)),
        "`data.cache_limit_mb` needs `data.remote`: it would delete the only copy of `data.path`",
    ),
    Rule(
        "data.sources data.remote data.predownload_items",
        lambda c: c.data.is_remote or not c.data.predownload_items,
        "`data.predownload_items` needs `data.remote`",
    ),
    Rule(
        "data.tiling_px data.image_px",
        lambda c: c.data.tiling_px % c.data.image_px == 0,
        "`data.tiling_px` is {c.data.tiling_px}, expected a multiple of `data.image_px` {c.data.image_px}, or 0",
    ),
    Rule(
        "data.features data.sources data.remote",
        lambda c: not c.data.features or not (c.data.sources or c.data.remote),
        "`data.features` are of one dataset on this machine, expected neither `data.sources` nor `data.remote`",
    ),
    Rule(
        "data.features data.tiling_px",
        lambda c: not c.data.features or not c.data.tiling_px,
        "`data.features` holds the visual tokens of one square, expected `data.tiling_px` 0",
    ),
    Rule(
        "data.features model.freeze",
        # Of a phase, `stages` is checked.
        lambda c: not c.data.features or c.stages or {"vision", "connector"} <= set(c.model.freeze),
        "`data.features` needs `model.freeze` with vision and connector: what is trained has no fixed output",
    ),
    Rule(
        "data.features model.inputs",
        lambda c: not c.data.features or "image" in c.model.inputs,
        "`data.features` is given, and `model.inputs` has no image",
    ),
    Rule(
        "data.features zero.stage",
        lambda c: not c.data.features or c.zero.stage < 3,
        "`data.features` needs `zero.stage` 0, 1 or 2: stage 3 divides the frozen weights, which are compared",
    ),
    Rule(
        "model.init_parts",
        lambda c: c.model.init_parts and set(c.model.init_parts) <= set(PARTS),
        f"`model.init_parts` is {{c.model.init_parts}}, expected at least one of {', '.join(PARTS)}",
    ),
    Rule(
        "model.inputs",
        lambda c: c.model.inputs and set(c.model.inputs) <= {"image", "text"},
        "`model.inputs` is {c.model.inputs}, expected image, text or both",
    ),
    Rule(
        "model.freeze",
        lambda c: set(c.model.freeze) <= set(PARTS),
        f"`model.freeze` is {{c.model.freeze}}, expected any of {', '.join(PARTS)}",
    ),
    Rule(
        "model.freeze",
        lambda c: not set(c.model.freeze) >= set(PARTS),
        "`model.freeze` holds every part: nothing would be trained",
    ),
    Rule(
        "loss.kind",
        lambda c: not c.loss.is_custom or _IMPORTABLE.fullmatch(c.loss.kind),
        f"`loss.kind` is {{c.loss.kind!r}}, expected {', '.join(LOSSES)}, or MODULE:FUNCTION of a loss of your own",
    ),
    Rule(
        "optim.kind zero.stage",
        lambda c: c.optim.kind == "adamw" or c.zero.stage == 0,
        "`optim.kind` is adamw_8bit, which needs `zero.stage` 0 (it is {c.zero.stage}): ZeRO divides flat fp32 "
        "moments over the ranks, and cannot hold moments in 8 bits with their scales",
    ),
    Rule(
        "train.compile zero.stage",
        lambda c: c.train.compile == "none" or c.zero.stage < 3,
        "`train.compile` is {c.train.compile}, which needs `zero.stage` 0, 1 or 2: stage 3 gathers weights between "
        "layers",
    ),
    Rule(
        "train.compile data.tiling_px",
        lambda c: c.train.compile == "none" or not c.data.tiles_per_side,
        "`train.compile` is {c.train.compile}, which knows one image for each item: with tiles it must be none",
    ),
    Rule(
        "zero.communication_dtype train.precision",
        lambda c: c.zero.communication_dtype == "fp32" or c.train.precision == "bf16",
        "`zero.communication_dtype` is bf16, which needs `train.precision` bf16",
    ),
    Rule(
        "zero.stage zero.offload_optimizer",
        lambda c: c.zero.stage > 0 or not c.zero.offload_optimizer,
        "`zero.offload_optimizer` needs `zero.stage` 1, 2 or 3",
    ),
    Rule(
        "zero.stage zero.offload_param",
        lambda c: c.zero.stage == 3 or not c.zero.offload_param,
        "`zero.offload_param` needs `zero.stage` 3",
    ),
)
