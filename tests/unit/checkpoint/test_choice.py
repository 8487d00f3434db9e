"""Which checkpoint `evaluate` takes: the one that was asked for and verifies, or one clear error."""

from __future__ import annotations

from pathlib import Path

import pytest

from rating_train.checkpoint import store
from rating_train.checkpoint.resume import choose_checkpoint
from rating_train.errors import UserError


def save(root: Path, step: int) -> Path:
    temporary = store.begin(root, step)
    (temporary / "state.json").write_text(f'{{"step": {step}}}')
    return store.commit(temporary, step, store.seal(temporary, store.relative_files(temporary)))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for step in (5, 10, 15):
        save(tmp_path, step)
    store.point(tmp_path, store.BEST, 10, value=0.7)
    store.point(tmp_path, store.LATEST, 15)
    return tmp_path


@pytest.mark.parametrize(
    ("wanted", "step"), [("best", 10), ("latest", 15), ("5", 5), ("00000005", 5), ("15", 15)]
)
def test_best_latest_and_a_step_are_found(root: Path, wanted: str, step: int) -> None:
    assert choose_checkpoint(root, wanted) == root / f"step_{step:08d}"


@pytest.mark.parametrize("wanted", ["newest", "", "-5", "5.0", "step_00000005", "../5"])
def test_a_name_that_means_nothing_is_refused(root: Path, wanted: str) -> None:
    with pytest.raises(UserError, match=r"names no checkpoint.*best, latest or a step"):
        choose_checkpoint(root, wanted)


def test_a_step_without_a_checkpoint_is_refused_with_those_that_exist(root: Path) -> None:
    with pytest.raises(UserError, match=r"no checkpoint 7 .*one of the steps 15, 10, 5"):
        choose_checkpoint(root, "7")


@pytest.mark.parametrize("wanted", ["best", "latest", "5"])
def test_a_run_that_never_saved_is_refused(tmp_path: Path, wanted: str) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match=rf"no checkpoint {wanted} .*a trained run"):
            choose_checkpoint(folder, wanted)


@pytest.mark.parametrize("content", ["", "{", '{"step": 99}'])
def test_a_torn_or_stray_pointer_is_refused_with_the_steps_that_exist(root: Path, content: str) -> None:
    (root / store.BEST).write_text(content)
    with pytest.raises(UserError, match=r"no checkpoint best .*15, 10, 5"):
        choose_checkpoint(root, "best")


@pytest.mark.parametrize("damage", ["changed", "emptied", "deleted"])
def test_a_damaged_checkpoint_is_refused_and_no_other_is_taken_instead(root: Path, damage: str) -> None:
    file = root / "step_00000010" / "state.json"
    if damage == "deleted":
        file.unlink()
    else:
        file.write_text("" if damage == "emptied" else '{"step": 11}')
    with pytest.raises(UserError, match=r"cannot be trusted: state\.json .*step_00000010"):
        choose_checkpoint(root, "best")


def test_an_uncommitted_step_is_refused(root: Path) -> None:
    (root / "step_00000015" / store.COMPLETE).unlink()
    with pytest.raises(UserError, match=r"cannot be trusted.*never committed"):
        choose_checkpoint(root, "15")
    with pytest.raises(UserError, match=r"no checkpoint latest"):
        choose_checkpoint(root, "latest")
