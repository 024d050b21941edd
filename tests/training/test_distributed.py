"""Two processes (gloo) give the same gradients as one for the same global batch, and one record; ep_size 1 and 2."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import heed_interrupts
from upcycle_bench.util.cache import cache_root

WORKER = Path(__file__).with_name("gradients_worker.py")


def launch(processes: int, *command: str) -> str:
    """torchrun on a free port; returns stdout."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, *command], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


STRATEGIES = ("sparse-upcycling", "cluster-aware")
Gradients = dict[str, dict[str, Any]]  # by strategy


@pytest.fixture(scope="module")
def gradients(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], Gradients]:
    """By (processes, ep_size); all strategies of one such pair in one start."""
    made = {}
    for processes, ep_size in ((1, 1), (2, 1), (2, 2)):
        output = tmp_path_factory.mktemp("gradients") / "made.pt"
        launch(processes, str(WORKER), str(output), str(ep_size), *STRATEGIES)
        made[processes, ep_size] = torch.load(output, weights_only=True)
    return made


@pytest.mark.parametrize("ep_size", [1, 2])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradients_equal_one_process(gradients: dict[tuple[int, int], Gradients], strategy: str, ep_size: int) -> None:
    """In fp32, within 1e-5 of each tensor's norm, nothing dropped. All three losses are of the global batch."""
    one, two = gradients[1, 1][strategy], gradients[2, ep_size][strategy]
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert two["gradients"].keys() == one["gradients"].keys()
    for name, expected in one["gradients"].items():
        error = (two["gradients"][name] - expected).norm()
        # The gradient of a key's bias is rounding only; 1e-8 is far below any other tensor's norm.
        assert error <= 1e-5 * expected.norm() + 1e-8, (name, error / expected.norm())


@pytest.mark.parametrize("ep_size", [1, 2])
def test_two_ranks_write_one_record(tmp_path: Path, quick_flags: list[str], ep_size: int) -> None:
    results = tmp_path / "results"
    command = ["-m", "upcycle_bench", "run", "-p", "smoke", "-s", "cluster-aware", *quick_flags]
    command += ["--set", f"moe.ep_size={ep_size}"]
    printed = json.loads(launch(2, *command, "--results", str(results), "--json"))
    (path,) = results.rglob("*.json")
    assert printed == json.loads(path.read_text())
    assert printed["cost"]["world_size"] == 2
    assert printed["cost"]["samples"] == 4 * 32
    experts = printed["receipt"]["layers"]["vision.1"]["load"]
    assert len(experts) == 8


def test_two_ranks_with_zero_and_expert_parallelism_train_the_weights_of_one_process(
    tmp_path: Path, quick_flags: list[str]
) -> None:
    """Four steps with clipped gradients, nothing dropped; the same number of ranks trains the dense model first.

    eps is large, since Adam would turn rounding of tiny gradients into steps of full size.
    """
    settings = ["moe.capacity_factor=8.0", "train.schedule.grad_clip=0.05", "train.schedule.eps=0.01"]
    settings += ["dense.schedule.eps=0.01"]
    command = ["-m", "upcycle_bench", "run", "-p", "smoke", "-s", "sparse-upcycling", *quick_flags, "--json"]
    command += [part for setting in settings for part in ("--set", setting)]

    def weights(processes: int, *more: str) -> dict[str, torch.Tensor]:
        results = ["--results", str(tmp_path / str(processes))]
        record = json.loads(launch(processes, *command, *more, *results))
        return load_file(cache_root() / "weights" / f"{record['hashes']['weights']}.safetensors")

    one = weights(1)
    two = weights(2, "--set", "moe.ep_size=2", "--set", "train.zero_stage=1")
    assert one.keys() == two.keys()
    for name, expected in one.items():
        assert torch.allclose(two[name], expected, rtol=0, atol=1e-6), name


def test_two_ranks_go_on_where_they_were_interrupted(tmp_path: Path, quick: list[str]) -> None:
    """They get SIGINT during training; the same command finishes it, with the weights of a whole run."""
    settings = [each for each in quick if not each.startswith("train.schedule.steps")]
    settings += ["train.schedule.steps=12", "moe.ep_size=2"]
    command = ["-m", "upcycle_bench", "run", "-p", "smoke", "-s", "cluster-aware", "--json"]
    command += [part for setting in settings for part in ("--set", setting)]
    whole = json.loads(launch(2, *command, "--results", str(tmp_path / "whole")))
    # --fresh, since the weights of the whole run are in the cache.
    command += ["--set", "train.checkpoint_every=2", "--fresh", "--results", str(tmp_path / "parts")]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*launcher, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        preexec_fn=heed_interrupts,
    )
    deadline = time.monotonic() + 120
    while not list((cache_root() / "runs").glob("*/checkpoints/latest")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode != 0, "it finished before it could be interrupted"
    assert not (tmp_path / "parts").exists()
    resumed = json.loads(launch(2, *command))
    assert resumed["hashes"]["weights"] == whole["hashes"]["weights"]
    assert list((cache_root() / "runs").iterdir()) == []


def test_a_batch_that_ranks_cannot_share_is_one_line(tmp_path: Path) -> None:
    command = ["-m", "upcycle_bench", "run", "-p", "smoke", "-s", "dense", "--set", "train.schedule.batch_size=33"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*launcher, *command], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("error: batch_size 33 cannot be shared by 2 processes") == 1
