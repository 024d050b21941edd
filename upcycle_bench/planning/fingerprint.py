"""Fingerprints: what must be equal for two runs to compare, and for a run to be the same as an earlier one.

training_fingerprint(protocol, world, dense_identity, unequal)  # of what can change the weights
suite_fingerprint(suite, eval_root)                             # of what can change a suite's scores of them
code_fingerprint(type(strategy))                                # of what the strategy computes
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from upcycle_bench.data.world import World
from upcycle_bench.model.config import describe, own_config
from upcycle_bench.protocol import Protocol
from upcycle_bench.strategy import Strategy
from upcycle_bench.suite import Suite
from upcycle_bench.util import distributed, strict_json
from upcycle_bench.util.cache import cache_root
from upcycle_bench.util.errors import PluginError, UserError
from upcycle_bench.util.plain import plain

# Part of the training fingerprint: raise it when the same protocol, data and seeds would give other weights.
NUMERICS = 3

# Settings of training that cannot change the weights.
_WITHOUT_EFFECT = {"log_every", "checkpoint_every"}

UPCYCLING = "upcycle_bench.upcycling."  # the modules that several strategies share


def fingerprint(value: Any) -> str:
    """The first 16 hex digits of the sha256 of the value's canonical JSON; ValueError for NaN and infinity."""
    text = strict_json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def dense_recipe(protocol: Protocol, world: World, made_by: Sequence[Any] | None = None) -> str:
    """Fingerprint of a dense model that the protocol trains: everything that can change its weights.

    `made_by`: build of torch, type of the device, number of ranks; by default those here.
    """
    if made_by is None:
        made_by = [torch.__version__, distributed.choose_device().type, distributed.world_size()]
        made_by += ["plain"] if plain() else []
    return fingerprint({**dense_facts(protocol, world), "made by": made_by})


def dense_facts(protocol: Protocol, world: World) -> dict[str, Any]:
    """What a dense model is that the protocol trains, whatever the machine, the versions and the ranks."""
    values = protocol.model_dump(mode="json", include={"model", "threads", "dense"})
    values["dense"] = {key: value for key, value in values["dense"].items() if key not in ("source", "shipped")}
    values |= _model(protocol) | _captions(world) | _order(protocol)
    return {**values, "data": world.sha256, "numerics": NUMERICS}


def _model(protocol: Protocol) -> dict[str, Any]:
    """What the protocol's model is, wherever it was described: open_clip's name, the configuration, unusual pixels."""
    found = describe(protocol.model)
    name = "" if own_config(found.name) else found.name  # the label of another one may be a folder's
    pixels = {"preprocess": dict(found.preprocess)} if found.preprocess else {}
    return {"model": name, "config": found.config, **pixels}


def recipe_path(recipe: str) -> Path:
    """The file in the cache for the dense model of that recipe."""
    return cache_root() / "dense" / f"{recipe}.safetensors"


def training_fingerprint(
    protocol: Protocol,
    world: World,
    dense_identity: str,
    unequal: str | None,
    mixed_ranks: Sequence[Sequence[int]] = (),
) -> str:
    """Fingerprint of all that can change the weights, except strategy and seeds.

    These are protocol, data, dense model, number of ranks and `NUMERICS`. `unequal` says why the strategy's shape does
    not compare, if so: such runs get a table of their own. So do those whose sessions had several numbers of ranks:
    `mixed_ranks` are these, each with its ep_size.
    """
    return facts_fingerprint(training_facts(protocol, world, dense_identity, unequal), mixed_ranks)


def facts_fingerprint(facts: Mapping[str, Any], mixed_ranks: Sequence[Sequence[int]] = ()) -> str:
    """`training_fingerprint` of facts that `training_facts` gave."""
    values = dict(facts)
    if mixed_ranks:
        values["moe"] = {key: value for key, value in values["moe"].items() if key != "ep_size"}
        values["world_size"] = [list(pair) for pair in mixed_ranks]
    return fingerprint(values)


def training_facts(
    protocol: Protocol, world: World, dense_identity: str, unequal: str | None = None, world_size: int | None = None
) -> dict[str, Any]:
    """What `training_fingerprint` is made of; `world_size` is by default that of this process group."""
    values = protocol.model_dump(mode="json", include={"model", "threads", "dense", "moe", "train"})
    values["train"] = {key: value for key, value in values["train"].items() if key not in _WITHOUT_EFFECT}
    values |= _model(protocol) | {"data": world.sha256, "checkpoint": dense_identity}
    values["world_size"] = world_size or distributed.world_size()  # a rank's capacity is that of its share of the batch
    values |= _captions(world) | _order(protocol)
    if unequal:
        values["unequal"] = unequal
    return {**values, "numerics": NUMERICS}


