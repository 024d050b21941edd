"""A run that is stopped in any phase goes on by the same command, to the weights and the cost of a whole run."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import heed_interrupts
from tests.test_run import plan
from upcycle_bench import run as module
from upcycle_bench.planning.fingerprint import training_fingerprint
from upcycle_bench.planning.identity import FREE, different, mixed_ranks, run_facts, trained_on
from upcycle_bench.planning.plan import Plan
from upcycle_bench.protocol import Protocol, flatten
from upcycle_bench.record_schema import SessionPart
from upcycle_bench.training.stopping import Stopped, stoppable
from upcycle_bench.training.work_folder import folder_of
from upcycle_bench.upcycling import initialise
from upcycle_bench.util.cache import cache_root
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.progress import OnStep, Reporter

SETTINGS = ["dense.schedule.steps=12", "dense.schedule.batch_size=32", "train.schedule.batch_size=32"]
SETTINGS += ["train.schedule.steps=6"]
OPTIONS: dict[str, Any] = {"cluster-aware": {}, "btx": {"options": {"budget": "6", "branches": "4"}}}
Trained = tuple[str, dict[str, tuple[int | None, int, int]]]  # the weights; FLOPs, steps and samples of each phase


class Enough(Exception):
    """The training is over, and its evaluation would only take time."""


def send(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.01)


class Stopping(Reporter):
    """Sends a signal after that step of the work whose bar has this name."""

    def __init__(self, what: str, at: int) -> None:
        self.what, self.at = what, at

    @contextlib.contextmanager
    def bar(self, what: str, total: int) -> Iterator[OnStep]:
        yield lambda done, metrics: send() if self.what in what and done == self.at else None


def train(planned: Plan, results: Path, reporter: Reporter | None = None, fresh: bool = False) -> Trained:
    """Run up to the evaluation; then the training is forgotten, which would be kept for another try."""
    found: list[Trained] = []

    def score(suites: Any, root: Any, final: Any, meter: Any, reporter: Any, weights: str, file: Any) -> Any:
        costs = {name: (each.flops, each.steps, each.samples) for name, each in meter.phases.items()}
        found.append((weights, costs))
        raise Enough

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "score", score)
        with contextlib.suppress(Enough), stoppable():
            module.run(planned, results, reporter or Reporter(), fresh=fresh)
    for folder in (cache_root() / "trained", folder_of(run_facts(planned))):
        shutil.rmtree(folder, ignore_errors=True)
    return found[0]


def work() -> list[Path]:
    return list((cache_root() / "runs").iterdir())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    folder = tmp_path_factory.mktemp("whole")
    return {name: train(plan(name, SETTINGS, **OPTIONS[name]), folder, fresh=True) for name in OPTIONS}


@pytest.mark.parametrize(
    ("strategy", "what", "at"),
    [
        ("cluster-aware", "training", 2),
        ("btx", "branch 2", 1),
        ("btx", "training", 6),
    ],
)
def test_a_run_that_was_stopped_in_a_training_goes_on(
    tmp_path: Path, whole: dict[str, Trained], monkeypatch: pytest.MonkeyPatch, strategy: str, what: str, at: int
) -> None:
    planned = plan(strategy, SETTINGS, **OPTIONS[strategy])
    with pytest.raises(Stopped):
        train(planned, tmp_path, Stopping(what, at))
    assert list(tmp_path.iterdir()) == []  # no failed record
    assert len(work()) == 1
    if what == "training":  # what was calibrated or prepared is not made again

        def again(*_: Any, **__: Any) -> Any:
            raise AssertionError

        monkeypatch.setattr(initialise, "calibrate", again)
        monkeypatch.setattr(type(planned.strategy), "prepare", again)
    assert train(planned, tmp_path) == whole[strategy]
    assert work() == []


def test_a_stop_while_calibrating_ends_at_once_and_leaves_nothing(
    tmp_path: Path, whole: dict[str, Trained], monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = plan("cluster-aware", SETTINGS)
    with monkeypatch.context() as patch:
        patch.setattr(initialise, "calibrate", lambda *_: send())
        with pytest.raises(Stopped):
            train(planned, tmp_path)
    assert (list(tmp_path.iterdir()), work()) == ([], [])
    assert train(planned, tmp_path) == whole["cluster-aware"]


def test_a_stop_while_evaluating_keeps_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = plan("dense", SETTINGS)
    with monkeypatch.context() as patch:
        patch.setattr(module, "score", lambda *_: send())
        with pytest.raises(Stopped), stoppable():
            module.run(planned, tmp_path, Reporter())
    assert (list(tmp_path.iterdir()), work()) == ([], [])
    monkeypatch.setattr(module, "train_model", lambda *_: pytest.fail("it trains again"))
    train(planned, tmp_path)


def test_the_training_of_the_dense_model_goes_on(tmp_path: Path) -> None:
    planned = plan("dense-frozen", [*SETTINGS, "dense.seed=7"])
    with pytest.raises(Stopped):
        train(planned, tmp_path, Stopping("dense model", 5))
    (folder,) = work()
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step5"]
    parts = train(planned, tmp_path)
    assert work() == []
    shutil.rmtree(cache_root() / "dense")
    assert train(planned, tmp_path) == parts


def test_what_cannot_go_on_is_said_before_anything_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = plan("sparse-upcycling", SETTINGS)
    with pytest.raises(Stopped):
        train(planned, tmp_path, Stopping("training", 3))
    (folder,) = work()
    with monkeypatch.context() as patch:
        patch.setattr("upcycle_bench.planning.identity.code_fingerprint", lambda strategy: "other code")
        with pytest.raises(UserError) as refused:
            train(planned, tmp_path)
        assert str(refused.value) == (
            "an interrupted training of sparse-upcycling, at step 3, cannot go on, since these have changed: "
            "code of the strategy; --fresh starts anew and deletes it; with these as before, the same command goes on."
        )
        other = plan("sparse-upcycling", [*SETTINGS, "train.lr_factor=0.5"])
        train(other, tmp_path / "other")  # another command: nothing is said
        assert work() == [folder]
        train(planned, tmp_path / "fresh", fresh=True)
        assert work() == []
    assert not list(tmp_path.glob("*.json"))


def test_facts_that_differ_are_named() -> None:
    one = run_facts(plan("cluster-aware", SETTINGS))
    assert different(one, one) == []
    other = run_facts(plan("cluster-aware", [*SETTINGS, "train.lr_factor=0.5"], options={"tau": "0.8"}))
    assert different(one, other) == ["strategy", "options.tau", "settings.train.lr_factor", "peak learning rate"]
    same = [*SETTINGS, "moe.ep_size=2", "train.checkpoint_every=3", "train.log_every=1"]
    assert run_facts(plan("cluster-aware", same)) == one
    for key, value in flatten(one_protocol().model_dump(mode="json")).items():
        if key.startswith(("moe.", "train.", "data.")) and key not in FREE and (new := another(value)) is not None:
            with contextlib.suppress(UserError):  # some values do not go together
                assert run_facts(plan("cluster-aware", [*SETTINGS, f"{key}={new}"])) != one, key
    for setting in ("data.window=64", "data.order=replacement", "dense.lr=0.01", "dense.stop_fraction=0.5"):
        assert run_facts(plan("cluster-aware", [*SETTINGS, setting])) != one, setting


def one_protocol() -> Protocol:
    return plan("cluster-aware", SETTINGS).protocol


def another(value: object) -> str | None:
    """Another value of a setting that is a number."""
    return None if isinstance(value, bool) or not isinstance(value, int | float) else str(2 * value or type(value)(1))


def test_a_run_on_several_numbers_of_ranks_shares_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = plan("dense", SETTINGS)

    def session(world_size: int, ep_size: int) -> SessionPart:
        facts: dict[str, Any] = {"started": "2026-01-01T00:00:00Z", "hosts": ["a"], "device": "CPU", "versions": {}}
        return SessionPart(**facts, world_size=world_size, ep_size=ep_size, first_step=0, last_step=1)

    assert trained_on(planned, [session(2, 2), session(2, 2)]) == planned
    sessions = [session(2, 2), session(1, 1), session(2, 2)]
    assert mixed_ranks(sessions) == [[1, 1], [2, 2]]
    mixed = trained_on(planned, sessions).training_fingerprint
    assert mixed != planned.training_fingerprint
    others = trained_on(planned, [session(1, 1), session(4, 1)]).training_fingerprint
    assert others not in (mixed, planned.training_fingerprint)
    monkeypatch.setenv("WORLD_SIZE", "2")  # in whichever session it ended
    protocol = plan("dense", [*SETTINGS, "moe.ep_size=2"]).protocol
    dense = planned.dense_identity or ""
    assert training_fingerprint(protocol, planned.world, dense, None, mixed_ranks(sessions)) == mixed


def test_a_killed_run_goes_on(tmp_path: Path, whole: dict[str, Trained]) -> None:
    """By kill -9, as soon as there is a second checkpoint; every step has one."""
    settings = [*SETTINGS, "train.checkpoint_every=1"]
    flags = [part for setting in settings for part in ("--set", setting)]
    command = [sys.executable, "-m", "upcycle_bench", "run", "-s", "cluster-aware", "-p", "smoke", *flags]
    process = subprocess.Popen([*command, "--results", str(tmp_path)], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not list((cache_root() / "runs").glob("*/checkpoints/step2")) and time.monotonic() < deadline:
            time.sleep(0.005)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
    assert len(work()) == 1
    assert train(plan("cluster-aware", settings), tmp_path) == whole["cluster-aware"]


def test_ctrl_c_while_training_leaves_nothing_half_written(tmp_path: Path, quick: list[str]) -> None:
    results = tmp_path / "results"
    settings = [each for each in quick if not each.startswith("train.schedule.steps")]
    settings += ["train.schedule.steps=100000", "train.log_every=1"]
    flags = [part for setting in settings for part in ("--set", setting)]
    command = [
        sys.executable,
        "-m",
        "upcycle_bench",
        "run",
        "-s",
        "dense",
        "-p",
        "smoke",
        *flags,
        "--results",
        str(results),
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts
    )
    try:
        deadline = time.monotonic() + 120
        metrics: list[Path] = []
        while not any(path.stat().st_size for path in metrics) and time.monotonic() < deadline:
            time.sleep(0.2)
            metrics = list((cache_root() / "runs").glob("*/metrics.jsonl"))
        assert metrics, "training did not start"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "interrupted: the same command goes on" in err
    assert out == ""
    assert not results.exists()
    assert list((cache_root() / "runs").iterdir()) == []
