"""`upcycle-bench tune`: candidates on the tuning sets, a choice by the rule, one tuned row that is charged for it."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.conftest import QUICK
from tests.records import make_record, tuned_part
from tests.test_run import plan as make_plan
from upcycle_bench import cli, record, run_apart
from upcycle_bench import tune as tuning
from upcycle_bench.planning.identity import run_facts
from upcycle_bench.planning.matrix import Cell
from upcycle_bench.planning.plan import run_id
from upcycle_bench.planning.registry import load_registry
from upcycle_bench.protocol import Tuning, load_protocol
from upcycle_bench.record import Record, TunedPart
from upcycle_bench.reporting.sent import Here
from upcycle_bench.reporting.validate import validate
from upcycle_bench.run_queue import Outcome
from upcycle_bench.tune import NothingChosen, choose

FLAGS = [part for override in QUICK for part in ("--set", override)]


def call(*arguments: str) -> int:
    """`upcycle-bench` in this process: its exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["upcycle-bench", *arguments])
        with pytest.raises(SystemExit) as leave:
            cli.main()
    return int(leave.value.code or 0)


def tune(results: Path, *arguments: str) -> int:
    return call("tune", "-s", "drop-upcycling", "-p", "smoke", *FLAGS, "--results", str(results), *arguments)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two candidates by two tuning seeds, and the tuned row with seed 0."""
    folder = tmp_path_factory.mktemp("tuned")
    assert tune(folder, "--try", "ratio=0.75") == 0
    return folder


@pytest.fixture(scope="module")
def row(results: Path) -> Record:
    (path,) = (results / "smoke").glob("*.json")
    return record.read(path)


def test_the_row_says_what_was_tried_and_what_it_cost(results: Path, row: Record) -> None:
    tuned = row.strategy.tuned
    assert tuned is not None and row.strategy.label == "drop-upcycling[tuned]"
    assert [candidate.label for candidate in tuned.candidates] == ["drop-upcycling", "drop-upcycling[ratio=0.75]"]
    assert (tuned.protocol, tuned.headline, tuned.seeds) == ("smoke-dev", "in-distribution", (1000, 1001))
    means = [candidate.mean for candidate in tuned.candidates]
    assert row.strategy.config == tuned.candidates[means.index(min(means))].config  # a log rank: lower is better
    made = {each.run_id: each for each in map(record.read, (results / "smoke-dev").glob("*.json"))}
    assert len(made) == 4
    for candidate in tuned.candidates:
        for run in candidate.runs:
            theirs = made[run.run_id]
            assert (theirs.strategy.label, theirs.strategy.config) == (candidate.label, candidate.config)
            assert theirs.headlines["in-distribution"].value == run.value and theirs.seeds.train == run.seed
    costs = [each.cost.phases for each in made.values() if each.cost]
    charged = [phase for phases in costs for name, phase in phases.items() if name != "evaluate"]
    assert tuned.flops == sum(phase.flops or 0 for phase in charged) > 0
    assert row.cost is not None and row.charged_flops == (row.cost.charged_flops or 0) + tuned.flops
    assert tuned.seconds == pytest.approx(sum(phase.seconds for phase in charged)) and tuned.seconds > 0


def test_its_records_are_sound(results: Path) -> None:
    found = validate([results], Here(load_registry()))
    assert found.sound, [finding for finding in found.findings if finding.wrong]
    assert not any(finding.check == "tuned" for finding in found.findings)  # all tuning runs are here


def test_a_second_call_runs_nothing_and_the_training_is_not_made_twice(
    results: Path, row: Record, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tune(results, "--try", "ratio=0.75", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert [run["ran"] for run in said["runs"]] == [False]
    assert row.strategy.tuned is not None
    assert (said["tuned"]["winner"], said["tuned"]["flops"]) == (
        row.strategy.tuned.winner.label,
        row.strategy.tuned.flops,
    )
    ratio = f"ratio={row.strategy.config['ratio']}"
    options = ["-p", "smoke", *FLAGS, "-o", ratio, "--results", str(tmp_path), "--json"]
    assert call("run", "-s", "drop-upcycling", *options) == 0
    shown = capsys.readouterr()
    assert "weights reused" in shown.err
    assert json.loads(shown.out)["hashes"]["weights"] == row.hashes.weights


def test_the_defaults_alone_can_be_tuned_and_the_row_says_so(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another set of candidates is another run of the row, though the tuning runs are those of before."""
    assert tune(results, "--seed", "3", "--seeds", "2") == 0
    shown = capsys.readouterr()
    assert "chosen: drop-upcycling; the tuning cost" in shown.out
    assert shown.err.count("start training") == 2
    (path,) = (results / "smoke").glob("*-i3-t3-*.json")
    assert record.read(path).strategy.mark.endswith("its defaults, the best of 1 tried")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--try", "rato=0.7"], "error: unknown option of drop-upcycling 'rato'"),
        (["--try", "ratio"], "error: --try 'ratio': write it as KEY=VALUE, for example --try tau=0.8"),
        (["--try", "ratio=0.1,ratio=0.2"], "error: --try ratio=0.1,ratio=0.2: an option stands twice"),
        (["--seed", "1000"], "error: seed 1000 is one of the tuning (1000, 1001)"),
        (["--init-seed", "1001"], "error: seed 1001 is one of the tuning"),
        ([f"--try=ratio=0.{number}" for number in (1, 2, 3, 4)], "error: 4 times --try, and the defaults, are 5"),
    ],
)
def test_bad_input_is_one_line_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert tune(tmp_path, *arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith(message) and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_dry_run_counts_the_candidates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune(tmp_path, "--try", "ratio=0.75", "--dry-run", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["runs"], facts["to_do"]) == (4, 4) and facts["then"] == "1 of the chosen one under smoke"
    assert not list(tmp_path.iterdir())


# ---- the choice ----------------------------------------------------------------------------------------------------


def outcomes(values: dict[str, tuple[float, float]], **changes: Any) -> list[Outcome]:
    """Seed by seed, as a matrix comes back; a run of `make_record` is charged 21,000 FLOPs and 11 s."""
    return [
        Outcome(
            cell=cast(Cell, SimpleNamespace(strategy=label, seed=str(seed))),
            made=make_record(label, init=seed, train=seed, value=values[label][place], **changes),
        )
        for place, seed in enumerate((1000, 1001))
        for label in values
    ]


def rule() -> Tuning:
    found = load_protocol(load_registry().protocols["smoke"].target).tuning
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("values", "winner"),
    [
        # higher is better: means 0.50, 0.55
        ({"new": (0.7, 0.3), "new[a=1]": (0.5, 0.6)}, "new[a=1]"),
        ({"new": (0.7, 0.3), "new[a=1]": (0.5, 0.4)}, "new"),
        ({"new": (0.5, 0.5), "new[a=1]": (0.5, 0.5)}, "new"),
    ],
)
def test_the_best_mean_wins_and_the_defaults_win_a_tie(values: dict[str, tuple[float, float]], winner: str) -> None:
    tuned = choose(rule(), outcomes(values))
    assert tuned.winner.label == winner
    assert (tuned.flops, tuned.seconds) == (4 * 21_000, 4 * 11.0)
    lower = TunedPart.model_validate(tuned.model_dump() | {"higher_is_better": False})
    means = {candidate.label: candidate.mean for candidate in tuned.candidates}
    assert lower.winner.label == min(means, key=lambda label: means[label])


