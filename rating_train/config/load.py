"""Where a configuration comes from: defaults < `base:` chain < the YAML file < `--set a.b=v`.

All problems of all sources are collected and raised in one :class:`~rating_train.errors.UserError`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from rating_train.config.schema import PARTS, Config, to_dict
from rating_train.errors import UserError, one_error

BASE_KEY = "base"


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file, with its `base:` chain, apply `a.b=v` overrides, and return the frozen result.

    Raises:
        UserError: for a missing file, a YAML syntax error, or (all together) unknown keys, wrong types,
            and values out of bounds.
    """
    problems: list[str] = []
    merged: dict[str, Any] = {}
    for layer in _chain(Path(path)):
        _merge(merged, layer)
    for text in overrides:
        _apply_override(merged, text, problems)
    config = build(Config, merged, "", problems)
    if config is not None and not problems:
        problems += check_bounds(config)
    if problems or config is None:
        raise one_error(
            problems, where=path, fix="see configs/base.yaml: every key, its unit and its default"
        )
    return config


def config_from_dict(values: Mapping[str, Any], where: str = "configuration") -> Config:
    """The frozen configuration of a nested mapping (defaults fill the rest)."""
    problems: list[str] = []
    config = build(Config, dict(values), "", problems)
    if config is not None and not problems:
        problems += check_bounds(config)
    if problems or config is None:
        raise one_error(problems, where=where)
    return config


