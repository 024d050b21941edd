"""`launch`: a job array of Slurm, or processes here, of the runs that have no record; each runs once."""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.cli.slurm_stand_in import install
from upcycle_bench import cli
from upcycle_bench.planning import matrix
from upcycle_bench.planning.matrix import Cell

Launch = Callable[..., tuple[int, str, str]]
MATRIX = ["-s", "dense,sparse-upcycling", "--seeds", "2", "-p", "smoke"]


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder with stand-ins for Slurm and for `upcycle-bench`."""
    install(tmp_path / "bin")
    return tmp_path / "bin"


@pytest.fixture
def launch(
    programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Launch:
    """`upcycle-bench launch` in a folder with a space in its name: exit status, stdout, stderr."""
    (tmp_path / "my work").mkdir()
    monkeypatch.chdir(tmp_path / "my work")
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [str(programs / "upcycle-bench"), "launch", *arguments])
        with pytest.raises(SystemExit) as leave:
            cli.main()
        return int(leave.value.code or 0), *capsys.readouterr()

    return call


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Labels with a seed, `dense 0`, of cells that count as done by two processes."""
    done: list[str] = []

    def preview(cells: Sequence[Cell], results: Path, fresh: bool) -> list[Path | None]:
        known = done if os.environ.get("WORLD_SIZE") == "2" else []
        return [results if f"{cell.strategy} {cell.seed}" in known else None for cell in cells]

    monkeypatch.setattr(matrix, "preview", preview)
    return done


def starts(programs: Path) -> dict[str, int]:
    """How often each rank of each run was started."""
    return {path.name: path.read_text().count("start") for path in (programs / "trace").iterdir()}


def test_a_job_array_runs_each_run_on_all_ranks_and_goes_on_after_75(launch: Launch, programs: Path) -> None:
    options = ["--scheduler", "slurm", "--tasks-per-node", "2", "--submit"]
    status, out, err = launch(*MATRIX, *options, "--results", "my results", "--set", "train.checkpoint_every=10")
    assert status == 0 and "submitted as job 41; logs: launch/logs" in out and "to do" in err
    once, twice = (
        dict.fromkeys(("dense-0", "dense-1"), 1),
        dict.fromkeys(("sparse-upcycling-0", "sparse-upcycling-1"), 2),
    )
    expected = {f"{name}-rank{rank}": count for name, count in (once | twice).items() for rank in (0, 1)}
    assert starts(programs) == expected
    assert json.loads((programs / "statuses.json").read_text()) == dict.fromkeys("1234", 0)
    line = (programs / "trace" / "dense-1-rank1").read_text().split(" ", 5)
    assert line[:5] == ["start", "1", "2", "2", "127.0.0.1"]
    assert "'--results', 'my results', " in line[5] or line[5].rstrip().endswith("'--results', 'my results']")
    log = Path("launch/logs/2.log").read_text()
    assert "start 1: upcycle-bench run --once --strategy sparse-upcycling" in log and "ended with status 75" in log
    assert "start 2: " in log and log.rstrip().endswith("ended with status 0")


def test_what_the_records_show_is_left_out_and_numbers_stay(launch: Launch, records: list[str], programs: Path) -> None:
    """A job that waits finds its line, though others were finished: the lines are those of the whole plan."""
    options = ["--scheduler", "slurm", "--tasks-per-node", "2"]
    assert launch(*MATRIX, *options)[0] == 0
    lines, script = Path("launch/cells.txt").read_text(), Path("launch/job.sh").read_text()
    assert "#SBATCH --array=1-4\n" in script and len(lines.splitlines()) == 4
    records += ["dense 0", "dense 1"]
    status, out, _ = launch(*MATRIX, *options)
    assert (
        status == 0
        and "2 of 4 runs are to do; 2 were done before" in out
        and "submit them: sbatch launch/job.sh" in out
    )
    assert Path("launch/cells.txt").read_text() == lines
    assert "#SBATCH --array=2,4\n" in Path("launch/job.sh").read_text()
    script = Path("launch/job.sh").read_text()
    records += ["sparse-upcycling 0", "sparse-upcycling 1"]
    status, out, _ = launch(*MATRIX, *options, "--submit", "--json")
    facts = json.loads(out)
    assert status == 0 and facts["to_do"] == [] and facts["job"] is None and starts(programs) == {}
    assert Path("launch/job.sh").read_text() == script  # nothing to write


