"""The matrix: which cells there are, which are done, and that the rest runs past failures, here and in processes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic.dataclasses import dataclass

from tests.helpers import heed_interrupts
from tests.test_distributed import launch
from tests.test_record import make_record
from tests.test_run import Failing
from tests.test_run import plan as make_plan
from upcycle_bench import cli, matrix, record, registry
from upcycle_bench.cache import cache_root
from upcycle_bench.errors import UserError
from upcycle_bench.hookspecs import hookimpl
from upcycle_bench.matrix import Cell, enumerate_cells, finished, read_records, seed_pairs, strategy_names
from upcycle_bench.plan import Plan
from upcycle_bench.progress import Reporter
from upcycle_bench.registry import Entry, Registry
from upcycle_bench.run import run
from upcycle_bench.strategy import LayerInit, Strategy, StrategyInfo, random_router
from upcycle_bench.threads import SHARE

# ---- enumeration -------------------------------------------------------------------------------------------------


def entry(name: str, status: str) -> Entry:
    return Entry(name, SimpleNamespace(info=SimpleNamespace(status=status)), "package", "1")


def planned(label: str) -> Plan:
    """As much of a plan as the matrix looks at; it fits `make_record`'s protocol."""
    return Plan(
        protocol=SimpleNamespace(name="smoke", division="closed"),  # type: ignore[arg-type]
        entry=entry(label, "control"),
        strategy=None,  # type: ignore[arg-type]
        moe=None,  # type: ignore[arg-type]
        label=label,
        suites={},
        init_seed=0,
        train_seed=0,
        world=None,
        checkpoint=None,
        dense_identity="dense",
        training_fingerprint="train-fingerprint",
        suite_fingerprints={"zero-shot": "suite-fingerprint"},
        skipped={},
        missing=(),
    )


REGISTRY = Registry(
    {
        name: entry(name, status)
        for name, status in (
            ("aimed", "published"),
            ("dense", "control"),
            ("moved", "unpublished"),
            ("scratch", "control"),
        )
    }
)


