"""A real Slurm of two nodes on this machine: munged, slurmctld and two slurmd from a temporary slurm.conf.

All that it makes lies in one temporary folder: sockets, keys, state, logs. A Slurm or munge that runs here already is
not touched.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")

SLURM_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
ReturnToService=2
JobRequeue=1
SlurmdParameters=config_overrides
FirstJobId={first_job}
KillWait=15
MinJobAge=3600
OverTimeLimit=0
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cpus} RealMemory=2000
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs={cpus} RealMemory=2000
PartitionName=both Nodes=node1,node2 Default=YES MaxTime=INFINITE State=UP
"""


class Cluster:
    """The cluster, and what a user types on its login node.

    Args:
        cpus: of each node, whatever this machine has.
    """

    def __init__(self, cpus: int = 1) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="rt-slurm-"))  # short: sockets are made in it
        self.folder.chmod(0o755)
        self.daemons: list[subprocess.Popen[bytes]] = []
        conf = self.folder / "slurm.conf"
        conf.write_text(
            SLURM_CONF.format(
                folder=self.folder,
                host=socket.gethostname().split(".")[0],
                ports=free_ports(3),
                cpus=cpus,
                # The rendezvous port follows from it: two clusters at once on this machine must not meet on one.
                first_job=1 + secrets.randbelow(15_000),
            )
        )
        site = self.folder / "cluster.env"
        site.write_text('CLUSTER_SETUP="echo the site is set up" CLUSTER_TASKS_PER_NODE=1\n')
        (self.folder / "tmp").mkdir()
        dropped = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR")
        self.env = {k: v for k, v in os.environ.items() if k not in dropped and not k.startswith("SLURM")}
        self.env |= {
            "SLURM_CONF": str(conf),
            "CLUSTER_ENV": str(site),
            "RATING_TRAIN_PYTHON": sys.executable,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "TMPDIR": str(self.folder / "tmp"),
        }

    # ---- the daemons

    def start(self) -> None:
        """Start all daemons and wait until both nodes are idle."""
        munge, user = self.folder / "munge", pwd.getpwnam("munge")
        munge.mkdir()
        key = munge / "key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        for path in (munge, key):
            os.chown(path, user.pw_uid, user.pw_gid)
        files = {
            "key-file": key,
            "socket": munge / "socket",
            "pid-file": munge / "pid",
            "seed-file": munge / "seed",
        }
        self._daemon(
            ["munged", "--foreground", *(f"--{name}={path}" for name, path in files.items())],
            user=user.pw_uid, group=user.pw_gid, extra_groups=[],
        )  # fmt: skip
        wait_until(lambda: (munge / "socket").exists(), 20, "munged")
        (self.folder / "state").mkdir()
        self._daemon(["slurmctld", "-D"])
        for node in ("node1", "node2"):
            self._daemon(["slurmd", "-D", "-N", node])
        wait_until(lambda: self._states().count("idle") == 2, 60, "two idle nodes")

    def _daemon(self, command: list[str], **options: object) -> None:
        with open(self.folder / f"daemon-{len(self.daemons)}-{command[0]}.log", "wb") as log:
            self.daemons.append(
                subprocess.Popen(
                    command, stdout=log, stderr=log, env=self.env, cwd="/", start_new_session=True, **options
                )  # type: ignore[call-overload]
            )

    def _states(self) -> list[str]:
        shown = self.user("sinfo", "--noheader", "--Node", "--format=%T", check=False)
        return shown.stdout.split()

    def close(self) -> None:
        """Cancel the jobs, end the daemons and whatever of them or of their jobs is left, remove all files."""
        with contextlib.suppress(AssertionError):  # then they are killed below
            self.cancel_all()
        for daemon in reversed(self.daemons):  # munged last
            daemon.terminate()
            try:
                daemon.wait(timeout=15)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait(timeout=15)
        left = [p for p in psutil.process_iter() if self._is_ours(p)]
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=15)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _is_ours(self, process: psutil.Process) -> bool:
        """Whether a process was started by these daemons: it inherited the name of this slurm.conf."""
        try:
            return (
                process.environ().get("SLURM_CONF") == self.env["SLURM_CONF"] and process.pid != os.getpid()
            )
        except psutil.Error:
            return False

    # ---- the user

    def user(self, *command: object, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
        """Run a command as on the login node, in the folder of the cluster."""
        done = subprocess.run(
            list(map(str, command)),
            env={**self.env, **env},
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert not check or done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done

    def sbatch(self, *words: object, **env: str) -> str:
        """Submit, to nodes that have one CPU and no GPU; the id of the job."""
        small = ("--cpus-per-task=1", "--gpus-per-node=0")
        return self.user("sbatch", "--parsable", *small, *words, **env).stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """What the controller knows about a job, or about one task of an array (ID_INDEX)."""
        shown = self.user("scontrol", "show", "job", "--oneliner", job).stdout
        return dict(re.findall(r"(\w+)=(\S*)", shown))

    @contextlib.contextmanager
    def setting(self, name: str, value: object) -> Iterator[None]:
        """Change one line of slurm.conf for a while."""
        conf = Path(self.env["SLURM_CONF"])
        before = conf.read_text()
        after = re.sub(rf"^{name}=.*$", f"{name}={value}", before, flags=re.MULTILINE)
        assert after != before, f"slurm.conf has no {name}"
        try:
            conf.write_text(after)
            self.user("scontrol", "reconfigure")
            yield
        finally:
            conf.write_text(before)
            self.user("scontrol", "reconfigure")

    def cancel_all(self) -> None:
        """Cancel the jobs that are left, and wait until the nodes are free of them."""
        self.user("scancel", "--user=root", check=False)
        wait_until(lambda: not self.user("squeue", "--noheader", check=False).stdout.strip(), 30, "no jobs")

    def wait_for_requeue(self, job: str, seconds: float = 250) -> None:
        """Wait until a job is back in the queue, and end the two minutes for which Slurm makes it wait there.

        Not at once: the nodes refuse a job whose new credential is not younger (in seconds) than its end.
        """

        def waits() -> bool:
            known = self.job(job)
            return known["JobState"] == "PENDING" and known["Reason"] == "BeginTime"

        wait_until(waits, seconds, f"job {job} back in the queue", self.logs)
        time.sleep(2.5)
        self.user("scontrol", "update", f"JobId={job}", "StartTime=now")

    def wait_for_end(self, job: str, seconds: float = 250) -> dict[str, str]:
        """Wait until a job has ended, however; what the controller knows about it then."""
        wait_until(lambda: self.job(job)["JobState"] in ENDED, seconds, f"the end of job {job}", self.logs)
        return self.job(job)

    def logs(self) -> str:
        """The last lines of everything, for a failed test: the newest first, and the daemons' after the jobs'."""
        files = [*self.folder.glob("*.log"), *self.folder.glob("runs/*/logs/slurm*")]
        files.sort(key=lambda f: (f.name.startswith("daemon-"), -f.stat().st_mtime))
        return "\n".join(f"--- {f}\n{f.read_text(errors='replace')[-3000:]}" for f in files)


def free_ports(count: int) -> list[int]:
    """Ports that nobody uses just now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


def wait_until(
    true: Callable[[], bool], seconds: float, what: str, explain: Callable[[], str] = lambda: ""
) -> None:
    """Look again and again; an AssertionError with ``what`` after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}\n{explain()}"
        time.sleep(0.1)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A running cluster of two nodes with one CPU each."""
    with running_cluster() as cluster:
        yield cluster


@contextlib.contextmanager
def running_cluster(cpus: int = 1) -> Iterator[Cluster]:
    """A running cluster of two nodes. Skips the test where there can be none."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        pytest.skip(f"no Slurm here: {', '.join(missing)} not found (on Debian: slurm-wlm, munge)")
    if os.geteuid() != 0:
        pytest.skip("a Slurm for tests is started by root only")
    with contextlib.closing(Cluster(cpus)) as cluster:
        cluster.start()
        yield cluster
