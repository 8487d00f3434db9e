"""The log: a full disk is reported once, not as a traceback for each line."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from rating_train import log as logs


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk_is_reported_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rank_00000.log"
    file.symlink_to("/dev/full")
    logs.set_up(0, file)
    for _ in range(3):
        logging.getLogger("rating_train.test").info("a line")
    said = capsys.readouterr().err
    assert said.count("cannot be written") == 1 and str(file) in said and "Traceback" not in said
    assert said.count("a line") == 3, "the terminal still shows them"


def test_a_file_that_cannot_be_opened_is_reported_once_and_tried_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "logs").touch()  # where a directory is needed
    logs.set_up(0, tmp_path / "logs" / "rank_00000.log")
    logger = logging.getLogger("rating_train.test")
    logger.info("one")
    logger.info("two")
    said = capsys.readouterr().err
    assert said.count("cannot be written") == 1 and "Traceback" not in said and "two" in said
    (tmp_path / "logs").unlink()
    logger.info("three")
    assert "three" in (tmp_path / "logs" / "rank_00000.log").read_text()


def test_lines_of_every_rank_go_to_its_file(tmp_path: Path) -> None:
    logs.set_up(3, tmp_path / "logs" / "rank_00003.log")
    logging.getLogger("rating_train.test").info("a line")
    text = (tmp_path / "logs" / "rank_00003.log").read_text()
    assert "r3 rating_train.test: a line" in text


def test_the_rate_excludes_what_was_done_before() -> None:
    progress = logs.Progress("images", 60, done=20, details=lambda: "kept 39")
    progress._began -= 10.0
    progress.add(20)
    assert progress.line() == "images: 40 of 60 items, 2.0/s, 10 s left, kept 39"
    assert "left" not in logs.Progress("images", None).line()


def test_a_table_is_aligned() -> None:
    assert logs.text_table(["name", "n"], [["a", "10"], ["long name", "5"]]) == [
        "name        n",
        "---------  --",
        "a          10",
        "long name   5",
    ]
