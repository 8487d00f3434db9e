"""Extensions: imported by name, or one clear error."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from rating_train.errors import UserError
from rating_train.extensions import load_extensions


@pytest.fixture(autouse=True)
def module_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])


def test_a_module_of_the_current_directory_is_imported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine_once.py").write_text("print('imported')")
    monkeypatch.chdir(tmp_path)
    load_extensions(["mine_once"])
    load_extensions(["mine_once"])
    assert capsys.readouterr().out == "imported\n"
    assert sys.path.index(str(tmp_path)) == len(sys.path) - 1, "last, so that it hides nothing"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (None, "No module named"),
        ("1 / 0", "ZeroDivisionError"),
        ("x = (", "SyntaxError"),
        ("import no_such", "no_such"),
    ],
)
def test_a_module_that_cannot_be_imported_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str | None, said: str
) -> None:
    name = f"broken_{abs(hash(source))}"
    if source is not None:
        (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said) as caught:
        load_extensions([name])
    assert caught.value.where == name and "\n" not in str(caught.value)
