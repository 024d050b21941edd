"""Checks of what a run says it is: fingerprints and the run's id computed again, the protocol and the strategy as here.

for what in training(sent, here): ...            # a line for each fault; Unchecked for what is not known here

A fingerprint is a hash of what the record itself holds (`planning.fingerprint`), so a setting, a seed or a label that
was changed later gives another one. Of suites it covers the evaluation sets, which must be on this machine.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from upcycle_bench.data.world import SYNTHETIC, World
from upcycle_bench.planning.estimate import unequal_shape
from upcycle_bench.planning.fingerprint import (
    NUMERICS,
    code_fingerprint,
    dense_recipe,
    facts_fingerprint,
    run_fingerprint,
    suite_fingerprint,
    training_facts,
)
from upcycle_bench.planning.identity import different, mixed_ranks
from upcycle_bench.planning.plan import label_of
from upcycle_bench.protocol import Protocol, load_protocol
from upcycle_bench.record import TUNED
from upcycle_bench.reporting.sampled_scores import suite_of
from upcycle_bench.reporting.sent import Here, Sent, Unchecked, Warned
from upcycle_bench.strategy import Strategy, configure
from upcycle_bench.util.errors import UserError, one_line

# Of a protocol: what says something of it, names suites that a run need not have, or changes no bit.
NOT_COMPARED = ("name", "summary", "sources", "optional_suites", "overrides", "tuning")
BUILDS = ("", "+cpu", "+cu118", "+cu121", "+cu124", "+cu126", "+cu128", "+cu130")  # of torch, of records without one


def protocol(sent: Sent, here: Here) -> Iterator[str]:
    """The resolved protocol is the one of that name, with the overrides that the record says; its division is right."""
    part = sent.record.protocol
    if sent.protocol is None:
        yield "what the record holds is no protocol of this version"
        return
    if part.name != sent.protocol.name or part.overrides != sent.protocol.overrides:
        yield "name or overrides are not those of the resolved protocol"
    off_defaults = sent.record.strategy.off_defaults
    reason = part.overrides or part.unequal or off_defaults or sent.record.hashes.data == SYNTHETIC
    if off_defaults and part.division == "closed":
        yield Warned("it is from before options opened a run, and says closed; tables count it as open")
    elif (part.division == "open") != bool(reason):
        yield f"the division is {part.division}, and overrides, cost and data say the other one"
    entry = here.registry.protocols.get(part.name)
    if entry is None:
        yield Unchecked(f"protocol {part.name} is not installed here")
        return
    try:
        ours = load_protocol(entry.target, list(part.overrides))
    except UserError as error:
        yield f"its overrides do not go with protocol {part.name}: {error}"
        return
    if sent.protocol.validation is None:  # made before there was any
        ours = ours.model_copy(update={"validation": None})
    if others := different(_compared(ours, part.suite_fingerprints), _compared(sent.protocol, part.suite_fingerprints)):
        yield f"it is not protocol {part.name} with these overrides: {_few(others)} differ"


def _compared(protocol: Protocol, ran: Container[str]) -> dict[str, Any]:
    """The settings of a protocol that a run can feel; `ran`: its suites."""
    every = protocol.model_dump(mode="json")
    optional = {name: settings for name, settings in protocol.optional_suites.items() if name in ran}
    return {key: value for key, value in every.items() if key not in NOT_COMPARED} | {"optional": optional}


def strategy(sent: Sent, here: Here) -> Iterator[str]:
    """Label, options, status and MoE settings are those of the strategy of that name; its code is the one here."""
    part = sent.record.strategy
    found = strategy_of(sent, here)
    if isinstance(found, str):
        yield Unchecked(found)
        return
    assert sent.protocol is not None
    info, usual = found.info, configure(type(found), sent.protocol.strategies.get(part.name, {}))
    label = f"{part.name}{TUNED}" if part.tuned else label_of(found, usual)
    if part.label != label:
        yield f"the label is {part.label}, options and protocol give {label}"
    for name in ("status", "reconstructed", "footing", "paper"):
        if getattr(part, name) != getattr(info, name):
            yield f"{name} is not that of {part.name}, {getattr(info, name)!r}"
    try:
        own = found.moe_settings(sent.protocol.moe)
    except UserError as error:
        yield f"moe: {one_line(error)}"
        return
    if part.moe != (own.model_dump(mode="json") if own != sent.protocol.moe else None):
        yield "its MoE settings are not those of the strategy"
    compares = sent.record.protocol.unequal is None and not sent.foreign_model
    if compares and (more := unequal_shape(sent.protocol, found)):
        yield f"it belongs in the open division: {more}"
    if part.code != code_fingerprint(type(found)):
        yield Unchecked(f"the code of {part.name} is not the one here, {code_fingerprint(type(found))}")


def strategy_of(sent: Sent, here: Here) -> Strategy | str:
    """The strategy with the record's options, or why it cannot be had here."""
    part = sent.record.strategy
    entry = here.registry.strategies.get(part.name)
    if entry is None or sent.protocol is None:
        return f"strategy {part.name} of {part.distribution} is not installed here"
    if (entry.distribution, entry.version) != (part.distribution, part.version):
        return f"strategy {part.name} is of {part.distribution} {part.version}, here of {entry.owner}"
    try:
        return with_config(entry.target, part.config)
    except UserError as error:
        return f"strategy {part.name} here refuses the record's options: {error}"


