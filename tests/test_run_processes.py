"""Many runs at once, each in a process of its own: records, GPUs, signals."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import heed_interrupts
from tests.matrix_command import Command, outcomes, the_command  # noqa: F401  (a fixture, `command`)
from tests.test_run import plan as make_plan
from upcycle_bench import record, run_many
from upcycle_bench.planning.matrix import Cell
from upcycle_bench.run import run
from upcycle_bench.util import gpu_locks
from upcycle_bench.util.cache import cache_root
from upcycle_bench.util.gpu_locks import GpuLocks
from upcycle_bench.util.progress import Reporter


def test_jobs_run_in_processes_of_their_own(
    tmp_path: Path, command: Command, quick: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have the weights of a run in this process. A run that fails, here for lack of faiss, is a failed cell."""
    (tmp_path / "faiss.py").write_text("raise ImportError('no faiss')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    shadow = tmp_path / "clone" / "upcycle_bench"  # sources without plugins, as in a clone that is not installed
    shadow.mkdir(parents=True)
    (shadow / "__init__.py").write_text("raise ImportError('the sources of the working folder')\n")
    monkeypatch.chdir(shadow.parent)
    results = tmp_path / "results"
    status, out, err = command(
        "-s", "dense,cluster-aware", "--init-seed", "53", "--train-seed", "54", "--jobs", "2", "--fresh",
        "--results", str(results), "--json",
    )  # fmt: skip
    made = outcomes(out)
    assert status == 1
    assert re.search(r"^20\S+Z dense seed 53/54: done training dense: seconds=\S+ steps=4 loss=", err, re.MULTILINE)
    assert "cluster-aware seed 53/54: error: " in err
    failed = made["cluster-aware", 54]
    assert (failed["status"], failed["record"]) == ("failed", None)
    assert "pip install 'upcycle-bench[cpu]'" in failed["reason"]
    assert not failed["reason"].startswith("error")
    assert (made["dense", 54]["status"], made["dense", 54]["reason"]) == ("ok", None)
    path = run(make_plan("dense", quick, init_seed=53, train_seed=54), tmp_path / "here", Reporter(), fresh=True)
    assert path is not None
    theirs = record.read(Path(made["dense", 54]["record"]))
    assert theirs.hashes == record.read(path).hashes
    seeds = ["--init-seed", "53", "--train-seed", "54"]
    assert theirs.command[:8] == ["upcycle-bench", "run", "--strategy", "dense", *seeds]


@pytest.mark.parametrize(
    ("jobs", "taken", "launched", "used"),
    [
        (1, [], False, "here on 0, here on 0"),
        (1, ["0"], False, "apart on 1, apart on 1"),
        (1, ["0", "1"], False, "apart on 0, apart on 0"),  # none is free: as without locks
        (1, ["0"], True, "here on 0, here on 0"),  # a rank has its GPU
        (3, ["0"], False, "apart on 1, apart on 0, apart on 0, apart on 1"),
    ],
)
def test_two_commands_on_one_machine_take_different_gpus(
    tmp_path: Path,
    quick: list[str],
    monkeypatch: pytest.MonkeyPatch,
    jobs: int,
    taken: list[str],
    launched: bool,
    used: str,
) -> None:
    monkeypatch.setattr(gpu_locks, "cache_root", lambda: tmp_path)
    if launched:
        monkeypatch.setenv("RANK", "0")
    gpu, runs, held = run_many.session.torch.device("cuda", 0), list[str](), list[bool]()
    kept, released = list[GpuLocks](), list[int]()

    class Kept(GpuLocks):
        def __init__(self, names: list[str]) -> None:
            super().__init__(names)
            kept.append(self)  # an object that is gone holds nothing

        def release(self, place: int) -> None:
            released.append(place)
            super().release(place)

    monkeypatch.setattr(run_many, "GpuLocks", Kept)
    monkeypatch.setattr(run_many, "visible_gpus", lambda: ["0", "1"])
    monkeypatch.setattr(run_many.session, "open_session", lambda threads: contextlib.nullcontext(gpu))
    monkeypatch.setattr(run_many, "load_dense", lambda *_: None)
    others = GpuLocks(["0", "1"])
    assert all(others.take_own(int(name)) for name in taken)

    class Over:
        returncode = 0
        output = contextlib.nullcontext()

        def poll(self) -> int:
            return 0

    def start(cell: Cell, place: int, *rest: Any) -> Any:
        runs.append(f"apart on {rest[-1]}")
        return run_many.run_apart.Child(cell, place, Over(), tempfile.TemporaryFile(), set())  # type: ignore[arg-type]

    def run_here(*_: Any, **__: Any) -> None:
        runs.append("here on 0")
        held.append(not GpuLocks(["0", "1"]).take_own(0))

    monkeypatch.setattr(run_many.run_apart, "start", start)
    monkeypatch.setattr(run_many, "run", run_here)
    todo = [Cell(plan=make_plan("dense", quick, init_seed=seed, train_seed=seed)) for seed in range(jobs + 1)]
    run_many.run_all(todo, tmp_path, Reporter(), jobs=jobs, fresh=True, shared=[])
    assert ", ".join(runs) == used and all(held)
    assert "here" in used or len(released) == len(runs)
    others.close()
    free = GpuLocks(["0", "1"])
    assert free.take_own(0) and free.take_own(1)  # nothing is held behind its end


def test_a_process_that_a_signal_ends_is_a_failed_run(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel kills so when memory runs out. The last line on stderr is not the reason then. Other runs go on."""
    dies = ["import os, signal, sys", "print('all is well', file=sys.stderr, flush=True)", "os.kill(os.getpid(), 9)"]
    (tmp_path / "faiss.py").write_text("\n".join(dies))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    results = tmp_path / "results"
    arguments = ["-s", "cluster-aware,dense-frozen", "--seed", "55", "--jobs", "2", "--results", str(results), "--json"]
    status, out, err = command(*arguments)
    made = outcomes(out)
    assert status == 1
    assert "cluster-aware seed 55: all is well" in err
    assert made["dense-frozen", 55]["status"] == "ok"
    failed = made["cluster-aware", 55]
    assert (failed["status"], failed["record"], failed["headlines"]) == ("failed", None, None)
    assert failed["reason"] == "killed by SIGKILL, perhaps for want of memory"
    assert json.loads(command(*arguments[:-1], "--dry-run", "--json")[1])["to_do"] == 1


def test_ctrl_c_stops_the_processes_with_a_checkpoint_each(tmp_path: Path, quick: list[str]) -> None:
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
        threads = Path(f"/proc/{process.pid}/task").glob("*/children")  # a pool's threads have started them
        children = [int(number) for path in threads for number in path.read_text().split()]
        assert len(children) == 2
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "interrupted: the same command goes on with what is missing" in err
    assert out == ""
    assert not (tmp_path / "results").exists()
    assert [len(list(path.parent.glob("checkpoints/step*"))) for path in going] == [1, 1]
    for path in going:
        shutil.rmtree(path.parent)
    for child in children:
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)


def test_an_interruption_in_this_process_says_how_to_go_on(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run_many, "run", interrupted)
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
    """Python imports `sitecustomize` as it starts; here that module kills the process."""
    (tmp_path / "sitecustomize.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    arguments = ["-s", "dense", "--seed", "56", "--seeds", "2", "--jobs", "2", "--results", str(tmp_path / "results")]
    status, out, _ = command(*arguments, "--json")
    assert status == 1
    made = outcomes(out)
    assert set(made) == {("dense", 56), ("dense", 57)}
    assert {(row["status"], row["record"]) for row in made.values()} == {("failed", None)}
    assert all(row["reason"] for row in made.values())
