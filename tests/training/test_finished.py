"""Finished trainings: a second run of the same plan trains nothing and records the same, unless a file is damaged."""

from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.test_run import plan
from upcycle_bench import record
from upcycle_bench import run as module
from upcycle_bench.planning.plan import Plan
from upcycle_bench.training import finished
from upcycle_bench.util.cache import cache_root
from upcycle_bench.util.progress import Reporter


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The labels of the strategies that are trained during the test, in order."""
    labels: list[str] = []
    real = module.train_model

    def train_model(plan: Plan, *arguments: Any) -> Any:
        if plan.strategy.trains:
            labels.append(plan.label)
        return real(plan, *arguments)

    monkeypatch.setattr(module, "train_model", train_model)
    return labels


def run(planned: Plan, results: Path, **options: Any) -> tuple[record.Record, Path]:
    path = module.run(planned, results, Reporter(), **options)
    assert path is not None
    return record.read(path), path


def stored() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (cache_root() / "trained").glob("*")}


@pytest.mark.parametrize("strategy", ["cluster-aware", "dense"])
def test_the_second_run_records_the_same_and_trains_nothing(
    tmp_path: Path, quick: list[str], trainings: list[str], strategy: str
) -> None:
    planned = plan(strategy, quick, init_seed=40, train_seed=41)
    fresh, path = run(planned, tmp_path / "fresh")
    again, path_again = run(planned, tmp_path / "again")
    assert trainings == [strategy]

    for part in ("run_id", "scores", "headlines", "receipt", "diagnostics", "hashes", "protocol", "strategy", "seeds"):
        assert getattr(again, part) == getattr(fresh, part), part
    outcomes, outcomes_again = record.read_outcomes(path), record.read_outcomes(path_again)
    assert outcomes.keys() == outcomes_again.keys()
    assert all(np.array_equal(outcomes[name], outcomes_again[name]) for name in outcomes)
    assert path.with_suffix(".jsonl").read_bytes() == path_again.with_suffix(".jsonl").read_bytes()

    # Of 4 steps the EMA remembers one, the least; smoke-vit is 64 wide: 768 / 64 and 512 / 64.
    notes = {"eesd_ema": 0, "eesd_memory_steps": 1, "eesd_factor_vision": 12, "eesd_factor_text": 8}
    assert again.diagnostics.get("loss_notes") == (notes if strategy == "cluster-aware" else None)
    assert fresh.cost is not None and again.cost is not None
    charged, charged_again = (cost.model_dump(exclude={"phases": {"evaluate"}}) for cost in (fresh.cost, again.cost))
    assert charged_again == charged
    assert list(again.cost.phases) == list(fresh.cost.phases)

    assert "training" not in fresh.environment
    training: Any = again.environment["training"]
    assert training["environment"] == fresh.environment
    assert training["time"] <= fresh.created


def test_another_suite_scores_the_same_training(tmp_path: Path, quick: list[str], trainings: list[str]) -> None:
    first, _ = run(plan("dense", quick, train_seed=42), tmp_path)
    other = [*quick, 'suites.zero-shot.headlines.in-distribution=["digits-retrieval"]']
    second, _ = run(plan("dense", other, train_seed=42), tmp_path)
    assert trainings == ["dense"]
    assert second.protocol.training_fingerprint == first.protocol.training_fingerprint
    assert second.protocol.suite_fingerprints != first.protocol.suite_fingerprints
    assert second.hashes.weights == first.hashes.weights
    parts = [score for score in second.scores if score.headline]
    assert [(score.dataset, score.metric) for score in parts] == [
        ("digits-retrieval", f"{way}_retrieval_log_rank") for way in ("text", "image")
    ]
    for part in parts:
        assert part.value == next(score.value for score in first.scores if score.metric == part.metric)


def test_other_seeds_and_libraries_are_other_trainings(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    keys = {finished.key_of("one", cpu), finished.key_of("two", cpu)}
    monkeypatch.setattr(finished.environment, "installed_version", lambda name: f"another {name}")
    keys.add(finished.key_of("one", cpu))
    monkeypatch.setattr(finished.environment, "device_name", lambda device: "another CPU")
    keys.add(finished.key_of("one", cpu))
    assert len(keys) == 4


def test_fresh_trains_again_and_a_frozen_control_is_not_stored(
    tmp_path: Path, quick: list[str], trainings: list[str]
) -> None:
    planned = plan("dense", quick, train_seed=43)
    run(planned, tmp_path / "1")
    before = stored()
    run(planned, tmp_path / "2", fresh=True)
    assert trainings == ["dense", "dense"]
    after = stored()
    assert after.keys() == before.keys()  # the newer training replaced the older one
    assert after != before
    run(plan("dense-frozen", quick, train_seed=43), tmp_path / "3")
    assert stored() == after


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_what_was_damaged_is_trained_again(tmp_path: Path, quick: list[str], trainings: list[str]) -> None:
    planned = plan("dense", quick, train_seed=44)
    first, _ = run(planned, tmp_path / "1")
    key = finished.key_of(first.run_id, torch.device("cpu"))
    weights = cache_root() / "weights" / f"{first.hashes.weights}.safetensors"
    metrics = finished.metrics_of(key)
    facts = metrics.with_suffix(".json")
    for path, damage in ((weights, cut), (weights, Path.unlink), (facts, cut), (metrics, Path.unlink), (weights, flip)):
        assert finished.look_up(key) is not None
        whole = path.read_bytes()
        damage(path)
        assert finished.look_up(key) is None, (path, damage)
        if damage is not flip:
            path.write_bytes(whole)
    second, _ = run(planned, tmp_path / "2")
    assert trainings == ["dense", "dense"]
    assert second.hashes == first.hashes
    assert finished.look_up(key) is not None


def test_a_training_is_kept_when_only_its_evaluation_failed(
    tmp_path: Path, quick: list[str], trainings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def score(*_: Any) -> Any:
        raise RuntimeError("the suite has a bug")

    planned = plan("dense", quick, train_seed=45)
    with monkeypatch.context() as patch:
        patch.setattr(module, "score", score)
        for folder in ("1", "2"):  # the second run reuses the weights, and fails too
            with pytest.raises(RuntimeError):
                module.run(planned, tmp_path / folder, Reporter())
    (failed,) = record.record_paths(tmp_path / "2")
    assert "training" in record.read(failed).environment
    assert run(planned, tmp_path / "3")[0].status == "ok"
    assert trainings == ["dense"]


def test_a_training_that_fails_is_not_kept(tmp_path: Path, quick: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    before = stored()

    def train(*_: Any, **__: Any) -> Any:
        raise FloatingPointError("the loss is nan")

    monkeypatch.setattr(module, "train", train)
    with pytest.raises(FloatingPointError):
        module.run(plan("dense", quick, train_seed=46), tmp_path, Reporter())
    assert stored() == before


@pytest.mark.parametrize("library", ["torch", "torchvision", "open_clip_torch", "deepspeed", "numpy"])
def test_another_version_of_one_library_is_another_training(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    real, cpu = metadata.version, torch.device("cpu")
    before = finished.key_of("one", cpu)
    assert finished.key_of("one", cpu) == before
    monkeypatch.setattr(metadata, "version", lambda name: "another" if name == library else real(name))
    assert finished.key_of("one", cpu) != before
