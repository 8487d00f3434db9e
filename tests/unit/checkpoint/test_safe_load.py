"""No code of a checkpoint runs, whichever file it is in; what DeepSpeed really stores is read."""

from __future__ import annotations

import os
import tarfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from rating_train.checkpoint import deepspeed_io, safe_load, store
from rating_train.errors import UserError
from tests.conftest import REPO

pytestmark = pytest.mark.timeout(180)

ARCHIVE = REPO / "tests" / "recorded" / "run_before_layout.tar.xz"


class Hostile:
    """Makes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def test_plain_content_is_read(tmp_path: Path) -> None:
    content = {"a": torch.arange(4.0), "shapes": [OrderedDict(w=torch.Size([2, 2]))], "n": 3, "none": None}
    torch.save(content, tmp_path / "f.pt")
    loaded = safe_load.load(tmp_path / "f.pt")
    assert (
        torch.equal(loaded["a"], content["a"]) and loaded["shapes"] == content["shapes"] and loaded["n"] == 3
    )


def test_code_is_refused_and_not_run(tmp_path: Path) -> None:
    target = tmp_path / "made by the checkpoint"
    torch.save({"optimizer_state_dict": Hostile(target)}, tmp_path / "f.pt")
    with pytest.raises(UserError, match=r"mkdir.*do not load this checkpoint"):
        safe_load.load(tmp_path / "f.pt")
    assert not target.exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 torn"])
def test_rubbish_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "f.pt").write_bytes(content)
    with pytest.raises(UserError):
        safe_load.load(tmp_path / "f.pt")


def test_only_the_named_classes_of_deepspeed_are_allowed(recorded: Path) -> None:
    (shard,) = (recorded / "runs").glob("*/checkpoints/*/engine/*optim_states.pt")
    before = set(torch.serialization.get_safe_globals())
    state = safe_load.load(shard)["optimizer_state_dict"]
    assert "single_partition_of_fp32_groups" in state
    assert set(torch.serialization.get_safe_globals()) == before, "allowed only while a file is read"


def test_stand_ins_hold_whatever_deepspeed_stores() -> None:
    stand_in = safe_load._Inert(1, "two")
    stand_in.__dict__.update(cur_scale=1.0)
    assert stand_in.cur_scale == 1.0


def plant(checkpoint: Path, name: str, target: Path) -> None:
    """Put code into one file of a checkpoint, and make its COMPLETE.json vouch for it."""
    (file,) = checkpoint.glob(name)
    torch.save({"module": Hostile(target), "train_state": Hostile(target)}, file)
    from rating_train.files import atomic_write_json, read_json, sha256_file

    complete = read_json(checkpoint / store.COMPLETE)
    entry = complete["files"][file.relative_to(checkpoint).as_posix()]
    entry.update(bytes=file.stat().st_size, sha256=sha256_file(file))
    atomic_write_json(checkpoint / store.COMPLETE, complete)


@pytest.mark.parametrize("name", ["engine/mp_rank_00_model_states.pt", "engine/*optim_states.pt"])
def test_evaluating_a_hostile_run_is_one_line(
    recorded: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(recorded)
    target = recorded / "made by the checkpoint"
    plant(recorded / "runs" / "interrupted" / "checkpoints" / "step_00000004", name, target)
    with pytest.raises(UserError, match="mkdir"):
        deepspeed_io.consolidated_weights(recorded / "runs/interrupted/checkpoints/step_00000004", 1)
    assert not target.exists()


def test_deepspeed_itself_reads_through_the_same_door(recorded: Path) -> None:
    engine = safe_load.SafeCheckpointEngine(recorded)
    target = recorded / "made by the checkpoint"
    torch.save(Hostile(target), recorded / "f.pt")
    with pytest.raises(UserError, match="mkdir"):
        engine.load("elsewhere/f.pt")
    assert not target.exists()
