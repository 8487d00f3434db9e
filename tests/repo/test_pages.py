"""What the pages state is so: paths, settings, messages, numbers, the tests behind the guarantees."""

from __future__ import annotations

import re
import shlex

import pytest

from rating_train import run_dir
from rating_train.cli import VERBS
from rating_train.config.load import load_config
from rating_train.config.schema import Config, to_dict
from rating_train.distributed.device import OLDEST_DRIVER
from rating_train.model.architecture import KNOWN_ARCHITECTURES
from rating_train.reports.cost_report import measure_cost
from tests.repo.conftest import REPO, Quickstart
from tests.repo.pages import PAGES, rows, section
from tests.repo.test_commands import parser_of

USAGE = PAGES["docs/usage.md"]


def test_the_table_of_commands_is_that_of_the_program() -> None:
    commands = re.findall(r"^\| `rating-train (\w+)([^`]*)` \|", USAGE, flags=re.M)
    verbs = list(dict.fromkeys(verb for verb, _ in commands))
    assert verbs == list(VERBS), "one row or more for each verb, in the order of --help"
    for verb, text in commands:
        options = {option for action in parser_of(verb)._actions for option in action.option_strings}
        for option in re.findall(r"--[a-z-]+", text):
            assert option in options, f"rating-train {verb} has no {option}"


@pytest.mark.parametrize("page", PAGES)
def test_paths_that_are_named_exist(page: str) -> None:
    roots = r"configs|examples|tests|launch|slurm|docs|benchmarks|rating_train|\.ci"
    named = re.findall(rf"`((?:{roots})/[\w./-]*[\w/])", PAGES[page])
    users = re.compile(r"slurm/cluster\.env$|.*\b[A-Z]{4,}\b")  # a file of the user's own, a placeholder
    missing = [path for path in named if not (REPO / path).exists() and not users.match(path)]
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", PAGES[page]):
        path, _, anchor = target.partition("#")
        file = (REPO / page).parent / path if path else REPO / page
        assert file.exists(), f"{page} links to {target}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", file.read_text("utf-8"), flags=re.M)
            anchors = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert anchor in anchors, f"{page} links to {target}"


@pytest.mark.parametrize("page", PAGES)
def test_settings_that_are_named_exist(page: str) -> None:
    sections = "data|model|loss|optim|batch|zero|train|eval"
    for key, value in re.findall(rf"--set ((?:{sections})\.[a-z_.]+)=([^\s`|]+)", PAGES[page]):
        if not value.isupper():  # FOLDER
            load_config(REPO / "configs" / "full_ft_228m.yaml", [f"{key}={value}"])
    every = to_dict(Config())
    for name, key in re.findall(rf"`({sections})\.([a-z_]+)", PAGES[page]):
        assert key in ("py", "jsonl") or key in every[name], f"{page}: {name}.{key}"


def test_symptoms_are_what_the_program_says() -> None:
    said = "".join(
        path.read_text("utf-8")
        for pattern in ("rating_train/**/*.py", "slurm/*", "launch/*")
        for path in sorted(REPO.glob(pattern))
        if path.is_file()
    )
    symptoms = [row[0] for row in rows(PAGES["docs/troubleshooting.md"])]
    quoted = [text for text in symptoms if text.startswith("`") and "(Slurm's message)" not in text]
    assert len(quoted) >= 15
    for message in (text for symptom in quoted for text in symptom.split("`")[1::2]):
        for piece in re.split(r"\.\.\.|\d+", message):
            words = piece.strip(" ()?:")
            assert words in said, f"no program or script says {words!r}"


def test_guarantees_are_stated_once_and_each_has_its_test() -> None:
    stated = rows(PAGES["docs/reliability.md"].split("## Figures")[0])
    assert len(stated) >= 20 and len({row[0] for row in stated}) == len(stated)
    for guarantee, test in stated:
        (command,) = re.findall(r"`([^`]*pytest [^`]+)`", test)
        paths = [word for word in shlex.split(command) if word.startswith("tests/")]
        assert paths, guarantee
        assert all((REPO / path).exists() for path in paths), command


def test_the_cost_table_is_counted() -> None:
    config = load_config(REPO / "configs" / "full_ft_228m.yaml")
    architecture = KNOWN_ARCHITECTURES[config.model.backbone]
    counted = measure_cost(architecture, config.data.image_px, config.data.text_tokens, None)
    assert f"sequence of {counted.visual_tokens + counted.text_tokens} tokens" in USAGE
    for row in counted.rows:
        numbers = f"| {row.count / 1e9:.1f} G | {row.c:.3f} | {row.e:.3f} |"
        assert re.search(rf"^\| `{row.convention}`: .* {re.escape(numbers)}$", USAGE, flags=re.M), numbers


def test_the_run_directory_is_the_real_one(quickstart: Quickstart) -> None:
    tree = section("docs/usage.md", "A run directory")
    for name in (run_dir.CONFIG_FILE, run_dir.PROVENANCE_FILE, run_dir.TRAIN_LOG, run_dir.EVAL_LOG):
        assert name in tree and (quickstart.run / name).is_file()
    for name in re.findall(r"^  (\w+)/", tree, flags=re.M):
        assert (quickstart.run / name).is_dir(), name


def test_the_oldest_driver_of_each_cuda_is_that_of_the_message() -> None:
    """The README and the page on drivers say what ``train.device`` refuses."""
    found = re.findall(r"^\| CUDA (\d+) \| (\d+) \|", PAGES["docs/troubleshooting.md"], flags=re.M)
    assert {int(cuda): int(driver) for cuda, driver in found} == OLDEST_DRIVER
    assert f"driver of version {OLDEST_DRIVER[max(OLDEST_DRIVER)]} or newer" in PAGES["README.md"].replace(
        "\n", " "
    )
