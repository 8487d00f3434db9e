"""Every line of a ``bash`` block on the project's pages is run here, or checked word by word where it takes a GPU.

A line that no exerciser below knows fails the test: add one, or leave the line out. The lines run in a fresh checkout
in which the quickstart has been run.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable

import pytest

from rating_train.cli import verb_module
from rating_train.config.load import load_config
from rating_train.config.resolve import plan_batch
from rating_train.scoring.ces import CONVENTIONS
from tests.helpers.forked import readable, zygote
from tests.helpers.hub import serve
from tests.helpers.ranks import script_env
from tests.repo.conftest import REPO, FakePython, Quickstart
from tests.repo.pages import PAGES, RECIPES, command_lines, section
from tests.repo.test_recipes import write_csv

pytestmark = pytest.mark.timeout(800)

#: The tutorial's are walked in their order by test_tutorial.py.
WALKED = "docs/tutorial.md"
#: Those of the README's first two recipes run in test_recipes.py, in their order.
IN_RECIPES = [line for title in RECIPES[:2] for line in command_lines(section("README.md", title))]
COMMANDS = [
    (page, line)
    for page, text in PAGES.items()
    for line in command_lines(text)
    if page != WALKED and (page != "README.md" or line not in IN_RECIPES)
]
Exerciser = Callable[[str, Quickstart, FakePython], None]


def run_for_real(line: str, quickstart: Quickstart) -> str:
    """Run the line in the checkout; its output."""
    words = shlex.split(line)
    if words[0] == "rating-train":
        words[:1] = [sys.executable, "-m", "rating_train"]
    done = subprocess.run(
        words,
        cwd=quickstart.folder,
        env=script_env(PYTHONPATH=str(quickstart.folder)),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, f"{line}\n{done.stdout[-4000:]}"
    return done.stdout


def parser_of(verb: str) -> argparse.ArgumentParser:
    """The parser of one verb, alone."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    verb_module(verb).add_arguments(parser)
    return parser


# ---- exercisers: each takes the line, the checkout after the quickstart, and a stand-in for Python


def the_quickstart(line: str, quickstart: Quickstart, fake: FakePython) -> None:
    assert "% of it reached" in quickstart.output


def baselines(line: str, quickstart: Quickstart, fake: FakePython) -> None:
    """On the demo's dataset, under the name of the page."""
    pytest.importorskip("sklearn", reason="scikit-learn is not installed (extra `bench`)")
    data = quickstart.folder / shlex.split(line)[-1]
    if not data.exists():
        data.parent.mkdir(exist_ok=True)
        data.symlink_to(quickstart.folder / "demo" / "data")
    out = run_for_real(line, quickstart)
    assert re.search(r"^training mean .*RMSE 0\.\d{4}", out, flags=re.M)
    assert re.search(r"^ridge on TF-IDF .*PLCC -?0\.\d{4}", out, flags=re.M)


def cost(line: str, quickstart: Quickstart, fake: FakePython) -> None:
    out = run_for_real(line, quickstart)
    assert "228,099,648" in out and all(name in out for name in CONVENTIONS)


def cost_sweep(line: str, quickstart: Quickstart, fake: FakePython) -> None:
    out = run_for_real(line, quickstart)
    assert "PLCC for equal CES" in out and (quickstart.folder / shlex.split(line)[-1]).is_dir()


def start_training(line: str, quickstart: Quickstart, fake: FakePython) -> None:
    """Small models for real. Others take a GPU: settings are loaded, the batch divides, the script starts torchrun."""
    words = shlex.split(line.removeprefix("HF_HUB_OFFLINE=1 "))  # it is set here anyway
    options = words[2 : words.index("train")]
    config_file, *rest = words[words.index("train") + 1 :]
    if config_file.endswith("_cpu.yaml"):
        assert "evaluation at step" in run_for_real(line, quickstart)
        return
    ranks = int(options[1]) if options else 8
    check_batch([config_file, *rest], ranks)
    done = fake.run("launch/local.sh", *words[2:], FAKE_GPUS=str(ranks))
    assert done.returncode == 0, done.stderr
    (started,) = fake.ran
    assert f"--nproc-per-node {ranks} -m rating_train train {config_file}" in started