def _captions(world: World) -> dict[str, str]:
    """What a .txt is, where it is not one caption a line, as it was for all data at first."""
    return {} if world.captions == "lines" else {"captions": world.captions}


def _order(protocol: Protocol) -> dict[str, Any]:
    """How the data are ordered, where it is not the usual way; a protocol's JSON leaves the usual one out."""
    chosen = protocol.data.model_dump(mode="json", include={"window", "order", "weights"})
    return {"order": chosen} if chosen else {}


def suite_fingerprint(suite: Suite, eval_root: Path) -> str:
    """Fingerprint of all that can change a suite's scores of given weights: its version, settings and data."""
    facts = {"suite": suite.info.name, "version": suite.info.version, "config": suite.config()}
    return fingerprint({**facts, "data": suite.sources(eval_root)})


def suite_fingerprints(
    suites: Mapping[str, Suite], eval_root: Path, left_out: Mapping[str, str] | None = None
) -> tuple[dict[str, str | None], dict[str, str]]:
    """Fingerprints of suites that can run, and why the others cannot; UserError if none has a headline score.

    `left_out`: why other suites, or sets of these, were left out before; it is part of the second answer.
    """
    found: dict[str, str | None] = {}
    skipped = dict(left_out or {})
    for name, suite in suites.items():
        try:
            found[name] = suite_fingerprint(suite, eval_root)
        except UserError as error:
            skipped[name] = str(error)
    if not any(suites[name].info.headline for name in found):
        alone = (
            f"--suite {','.join(found)} has no headline score, which a record needs; name a suite that has one, too."
        )
        raise UserError(" ".join(dict.fromkeys(skipped.values())) or alone)
    return found, skipped


def run_fingerprint(
    *,
    label: str,
    owner: str,
    code: str | None,
    config: Mapping[str, Any],
    steps: int,
    training: str | None,
    dense: str,
    seeds: tuple[int, int],
    world_size: int,
    tuned: Mapping[str, Any] | None = None,
) -> str:
    """Fingerprint of a run, `run_id` of its record. `owner`: package and version of the strategy; `dense`: a sha256.

    `tuned`: how the options were chosen, so that a row that is tuned again is another run.
    """
    facts = [label, owner, code, config, steps, training, dense, *seeds, world_size]
    return fingerprint([*facts, *([tuned] if tuned else [])])


def code_fingerprint(strategy: type[Strategy]) -> str:
    """Fingerprint of the code of a strategy.

    It covers the files of the class and its bases, and what these import from `upcycling` or from their own package.
    Imports, docstrings and comments do not count: a reworded comment does not change it, a changed constant does. Code
    that all strategies share (the network, the training, `upcycling.initialise`, `calibration`, `starting_model`) is
    covered by `NUMERICS` instead. Raises PluginError for a class that stands in no file.
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
    if not files:
        raise PluginError(f"{strategy.__name__}: its code is in no file, so a run of it would have no identity")
    return fingerprint(sorted(fingerprint(_bare_code(file.read_text(encoding="utf-8"))) for file in files.values()))


def _source_file(module: str) -> Path | None:
    """The module's file, found without importing it; None if there is no such module, or it has no Python source."""
    loaded, (package, _, leaf) = sys.modules.get(module), module.rpartition(".")
    file = getattr(loaded, "__file__", None)
    if loaded is None and (parent := _source_file(package) if package else None) is not None:
        beside = (parent.with_name(f"{leaf}.py"), parent.with_name(leaf) / "__init__.py")
        file = next((str(path) for path in beside if parent.name == "__init__.py" and path.is_file()), None)
    return Path(file) if file is not None and file.endswith(".py") else None


def _imports(file: Path, module: str) -> set[str]:
    """All names a file may import as modules, at its top or inside functions; some are attributes of a module."""
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


def _bare_code(source: str) -> Any:
    """The syntax tree of a file as nested lists, without imports, docstrings and comments; the same for each Python."""
    return _tree(_Bare().visit(ast.parse(source)))


def _tree(node: Any) -> Any:
    if isinstance(node, list):
        return [_tree(each) for each in node]
    if not isinstance(node, ast.AST):
        return repr(node)
    # Empty fields are left out: later versions of Python have some that earlier ones lack.
    fields = [
        [name, _tree(value)] for name, value in ast.iter_fields(node) if value not in (None, []) and name != "kind"
    ]
    return [type(node).__name__, fields]


class _Bare(ast.NodeTransformer):
    """Removes imports and strings that stand alone as statements."""

    def visit_Import(self, node: ast.Import) -> None:
        return None

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        return None

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if text else node
