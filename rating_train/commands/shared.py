"""Options and checks that several verbs share."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from rating_train import run_dir
from rating_train.config.load import load_config
from rating_train.config.schema import Config
from rating_train.errors import UserError

T = TypeVar("T")


def add_options(
    parser: argparse.ArgumentParser,
    cls: type,
    metavars: Mapping[str, str] | None = None,
    positional: str = "",
) -> None:
    """Add one option for each field that a dataclass declares with :func:`rating_train.config.fields.setting`.

    A field without a default is required; a ``bool`` is a flag, a tuple takes several values. The field ``positional``
    is an argument without a name. A field ``settings`` without documentation is that of ``--set``.
    """
    hints = typing.get_type_hints(cls)
    declared = [f for f in dataclasses.fields(cls) if "doc" in f.metadata]  # type: ignore[arg-type]
    for option in sorted(declared, key=lambda f: f.default is not dataclasses.MISSING):
        hint, default = hints[option.name], option.default
        given: dict[str, Any] = {"help": option.metadata["doc"]}
        if option.name == positional:
            parser.add_argument(option.name, **given)
            continue
        if hint is bool:
            given["action"] = "store_true"
        else:
            given |= _value(hint, (metavars or {}).get(option.name))
            required = default is dataclasses.MISSING
            given |= {"required": True} if required else {"default": default}
            if not required and default not in ("", (), None):
                given["help"] += f" (default: {default})"
        parser.add_argument("--" + option.name.replace("_", "-"), **given)
    if "settings" in hints:
        add_set_option(parser)


def _value(hint: Any, metavar: str | None) -> dict[str, Any]:
    """Return what argparse has to know about the values of an annotation."""
    several = typing.get_origin(hint) is tuple
    kind = typing.get_args(hint)[0] if several else hint
    choices = typing.get_origin(kind) is typing.Literal
    kinds = [k for k in typing.get_args(kind) or (kind,) if k is not type(None)]
    given: dict[str, Any] = {"choices": kinds} if choices else {"type": kinds[0], "metavar": metavar}
    return given | ({"nargs": "+"} if several else {})


def options_from(cls: type[T], args: argparse.Namespace) -> T:
    """Return the dataclass of options that :func:`add_options` added."""
    names = {f.name: "set" if f.name == "settings" else f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    given = {name: getattr(args, source) for name, source in names.items()}
    return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in given.items()})


def add_set_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--set A.B=V``, which may be given several times."""
    parser.add_argument("--set", action="append", default=[], metavar="A.B=V", help="override one setting")


def load_config_once(path: str | Path, overrides: list[str]) -> Config:
    """Load the configuration on a rank; every rank reads the same file, so rank 0 alone reports its problems."""
    try:
        return load_config(path, overrides)
    except UserError as e:
        e.on_all_ranks = True
        raise


def require_run(run: Path) -> Path:
    """Return the run's config.yaml.

    Raises:
        UserError: there is no such folder, it is no run, or the run has only begun; the same on every rank.
    """
    config = run / run_dir.CONFIG_FILE
    if config.is_file():
        return config
    fix = "give the folder that `rating-train train` made"
    if not run.is_dir():
        what = "a file is not a run directory" if run.exists() else "there is no such run directory"
    elif any((run / name).exists() for name in (run_dir.LOCK_FILE, run_dir.HEARTBEAT_FILE, run_dir.LOGS_DIR)):
        what = "the run has no config.yaml yet: it is starting, or ended before it had"
        fix = f"wait for its first step (rating-train status {run}), or look at {run / run_dir.LOGS_DIR}"
    else:
        what = f"not a run directory: it has no {run_dir.CONFIG_FILE}"
    raise UserError(what, where=run, fix=fix, on_all_ranks=True)
