"""Run again what a record says, and compare: equal to the bit, or by how much each score differs.

    plan = plan_of(sent, registry, given, reporter)         # strategy, options, protocol, seeds: of the record
    said = differs_here(sent.record, plan)                  # ["packages.torch 2.14.1 (record: 2.13.0)"]
    path = run(plan, results, reporter, fresh=True)         # upcycle_bench.run
    found = compare_again(sent, open_whole(path), here)     # found.equal, found.inside

Other versions, devices and numbers of ranks round otherwise, and a training carries that on. So scores are then held
against the record's own intervals over samples.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from upcycle_bench.data.worlds import built_world
from upcycle_bench.model import backends
from upcycle_bench.model.pixels import parsed
from upcycle_bench.model.pretrained import Choices
from upcycle_bench.planning.fingerprint import code_fingerprint
from upcycle_bench.planning.plan import Paths, Plan, dense_source, make_plan
from upcycle_bench.planning.registry import Registry
from upcycle_bench.protocol import flatten
from upcycle_bench.record import Record
from upcycle_bench.reporting.difference import PairedScore, compare
from upcycle_bench.reporting.sent import Here, Sent
from upcycle_bench.util import distributed
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.progress import Reporter

EQUAL = 1e-9  # a score that comes from equal weights differs by less
NO_MATTER = ("git", "memory_bytes", "platform", "cores", "training")  # of the environment: they round nothing


@dataclass(frozen=True)
class Again:
    """What came of it. `inside`: for each score that judges, whether it lies in the record's interval over samples.

    missing: scores of the record that the run here has not made.
    """

    same_weights: bool
    scores: list[PairedScore]
    inside: list[bool]
    missing: list[str] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        """Whether weights and all scores are the same."""
        return self.same_weights and not self.missing and all(abs(score.difference) < EQUAL for score in self.scores)

    @property
    def reproduced(self) -> bool:
        """Whether it is equal, or every score lies inside."""
        return self.equal or (not self.missing and all(self.inside))

    def facts(self) -> dict[str, Any]:
        """All of it as JSON."""
        rows = [asdict(score) | {"inside": inside} for score, inside in zip(self.scores, self.inside, strict=True)]
        found = {"equal": self.equal, "reproduced": self.reproduced, "same_weights": self.same_weights}
        return {**found, "missing": self.missing, "scores": rows}


def plan_of(sent: Sent, registry: Registry, given: Paths, reporter: Reporter, build: bool = True) -> Plan:
    """The plan of the record's run, with the protocol that it resolved; paths that are not given are its command's.

    A world that the cache lacks is built, or, where `build` is false, refused. UserError for a run that failed, a
    protocol or strategy that is not known here, and data or dense weights that are not the record's.
    """
    record = sent.record
    if record.status != "ok":
        raise UserError(f"record {sent.path}: its run failed, so there is nothing to reproduce ({record.reason}).")
    if sent.protocol is None:
        raise UserError(f"record {sent.path}: its protocol is of another version; use the version that wrote it.")
    data = sent.protocol.data
    if not build and data.world != "local" and built_world(data.world, data.seed) is None:
        raise UserError(
            f"world {data.world} is not in this cache: upcycle-bench data build {data.world} builds it, or leave out "
            "--dry-run."
        )
    plan = make_plan(
        registry,
        record.strategy.name,
        sent.protocol,
        options={key: tuple(v) if isinstance(v, list) else v for key, v in record.strategy.config.items()},
        init_seed=record.seeds.init,
        train_seed=record.seeds.train,
        paths=_paths(record.command, given),
        suites=list(record.protocol.suite_fingerprints),
        reporter=reporter,
    )
    plan = replace(plan, tuned=record.strategy.tuned)
    if plan.world is not None and plan.world.sha256 != record.hashes.data:
        where = "name the record's by --data" if plan.world.option else "its world has other content here"
        raise UserError(f"record {sent.path}: the training data here are not its own; {where}.")
    given_dense = sent.protocol.dense.source == "checkpoint" and not plan.missing
    if given_dense and dense_source(plan).identity() != record.hashes.dense:
        raise UserError(f"record {sent.path}: the dense weights are not its own; name those by --checkpoint.")
    return plan


def _paths(command: Sequence[str], given: Paths) -> Paths:
    """What was given here, and else in the command of the record."""
    data, checkpoint, sets = (_last(command, option) for option in ("--data", "--checkpoint", "--eval-data"))
    choices = Choices(parsed(_values(command, "--pixels")), "--interpolate-positions" in command)
    return replace(
        given,
        data=given.data or data,
        checkpoint=given.checkpoint or checkpoint,
        eval_data=given.eval_data or (Path(sets) if sets else None),
        choices=choices,
    )


def _values(command: Sequence[str], option: str) -> list[str]:
    """The values of an option in a command: `--data X` and `--data=X`."""
    spaced = [value for name, value in itertools.pairwise(command) if name == option]
    return spaced + [text.partition("=")[2] for text in command if text.startswith(f"{option}=")]


def _last(command: Sequence[str], option: str) -> str | None:
    return next(reversed(_values(command, option)), None)


def differs_here(record: Record, plan: Plan) -> list[str]:
    """What is not as it was where the record's weights were trained: code, versions, device, ranks."""
    trained = record.environment.get("training")
    theirs: Any = trained.get("environment") if isinstance(trained, dict) else record.environment
    ours = backends.machine(distributed.choose_device())
    mine, other = (_rounding(facts) for facts in (ours, theirs))
    names = [name for name in {**mine, **other} if name in other and mine.get(name) != other[name]]
    said = [f"{name} {mine.get(name)} (record: {other[name]})" for name in names]
    if record.cost is not None and record.cost.world_size != (ranks := distributed.world_size()):
        said.append(f"ranks {ranks} (record: {record.cost.world_size})")
    if record.strategy.code != code_fingerprint(type(plan.strategy)):
        said.append("code of the strategy")
    if record.protocol.training_fingerprint not in (plan.training_fingerprint, None) and not record.protocol.unequal:
        said.append("training fingerprint")
    return said


def _rounding(environment: Any) -> dict[str, Any]:
    facts = environment if isinstance(environment, dict) else {}
    return flatten({key: value for key, value in facts.items() if key not in NO_MATTER})


def compare_again(sent: Sent, again: Sent, here: Here) -> Again:
    """Both records' weights and judging scores."""
    weights = [each.record.hashes.weights for each in (sent, again)]
    intervals = {(each.suite, each.dataset, each.metric): each.interval for each in sent.record.scores}
    scores = [score for score in compare(sent, again, here).scores if score.higher_is_better is not None]
    inside = []
    for score in scores:
        interval = intervals[score.suite, score.dataset, score.metric]
        within = interval is not None and interval[0] <= score.other <= interval[1]
        inside.append(within or abs(score.difference) < EQUAL)
    made = {(score.suite, score.dataset, score.metric) for score in scores}
    judging = [score for score in sent.record.scores if score.higher_is_better is not None]
    missing = [
        f"{score.suite}/{score.dataset}/{score.metric}"
        for score in judging
        if (score.suite, score.dataset, score.metric) not in made
    ]
    return Again(weights[0] is not None and weights[0] == weights[1], scores, inside, missing)
