"""docs/tutorial.md, walked in its order on a fresh checkout: each command runs, and prints what the page says."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

from tests.helpers.forked import zygote
from tests.helpers.ranks import script_env
from tests.repo.conftest import Quickstart
from tests.repo.pages import PAGES, command_lines

pytestmark = pytest.mark.timeout(900)

STEPS = re.findall(r"^```bash\n.*?^```\n\n```text\n.*?^```", PAGES["docs/tutorial.md"], flags=re.M | re.S)


def run(line: str, quickstart: Quickstart) -> str:
    """Run a command of the page in the checkout; its output. Python is forked, with everything imported already."""
    if line == "bash launch/quickstart.sh":
        return quickstart.output
    words = shlex.split(line)
    if words[0] == "ln":  # into the checkout
        Path(quickstart.folder, words[-1]).symlink_to(quickstart.folder / words[-2])
        return ""
    env = script_env(OMP_NUM_THREADS="1", CLUSTER_ENV=str(quickstart.folder / "tutorial_site.env"))
    if words[0] == "bash":
        Path(env["CLUSTER_ENV"]).write_text("CLUSTER_GPUS_PER_NODE=8 CLUSTER_CPUS_PER_TASK=9\n")
    known = {"rating-train": ["-m", "rating_train"], "python": [], "bash": ["-m", "rating_train", "submit"]}
    arguments = [*known[words[0]], *words[2 if words[0] == "bash" else 1 :]]
    if arguments[0] == "-c":
        (quickstart.folder / "one_line.py").write_text(arguments[1])
        arguments = ["one_line.py"]
    process = zygote().start(arguments, env, cwd=quickstart.folder)
    try:
        output, _ = process.communicate(timeout=200)
    finally:
        process.kill()
    assert process.returncode == 0, f"{line}\n{output[-4000:]}"
    return output


def shape(line: str) -> str:
    """A line without its numbers and times, and without the width of its columns."""
    line = re.sub(r"^\d{4}-\d\d-\d\d \S+ ", "", line.strip())
    line = re.sub(r"\b[0-9a-f]{12,}\b", "#", line)
    line = re.sub(r"[-+]?\d[\d.,]*(e[-+]?\d+)?", "#", line)
    return re.sub(r"\s+", " ", line)


def test_the_walk(quickstart: Quickstart) -> None:
    assert len(STEPS) == PAGES["docs/tutorial.md"].count("```bash") >= 9, "each command has its output"
    for step in STEPS:
        commands, shown = step.split("```text\n")
        said = [
            shape(line)
            for command in command_lines(commands)
            for line in run(command, quickstart).splitlines()
        ]
        for line in shown.removesuffix("```").splitlines():
            for piece in (piece.strip() for piece in line.split("...")):
                assert not piece or any(shape(piece) in other for other in said), (
                    f"{line!r} is not in\n" + "\n".join(said)
                )
    assert sys.executable and (quickstart.folder / "scores.parquet").is_file()
