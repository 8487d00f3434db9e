"""Every command line of the README and of CONTRIBUTING is run here, or checked word by word where it takes a GPU.

A line in a ``bash`` block that no exerciser below knows fails the test: add one, or leave the line out.
"""

from __future__ import annotations

import argparse
import gzip
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rating_train import run_dir
from rating_train.cli import VERBS, add_verb_arguments
from rating_train.config.load import load_config
from rating_train.config.resolve import plan_batch
from rating_train.config.schema import Config, to_dict
from rating_train.model.architecture import KNOWN_ARCHITECTURES
from rating_train.reports.cost_report import measure_cost
from rating_train.scoring.ces import CONVENTIONS
from tests.repo.conftest import REPO, Quickstart, script_env
from tests.repo.test_scripts import FakePython

pytestmark = pytest.mark.timeout(300)

README = (REPO / "README.md").read_text("utf-8")
PAGES = {"README.md": README, "CONTRIBUTING.md": (REPO / "CONTRIBUTING.md").read_text("utf-8")}


def blocks(text: str) -> list[str]:
    """The command lines of every ```bash block, in order; a line ending in a backslash goes on in the next."""
    lines: list[str] = []
    for block in re.findall(r"^```bash\n(.*?)^```", text, flags=re.M | re.S):
        joined = block.replace("\\\n", " ")
        lines += [line.strip() for line in joined.splitlines() if line.strip() and not line.startswith("#")]
    return lines


COMMANDS = [(page, line) for page, text in PAGES.items() for line in blocks(text)]


# ---- exercisers: each takes the line, the folder of a finished quickstart, and a stand-in for Python