def with_config(strategy: type[Strategy], config: Mapping[str, Any]) -> Strategy:
    """The strategy with options as a record has them; UserError for some that it refuses."""
    return configure(
        strategy, {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}
    )


def training(sent: Sent, here: Here) -> Iterator[str]:
    """The training fingerprint again, from protocol, data, dense model and ranks."""
    record, said = sent.record, sent.record.protocol.training_fingerprint
    if record.cost is None or sent.protocol is None:
        return
    if sent.foreign_model:
        yield Unchecked(sent.foreign_model)
        return
    shared = record.protocol.shared_fingerprint
    if shared is not None and (record.protocol.unequal is None or shared not in fingerprints(sent, None)):
        yield f"the shared fingerprint is {shared}, which is not that of runs of equal cost"
    if record.protocol.unequal is None and said in fingerprints(sent, None):
        return
    if said in fingerprints(sent, record.protocol.unequal):
        return
    source, sessions = sent.protocol.dense.source, record.sessions or []
    own = source == "pretrain"
    if own and ("torch_build" not in record.environment or len(sessions) > 1 or "training" in record.environment):
        yield Unchecked("the record does not say which machine trained the dense model, so its recipe is not known")
    else:
        yield f"the training fingerprint is {said}, protocol, data, dense model and ranks give another one"


def fingerprints(sent: Sent, unequal: str | None) -> Iterator[str]:
    """The training fingerprints that this record may have: of each way its dense model may have been made."""
    record, made = sent.record, sent.protocol
    assert made is not None and record.cost is not None
    world = World(made.data.world, (), Path(), record.hashes.data, made.data.captions_of_shards)
    ranks = mixed_ranks(record.sessions or [])
    for dense in _dense_models(sent, made, world):
        facts = training_facts(made, world, dense, unequal, record.cost.world_size)
        for numerics in range(NUMERICS, 0, -1):
            yield facts_fingerprint({**facts, "numerics": numerics}, ranks)


def _dense_models(sent: Sent, made: Protocol, world: World) -> Iterator[str]:
    """Identities of the dense model: its file's, or the recipe's on the machines on which it may have been trained."""
    if made.dense.source != "pretrain":
        yield sent.record.hashes.dense
        return
    assert sent.record.cost is not None
    facts = sent.record.environment
    packages = facts.get("packages")
    version = str(packages.get("torch") if isinstance(packages, Mapping) else None)
    builds = [str(facts.get("torch_build")), torch.__version__, *(version + build for build in BUILDS)]
    for build in dict.fromkeys(builds):
        for device in ("cpu", "cuda"):
            for more in ([], ["plain"]):
                yield dense_recipe(made, world, [build, device, sent.record.cost.world_size, *more])


