"""Fingerprints: one form for equal values, and what belongs to those of suites and of strategies' code."""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import upcycle_bench
from upcycle_bench.planning.fingerprint import code_fingerprint, fingerprint, suite_fingerprint


def test_fingerprint_is_canonical() -> None:
    assert fingerprint({"a": 1, "b": (2, 3)}) == fingerprint({"b": [2, 3], "a": 1})
    with pytest.raises(ValueError, match="a number is nan"):
        fingerprint(float("nan"))


def test_name_version_settings_and_data_of_a_suite_are_part_of_its_fingerprint(tmp_path: Path) -> None:
    def suite(name: str = "words", version: int = 1, sets: str = "a", sha256: str = "0") -> Any:
        info = SimpleNamespace(name=name, version=version)
        return SimpleNamespace(info=info, config=lambda: {"sets": sets}, sources=lambda root: {sets: sha256})

    suites = [suite(), suite(name="pictures"), suite(version=2), suite(sets="b"), suite(sha256="1")]
    assert len({suite_fingerprint(each, tmp_path) for each in suites}) == len(suites)
    assert suite_fingerprint(suite(), tmp_path) == suite_fingerprint(suite(), tmp_path / "elsewhere")


def test_code_of_a_strategys_bases_belongs_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    base = '"""Words."""\nfrom upcycle_bench.strategy import Strategy\nclass Base(Strategy):\n    half = 0.5\n'
    (tmp_path / "its_base.py").write_text(base)
    (tmp_path / "its_leaf.py").write_text("from its_base import Base\nclass Leaf(Base): pass\n")
    leaf = importlib.import_module("its_leaf").Leaf
    before = code_fingerprint(leaf)
    for same in (f"# more words\n{base}", base.replace("Words", "Other words"), f"import math\n{base}"):
        (tmp_path / "its_base.py").write_text(same)
        assert code_fingerprint(leaf) == before
    (tmp_path / "its_base.py").write_text(base.replace("0.5", "0.25"))
    assert code_fingerprint(leaf) != before


def test_what_a_plugin_imports_from_its_own_package_belongs_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    package = tmp_path / "its_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "maths.py").write_text("HALF = 0.5\n")
    idea = (
        "from upcycle_bench.strategy import Strategy\nfrom .maths import HALF\nclass Idea(Strategy):\n    half = HALF\n"
    )
    (package / "idea.py").write_text(idea)
    strategy = importlib.import_module("its_package.idea").Idea
    before = code_fingerprint(strategy)
    (package / "maths.py").write_text("HALF = 0.25\n")
    assert code_fingerprint(strategy) != before


CODE_OF = """
from upcycle_bench.planning.fingerprint import code_fingerprint
from upcycle_bench.planning.registry import load_registry
print(code_fingerprint(load_registry().get("strategy", "cluster-aware").target))
"""


def test_a_comment_leaves_a_strategy_what_it_is_and_a_constant_in_clustering_does_not(tmp_path: Path) -> None:
    root = Path(upcycle_bench.__file__).parent
    copy = tmp_path / "upcycle_bench"
    shutil.copytree(root, copy, ignore=shutil.ignore_patterns("__pycache__", "checkpoints"))
    for folder in ("strategies", "suites"):
        shutil.copytree(root.parent / folder, copy / folder, dirs_exist_ok=True)

    def code() -> str:
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", CODE_OF], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
        )
        return done.stdout

    before = code()
    clustering, strategy = copy / "upcycling" / "clustering.py", copy / "strategies" / "cluster_aware.py"
    for path in (clustering, strategy):
        path.write_text(path.read_text() + "# a comment\n")
    assert code() == before
    clustering.write_text(clustering.read_text() + "A_CONSTANT = 1\n")
    assert code() != before
