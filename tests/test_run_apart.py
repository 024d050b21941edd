"""Processes of a matrix: their lines, their ends, their GPUs, and what becomes of them without their parent."""

import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from tests.test_run import plan
from upcycle_bench import run_apart
from upcycle_bench.planning.matrix import Cell
from upcycle_bench.run_apart import Child, start, stop


def child(code: str) -> Child:
    """A process that runs this code."""
    output = tempfile.TemporaryFile()  # noqa: SIM115 (as long as the test)
    process = subprocess.Popen([sys.executable, "-c", code], stderr=output, start_new_session=True)
    cell: Any = None
    return Child(cell, 0, process, output, set())


def test_lines_come_whole_and_once() -> None:
    """The last one has no end, which is read once the process is over."""
    go = "sys.stderr.flush(); sys.stdin.readline()"
    code = f"import sys; sys.stderr.write('one\\n\\ntwo\\nthr'); {go}; sys.stderr.write('ee \\nf\\u00fcnf')"
    made = child("")
    made.process.wait()
    made.process = subprocess.Popen(
        [sys.executable, "-X", "utf8", "-c", code], stdin=subprocess.PIPE, stderr=made.output
    )
    found: list[str] = []
    deadline = time.monotonic() + 30
    while len(found) < 2 and time.monotonic() < deadline:
        found += made.lines()
    assert found == ["one", "two"] and list(made.lines()) == []
    made.process.communicate(b"\n")
    assert list(made.lines()) == ["three", "fünf"] and list(made.lines()) == []
    assert (made.last, made.why()) == ("fünf", None)


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("sys.exit('error: no disk')", "no disk"),
        ("sys.exit(3)", "exit status 3"),
        ("print('2026-01-01T00:00:00Z the run failed: x', file=sys.stderr); sys.exit(1)", "the run failed: x"),
        ("os.kill(os.getpid(), 9)", "killed by SIGKILL, perhaps for want of memory"),
        ("os.kill(os.getpid(), 15)", "killed by SIGTERM"),
        ("print('all is well', file=sys.stderr)", None),
    ],
)
def test_why_a_process_failed(code: str, why: str | None) -> None:
    made = child(f"import os, sys; {code}")
    made.process.wait()
    list(made.lines())
    assert made.why() == why


def test_stop_lets_them_write_and_a_second_interruption_kills(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import signal, sys, time; signal.signal(15, lambda *_: {}); print('up', file=sys.stderr, flush=True)"
    code += "; time.sleep(60)"
    polite, deaf = child(code.format("sys.exit('bye')")), child(code.format("None"))
    for each in (polite, deaf):
        while "up" not in [*each.lines(), each.last]:
            time.sleep(0.01)
    stop([polite], lambda each: list(each.lines()) and None)
    assert (polite.process.returncode, polite.last) == (1, "bye")

    def again(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run_apart.time, "sleep", again)
    with pytest.raises(KeyboardInterrupt):
        stop([deaf], lambda each: None)
    assert deaf.process.returncode == -signal.SIGKILL


def test_a_process_sees_its_gpu_alone(tmp_path: Path, quick: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(run_apart.subprocess, "Popen", lambda command, **how: seen.append((command, how["env"])))
    cell = Cell(plan=plan("dense", quick, init_seed=1, train_seed=2))
    start(cell, 0, tmp_path, ["-p", "smoke"], {"A": "b", "CUDA_VISIBLE_DEVICES": "2,GPU-8f"}, "GPU-8f")
    assert seen[0][1] == {"A": "b", "CUDA_VISIBLE_DEVICES": "GPU-8f"}
    words = ["run", "--strategy", "dense", "--init-seed", "1", "--train-seed", "2", "-p", "smoke"]
    assert seen[0][0][3:] == words
    start(cell, 0, tmp_path, [], {"A": "b"})
    assert seen[-1][1] == {"A": "b"}


def test_a_process_stops_once_its_parent_is_gone(tmp_path: Path) -> None:
    """As on SIGTERM: here it writes a file."""
    out = tmp_path / "out"
    orphan = (
        "import os, signal, sys, time; from pathlib import Path; from upcycle_bench.run_apart import stop_with\n"
        f"signal.signal(15, lambda *_: (Path({str(out)!r}).write_text('stopped'), sys.exit(0)))\n"
        "stop_with(int(sys.argv[1])); print('up', flush=True); time.sleep(60)"
    )
    code = (
        "import os, subprocess, sys\n"
        f"made = subprocess.Popen([sys.executable, '-c', {orphan!r}, str(os.getpid())], stdout=subprocess.PIPE)\n"
        "print(made.stdout.readline().decode().strip(), flush=True); sys.stdin.read()"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert parent.stdout is not None and parent.stdout.readline() == b"up\n"
    time.sleep(1.5)
    assert not out.exists()
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 30
    while not out.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert out.read_text() == "stopped"
