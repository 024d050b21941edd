"""The plan of a run: what will run, on what, under which fingerprints. Reads the disk, trains nothing.

plan = make_plan(registry, "cluster-aware", protocol, options={"tau": "0.8"}, init_seed=0, train_seed=0, paths=Paths())
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError

from upcycle_bench import costs, distributed, engine
from upcycle_bench.data import expand_shards, shards_digest
from upcycle_bench.dense import model_config
from upcycle_bench.errors import UserError, first_problem, unknown
from upcycle_bench.files import file_sha256
from upcycle_bench.progress import Reporter
from upcycle_bench.protocol import MoE, Protocol
from upcycle_bench.registry import Entry, Registry
from upcycle_bench.strategy import Strategy, configure, resolve_moe
from upcycle_bench.suite import Suite
from upcycle_bench.worlds import World, load_world

# Raise it when the same protocol, data and seeds would give other weights: it is part of the training fingerprint.
NUMERICS = 2

# What cannot change the weights, beyond rounding that a resumed or differently logged run does not see.
_WITHOUT_EFFECT = {"log_every", "checkpoint_every"}


@dataclass(frozen=True, kw_only=True)
class Paths:
    """What a protocol with local data needs from the command line."""

    data: str | None = None
    checkpoint: Path | None = None
    eval_data: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One run, resolved. `missing` names what must still be given before it can run; fingerprints are then None.

    `suites` are those that are wanted and can run, `skipped` says why the others cannot.
    `moe` is what the strategy makes of the protocol's; `unequal` says why that does not compare, if it does not.
    """

    protocol: Protocol
    entry: Entry
    strategy: Strategy
    moe: MoE
    unequal: str | None = None
    label: str
    suites: dict[str, Suite]
    init_seed: int
    train_seed: int
    world: World | None
    checkpoint: Path | None
    dense_identity: str | None
    training_fingerprint: str | None
    suite_fingerprints: dict[str, str | None]
    skipped: dict[str, str]
    missing: tuple[str, ...]

    @property
    def division(self) -> Literal["closed", "open"]:
        """Only closed runs compare; an override opens it, and so does a shape of another cost."""
        return "open" if self.unequal else self.protocol.division


