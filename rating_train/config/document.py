"""Write the schema out as YAML: every field in order, its documentation above it.

``python -m rating_train.config.document > configs/base.yaml`` writes the file; a test holds the two equal.
"""

from __future__ import annotations

import dataclasses
import textwrap
import typing
from collections.abc import Iterator
from typing import Any

import yaml

from rating_train.config.schema import Config

_WIDTH = 110
_HEADER = """\
Every setting with its default. Generated from rating_train/config/schema.py; do not edit:
    python -m rating_train.config.document > configs/base.yaml
A configuration needs only the keys that differ. Precedence, lowest first: these defaults, the file named by
its `base:` key (relative to the file; chains are followed), the file itself, `--set section.key=value`."""


def render_base_yaml() -> str:
    """Render the text of configs/base.yaml."""
    header = "".join(f"# {line}\n" for line in _HEADER.splitlines())
    return header + "\n" + "\n".join(_section(Config(), 0)) + "\n"


def _section(values: Any, depth: int) -> Iterator[str]:
    """Yield the lines of one section: for each field its comment, then ``key: value`` or a nested section."""
    pad = "  " * depth
    hints = typing.get_type_hints(type(values))
    for index, field in enumerate(dataclasses.fields(values)):
        value = getattr(values, field.name)
        nested = dataclasses.is_dataclass(value)
        if nested and index and not depth:
            yield ""
        doc = field.metadata["doc"] + _choices(hints[field.name])
        yield from (f"{pad}# {line}" for line in textwrap.wrap(doc, _WIDTH - len(pad) - 2))
        if nested:
            yield f"{pad}{field.name}:"
            yield from _section(value, depth + 1)
        else:
            yield f"{pad}{field.name}: {_scalar(value)}"


def _choices(hint: Any) -> str:
    if typing.get_origin(hint) is not typing.Literal:
        return ""
    return f" One of: {', '.join(map(str, typing.get_args(hint)))}."


def _scalar(value: Any) -> str:
    """Write a value as one line of YAML that reads back as the same value of the same type."""
    if isinstance(value, list):
        value = [dataclasses.asdict(v) if dataclasses.is_dataclass(v) else v for v in value]  # type: ignore[arg-type]
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000, sort_keys=False)
    return text.removesuffix("...\n").strip()


if __name__ == "__main__":
    print(render_base_yaml(), end="")
