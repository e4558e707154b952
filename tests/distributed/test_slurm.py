"""Tasks of a SLURM step, as its environment describes them, are the ranks of one run."""

import socket
import subprocess
import sys

import pytest

from tests.processes import TINY, TRAIN, environment, python, result

pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def test_two_nodes_of_one_task_give_the_losses_of_one_process(tmp_path):
    step = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NAME": "draft",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_NNODES": "2",
        "SLURM_LOCALID": "0",
        "SLURM_NODELIST": "localhost",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    settings = (*TINY, "trainer=ddp", "trainer.devices=1", "trainer.num_nodes=2", "run_name=slurm")
    tasks = [
        subprocess.Popen(
            [sys.executable, TRAIN, *settings],
            cwd=tmp_path,
            env=environment() | step | {"SLURM_PROCID": str(rank), "SLURM_NODEID": str(rank)},
        )
        for rank in range(2)
    ]
    assert [task.wait(timeout=200) for task in tasks] == [0, 0]
    assert result(tmp_path, "slurm")["world_size"] == 2
    python(TRAIN, *TINY, "run_name=one", cwd=tmp_path)
    assert result(tmp_path, "slurm")["losses"] == pytest.approx(result(tmp_path, "one")["losses"], rel=1e-4)


def test_ranks_without_a_name_for_their_run_are_refused(tmp_path):
    """Each rank would name the run by its own clock."""
    shown = python(TRAIN, *TINY, cwd=tmp_path, status=1, variables={"SLURM_NTASKS": "2"})
    assert "ranks started by torchrun or SLURM need one name for their run: add run_name=" in shown.stderr
