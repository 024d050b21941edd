"""The command line parses, calls and shows: its commands are short, and no room below imports it."""

import ast
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from tests.contract.imports import imported
from upcycle_bench import api
from upcycle_bench.cli import app
from upcycle_bench.cli.upcycle import upcycle
from upcycle_bench.planning.registry import load_registry
from upcycle_bench.protocol import PUBLISHED_MOE, load_protocol

ROOT = Path(__file__).parents[2]
LONGEST = 40  # lines of a command without its signature


def commands(group: typer.Typer) -> Iterator[Callable[..., Any]]:
    for registered in group.registered_commands:
        assert registered.callback is not None
        yield registered.callback
    for inner in group.registered_groups:
        assert inner.typer_instance is not None
        yield from commands(inner.typer_instance)


def body_lines(function: Callable[..., Any]) -> int:
    """The lines from the docstring to the end; the signature holds only options."""
    (made,) = ast.parse(inspect.getsource(function)).body
    assert isinstance(made, ast.FunctionDef) and made.end_lineno is not None
    return made.end_lineno - made.body[0].lineno + 1


@pytest.mark.parametrize("command", commands(app), ids=lambda command: command.__name__)
def test_a_command_is_short(command: Callable[..., Any]) -> None:
    assert body_lines(command) <= LONGEST


def test_every_command_has_a_file_of_its_own() -> None:
    modules = [command.__module__ for command in commands(app)]
    assert (
        len(set(modules)) == len(modules) - 3
    )  # `data build`, `index` and `check` are one, so are `cache list`, `prune`
    assert all(module.startswith("upcycle_bench.cli.") for module in modules)


def test_nothing_below_imports_the_command_line() -> None:
    rooms = [ROOT / "upcycle_bench", ROOT / "strategies", ROOT / "suites"]
    files = [path for room in rooms for path in room.rglob("*.py")]
    names = {str(path.relative_to(ROOT)): imported(path) for path in files}
    assert not any(name.startswith(".") for found in names.values() for name in found)  # which would hide the room
    users = {
        path for path, found in names.items() if any(f"{name}.".startswith("upcycle_bench.cli.") for name in found)
    }
    inside = {str(path.relative_to(ROOT)) for path in (ROOT / "upcycle_bench" / "cli").glob("*.py")}
    assert users - inside == {"upcycle_bench/__main__.py"}


def test_the_papers_numbers_stand_in_one_place() -> None:
    """The command's defaults are literals, so that `--help` need not load pydantic."""
    assert load_protocol(load_registry().protocols["clip-b32"].target).moe == PUBLISHED_MOE
    published = PUBLISHED_MOE.model_dump()
    for function, names in (
        (upcycle, {"experts", "top_k", "every", "offset", "capacity_factor"}),
        (api.upcycle, {"experts", "top_k", "every", "offset", "capacity_factor", "min_capacity"}),
    ):
        defaults = {name: each.default for name, each in inspect.signature(function).parameters.items()}
        assert {name: defaults[name] for name in names} == {name: published[name] for name in names}
