"""The computed need of shared memory is what real DataLoaders take."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from rating_train.config.load import config_from_dict
from rating_train.data.features.identity import Features
from rating_train.data.loader import open_evaluation, open_training
from rating_train.data.prompt import PromptEncoder, load_tokenizer
from rating_train.data.workers.memory_need import batch_bytes, image_bytes, shared_memory_need, worker_batches
from rating_train.distributed.world import World
from rating_train.errors import UserError

IMAGE = 3 * 384 * 384


def test_a_batch_is_its_pages() -> None:
    assert batch_bytes(1, 3 * 64 * 64, 100) == 6 * 4096 + 2 * 4096  # six tensors; the image takes three pages
    assert batch_bytes(64, IMAGE, 212) == 64 * 3 * 384 * 384 + 27 * 4096 + 4 * 4096


def test_both_loaders_of_all_ranks_of_a_node_are_counted() -> None:
    config = config_from_dict(
        {"batch": {"global_items": 64}, "data": {"workers": 8, "prefetch_batches": 4, "image_px": 384}}
    )
    one = batch_bytes(8, IMAGE, 176 + 256)
    assert shared_memory_need(config, ranks=8, ranks_per_node=4) == 4 * 2 * (8 * (4 + 1) * one + 4096)
    assert shared_memory_need(config, ranks=8, ranks_per_node=8) == 8 * 2 * (8 * (4 + 1) * one + 4096)
    small = dataclasses.replace(config, eval=dataclasses.replace(config.eval, micro_items=2))
    assert (
        shared_memory_need(small, 8, 1) == 8 * (4 + 1) * (one + batch_bytes(2, IMAGE, 176 + 256)) + 2 * 4096
    )
    alone = dataclasses.replace(config, data=dataclasses.replace(config.data, workers=0))
    assert shared_memory_need(alone, 8, 8) == 0


def test_visual_tokens_are_counted_in_place_of_images(tmp_path: Path) -> None:
    told = Features("", "", 384, tokens=36, width=576, dtype="bfloat16")
    (tmp_path / "manifest.json").write_text(json.dumps({"version": 1, "splits": {}, "features": vars(told)}))
    config = config_from_dict(
        {"data": {"features": str(tmp_path), "image_px": 384}, "model": {"freeze": ["vision", "connector"]}}
    )
    source = config.data.train_sources[0]
    assert image_bytes(config, source) == 36 * 576 * 2
    images = dataclasses.replace(config, data=dataclasses.replace(config.data, features=""))
    assert image_bytes(images, source) == IMAGE
    assert 9 * shared_memory_need(config, 1, 1) < shared_memory_need(images, 1, 1)
    elsewhere = dataclasses.replace(config, data=dataclasses.replace(config.data, eval_path="/another"))
    assert 2 * shared_memory_need(elsewhere, 1, 1) > shared_memory_need(images, 1, 1), "its images are read"
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(UserError, match="manifest"):
        image_bytes(config, source)


def shared_bytes() -> int:
    """Bytes of blocks that this process and its DataLoader workers hold open, each block once."""
    me = psutil.Process()
    blocks = {}
    for process in [me, *me.children(recursive=True)]:
        for fd in Path(f"/proc/{process.pid}/fd").iterdir():
            try:
                if os.readlink(fd).startswith("/memfd:rating_train"):
                    status = os.stat(fd)
                    blocks[status.st_ino] = status.st_blocks * 512
            except FileNotFoundError:  # closed meanwhile
                continue
    return sum(blocks.values())


@pytest.mark.timeout(120)
def test_the_need_is_what_training_takes_while_it_evaluates(demo: Path) -> None:
    config = config_from_dict(
        {
            "data": {"path": str(demo / "data"), "image_px": 64, "text_tokens": 96, "workers": 2},
            "batch": {"global_items": 8},
        }
    )
    prompt = PromptEncoder(load_tokenizer(str(demo / "model")), 1, 96, 100)
    world = World()
    training = open_training(config.data, prompt, world, 8, 8)
    evaluation = open_evaluation(config.data, prompt, world, "train", 8)
    need = shared_memory_need(config, ranks=1, ranks_per_node=1, visual_tokens=1)
    with closing(training.batches(0, 40)) as train, closing(evaluation.batches()) as evaluate:
        held = [next(train), next(train), next(evaluate), next(evaluate)]
        deadline = time.monotonic() + 60
        blocks = 2 * worker_batches(2, config.data.prefetch_batches)
        images = 2 * blocks * 8 * 3 * 64 * 64  # of two loaders
        while shared_bytes() < images and time.monotonic() < deadline:
            time.sleep(0.05)
        assert images < shared_bytes() <= need, "all that is prefetched, and what is in use"
        assert len(held) == 4
