"""The folder of a batch of jobs: numbers that stay, a script that a shell reads as it was meant, plans that differ."""

import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upcycle_bench.planning.jobs import Batch, planned_for, ranges, slurm_script, write
from upcycle_bench.util import distributed
from upcycle_bench.util.errors import UserError


def batch(folder: Path, *lines: str, **settings: Any) -> Batch:
    every = {"lines": lines or ("one", "two"), "to_do": [1, 2], "nodes": 1, "tasks_per_node": 1}
    return Batch(folder=folder, **(every | settings))


@given(st.sets(st.integers(1, 40), min_size=1))
def test_ranges_name_every_number_once(numbers: set[int]) -> None:
    parts = [part.split("-") for part in ranges(sorted(numbers)).split(",")]
    assert [n for part in parts for n in range(int(part[0]), int(part[-1]) + 1)] == sorted(numbers)


def test_ranges_are_short() -> None:
    assert ranges([1, 2, 3, 7, 9, 10]) == "1-3,7,9-10"


def test_a_folder_of_the_same_plan_is_updated_and_one_of_another_plan_refused(tmp_path: Path) -> None:
    folder = tmp_path / "launch"
    write(batch(folder, "one", "two"), {"job.sh": "first"}, force=False)
    assert (folder / "logs").is_dir() and (folder / "cells.txt").read_text() == "one\ntwo\n"
    write(batch(folder, "one", "two", "three"), {"job.sh": "second"}, force=False)  # grown at its end
    assert (folder / "job.sh").read_text() == "second"
    for other in (("zero", "one", "two", "three"), ("one", "two")):
        with pytest.raises(UserError, match=r"holds the jobs of another plan \(cells.txt has 3 lines\)"):
            write(batch(folder, *other), {"job.sh": "third"}, force=False)
    assert (folder / "job.sh").read_text() == "second"
    write(batch(folder, "one", "two"), {"job.sh": "third"}, force=True)
    assert (folder / "cells.txt").read_text() == "one\ntwo\n"


def test_the_script_asks_slurm_for_what_was_asked_for(tmp_path: Path) -> None:
    wanted = {"gpus": 8, "nodes": 4, "tasks_per_node": 8, "time": "4:00:00", "partition": "a b", "max_jobs": 3}
    text = slurm_script(batch(tmp_path / "100% mine", **wanted, more=["--qos=high"], signal_before=60))
    options = {line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")}
    asked = {"array": "1-2%3", "nodes": "4", "ntasks-per-node": "8", "gpus-per-node": "8", "time": "4:00:00"}
    assert {f"--{name}={value}" for name, value in asked.items()} <= options
    assert {"--partition='a b'", "--qos=high", "--requeue", "--open-mode=append", "--signal=USR1@60"} <= options
    assert f"--output='{tmp_path}/100%% mine/logs/%a.log'" in options  # Slurm reads %% as a percent sign
    assert not any(option.startswith("--account") for option in options)


def test_the_shell_sees_folder_and_variables_as_they_are(tmp_path: Path) -> None:
    folder, odd = tmp_path / "it's $HOME", "a 'b' $c"
    script = slurm_script(
        batch(folder, setup="loaded=yes", programs=Path("/odd dir"), variables={"UPCYCLE_BENCH_CACHE": odd})
    )
    head = script.partition("cell=$(")[0]
    shown = 'printf "%s\\n" "$folder" "$UPCYCLE_BENCH_CACHE" "$loaded" "${PATH%%:*}"'
    done = subprocess.run(["bash", "-euc", head + shown], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [str(folder), odd, "yes", "/odd dir"]
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    assert shlex.split(script, comments=True)


def test_planned_for_leaves_the_environment_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    for before in (None, "1"):
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        if before:
            monkeypatch.setenv("WORLD_SIZE", before)
        with planned_for(16):
            assert distributed.world_size() == 16
        assert os.environ.get("WORLD_SIZE") == before
