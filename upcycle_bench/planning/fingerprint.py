"""Identities: what must be equal for two runs to compare, and what makes a run itself again.

training_fingerprint(protocol, world, dense_identity, unequal)     # what can change the weights
suite_fingerprint(suite, eval_root)                                # what can change a suite's scores of them
code_fingerprint(type(strategy))                                   # what the strategy computes
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from upcycle_bench.data.world import World
from upcycle_bench.model.clip import model_config
from upcycle_bench.protocol import Protocol
from upcycle_bench.strategy import Strategy
from upcycle_bench.suite import Suite
from upcycle_bench.util import distributed
from upcycle_bench.util import distributed as engine
from upcycle_bench.util.cache import cache_root
from upcycle_bench.util.errors import UserError

# Raise it when the same protocol, data and seeds would give other weights: it is part of the training fingerprint.
NUMERICS = 2

# What cannot change the weights, beyond rounding that a resumed or differently logged run does not see.
_WITHOUT_EFFECT = {"log_every", "checkpoint_every"}

UPCYCLING = "upcycle_bench.upcycling."  # where strategies keep what several of them compute


def fingerprint(value: Any) -> str:
    """sha256 of the value's canonical JSON, 16 hex digits of it."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def dense_recipe(protocol: Protocol, world: World) -> str:
    """Identity of a dense model that is trained on the spot: everything that makes it, numerics included."""
    values = protocol.model_dump(mode="json", include={"model", "threads", "dense"})
    values["dense"] = {key: value for key, value in values["dense"].items() if key not in ("source", "shipped")}
    values["made by"] = [torch.__version__, engine.choose_device().type, distributed.world_size()]
    return fingerprint({**values, "config": model_config(protocol.model), "data": world.sha256, "numerics": NUMERICS})


def recipe_path(recipe: str) -> Path:
    """Where the cache keeps the dense model of that recipe."""
    return cache_root() / "dense" / f"{recipe}.safetensors"


def training_fingerprint(protocol: Protocol, world: World, dense_identity: str, unequal: str | None) -> str:
    """Everything that can change the weights but strategy and seeds: protocol, data, dense model, ranks, numerics."""
    values = protocol.model_dump(mode="json", include={"model", "threads", "dense", "moe", "train"})
    values["train"] = {key: value for key, value in values["train"].items() if key not in _WITHOUT_EFFECT}
    values |= {"config": model_config(protocol.model), "data": world.sha256, "checkpoint": dense_identity}
    values["world_size"] = distributed.world_size()  # capacity is that of a rank's micro-batch
    if unequal:  # a table of its own
        values["unequal"] = unequal
    return fingerprint({**values, "numerics": NUMERICS})


def suite_fingerprint(suite: Suite, eval_root: Path) -> str:
    """Everything that can change a suite's scores of given weights: its version, settings and data."""
    facts = {"suite": suite.info.name, "version": suite.info.version, "config": suite.config()}
    return fingerprint({**facts, "data": suite.sources(eval_root)})


def suite_fingerprints(suites: Mapping[str, Suite], eval_root: Path) -> tuple[dict[str, str | None], dict[str, str]]:
    """Fingerprints of the suites that can run, and why the others cannot; UserError if none has a primary score."""
    found: dict[str, str | None] = {}
    skipped: dict[str, str] = {}
    for name, suite in suites.items():
        try:
            found[name] = suite_fingerprint(suite, eval_root)
        except UserError as error:
            skipped[name] = str(error)
    if not any(suites[name].info.primary for name in found):
        alone = f"--suite {','.join(found)} has no primary score, which a record needs; name a suite that has one, too."
        raise UserError(" ".join(skipped.values()) or alone)
    return found, skipped


def code_fingerprint(strategy: type[Strategy]) -> str:
    """Identity of what a strategy computes: its file, its bases' and those they import from `upcycling` or beside them.

    Their syntax trees count, without imports, docstrings and comments: a reworded comment leaves a run what it was, a
    changed constant does not. What all strategies share (the network, the training) is covered by `NUMERICS`.
    """
    bases = [base for base in strategy.__mro__ if issubclass(base, Strategy) and base is not Strategy]
    names = {base.__module__ for base in bases}
    own = tuple(f"{name.rpartition('.')[0]}." for name in names if "." in name)  # a plugin's package
    files: dict[str, Path] = {}
    while names:
        name = names.pop()
        if name in files or (file := _source_file(name)) is None:
            continue
        files[name] = file
        names |= {each for each in _imports(file, name) if each.startswith((UPCYCLING, *own))} - files.keys()
    return fingerprint(sorted(fingerprint(_bare_code(file.read_text(encoding="utf-8"))) for file in files.values()))


def _source_file(module: str) -> Path | None:
    """The module's file; None if there is no such module, or it is no Python source."""
    loaded = sys.modules.get(module)
    try:
        spec = loaded.__spec__ if loaded is not None else importlib.util.find_spec(module)
        file = spec.origin if spec is not None else getattr(loaded, "__file__", None)
    except (ImportError, ValueError, AttributeError):
        return None
    return Path(file) if file is not None and file.endswith(".py") else None


def _imports(file: Path, module: str) -> set[str]:
    """Names of all modules that a file imports, at its top or inside functions; some may name no module."""
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


def _bare_code(source: str) -> str:
    """The code of a file in one spelling, without imports, docstrings and comments."""
    return ast.unparse(_Bare().visit(ast.parse(source)))


class _Bare(ast.NodeTransformer):
    def visit_Import(self, node: ast.Import) -> None:
        return None

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        return None

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if text else node
