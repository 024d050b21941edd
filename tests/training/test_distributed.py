"""Two processes (gloo) give the same gradients as one for the same global batch, and one record; ep_size 1 and 2."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import QUICK
from tests.ranks import ROOT, TORCHRUN, launch, start
from tests.test_run import plan as make_plan
from tests.training import ranks_worker
from upcycle_bench import record
from upcycle_bench.run import run
from upcycle_bench.training import session
from upcycle_bench.util.cache import cache_root
from upcycle_bench.util.progress import Reporter

# ---- what a training and a preparation compute -------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two ranks make of `ranks_worker`, all in one start."""
    output = tmp_path_factory.mktemp("ranks") / "made.pt"
    launch(2, "-m", "tests.training.ranks_worker", str(output))
    return torch.load(output, weights_only=True)


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    """The same of this process."""
    with session.open_session(threads=1) as device:
        return {"gradients": ranks_worker.gradients(device, ep_size=1), "workshop": ranks_worker.workshop()}


@pytest.mark.parametrize("ep_size", [1, 2])
@pytest.mark.parametrize("strategy", ranks_worker.STRATEGIES)
def test_gradients_equal_one_process(one: dict[str, Any], two: dict[str, Any], strategy: str, ep_size: int) -> None:
    """In fp32, within 1e-5 of each tensor's norm, nothing dropped. All three losses are of the global batch."""
    theirs, ours = one["gradients"][strategy], two["gradients"][ep_size][strategy]
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-5)
    assert ours["gradients"].keys() == theirs["gradients"].keys()
    for name, expected in theirs["gradients"].items():
        error = (ours["gradients"][name] - expected).norm()
        # The gradient of a key's bias is rounding only; 1e-8 is far below any other tensor's norm.
        assert error <= 1e-5 * expected.norm() + 1e-8, (name, error / expected.norm())


def test_a_workshop_on_two_ranks_does_what_one_does(one: dict[str, Any], two: dict[str, Any]) -> None:
    ours, theirs = two["workshop"], one["workshop"]
    for mine, expected in zip(ours["features"], theirs["features"], strict=True):
        assert torch.allclose(mine, expected, atol=1e-5)
    for name, value in theirs["state"].items():
        assert torch.allclose(ours["state"][name], value, atol=1e-6), name
    # Attention pads captions to the longest of a batch, here of each rank's; the last part has one sample more.
    assert ours["flops"] == pytest.approx(theirs["flops"], rel=0.02)


# ---- the command line --------------------------------------------------------------------------------------------


def run_command(strategies: str, settings: Sequence[str]) -> list[str]:
    flags = [part for setting in settings for part in ("--set", setting)]
    return ["-m", "upcycle_bench", "run", "-p", "smoke", "-s", strategies, *flags, "--json"]


def final_weights(made: dict[str, Any]) -> dict[str, torch.Tensor]:
    return load_file(cache_root() / "weights" / f"{made['hashes']['weights']}.safetensors")


def check_record(printed: dict[str, Any], results: Path, steps: int) -> None:
    """Rank 0 has printed what it wrote, once; and it is of the work of both ranks."""
    (path,) = results.rglob("*.json")
    assert printed == json.loads(path.read_text())
    assert printed["cost"]["world_size"] == 2
    assert printed["cost"]["samples"] == steps * 32
    experts = printed["receipt"]["layers"]["vision.1"]["load"]
    assert len(experts) == 8


def test_two_ranks_write_one_record(tmp_path: Path, quick: list[str]) -> None:
    """By torchrun, with ep_size 1; with 2, below, before a run that is interrupted."""
    command = [*TORCHRUN, "2", *run_command("cluster-aware", quick), "--results", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    check_record(json.loads(done.stdout), tmp_path, steps=4)


# Nothing is dropped. eps is large, since Adam would turn rounding of tiny gradients into steps of full size.
EXACT = [*QUICK, "moe.capacity_factor=8.0", "train.schedule.grad_clip=0.05", "train.schedule.eps=0.01"]
EXACT += ["dense.schedule.eps=0.01"]
EXACT_ON_TWO = [*EXACT, "moe.ep_size=2", "train.zero_stage=1"]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The record of sparse-upcycling on two ranks, with expert parallelism and ZeRO."""
    results = tmp_path_factory.mktemp("sharded")
    return json.loads(launch(2, *run_command("sparse-upcycling", EXACT_ON_TWO), "--results", str(results)))


def test_two_ranks_with_zero_and_expert_parallelism_train_the_weights_of_one_process(
    tmp_path: Path, sharded: dict[str, Any]
) -> None:
    """Four steps with clipped gradients; the same number of ranks trains the dense model first."""
    path = run(make_plan("sparse-upcycling", EXACT), tmp_path, Reporter())
    assert path is not None
    one, two = final_weights(json.loads(path.read_text())), final_weights(sharded)
    assert one.keys() == two.keys()
    for name, expected in one.items():
        assert torch.allclose(two[name], expected, rtol=0, atol=1e-6), name


def test_two_ranks_run_a_matrix_and_reuse_weights(tmp_path: Path, sharded: dict[str, Any]) -> None:
    command = run_command("dense-frozen,sparse-upcycling", EXACT_ON_TWO)
    made = json.loads(launch(2, *command, "--results", str(tmp_path)))["runs"]
    assert {row["status"] for row in made} == {"ok"}
    (row,) = [row for row in made if (row["strategy"], row["seeds"]["train"]) == ("sparse-upcycling", 0)]
    again = record.read(Path(row["record"]))
    assert "training" in again.environment
    assert [score.model_dump(mode="json") for score in again.scores] == sharded["scores"]
    assert again.diagnostics == sharded["diagnostics"]


def test_two_ranks_go_on_where_they_were_interrupted(tmp_path: Path, quick: list[str]) -> None:
    """They are killed during training; the same command finishes it, with the weights of a whole run."""
    settings = [each for each in quick if not each.startswith("train.schedule.steps")]
    settings += ["train.schedule.steps=12", "moe.ep_size=2"]
    command = run_command("cluster-aware", settings)
    whole = json.loads(launch(2, *command, "--results", str(tmp_path / "whole")))
    check_record(whole, tmp_path / "whole", steps=12)
    # --fresh, since the weights of the whole run are in the cache.
    command += ["--set", "train.checkpoint_every=2", "--results", str(tmp_path / "parts")]
    with (tmp_path / "said").open("w") as said:
        ranks = start(2, sys.executable, *command, "--fresh", stdout=said, stderr=said)
        deadline = time.monotonic() + 120
        while not list((cache_root() / "runs").glob("*/checkpoints/step4")) and time.monotonic() < deadline:
            time.sleep(0.02)
        for process in ranks:
            process.kill()
        statuses = [process.wait(60) for process in ranks]
    assert statuses == [-signal.SIGKILL] * 2, "it finished before it could be killed"
    assert not (tmp_path / "parts").exists()
    resumed = json.loads(launch(2, *command))
    assert resumed["hashes"]["weights"] == whole["hashes"]["weights"]
    assert list((cache_root() / "runs").iterdir()) == []


def test_a_batch_that_ranks_cannot_share_is_one_line(tmp_path: Path) -> None:
    command = ["-m", "upcycle_bench", "run", "-p", "smoke", "-s", "dense", "--set", "train.schedule.batch_size=33"]
    done = subprocess.run([*TORCHRUN, "2", *command], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("error: batch_size 33 cannot be shared by 2 processes") == 1
