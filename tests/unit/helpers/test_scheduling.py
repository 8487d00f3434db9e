"""The tests are divided over processes by groups: one Slurm, one quickstart, and one process for each file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.helpers.scheduling import GROUPS, group_of

CONFTEST = """\
import pytest
from tests.helpers.scheduling import GroupScheduling

def pytest_xdist_make_scheduler(config, log):
    return GroupScheduling(config, log)
"""
TEST = """\
import os
import pytest

@pytest.mark.parametrize("number", range(6))
def test_a(number):
    with open({out!r}, "a") as f:
        f.write(f"{name} {{os.getpid()}}\\n")
"""


def test_groups_are_known_by_the_beginning_of_a_path() -> None:
    assert (
        group_of("tests/slurm/test_a.py::test_b[x]") == group_of("tests/slurm/test_c.py::test_d") == "slurm"
    )
    assert group_of("tests/repo/test_readme.py::test_a") == "quickstart"
    assert group_of("tests/unit/test_a.py::test_b[a::b]") == "tests/unit/test_a.py"
    root = Path(__file__).parents[3]
    for start in GROUPS:
        assert list(root.glob(f"{start}*")), f"nothing begins with {start}"


def test_a_file_runs_in_one_process(tmp_path: Path) -> None:
    """With the pytest and the pytest-xdist that are installed: their ways of naming groups have changed before."""
    out = tmp_path / "seen"
    (tmp_path / "conftest.py").write_text(CONFTEST)
    for name in ("test_one", "test_two"):
        (tmp_path / f"{name}.py").write_text(TEST.format(out=str(out), name=name))
    command = (
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n",
        "2",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        tmp_path,
    )
    done = subprocess.run(
        list(map(str, (*command, tmp_path))), capture_output=True, text=True, timeout=100,
        cwd=Path(__file__).parents[3],
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    seen = set(out.read_text().splitlines())
    assert len(seen) == 2 == len({line.split()[1] for line in seen}), "one process for each file"
