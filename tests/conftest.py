"""What several kinds of tests share: small models and datasets, and starting real jobs of several ranks."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

REPO = Path(__file__).resolve().parents[1]

# Tests download nothing. Read by the hub's library when it is imported, so it stands here: without it, an unknown
# model id is asked for again and again for a minute.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def repo() -> Path:
    """The repository's root."""
    return REPO


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real listings, where they are at hand; they are not part of the project."""
    folder = Path(os.environ.get("RATING_TRAIN_SHARED", REPO.parent / "shared")) / "data"
    if not folder.is_dir():
        pytest.skip("no real listings here (set RATING_TRAIN_SHARED to a folder that holds data/)")
    return folder


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small demo: catalogue, tiny model, and shards of 64 pixels (about 250 train, 50 val, 300 in all)."""
    from rating_train.demo.model import make_demo
    from rating_train.prepare.pipeline import PrepareOptions, prepare

    out = tmp_path_factory.mktemp("demo") / "demo"
    make_demo(out, items=300, seed=17)
    prepare(
        PrepareOptions(
            source=(str(out / "catalogue" / "catalogue.jsonl"),),
            images=str(out / "catalogue"),
            out=str(out / "data"),
            image_size_px=64,
            val_fraction=0.2,
        )
    )
    return out


#: Variations of what other tests hold already, left out of the daily run for their time.
full = pytest.mark.skipif(
    os.environ.get("RATING_TRAIN_FULL", "") != "1", reason="a variation: RATING_TRAIN_FULL=1 runs it"
)

SHARED_MEMORY = Path("/dev/shm")
STREAMING_BLOCK = re.compile(r"\d{6}_[a-z_]+")  # how streaming names its blocks of shared memory


def remove_dead_blocks(known: set[str]) -> None:
    """Remove streaming's blocks of shared memory that were not ``known`` before and that no process has mapped."""
    in_use = mapped_files()
    for name in set(os.listdir(SHARED_MEMORY)) - known:
        path = SHARED_MEMORY / name
        if STREAMING_BLOCK.fullmatch(name) and str(path) not in in_use:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def small_file_system(folder: Path, megabytes: int) -> Iterator[Path]:
    """A file system of its own, in memory, at a new folder. Skips the test where it cannot be mounted."""
    folder.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small file system needs root")
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True, timeout=30)


class Ranks:
    """Starts ``torchrun`` jobs on this machine's CPU, each in a session of its own, and ends what is left."""

    def __init__(self) -> None:
        self.started: list[subprocess.Popen[str]] = []
        self._shared_memory = set(os.listdir(SHARED_MEMORY))
        self._folder = tempfile.mkdtemp(
            prefix="rt-"
        )  # short: sockets are made in it. Holds streaming's lock files

    def close(self) -> None:
        """Kill what still runs, and remove the shared memory and lock files that killed jobs left."""
        for process in self.started:
            if process.poll() is None:
                self.kill(process)
                process.wait(timeout=30)
        remove_dead_blocks(self._shared_memory)
        shutil.rmtree(self._folder, ignore_errors=True)

    def start(
        self,
        ranks: int,
        *command: object,
        env: dict[str, str] | None = None,
        max_restarts: int = 0,
        torchrun: bool = True,
    ) -> subprocess.Popen[str]:
        """Start ``python COMMAND`` on so many ranks, by torchrun or by ``tests/launcher.py``, and return at once."""
        environment = {
            **os.environ,
            "TMPDIR": self._folder,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # as launch/env.sh has it
            **(env or {}),
        }
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR"):
            environment.pop(name, None)
        launcher = [sys.executable, str(REPO / "tests" / "launcher.py"), str(ranks)]
        if torchrun:
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            launcher += [f"--nproc-per-node={ranks}", f"--max-restarts={max_restarts}"]
        process = subprocess.Popen(
            [*launcher, *map(str, command)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=REPO,
            env=environment,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def run(
        self,
        ranks: int,
        *command: object,
        timeout: float = 240,
        env: dict[str, str] | None = None,
        code: int = 0,
    ) -> str:
        """Run to the end, expecting exit code ``code`` of the launcher (0, or 1 for any failure); its output."""
        process = self.start(ranks, *command, env=env, torchrun=False)
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.kill(process)
            output, _ = process.communicate()
            pytest.fail(f"no end after {timeout} s: {command}\n{output[-6000:]}")
        assert process.returncode == code, f"exit code {process.returncode}: {command}\n{output[-6000:]}"
        return output

    def train(self, ranks: int, config: Path, *options: object, **more: object) -> str:
        """``rating-train train`` on so many ranks."""
        return self.run(ranks, "-m", "rating_train", "train", config, *options, **more)  # type: ignore[arg-type]

    @staticmethod
    def kill(process: subprocess.Popen[str]) -> None:
        """kill -9 of the launcher and all that it started (its ranks live in sessions of their own)."""
        try:
            launcher = psutil.Process(process.pid)
            family = [*launcher.children(recursive=True), launcher]
        except psutil.NoSuchProcess:
            return
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(family, timeout=30)


def mapped_files() -> set[str]:
    """Files that some process on this machine has in its memory."""
    found: set[str] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):  # the process has just ended, or is another user's
            found |= {
                line.split(maxsplit=5)[5].strip()
                for line in maps.read_text().splitlines()
                if "/dev/shm/" in line
            }
    return found


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    """A launcher of jobs; whatever still runs at the end of the test is killed, and what it left is removed."""
    with contextlib.closing(Ranks()) as launcher:
        yield launcher


def tiny_settings(name: str, runs: Path, demo: Path) -> dict[str, dict[str, object] | str]:
    """A configuration of the smallest run on the small demo, as nested settings."""
    return {
        "name": name,
        "runs_dir": str(runs),
        "data": {"path": str(demo / "data"), "image_px": 64, "text_tokens": 96, "workers": 0},
        "model": {"backbone": str(demo / "model"), "head_hidden": 16},
        "batch": {"global_items": 12},
    }


@pytest.fixture
def tiny_config(demo: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a YAML configuration on the small demo; arguments are nested sections to override."""
    import yaml

    def write(name: str = "run", **sections: dict[str, object]) -> Path:
        base: dict[str, object] = {
            **tiny_settings(name, tmp_path / "runs", demo),
            "train": {"epochs": 1, "log_every_steps": 1, "eval_every_steps": 0, "log_sample_ids": True},
        }
        for section, values in sections.items():
            merged = base.get(section, {})
            base[section] = {**merged, **values} if isinstance(merged, dict) else values
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(base))
        return path

    return write
