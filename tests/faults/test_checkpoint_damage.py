"""Every kind of file of real checkpoints, damaged in every way: found, named, skipped, and never loaded."""

from __future__ import annotations

import contextlib
import errno
import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from rating_train.checkpoint import store
from rating_train.checkpoint.manager import Checkpointer
from rating_train.checkpoint.store import BEST, COMPLETE, LATEST
from rating_train.distributed.world import World
from rating_train.errors import UserError
from rating_train.reports import run_status
from tests.conftest import Ranks, tiny_settings
from tests.helpers.runs import losses

pytestmark = pytest.mark.timeout(240)

DAMAGES = ("truncated", "flipped", "emptied", "deleted")
KINDS = {
    "model states": r"engine/.*model_states\.pt",
    "optimizer states": r"engine/.*optim_states\.pt",
    "random numbers": r"rank_\d{5}\.pt",
    "state": r"state\.json",
    "marker": r"COMPLETE\.json",
}


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """This file system shows every file at once: one that is missing is not waited for."""
    monkeypatch.setattr(store, "VISIBLE_SECONDS", 0.0)


def train(ranks: Ranks, folder: Path, *options: object, code: int = 0) -> str:
    return ranks.train(2, folder / "run.yaml", *options, code=code)


@pytest.fixture(scope="module", params=[1, 3])
def trained(request: pytest.FixtureRequest, demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with run.yaml and its run, 2 ranks at a ZeRO stage, with checkpoints of steps 2 and 4 (best)."""
    folder = tmp_path_factory.mktemp(f"stage{request.param}")
    config = {
        **tiny_settings("run", folder, demo),
        "zero": {"stage": request.param},
        "train": {"max_steps": 4, "log_every_steps": 1, "save_every_steps": 2, "keep_last": 9},
        "eval": {"max_items": 12},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    with contextlib.closing(Ranks()) as ranks:
        train(ranks, folder)
    return folder


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    """A run directory to damage."""
    shutil.copytree(trained / "run", tmp_path / "run")
    (tmp_path / "run" / "LOCK").unlink(missing_ok=True)
    return tmp_path / "run"


def files(checkpoint: Path) -> list[str]:
    return [*store.relative_files(checkpoint), COMPLETE]


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "deleted":
        path.unlink()
        return
    if how == "flipped":
        # Of the marker a digit of a hash: elsewhere it may hit a space, which changes nothing.
        place = content.index(b'"sha256": "') + 20 if path.name == COMPLETE else len(content) // 2
        content[place] ^= 1
    path.write_bytes({"truncated": content[: len(content) // 2], "flipped": content, "emptied": b""}[how])


@contextlib.contextmanager
def damaged(path: Path, how: str) -> Iterator[None]:
    """Damage a file within the context."""
    original = path.read_bytes()
    damage(path, how)
    try:
        yield
    finally:
        path.write_bytes(original)


def find(root: Path, resume: str = "auto") -> Path | None:
    """Return the checkpoint that a start takes."""
    return Checkpointer(root, World(), 9, 0, background=False).find(resume)


def test_every_damage_to_every_file_is_skipped_with_its_reason(
    copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = copy / "checkpoints"
    old, new = root / "step_00000002", root / "step_00000004"
    assert files(old) == files(new) and find(root) == new
    kinds = [kind for name in files(new) for kind, pattern in KINDS.items() if re.fullmatch(pattern, name)]
    assert set(kinds) == set(KINDS) and len(kinds) == len(files(new)), "each file is of one of the kinds"
    assert kinds.count("optimizer states") == kinds.count("random numbers") == 2, "one of each rank"
    for name in files(new):
        for how in DAMAGES:
            where, blamed = f"{name} {how}", Path(name).name
            caplog.clear()
            with damaged(new / name, how):
                assert find(root) == old, where
                (line,) = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
                assert line.startswith(f"skipped {new}: "), where
                if (name, how) != (COMPLETE, "flipped"):  # then the file that the hash belongs to is blamed
                    assert blamed in line, where
                with pytest.raises(UserError, match="cannot be trusted"):
                    find(root, str(new))
                said = run_status.read_status(copy)
                assert [c["valid"] for c in said["checkpoints"]] == [False, True], where
                assert f"{new.name} " in (text := run_status.render(said)) and "INVALID (" in text, where
                with damaged(old / name, how):
                    for resume in ("auto", "must"):
                        with pytest.raises(UserError, match="none can be trusted") as caught:
                            find(root, resume)
                        assert f"{old.name}: " in str(caught.value) and f"{new.name}: " in str(caught.value)
                        assert "--resume never" in str(caught.value)
            assert find(root) == new, "restored"


@pytest.mark.parametrize("name", [LATEST, BEST])
@pytest.mark.parametrize("how", DAMAGES)
def test_pointers_are_not_needed_to_resume(copy: Path, name: str, how: str) -> None:
    root = copy / "checkpoints"
    damage(root / name, how)
    assert find(root) == root / "step_00000004"
    (pointer,) = [p for p in run_status.read_status(copy)["pointers"] if p["name"] == name]
    if how != "flipped":
        assert pointer["problem"] == ("there is none" if how == "deleted" else "it cannot be read")


def test_leftovers_of_a_crash_are_removed_and_named(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = copy / "checkpoints"
    begun = store.begin(root, 6)
    shutil.copytree(root / "step_00000004", begun, dirs_exist_ok=True)
    (begun / COMPLETE).unlink()
    torn = root / ".latest.json.tmp-4711-00ff00ff"
    torn.write_text("{")
    assert run_status.read_status(copy)["temporary"] == [torn.name, begun.name]
    assert find(root) == root / "step_00000004"
    assert sorted(p.name for p in root.iterdir()) == [BEST, LATEST, "step_00000002", "step_00000004"]
    assert f"removed {begun.name}" in caplog.text and f"removed {torn.name}" in caplog.text


def test_a_foreign_pickle_is_never_loaded(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    """DeepSpeed and ``Shards`` find files by their names, so a foreign rank's file would be loaded too."""
    root = copy / "checkpoints"
    new = root / "step_00000004"
    own = next(new.rglob("*rank_1_mp_rank_00_optim_states.pt"))
    foreign = own.with_name(own.name.replace("rank_1_", "rank_2_", 1))
    shutil.copy(own, foreign)
    assert find(root) == root / "step_00000002" and foreign.name in caplog.text
    said = run_status.read_status(copy)["checkpoints"]
    assert [c["valid"] for c in said] == [False, True] and foreign.name in said[0]["problem"]
    foreign.unlink()
    (new / "notes.txt").write_text("the good one")  # a person's own file must not invalidate a checkpoint
    assert find(root) == new and store.verify(new)


def test_a_file_that_the_disk_cannot_read_is_skipped_too(
    copy: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    root, sha256_file = copy / "checkpoints", store.sha256_file
    new = root / "step_00000004"

    def bad_sector(path: Path) -> str:
        if path == new / "state.json":
            raise OSError(errno.EIO, "Input/output error", str(path))
        return sha256_file(path)

    monkeypatch.setattr(store, "sha256_file", bad_sector)
    assert find(root) == root / "step_00000002"
    assert f"skipped {new}: it cannot be read" in caplog.text and "Input/output error" in caplog.text
    with pytest.raises(UserError, match="cannot be trusted: it cannot be read"):
        find(root, str(new))


@pytest.mark.parametrize("trained", [1], indirect=True)
def test_real_starts(trained: Path, ranks: Ranks, tmp_path: Path) -> None:
    """The newest and its pointers are damaged: the older one is loaded. Then both are: the start is refused."""
    folder = tmp_path / "again"
    shutil.copytree(trained, folder)
    config = yaml.safe_load((folder / "run.yaml").read_text())
    (folder / "run.yaml").write_text(yaml.safe_dump({**config, "runs_dir": str(folder)}))
    root = folder / "run" / "checkpoints"
    old, new = root / "step_00000002", root / "step_00000004"
    damage(next(new.rglob("*rank_1_mp_rank_00_optim_states.pt")), "flipped")
    damage(root / LATEST, "truncated")
    damage(root / BEST, "deleted")
    left = store.begin(root, 4)
    output = train(ranks, folder)
    assert f"skipped {new}: engine/" in output and "SHA-256 differs" in output
    assert f"removed {left.name}" in output and "resuming from step 2 of 4" in output
    assert losses(folder / "run") == losses(trained / "run")
    assert store.newest_valid(root)[0] == store.Found(4, new) and store.pointed_step(root, LATEST) == 4

    damage(new / COMPLETE, "emptied")
    damage(old / "rank_00001.pt", "truncated")
    before = {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}
    process = ranks.start(2, "-m", "rating_train", "train", folder / "run.yaml")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and "exitcode  : 2" in output, "in torchrun's words"
    assert output.count("error:") == 1 and "none can be trusted" in output
    assert f"{new.name}: {COMPLETE} cannot be read" in output and f"{old.name}: rank_00001.pt has" in output
    assert output.count("Traceback (most recent call last)") == 1, "torchrun's own, and none of the ranks"
    assert {p: p.read_bytes() for p in root.rglob("*") if p.is_file()} == before, "nothing is modified"
