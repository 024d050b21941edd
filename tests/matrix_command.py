"""`upcycle-bench run` on a matrix, in this process, with strategies that fail, for several files of tests."""

import json
import sys
from collections.abc import Callable
from typing import Any

import pytest
from pydantic.dataclasses import dataclass

from tests.test_run import Failing
from upcycle_bench import cli
from upcycle_bench.hookspecs import hookimpl
from upcycle_bench.planning import registry
from upcycle_bench.planning.registry import Entry
from upcycle_bench.strategy import Strategy, StrategyInfo
from upcycle_bench.util.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Refusing(Strategy):
    """A strategy that this machine cannot run."""

    info = StrategyInfo(name="refusing", summary="s", paper="p", status="control")

    def check(self) -> None:
        raise UserError("refusing needs a quantum computer.")


class Plugin:
    """Brings `failing` and `refusing`."""

    @hookimpl
    def register_strategies(self) -> list[type[Strategy]]:
        return [Failing, Refusing]


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(name="command")
def the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], quick_flags: list[str]) -> Command:
    """`upcycle-bench run` in this process, on quick `smoke`: exit status, stdout, stderr."""
    real = registry.load_registry()
    for strategy in Plugin().register_strategies():
        real.strategies[strategy.info.name] = Entry(strategy.info.name, strategy, "test", "")
    monkeypatch.setattr(registry, "load_registry", lambda: real)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["upcycle-bench", "run", "-p", "smoke", *quick_flags, *arguments])
        with pytest.raises(SystemExit) as leave:
            cli.main()
        return int(leave.value.code or 0), *capsys.readouterr()

    return call


def outcomes(out: str) -> dict[tuple[str, int], dict[str, Any]]:
    return {(row["strategy"], row["seeds"]["train"]): row for row in json.loads(out)["runs"]}
