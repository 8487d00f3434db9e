"""Errors that name what is wrong, where, what was expected and what to change.

Exit codes of every command: 0 done (or stopped with a checkpoint), 1 a bug (traceback),
2 a :class:`UserError` (one line), 3 an evaluation that does not meet `--require`,
75 no progress (stacks in the run directory; restart it).
"""

from __future__ import annotations

EXIT_DONE = 0
EXIT_BUG = 1
EXIT_USER_ERROR = 2
EXIT_REQUIREMENT = 3
EXIT_HUNG = 75  # EX_TEMPFAIL of sysexits.h


class UserError(Exception):
    """A problem that the user can fix: shown as one line without a traceback, exit code 2.

    Args:
        what: what is wrong, in one sentence without a full stop.
        where: the file, line, key or option where it was found.
        expected: what would have been valid.
        fix: what to change or run.
        on_all_ranks: whether every rank raises this same error, so that only rank 0 shows it.
    """

    def __init__(
        self, what: str, *, where: object = "", expected: str = "", fix: str = "", on_all_ranks: bool = False
    ) -> None:
        self.what = what
        self.where = str(where)
        self.expected = expected
        self.fix = fix
        self.on_all_ranks = on_all_ranks
        parts = [what]
        if self.where:
            parts.append(f"where: {self.where}")
        if expected:
            parts.append(f"expected: {expected}")
        if fix:
            parts.append(f"fix: {fix}")
        super().__init__(" | ".join(" ".join(p.split()) for p in parts))


def one_error(problems: list[str], *, where: object, fix: str = "") -> UserError:
    """Return a single error that lists all problems of one input, so that one edit can fix them all."""
    count = f"{len(problems)} problems" if len(problems) > 1 else "1 problem"
    return UserError(f"{count}: " + "; ".join(problems), where=where, fix=fix)