def test_a_run_that_fails_stays_failed(launch: Launch, programs: Path) -> None:
    assert launch("-s", "dense-wide", "-p", "smoke", "--scheduler", "slurm", "--submit")[0] == 0
    assert json.loads((programs / "statuses.json").read_text()) == {"1": 3}
    assert starts(programs) == {"dense-wide-0-rank-": 1}


def test_a_job_goes_on_up_to_the_limit(launch: Launch, programs: Path) -> None:
    options = ["--scheduler", "slurm", "--submit", "--requeue-limit", "0"]
    assert launch("-s", "sparse-upcycling", "-p", "smoke", *options)[0] == 0
    assert json.loads((programs / "statuses.json").read_text()) == {"1": 75}
    log = Path("launch/logs/1.log").read_text()
    assert log.splitlines()[-1] == f"to go on: sbatch --array=1 '{Path.cwd()}/launch/job.sh'"


def test_jobs_that_wait_are_not_submitted_again(launch: Launch, programs: Path) -> None:
    options = ["-s", "dense", "-p", "smoke", "--scheduler", "slurm", "--submit"]
    assert launch(*options)[0] == 0
    (programs / "waiting-41").touch()
    status, _, err = launch(*options)
    assert status == 2 and "job 41 of " in err and "is not over: wait for it, or end it with: scancel 41" in err
    assert starts(programs) == {"dense-0-rank-": 1}
    (programs / "waiting-41").unlink()
    (programs / "squeue").write_text(
        "#!/bin/sh\necho 'slurm_load_jobs error: Unable to contact controller' >&2; exit 1\n"
    )
    status, _, err = launch(*options)
    assert status == 2 and "squeue does not say whether job 41 is over: slurm_load_jobs error: Unable to" in err
    assert starts(programs) == {"dense-0-rank-": 1}


def test_a_job_that_someone_submitted_by_hand_is_known(launch: Launch, programs: Path) -> None:
    options = ["-s", "dense,sparse-upcycling", "-p", "smoke", "--scheduler", "slurm"]
    assert launch(*options)[0] == 0 and not Path("launch/submitted.txt").exists()
    subprocess.run([programs / "sbatch", "--parsable", "launch/job.sh"], check=True, stdout=subprocess.DEVNULL)
    assert Path("launch/submitted.txt").read_text().split() == ["41"]
    (programs / "waiting-41").touch()
    status, _, err = launch(*options, "--submit")
    assert status == 2 and "job 41 of " in err


def test_here_what_is_not_finished_is_no_failure(launch: Launch, programs: Path) -> None:
    here = ["-p", "smoke", "--scheduler", "local", "--requeue-limit", "0"]
    assert launch("-s", "dense,sparse-upcycling", *here)[0] == 75
    assert launch("-s", "dense-wide,sparse-upcycling", *here, "--seed", "1", "--output", "other")[0] == 1


