"""What a process may do, and what identifies it."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys

import pytest

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

FREED = """
import resource
from rating_train.processes import keep_freed_memory
def faults():  # of taking 64 MiB, which bytearray fills, and giving them back
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(64 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
pages = (64 << 20) // resource.getpagesize()
assert [faults() >= pages for _ in range(3)] == [True] * 3, "it is given back, or this test shows nothing"
keep_freed_memory()
faults()
assert faults() + faults() < pages // 10, "it is kept"
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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc")
def test_freed_memory_is_kept() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    subprocess.run([sys.executable, "-c", FREED], check=True, timeout=60, env=environment)