def dump_config(config: Config) -> str:
    """The configuration as YAML, every field written."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def _chain(path: Path, seen: tuple[Path, ...] = ()) -> list[dict[str, Any]]:
    """The layers of a file, its furthest base first."""
    if path.resolve() in seen:
        raise UserError("`base:` files go round in a circle", where=" -> ".join(map(str, (*seen, path))))
    if not path.is_file():
        raise UserError("configuration file not found", where=path, fix="give the path of a YAML file")
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise UserError(f"not valid YAML ({e})", where=path) from e
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise UserError(
            "a configuration is a mapping of sections", where=path, expected="`data:`, `model:`, ..."
        )
    base = content.pop(BASE_KEY, None)
    layers = [] if base is None else _chain(path.parent / str(base), (*seen, path.resolve()))
    return [*layers, content]


def _merge(target: dict[str, Any], layer: Mapping[str, Any]) -> None:
    for key, value in layer.items():
        if isinstance(value, dict) and isinstance(target.get(key), dict):
            _merge(target[key], value)
        else:
            target[key] = value


def _apply_override(target: dict[str, Any], text: str, problems: list[str]) -> None:
    key, equals, raw = text.partition("=")
    if not equals or not key.strip():
        problems.append(f"--set {text!r} is not of the form a.b=value")
        return
    try:
        value = yaml.safe_load(raw)
    except yaml.YAMLError:
        value = raw
    *parents, last = key.strip().split(".")
    for name in parents:
        child = target.get(name)
        if not isinstance(child, dict):
            child = target[name] = {}
        target = child
    target[last] = value


def build(cls: type, values: Any, where: str, problems: list[str]) -> Any:
    """An instance of a section from a mapping; problems are appended, and then the result is ``None``."""
    if not isinstance(values, Mapping):
        problems.append(f"`{where.rstrip(chr(46))}` is a section, not {_show(values)}")
        return None
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = (
                f" (did you mean `{where}{close[0]}`?)" if close else f" (known: {', '.join(sorted(known))})"
            )
            problems.append(f"unknown key `{where}{key}`{hint}")
    before = len(problems)
    arguments = {}
    for name in known & set(values):
        arguments[name] = _coerce(hints[name], values[name], f"{where}{name}", problems)
    return cls(**arguments) if len(problems) == before else None


def _coerce(kind: Any, value: Any, where: str, problems: list[str]) -> Any:
    """``value`` as the annotation says; PyYAML reads `1e-4` as a string, so numbers may come as text."""
    if dataclasses.is_dataclass(kind):
        return build(typing.cast(type, kind), value, f"{where}.", problems)
    origin = typing.get_origin(kind)
    if origin is typing.Literal:
        allowed = typing.get_args(kind)
        if isinstance(value, bool) or value not in allowed:
            problems.append(f"`{where}` is {_show(value)}, expected one of {', '.join(map(str, allowed))}")
        return value
    if origin is list:
        if not isinstance(value, list):
            problems.append(f"`{where}` is {_show(value)}, expected a list")
            return value
        (item,) = typing.get_args(kind)
        return [_coerce(item, v, f"{where}[{i}]", problems) for i, v in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            problems.append(f"`{where}` is {_show(value)}, expected a mapping")
        return value
    assert not isinstance(origin, types.UnionType)
    result = _scalar(kind, value)
    if result is None:
        problems.append(f"`{where}` is {_show(value)}, expected {_KIND_NAMES[kind]}")
    return result


_KIND_NAMES = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}


def _scalar(kind: type, value: Any) -> Any:
    if kind is bool:
        return value if isinstance(value, bool) else None
    if kind is str:
        return value if isinstance(value, str) else None
    if isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    if not math.isfinite(number):
        return None
    if kind is int:
        return int(number) if number.is_integer() else None
    return number


def _show(value: Any) -> str:
    return "empty" if value is None else f"{value!r} ({type(value).__name__})"


def _bounds(config: Config) -> Iterable[tuple[str, float, float, float]]:
    """(key, value, smallest, largest) of every bounded number."""
    inf = math.inf
    d, o, t, m = config.data, config.optim, config.train, config.model
    yield from (
        ("data.image_px", d.image_px, 16, 4096),
        ("data.field_chars", d.field_chars, 1, 100_000),
        ("data.text_tokens", d.text_tokens, 8, 8192),
        ("data.shuffle_block_samples", d.shuffle_block_samples, 1, inf),
        ("data.shuffle_seed", d.shuffle_seed, 0, 2**31),
        ("data.num_canonical_nodes", d.num_canonical_nodes, 1, 1024),
        ("data.workers", d.workers, 0, 256),
        ("data.prefetch_batches", d.prefetch_batches, 1, 1024),
        ("data.cache_limit_mb", d.cache_limit_mb, 0, inf),
        ("data.predownload_items", d.predownload_items, 0, inf),
        ("model.head_hidden", m.head_hidden, 1, inf),
        ("model.head_dropout", m.head_dropout, 0, 0.99),
        ("loss.huber_delta", config.loss.huber_delta, 1e-6, inf),
        ("loss.count_reference", config.loss.count_reference, 1, inf),
        ("loss.plcc_weight", config.loss.plcc_weight, 0, inf),
        *((f"optim.lr.{k}", v, 0, 1) for k, v in to_dict(o.lr).items()),
        ("optim.warmup_fraction", o.warmup_fraction, 0, 1),
        ("optim.final_fraction", o.final_fraction, 0, 1),
        ("optim.beta1", o.beta1, 0, 0.99999),
        ("optim.beta2", o.beta2, 0, 0.999999),
        ("optim.eps", o.eps, 1e-20, 1),
        ("optim.weight_decay", o.weight_decay, 0, 10),
        ("optim.clip_norm", o.clip_norm, 0, inf),
        ("batch.global_items", config.batch.global_items, 1, inf),
        ("batch.micro_items", config.batch.micro_items, 0, inf),
        ("zero.bucket_mb", config.zero.bucket_mb, 1, 100_000),
        ("train.epochs", t.epochs, 1e-9, inf),
        *(
            (f"train.{k}", getattr(t, k), 0, inf)
            for k in (
                "max_steps eval_every_steps save_every_steps keep_every_steps early_stop_evals "
                "max_skipped_steps max_failed_saves time_limit_minutes job_end_margin_minutes watchdog_minutes seed"
            ).split()
        ),
        ("train.log_every_steps", t.log_every_steps, 1, inf),
        ("train.stop_check_steps", t.stop_check_steps, 1, inf),
        ("train.collective_timeout_minutes", t.collective_timeout_minutes, 0.01, 10_000),
        ("train.keep_last", t.keep_last, 1, inf),
        ("eval.micro_items", config.eval.micro_items, 0, inf),
        ("eval.max_items", config.eval.max_items, 0, inf),
    )


def check_bounds(config: Config) -> list[str]:
    """Problems of single values and of pairs of settings that need no data and no world."""
    problems = [
        f"`{key}` is {value:g}, expected between {low:g} and {high:g}"
        for key, value, low, high in _bounds(config)
        if not low <= value <= high
    ]
    problems += _remote_problems(config)
    for part in config.model.freeze:
        if part not in PARTS:
            problems.append(f"`model.freeze` holds {part!r}, expected any of {', '.join(PARTS)}")
    if set(config.model.freeze) >= set(PARTS):
        problems.append("`model.freeze` holds every part: nothing would be trained")
    zero = config.zero
    if zero.offload_optimizer and zero.stage == 0:
        problems.append("`zero.offload_optimizer` needs `zero.stage` 1, 2 or 3")
    if zero.offload_param and zero.stage != 3:
        problems.append("`zero.offload_param` needs `zero.stage` 3")
    if not config.name or "/" in config.name or config.name.startswith("."):
        problems.append(f"`name` is {config.name!r}, expected a plain folder name")
    return problems


def _remote_problems(config: Config) -> list[str]:
    """A cache limit belongs to a remote: on a local dataset it would delete the only copy."""
    data = config.data
    problems = []
    scheme, separator, _ = data.remote.partition("://")
    if separator and scheme not in ("s3", "gs", "file"):
        problems.append(f"`data.remote` is {data.remote!r}, expected s3://, gs://, file:// or a directory")
    if not data.remote and data.cache_limit_mb:
        problems.append(
            "`data.cache_limit_mb` needs `data.remote`: it would delete the only copy of `data.path`"
        )
    if not data.remote and data.predownload_items:
        problems.append("`data.predownload_items` needs `data.remote`")
    return problems
