"""The scripts of slurm/ on a real Slurm of two nodes: signals, requeues, time limits, arrays, dependencies."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from tests.conftest import REPO
from tests.helpers.runs import read_ids, read_log
from tests.helpers.small_shards import reshard
from tests.slurm.conftest import Cluster, wait_until

pytestmark = pytest.mark.timeout(900)

TWO_NODES = ("--nodes=2", "--ntasks-per-node=1")
SLURM = REPO / "slurm"
LONG = {"epochs": 4000, "stop_check_steps": 2, "save_every_steps": 0}


@pytest.fixture(autouse=True)
def free_nodes(cluster: Cluster) -> Iterator[None]:
    """What a failed test leaves in the queue does not take the nodes of the next one."""
    yield
    cluster.cancel_all()


@pytest.fixture
def config(cluster: Cluster, tiny_config: Callable[..., Path]) -> Callable[..., Path]:
    """As ``tiny_config``, with the runs in the cluster's folder."""

    def write(name: str, **train: object) -> Path:
        return tiny_config(name, runs_dir=str(cluster.folder / "runs"), train={**LONG, **train})

    return write


def wait_for_step(cluster: Cluster, run: Path, step: int) -> None:
    log = run / "train.jsonl"
    wait_until(
        lambda: log.is_file() and len(log.read_text().splitlines()) >= step, 250, f"step {step}", cluster.logs
    )


def saved_step(run: Path) -> int:
    return json.loads((run / "checkpoints" / "latest.json").read_text())["step"]


def test_signals_and_requeues_leave_no_trace_in_a_run(cluster: Cluster, config: Callable[..., Path]) -> None:
    """One job is left alone; its twin gets USR1, then `scontrol requeue`: same losses, same ids, bit for bit."""
    steps = 100
    plain, broken = config("plain", max_steps=steps), config("broken", max_steps=steps)
    a, b = cluster.folder / "runs" / "plain", cluster.folder / "runs" / "broken"
    first = cluster.sbatch(*TWO_NODES, "--output=plain.log", SLURM / "train.sbatch", plain)
    assert cluster.wait_for_end(first)["JobState"] == "COMPLETED", cluster.logs()

    job = cluster.sbatch(*TWO_NODES, "--output=broken.log", SLURM / "train.sbatch", broken)
    wait_for_step(cluster, b, 5)
    signal_in_time(cluster, job, job)
    cluster.wait_for_requeue(job)
    stopped = saved_step(b)
    assert 5 <= stopped < steps
    log = (cluster.folder / "broken.log").read_text()
    assert f"requeued 1 of at most 20: signal SIGUSR1 at step {stopped}" in log

    wait_for_step(cluster, b, stopped + 5)
    for process in rank_processes(job):  # Slurm has them continue when it ends them
        process.suspend()
    cluster.user("scontrol", "requeue", job)
    cluster.wait_for_requeue(job)
    known = cluster.wait_for_end(job)
    assert known["JobState"] == "COMPLETED" and known["Restarts"] == "2", cluster.logs()
    log = (cluster.folder / "broken.log").read_text()
    assert "2 ranks, 2 nodes on cpu" in log and "done: nothing left to requeue for" in log
    assert f"resuming from step {stopped} of {steps}" in log
    assert "not requeued by itself: Slurm is ending this job" in log

    assert [row["step"] for row in read_log(b)] == list(range(1, steps + 1))
    assert read_log(a) == read_log(b)
    for rank in (0, 1):
        assert read_ids(a, rank) == read_ids(b, rank)


def test_the_time_limit_the_bound_and_cancelling(cluster: Cluster, config: Callable[..., Path]) -> None:
    """A minute of time: saved and requeued once, then stopped by the bound; submitted again, it finishes."""
    endless = config("limited", max_steps=100_000)
    run, log = cluster.folder / "runs" / "limited", cluster.folder / "limited.log"
    options = (*TWO_NODES, f"--output={log}", SLURM / "train.sbatch", endless)
    job = cluster.sbatch("--time=1", "--signal=B:USR1@5", *options, MAX_REQUEUES="1")
    wait_for_step(cluster, run, 1)
    cluster.wait_for_requeue(job)
    stopped = saved_step(run)
    assert "requeued 1 of at most 1: " in log.read_text()
    wait_for_step(cluster, run, stopped + 2)
    # Slurm's own may have come first.
    cluster.user("scancel", "--signal=USR1", "--batch", job, check=False)
    known = cluster.wait_for_end(job)
    assert (known["JobState"], known["ExitCode"], known["Restarts"]) == ("FAILED", "1:0", "1")
    assert "not requeued: MAX_REQUEUES=1 reached (signal SIGUSR1 at step" in log.read_text()

    # A user who cancels a job does not want it back, although it saves a checkpoint and could resume.
    stopped = saved_step(run)
    job = cluster.sbatch(*options)
    wait_for_step(cluster, run, stopped + 2)
    cluster.user("scancel", job)
    assert cluster.wait_for_end(job)["JobState"] == "CANCELLED"
    assert "not requeued by itself: Slurm is ending this job" in log.read_text()
    stopped = saved_step(run)

    job = cluster.sbatch(*options, "--set", f"train.max_steps={stopped + 2}")
    assert cluster.wait_for_end(job)["JobState"] == "COMPLETED"
    assert saved_step(run) == stopped + 2


