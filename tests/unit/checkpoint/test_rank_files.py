"""One rank's files of a checkpoint, on a file system that shows late what another host made."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from rating_train.checkpoint import store
from rating_train.checkpoint.rank_files import rank_file, rank_of, unseen_files, write_rank_files


def test_a_directory_that_another_host_made_a_moment_ago_is_waited_for(tmp_path: Path) -> None:
    temporary = tmp_path / "step_00000005.tmp-abc"
    late = threading.Timer(0.3, temporary.mkdir)
    late.start()
    described = write_rank_files(temporary, {f"engine/{rank_file(1)}": {"x": torch.ones(2)}}, None)
    late.join()
    assert list(described) == store.relative_files(temporary) == ["engine/rank_00001.pt"]


def test_a_file_tells_which_rank_reads_it() -> None:
    assert rank_of(rank_file(17)) == 17
    assert rank_of("engine/bf16_zero_pp_rank_3_mp_rank_00_optim_states.pt") == 3
    assert rank_of("engine/zero_pp_rank_511_mp_rank_00_model_states.pt") == 511
    assert rank_of("engine/mp_rank_00_model_states.pt") is None and rank_of("state.json") is None


def test_a_host_looks_at_the_files_that_it_reads_and_names_the_missing_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = store.begin(tmp_path, 5)
    (temporary / "zero").mkdir()
    for name in ("zero/shard_0.pt", "zero/shard_1.pt"):
        (temporary / name).write_bytes(b"12345")
    path = store.commit(temporary, 5, store.seal(temporary, store.relative_files(temporary)))
    looked: list[str] = []
    size = store.file_size
    monkeypatch.setattr(store, "file_size", lambda file: looked.append(file.name) or size(file))
    monkeypatch.setattr(store, "VISIBLE_SECONDS", 0.1)
    assert unseen_files(path, lambda name: name == "zero/shard_0.pt") == "" and looked == ["shard_0.pt"]
    (path / "zero" / "shard_0.pt").unlink()
    assert unseen_files(path, lambda name: name == "zero/shard_1.pt") == ""
    assert unseen_files(path, lambda name: True) == "zero/shard_0.pt is missing"
