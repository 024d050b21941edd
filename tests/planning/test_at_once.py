"""How many runs `--jobs auto` starts at once: the least of what cores, memory and GPUs allow, and never none."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.test_run import plan
from upcycle_bench.planning import at_once
from upcycle_bench.planning.at_once import BASE, choose
from upcycle_bench.planning.estimate import dense_activations
from upcycle_bench.planning.matrix import Cell
from upcycle_bench.planning.registry import load_registry
from upcycle_bench.protocol import load_protocol
from upcycle_bench.strategy import configure

GB = 10**9


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A machine of 8 cores, 64 GB and no GPU, to be changed."""
    has: dict[str, Any] = {"cores": 8.0, "memory": 64 * GB, "gpus": []}
    monkeypatch.setattr(at_once, "usable_cores", lambda: has["cores"])
    monkeypatch.setattr(at_once, "free_memory", lambda: has["memory"])
    monkeypatch.setattr(at_once, "visible_gpus", lambda: has["gpus"])
    return has


@pytest.fixture
def cells(quick: list[str]) -> list[Cell]:
    return [Cell(plan=plan(name, quick)) for name in ("dense", "sparse-upcycling")]


def test_the_scarcest_decides(tmp_path: Path, machine: dict[str, Any], cells: list[Cell]) -> None:
    assert choose(cells, tmp_path) == (8, "8 cores / 1 thread each; 64 GB free / 1.6 GB each")
    machine["memory"] = 5 * GB
    assert choose(cells, tmp_path) == (3, "8 cores / 1 thread each; 5 GB free / 1.6 GB each")
    machine["cores"] = 2.5
    assert choose(cells, tmp_path)[0] == 2
    machine["cores"] = 0.5
    assert choose(cells, tmp_path) == (1, "0.5 cores / 1 thread each; 5 GB free / 1.6 GB each")
    machine["memory"] = 0
    assert choose(cells, tmp_path)[0] == 1


def test_a_gpu_is_one_jobs_alone(tmp_path: Path, machine: dict[str, Any], cells: list[Cell]) -> None:
    machine["gpus"] = ["0", "1", "2"]
    assert choose(cells, tmp_path) == (3, "8 cores / 1 thread each; 64 GB free / 1.6 GB each; 3 GPUs / 1 each")
    assert choose(cells, tmp_path, processes=2, gpus_each=2) == (
        1,
        "8 cores / 1 thread each; 64 GB free / 3.1 GB each; 3 GPUs / 2 each",
    )
    assert choose(cells, tmp_path, gpus_each=0)[0] == 8  # `launch --gpus 0`


def test_what_records_have_measured_counts_for_their_strategy(
    tmp_path: Path, machine: dict[str, Any], cells: list[Cell], monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = json.loads(next(Path("results/smoke").glob("sparse-upcycling-i0-t0-*.json")).read_text())
    for number, peak in enumerate((7 * GB, 9 * GB)):
        shipped["cost"]["phases"]["train"]["peak_memory_bytes"] = peak
        (tmp_path / f"{number}.json").write_text(json.dumps(shipped))
    assert choose(cells, tmp_path) == (7, "8 cores / 1 thread each; 64 GB free / 9.0 GB each")
    assert choose(cells[:1], tmp_path)[1].endswith("/ 1.6 GB each")  # another strategy's
    machine["gpus"] = ["0"]  # the records' peaks would be the GPU's memory
    assert "/ 1.6 GB each" in choose(cells, tmp_path)[1]


@pytest.mark.parametrize(("protocol", "measured"), [("smoke", 1.6), ("lab", 5.35)])
def test_the_estimate_is_near_what_was_measured(protocol: str, measured: float) -> None:
    """The most that the shipped records of sparse upcycling and its kin have, in GB."""
    registry = load_registry()
    loaded = load_protocol(registry.get("protocol", protocol).target)
    strategy = configure(registry.get("strategy", "sparse-upcycling").target, {})
    found = at_once._estimated(loaded, strategy, activations=True) / GB
    assert 0.8 * measured < found < 1.3 * measured
    assert BASE < at_once._estimated(loaded, strategy, activations=False) < BASE + GB


def test_activations_grow_with_the_model() -> None:
    small, large = dense_activations("smoke-vit", 0.0), dense_activations("ViT-B-32", 0.0)
    assert 10**5 < small < 10**6 < 10**7 < large
    assert dense_activations("ViT-B-32", 0.5) < large
