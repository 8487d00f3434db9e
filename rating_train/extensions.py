"""Extensions: modules of the user, imported by name, that add a backbone, a metric, a kind of source or a listener.

What can be added, and how, is shown in docs/extending.md.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable

from rating_train.errors import UserError


def load_extensions(names: Iterable[str]) -> None:
    """Import modules by name, from the environment or from the current directory. A second call does nothing more.

    Raises:
        UserError: a module that is not found, or that raises while it is imported.
    """
    for name in names:
        here = os.getcwd()
        if here not in sys.path and "" not in sys.path:
            sys.path.append(here)  # last: a file here hides no installed package
        try:
            importlib.import_module(name)
        except Exception as e:
            raise UserError(
                f"the extension cannot be imported ({type(e).__name__}: {e})",
                where=name,
                expected="the dotted name of a module that is installed, on PYTHONPATH or in the current directory",
                fix=f'try `python -c "import {name}"`; docs/extending.md has examples',
            ) from e
