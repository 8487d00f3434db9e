"""Every script parses, explains itself, and starts what it says. A stand-in for Python writes down its arguments."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.cli import fresh_python, rating_train
from tests.helpers.ranks import script_env
from tests.repo.conftest import REPO, FakePython

pytestmark = pytest.mark.timeout(120)

SCRIPTS = sorted(
    [
        *(REPO / "launch").glob("*.sh"),
        *(REPO / "slurm").glob("*.s*"),
        *(REPO / "benchmarks").glob("*.sh"),
        REPO / ".ci" / "run",
    ],
    key=str,
)
SOURCED = ("env.sh", "job.sh")
WITH_HELP = [s for s in SCRIPTS if s.parent.name == "launch" and s.name != "env.sh"]
NAMES = [str(s.relative_to(REPO)) for s in SCRIPTS]


@pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
def test_bash_can_read_it(script: Path) -> None:
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
def test_it_is_executable_and_strict(script: Path) -> None:
    text = script.read_text()
    if script.name in SOURCED:  # strictness is their caller's
        assert text.startswith("# shellcheck shell=bash")
        return
    assert text.startswith(("#!/usr/bin/env bash\n", "#!/bin/bash\n"))
    assert "\nset -euo pipefail\n" in text
    assert os.access(script, os.X_OK)


@pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
def test_shellcheck_has_nothing_to_say(script: Path) -> None:
    shellcheck = shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([shellcheck, "-x", str(script)], capture_output=True, text=True, cwd=REPO)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", WITH_HELP, ids=[s.name for s in WITH_HELP])
def test_help(script: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", str(script), "--help"], capture_output=True, text=True, timeout=10, cwd=tmp_path
    )
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: launch/{script.name}")
    assert done.stderr == "" and not list(tmp_path.iterdir())


def refuses(fake: FakePython, script: str, arguments: list[str], message: str) -> None:
    """Exit code 2, one line that names the script and holds ``message``, and nothing started."""
    done = fake.run(f"launch/{script}", *arguments)
    assert done.returncode == 2
    assert message in done.stderr and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"{script}: error: ")
    assert fake.ran == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no verb given"),
        (["configs/demo_cpu.yaml"], "launch/local.sh train configs/demo_cpu.yaml"),
        (["cost", "configs/demo_cpu.yaml"], "use: rating-train cost configs/demo_cpu.yaml"),
        (["-n"], "-n needs a number"),
        (["-n", "0", "train", "configs/demo_cpu.yaml"], "-n is '0'"),
        (["-n", "two", "train", "configs/demo_cpu.yaml"], "-n is 'two'"),
        (["--gpus", "2", "train", "configs/demo_cpu.yaml"], "unknown option --gpus"),
        (["bench"], "the first argument of bench is its configuration file"),
        (["train"], "the first argument of train is its configuration file"),
        (["train", "--set", "a=b"], "the first argument of train is its configuration file"),
        (["train", "configs/none.yaml"], "configuration file not found: configs/none.yaml"),
        (["evaluate", "runs/no-such-run"], "run directory not found: runs/no-such-run"),
        (["evaluate", "configs"], "configs/config.yaml"),
        (["train", "configs/demo_cpu.yaml", "--set", "train.epoch=1"], "did you mean `train.epochs`?"),
        (["train", "configs/demo_cpu.yaml", "--set=zero.stage=7"], "`zero.stage` is 7 (int)"),
    ],
)
def test_local_says_what_is_wrong_in_one_line_and_starts_nothing(
    fake: FakePython, arguments: list[str], message: str
) -> None:
    refuses(fake, "local.sh", arguments, message)


@pytest.mark.parametrize(("gpus", "option", "expected"), [("0", [], 2), ("4", [], 4), ("4", ["-n", "3"], 3)])
def test_local_starts_torchrun(fake: FakePython, gpus: str, option: list[str], expected: int) -> None:
    words = ["train", "configs/demo_cpu.yaml", "--set", "train.epochs=1", "--resume", "must"]
    done = fake.run("launch/local.sh", *option, *words, FAKE_GPUS=gpus)
    assert done.returncode == 0, done.stderr
    cores = len(os.sched_getaffinity(0))
    assert fake.ran == [
        f"OMP_NUM_THREADS={max(1, cores // expected)} -m rating_train.distributed.launcher runs/demo_cpu --standalone "
        f"--nproc-per-node {expected} -m rating_train {' '.join(words)}"
    ]


@pytest.mark.parametrize(("workers", "warned"), [("8", True), ("0", False)])
def test_too_few_cores_for_the_dataloader_workers_are_a_warning(
    fake: FakePython, workers: str, warned: bool
) -> None:
    one_each = str(len(os.sched_getaffinity(0)))
    words = ["-n", one_each, "train", "configs/full_ft_228m.yaml", "--set", f"data.workers={workers}"]
    done = fake.run("launch/local.sh", *words)
    assert done.returncode == 0, done.stderr
    if not warned:
        assert done.stderr == ""
        return
    assert "warning: each rank has 1 of the 9 cores that it and its 8 DataLoader workers need" in done.stderr
    assert "fix: start fewer processes (-n), or --set data.workers=0" in done.stderr


def test_local_takes_paths_of_the_folder_it_is_called_from(fake: FakePython, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("name: mine\n")
    done = fake.run("launch/local.sh", "train", "mine.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert fake.ran[0].endswith("train mine.yaml")


def test_variables_that_are_set_stay(fake: FakePython) -> None:
    fake.run("launch/local.sh", "train", "configs/demo_cpu.yaml", OMP_NUM_THREADS="7")
    assert fake.ran[0].startswith("OMP_NUM_THREADS=7 ")


def test_another_python_is_refused_by_name(tmp_path: Path) -> None:
    old = tmp_path / "python"
    old.write_text('#!/usr/bin/env bash\n[[ "$1" == --version ]] && echo Python 3.8.1\nexit 1\n')
    old.chmod(0o755)
    for script in ("local.sh train configs/demo_cpu.yaml", "quickstart.sh", "test.sh"):
        name, *arguments = script.split()
        done = subprocess.run(
            ["bash", f"launch/{name}", *arguments],
            env=script_env(RATING_TRAIN_PYTHON=str(old), QUICKSTART_DIR=str(tmp_path)),
            cwd=REPO,
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert done.returncode == 2
        assert "no Python 3.10, 3.11 or 3.12" in done.stderr and "Python 3.8.1" in done.stderr


def test_a_missing_package_is_named_where_nothing_may_be_installed(tmp_path: Path) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/usr/bin/env bash\nexec {sys._base_executable} -S -E "$@"\n')  # type: ignore[attr-defined]
    bare.chmod(0o755)
    done = subprocess.run(
        ["bash", "launch/quickstart.sh"],
        env=script_env(RATING_TRAIN_PYTHON=str(bare), QUICKSTART_DIR=str(tmp_path / "q")),
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 2
    assert "lacks torch deepspeed" in done.stderr and not (tmp_path / "q").exists()


def test_quickstart_refuses_an_argument(fake: FakePython) -> None:
    done = fake.run("launch/quickstart.sh", "now")
    assert done.returncode == 2 and "unknown argument 'now'" in done.stderr and fake.ran == []


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """A folder in which the quickstart finds its first two steps done."""
    folder = tmp_path / "quickstart"
    for name in ("demo/catalogue", "demo/model", "demo/data", "runs/demo_cpu"):
        (folder / name).mkdir(parents=True)
    (folder / "demo/catalogue/upper_bounds.json").write_text("{}")
    (folder / "demo/data/manifest.json").write_text("{}")
    return folder


def test_quickstart_stops_where_training_was_stopped(fake: FakePython, prepared: Path) -> None:
    (prepared / "runs/demo_cpu/REQUEUE").write_text("signal SIGINT at step 30\n")
    done = fake.run("launch/quickstart.sh", QUICKSTART_DIR=str(prepared), FAKE_FAILURE="rating_train train")
    assert done.returncode == 1
    assert "signal SIGINT at step 30" in done.stdout and "run launch/quickstart.sh again" in done.stdout
    assert len(fake.ran) == 1, "nothing after the training"


def test_quickstart_stops_at_ctrl_c_although_training_ends_with_0(fake: FakePython, prepared: Path) -> None:
    done = fake.run("launch/quickstart.sh", QUICKSTART_DIR=str(prepared), FAKE_SIGNAL="INT")
    assert done.returncode == 1 and "stopped (Ctrl-C); run launch/quickstart.sh again" in done.stdout
    assert len(fake.ran) == 1, "nothing after the training"


def test_quickstart_stops_where_training_failed(fake: FakePython, prepared: Path) -> None:
    done = fake.run("launch/quickstart.sh", QUICKSTART_DIR=str(prepared), FAKE_FAILURE="rating_train train")
    assert done.returncode == 1 and "4/5" not in done.stdout and len(fake.ran) == 1


def test_quickstart_passes_settings_on(fake: FakePython, prepared: Path) -> None:
    settings = "train.epochs=2 optim.lr.head=1e-4"
    done = fake.run("launch/quickstart.sh", QUICKSTART_DIR=str(prepared), QUICKSTART_SET=settings)
    assert done.returncode == 0, done.stderr
    train, evaluate, report, check = fake.ran
    assert train.endswith("configs/demo_cpu.yaml --set train.epochs=2 --set optim.lr.head=1e-4")
    assert evaluate.endswith("-m rating_train evaluate runs/demo_cpu")
    assert report.endswith("-m rating_train report runs/demo_cpu")
    assert check.endswith("demo/catalogue/upper_bounds.json runs/demo_cpu --enforce")


def test_test_sh_runs_every_check_also_after_a_failure(fake: FakePython) -> None:
    done = fake.run("launch/test.sh", "tests/unit", "-k", "ces", FAKE_FAILURE="-m mypy")
    assert done.returncode == 1
    assert [line.split(" ", 1)[1] for line in fake.ran] == [
        "-m ruff check .",
        "-m ruff format --check .",
        "-m mypy",
        "-m pytest tests/unit -k ces",
    ]
    assert "FAILED after" in done.stdout and done.stdout.rstrip().endswith(": mypy")


def test_test_sh_passes_when_all_do(fake: FakePython) -> None:
    done = fake.run("launch/test.sh")
    assert done.returncode == 0 and "all passed in" in done.stdout
    assert any("-m pytest -n " in ran for ran in fake.ran)


def test_ci_runs_test_sh_and_nothing_else(tmp_path: Path) -> None:
    for folder in (".ci", "launch", "bin"):
        (tmp_path / folder).mkdir()
    shutil.copy(REPO / ".ci" / "run", tmp_path / ".ci" / "run")
    (tmp_path / "launch" / "test.sh").write_text('echo "CI=$CI arguments=$# in=$(wc -c) at=$PWD"\nexit 7\n')
    python3 = tmp_path / "bin" / "python3"  # has venv, so nothing is installed
    python3.write_text("#!/usr/bin/env bash\nexit 0\n")
    python3.chmod(0o755)
    env = script_env()
    env["PATH"] = f"{tmp_path / 'bin'}{os.pathsep}{env['PATH']}"
    done = subprocess.run(
        [str(tmp_path / ".ci" / "run")], env=env, capture_output=True, text=True, timeout=30, cwd="/"
    )
    assert done.returncode == 7, done.stderr
    assert done.stdout == f"CI=true arguments=0 in=0 at={tmp_path}\n"


# ---- several machines without a scheduler

TWO_MACHINES = ["--nodes", "2", "--node-rank", "1", "--head", "localhost:29511"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--nodes is ''"),
        (["--nodes", "two"], "--nodes is 'two'"),
        (["--nodes", "2", "--node-rank", "2"], "--node-rank is '2', expected 0 to 1"),
        (["--nodes", "2", "--node-rank", "0"], "--head is missing"),
        (["--nodes", "2", "--node-rank", "0", "--head", "localhost:http"], "--head is 'localhost:http'"),
        (
            ["--nodes", "2", "--node-rank", "0", "--head", "no.such.host.invalid"],
            "cannot resolve 'no.such.host.invalid'",
        ),
        ([*TWO_MACHINES, "-n", "0", "train"], "-n is '0'"),
        ([*TWO_MACHINES, "--max-restarts", "-1", "train"], "--max-restarts is '-1'"),
        ([*TWO_MACHINES, "--port", "1"], "unknown option --port"),
        ([*TWO_MACHINES, "report", "runs/x"], "expected train or evaluate, found 'report'"),
        ([*TWO_MACHINES, "train", "configs/none.yaml"], "file not found: configs/none.yaml (seen from "),
        (
            [*TWO_MACHINES, "train", "configs/demo_cpu.yaml", "--set", "train.epoch=1"],
            "did you mean `train.epochs`?",
        ),
    ],
)
def test_multi_node_says_what_is_wrong_in_one_line_and_starts_nothing(
    fake: FakePython, arguments: list[str], message: str
) -> None:
    refuses(fake, "multi_node.sh", arguments, message)


@pytest.mark.parametrize(("rank", "is_host", "address"), [("0", 1, " --local-addr localhost"), ("1", 0, "")])
def test_multi_node_starts_torchrun(fake: FakePython, rank: str, is_host: int, address: str) -> None:
    words = ["train", "configs/demo_cpu.yaml", "--set", "train.epochs=1"]
    where = ["--nodes", "2", "--node-rank", rank, "--head", "localhost", "--max-restarts", "1"]
    done = fake.run("launch/multi_node.sh", *where, *words, FAKE_GPUS="4", OMP_NUM_THREADS="3")
    assert done.returncode == 0, done.stderr
    assert fake.ran == [
        f"OMP_NUM_THREADS=3 -m rating_train.distributed.launcher runs/demo_cpu --nnodes 2 --nproc-per-node 4 "
        f"--rdzv-backend c10d --rdzv-endpoint localhost:29500 --rdzv-id rating_train --rdzv-conf is_host={is_host}"
        f"{address} --max-restarts 1 -m rating_train {' '.join(words)}"
    ]


# ---- submitting to Slurm


def submit(*words: str, site: str = "", folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """`rating-train submit` in ``folder``, with ``site`` as its slurm/cluster.env and no sbatch on the PATH."""
    (folder / "cluster.env").write_text(site)
    return subprocess.run(
        [sys.executable, "-m", "rating_train", "submit", *words],
        env=script_env(CLUSTER_ENV=str(folder / "cluster.env"), PATH="/usr/bin:/bin", **env),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_submit_shows_what_it_would_do_and_does_nothing(tmp_path: Path) -> None:
    site = 'CLUSTER_GPUS_PER_NODE=8 CLUSTER_GPU_TYPE=h200\nCLUSTER_SBATCH="--partition=p --account=a"\n'
    config = str(REPO / "configs" / "full_ft_228m.yaml")
    words = ["--nodes", "2", "--time", "1-00:00:00", "--after", "77", "--sbatch=--qos=long", "--dry-run"]
    done = submit(config, *words, site=site, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    train, evaluate = (line for line in done.stdout.splitlines() if line.startswith("sbatch "))
    for option in (
        "--partition=p --account=a --qos=long --nodes=2 --ntasks-per-node=8 --cpus-per-task=9 --gpus-per-node=h200:8",
        "--time=1-00:00:00",
        "--dependency=singleton,afterok:77",
        "slurm/train.sbatch",
        "/runs/full_ft_228m/submitted-",
    ):
        assert option in train
    assert "--nodes=1" in evaluate and "slurm/evaluate.sbatch" in evaluate and "afterok:" in evaluate
    assert "--time" not in evaluate, "the time of training is not that of an evaluation"
    assert "batch: 64 = 16 ranks x 4 x 1 accumulation" in done.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cluster.env"]
    alone = submit(config, "--dry-run", "--no-evaluate", folder=tmp_path).stdout
    assert "evaluate" not in alone and "--gpus-per-node=0" in alone


@pytest.mark.parametrize(
    ("words", "site", "messages"),
    [
        (
            ["--nodes", "0", "--after", "x", "--time", "soon"],
            "",
            ["--nodes is 0", "--after is 'x'", "--time is 'soon'"],
        ),
        ([], "CLUSTER_GPUS_PER_NODE=many", ["CLUSTER_GPUS_PER_NODE is 'many'"]),
        ([], "CLUSTER_SBATCH=(", ["the site's settings cannot be read"]),
        (["--nodes", "3"], "", ["a global batch of 64 items does not divide over 3 ranks"]),
        (["--set", "train.epoch=1"], "", ["did you mean `train.epochs`?"]),
        (["{config}"], "", ["two configurations have the run directory runs/full_ft_228m"]),
        ([], "", ["sbatch not found"]),
    ],
)
def test_submit_says_what_is_wrong_in_one_line(
    tmp_path: Path, words: list[str], site: str, messages: list[str]
) -> None:
    config = str(REPO / "configs" / "full_ft_228m.yaml")
    words = [word.format(config=config) for word in words]
    if messages == ["sbatch not found"] and shutil.which("sbatch", path="/usr/bin:/bin"):
        pytest.skip("there is an sbatch here")
    done = submit(config, *words, site=site, folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("rating-train submit: error: ") and done.stderr.count("\n") == 1
    assert all(message in done.stderr for message in messages), done.stderr
    assert not (tmp_path / "runs").exists()


def test_submit_needs_no_torch() -> None:
    program = (
        "import sys, rating_train.commands.submit, rating_train.cluster.submission\n"
        "heavy = {'torch', 'deepspeed', 'streaming', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    fresh_python(program)


def test_the_example_of_the_sites_settings_is_read_and_complete(tmp_path: Path) -> None:
    """It sets every name that `rating-train submit` asks for, and what is in the environment wins over it."""
    example = REPO / "slurm" / "cluster.env.example"
    config = str(REPO / "configs" / "full_ft_228m.yaml")
    done = submit(
        config,
        "--dry-run",
        site=example.read_text(),
        folder=tmp_path,
        CLUSTER_TASKS_PER_NODE="4",
        CLUSTER_TIME="30",
    )
    assert done.returncode == 0, done.stderr
    assert "--ntasks-per-node=4" in done.stdout and "--time=30" in done.stdout
    asked = re.search(
        r"SITE_NAMES = \((.*?)\)", (REPO / "rating_train" / "cluster" / "site.py").read_text(), re.S
    )
    assert asked is not None
    for name in re.findall(r'"(\w+)"', asked[1]):
        assert f"\n{name}=" in example.read_text()


def test_preflight_of_this_machine_alone(tmp_path: Path) -> None:
    done = rating_train("preflight", tmp_path / "run", env=script_env())
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASS  ") == 6 and "all checks passed (1 ranks, 1 nodes)" in done.stdout
    assert list((tmp_path / "run").iterdir()) == [], "what it wrote is gone again"
    (tmp_path / "file").touch()
    done = rating_train("preflight", tmp_path / "file", env=script_env())
    assert done.returncode == 1 and "FAIL  shared folder: rank 0" in done.stdout and " | fix: " in done.stdout


def test_a_job_checks_its_nodes_with_the_settings_that_it_trains_with() -> None:
    """The function of slurm/job.sh, with `srun` written down instead: on the real Slurm in tests/slurm."""
    lines = [
        'source "$1"; shift',
        'job_srun() { printf "%s\\n" "$@"; job_code=0; }',
        "PYTHON=python PREFLIGHT=1",
        'job_preflight runs/a "$@"',
    ]
    words = ["a.yaml", "--set", "train.device=cpu", "--resume", "must", "--set=data.workers=2"]
    script = ["bash", "-euc", "\n".join(lines), "test", str(REPO / "slurm" / "job.sh"), *words]
    done = subprocess.run(script, capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        *("python", "-m", "rating_train", "preflight", "runs/a", "--config", "a.yaml"),
        *("--set=train.device=cpu", "--set=data.workers=2"),
    ]


def test_a_job_meets_at_a_port_at_which_nothing_listens() -> None:
    """The function of slurm/job.sh; a busy port would end the job before it starts."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
        script = [
            "bash",
            "-euc",
            'source "$1"; job_free_port "$2"',
            "test",
            str(REPO / "slurm" / "job.sh"),
            str(port),
        ]
        free = subprocess.run(script, capture_output=True, text=True, timeout=20)
        other.listen()
        busy = subprocess.run(script, capture_output=True, text=True, timeout=20)
    assert free.stdout.split() == [str(port)] and int(busy.stdout) > port, (free, busy)


