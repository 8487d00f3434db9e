"""This process's place among the ranks of the job: a value, read once from the environment.

Two launchers are supported: ``torchrun`` (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE) and one Slurm
task per GPU (SLURM_PROCID, SLURM_NTASKS, SLURM_LOCALID, SLURM_NTASKS_PER_NODE).
"""

from __future__ import annotations

import datetime
import logging
import os
import re
import socket
import subprocess
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

import torch

from rating_train.distributed.collectives import all_gather
from rating_train.distributed.device import choose_device, probe, shared_devices
from rating_train.errors import UserError
from rating_train.processes import allow_descriptors

log = logging.getLogger(__name__)

_INTEGER = re.compile(r"-?[0-9]+")


@dataclass(frozen=True)
class World:
    """rank in [0, size); local_rank in [0, local_size); node in [0, nodes)."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which decides, writes and broadcasts."""
        return self.rank == 0

    @property
    def nodes(self) -> int:
        return self.size // self.local_size

    @property
    def node(self) -> int:
        return self.rank // self.local_size


def detect(env: Mapping[str, str] | None = None) -> World:
    """Return the world that the launcher describes; a single process where there is no launcher.

    Raises:
        UserError: the description is incomplete or inconsistent. A missing LOCAL_WORLD_SIZE is refused: streaming
            would silently treat every rank as the leader of its own node.
    """
    env = os.environ if env is None else env
    if "RANK" in env or "WORLD_SIZE" in env:
        keys = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    elif env.get("SLURM_NTASKS", "1") != "1" and "SLURM_PROCID" in env:
        keys = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE")
    else:
        return World()
    missing = [k for k in keys if not env.get(k, "").strip()]
    if missing:
        raise UserError(
            f"the launcher did not set {', '.join(missing)}",
            where="environment",
            expected="RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE, or Slurm with --ntasks-per-node",
            fix="launch with torchrun, launch/local.sh or sbatch slurm/train.sbatch",
        )
    wrong = [f"{k}={env[k]!r}" for k in keys if not _INTEGER.fullmatch(env[k].strip())]
    if wrong:
        raise UserError(f"not an integer: {', '.join(wrong)}", where="environment", expected="integers")
    rank, size, local_rank, local_size = (int(env[k]) for k in keys)
    in_range = 0 <= rank < size and 0 <= local_rank < local_size <= size and size % local_size == 0
    if not in_range or local_rank != rank % local_size:
        raise UserError(
            f"rank {rank} of {size} with local rank {local_rank} of {local_size} is not a valid rank layout",
            where="environment",
            expected="the same number of ranks on every node, numbered consecutively node by node",
            fix="under Slurm, use --ntasks-per-node and --distribution=block",
        )
    return World(rank, size, local_rank, local_size)


@dataclass(frozen=True)
class ScheduledJob:
    """The launcher's description of the job.

    Args:
        id: identifies the job across all of its restarts; ``""`` without a launcher.
        restart: how often the launcher has restarted it.
        ends_at: when the scheduler will end it, in Unix seconds; ``None`` if unknown.
    """

    id: str = ""
    restart: int = 0
    ends_at: float | None = None


def scheduled_job(env: Mapping[str, str] | None = None) -> ScheduledJob:
    """Return the job of Slurm (SLURM_JOB_ID, SLURM_RESTART_COUNT, SLURM_JOB_END_TIME) or of torchrun's agent."""
    env = os.environ if env is None else env

    def number(name: str) -> int | None:
        text = env.get(name, "").strip()
        return int(text) if _INTEGER.fullmatch(text) else None

    if env.get("SLURM_JOB_ID"):
        restart, ends_at = number("SLURM_RESTART_COUNT"), number("SLURM_JOB_END_TIME")
        return ScheduledJob(f"slurm {env['SLURM_JOB_ID']}", restart or 0, ends_at or None)
    if env.get("TORCHELASTIC_RUN_ID"):
        restart = number("TORCHELASTIC_RESTART_COUNT")
        return ScheduledJob(f"torchrun {env['TORCHELASTIC_RUN_ID']}", restart or 0)
    return ScheduledJob()


def export(world: World, env: MutableMapping[str, str] | None = None) -> None:
    """Export the world as torchrun's variables, which DeepSpeed and streaming read, and set defaults."""
    env = os.environ if env is None else env
    env["RANK"], env["WORLD_SIZE"] = str(world.rank), str(world.size)
    env["LOCAL_RANK"], env["LOCAL_WORLD_SIZE"] = str(world.local_rank), str(world.local_size)
    env.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in env:
        if world.size > 1:
            raise UserError(
                "the launcher did not set MASTER_PORT", where="environment", fix="see launch/env.sh"
            )
        with socket.socket() as s:  # a single process can use any free port
            s.bind(("127.0.0.1", 0))
            env["MASTER_PORT"] = str(s.getsockname()[1])
    # DataLoader workers fork after the tokenizer was used; its own threads would only warn and switch off.
    env["TOKENIZERS_PARALLELISM"] = "false"


