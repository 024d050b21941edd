"""`upcycle-bench doctor` shows the checks as a table or as JSON; its exit status says whether runs can work."""

import json

import pytest

from tests.cli.test_main import call
from upcycle_bench.planning import machine
from upcycle_bench.planning.machine import Check

FINE = Check("one", True, True, "1.0", "")
NEEDED = Check("two", False, True, "missing", "pip install 'upcycle-bench[cpu]'")
NOTE = Check("three", False, False, "missing", "sudo apt-get install -y npm")


def test_the_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(machine, "checks", lambda: [FINE, NEEDED, NOTE])
    monkeypatch.setenv("COLUMNS", "120")
    assert call(monkeypatch, "doctor") == 1
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.split()]
    assert lines[-3] == ["ok", "one", "1.0"]
    assert lines[-2] == ["MISSING", "two", "missing", "pip", "install", "'upcycle-bench[cpu]'"]  # no markup was read
    assert lines[-1][:3] == ["note", "three", "missing"]


@pytest.mark.parametrize(("found", "ok"), [([FINE, NOTE], True), ([FINE, NEEDED, NOTE], False)])
def test_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], found: list[Check], ok: bool
) -> None:
    monkeypatch.setattr(machine, "checks", lambda: found)
    assert call(monkeypatch, "doctor", "--json") == (0 if ok else 1)
    document = json.loads(capsys.readouterr().out)
    assert document["ok"] is ok and len(document["checks"]) == len(found)
    assert document["checks"][-1] == {
        "name": "three",
        "ok": False,
        "required": False,
        "found": "missing",
        "remedy": "sudo apt-get install -y npm",
    }
