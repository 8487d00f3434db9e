"""The rank layout: read from either launcher, and refused if the description is inconsistent."""

from __future__ import annotations

import socket

import pytest

from rating_train.distributed.world import ScheduledJob, World, connect, detect, export, scheduled_job
from rating_train.errors import UserError


def torchrun(
    rank: object = 5, size: object = 8, local_rank: object = 1, local_size: object = 4
) -> dict[str, str]:
    values = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": local_size}
    return {k: str(v) for k, v in values.items() if v is not None}


def slurm(
    rank: object = 5, size: object = 8, local_rank: object = 1, local_size: object = 4
) -> dict[str, str]:
    names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE")
    values = zip(names, (rank, size, local_rank, local_size))
    return {k: str(v) for k, v in values if v is not None}


def test_without_a_launcher_there_is_one_process() -> None:
    assert detect({}) == World(0, 1, 0, 1)
    assert detect({"PATH": "/bin", "SLURM_JOB_ID": "7"}) == World()


@pytest.mark.parametrize("launcher", [torchrun, slurm])
def test_both_launchers_describe_the_same_world(launcher: object) -> None:
    world = detect(launcher())  # type: ignore[operator]
    assert world == World(rank=5, size=8, local_rank=1, local_size=4)
    assert (world.nodes, world.node, world.is_main) == (2, 1, False)
    assert detect(launcher(0, 8, 0, 4)).is_main  # type: ignore[operator]


def test_torchrun_inside_a_slurm_job_takes_precedence() -> None:
    assert detect({**slurm(0, 2, 0, 1), **torchrun(5, 8, 1, 4)}) == World(5, 8, 1, 4)


def test_a_slurm_job_of_one_task_is_one_process() -> None:
    assert detect(slurm(0, 1, 0, None)) == World()
    assert detect({"SLURM_NTASKS": "4"}) == World(), "sbatch's own shell, outside srun"


def test_every_place_of_two_nodes_is_valid_and_on_its_node() -> None:
    worlds = [detect(torchrun(r, 6, r % 3, 3)) for r in range(6)]
    assert [w.node for w in worlds] == [0, 0, 0, 1, 1, 1]
    assert {w.nodes for w in worlds} == {2}


@pytest.mark.parametrize("launcher", [torchrun, slurm])
@pytest.mark.parametrize("value", [None, "", " "])
def test_a_missing_local_world_size_is_refused(launcher: object, value: str | None) -> None:
    env = launcher(local_size=value)  # type: ignore[operator]
    with pytest.raises(UserError, match=r"did not set (LOCAL_WORLD_SIZE|SLURM_NTASKS_PER_NODE)"):
        detect(env)


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
def test_any_other_missing_variable_is_refused_by_name(name: str) -> None:
    env = torchrun()
    del env[name]
    with pytest.raises(UserError, match=rf"did not set {name} "):
        detect(env)


def test_all_missing_variables_are_named_at_once() -> None:
    with pytest.raises(UserError, match="WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE"):
        detect({"RANK": "0"})


@pytest.mark.parametrize(
    "place",
    [(8, 8, 0, 4), (-1, 8, 0, 4), (5, 8, 4, 4), (5, 8, -1, 4), (0, 2, 0, 4), (0, 8, 0, 3), (0, 8, 0, 0)],
)
@pytest.mark.parametrize("launcher", [torchrun, slurm])
def test_an_invalid_rank_layout_is_refused(launcher: object, place: tuple[int, int, int, int]) -> None:
    with pytest.raises(UserError, match="is not a valid rank layout"):
        detect(launcher(*place))  # type: ignore[operator]


@pytest.mark.parametrize("place", [(1, 4, 0, 2), (2, 4, 1, 2), (5, 8, 2, 4)])
def test_a_local_rank_that_contradicts_the_rank_is_refused(place: tuple[int, int, int, int]) -> None:
    """``node`` is rank // local_size here and in streaming, which holds for local_rank = rank % local_size only."""
    with pytest.raises(UserError):
        detect(torchrun(*place))


@pytest.mark.parametrize(
    "env", [torchrun(rank="one"), torchrun(size="8.0"), slurm(local_size="4(x2)"), slurm(size="?")]
)
def test_a_variable_that_is_not_a_number_is_refused(env: dict[str, str]) -> None:
    with pytest.raises(UserError):
        detect(env)


def test_the_process_environment_is_read_where_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in torchrun(1, 2, 1, 2).items():
        monkeypatch.setenv(name, value)
    assert detect() == World(1, 2, 1, 2)


def test_the_world_is_exported_as_torchruns_variables() -> None:
    env = {"MASTER_PORT": "1234", "MASTER_ADDR": "node0"}
    export(World(5, 8, 1, 4), env)
    assert detect(env) == World(5, 8, 1, 4)
    assert (env["MASTER_ADDR"], env["MASTER_PORT"], env["TOKENIZERS_PARALLELISM"]) == (
        "node0",
        "1234",
        "false",
    )


def test_a_single_process_gets_a_free_port_and_several_need_the_launchers_port() -> None:
    env: dict[str, str] = {}
    export(World(), env)
    with socket.socket() as s:
        s.bind(("127.0.0.1", int(env["MASTER_PORT"])))
    with pytest.raises(UserError, match="MASTER_PORT"):
        export(World(0, 2, 0, 2), {})


def test_without_a_launcher_there_is_no_scheduled_job() -> None:
    assert (
        scheduled_job({}) == scheduled_job({"PATH": "/bin", "SLURM_JOB_ID": ""}) == ScheduledJob("", 0, None)
    )


def test_slurm_gives_job_id_restart_count_and_end_time() -> None:
    env = {"SLURM_JOB_ID": "4711", "SLURM_RESTART_COUNT": "2", "SLURM_JOB_END_TIME": "1790000000"}
    assert scheduled_job(env) == ScheduledJob("slurm 4711", 2, 1790000000)
    assert scheduled_job({"SLURM_JOB_ID": "4711"}) == ScheduledJob("slurm 4711", 0, None)


def test_torchrun_inside_a_slurm_job_belongs_to_that_job() -> None:
    agent = {"TORCHELASTIC_RUN_ID": "abc", "TORCHELASTIC_RESTART_COUNT": "3"}
    assert scheduled_job(agent) == ScheduledJob("torchrun abc", 3, None)
    assert scheduled_job({**agent, "SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": "1790000000"}) == ScheduledJob(
        "slurm 7", 0, 1790000000
    )


@pytest.mark.parametrize("text", ["", " ", "soon", "2026-01-01T00:00:00", "0"])
def test_an_invalid_end_time_is_none(text: str) -> None:
    """Facts about the job are optional: an unexpected format must not prevent training."""
    env = {"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": text, "SLURM_RESTART_COUNT": text}
    assert scheduled_job(env) == ScheduledJob("slurm 7", 0, None)


@pytest.mark.parametrize(
    ("launcher", "fix"),
    [
        ({}, "set MASTER_PORT to a free port"),
        ({"SLURM_JOB_ID": "7"}, "submit the job again"),
        ({"TORCHELASTIC_RUN_ID": "a"}, "start it again"),
    ],
)
def test_an_address_in_use_is_one_line_with_what_to_change(
    alone: None, monkeypatch: pytest.MonkeyPatch, launcher: dict[str, str], fix: str
) -> None:
    for name in ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(UserError, match=f"MASTER_PORT=127.0.0.1:{port} .* {fix}"):
            connect(World(), wanted="cpu")
