"""`validate`, `diff` and `submit` at the command line: exit status, one JSON document, lines without tricks."""

import json
from pathlib import Path

import pytest

from tests.cli.test_main import call
from tests.reporting.tampering import BASE, LAB, OTHER, Files, at, fresh


@pytest.fixture
def sent(tmp_path: Path) -> Path:
    folder = tmp_path / "sent"
    folder.mkdir()
    return fresh(folder)


def test_sound_records_end_with_0(
    sent: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (sent / "notes.md").write_text("mine")
    assert call(monkeypatch, "validate", str(sent)) == 0
    shown = capsys.readouterr().out
    assert shown.count(" sound") >= 4 and shown.endswith("all records are sound\n")
    assert "passed over, no record" in shown and "notes.md" in shown
    assert call(monkeypatch, "validate", str(sent), "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["sound"] and len(facts["records"]) == 3 and [*facts["passed_over"].values()] == ["no record"]


def test_a_wrong_record_ends_with_1_and_is_named(
    sent: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    at("seeds", {"init": 7, "train": 7}, OTHER)(sent)
    assert call(monkeypatch, "validate", str(sent)) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if ": run-id: " in line]
    assert line.startswith(str(Files(sent, OTHER).json))
    assert call(monkeypatch, "validate", str(sent), "--json") == 1
    wrong = {
        row["path"]: [each["check"] for each in row["wrong"]] for row in json.loads(capsys.readouterr().out)["records"]
    }
    assert wrong.pop(str(Files(sent, OTHER).json)) == ["run-id"] and [*wrong.values()] == [[], []]


def test_what_a_stranger_wrote_reaches_no_terminal_as_it_is(
    sent: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    at("strategy.label", "\x1b[2J[red]<script>\n|$_" + "x" * 200)(sent)
    assert call(monkeypatch, "validate", str(sent)) == 1
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "?[2J[red]<script>?|$_" in shown


def test_no_records_end_with_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (tmp_path, tmp_path / "none"):
        assert call(monkeypatch, "validate", str(path)) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_diff_shows_what_differs_and_refuses_what_has_nothing_in_common(
    sent: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other, lab = (str(Files(sent, start).json) for start in (BASE, OTHER, LAB))
    assert call(monkeypatch, "diff", one, other) == 0
    shown = capsys.readouterr().out
    assert "strategy: name" in shown and "in-distribution (lower is better)" in shown and "McNemar" in shown
    assert max(map(len, shown.splitlines())) <= 100
    assert call(monkeypatch, "diff", one, other, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["same_table"] and facts["differences"]["strategy"]["name"] == ["cluster-aware", "sparse-upcycling"]
    assert len(facts["scores"]) == 15 and any(score["p"] is not None for score in facts["scores"])
    for bad in ([one, lab], [one, str(sent)], [one, "none.json"]):
        assert call(monkeypatch, "diff", *bad) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_submit_writes_a_bundle_of_sound_records_only(
    sent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "mine.tar.gz"
    assert call(monkeypatch, "submit", str(sent), "--output", str(output)) == 0
    assert f"tar -xzf {output} results" in capsys.readouterr().out and output.is_file()
    before = output.read_bytes()
    assert call(monkeypatch, "submit", str(sent), "--output", str(output)) == 2
    assert "--force" in capsys.readouterr().err
    at("cost.samples", 1)(sent)
    assert call(monkeypatch, "submit", str(sent), "--output", str(output), "--force") == 1
    assert ": cost: " in capsys.readouterr().out and output.read_bytes() == before
