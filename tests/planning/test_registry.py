"""The registry: entry points; unknown, duplicate, misspelled and broken plugins; an outside package, installed."""

import json
import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
from pydantic.dataclasses import dataclass

from upcycle_bench.hookspecs import hookimpl
from upcycle_bench.planning import registry as registry_module
from upcycle_bench.planning.registry import load_registry
from upcycle_bench.strategy import Strategy, StrategyInfo
from upcycle_bench.util.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Mine(Strategy):
    """A control for these tests."""

    info: ClassVar[StrategyInfo] = StrategyInfo(name="mine", summary="s", paper="p", status="control")
    replaces_ffn: ClassVar[bool] = False


class Plugin:
    """A plugin object with one hook."""

    @hookimpl
    def register_strategies(self) -> list[type[Strategy]]:
        return [Mine]


def test_built_ins_come_through_the_entry_points() -> None:
    registry = load_registry()
    assert registry.broken == {}
    assert {"sparse-upcycling", "cluster-aware", "dense", "dense-frozen"} <= set(registry.strategies)
    assert "zero-shot" in registry.suites
    assert all(entry.distribution == "upcycle-bench" for entry in registry.strategies.values())
    assert list(registry.strategies) == sorted(registry.strategies)


def test_a_plugin_joins_and_leaves() -> None:
    assert load_registry({"test": Plugin()}).get("strategy", "mine").target is Mine
    assert "mine" not in load_registry().strategies


def test_unknown_name_lists_near_matches_or_all() -> None:
    near = r"unknown strategy 'cluster-awre': did you mean 'cluster-aware' or 'cluster-only'\? There are \d+\.$"
    with pytest.raises(UserError, match=near):
        load_registry().get("strategy", "cluster-awre")
    with pytest.raises(UserError, match=r"unknown strategy 'xyzzy'\. There are: .*sparse-upcycling"):
        load_registry().get("strategy", "xyzzy")


def test_duplicate_name_names_both_owners() -> None:
    with pytest.raises(UserError, match=r"strategy named 'mine'.*first.*second"):
        load_registry({"first": Plugin(), "second": Plugin()})


def test_misspelled_hook_is_an_error_that_names_the_plugin() -> None:
    class Misspelled:
        @hookimpl
        def register_strategy(self) -> list[type[Strategy]]:
            return [Mine]

    registry = load_registry({"outsider": Misspelled()})
    assert "register_strategy" in registry.broken["outsider"]
    with pytest.raises(UserError, match="Plugin outsider did not load"):
        registry.get("strategy", "mine")


def test_one_broken_plugin_does_not_take_the_others_down(monkeypatch: pytest.MonkeyPatch) -> None:
    good = registry_module.entry_points(group="upcycle_bench")
    bad = EntryPoint("bad", "no_such_module_anywhere", "upcycle_bench")
    monkeypatch.setattr(registry_module, "entry_points", lambda group: [bad, *good])
    registry = load_registry()
    assert registry.broken == {"unknown:bad": "ModuleNotFoundError: No module named 'no_such_module_anywhere'"}
    assert "cluster-aware" in registry.strategies


def test_a_class_without_info_is_named() -> None:
    plugin = SimpleNamespace()
    plugin.register_strategies = hookimpl(lambda: [object])
    assert "AttributeError" in load_registry({"odd": plugin}).broken["odd"]


OUTSIDER = '''
"""An outsider's strategy: experts are copies plus a little noise."""
from typing import Any, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from upcycle_bench.hookspecs import hookimpl
from upcycle_bench.strategy import LayerInit, Strategy, StrategyInfo, random_router


@dataclass(frozen=True, kw_only=True)
class Noisy(Strategy):
    """Copies plus noise."""

    info: ClassVar = StrategyInfo(name="noisy", summary="copies plus noise", paper="none", status="control")
    std: float = Field(default=0.01, ge=0)

    def init_layer(self, ffn, layer, calibration, rng):
        experts = []
        for number in range(layer.num_experts):
            noise = torch.randn(ffn.w1_HD.shape, generator=rng.child("expert", number).generator())
            experts.append(ffn.expert(w1_HD=ffn.w1_HD + self.std * noise))
        return LayerInit(experts, random_router(ffn, layer, rng))


@hookimpl
def register_strategies():
    return [Noisy]
'''


def test_an_outside_package_is_installed_found_and_run(tmp_path: Path, quick_flags: list[str]) -> None:
    """It is built, installed with pip, listed with its distribution, and run end to end."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "noisy_upcycling.py").write_text(OUTSIDER)
    (source / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "noisy-upcycling"\nversion = "2.5"\n'
        '[project.entry-points.upcycle_bench]\nnoisy = "noisy_upcycling"\n'
        '[tool.setuptools]\npy-modules = ["noisy_upcycling"]\n'
    )
    site = tmp_path / "site"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        str(site),
    ]
    subprocess.run([*pip, str(source)], check=True, capture_output=True, timeout=120)
    environment = {**os.environ, "PYTHONPATH": str(site)}

    def command(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "upcycle_bench", *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    listed = {row["name"]: row for row in json.loads(command("list", "strategies", "--json"))["strategies"]}
    assert listed["noisy"]["from"] == "noisy-upcycling 2.5"
    results = str(tmp_path / "results")
    record = json.loads(
        command("run", "-s", "noisy", "-o", "std=0.02", "-p", "smoke", *quick_flags, "--results", results, "--json")
    )
    assert record["status"] == "ok"
    assert record["strategy"]["label"] == "noisy[std=0.02]"
    assert (record["strategy"]["distribution"], record["strategy"]["version"]) == ("noisy-upcycling", "2.5")
    assert record["receipt"]["layers"]["vision.1"]["expert_cosine"] < 1 - 1e-5