@pytest.mark.parametrize(
    ("text", "names"),
    [("all", ["dense", "scratch", "aimed", "moved"]), ("moved", ["moved"]), ("moved, dense", ["moved", "dense"])],
)
def test_strategy_names(text: str, names: list[str]) -> None:
    assert strategy_names(REGISTRY, text) == names


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dense,mved", "did you mean 'moved'"),
        ("dense,", "unknown"),
        ("dense,dense", "twice"),
        ("all,dense", "stands alone"),
    ],
)
def test_bad_strategy_names(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        strategy_names(REGISTRY, text)


def test_seed_pairs() -> None:
    assert seed_pairs(0, 1) == [(0, 0)]
    assert seed_pairs(3, 2) == [(3, 3), (4, 4)]
    assert seed_pairs(3, 2, init_seed=0) == [(0, 3), (0, 4)]
    assert seed_pairs(3, 2, train_seed=0) == [(3, 0), (4, 0)]
    assert seed_pairs(3, 1, init_seed=1, train_seed=2) == [(1, 2)]
    with pytest.raises(UserError, match="--seeds 2 leaves nothing to vary"):
        seed_pairs(3, 2, init_seed=1, train_seed=2)


def test_cells_go_seed_by_seed() -> None:
    cells = enumerate_cells([planned("dense"), planned("moved")], [(0, 0), (0, 1)])
    assert [(cell.strategy, cell.seed) for cell in cells] == [
        ("dense", "0"),
        ("moved", "0"),
        ("dense", "0/1"),
        ("moved", "0/1"),
    ]


# ---- what is done ------------------------------------------------------------------------------------------------

CELL = Cell(plan=planned("dense"))


def test_a_cell_is_done_by_the_newest_record_of_its_content() -> None:
    older, newer = make_record(run_id="the-same"), make_record(run_id="the-same", created="2026-01-03T00:00:00Z")
    assert finished(CELL, "the-same", {}) is None
    assert finished(CELL, "the-same", {Path("z.json"): older, Path("a.json"): newer}) == Path("a.json")


@pytest.mark.parametrize(
    "changes",
    [
        {"run_id": "another-one"},
        {"status": "failed", "reason": "out of memory"},
        {"protocol": {"suite_fingerprints": {"zero-shot": "another"}}},
        {"protocol": {"suite_fingerprints": {"zero-shot": "suite-fingerprint", "few-shot": "another"}}},
        {"protocol": {"name": "lab"}},
        {"protocol": {"division": "open"}},
        {"seeds": {"init": 1}},
        {"seeds": {"train": 1}},
    ],
    ids=str,
)
def test_other_content_leaves_it_to_do(changes: dict[str, Any]) -> None:
    made = make_record(**({"run_id": "the-same"} | changes))
    assert finished(CELL, "the-same", {Path("r.json"): made}) is None


def test_files_that_are_no_records_do_not_count(tmp_path: Path) -> None:
    assert read_records(tmp_path / "nowhere") == {}
    (tmp_path / "notes.json").write_text("{}")
    path = record.write(make_record(), None, tmp_path)
    assert list(read_records(tmp_path)) == [path]
    assert read_records(tmp_path, {path}) == {}


# ---- through the command line ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Refusing(Strategy):
    """A strategy that this machine cannot run."""

    info = StrategyInfo(name="refusing", summary="s", paper="p", status="control")

    def check(self) -> None:
        raise UserError("refusing needs a quantum computer.")


class Plugin:
    """Brings `failing` and `refusing`."""

    @hookimpl
    def register_strategies(self) -> list[type[Strategy]]:
        return [Failing, Refusing]


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], quick_flags: list[str]) -> Command:
    """`upcycle-bench run` in this process, on quick `smoke`: exit status, stdout, stderr."""
    real = registry.load_registry()
    for strategy in Plugin().register_strategies():
        real.strategies[strategy.info.name] = Entry(strategy.info.name, strategy, "test", "")
    monkeypatch.setattr(registry, "load_registry", lambda: real)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["upcycle-bench", "run", "-p", "smoke", *quick_flags, *arguments])
        with pytest.raises(SystemExit) as leave:
            cli.main()
        return int(leave.value.code or 0), *capsys.readouterr()

    return call


def outcomes(out: str) -> dict[tuple[str, int], dict[str, Any]]:
    return {(row["strategy"], row["seeds"]["train"]): row for row in json.loads(out)["runs"]}


