"""The command line: fast help, exit codes, and one line that names every mistake."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from rating_train import __version__, cli
from rating_train.commands import report
from rating_train.errors import UserError
from tests.helpers.cli import fresh_python
from tests.helpers.ranks import script_env
from tests.repo.conftest import REPO

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)


def command(*arguments: str) -> tuple[int, str, str]:
    """Run the command line in a process of its own: exit code, stdout, stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "rating_train", *arguments],
        env=script_env(),
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=100,
    )
    return done.returncode, done.stdout, done.stderr


def one_line_error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run in this process, expecting a user error; its one line."""
    code = cli.main(list(arguments))
    error = capsys.readouterr().err
    assert code == 2, error
    assert error.count("\n") == 1 and error.startswith(f"rating-train {arguments[0]}: error: "), error
    return error


def test_help_is_fast_and_loads_nothing_heavy() -> None:
    program = (
        "import sys\n"
        "from rating_train.cli import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit as e:\n    assert e.code == 0\n"
        "heavy = {'torch', 'numpy', 'deepspeed', 'streaming', 'transformers', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    started = time.monotonic()
    out = fresh_python(program)
    assert time.monotonic() - started < 30  # 0.05 s on an idle machine
    for verb, summary in cli.VERBS.items():
        assert verb in out and summary in out


def test_version() -> None:
    assert command("--version")[:2] == (0, f"rating-train {__version__}\n")


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main([verb, "--help"])
    assert exit.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: rating-train {verb}")
    assert cli.VERBS[verb].split()[0] in out


@pytest.mark.parametrize("verb", cli.VERBS)
def test_verbs_of_a_login_node_explain_themselves_without_torch(verb: str) -> None:
    program = (
        "import sys\n"
        "from rating_train.cli import main\n"
        f"try:\n    main([{verb!r}, '--help'])\n"
        "except SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules\n"
    )
    fresh_python(program)


@pytest.mark.parametrize("arguments", [[], ["no-such-verb"], ["cost"], ["prepare", "--out", "x"]])
def test_wrong_usage_is_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments)
    assert exit.value.code == 2
    assert "usage: rating-train" in capsys.readouterr().err


def test_a_user_error_of_a_process_is_one_line_and_code_2() -> None:
    code, out, err = command("train", "configs/demo_cpu.yaml", "--set", "train.epoch=3")
    assert code == 2 and out == ""
    assert err.count("\n") == 1 and "Traceback" not in err and "did you mean `train.epochs`?" in err


@pytest.mark.parametrize("verb", ["train", "cost"])
def test_a_missing_configuration(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = one_line_error(capsys, verb, str(tmp_path / "none.yaml"))
    assert "configuration file not found" in error and str(tmp_path / "none.yaml") in error


def test_all_problems_of_a_configuration_are_in_one_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(
        "name: bad\n"
        "modle: {}\n"
        "data: {image_pix: 384, workers: many}\n"
        "optim: {lr: {vision: fast}, schedule: cosin}\n"
        "train: {seed: true}\n"
        "batch: 64\n"
    )
    error = one_line_error(capsys, "cost", str(path), "--set", "zero.stage=5", "--set", "nonsense")
    for part in (
        "9 problems",
        "unknown key `modle` (did you mean `model`?)",
        "unknown key `data.image_pix` (did you mean `data.image_px`?)",
        "`data.workers` is 'many' (str), expected a whole number",
        "`optim.lr.vision` is 'fast' (str), expected a finite number",
        "`optim.schedule` is 'cosin' (str), expected one of linear, cosine, constant",
        "`train.seed` is True (bool), expected a whole number",
        "`batch` is a section, not 64 (int)",
        "`zero.stage` is 5 (int), expected one of 0, 1, 2, 3",
        "--set 'nonsense' is not of the form a.b=value",
        str(path),
    ):
        assert part in error, part


def test_yaml_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("data: {path: [\n")
    assert "not valid YAML" in one_line_error(capsys, "cost", str(path))
    path.write_text("- a list\n")
    assert "a configuration is a mapping" in one_line_error(capsys, "cost", str(path))


def test_the_cost_of_a_known_backbone_needs_no_torch() -> None:
    words = [
        "cost",
        str(REPO / "configs" / "full_ft_228m.yaml"),
        "--gpus",
        "8",
        "--gpu",
        "h100",
        "--items",
        "1000",
    ]
    program = (
        "import sys\n"
        "from rating_train.cli import main\n"
        f"assert main({words!r}) == 0\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    fresh_python(program)


def test_a_run_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "not a run directory" in one_line_error(capsys, "evaluate", str(tmp_path))
    one_line_error(capsys, "report", str(tmp_path))


def test_a_demo_over_something(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").write_text("precious")
    assert "the folder is not empty" in one_line_error(capsys, "demo", "--out", str(tmp_path))
    assert (tmp_path / "mine").read_text() == "precious"


def test_an_incomplete_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    options = ["--set", f"runs_dir={tmp_path}"]
    error = one_line_error(capsys, "train", str(REPO / "configs" / "demo_cpu.yaml"), *options)
    assert "the launcher did not set LOCAL_WORLD_SIZE" in error


def test_a_bug_shows_its_traceback_and_is_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:

    def fail(_: Path) -> Path:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(report, "make_report", fail)
    assert cli.main(["report", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "Traceback" in error and "ZeroDivisionError: a bug" in error


def test_an_error_raised_on_all_ranks_is_shown_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:

    def fail(_: Path) -> Path:
        error = UserError("the same on every rank")
        error.on_all_ranks = True
        raise error

    monkeypatch.setattr(report, "make_report", fail)
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "0")
    assert cli.main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("the same on every rank") == 1
