"""Runs from plan to record: what is written, what is not, and that numbers come again."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from pydantic.dataclasses import dataclass

from upcycle_bench import record, weights
from upcycle_bench.cache import cache_root
from upcycle_bench.errors import UserError
from upcycle_bench.hookspecs import hookimpl
from upcycle_bench.plan import Plan, make_plan
from upcycle_bench.progress import Reporter
from upcycle_bench.protocol import load_protocol
from upcycle_bench.registry import load_registry
from upcycle_bench.run import run
from upcycle_bench.strategy import Strategy, StrategyInfo


@dataclass(frozen=True, kw_only=True)
class Failing(Strategy):
    """A strategy whose initialisation fails."""

    info: ClassVar[StrategyInfo] = StrategyInfo(name="failing", summary="s", paper="p", status="control")

    def init_layer(self, *_: Any) -> Any:
        raise ArithmeticError("singular matrix in vision.1")


class Plugin:
    """Brings `failing`."""

    @hookimpl
    def register_strategies(self) -> list[type[Strategy]]:
        return [Failing]


def plan(strategy: str, quick: list[str], **options: Any) -> Plan:
    registry = load_registry({"test": Plugin()})
    protocol = load_protocol(registry.get("protocol", "smoke").target, quick)
    return make_plan(registry, strategy, protocol, **options)


def scores(made: record.Record) -> dict[tuple[str, str], float]:
    return {(score.dataset, score.metric): score.value for score in made.scores}


@pytest.mark.parametrize("strategy", ["sparse-upcycling", "cluster-aware", "dense", "dense-frozen"])
def test_a_run_is_recorded_whole(tmp_path: Path, quick: list[str], strategy: str) -> None:
    path = run(plan(strategy, quick, init_seed=1, train_seed=2), tmp_path, Reporter())
    assert path is not None
    made = record.read(path)
    moe, trains = strategy in ("sparse-upcycling", "cluster-aware"), strategy != "dense-frozen"
    assert made.status == "ok"
    assert (made.seeds.init, made.seeds.train) == (1, 2)
    assert made.protocol.division == "open"
    assert made.cost is not None
    assert made.cost.samples == (4 * 32 if trains else 0)
    assert ("train" in made.cost.phases) == trains
    assert (made.receipt is not None) == moe
    assert (made.cost.parameters_active < made.cost.parameters_total) == moe
    assert made.primary == scores(made)["digits-test", "log_likelihood"]
    if trains:
        assert made.cost.phases["train"].flops > 0
        assert path.with_suffix(".jsonl").is_file()
    if moe:
        assert set(made.receipt["layers"]) == set(made.diagnostics["layers"]) == {"vision.1", "vision.3", "text.1"}
    outcomes = record.read_outcomes(path)
    right = outcomes["zero-shot/digits-test/correct@1"]
    assert len(right) == 359
    assert np.mean(right) == pytest.approx(scores(made)["digits-test", "acc1"])
    assert (cache_root() / "weights" / f"{made.hashes.weights}.safetensors").is_file()
    assert list((cache_root() / "runs").iterdir()) == []


def test_the_same_command_gives_the_same_scores_and_weights(tmp_path: Path, quick: list[str]) -> None:
    one, two = (record.read(run(plan("cluster-aware", quick), tmp_path / str(n), Reporter())) for n in range(2))
    assert scores(one) == scores(two)
    assert one.hashes == two.hashes
    assert one.receipt == two.receipt


def test_seeds_are_apart(tmp_path: Path, quick: list[str]) -> None:
    """The training seed leaves the receipt of step 0 alone; the initialisation seed changes it."""
    base, trained, initialised = (
        record.read(run(plan("sparse-upcycling", quick, init_seed=i, train_seed=t), tmp_path / f"{i}{t}", Reporter()))
        for i, t in ((0, 0), (0, 1), (1, 0))
    )
    assert base.receipt == trained.receipt
    assert base.receipt != initialised.receipt
    assert scores(base) != scores(trained)
    assert len({made.hashes.dense for made in (base, trained, initialised)}) == 1


def test_sparse_upcycling_starts_from_the_dense_function(tmp_path: Path, quick: list[str]) -> None:
    made = record.read(run(plan("sparse-upcycling", quick), tmp_path, Reporter()))
    for layer in made.receipt["layers"].values():
        assert layer["function_drift"] < 1e-5
        assert layer["expert_cosine"] == pytest.approx(1, abs=1e-6)
    assert made.receipt["feature_cosine_with_dense"]["vision"] == pytest.approx(1, abs=1e-5)


def test_saved_weights_score_again(tmp_path: Path, quick: list[str]) -> None:
    """A new suite can score an old run: the weights in the cache give the scores of the record."""
    import torch

    from upcycle_bench.costs import Meter
    from upcycle_bench.run import evaluate

    planned = plan("cluster-aware", quick)
    made = record.read(run(planned, tmp_path, Reporter()))
    clip = weights.load(cache_root() / "weights" / f"{made.hashes.weights}.safetensors")
    again = evaluate(planned, clip, Meter(torch.device("cpu")), Reporter())
    assert {(s.dataset, s.metric): s.value for s in again["zero-shot"].scores} == scores(made)


def test_a_failure_is_a_record_with_a_reason(tmp_path: Path, quick: list[str]) -> None:
    with pytest.raises(ArithmeticError):
        run(plan("failing", quick), tmp_path, Reporter())
    (path,) = record.find(tmp_path)
    made = record.read(path)
    assert (made.status, made.reason) == ("failed", "ArithmeticError: singular matrix in vision.1")
    assert made.scores == []
    assert list((cache_root() / "runs").iterdir()) == []


def test_bad_input_leaves_nothing(tmp_path: Path, quick: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match=r"pip install 'upcycle-bench\[cpu\]'"):
        run(plan("cluster-aware", quick), tmp_path, Reporter())
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_while_training_leaves_nothing_half_written(tmp_path: Path, quick_flags: list[str]) -> None:
    results = tmp_path / "results"
    long = ["--set", "train.schedule.steps=100000", "--set", "train.log_every=1"]
    command = [
        sys.executable,
        "-m",
        "upcycle_bench",
        "run",
        "-s",
        "dense",
        *quick_flags,
        *long,
        "--results",
        str(results),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    metrics: list[Path] = []
    while not any(path.stat().st_size for path in metrics) and time.monotonic() < deadline:
        time.sleep(0.2)
        metrics = list((cache_root() / "runs").glob("*/metrics.jsonl"))
    assert metrics, "training did not start"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "interrupted: nothing was written" in err
    assert out == ""
    assert not results.exists()
    assert list((cache_root() / "runs").iterdir()) == []


def test_an_interrupted_run_with_checkpoints_goes_on(
    tmp_path: Path, quick: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """checkpoint_every=2, interrupted in step 3 of 4: the same command finishes it, with the scores of a whole run."""
    whole = record.read(run(plan("sparse-upcycling", quick), tmp_path / "whole", Reporter()))

    class Interrupting(Reporter):
        def bar(self, what: str, total: int) -> Any:  # type: ignore[override]
            import contextlib

            @contextlib.contextmanager
            def bar() -> Any:
                def step(done: int, metrics: Any) -> None:
                    if what.startswith("training") and done == 3:
                        raise KeyboardInterrupt

                yield step

            return bar()

    resumable = plan("sparse-upcycling", [*quick, "train.checkpoint_every=2"])
    with pytest.raises(KeyboardInterrupt):
        run(resumable, tmp_path / "parts", Interrupting())
    assert not (tmp_path / "parts").exists()
    (work,) = (cache_root() / "runs").iterdir()
    assert (work / "checkpoints" / "latest").read_text() == "step2"
    path = run(resumable, tmp_path / "parts", Reporter())
    assert scores(record.read(path)) == scores(whole)
    steps = [json.loads(line)["step"] for line in path.with_suffix(".jsonl").read_text().splitlines()]
    assert steps == [1, 4]
    assert list((cache_root() / "runs").iterdir()) == []
