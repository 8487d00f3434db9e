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


FORKED = """
import os, psutil
from rating_train.processes import give_back_freed_memory, keep_freed_memory
SIZE = 64 << 20
def taken_by_both():  # after a fork, and after this process has written to what it had freed
    bytearray(SIZE)
    give_back_freed_memory()
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.read(read, 1)
        os._exit(0)
    held = bytearray(SIZE)
    both = sum(psutil.Process(p).memory_full_info().pss for p in (os.getpid(), child))
    os.write(write, b"x")
    os.waitpid(child, 0)
    return both
before = psutil.Process().memory_full_info().pss
keep_freed_memory()
assert taken_by_both() - before < 1.5 * SIZE
give_back_freed_memory = lambda: None
assert taken_by_both() - before > 1.5 * SIZE, "or this test shows nothing"
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
@pytest.mark.parametrize("what", [FREED, FORKED], ids=["by a process", "but not by its forks too"])
def test_freed_memory_is_kept(what: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    subprocess.run([sys.executable, "-c", what], check=True, timeout=60, env=environment)