def fingerprint(value: Any) -> str:
    """sha256 of the value's canonical JSON, 16 hex digits of it."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def make_plan(
    registry: Registry,
    strategy_name: str,
    protocol: Protocol,
    *,
    options: dict[str, str] | None = None,
    init_seed: int = 0,
    train_seed: int = 0,
    paths: Paths | None = None,
    suites: Sequence[str] = (),
    reporter: Reporter | None = None,
) -> Plan:
    """Resolve names, options, data and checkpoint; a world that the cache lacks is built, which `reporter` shows.

    `suites`: names of the protocol's suites, optional ones included, or "all"; nothing: those that are not optional.

    Raises UserError, one line, for anything that is wrong.
    """
    paths = paths or Paths()
    entry = registry.get("strategy", strategy_name)
    usual = configure(entry.target, protocol.strategies.get(strategy_name, {}))
    strategy = configure(entry.target, protocol.strategies.get(strategy_name, {}) | (options or {}))
    moe, unequal = resolve_moe(strategy, protocol.moe), costs.unequal_shape(protocol, strategy)
    wanted = make_suites(registry, protocol, suites)
    missing = []
    dense_identity, checkpoint = None, paths.checkpoint
    if protocol.data.world == "local":
        if paths.data is None:
            missing.append("--data (webdataset shards to train on)")
        if paths.eval_data is None:
            missing.append("--eval-data (the folder with the evaluation sets)")
    world = None if missing else find_world(protocol, paths, reporter)
    if protocol.dense.source == "checkpoint":
        if paths.checkpoint is None:
            missing.append("--checkpoint (the dense open_clip model)")
        elif not paths.checkpoint.is_file():
            raise UserError(f"--checkpoint {paths.checkpoint}: no such file; give an open_clip state dict.")
        else:
            dense_identity = file_sha256(paths.checkpoint)
    elif paths.checkpoint is not None:
        raise UserError(
            f"protocol {protocol.name} brings its own dense model; --checkpoint goes with clip-b32, clip-b16."
        )
    elif protocol.dense.source == "shipped":
        checkpoint, dense_identity = shipped_checkpoint(protocol), protocol.dense.shipped
    elif world is not None:
        dense_identity = dense_recipe(protocol, world)
    fingerprints, skipped = suite_fingerprints(wanted, world.eval_root) if world else (dict.fromkeys(wanted), {})
    resolved = world is not None and dense_identity is not None
    return Plan(
        protocol=protocol,
        entry=entry,
        strategy=strategy,
        moe=moe,
        unequal=unequal,
        label=_label(strategy, usual),
        suites={name: suite for name, suite in wanted.items() if name not in skipped},
        init_seed=init_seed,
        train_seed=train_seed,
        world=world,
        checkpoint=checkpoint,
        dense_identity=dense_identity,
        training_fingerprint=_training_fingerprint(protocol, world, dense_identity, unequal) if resolved else None,
        suite_fingerprints=fingerprints,
        skipped=skipped,
        missing=tuple(missing),
    )


def find_world(protocol: Protocol, paths: Paths, reporter: Reporter | None = None) -> World:
    """The protocol's own world, built first if the cache lacks it, or for local data what `paths` name.

    Local data must be named; their evaluation sets need not be where nothing is evaluated.
    """
    if protocol.data.world == "local":
        assert paths.data is not None
        shards = expand_shards(paths.data)
        return World("local", shards, paths.eval_data or Path(), shards_digest(shards))
    if paths.data is not None or paths.eval_data is not None:
        raise UserError(
            f"protocol {protocol.name} brings its own data; --data and --eval-data go with clip-b32, clip-b16."
        )
    return load_world(protocol.data.world, protocol.data.seed, reporter)


def shipped_checkpoint(protocol: Protocol) -> Path:
    """The checkpoint in the package whose sha256 the protocol names; UserError if it is another or not there."""
    path = Path(__file__).parent / "checkpoints" / f"{protocol.model}.safetensors"
    if not path.is_file() or file_sha256(path) != protocol.dense.shipped:
        raise UserError(
            f"protocol {protocol.name}: {path} is not the checkpoint it names (sha256 {protocol.dense.shipped[:16]}); "
            "install upcycle-bench again."
        )
    return path


def dense_recipe(protocol: Protocol, world: World) -> str:
    """Identity of a dense model that is trained on the spot: everything that makes it, numerics included."""
    values = protocol.model_dump(mode="json", include={"model", "threads", "dense"})
    values["dense"] = {key: value for key, value in values["dense"].items() if key not in ("source", "shipped")}
    values["made by"] = [torch.__version__, engine.choose_device().type, distributed.world_size()]
    return fingerprint({**values, "config": model_config(protocol.model), "data": world.sha256, "numerics": NUMERICS})


def _training_fingerprint(
    protocol: Protocol, world: World | None, dense_identity: str | None, unequal: str | None
) -> str:
    assert world is not None
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


def make_suites(registry: Registry, protocol: Protocol, names: Sequence[str] = ()) -> dict[str, Suite]:
    """The suites of those names as the protocol sets them, in its order; see `make_plan`."""
    every = protocol.suites | protocol.optional_suites
    if "all" in names and len(names) > 1:
        raise UserError("--suite: 'all' stands alone; it names every suite of the protocol.")
    for name in names:
        if name != "all" and name not in every:
            raise unknown(f"suite of protocol {protocol.name}", name, every)
    chosen = every if "all" in names else names or protocol.suites
    return {name: _suite(registry, name, settings) for name, settings in every.items() if name in chosen}


def _suite(registry: Registry, name: str, settings: dict[str, Any]) -> Suite:
    target = registry.get("suite", name).target
    for key in settings:
        if key not in (known := [spec.name for spec in fields(target)]):
            raise unknown(f"setting of suite {name}", key, known)
    try:
        suite: Suite = target(
            **{key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
        )
    except ValidationError as error:
        where, what = first_problem(error)
        raise UserError(f"protocol: suites.{'.'.join(filter(None, (name, where)))}: {what}.") from None
    return suite


def _label(strategy: Strategy, usual: Strategy) -> str:
    """`cluster-aware`, or `cluster-aware[tau=0.8]` where the configuration is not the protocol's usual one."""
    config, defaults = strategy.config(), usual.config()
    changed = [f"{key}={value}" for key, value in config.items() if value != defaults[key]]
    return strategy.info.name + (f"[{','.join(changed)}]" if changed else "")
