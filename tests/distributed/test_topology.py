"""Rank, world and address of a process under each launcher, and the expert-parallel x expert-data grid."""

from __future__ import annotations

import os
import socket
import sys
import types
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.ranks import run_ranks
from support.tiny import tiny_model

import alfb_dist
from alfb_dist.config import ConfigError
from alfb_dist.distributed.network import INTERFACE_VARIABLES, choose_interface
from alfb_dist.distributed.rendezvous import discover, first_host, launched_world, local_size
from alfb_dist.distributed.topology import grid_ranks, init_distributed, make_grid

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """An empty environment in place of this process's."""
    variables: dict[str, str] = {}
    monkeypatch.setattr("alfb_dist.distributed.rendezvous.os", types.SimpleNamespace(environ=variables))
    return variables


# The grid.


@pytest.mark.parametrize(
    ("world", "ep", "expert_parallel", "expert_data"),
    [
        (1, 1, [[0]], [[0]]),
        (2, 1, [[0], [1]], [[0, 1]]),
        (2, 2, [[0, 1]], [[0], [1]]),
        (4, 2, [[0, 1], [2, 3]], [[0, 2], [1, 3]]),
        (6, 2, [[0, 1], [2, 3], [4, 5]], [[0, 2, 4], [1, 3, 5]]),
        (6, 3, [[0, 1, 2], [3, 4, 5]], [[0, 3], [1, 4], [2, 5]]),
    ],
)
def test_consecutive_ranks_hold_the_experts_together(
    world: int, ep: int, expert_parallel: list[list[int]], expert_data: list[list[int]]
) -> None:
    assert grid_ranks(world, ep) == (expert_parallel, expert_data)


