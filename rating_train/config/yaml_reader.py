"""Read YAML that anybody may have written: bounded in size, depth and aliases; a key given twice is an error.

``yaml.safe_load`` runs no code, but it expands nested aliases without limit, recurses once per level, and silently
takes the last of several equal keys.
"""

from __future__ import annotations

from typing import Any

import yaml

MAX_CHARS = 1 << 17
MAX_DEPTH = 32
MAX_VALUES = 5000
MAX_ALIASES = 100


def parse_yaml(text: str) -> Any:
    """Return the value of one YAML document.

    Raises:
        ValueError: it is not valid, exceeds a bound, or gives a key twice; the message names the place.
    """
    if len(text) > MAX_CHARS:
        raise ValueError(f"it has {len(text)} characters, at most {MAX_CHARS} are read")
    try:
        _check_bounds(text)
        return yaml.load(text, _UniqueKeyLoader)
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{place}{e.problem or e.context}") from e
    except yaml.YAMLError as e:  # a character that YAML does not allow
        raise ValueError(str(e)) from e


def parse_setting(text: str) -> Any:
    """Return the value of one setting from a command line; what is not YAML, such as a path with ": ", is text."""
    try:
        return parse_yaml(text)
    except ValueError:
        return text


def _check_bounds(text: str) -> None:
    """Walk through the parser's events, which takes no recursion and builds nothing."""
    open_anchors: list[str | None] = []
    with_alias: set[str | None] = set()  # anchors of values that hold an alias
    values = aliases = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        problem = ""
        if isinstance(event, yaml.CollectionEndEvent):
            open_anchors.pop()
        elif isinstance(event, yaml.NodeEvent):
            values += 1
            if isinstance(event, yaml.AliasEvent):
                aliases += 1
                with_alias.update(open_anchors)
                if event.anchor in with_alias:  # doubles with every level, or never ends
                    problem = f"the alias *{event.anchor} refers to a value that contains an alias"
            elif isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent) and event.tag is not None:
                problem = f"the tag {event.tag} is not read"
            if isinstance(event, yaml.CollectionStartEvent):
                open_anchors.append(event.anchor)
        for count, most, what in (
            (len(open_anchors), MAX_DEPTH, "levels"),
            (values, MAX_VALUES, "values"),
            (aliases, MAX_ALIASES, "aliases"),
        ):
            problem = f"more than {most} {what}" if count > most else problem
        if problem:
            raise _error(problem, event)


def _error(problem: str, at: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=at.start_mark)


class _UniqueKeyLoader(yaml.SafeLoader):
    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node)
            if key in seen:
                raise _error(f"the key `{key}` is given twice", key_node)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except ValueError as e:  # a date that does not exist, a number of thousands of digits
            raise _error(f"not a value ({e})", node) from e