def check_batch(words: list[str], ranks: int) -> None:
    """The arguments of ``train`` are read, and the global batch divides over the ranks."""
    args = parser_of("train").parse_args(words)
    config = load_config(REPO / args.config, args.set)
    plan_batch(config.batch.global_items, config.batch.micro_items, ranks)


def judge(line: str, quickstart: Quickstart, fake: FakePython) -> None:
    """With options; the run is the quickstart's own."""
    assert "mean error" in run_for_real(line, quickstart)


def download(line: str, quickstart: Quickstart, fake: FakePython) -> None:
    """From a hub on this machine that serves the demo's model under the name of the page."""
    words = shlex.split(line)
    with serve(words[2], quickstart.folder / "demo" / "model") as hub:
        done = subprocess.run(
            words,
            cwd=quickstart.folder,
            env={**script_env(), **hub.env(quickstart.folder / "hub")},
            capture_output=True,
            text=True,
            timeout=100,
        )
    assert done.returncode == 0, done.stderr
    folder = quickstart.folder / words[words.index("--local-dir") + 1]
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= {p.name for p in folder.iterdir()}


def copy_site(line: str, quickstart: Quickstart, fake: FakePython) -> None:
    run_for_real(line, quickstart)
    copied = quickstart.folder / shlex.split(line)[-1]
    assert "CLUSTER_GPUS_PER_NODE" in copied.read_text()
    copied.unlink()  # the other lines need no site