@pytest.mark.parametrize(("world", "ep"), [(8, 1), (8, 2), (8, 4), (8, 8), (12, 3), (12, 4)])
def test_every_rank_is_in_one_group_of_each_kind_and_two_share_at_most_one(world: int, ep: int) -> None:
    expert_parallel, expert_data = grid_ranks(world, ep)
    for kind, size in ((expert_parallel, ep), (expert_data, world // ep)):
        assert sorted(r for group in kind for r in group) == list(range(world))
        assert all(len(group) == size for group in kind)
    assert all(len(set(a) & set(b)) == 1 for a in expert_parallel for b in expert_data)


@pytest.mark.parametrize(("world", "ep"), [(4, 3), (2, 4), (4, 0), (4, -2)])
def test_sizes_that_do_not_divide_are_refused_with_both(world: int, ep: int) -> None:
    with pytest.raises(ValueError, match=rf"world size \({world}\) must be divisible by ep_degree \({ep}\)"):
        grid_ranks(world, ep)


def test_grid_needs_torch_distributed() -> None:
    with pytest.raises(RuntimeError, match=r"call alfb_dist\.init_distributed\(\) first"):
        make_grid(1)


def grid_here() -> dict[str, Any]:
    grid = make_grid(2, timeout_seconds=33)
    groups = (grid.ep_group, grid.expert_data_group)
    refused = ""
    if dist.get_rank() == 1:  # alone: a collective would wait for the others
        try:
            make_grid(3)
        except ValueError as e:
            refused = str(e)
    sums = []
    for group in groups:
        x = torch.tensor(10 ** dist.get_rank())
        dist.all_reduce(x, group=group)
        sums.append(x.item())
    return {
        "ep rank": grid.ep_rank,
        "groups": [dist.get_process_group_ranks(group) for group in groups],
        "sums": sums,
        "world": grid.world_group is dist.group.WORLD,
        "timeouts": [g._get_backend(torch.device("cpu")).options._timeout.total_seconds() for g in groups],
        "refused": refused,
    }


def test_groups_of_the_grid_have_our_timeout(tmp_path: Any) -> None:
    for rank, seen in enumerate(run_ranks(4, grid_here, folder=tmp_path)):
        pair, column = ([0, 1], [2, 3])[rank // 2], ([0, 2], [1, 3])[rank % 2]
        assert seen == {
            "ep rank": rank % 2,
            "groups": [pair, column],
            "sums": [sum(10**r for r in pair), sum(10**r for r in column)],
            "world": True,
            "timeouts": [33.0, 33.0],
            "refused": "the world size (4) must be divisible by ep_degree (3)" if rank == 1 else "",
        }


# The identity of this process.


def test_plain_process_is_a_world_of_one(environment: dict[str, str]) -> None:
    assert discover() == (0, 1, 0)
    port = environment.pop("MASTER_PORT")
    assert environment == {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    assert 1024 <= int(port) < 65536


def test_launchers_variables_are_taken_as_they_are(environment: dict[str, str]) -> None:
    given = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29501"}
    environment.update(given)
    assert discover() == (5, 8, 1)
    assert environment == given


def test_launchers_variables_win_over_mpis(environment: dict[str, str]) -> None:
    given = dict(zip(VARIABLES, ("5", "8", "1", "10.0.0.7", "29501")))
    environment.update(given, OMPI_COMM_WORLD_SIZE="3")
    assert discover() == (5, 8, 1)


@pytest.mark.parametrize("missing", VARIABLES)
def test_missing_variable_is_named(environment: dict[str, str], missing: str) -> None:
    environment.update(dict(zip(VARIABLES, ("5", "8", "1", "10.0.0.7", "29501"))))
    del environment[missing]
    with pytest.raises(RuntimeError, match=f"missing: {missing}$"):
        discover()
    assert missing not in environment  # nothing was invented


def test_address_alone_does_not_make_a_plain_process_a_rank(environment: dict[str, str]) -> None:
    environment.update(MASTER_ADDR="10.0.0.7", MASTER_PORT="29501")
    assert discover() == (0, 1, 0)
    assert environment["MASTER_ADDR"] == "127.0.0.1"


class World:
    """COMM_WORLD of rank 3 of 4, the second of two on its host; it gets what rank 0 broadcasts."""

    rank, size = 3, 4

    def Split_type(self, _: Any) -> Any:
        return types.SimpleNamespace(rank=1, size=2)

    def bcast(self, value: Any, root: int) -> Any:
        assert root == 0 and value[0] == "host-b"
        return "host-a", 4711


def fake_mpi(monkeypatch: pytest.MonkeyPatch, world: Any) -> Any:
    mpi = types.SimpleNamespace(COMM_WORLD=world, COMM_TYPE_SHARED=0, Get_processor_name=lambda: "host-b")
    mpi.Finalize = lambda: setattr(mpi, "ended", True)
    monkeypatch.setitem(sys.modules, "mpi4py", types.SimpleNamespace(MPI=mpi))
    return mpi


@pytest.mark.parametrize("mpi_variable", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_under_mpirun_mpi4py_is_asked(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, mpi_variable: str
) -> None:
    environment[mpi_variable] = "4"
    mpi = fake_mpi(monkeypatch, World())
    assert discover() == (3, 4, 1)
    assert mpi.ended  # a killed mpirun would abort ranks that still took part in MPI
    assert environment["MASTER_ADDR"] == "host-a" and environment["MASTER_PORT"] == "4711"


def test_under_mpirun_on_one_host_the_address_is_local(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class OneHost(World):
        rank, size = 1, 2

        def bcast(self, value: Any, root: int) -> Any:
            return value

    environment["OMPI_COMM_WORLD_SIZE"] = "2"
    fake_mpi(monkeypatch, OneHost())
    assert discover() == (1, 2, 1)
    assert environment["MASTER_ADDR"] == "127.0.0.1"


def test_under_mpirun_hosts_of_one_name_are_distinguished_by_the_launcher(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Open MPI takes them for one host, and its split hangs or crashes."""

    class First(World):
        rank = 0

        def Split_type(self, _: Any) -> Any:
            raise AssertionError("not to be called")

        def bcast(self, value: Any, root: int) -> Any:
            return value

    environment.update(OMPI_COMM_WORLD_SIZE="4", OMPI_COMM_WORLD_LOCAL_SIZE="2", OMPI_COMM_WORLD_LOCAL_RANK="0")
    fake_mpi(monkeypatch, First())
    environment["MASTER_ADDR"] = "10.0.0.7"
    monkeypatch.setattr("alfb_dist.distributed.rendezvous.own_address", lambda master: f"own toward {master}")
    assert discover() == (0, 4, 0)
    assert environment["MASTER_ADDR"] == "own toward 10.0.0.7"


def test_mpi_that_was_running_before_is_left_running(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    environment["OMPI_COMM_WORLD_SIZE"] = "4"
    mpi = fake_mpi(monkeypatch, World())
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", mpi)
    assert discover() == (3, 4, 1)
    assert not hasattr(mpi, "ended")


SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_STEP_TASKS_PER_NODE": "4,3",
    "SLURM_JOB_ID": "1000",
    "SLURM_STEP_ID": "2",
}


def test_under_srun_slurms_variables_are_used(environment: dict[str, str]) -> None:
    environment.update(SLURM)
    assert launched_world() == (5, 7)
    assert local_size() == 3
    assert discover() == (5, 7, 1)
    assert environment["MASTER_ADDR"] == "gpu07"
    assert environment["MASTER_PORT"] == str(20_000 + (1000 * 16 + 2) % 12_000)  # the same on every rank


def test_address_and_port_that_are_set_win_over_slurms(environment: dict[str, str]) -> None:
    environment.update(SLURM, MASTER_ADDR="10.0.0.7", MASTER_PORT="29501")
    assert discover() == (5, 7, 1)
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("10.0.0.7", "29501")


def test_batch_script_is_not_a_rank(environment: dict[str, str]) -> None:
    environment.update(SLURM_PROCID="0", SLURM_NTASKS="7", SLURM_JOB_ID="1000", SLURM_LOCALID="0")
    assert launched_world() == (0, 1)
    assert discover() == (0, 1, 0)


def test_mpirun_inside_a_slurm_step_wins(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    environment.update(SLURM, OMPI_COMM_WORLD_SIZE="4", OMPI_COMM_WORLD_RANK="3")
    fake_mpi(monkeypatch, World())
    assert launched_world() == (3, 4)
    assert discover() == (3, 4, 1)


@pytest.mark.parametrize(
    ("nodelist", "first"),
    [
        ("gpu07", "gpu07"),
        ("gpu[007-009,12],login1", "gpu007"),
        ("gpu[12,15]", "gpu12"),
        ("rack1-node[3-4]-ib", "rack1-node3-ib"),
        ("a,b[1-2]", "a"),
    ],
)
def test_first_host_of_a_slurm_node_list(nodelist: str, first: str) -> None:
    assert first_host(nodelist) == first


@pytest.mark.parametrize(("counts", "sizes"), [("2", [2]), ("4(x2),3", [4, 4, 3]), ("1,2(x2)", [1, 2, 2])])
def test_tasks_of_a_slurm_node(environment: dict[str, str], counts: str, sizes: list[int]) -> None:
    environment.update(SLURM, SLURM_STEP_TASKS_PER_NODE=counts)
    for node, size in enumerate(sizes):
        environment["SLURM_NODEID"] = str(node)
        assert local_size() == size


def test_mpirun_without_mpi4py_is_refused_with_the_package_to_install(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    environment["OMPI_COMM_WORLD_SIZE"] = "2"
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(RuntimeError, match=r"mpi4py is missing: pip install 'alfb_dist\[mpi\]'"):
        discover()


def init_here() -> tuple[str, bool, tuple[int, int, int]]:
    device = init_distributed()
    return str(device), dist.get_backend() == "gloo", discover()


def test_init_keeps_a_world_group_that_exists(tmp_path: Any) -> None:
    assert run_ranks(2, init_here, folder=tmp_path) == [("cpu", True, (0, 2, 0)), ("cpu", True, (1, 2, 1))]


# Where the ranks meet.


def test_taken_port_is_refused_before_ranks_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        for name, value in zip(VARIABLES, ("0", "2", "0", "127.0.0.1", str(port))):
            monkeypatch.setenv(name, value)
        with pytest.raises(ConfigError, match=rf"cannot listen at port {port} .*another --master_port"):
            init_distributed(timeout_seconds=1)


def test_interface_leads_to_the_first_rank_unless_given_or_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in INTERFACE_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    assert choose_interface("127.0.0.1") == "lo"
    assert [os.environ[variable] for variable in INTERFACE_VARIABLES] == ["lo"] * 3
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    assert choose_interface("203.0.113.1", "lo") == "lo"
    assert os.environ["NCCL_SOCKET_IFNAME"] == "ib0"  # set by the user: stays
    with pytest.raises(ValueError, match=r"run\.interface \(eth77\) must be one of this host's: .*lo"):
        choose_interface("127.0.0.1", "eth77")


def timeouts_of_an_engine() -> set[float]:
    optimizer = {"type": "AdamW", "params": {"lr": 1e-3}}
    ds_config = {"train_micro_batch_size_per_gpu": 1, "optimizer": optimizer, "zero_optimization": {"stage": 1}}
    before = set(dist.distributed_c10d._world.pg_map)
    alfb_dist.initialize(tiny_model(), ds_config, ep_degree=2, timeout_seconds=33)
    made = set(dist.distributed_c10d._world.pg_map) - before
    assert len(made) >= 3, made  # of experts and their data, and DeepSpeed's
    return {g._get_backend(torch.device("cpu")).options._timeout.total_seconds() for g in made}


def test_every_group_of_an_engine_has_our_timeout(tmp_path: Any) -> None:
    assert run_ranks(4, timeouts_of_an_engine, folder=tmp_path) == [{33.0}] * 4