def connect(world: World, timeout_minutes: float = 10.0, wanted: str = "auto") -> torch.device:
    """Join the process group (NCCL on GPUs, gloo on CPUs) and return this rank's device.

    Args:
        world: this process among the ranks.
        timeout_minutes: longest wait of a collective, which then fails instead of hanging forever.
        wanted: kind of device, see :func:`~.device.choose_device`.

    Raises:
        UserError: there is no such device, or another rank uses it too; the address to meet at is in use.
    """
    export(world)
    allow_descriptors()
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if world.is_main and restarts != "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        log.warning(
            "torchrun may restart this job %s times, and restarted ranks would connect to the addresses of dead "
            "ones: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun, as launch/env.sh does", restarts,
        )  # fmt: skip
    device = choose_device(wanted, world.local_rank, os.environ, probe())
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed must not guess
    if torch.__version__ < "2.9":  # compared as versions
        # There, DeepSpeed's import of torch's compiler starts up to 32 processes for every rank.
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    if not torch.distributed.is_initialized():
        try:
            torch.distributed.init_process_group(
                backend="cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                rank=world.rank,
                world_size=world.size,
                timeout=datetime.timedelta(minutes=timeout_minutes),
            )
        except torch.distributed.DistNetworkError as e:
            if not is_address_in_use(e):
                raise
            raise _address_in_use(os.environ) from e
    _check_devices(device)
    return device


def is_address_in_use(error: BaseException | None) -> bool:
    """Whether torch could not listen because another process does; only the text of an error or its cause says so."""
    return error is not None and ("EADDRINUSE" in str(error) or is_address_in_use(error.__cause__))


def _address_in_use(env: Mapping[str, str]) -> UserError:
    """Return the error of rank 0, which cannot listen at the ranks' meeting place."""
    if "SLURM_JOB_ID" in env:
        fix = "submit the job again, each has another port; under a bare srun, set MASTER_PORT to a free one"
    elif "TORCHELASTIC_RUN_ID" in env:
        fix = "start it again: torchrun takes another port for it"
    else:
        fix = "set MASTER_PORT to a free port; a single process finds one where it is not set"
    return UserError(
        "the ranks cannot meet: another process of this machine listens at their address",
        where=f"MASTER_ADDR:MASTER_PORT={meeting_place()}",
        fix=fix,
    )


def _check_devices(device: torch.device) -> None:
    """Refuse two ranks on one GPU. A collective where there are GPUs.

    Raises:
        UserError: on every rank.
    """
    if device.type != "cuda":
        return
    own = str(torch.cuda.get_device_properties(device).uuid)
    shared = shared_devices(all_gather((node_name(), own)))
    if not shared:
        return
    raise UserError(
        f"ranks would share a GPU: {shared}",
        where="launcher",
        expected="a GPU for each rank",
        fix="start as many processes per node as it has GPUs; under Slurm, --ntasks-per-node with --gpus-per-node, "
        "or --gpus-per-task=1",
        on_all_ranks=True,
    )


def find_meeting_place() -> None:
    """Set MASTER_ADDR and MASTER_PORT under a bare ``srun``, as the jobs of slurm/ do; elsewhere do nothing."""
    if "MASTER_PORT" in os.environ or "SLURM_JOB_NODELIST" not in os.environ:
        return
    names = ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]]
    first = subprocess.run(names, capture_output=True, text=True, check=True).stdout.split()[0]
    os.environ["MASTER_ADDR"] = _node_address(first)
    os.environ["MASTER_PORT"] = str(10000 + int(os.environ["SLURM_JOB_ID"]) % 20000)


def _node_address(name: str) -> str:
    """Return the name if it resolves, else the address that Slurm has for the node."""
    try:
        socket.getaddrinfo(name, None)
        return name
    except OSError:
        shown = subprocess.run(["scontrol", "show", "node", name], capture_output=True, text=True, check=True)
        return next(w.partition("=")[2] for w in shown.stdout.split() if w.startswith("NodeAddr="))


def meeting_place() -> str:
    """Return HOST:PORT of the ranks' rendezvous, for messages."""
    return f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"


def node_name() -> str:
    """Return the name of this node: Slurm's, else the host's (Slurm may run two nodes on one host)."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def disconnect() -> None:
    """Leave the process group, if there is one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
