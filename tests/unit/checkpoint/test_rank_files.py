"""One rank's files of a checkpoint, on a file system that shows late what another host made."""

from __future__ import annotations

import threading
from pathlib import Path

import torch

from rating_train.checkpoint import store
from rating_train.checkpoint.rank_files import rank_file, write_rank_files


def test_a_directory_that_another_host_made_a_moment_ago_is_waited_for(tmp_path: Path) -> None:
    temporary = tmp_path / "step_00000005.tmp-abc"
    late = threading.Timer(0.3, temporary.mkdir)
    late.start()
    described = write_rank_files(temporary, {f"engine/{rank_file(1)}": {"x": torch.ones(2)}}, None)
    late.join()
    assert list(described) == store.relative_files(temporary) == ["engine/rank_00001.pt"]