def submit(line: str, quickstart: Quickstart, fake: FakePython) -> None:
    """tests/slurm submits for real; here the jobs are planned, on nodes of 8 GPUs."""
    words = [*shlex.split(line), "--dry-run"]
    site = quickstart.folder / "site.env"
    site.write_text("CLUSTER_GPUS_PER_NODE=8 CLUSTER_CPUS_PER_TASK=9\n")
    done = subprocess.run(
        words,
        cwd=quickstart.folder,
        env=script_env(CLUSTER_ENV=str(site)),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "--nodes=2 --ntasks-per-node=8" in done.stdout and "slurm/evaluate.sbatch" in done.stdout


def sbatch(line: str, quickstart: Quickstart, fake: FakePython) -> None:
    """The same script runs in tests/slurm; here the batch divides over the tasks, and each has enough cores."""
    words = shlex.split(line)
    script = next(i for i, word in enumerate(words) if word.startswith("slurm/"))
    assert (REPO / words[script]).is_file()
    options = dict(word.lstrip("-").split("=") for word in words[1:script])
    check_batch(words[script + 1 :], int(options["nodes"]) * int(options["ntasks-per-node"]))
    args = parser_of("train").parse_args(words[script + 1 :])
    workers = load_config(REPO / args.config, args.set).data.workers
    assert int(options["cpus-per-task"]) > workers, "a core for the rank and for each of its workers"


def sbatch_evaluate(line: str, quickstart: Quickstart, fake: FakePython) -> None:
    """It runs in tests/slurm; here the script is there, and its own options ask for a GPU and cores."""
    script = (REPO / shlex.split(line)[1]).read_text()
    assert "\n#SBATCH --gpus-per-node=" in script and "\n#SBATCH --cpus-per-task=" in script


def multi_node(line: str, quickstart: Quickstart, fake: FakePython) -> None:
    """tests/slurm/test_multi_node.py runs the script; here it starts torchrun for this machine of several."""
    words = shlex.split(line)[2:]
    words[words.index("--head") + 1] = "localhost"  # a host of the page is not known here
    done = fake.run("launch/multi_node.sh", *words, FAKE_GPUS="4")
    assert done.returncode == 0, done.stderr
    assert "--nnodes 2 --nproc-per-node 4" in fake.ran[0]


def test_script(line: str, quickstart: Quickstart, fake: FakePython) -> None:
    """The linters and tests that it starts are those that are running now: here it is seen to start them."""
    arguments = shlex.split(line)[2:]
    for path in (a for a in arguments if a.startswith("tests")):
        assert (REPO / path).exists()
    assert fake.run("launch/test.sh", *arguments).returncode == 0
    started = " ".join(["-m pytest", *arguments]) if arguments else "-m pytest -n "
    assert any(started in ran for ran in fake.ran)


def gpu_tests(line: str, quickstart: Quickstart, fake: FakePython) -> None:
    """They are found; where there is no GPU each says why it is skipped."""
    done = subprocess.run(
        [sys.executable, *shlex.split(line)[1:], "--collect-only", "-q"],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=REPO,
    )
    assert done.returncode == 0 and "test_runs.py::" in done.stdout, done.stdout + done.stderr


test_script.__test__ = False  # type: ignore[attr-defined]


def example(line: str, quickstart: Quickstart, fake: FakePython) -> None:
    """With the run of the quickstart; tests/e2e/test_examples.py compares the numbers."""
    catalogue = quickstart.folder / "demo" / "catalogue"
    listings = [json.loads(row) for row in (catalogue / "catalogue.jsonl").read_text("utf-8").splitlines()]
    write_csv(quickstart.folder / "products.csv", listings[:50])
    if not (quickstart.folder / "images").exists():
        (quickstart.folder / "images").symlink_to(catalogue / "images")
    words = [
        word if word != "8080" else "0" for word in shlex.split(line)[1:]
    ]  # that port may be in use here
    process = zygote().start(words, script_env(OMP_NUM_THREADS="1"), cwd=quickstart.folder)
    try:
        if words[-1] != "0":
            out, _ = process.communicate(timeout=100)
            assert process.returncode == 0 and re.search(r"^\d+ (scores|rows)", out, flags=re.M), out
            return
        said = ""
        while "http://127.0.0.1:" not in said:
            assert process.stdout is not None and readable(process.stdout.fileno(), 60), said
            said = process.stdout.readline()
            assert said, "the server ended"
    finally:
        process.kill()


EXERCISERS: list[tuple[str, Exerciser]] = [
    (r"python examples/\w+\.py runs/demo_cpu( \S+)*", example),
    (r"bash launch/quickstart\.sh", the_quickstart),
    (r"python benchmarks/baselines\.py \S+", baselines),
    (r"rating-train cost configs/\S+\.yaml( --plcc \S+)?( --budget)?", cost),
    (r"rating-train cost configs/\S+\.yaml( --sweep \S+)+ --plcc \S+ --out \S+", cost_sweep),
    (r"rating-train cost configs/\S+\.yaml --items .*", cost),
    (r"hf download HuggingFaceTB/\S+ --local-dir models/\S+ --include .*", download),
    (
        r"(HF_HUB_OFFLINE=1 )?bash launch/local\.sh( -n \d+)? train configs/\S+\.yaml( --set \S+=\S+)*",
        start_training,
    ),
    (r"rating-train evaluate runs/demo_cpu .*", judge),
    (r"cp slurm/cluster\.env\.example slurm/cluster\.env", copy_site),
    (r"bash slurm/train\.sbatch configs/\S+\.yaml --nodes \d+", submit),
    (r"sbatch (--[a-z-]+=\d+ )+slurm/train\.sbatch configs/\S+\.yaml( --set \S+=\S+)*", sbatch),
    (r"sbatch slurm/evaluate\.sbatch runs/\S+", sbatch_evaluate),
    (r"bash launch/multi_node\.sh --nodes 2 .*", multi_node),
    (r"bash launch/test\.sh.*", test_script),
    (r"python -m pytest tests/gpu", gpu_tests),
]


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=[f"{page}: {line}" for page, line in COMMANDS])
def test_command(page: str, line: str, quickstart: Quickstart, fake: FakePython) -> None:
    known = [act for pattern, act in EXERCISERS if re.fullmatch(pattern, line)]
    assert known, f"{page} has a command that nothing exercises: {line}"
    known[0](line, quickstart, fake)


def test_every_exerciser_is_needed() -> None:
    idle = [p for p, _ in EXERCISERS if not any(re.fullmatch(p, line) for _, line in COMMANDS)]
    assert not idle
