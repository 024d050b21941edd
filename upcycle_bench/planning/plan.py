"""The plan of a run: strategy, data, seeds and fingerprints. To make one reads files and trains nothing.

plan = make_plan(registry, "cluster-aware", protocol, options={"tau": "0.8"}, init_seed=0, train_seed=0)
check_input(plan, results), check_strategy(plan)        # UserError before anything runs
run_id(plan, dense_digest)                              # equal for two runs of the same plan
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from upcycle_bench.assets import CHECKPOINTS
from upcycle_bench.data.local_world import local_world
from upcycle_bench.data.world import SYNTHETIC, World
from upcycle_bench.data.worlds import load_world
from upcycle_bench.model.config import describe
from upcycle_bench.model.pixels import agreed
from upcycle_bench.model.pretrained import Choices, Pretrained, find_pretrained
from upcycle_bench.model.upcyclable import require_configuration, require_upcyclable
from upcycle_bench.planning.estimate import training_steps, unequal_shape
from upcycle_bench.planning.fingerprint import (
    code_fingerprint,
    dense_recipe,
    recipe_path,
    run_fingerprint,
    suite_fingerprints,
    training_fingerprint,
)
from upcycle_bench.planning.registry import Entry, Registry
from upcycle_bench.planning.sound_sets import without_bad_sets
from upcycle_bench.planning.suites import make_suites
from upcycle_bench.protocol import MoE, Protocol
from upcycle_bench.record import TUNED, TunedPart
from upcycle_bench.strategy import Strategy, configure, resolve_moe
from upcycle_bench.suite import Suite
from upcycle_bench.util import distributed
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.files import file_sha256, require_writable
from upcycle_bench.util.progress import Reporter


@dataclass(frozen=True, kw_only=True)
class Paths:
    """What a user must give for a protocol with local data: shards, dense weights, folder of evaluation sets.

    `choices` is what the user says of the weights that they do not say themselves.
    """

    data: str | None = None
    checkpoint: str | None = None
    eval_data: Path | None = None
    choices: Choices = field(default_factory=Choices)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One run, with everything decided. `missing` names what a user must still give; fingerprints may then be None.

    `suites` can run; `skipped` says why another suite that is wanted, or a set of one of these (SUITE/SET), cannot.
    `options` are those that a user set; `tuned` says how the tuning rule chose them, None where it did not.
    `moe` is the protocol's MoE as the strategy changes it, and `steps` are those of its training, 0 if it has none;
    `unequal` says why a model of that shape does not compare, or is None. That is what the strategy declares: the
    record says it `as_built`.
    """

    protocol: Protocol
    entry: Entry
    strategy: Strategy
    moe: MoE
    unequal: str | None = None
    steps: int
    label: str
    suites: dict[str, Suite]
    init_seed: int
    train_seed: int
    world: World | None
    checkpoint: Pretrained | None
    dense_identity: str | None
    training_fingerprint: str | None
    suite_fingerprints: dict[str, str | None]
    skipped: dict[str, str]
    missing: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    tuned: TunedPart | None = None

    @property
    def row(self) -> str:
        """The name of its row in a table: its label, or the one that all tuned runs of the strategy have."""
        return f"{self.entry.name}{TUNED}" if self.tuned else self.label

    @property
    def division(self) -> Literal["closed", "open"]:
        """Runs compare if they are closed; an override, options, another cost or random data open a run."""
        off_defaults = self.label != self.entry.name and self.tuned is None
        if off_defaults or self.unequal or (self.world and self.world.name == SYNTHETIC):
            return "open"
        return self.protocol.division

    def as_built(self, unequal: str | None) -> Plan:
        """The plan of a run whose model turned out to compare, or not: `unequal` is what was measured on it."""
        if unequal == self.unequal or self.world is None or self.dense_identity is None:
            return self
        found = training_fingerprint(self.protocol, self.world, self.dense_identity, unequal)
        return replace(self, unequal=unequal, training_fingerprint=found)


def make_plan(
    registry: Registry,
    strategy_name: str,
    protocol: Protocol,
    *,
    options: Mapping[str, Any] | None = None,
    init_seed: int = 0,
    train_seed: int = 0,
    paths: Paths | None = None,
    suites: Sequence[str] = (),
    reporter: Reporter | None = None,
    world: World | None = None,
) -> Plan:
    """Find what the names stand for, check options and data, and compute the fingerprints.

    A world that the cache lacks is built or indexed, which `reporter` shows; `world` is one that `find_world` has found
    before. `suites`: names of the protocol's suites, optional ones included, or "all"; by default all that are not
    optional. Raises UserError, one line, for anything wrong.
    """
    paths = paths or Paths()
    entry = registry.get("strategy", strategy_name)
    usual = configure(entry.target, protocol.strategies.get(strategy_name, {}))
    strategy = configure(entry.target, {**protocol.strategies.get(strategy_name, {}), **(options or {})})
    moe, unequal = resolve_moe(strategy, protocol.moe), unequal_shape(protocol, strategy)
    wanted = make_suites(registry, protocol, suites)
    missing = _missing_data(protocol, paths)
    if missing:
        world = None
        if paths.data:  # what is wrong with these shards is told all the same
            local_world(paths.data, Path(), protocol.data, reporter)
    elif world is None:
        world = find_world(protocol, paths, reporter)
    checkpoint, dense_identity = _dense_model(protocol, paths, world)
    if protocol.dense.source == "checkpoint" and checkpoint is None:
        missing.append("--checkpoint (the dense open_clip model)")
    bad: dict[str, str] = {}
    if world and protocol.data.world == "local":
        wanted, bad = without_bad_sets(wanted, world.eval_root, reporter)
    fingerprints, skipped = suite_fingerprints(wanted, world.eval_root, bad) if world else (dict.fromkeys(wanted), bad)
    return Plan(
        protocol=protocol,
        entry=entry,
        strategy=strategy,
        moe=moe,
        unequal=unequal,
        steps=training_steps(protocol, strategy),
        label=label_of(strategy, usual),
        suites={name: suite for name, suite in wanted.items() if name not in skipped},
        init_seed=init_seed,
        train_seed=train_seed,
        world=world,
        checkpoint=checkpoint,
        dense_identity=dense_identity,
        training_fingerprint=(
            training_fingerprint(protocol, world, dense_identity, unequal) if world and dense_identity else None
        ),
        suite_fingerprints=fingerprints,
        skipped=skipped,
        missing=tuple(missing),
        options=dict(options or {}),
    )