def run_for_real(line: str, quickstart: Quickstart) -> str:
    """Run the line as it stands in the quickstart's folder; its output."""
    words = shlex.split(line)
    if words[0] == "rating-train":
        words[:1] = [sys.executable, "-m", "rating_train"]
    done = subprocess.run(
        words,
        cwd=quickstart.folder,
        env=script_env(PYTHONPATH=str(REPO)),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, f"{line}\n{done.stdout[-4000:]}"
    return done.stdout


def the_quickstart(line: str, quickstart: Quickstart, fake: FakePython) -> None:
    assert "% of it reached" in quickstart.output


def prepare(line: str, quickstart: Quickstart, fake: FakePython) -> None:
    """With the demo's listings under the names of the page; images are found by the item's id."""
    words = shlex.split(line)
    source = quickstart.folder / words[words.index("--source") + 1]
    images = quickstart.folder / words[words.index("--images") + 1]
    listings = (quickstart.folder / "demo/catalogue/catalogue.jsonl").read_bytes()
    source.write_bytes(gzip.compress(listings))
    images.symlink_to(quickstart.folder / "demo/catalogue/images")
    out = run_for_real(line, quickstart)
    target = words[words.index("--out") + 1]
    assert f"prepared {target}" in out and (quickstart.folder / target / "manifest.json").is_file()
    assert target == load_config(REPO / "configs" / "full_ft_228m.yaml").data.path


def cost(line: str, quickstart: Quickstart, fake: FakePython) -> None:
    out = run_for_real(line, quickstart)
    assert "228,099,648" in out and all(name in out for name in CONVENTIONS)


def start_training(line: str, quickstart: Quickstart, fake: FakePython) -> None:
    """Takes a GPU: the script is run with a stand-in for Python, the settings are loaded, the batch divides."""
    words = shlex.split(line)
    options = words[2 : words.index("train")]
    ranks = int(options[1]) if options else 8
    config_file, *rest = words[words.index("train") + 1 :]
    args = parser_of("train").parse_args([config_file, *rest])
    config = load_config(REPO / args.config, args.set)
    plan_batch(config.batch.global_items, config.batch.micro_items, ranks)
    done = fake.run("launch/local.sh", *words[2:], FAKE_GPUS=str(ranks))
    assert done.returncode == 0, done.stderr
    (started,) = fake.ran
    assert f"--nproc-per-node {ranks} -m rating_train train {config_file}" in started


def evaluate(line: str, quickstart: Quickstart, fake: FakePython) -> None:
    """For real, on 2 ranks: the demo's run under the name of the page."""
    link_run(shlex.split(line)[-1], quickstart)
    assert "PLCC" in run_for_real(line, quickstart)


def report(line: str, quickstart: Quickstart, fake: FakePython) -> None:
    run = shlex.split(line)[-1]
    link_run(run, quickstart)
    assert f"{run}/report" in run_for_real(line, quickstart)


def sbatch(line: str, quickstart: Quickstart, fake: FakePython) -> None:
    """The same script runs in tests/slurm; here the settings are loaded, and the batch divides over the tasks."""
    words = shlex.split(line)
    script = next(i for i, word in enumerate(words) if word.startswith("slurm/"))
    assert (REPO / words[script]).is_file()
    options = dict(word.lstrip("-").split("=") for word in words[1:script])
    args = parser_of("train").parse_args(words[script + 1 :])
    config = load_config(REPO / args.config, args.set)
    ranks = int(options["nodes"]) * int(options["ntasks-per-node"])
    plan_batch(config.batch.global_items, config.batch.micro_items, ranks)


def test_script(line: str, quickstart: Quickstart, fake: FakePython) -> None:
    """The linters and tests that it starts are those that are running now: here it is seen to start them."""
    arguments = shlex.split(line)[2:]
    for path in (a for a in arguments if a.startswith("tests")):
        assert (REPO / path).exists()
    assert fake.run("launch/test.sh", *arguments).returncode == 0
    assert any(ran.endswith(" ".join(["-m pytest", *arguments])) for ran in fake.ran)


test_script.__test__ = False  # type: ignore[attr-defined]

EXERCISERS: list[tuple[str, Callable[[str, Quickstart, FakePython], None]]] = [
    (r"bash launch/quickstart\.sh", the_quickstart),
    (r"rating-train prepare --source \S+ --images \S+ --out \S+ --workers \d+", prepare),
    (r"rating-train cost configs/\S+\.yaml( --plcc \S+)?", cost),
    (r"bash launch/local\.sh( -n \d+)? train configs/\S+\.yaml( --set \S+=\S+)*", start_training),
    (r"bash launch/local\.sh evaluate runs/\S+", evaluate),
    (r"sbatch (--[a-z-]+=\d+ )+slurm/train\.sbatch configs/\S+\.yaml( --set \S+=\S+)*", sbatch),
    (r"rating-train report runs/\S+", report),
    (r"bash launch/test\.sh.*", test_script),
]


def link_run(name: str, quickstart: Quickstart) -> None:
    link = quickstart.folder / name
    if not link.exists():
        link.symlink_to(quickstart.run)


def parser_of(verb: str) -> argparse.ArgumentParser:
    """The parser of one verb, alone."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_verb_arguments(verb, parser)
    return parser


@pytest.fixture
def fake(tmp_path: Path) -> FakePython:
    return FakePython(tmp_path)


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=[f"{page}: {line}" for page, line in COMMANDS])
def test_command(page: str, line: str, quickstart: Quickstart, fake: FakePython) -> None:
    known = [act for pattern, act in EXERCISERS if re.fullmatch(pattern, line)]
    assert known, f"{page} has a command that nothing exercises: {line}"
    known[0](line, quickstart, fake)


def test_every_exerciser_is_needed() -> None:
    idle = [p for p, _ in EXERCISERS if not any(re.fullmatch(p, line) for _, line in COMMANDS)]
    assert not idle


def test_the_first_block_is_the_quickstart() -> None:
    first = re.search(r"^```(\w*)\n(.*?)^```", README, flags=re.M | re.S)
    assert first and first.groups() == ("bash", "bash launch/quickstart.sh\n")
    assert README.index("```bash") < 30


def test_the_table_of_commands_is_that_of_the_program() -> None:
    rows = re.findall(r"^\| `rating-train (\w+)([^`]*)` \|", README, flags=re.M)
    assert [verb for verb, _ in rows] == list(VERBS), "one row for each verb, in the order of --help"
    for verb, text in rows:
        options = {option for action in parser_of(verb)._actions for option in action.option_strings}
        for option in re.findall(r"--[a-z-]+", text):
            assert option in options, f"rating-train {verb} has no {option}"


@pytest.mark.parametrize("page", PAGES)
def test_paths_that_are_named_exist(page: str) -> None:
    named = re.findall(r"`((?:configs|tests|launch|rating_train|\.ci)/[\w./-]*[\w/])", PAGES[page])
    named += re.findall(r"\]\((?!https?:)([^)]+)\)", PAGES[page])
    missing = [path for path in named if not (REPO / path).exists() and not re.search(r"\b[A-Z]{4,}\b", path)]
    assert named and not missing


@pytest.mark.parametrize("page", PAGES)
def test_settings_that_are_named_exist(page: str) -> None:
    sections = "data|model|loss|optim|batch|zero|train|eval"
    for key, value in re.findall(rf"--set ((?:{sections})\.[a-z_.]+)=(\S+?)[`\s]", PAGES[page]):
        load_config(REPO / "configs" / "full_ft_228m.yaml", [f"{key}={value}"])
    every = to_dict(Config())
    for section, key in re.findall(rf"`({sections})\.([a-z_]+)`", PAGES[page]):
        assert key in ("py", "jsonl") or key in every[section], f"{section}.{key}"


def test_symptoms_are_what_the_program_says() -> None:
    table = README.split(" When it breaks")[1].split(".py ")[0]
    source = "".join(p.read_text("utf-8") for p in sorted((REPO / "rating_train").rglob("*.py")))
    symptoms = re.findall(r"^\| `([^`]+)`", table, flags=re.M)
    assert len(symptoms) >= 5
    for symptom in symptoms:
        for piece in re.split(r"\.\.\.|\d+", symptom):
            words = piece.strip(" ()?:")
            assert words in source, f"the program never says {words!r}"


def test_the_cost_table_is_counted() -> None:
    config = load_config(REPO / "configs" / "full_ft_228m.yaml")
    architecture = KNOWN_ARCHITECTURES[config.model.backbone]
    counted = measure_cost(architecture, config.data.image_px, config.data.text_tokens, None)
    assert f"sequence of {counted.visual_tokens + counted.text_tokens} tokens" in README
    for row in counted.rows:
        numbers = f"| {row.count / 1e9:.1f} G | {row.c:.3f} | {row.e:.3f} |"
        assert re.search(rf"^\| `{row.convention}`: .* {re.escape(numbers)}$", README, flags=re.M), numbers


def test_the_run_directory_is_the_real_one(quickstart: Quickstart) -> None:
    tree = README.split(" A run directory")[1].split(".py ")[0]
    for name in (run_dir.CONFIG_FILE, run_dir.PROVENANCE_FILE, run_dir.TRAIN_LOG, run_dir.EVAL_LOG):
        assert name in tree and (quickstart.run / name).is_file()
    for name in re.findall(r"^  (\w+)/", tree, flags=re.M):
        assert (quickstart.run / name).is_dir(), name


def test_the_layers_are_those_that_a_test_holds() -> None:
    from tests.repo.test_layers import LAYERS

    house = README.split("## The house")[1].split("```")[1]
    for layer, names in LAYERS.items():
        (line,) = re.findall(rf"^L{layer}  (.*)$", house, flags=re.M)
        assert set(names.split()) <= set(re.findall(r"\w+", line)), f"L{layer}"
