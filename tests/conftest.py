"""What several kinds of tests share: small models and datasets, and starting real jobs of several ranks."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.forked import REPO, close_zygote
from tests.helpers.left_behind import Watch
from tests.helpers.ranks import SHARED_MEMORY as SHARED_MEMORY
from tests.helpers.ranks import Ranks

# Tests download nothing. Read by the hub's library when it is imported, so it stands here: without it, an unknown
# model id is asked for again and again for a minute.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


watch = pytest.StashKey[Watch]()
left_behind = pytest.StashKey[list[str]]()


def is_worker(config: pytest.Config) -> bool:
    """Whether this is one of several processes of pytest-xdist, and not the one that started them."""
    return hasattr(config, "workerinput")


def pytest_configure(config: pytest.Config) -> None:
    """Note what is there before the tests."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        # So a shell starts what runs in its background, and every process of a test would inherit it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if not is_worker(config):
        config.stash[watch] = Watch()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Divide the tests over several processes by groups of files."""
    from tests.helpers.scheduling import GroupScheduling

    return GroupScheduling(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let several processes begin with what takes longest."""
    if is_worker(config):
        from tests.helpers.scheduling import sort_longest_first

        sort_longest_first(items)


@pytest.hookimpl(trylast=True)  # after pytest-xdist has ended its processes
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a session that leaves processes, shared memory or mounts behind."""
    close_zygote()
    config = session.config
    if is_worker(config):
        return
    config.stash[left_behind] = config.stash[watch].found(config._tmp_path_factory.getbasetemp())  # type: ignore[attr-defined]
    if config.stash[left_behind]:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Name what was left behind."""
    if lines := config.stash.get(left_behind, []):
        terminalreporter.section("left behind by the tests", red=True)
        for line in lines:
            terminalreporter.line(line)


@pytest.fixture(autouse=True)
def own_log_handlers() -> Iterator[None]:
    """Give every test the log as it was: verbs that run in this process send it elsewhere."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    for handler in set(root.handlers) - set(handlers):
        root.removeHandler(handler)
        with contextlib.suppress(OSError):  # its disk is full; logging.shutdown passes over it too
            handler.close()
    for handler in set(handlers) - set(root.handlers):
        root.addHandler(handler)
    root.setLevel(level)


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

    out = tmp_path_factory.mktemp("demo") / "demo"
    make_demo(out, items=300, seed=17)
    prepare_demo(out, out / "data")
    return out


@pytest.fixture(scope="session")
def few_items(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of the first 60 listings of the small demo: epochs of about 50 items, for runs of several epochs."""
    out = tmp_path_factory.mktemp("few") / "data"
    prepare_demo(demo, out, limit=60)
    return out


@pytest.fixture(scope="session")
def sharded(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small demo in shards of 64 KB, about seven of them. Read only."""
    from tests.helpers.small_shards import reshard

    return reshard(demo / "data", tmp_path_factory.mktemp("sharded") / "data", 64_000)


@pytest.fixture
def data(sharded: Path, tmp_path: Path) -> Path:
    """A copy of the small demo in small shards, to edit or to damage."""
    return Path(shutil.copytree(sharded, tmp_path / "data"))


def prepare_demo(demo: Path, out: Path, limit: int | None = None, keep_aspect: bool = False) -> None:
    """Prepare the listings of a demo's catalogue, or the first of them."""
    from rating_train.prepare.run import PrepareOptions, prepare

    prepare(
        PrepareOptions(
            source=(str(demo / "catalogue" / "catalogue.jsonl"),),
            images=str(demo / "catalogue"),
            out=str(out),
            image_size_px=64,
            keep_aspect=keep_aspect,
            val_fraction=0.2,
            limit=limit,
        )
    )


#: Variations of what other tests hold already, left out of the daily run for their time.
full = pytest.mark.skipif(
    os.environ.get("RATING_TRAIN_FULL", "") != "1", reason="a variation: RATING_TRAIN_FULL=1 runs it"
)


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


@pytest.fixture(scope="session")
def trained_run(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps on the small demo, in bf16, with its evaluation at the end. Read only."""
    import yaml

    folder = tmp_path_factory.mktemp("trained")
    settings = tiny_settings("trained", folder / "runs", demo)
    settings["train"] = {"max_steps": 6, "eval_every_steps": 6, "log_every_steps": 1}
    (folder / "trained.yaml").write_text(yaml.safe_dump(settings))
    with contextlib.closing(Ranks()) as launcher:
        launcher.train(1, folder / "trained.yaml")
    return folder / "runs" / "trained"


@pytest.fixture
def alone() -> Iterator[None]:
    """For a verb that joins a process group of this one process: leaves it, and restores the environment."""
    from rating_train.distributed.world import disconnect

    before = dict(os.environ)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR"):
        os.environ.pop(name, None)
    yield
    disconnect()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def tiny_config(demo: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a YAML configuration on the small demo; arguments are sections, or settings, to override."""
    import yaml

    def write(name: str = "run", **sections: Any) -> Path:
        base: dict[str, object] = {
            **tiny_settings(name, tmp_path / "runs", demo),
            "train": {"epochs": 1, "log_every_steps": 1, "eval_every_steps": 0, "log_sample_ids": True},
        }
        for section, values in sections.items():
            merged = base.get(section, {})
            base[section] = {**merged, **values} if isinstance(values, dict) else values  # type: ignore[dict-item]
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(base))
        return path

    return write