def _missing_data(protocol: Protocol, paths: Paths) -> list[str]:
    """The options that a protocol with local data still needs."""
    if protocol.data.world != "local":
        return []
    needed = {
        "--data (webdataset shards to train on)": paths.data,
        "--eval-data (the folder with the evaluation sets)": paths.eval_data,
    }
    return [option for option, given in needed.items() if given is None]


def _dense_model(protocol: Protocol, paths: Paths, world: World | None) -> tuple[Pretrained | None, str | None]:
    """The dense weights and their identity.

    A protocol that trains its own has a recipe as identity, and no weights; both are None where something is not given.
    """
    if protocol.dense.source == "checkpoint":
        require_upcyclable(protocol.model, protocol.moe, trained=True)
        if paths.checkpoint is None and describe(protocol.model).folder is None:
            return None, None
        found = find_pretrained(protocol.model, paths.checkpoint, paths.choices)
        return found, found.identity()
    if paths.checkpoint is not None or paths.choices != Choices():
        raise UserError(
            f"protocol {protocol.name} brings its own dense model; --checkpoint, --pixels and --interpolate-positions "
            "go with clip-b32, clip-b16."
        )
    if protocol.dense.source == "shipped":
        return Pretrained(protocol.model, shipped_checkpoint(protocol), "shipped"), protocol.dense.shipped
    require_configuration(protocol.model, trained=True)
    return None, None if world is None else dense_recipe(protocol, world)


def find_world(protocol: Protocol, paths: Paths, reporter: Reporter | None = None) -> World:
    """The protocol's own world, built first if the cache lacks it; for a protocol with local data, that of `paths`.

    Such a protocol needs `paths.data`; `paths.eval_data` only where something is evaluated. Raises UserError for paths
    that the protocol does not take.
    """
    if protocol.data.world == "local":
        assert paths.data is not None
        return local_world(paths.data, paths.eval_data or Path(), protocol.data, reporter)
    if paths.data is not None or paths.eval_data is not None:
        raise UserError(
            f"protocol {protocol.name} brings its own data; --data and --eval-data go with clip-b32, clip-b16."
        )
    return load_world(protocol.data.world, protocol.data.seed, reporter)


def shipped_checkpoint(protocol: Protocol) -> Path:
    """The checkpoint in the package whose sha256 the protocol names; UserError if it is missing or another one."""
    path = CHECKPOINTS / f"{protocol.model}.safetensors"
    if not path.is_file() or file_sha256(path) != protocol.dense.shipped:
        raise UserError(
            f"protocol {protocol.name}: {path} is not the checkpoint it names (sha256 {protocol.dense.shipped[:16]}); "
            "install upcycle-bench again."
        )
    return path


def label_of(strategy: Strategy, usual: Strategy) -> str:
    """`cluster-aware`, or `cluster-aware[tau=0.8]` where options differ from those of the protocol (`usual`)."""
    config, defaults = strategy.config(), usual.config()
    changed = [f"{key}={value}" for key, value in config.items() if value != defaults[key]]
    return strategy.info.name + (f"[{','.join(changed)}]" if changed else "")


def dense_source(plan: Plan) -> Pretrained:
    """The dense weights of a plan, or where they will be after their training."""
    if plan.checkpoint is not None:
        return plan.checkpoint
    model = describe(plan.protocol.model)
    return Pretrained(
        model.name, recipe_path(str(plan.dense_identity)), "trained here", agreed([("", model.preprocess)])
    )


def check_input(plan: Plan, results: Path) -> None:
    """UserError for what is wrong with every strategy: missing paths, a folder that cannot be written, ranks."""
    check_ready(plan)
    require_writable(results, "--results")


def check_ready(plan: Plan) -> None:
    """The part of `check_input` for commands that write no results."""
    if plan.missing:
        raise UserError(f"protocol {plan.protocol.name} needs {', '.join(plan.missing)}.")
    distributed.check_world(plan.protocol.train.schedule.batch_size, plan.moe.ep_size)


def check_strategy(plan: Plan) -> None:
    """UserError for what this strategy cannot do with these settings, or needs and this machine lacks."""
    if plan.strategy.shares_parameters and plan.moe.ep_size > 1:
        raise UserError(
            f"{plan.label}: its experts share parameters, which expert parallelism would spread over processes; "
            "run it with --set moe.ep_size=1."
        )
    plan.strategy.check()


def run_id(plan: Plan, dense_digest: str) -> str:
    """Fingerprint of a run: strategy, its code and configuration, protocol, dense weights, seeds, number of ranks."""
    return run_fingerprint(
        label=plan.row,
        owner=plan.entry.owner,
        code=code_fingerprint(type(plan.strategy)),
        config=plan.strategy.config(),
        steps=plan.steps,
        training=plan.training_fingerprint,
        dense=dense_digest,
        seeds=(plan.init_seed, plan.train_seed),
        world_size=distributed.world_size(),
        tuned=plan.tuned.model_dump(mode="json") if plan.tuned else None,
    )
