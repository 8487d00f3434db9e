"""The working directory of a prediction: who may continue it, what is finished, what a kill can leave."""

from __future__ import annotations

from pathlib import Path

import pytest

from rating_train.errors import UserError
from rating_train.prediction.work_dir import WorkDir


@pytest.fixture
def work(tmp_path: Path) -> WorkDir:
    work = WorkDir(tmp_path / "out.csv")
    with work.locked():
        pass
    return work


def test_a_part_is_finished_when_it_is_committed(work: WorkDir) -> None:
    work.images(12).mkdir(parents=True)
    work.commit(12, "a,1.0,\n")
    work.commit(3, "")
    (work.path / ".part_0000004.csv.tmp-1-abcd").write_text("torn")
    assert work.finished() == {3, 12} and work.part(12).read_text() == "a,1.0,\n"
    assert not work.images(12).exists(), "the images fetched for it are removed"


def test_other_options_do_not_continue_it(work: WorkDir) -> None:
    identity = {"model": "run/step_1", "source": [["a.csv", 10, 5]], "part_rows": 8}
    work.belongs_to(identity)
    work.belongs_to(dict(identity))
    with pytest.raises(
        UserError, match=r"model was 'run/step_1', now 'run/step_2'.*out\.csv\.parts"
    ) as caught:
        work.belongs_to({**identity, "model": "run/step_2", "part_rows": 9})
    assert "part_rows was 8, now 9" in str(caught.value), "all differences are named"


def test_two_commands_do_not_write_one_output(work: WorkDir) -> None:
    with (
        work.locked(),
        pytest.raises(UserError, match="another command is writing this output"),
        work.locked(),
    ):
        pass
    with work.locked():
        pass


def test_an_output_that_exists_is_not_replaced(work: WorkDir) -> None:
    work.out.write_text("mine")
    with pytest.raises(UserError, match=r"exists already.*out\.csv"), work.locked():
        pass
    assert work.out.read_text() == "mine"


def test_a_part_is_claimed_by_one_rank_for_each_start(work: WorkDir) -> None:
    first = work.new_claims()
    assert work.claim(first, 5) and not work.claim(first, 5) and work.claim(first, 6)
    second = work.new_claims()
    assert work.claim(second, 5), "what a killed start had claimed is free again"
    assert [p.name for p in work.path.glob("claims-*")] == [second]


def test_a_kill_between_the_last_rename_and_the_tidying_up_is_noticed(work: WorkDir) -> None:
    work.belongs_to({"model": "m"})
    work.commit(0, "a,1.0,\n")
    assert not work.is_merged()
    temporary = work.out.with_name("temporary")
    temporary.write_text("id,score,reason\na,1.0,\n")
    work.publish(temporary)
    with work.locked():
        assert work.is_merged() and not temporary.exists()
        work.remove()
    assert work.out.is_file() and not work.path.exists()


def test_rows_are_counted_once(work: WorkDir) -> None:
    assert work.rows() is None
    work.note_rows(1234)
    assert work.rows() == 1234
