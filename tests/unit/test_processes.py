"""What a process may do, and what identifies it."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from rating_train.processes import allow_descriptors, available_memory

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


def test_available_memory_is_that_of_this_machine() -> None:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < available_memory() <= total


def machine(root: Path, groups: str, limits: dict[str, tuple[object, int, int]]) -> Path:
    """A file system of a machine with 8,000 KiB available: /proc/self/cgroup, and (limit, used, cached) of groups."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 8000 kB\n")
    (root / "proc/self/cgroup").write_text(groups)
    for folder, (limit, used, cached) in limits.items():
        group = root / "sys/fs/cgroup" / folder
        group.mkdir(parents=True, exist_ok=True)
        first = folder.split("/")[0] == "memory"
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        names = names if first else ("memory.max", "memory.current", "inactive_file")
        (group / names[0]).write_text(f"{limit}\n")
        (group / names[1]).write_text(f"{used}\n")
        (group / "memory.stat").write_text(f"anon 7\n{names[2]} {cached}\nfile 9\n")
    return root


def test_memory_that_slurm_limits_above_the_group_of_a_task(tmp_path: Path) -> None:
    job = "system.slice/slurmstepd.scope/job_7"
    limits = {
        f"{job}/step_0/user/task_0": ("max", 100, 0),
        job: (1000, 400, 50),
        "system.slice": ("max", 9, 9),
    }
    assert available_memory(machine(tmp_path, f"0::/{job}/step_0/user/task_0\n", limits)) == 1000 - 400 + 50


def test_memory_that_slurm_limits_in_control_groups_of_version_1(tmp_path: Path) -> None:
    job = "slurm/uid_1/job_7"
    limits: dict[str, tuple[object, int, int]] = {
        f"memory/{job}/step_0": (2000, 400, 0),
        f"memory/{job}": (5000, 4600, 100),
        "memory": (9223372036854771712, 10**6, 0),
    }
    groups = f"5:cpuset:/other\n4:memory,hugetlb:/{job}/step_0\n0::/\n"
    assert available_memory(machine(tmp_path, groups, limits)) == 5000 - 4600 + 100


def test_memory_of_a_container_whose_group_is_named_from_outside(tmp_path: Path) -> None:
    limits: dict[str, tuple[object, int, int]] = {"memory": (3000, 1000, 0), "memory/inner": (1, 0, 0)}
    root = machine(tmp_path / "1", "4:memory:/docker/ab\n", limits)
    assert available_memory(root) == 2000, "a group of another process does not count"
    assert available_memory(machine(tmp_path / "2", "0::/../ab\n", {".": (700, 900, 0)})) == 0, "all is taken"


def test_memory_of_a_machine_without_limits(tmp_path: Path) -> None:
    assert available_memory(machine(tmp_path / "1", "0::/a\n", {"a": ("max", 1, 1)})) == 8000 << 10
    root = machine(tmp_path / "2", "", {})
    (root / "proc/self/cgroup").unlink()
    assert available_memory(root) == 8000 << 10


def test_memory_of_a_process_in_a_real_control_group() -> None:
    group = Path("/sys/fs/cgroup/memory") / f"rating_train-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as e:
        pytest.skip(f"needs the memory controller of version 1, and root: {e}")
    code = "from rating_train.processes import available_memory; print(available_memory())"
    join = f"echo $$ > {group}/cgroup.procs && exec {sys.executable} -c '{code}'"
    try:
        (group / "memory.limit_in_bytes").write_text(str(512 << 20))
        found = subprocess.run(["sh", "-c", join], capture_output=True, text=True, timeout=60)
    finally:
        group.rmdir()
    assert found.returncode == 0, found.stderr
    assert 256 << 20 < int(found.stdout) <= 512 << 20