def test_too_few_gpus_are_noticed_before_anything_runs(
    launch: Launch, programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,-1,7")
    here = ["-s", "dense", "-p", "smoke", "--scheduler", "local", "--gpus", "2"]
    status, _, err = launch(*here, "--jobs", "2")
    assert status == 2 and "--jobs 2 with --gpus 2 needs 4 GPUs; 3 are visible here" in err
    assert starts(programs) == {} and list(Path.cwd().iterdir()) == []
    assert launch(*here)[0] == 0


def test_here_the_same_plan_runs_in_processes(launch: Launch, programs: Path, records: list[str]) -> None:
    records += ["dense 1"]
    status, out, err = launch(*MATRIX, "--scheduler", "local", "--tasks-per-node", "2", "--json")
    rows = json.loads(out)["jobs"]
    assert status == 0 and [row["ended"] for row in rows] == ["done", "done", "done before", "done"]
    twice = {f"sparse-upcycling-{seed}-rank{rank}": 2 for seed in (0, 1) for rank in (0, 1)}
    assert starts(programs) == twice | {"dense-0-rank0": 1, "dense-0-rank1": 1}
    assert "job 2 ended with status 75" in err and Path(rows[1]["log"]).read_text().count("starts:") == 2
    assert launch("-s", "dense-wide,dense", "-p", "smoke", "--scheduler", "local", "--output", "other")[0] == 1
    assert starts(programs)["dense-0-rank-"] == 1


BAD = [
    (["-s", "dens"], "unknown strategy 'dens': did you mean 'dense'"),
    (["-s", "dense", "--protocl", "smoke"], "upcycle-bench launch: No such option: --protocl"),
    (["--seeds", "2"], "upcycle-bench launch: Missing option '--strategy'"),
    (["-s", "dense", "-p", "smoke", "--fresh"], "launch does not take --fresh: a job that is started again"),
    (["-s", "dense", "-p", "smoke", "--dry-run"], "launch does not take --dry-run: it submits nothing"),
    (["-s", "dense", "-p", "smoke", "-j", "2"], "--jobs goes with --scheduler local"),
    (["-s", "dense", "-p", "smoke", "--time", "4h"], "--time 4h: write it as Slurm does, 4:00:00"),
    (["-s", "dense", "-p", "smoke", "--setup", "none.sh"], "--setup none.sh: No such file or directory"),
    (["-s", "dense", "-p", "smoke", "--gpus", "3"], "batch_size 64 cannot be shared by 3 processes"),
    (["-s", "dense", "-p", "clip-b32"], "protocol clip-b32 needs --data"),
    (["-s", "dense", "-p", "smoke", "--scheduler", "local", "--nodes", "2"], "--nodes 2: --scheduler local"),
    (["-s", "dense", "-p", "smoke", "--scheduler", "local", "--submit"], "--submit goes with --scheduler slurm"),
    (["-s", "dense", "-p", "smoke", "--results", "a\nb"], "an option has a line break"),
]


@pytest.mark.parametrize(("arguments", "says"), BAD)
def test_a_wrong_option_is_one_line_before_anything_is_written(launch: Launch, arguments: list[str], says: str) -> None:
    status, out, err = launch("--scheduler", "slurm", *arguments)
    assert status == 2 and says in err and out == ""
    assert len(err.splitlines()) == 1 and list(Path.cwd().iterdir()) == []


def test_without_sbatch_it_says_what_to_type(launch: Launch, programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    status, _, err = launch("-s", "dense", "-p", "smoke", "--scheduler", "slurm", "--submit")
    assert status == 2 and err.splitlines()[-1].endswith("submit where there is: sbatch launch/job.sh")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_interrupted_here_it_waits_for_its_runs(
    launch: Launch, programs: Path, tmp_path: Path, number: signal.Signals, status: int
) -> None:
    """They take a moment to write a checkpoint."""
    ready, kept = tmp_path / "ready", tmp_path / "kept"
    (programs / "upcycle-bench").write_text(
        f"#!/bin/bash\ntrap 'sleep 0.3; touch {kept}; exit 75' TERM\ntouch {ready}\nwhile :; do sleep 0.1; done\n"
    )

    def send() -> None:
        while not ready.exists():
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    threading.Thread(target=send).start()
    code, out, err = launch("-s", "dense,sparse-upcycling", "-p", "smoke", "--scheduler", "local")
    assert code == status and kept.exists()
    assert err.splitlines()[-1] == "interrupted: the same command goes on with what is missing"
    assert out.count("not finished") == 1 and out.count("not started") == 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--gpus", "2"], ["#SBATCH --cpus-per-task=5"]),
        (["--gpus", "2", "--workers", "7"], ["#SBATCH --cpus-per-task=8"]),
        (["--gpus", "2", "--workers", "0"], []),
        (["--tasks-per-node", "2"], []),
        (["--gpus", "2", "--sbatch=--cpus-per-gpu=9"], ["#SBATCH --cpus-per-gpu=9"]),
    ],
)
def test_a_task_has_a_processor_for_each_of_its_processes(
    launch: Launch, options: list[str], expected: list[str]
) -> None:
    """Slurm gives it one otherwise, on which the loaders would starve."""
    assert launch("-s", "dense", "-p", "smoke", "--scheduler", "slurm", *options)[0] == 0
    lines = Path("launch/job.sh").read_text().splitlines()
    assert [line for line in lines if "cpus" in line and line.startswith("#SBATCH")] == expected


def test_a_line_of_cells_is_a_command(launch: Launch) -> None:
    """All options of `run` are in it, quoted, except those of the matrix."""
    odd = ["--option", "ratio=0.25", "--set", "train.log_every=5", "--suite", "zero-shot", "--results", "a 'b' $c"]
    assert launch("-s", "drop-upcycling", "--seed", "3", "-p", "smoke", "--scheduler", "slurm", *odd)[0] == 0
    (line,) = Path("launch/cells.txt").read_text().splitlines()
    start = "upcycle-bench run --once --strategy drop-upcycling --init-seed 3 --train-seed 3 --protocol smoke"
    assert line.startswith(start)
    rest = shlex.split(line.removeprefix(start))
    assert sorted(zip(rest[::2], rest[1::2], strict=True)) == sorted(zip(odd[::2], odd[1::2], strict=True))