def test_a_term_during_an_evaluation_loses_no_step(
    cluster: Cluster, config: Callable[..., Path], demo: Path
) -> None:
    """The save that is due at the same step comes first, and the evaluation is abandoned before Slurm kills the job."""
    path = config("interrupted", max_steps=10, stop_check_steps=1000, save_every_steps=5, eval_every_steps=5)
    run, log = cluster.folder / "runs" / "interrupted", cluster.folder / "interrupted.log"
    options = (*TWO_NODES, f"--output={log}", SLURM / "train.sbatch", path)
    many = reshard(demo / "data", cluster.folder / "many", 1 << 20, copies=60)
    slow = (f"data.path={many}", "data.eval_split=train", "eval.micro_items=1", "data.text_tokens=1024")
    with cluster.setting("KillWait", 4):
        job = cluster.sbatch(*options, *(word for value in slow for word in ("--set", value)))
        rank_log = run / "logs" / "rank_00000.log"
        saved = lambda: rank_log.is_file() and "saved " in rank_log.read_text()  # noqa: E731
        wait_until(saved, 250, "a save", cluster.logs)
        cluster.user("scancel", job)
        assert cluster.wait_for_end(job)["JobState"] == "CANCELLED", cluster.logs()
    # Slurm's own SIGTERM, or SIGUSR1 of the job script, which gets a SIGTERM too: whichever comes first.
    abandoned = r"the evaluation at step 5 is abandoned \(signal SIG(TERM|USR1)\)"
    assert re.search(abandoned, rank_log.read_text()), rank_log.read_text()[-4000:]
    assert saved_step(run) == 5 == len(read_log(run)) and not (run / "eval.jsonl").exists()


def test_mistakes_and_crashes(cluster: Cluster, config: Callable[..., Path]) -> None:
    """A mistake of the user is never requeued; a crash is, as long as each attempt gets further."""
    log = cluster.folder / "mistake.log"
    job = cluster.sbatch(
        f"--output={log}", SLURM / "train.sbatch", config("mistake"), "--set", "train.epoch=1"
    )
    assert cluster.wait_for_end(job)["ExitCode"] == "2:0"
    assert "did you mean `train.epochs`?" in log.read_text()
    job = cluster.sbatch(
        f"--output={log}", SLURM / "train.sbatch", config("mistake"), "--set", "data.path=none"
    )
    assert cluster.wait_for_end(job)["ExitCode"] == "2:0"
    assert "not requeued: exit code 2" in log.read_text()

    run, log = cluster.folder / "runs" / "crash", cluster.folder / "crash.log"
    crashing = config("crash", max_steps=100_000, save_every_steps=60)
    job = cluster.sbatch(f"--output={log}", SLURM / "train.sbatch", crashing)
    # Not a step: the files of a checkpoint are written while the next steps are taken.
    wait_until((run / "checkpoints" / "latest.json").is_file, 250, "a checkpoint", cluster.logs)
    kill_ranks(cluster, job)
    config("crash", max_steps=100_000)  # the next attempt saves nothing: it cannot do so before it is killed
    cluster.wait_for_requeue(job)
    assert "requeued 1 of at most 20: crashed with exit code 137, after it had saved" in log.read_text()
    saved = saved_step(run)
    wait_until(
        lambda: f"resuming from step {saved} of" in log.read_text(), 250, "a resumed run", cluster.logs
    )
    kill_ranks(cluster, job)
    assert cluster.wait_for_end(job)["JobState"] == "FAILED"
    assert (
        "not requeued: crashed with exit code 137, and saved no checkpoint in this attempt" in log.read_text()
    )


def rank_processes(job: str) -> list[psutil.Process]:
    """The training processes of a job."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            is_rank = process.environ().get("SLURM_JOB_ID") == job and "SLURM_STEP_ID" in process.environ()
            if is_rank and "rating_train" in process.cmdline() and process.name().startswith("python"):
                found.append(process)
    return found


def kill_ranks(cluster: Cluster, job: str) -> None:
    """kill -9 of the training processes of a job, as the kernel does it when memory is short."""
    for process in rank_processes(job):
        with contextlib.suppress(psutil.Error):
            process.send_signal(signal.SIGKILL)


def signal_in_time(cluster: Cluster, job: str, target: str) -> None:
    """SIGUSR1 to a job through Slurm. Its ranks stand still until they have it: the run cannot end before."""
    ranks = rank_processes(job)
    assert ranks, cluster.logs()
    for process in ranks:
        process.suspend()
    cluster.user("scancel", "--signal=USR1", "--batch", target)
    wait_until(lambda: all(map(has_usr1, ranks)), 100, "the signal", cluster.logs)
    for process in ranks:
        process.resume()


def has_usr1(process: psutil.Process) -> bool:
    """Whether SIGUSR1 waits for a process."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    (pending,) = re.findall(r"^ShdPnd:\s*(\w+)", status, flags=re.MULTILINE)
    return bool(int(pending, 16) >> (signal.SIGUSR1 - 1) & 1)


