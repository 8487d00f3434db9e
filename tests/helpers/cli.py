"""``rating-train`` as a test calls it: in a process of its own, forked by the zygote."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from tests.helpers.forked import REPO, zygote
from tests.helpers.ranks import clean_environment


def rating_train(
    *words: object, cwd: Path = REPO, timeout: float = 120, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run ``python -m rating_train WORDS`` to its end; what it printed and its exit code.

    Args:
        env: what differs from :func:`clean_environment`.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = zygote().start(
            ["-m", "rating_train", *words],
            {**clean_environment(), **(env or {})},
            cwd=cwd,
            files=(out.fileno(), err.fileno()),
        )
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
        texts = []
        for stream in (out, err):
            stream.seek(0)
            texts.append(stream.read().decode(errors="replace"))
    return subprocess.CompletedProcess(process.args, code, *texts)


def fresh_python(program: str, timeout: float = 120) -> str:
    """Run a program in an interpreter that has imported nothing yet; what it printed. It must end with exit code 0."""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=REPO, timeout=timeout
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