def matrix(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "launch/matrix.sh", *words], capture_output=True, text=True, timeout=60, cwd=REPO
    )


def test_matrix_shows_what_it_would_do_and_does_nothing(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    done = matrix("--dry-run", "--cache", str(cache), "--tests", "unit", "py310-torch28-tf4")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith("py310-torch28-tf4: ") and "torch ==2.8.*, transformers >=4.57,<5" in line
    assert "install, tests/unit, demo" in line and not cache.exists()
    everything = matrix("--dry-run", "--cache", str(cache)).stdout
    assert len(everything.splitlines()) == 6
    for name in re.findall(r"^(py\S+):", everything, flags=re.M):
        assert name in matrix("--help").stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["py27"], "unknown name 'py27'"),
        (["--tests", "all"], "expected fast or unit"),
        (["--quick"], "'--quick'"),
    ],
)
def test_matrix_says_what_is_wrong_in_one_line(words: list[str], message: str) -> None:
    done = matrix(*words)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


def test_matrix_runs_no_step_again_that_passed(tmp_path: Path) -> None:
    folder = tmp_path / "py311-torch-new-tf4"
    folder.mkdir()
    for step in ("install", "tests", "demo"):
        (folder / f"{step}.result").write_text(f"passed in 7 s: {step}\n")
    (folder / "versions").write_text("3.11.7 2.15.0 4.57.6 0.19.8 0.13.0\n")
    (folder / "tests.log").write_text("...\n===== 12 passed, 1 skipped in 3.00s =====\n")
    done = matrix("--cache", str(tmp_path), folder.name)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == (
        "| py311-torch-new-tf4 | 3.11.7 2.15.0 4.57.6 0.19.8 0.13.0 | passed in 7 s: install | "
        "12 passed, 1 skipped in 3.00s | passed in 7 s: demo |"
    )
    assert not (folder / "venv").exists()
