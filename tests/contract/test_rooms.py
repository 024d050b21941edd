"""Rules of the rooms that import-linter cannot see: the two folders at the top, and who gets a whole plan."""

import ast
from pathlib import Path

import pytest

from tests.contract.imports import imported

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "upcycle_bench"
MAY_IMPORT = {
    "strategies": {"hookspecs", "strategy", "upcycling", "model"},
    "suites": {"hookspecs", "suite", "evaluation", "data", "model", "training", "util"},
}
BELOW_PLANNING = ("model", "data", "training", "upcycling", "evaluation", "reporting")


def imports(path: Path) -> set[str]:
    """Every module of ours that a file imports."""
    return {name for name in imported(path) if name.startswith("upcycle_bench.")}


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_strategies_and_suites_stay_within_their_rooms(folder: str) -> None:
    paths = [path for path in (ROOT / folder).glob("*.py") if path.name != "__init__.py"]
    assert len(paths) >= 7
    found = {path.name: {name.split(".")[1] for name in imports(path)} - MAY_IMPORT[folder] for path in paths}
    assert {name: rooms for name, rooms in found.items() if rooms} == {}


def test_nobody_imports_strategies_or_suites_by_path() -> None:
    paths = list(PACKAGE.rglob("*.py"))
    assert len(paths) > 100
    reached = ("upcycle_bench.strategies", "upcycle_bench.suites")
    assert [str(path) for path in paths if any(name.startswith(reached) for name in imports(path))] == []


def test_no_room_below_planning_is_handed_a_plan() -> None:
    annotated = []
    for room in BELOW_PLANNING:
        for path in (PACKAGE / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.arg) and node.annotation is not None:
                    names = {part.id for part in ast.walk(node.annotation) if isinstance(part, ast.Name)}
                    annotated += [f"{path.name}: {node.arg}"] if "Plan" in names else []
    assert annotated == []


def test_json_is_written_by_the_strict_writer_alone() -> None:
    """`json.dumps` writes NaN, which is no JSON."""
    paths = [path for folder in (PACKAGE, ROOT / "strategies", ROOT / "suites") for path in folder.rglob("*.py")]
    loose = []
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            written = isinstance(node, ast.Attribute) and node.attr in ("dump", "dumps")
            if written and isinstance(node.value, ast.Name) and node.value.id == "json":
                loose.append(path.name)
    assert loose == ["strict_json.py"]


def test_a_strategy_file_is_short() -> None:
    lengths = {path.name: len(path.read_text().splitlines()) for path in (ROOT / "strategies").glob("*.py")}
    assert {name: length for name, length in lengths.items() if length > 160} == {}