def test_others_go_on_past_a_failure_and_the_next_call_runs_what_is_missing(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["-s", "dense-frozen,failing,refusing", "--seed", "50", "--seeds", "2", "--results", str(tmp_path)]
    status, out, err = command(*arguments, "--json")
    assert status == 1
    assert err.count("run 1 of 6: dense-frozen, seed 50") == err.count("run 6 of 6: refusing, seed 51") == 1
    first = outcomes(out)
    assert len(first) == 6
    for seed in (50, 51):
        assert first["dense-frozen", seed]["status"] == "ok"
        assert (
            record.read(Path(first["dense-frozen", seed]["record"])).primary == first["dense-frozen", seed]["primary"]
        )
        failed = first["failing", seed]
        assert (failed["status"], failed["primary"]) == ("failed", None)
        assert failed["reason"] == "ArithmeticError: singular matrix in vision.1"
        assert record.read(Path(failed["record"])).reason == failed["reason"]
        assert first["refusing", seed]["record"] is None
        assert first["refusing", seed]["reason"] == "refusing needs a quantum computer."
    assert "the run failed: refusing needs a quantum computer." in err

    def init_layer(self: Any, ffn: Any, layer: Any, calibration: Any, rng: Any) -> LayerInit:
        return LayerInit([ffn.expert() for _ in range(8)], random_router(ffn, layer, rng))

    monkeypatch.setattr(Failing, "init_layer", init_layer)
    arguments[1] = "dense-frozen,failing"
    status, out, err = command(*arguments)
    assert status == 0
    assert "run 2 of 2: failing, seed 51" in err
    assert "run 3" not in err
    assert "failed" not in out
    shown = [line.split()[:2] for line in out.splitlines()]
    rows = [["dense-frozen", "50"], ["dense-frozen", "51"], ["failing", "50"], ["failing", "51"]]
    assert [row for row in shown if row in rows] == rows
    status, out, err = command(*arguments, "--json")
    assert status == 0
    assert "run 1" not in err
    assert not any(row["ran"] for row in outcomes(out).values())
    assert len(record.find(tmp_path)) == 2 + 2 + 2  # done, failed, made up for


def test_a_dry_run_shows_the_matrix_and_writes_nothing(tmp_path: Path, command: Command) -> None:
    results = tmp_path / "results"
    command("-s", "dense-frozen", "--seed", "52", "--results", str(results))
    before = sorted(tmp_path.rglob("*"))
    arguments = ["-s", "dense-frozen,dense", "--seed", "51", "--seeds", "2", "--results", str(results), "--dry-run"]
    status, out, _ = command(*arguments, "--json")
    facts = json.loads(out)
    assert status == 0
    assert (facts["runs"], facts["to_do"]) == (4, 3)
    assert [(row["strategy"], row["seeds"]["init"], row["done"]) for row in facts["matrix"]] == [
        ("dense-frozen", 51, False),
        ("dense", 51, False),
        ("dense-frozen", 52, True),
        ("dense", 52, False),
    ]
    _, out, _ = command("-s", "dense", "--dry-run", "--json")
    assert facts["flops_without_strategy_losses"] == 2 * json.loads(out)["training_flops_without_strategy_loss"]
    assert facts["estimated_training_seconds_on_one_such_device"] >= 0
    status, out, _ = command(*arguments)
    assert [line.split() for line in out.splitlines() if line.startswith("dense")] == [
        ["dense-frozen", "to", "do", "done"],
        ["dense", "to", "do", "to", "do"],
    ]
    _, out, _ = command(*arguments, "--fresh", "--json")
    assert json.loads(out)["to_do"] == 4
    assert sorted(tmp_path.rglob("*")) == before


def test_errors_before_anything_runs(tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    status, out, err = command("-s", "all", "--results", str(tmp_path / "file" / "results"))
    assert (status, out) == (2, "")
    assert "not a folder that can be written" in err
    monkeypatch.setenv("RANK", "0")
    status, out, err = command("-s", "dense,dense-frozen", "--jobs", "2")
    assert (status, out) == (2, "")
    assert err.startswith("error: --jobs starts processes of its own and does not go with torchrun")


def test_jobs_run_in_processes_of_their_own(
    tmp_path: Path, command: Command, quick: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same weights as in one process; a run that fails there, here for want of faiss, is a failed cell."""
    (tmp_path / "faiss.py").write_text("raise ImportError('no faiss')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    shadow = tmp_path / "clone" / "upcycle_bench"  # sources without plugins, as in a clone that was not installed from
    shadow.mkdir(parents=True)
    (shadow / "__init__.py").write_text("raise ImportError('the sources of the working folder')\n")
    monkeypatch.chdir(shadow.parent)
    results = tmp_path / "results"
    status, out, err = command(
        "-s", "dense,cluster-aware", "--seed", "53", "--jobs", "2", "--fresh", "--results", str(results), "--json"
    )
    made = outcomes(out)
    assert status == 1
    assert "dense seed 53: done training dense: 4 steps" in err
    assert "cluster-aware seed 53: error: " in err
    failed = made["cluster-aware", 53]
    assert (failed["status"], failed["record"]) == ("failed", None)
    assert "pip install 'upcycle-bench[cpu]'" in failed["reason"]
    assert not failed["reason"].startswith("error")
    path = run(make_plan("dense", quick, init_seed=53, train_seed=53), tmp_path / "here", Reporter(), fresh=True)
    assert path is not None
    theirs = record.read(Path(made["dense", 53]["record"]))
    assert theirs.hashes == record.read(path).hashes
    assert theirs.command[:6] == ["upcycle-bench", "run", "--strategy", "dense", "--init-seed", "53"]


@pytest.mark.parametrize(("own", "share"), [(5, "2"), (1, "1")])
def test_jobs_share_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: int, share: str) -> None:
    seen: dict[str, str] = {}

    def start(cell: Any, results: Path, shared: Any, environment: Mapping[str, str]) -> Any:
        seen.update(environment)
        raise KeyboardInterrupt

    monkeypatch.setattr(matrix, "own_cores", lambda: own)
    monkeypatch.setattr(matrix, "_start", start)
    todo: Any = ["a cell", "another", "a third"]
    with pytest.raises(KeyboardInterrupt):
        matrix.run_apart(todo, tmp_path, 2, [], {"HOME": "here", SHARE: "9"})
    assert seen == {"HOME": "here", SHARE: share}


def test_ctrl_c_stops_the_processes_and_leaves_nothing(tmp_path: Path, quick: list[str]) -> None:
    settings = [each for each in quick if not each.startswith("train.schedule.steps")]
    settings += ["train.schedule.steps=100000", "train.log_every=1"]
    flags = [part for setting in settings for part in ("--set", setting)]
    arguments = ["-m", "upcycle_bench", "run", "-s", "dense", "-p", "smoke", *flags, "--seeds", "3", "--jobs", "2"]
    process = subprocess.Popen(
        [sys.executable, *arguments, "--results", str(tmp_path / "results")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
    )
    try:
        deadline = time.monotonic() + 120
        going: list[Path] = []
        while len(going) < 2 and time.monotonic() < deadline:
            time.sleep(0.2)
            going = [path for path in (cache_root() / "runs").glob("*/metrics.jsonl") if path.stat().st_size]
        assert len(going) == 2, "two trainings did not start"
        children = [int(path.parent.name.rpartition("-")[2]) for path in going]  # the folders end in process ids
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "interrupted: the same command goes on with what is missing" in err
    assert out == ""
    assert not (tmp_path / "results").exists()
    assert list((cache_root() / "runs").iterdir()) == []
    for child in children:
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)


def test_two_ranks_run_a_matrix_and_reuse_weights(tmp_path: Path, quick_flags: list[str]) -> None:
    command = ["-m", "upcycle_bench", "run", "-p", "smoke", *quick_flags, "--set", "moe.ep_size=2", "--json"]
    one = json.loads(launch(2, *command, "-s", "sparse-upcycling", "--results", str(tmp_path / "one")))
    made = outcomes(launch(2, *command, "-s", "dense-frozen,sparse-upcycling", "--results", str(tmp_path / "two")))
    assert {row["status"] for row in made.values()} == {"ok"}
    again = record.read(Path(made["sparse-upcycling", 0]["record"]))
    assert "training" in again.environment
    assert [score.model_dump(mode="json") for score in again.scores] == one["scores"]
    assert again.diagnostics == one["diagnostics"]


def test_an_interruption_in_this_process_says_how_to_go_on(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(matrix, "run", interrupted)
    arguments = ["-s", "dense,dense-frozen", "--seed", "54", "--results", str(tmp_path)]
    status, out, err = command(*arguments)
    assert (status, out) == (130, "")
    assert "interrupted: the same command goes on with what is missing" in err
    status, _, err = command(*arguments, "--fresh")
    assert status == 130
    assert "interrupted: the same command without --fresh goes on" in err


def test_a_run_whose_process_is_killed_has_failed(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python imports `sitecustomize` as it starts; here that is SIGKILL, as where memory runs out."""
    (tmp_path / "sitecustomize.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    arguments = ["-s", "dense", "--seed", "56", "--seeds", "2", "--jobs", "2", "--results", str(tmp_path / "results")]
    status, out, _ = command(*arguments, "--json")
    assert status == 1
    made = outcomes(out)
    assert set(made) == {("dense", 56), ("dense", 57)}
    assert {(row["status"], row["record"]) for row in made.values()} == {("failed", None)}
    assert all(row["reason"] for row in made.values())
