"""Options that several verbs share."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from rating_train.config.load import load_config
from rating_train.config.schema import Config
from rating_train.errors import UserError

T = TypeVar("T")


def add_options(
    parser: argparse.ArgumentParser, cls: type, metavars: Mapping[str, str] | None = None
) -> None:
    """Add one option for each field that a dataclass declares with :func:`rating_train.config.fields.setting`.

    A field without a default is required; a ``bool`` is a flag, a tuple takes several values.
    """
    hints = typing.get_type_hints(cls)
    declared = dataclasses.fields(cls)  # type: ignore[arg-type]
    for option in sorted(declared, key=lambda f: f.default is not dataclasses.MISSING):
        hint, default = hints[option.name], option.default
        given: dict[str, Any] = {"help": option.metadata["doc"]}
        if hint is bool:
            given["action"] = "store_true"
        else:
            kinds = [kind for kind in typing.get_args(hint) or (hint,) if kind is not type(None)]
            if typing.get_origin(hint) is typing.Literal:
                given["choices"] = kinds
            else:
                given["type"] = kinds[0]
                given["metavar"] = (metavars or {}).get(option.name)
            if typing.get_origin(hint) is tuple:
                given["nargs"] = "+"
            required = default is dataclasses.MISSING
            given |= {"required": True} if required else {"default": default}
            if not required and default not in ("", (), None):
                given["help"] += f" (default: {default})"
        parser.add_argument("--" + option.name.replace("_", "-"), **given)


def options_from(cls: type[T], args: argparse.Namespace) -> T:
    """Return the dataclass of options that :func:`add_options` added."""
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
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
