"""What a process may do, and what identifies it."""

from __future__ import annotations

import resource
import subprocess
import sys

from rating_train.processes import allow_descriptors

IMPORTS = """
import gc
from rating_train.processes import without_collector
with without_collector():
    assert not gc.isenabled()
    kept = [[] for _ in range(1000)]
assert gc.isenabled() and gc.get_freeze_count() > 1000
gc.disable()
with without_collector():
    pass
assert not gc.isenabled(), "as it was found"
frozen = gc.get_freeze_count()
with without_collector(freeze=False):
    kept += [[] for _ in range(1000)]
assert gc.get_freeze_count() == frozen
"""


def test_the_limit_of_open_files_is_raised_to_what_is_allowed() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lower = min(256, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lower, hard))
    try:
        assert allow_descriptors() == (lower, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_what_was_imported_without_the_collector_is_left_alone() -> None:
    subprocess.run([sys.executable, "-c", IMPORTS], check=True, timeout=60)
