"""`leaderboard --format html` and `--output`, and what a wheel holds of the page."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.reporting.html_records import hard_records
from upcycle_bench import cli
from upcycle_bench.record import write

ROOT = Path(__file__).parents[2]


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["upcycle-bench", "leaderboard", *arguments])
    with pytest.raises(SystemExit) as leave:
        cli.main()
    return int(leave.value.code or 0)


@pytest.fixture
def records(tmp_path: Path) -> str:
    for record in hard_records()[:5]:
        write(record, None, tmp_path / "records")
    return str(tmp_path / "records")


@pytest.mark.parametrize("format", ["terminal", "md", "csv", "json", "latex", "html"])
def test_every_format_goes_to_a_file(
    format: str, records: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")  # of the terminal; a file has no width of its own
    assert call(monkeypatch, records, "--format", format) == 0
    shown = capsys.readouterr().out
    output = tmp_path / "table"
    output.write_text("before")
    assert call(monkeypatch, records, "--format", format, "--output", str(output)) == 0
    assert output.read_text() == shown and "sparse-upcycling" in shown
    assert capsys.readouterr() == ("", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["records", "table"]


def test_a_page_is_not_poured_into_a_terminal(
    records: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert call(monkeypatch, records, "--format", "html") == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == (
        "",
        "error: --format html is a file for a browser; give --output FILE.html.\n",
    )


def test_where_nothing_can_be_written_is_one_line(
    records: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for output, said in (
        (tmp_path, "is a folder: give the name of a file"),
        (tmp_path / "no" / "t", "is not a folder"),
    ):
        assert call(monkeypatch, records, "--format", "html", "--output", str(output)) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and said in captured.err and len(captured.err.splitlines()) == 1


def test_a_wheel_makes_the_same_page(records: str, tmp_path: Path) -> None:
    """The wheel holds template, style, scripts and licences, and nothing of the tests."""
    source, target = tmp_path / "source", tmp_path / "installed"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("upcycle_bench", "strategies", "suites"):
        shutil.copytree(
            ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.pt", "*.safetensors")
        )
    code = f"from setuptools.build_meta import build_wheel; print(build_wheel({str(tmp_path)!r}))"
    built = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stderr
    with zipfile.ZipFile(tmp_path / built.stdout.split()[-1]) as wheel:
        names = wheel.namelist()
        wheel.extractall(target)
    assert {f"upcycle_bench/reporting/html/vendor/LICENSE-{name}.txt" for name in ("d3", "plot")} <= {*names}
    assert not any("axe" in name or name.startswith("tests") for name in names)
    pages = []
    for folder in (target, ROOT):
        code = f"import sys; sys.path.insert(0, {str(folder)!r}); from upcycle_bench.cli import main; main()"
        command = [sys.executable, "-c", code, "leaderboard", records, "--format", "html"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        pages.append(done.stdout)
    assert pages[0] == pages[1] and pages[0].startswith("<!doctype html>")
