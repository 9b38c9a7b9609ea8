"""The processes that `accelerate launch --cpu` leaves out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.test_processes import EXACT, written
from vistok.train import checkpoint
from vistok.train.launch import is_lonely, processes_asked_for

ALONE = {"ACCELERATE_USE_CPU": "True", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("environment", "lonely"),
    [
        (ALONE, True),
        ({**ALONE, "WORLD_SIZE": "2"}, False),
        ({**ALONE, "OMPI_COMM_WORLD_SIZE": "2"}, False),
        ({"ACCELERATE_USE_CPU": "True"}, False),
        ({**ALONE, "ACCELERATE_USE_CPU": "False"}, False),
        ({}, False),
    ],
)
def test_only_a_lone_process_of_several_is_lonely(environment, lonely):
    assert is_lonely(environment) is lonely


@pytest.mark.parametrize(
    ("command", "count"),
    [
        ("accelerate launch --cpu --num_processes 2 -m vistok train r.yaml", 2),
        ("accelerate launch --cpu --num-processes=4 -m vistok", 4),
        ("accelerate launch --config_file c.yaml -m vistok", None),
        ("accelerate launch --num_processes", None),
    ],
)
def test_number_of_processes_is_read_from_the_command(command, count):
    assert processes_asked_for(command.split()) == count


@pytest.mark.dist
@pytest.mark.slow
def test_accelerate_launch_on_a_cpu_trains_in_two_processes(tmp_path):
    file = written(tmp_path / "run", EXACT)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*launcher, "-m", "vistok", "train", str(file)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=180, cwd=Path(__file__).parents[2])
    assert "6 steps of 4 on 2 x cpu" in done.stdout, done.stderr
    assert checkpoint.newest(tmp_path / "run").facts["processes"] == 2