def test_an_array_of_ablations_and_its_evaluations(cluster: Cluster, config: Callable[..., Path]) -> None:
    names = ["a1", "a2", "a3"]
    configs = [config(name, max_steps=4) for name in names[:2]] + [config("a3", max_steps=100)]
    dry = cluster.user("bash", SLURM / "ablations.sbatch", *configs, "--dry-run").stdout
    assert "--array=0-2" in dry and "--dependency=aftercorr:" in dry
    assert not (cluster.folder / "runs" / "a1").exists(), "a dry run writes nothing"
    output = cluster.user("bash", SLURM / "ablations.sbatch", *configs).stdout
    train, evaluate = (
        next(line.split()[1].partition("_")[0] for line in output.splitlines() if line.startswith(word))
        for word in ("train ", "evaluate ")
    )
    configs[1].write_text("name: [edited after it was submitted")
    # The last task of an array has the id of the array: what it requeues is itself alone.
    wait_for_step(cluster, cluster.folder / "runs" / "a3", 5)
    signal_in_time(cluster, train, f"{train}_2")
    cluster.wait_for_requeue(f"{train}_2")
    for index, name in enumerate(names):
        for job in (train, evaluate):
            known = cluster.wait_for_end(f"{job}_{index}")
            assert known["JobState"] == "COMPLETED", cluster.logs()
            assert known["Restarts"] == ("1" if (job, index) == (train, 2) else "0")
        run = cluster.folder / "runs" / name
        rows = [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]
        assert rows[-1]["source"] == "evaluate" and rows[-1]["step"] == (100 if name == "a3" else 4)
        (frozen,) = run.glob("submitted-*.yaml")
        assert yaml.safe_load(frozen.read_text()) == yaml.safe_load((run / "config.yaml").read_text())
        facts = json.loads(frozen.with_suffix(".json").read_text())
        assert facts["ranks"] == 1 and facts["steps"] == rows[-1]["step"] and "commit" in facts["git"]


def test_preflight_and_a_submitted_run(cluster: Cluster, config: Callable[..., Path]) -> None:
    """`rating-train submit` on two nodes with PREFLIGHT=1, then the evaluation that waits for it; logs in the run."""
    path = config("submitted", max_steps=3)
    submit = [REPO / "launch" / "submit.py", path, "--nodes", 2, "--time", "10"]
    output = cluster.user(cluster.env["RATING_TRAIN_PYTHON"], *submit, PREFLIGHT="1").stdout
    jobs = dict(
        line.split(": ", 1)[1].split()
        for line in output.splitlines()
        if ": train " in line or ": evaluate " in line
    )
    for job in jobs.values():
        assert cluster.wait_for_end(job)["JobState"] == "COMPLETED", cluster.logs()
    run = cluster.folder / "runs" / "submitted"
    log = (run / "logs" / f"slurm-submitted-{jobs['train']}.log").read_text()
    assert log.startswith("the site is set up\n")
    assert "preflight: all checks passed (2 ranks, 2 nodes)" in log
    assert "   1     1  node2" in log and "PASS  shared folder" in log
    assert "finished at step 3" in log
    assert "PLCC" in (run / "logs" / f"slurm-evaluate-submitted-{jobs['evaluate']}.log").read_text()


def test_prepare_as_an_array_gives_the_shards_of_one_process(cluster: Cluster, demo: Path) -> None:
    out = cluster.folder / "data"
    options = ["--source", demo / "catalogue" / "catalogue.jsonl", "--images", demo / "catalogue"]
    options += ["--image-size-px", 64, "--val-fraction", 0.2, "--part-items", 100]
    small = {"PREPARE_TASKS": "2", "PREPARE_SBATCH": "--cpus-per-task=1 --mem-per-cpu=500"}
    done = cluster.user("bash", SLURM / "prepare.sbatch", *options, "--out", out, **small)
    merge = dict(line.split()[:2] for line in done.stdout.splitlines())["merge"]
    assert cluster.wait_for_end(merge)["JobState"] == "COMPLETED", cluster.logs()

    alone = cluster.folder / "alone"
    python = [cluster.env["RATING_TRAIN_PYTHON"], "-m", "rating_train", "prepare"]
    subprocess.run([*python, *map(str, options), "--out", str(alone)], cwd=REPO, check=True, timeout=100)
    shards = sorted(p.relative_to(alone) for p in alone.rglob("*.mds"))
    assert len(shards) >= 2
    assert sorted(p.relative_to(out) for p in out.rglob("*.mds")) == shards
    for shard in shards:
        assert (alone / shard).read_bytes() == (out / shard).read_bytes(), shard