def run_id(sent: Sent, here: Here) -> Iterator[str]:
    """The run's id again, from label, package, code, options, steps, training, dense model, seeds and ranks."""
    record, part = sent.record, sent.record.strategy
    if record.cost is None:
        return
    if mixed_ranks(record.sessions or []):
        yield Unchecked("its sessions had several numbers of ranks, and the record does not say those of its plan")
        return
    declared = [record.protocol.training_fingerprint]
    if record.protocol.unequal and sent.protocol is not None and not sent.foreign_model:
        declared += fingerprints(sent, None)  # a run is named before its model, and what that costs, is known
    owner = f"{part.distribution} {part.version}".strip()
    for fingerprint in declared:
        found = run_fingerprint(
            label=part.label,
            owner=owner,
            code=part.code,
            config=part.config,
            steps=sent.steps,
            training=fingerprint,
            dense=record.hashes.dense,
            seeds=(record.seeds.init, record.seeds.train),
            world_size=record.cost.world_size,
            tuned=part.tuned.model_dump(mode="json") if part.tuned else None,
        )
        if found == record.run_id:
            return
    yield f"the run's id is {record.run_id}; strategy, options, steps, seeds and ranks of the record give {found}"


def suites(sent: Sent, here: Here) -> Iterator[str]:
    """The fingerprint of each suite again, where its evaluation sets are on this machine."""
    record = sent.record
    scored = {score.suite for score in record.scores}
    if extra := scored - record.protocol.suite_fingerprints.keys():
        yield f"scores of {_few(extra)}, which has no fingerprint"
    skipped = {key.partition("/")[0] for key in record.skipped}
    if record.status == "ok" and (extra := record.protocol.suite_fingerprints.keys() - scored - skipped):
        yield f"a fingerprint of {_few(extra)}, which has no score"
    root = _eval_root(sent, here)
    for name, said in record.protocol.suite_fingerprints.items():
        suite = suite_of(sent, here, name)
        if isinstance(suite, str) or isinstance(root, str):
            yield Unchecked(f"{name}: {suite if isinstance(suite, str) else root}")
            continue
        parts = {key.partition("/")[2] for key in record.skipped if key.startswith(f"{name}/")}
        left_out = parts & {*suite.datasets()}  # before the evaluation, or in it: only then the suite is another one
        try:
            found = [
                suite_fingerprint(each, root) for each in [suite, *([suite.without(left_out)] if left_out else [])]
            ]
        except (UserError, OSError) as error:
            yield Unchecked(f"{name}: {one_line(error)}")
            continue
        if said not in found:
            yield f"{name}: the fingerprint is {said}, settings and sets of the record give {found[-1]} here"


def hashes(sent: Sent, here: Here) -> Iterator[str]:
    """A run that ended has the sha256 of its weights and of its dense model, which no other run shares by chance."""
    for name in ("weights", "dense") if sent.record.status == "ok" else ():
        said = getattr(sent.record.hashes, name)
        if said is None or not re.fullmatch("[0-9a-f]{64}", said):
            yield f"hashes.{name} is {said}, no sha256"


def _eval_root(sent: Sent, here: Here) -> Path | str:
    """The folder of the run's evaluation sets, or why it is not known here."""
    if sent.protocol is None:
        return "the record holds no protocol"
    data = sent.protocol.data
    if data.world == "local":
        return here.eval_data or "the evaluation sets are not here; name their folder by --eval-data"
    world = here.world(data.world, data.seed)
    if world is None:
        return f"world {data.world} is not in this cache; upcycle-bench data build {data.world} builds it"
    if world.sha256 != sent.record.hashes.data:
        return f"world {data.world} in this cache has other content ({world.sha256[:8]}) than the record's"
    return world.eval_root


def _few(names: Any) -> str:
    """A few of many names."""
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
