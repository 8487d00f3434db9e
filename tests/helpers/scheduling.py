"""Divide the tests over the processes of pytest-xdist: what shares a costly fixture runs in one process, in order.

The groups are named by files, not by `xdist_group` marks: pytest-xdist 3.8 writes a mark into the node id, which
pytest 9.2 no longer lets it do, and then hands out the tests one by one.
"""

from __future__ import annotations

from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

#: Beginning of a path -> the group of these files. Every other file is a group of its own.
GROUPS = {
    "tests/slurm/": "slurm",
    **{f"tests/repo/test_{name}": "quickstart" for name in ("quickstart", "commands", "readme", "pages")},
}
#: Several processes begin with what takes longest; unit tests fill the end.
LONGEST_FIRST = ("tests/slurm", "tests/repo", "tests/faults", "tests/e2e", "tests/dist", "tests")


class GroupScheduling(LoadScopeScheduling):  # type: ignore[misc]
    """Hand out whole groups, in the order in which their tests were collected."""

    def __init__(self, config: pytest.Config, log: Any = None) -> None:
        config.option.loadscopereorder = False
        super().__init__(config, log)

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)


def group_of(nodeid: str) -> str:
    """Return the group of a test."""
    file = nodeid.partition("::")[0]
    return next((group for start, group in GROUPS.items() if file.startswith(start)), file)


def sort_longest_first(items: list[pytest.Item]) -> None:
    """Sort collected tests in place; those of one file stay together, and in their order."""
    items.sort(
        key=lambda item: next(i for i, start in enumerate(LONGEST_FIRST) if item.nodeid.startswith(start))
    )