def test_a_candidate_that_fails_ends_the_tuning_with_one_line() -> None:
    made = outcomes({"new": (0.5, 0.5), "new[a=1]": (0.6, 0.6)})
    made[3] = replace(made[3], made=None, reason="DivergedError: the loss is nan")
    with pytest.raises(NothingChosen, match=r"^nothing is chosen, since new\[a=1\], seed 1001 failed: DivergedError"):
        choose(rule(), made)
    assert NothingChosen.status == 1  # a run failed, and no input was bad


def test_cost_that_was_not_counted_is_not_called_nothing() -> None:
    phases = {"train": {"seconds": 10.0, "flops": None, "peak_memory_bytes": 1}}
    cost = make_record().model_dump()["cost"] | {"phases": phases}
    assert choose(rule(), outcomes({"new": (0.5, 0.5)}, cost=cost)).flops is None


def test_processes_of_their_own_run_candidates_by_run_and_the_row_by_tune(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(run_apart.subprocess, "Popen", lambda command, **_: started.append(command))
    candidate = make_plan("drop-upcycling", QUICK, options={"ratio": "0.75"}, init_seed=1000, train_seed=1000)
    part = TunedPart.model_validate(tuned_part(("drop-upcycling", [0.5]), ("drop-upcycling[ratio=0.75]", [0.6])))
    tuned = replace(candidate, tuned=part, init_seed=0, train_seed=0)
    for plan, shared in ((candidate, ["--protocol", "smoke-dev"]), (tuned, ["--try", "ratio=0.75"])):
        run_apart.start(Cell(plan=plan), 0, tmp_path, shared, {})
    run, tune = (" ".join(command[3:]) for command in started)
    assert run == (
        "run --strategy drop-upcycling -o ratio=0.75 --init-seed 1000 --train-seed 1000 --protocol smoke-dev"
    )
    assert tune == "tune --strategy drop-upcycling --init-seed 0 --train-seed 0 --try ratio=0.75"


def test_overrides_of_the_rule_are_not_for_the_candidates_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tuning protocol has no rule; and what `run` is told there, it accepts."""
    given: list[list[str]] = []

    def run_all(cells: list[Cell], *_: Any, shared: list[str], **__: Any) -> list[Outcome]:
        given.append(shared)
        made = [
            make_record(cell.strategy, init=cell.plan.init_seed, train=cell.plan.train_seed, value=0.5)
            for cell in cells
        ]
        return [Outcome(cell=cell, path=tmp_path / "r.json", made=each) for cell, each in zip(cells, made, strict=True)]

    monkeypatch.setattr(tuning, "run_all", run_all)
    rule = ["--set", "tuning.candidates=2"]
    assert tune(tmp_path, "--try", "ratio=0.75", *rule, "--seeds", "2", "--jobs", "2", "--json") == 0
    usual = [part for override in sorted(QUICK) for part in ("--set", override)]
    results = ["--results", str(tmp_path)]
    assert given == [
        ["--protocol", "smoke-dev", *usual, *results],
        ["--protocol", "smoke", *usual, *rule, "--try", "ratio=0.75", *results],
    ]
    assert call("run", "-s", "drop-upcycling", *given[0], "--dry-run", "--json") == 0


def test_a_tuned_plan_is_closed_and_another_run_than_that_of_its_options() -> None:
    """Its division is that of the protocol, here open by overrides alone; another choice is another run."""
    options = make_plan("drop-upcycling", [], options={"ratio": "0.75"})
    parts = [
        TunedPart.model_validate(tuned_part(("drop-upcycling", [0.5]), ("drop-upcycling[ratio=0.75]", [value])))
        for value in (0.6, 0.7)
    ]
    plans = [replace(options, tuned=part) for part in parts]
    assert (options.division, options.row) == ("open", "drop-upcycling[ratio=0.75]")
    assert {(plan.division, plan.row) for plan in plans} == {("closed", "drop-upcycling[tuned]")}
    assert len({run_id(plan, "0" * 64) for plan in (options, *plans)}) == 3
    assert run_facts(options) == run_facts(plans[0])  # so an interrupted training of one is that of the other
