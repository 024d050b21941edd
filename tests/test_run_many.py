"""Many runs: cells without a record are run, and failures do not stop them."""

import contextlib
import fcntl
import json
import os
import pty
import re
import struct
import sys
import termios
from pathlib import Path
from typing import Any

import pytest

from tests.matrix_command import Command, outcomes, the_command  # noqa: F401  (a fixture, `command`)
from tests.test_interrupted import Stopping
from tests.test_run import Failing
from tests.test_run import plan as make_plan
from upcycle_bench import record, run_many, run_queue
from upcycle_bench.model.ffn import LayerInit
from upcycle_bench.planning import at_once
from upcycle_bench.planning.matrix import Cell, preview
from upcycle_bench.run import run
from upcycle_bench.strategy import random_router
from upcycle_bench.training.stopping import Stopped, stoppable
from upcycle_bench.util.cache import cache_root
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.progress import Reporter


def test_a_failure_stops_no_other_run_and_the_next_call_runs_what_is_missing(
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
        made = record.read(Path(first["dense-frozen", seed]["record"])).headlines
        assert first["dense-frozen", seed]["headlines"] == {"in-distribution": made["in-distribution"].value}
        failed = first["failing", seed]
        assert (failed["status"], failed["headlines"]) == ("failed", None)
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
    assert len(record.record_paths(tmp_path)) == 2 + 2 + 2  # done, failed, done at the second call


def test_once_leaves_a_single_run_that_is_done_alone(tmp_path: Path, command: Command) -> None:
    """As a job does that a cluster starts again. Without it, the run is scored again."""
    arguments = ["-s", "dense-frozen", "--seed", "52", "--results", str(tmp_path)]
    for flags, records in ((["--once"], 1), (["--once"], 1), ([], 2)):
        status, out, _ = command(*arguments, *flags, "--json")
        assert status == 0 and len(list(tmp_path.rglob("*.json"))) == records
        assert not flags or [row["status"] for row in json.loads(out)["runs"]] == ["ok"]
    status, _, err = command(*arguments, "--once", "--fresh")
    assert status == 2 and err.startswith("error: --once skips what was done before, and --fresh does it again")
    assert command("-s", "refusing", "--once", "--results", str(tmp_path))[0] == 2  # as without --once


def test_a_run_that_goes_on_elsewhere_keeps_its_dense_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run, a stop, another environment, the same command: one dense model and one record, which the third call finds.

    Fast paths that are off stand for another version, whose dense model would have another recipe.
    """
    settings = ["dense.seed=21", "dense.schedule.steps=12", "dense.schedule.batch_size=32"]
    settings += ["train.schedule.batch_size=32", "train.schedule.steps=4"]
    before = set((cache_root() / "dense").glob("*.safetensors"))

    def call(reporter: Reporter) -> run_many.Outcome:
        with stoppable():
            cells = [Cell(plan=make_plan("dense", settings))]
            (made,) = run_many.run_all(cells, tmp_path, reporter, jobs=1, fresh=False, shared=[])
        return made

    with pytest.raises(Stopped):
        call(Stopping("training", 2))
    monkeypatch.setenv("UPCYCLE_BENCH_PLAIN", "1")
    second = call(Reporter())
    assert second.reason is None and second.path is not None and second.ran
    third = call(Reporter())
    assert (third.path, third.ran) == (second.path, False)
    assert len(set((cache_root() / "dense").glob("*.safetensors")) - before) == 1
    assert preview([Cell(plan=make_plan("dense", settings))], tmp_path, fresh=False) == [second.path]


def test_what_another_process_has_done_meanwhile_is_not_done_again(
    tmp_path: Path, quick: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have looked at the records before one of them had the lock."""
    cell = Cell(plan=make_plan("dense-frozen", quick, init_seed=58, train_seed=58))
    path = run(cell.plan, tmp_path, Reporter())
    looks = iter([[None], [None], [path]])
    for module in (run_many, run_queue):
        monkeypatch.setattr(module, "finished_before", lambda *_: next(looks))
    (made,) = run_many.run_all([cell], tmp_path, Reporter(), jobs=1, fresh=False, shared=[])
    assert (made.path, made.ran) == (path, False)
    assert list(tmp_path.rglob("*.json")) == [path]


def test_with_fresh_what_another_has_made_since_the_start_counts(tmp_path: Path, quick: list[str]) -> None:
    """What stood there before does not: --fresh in two terminals shares the work as without it."""
    cell = Cell(plan=make_plan("dense-frozen", quick, init_seed=59, train_seed=59))
    how: dict[str, Any] = {"jobs": 1, "fresh": True, "shared": []}
    old = run(cell.plan, tmp_path, Reporter())
    (again,) = run_many.run_all([cell], tmp_path, Reporter(), **how)
    assert again.ran and again.path != old
    theirs: list[Path | None] = []

    def other(*_: object) -> None:
        theirs.append(run(cell.plan, tmp_path, Reporter(), fresh=True))

    (shared,) = run_many.run_all([cell], tmp_path, Reporter(), show=other, **how)
    assert ([shared.path], shared.ran) == (theirs, False)
    assert len(list(tmp_path.rglob("*.json"))) == 3


@pytest.mark.parametrize("error", [UserError("the cache is gone."), OSError(116, "Stale file handle")])
def test_a_table_that_cannot_see_others_fails_no_run(
    tmp_path: Path, quick: list[str], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Here in the training's own loop."""
    looks, said = list[int](), list[str]()

    def look(self: run_queue.Queue) -> None:
        looks.append(1)
        raise error

    class Saying(Reporter):
        def say(self, line: str) -> None:
            said.append(line)

    monkeypatch.setattr(run_queue.Queue, "look", look)
    cell = Cell(plan=make_plan("dense", quick, init_seed=60, train_seed=60))
    (made,) = run_many.run_all([cell], tmp_path, Saying(), jobs=1, fresh=True, shared=[])
    assert made.reason is None and len(looks) > 1
    assert said.count(f"warning: what other processes run cannot be seen: {error}") == 1


def test_the_ranks_compare_what_they_see_before_the_dense_model(
    tmp_path: Path, quick: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(world: Any) -> None:
        raise UserError("another cache")

    monkeypatch.setattr(run_many, "require_same_view", refuse)
    monkeypatch.setattr(run_many, "load_dense", lambda *_: pytest.fail("it trains"))
    with pytest.raises(UserError, match="another cache"):
        run_many.run_all([Cell(plan=make_plan("dense", quick))], tmp_path, Reporter(), jobs=1, fresh=True, shared=[])


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


def test_jobs_is_a_number_or_auto(tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["-s", "dense,dense-frozen", "--seed", "59", "--results", str(tmp_path)]
    for wrong in ("0", "-1", "two", "1.5", "²", ""):
        status, out, err = command(*arguments, f"--jobs={wrong}")
        assert (status, out) == (2, "") and err == f"error: --jobs {wrong}: write a number from 1 on, or auto.\n"
    monkeypatch.setattr(at_once, "usable_cores", lambda: 3.0)
    monkeypatch.setattr(at_once, "free_memory", lambda: 14 * 10**9)
    monkeypatch.setattr(at_once, "visible_gpus", lambda: [])
    line = "--jobs auto: 3 at once (3 cores / 1 thread each; 14 GB free / 1.6 GB each)\n"
    status, out, err = command(*arguments, "--jobs", "auto", "--dry-run", "--json")
    assert (status, json.loads(out)["jobs"], err) == (0, 3, line)
    seen: list[int] = []

    def run_all(*_: Any, jobs: int, **__: Any) -> None:
        seen.append(jobs)
        raise UserError("enough")

    monkeypatch.setattr(run_many, "run_all", run_all)
    assert command(*arguments, "--jobs", "auto")[2].endswith(f"{line}error: enough\n")
    assert seen == [3]
    monkeypatch.setenv("RANK", "0")
    assert command(*arguments, "--jobs", "auto")[2].startswith("error: --jobs starts processes of its own")


def test_on_a_terminal_there_is_one_table(tmp_path: Path, quick_flags: list[str]) -> None:
    """Through a real one, of 24 lines, in which the cursor goes up again and again."""
    arguments = ["-s", "dense-frozen", "--seed", "59", "--seeds", "2", "--jobs", "2", "--results", str(tmp_path)]
    pid, terminal = pty.fork()
    if pid == 0:
        code = "from upcycle_bench.cli import main; main()"
        os.execv(sys.executable, [sys.executable, "-c", code, "run", "-p", "smoke", *quick_flags, *arguments])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    out = b""
    with contextlib.suppress(OSError):  # Linux has no end of a terminal
        while part := os.read(terminal, 1 << 16):
            out += part
    text = out.decode()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, text
    assert "\x1b[1A" in text and "2 running" in re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert "certificate" in text or "evaluating" in text
    assert "done evaluating" not in text and "20" + "26-" not in text.partition("in-distribution")[0]
    assert len(record.record_paths(tmp_path)) == 2
