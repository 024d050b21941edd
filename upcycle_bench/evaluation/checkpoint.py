"""Score any checkpoint: by the suites of a protocol, as a run would, or on every valid set in a folder.

    facts = score_checkpoint(registry, "run.json", None, None, None, [], reporter)       # what `evaluate` writes

A checkpoint is one of three: a file of ours, which names its model; the record of a run, whose weights are in the
cache; weights of an open_clip model, given with its name.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from upcycle_bench import record
from upcycle_bench.data import evalset_check
from upcycle_bench.evaluation.score import headlines_of, score, scores_of, skips_of
from upcycle_bench.model import backends, checkpoint_file, weights
from upcycle_bench.model.clip import Clip
from upcycle_bench.model.config import HUB, LOCAL
from upcycle_bench.model.moe import parameter_counts
from upcycle_bench.model.pretrained import Choices, find_pretrained
from upcycle_bench.planning.fingerprint import suite_fingerprints
from upcycle_bench.planning.plan import Paths, find_world
from upcycle_bench.planning.registry import Registry
from upcycle_bench.planning.sound_sets import without_bad_sets
from upcycle_bench.planning.suites import make_suites
from upcycle_bench.protocol import load_protocol
from upcycle_bench.suite import OnlyNamed, Suite
from upcycle_bench.training import session
from upcycle_bench.util.errors import UserError, first_problem
from upcycle_bench.util.files import file_sha256
from upcycle_bench.util.meter import Meter
from upcycle_bench.util.progress import Reporter


@dataclass(frozen=True)
class Checkpoint:
    """A model that can be scored.

    `identity`: the key of its cached features; for an open_clip file, which does not name its model, it holds the name.
    `file`: where it stands, if it is a file of ours. `protocol` and `overrides`: those of the run that made it, where a
    record names them.
    """

    clip: Clip
    sha256: str
    identity: str
    file: Path | None = None
    protocol: str | None = None
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Chosen:
    """Suites by name, the folder of their sets, and why others do not run.

    `protocol`: None for the sets of a user's folder; `threads`: of the CPU, None to leave them as they are.
    """

    protocol: str | None
    root: Path
    suites: dict[str, Suite]
    skipped: dict[str, str] = field(default_factory=dict)
    threads: int | None = None


def score_checkpoint(
    registry: Registry,
    checkpoint: str,
    model_name: str | None,
    protocol: str | None,
    data: Path | None,
    names: Sequence[str],
    reporter: Reporter,
    choices: Choices | None = None,
) -> dict[str, Any]:
    """Find the model and its suites (which may build a world), and score; the facts, ready for JSON.

    checkpoint: a file of ours or a record; with `model_name` a file or a tag of that open_clip model.
    protocol: whose suites; None: with `data` every valid set in that folder, else the protocol of the record, or lab.
    names: of suites; empty: those that are not optional, or with `data` alone zero-shot.
    Raises UserError for what cannot be loaded, found or scored.
    """
    for suite in names:
        if suite != "all":
            registry.get("suite", suite)  # an unknown name is an error before anything is loaded
    with reporter.task(f"loading {checkpoint}"):
        model = _load_open_clip(checkpoint, model_name, choices or Choices()) or _load(Path(checkpoint))
    model.clip.model.float()  # suites need float32; a file may hold half precision
    if protocol is not None:
        found = _of_protocol(registry, protocol, (), data, names, reporter)
    elif data is not None:
        found = _of_folder(registry, data, names, reporter)
    else:
        found = _of_protocol(registry, _usual_protocol(checkpoint, model), model.overrides, None, names, reporter)
    fingerprints, skipped = suite_fingerprints(found.suites, found.root, found.skipped)
    with session.open_session(found.threads or torch.get_num_threads(), trains=False) as device:
        meter = Meter(device)
        suites = {key: suite for key, suite in found.suites.items() if key not in skipped}
        try:
            outcome, certificate = score(suites, found.root, model.clip, meter, reporter, model.identity, model.file)
        except UserError:
            raise
        except Exception as error:  # every suite raised, and `score` raises the first error
            raise UserError(f"no suite could run: {type(error).__name__}: {' '.join(str(error).split())}") from error
        surroundings = backends.machine(device)
    scores, failed = scores_of(outcome), skips_of(outcome)
    if found.protocol is None:  # suites are called SUITE/SET, and no set of a user's is a headline
        scores = [score | {"suite": score["suite"].partition("/")[0], "headline": ""} for score in scores]
    total, active = parameter_counts(model.clip.model)
    return {
        "checkpoint": checkpoint,
        "model": model.clip.name,
        "sha256": model.sha256,
        "pixels": model.clip.pixels,
        "interpolated": dict(model.clip.interpolated),
        "parameters_total": total,
        "parameters_active": active,
        "protocol": found.protocol,
        "data": str(data) if data else None,
        "suite_fingerprints": {key: value for key, value in fingerprints.items() if key not in failed},
        "scores": scores,
        "headlines": headlines_of(scores),
        "skipped": skipped | failed,
        "suite_notes": {key: result.notes for key, result in outcome.items() if result.notes},
        "certificate": certificate.model_dump(mode="json") if certificate else None,
        "seconds": meter.phases["evaluate"].seconds,
        "environment": surroundings,
    }


def _usual_protocol(checkpoint: str, model: Checkpoint) -> str:
    """The protocol where none was given. It is printed before its data are built, which may take a download."""
    name = model.protocol or "lab"
    why = "the record's" if model.protocol else f"the default, since {checkpoint} does not say how it was trained"
    print(f"protocol {name}: {why}; --protocol names another, --data scores your own sets", file=sys.stderr)
    return name


def _of_protocol(
    registry: Registry,
    name: str,
    overrides: Sequence[str],
    data: Path | None,
    names: Sequence[str],
    reporter: Reporter,
) -> Chosen:
    """The protocol's suites on its own world, as in a run, or on sets of the same names in `data`."""
    settings = load_protocol(registry.get("protocol", name).target, list(overrides))
    suites = make_suites(registry, settings, names)
    if data is None and settings.data.world == "local":
        raise UserError(f"protocol {name} has no data of its own; give --data, the folder with its evaluation sets.")
    if data is None:
        return Chosen(name, find_world(settings, Paths(), reporter).eval_root, suites, threads=settings.threads)
    return Chosen(name, data, *without_bad_sets(suites, data, reporter), settings.threads)


def _of_folder(registry: Registry, folder: Path, names: Sequence[str], reporter: Reporter) -> Chosen:
    """Each suite on each valid set alone, so that a bad set skips nothing else; UserError if nothing can be scored."""
    chosen = list(registry.suites) if list(names) == ["all"] else names or ["zero-shot"]
    targets = {name: registry.get("suite", name).target for name in chosen}
    suites: dict[str, Suite] = {}
    skipped: dict[str, str] = {}
    paths = evalset_check.find(folder)
    for path in paths:
        for name, target in targets.items():
            key = f"{name}/{path.name}"
            try:
                suites[key] = _of_set(target, path)
            except (UserError, ValidationError) as error:  # ValidationError: the suite reserves the name of the set
                skipped[key] = str(error) if isinstance(error, UserError) else f"{first_problem(error)[1]}."
    root = paths[0].parent
    suites, bad = without_bad_sets(suites, root, reporter)
    skipped |= bad
    if not suites:
        reasons = " ".join(f"{name}: {why}" for name, why in skipped.items())
        raise UserError(f"--data {folder}: nothing can be scored. {reasons}")
    return Chosen(None, root, suites, skipped)


def _of_set(target: type[Suite], path: Path) -> Suite:
    try:
        return target.of_set(path)
    except OnlyNamed as error:
        raise UserError(f"{str(error).removesuffix('.')}; give --protocol.") from None


def _load(path: Path) -> Checkpoint:
    """The model of a file of ours, or of a record, whose weights are in the cache."""
    if path.suffix != ".json" or checkpoint_file.is_index(path):
        if not path.is_file():
            raise UserError(f"{path}: no such file; a tag or a file of open_clip's goes with --model.")
        checkpoint_file.require_readable(path)
        if weights.settings_in(path) is None:
            raise UserError(f"{path}: not written by upcycle-bench; say with --model which open_clip model it is.")
        digest = file_sha256(path)
        return Checkpoint(weights.load(path), digest, digest, path)
    made = record.read(path)
    kept = weights.of_record(path, made.hashes.weights)
    return Checkpoint(weights.load(kept), kept.stem, kept.stem, kept, made.protocol.name, made.protocol.overrides)


def _load_open_clip(checkpoint: str, name: str | None, choices: Choices) -> Checkpoint | None:
    """The open_clip model `name` with its weights, or one that a folder or repository describes; None: ours."""
    if name is not None:
        found = find_pretrained(name, checkpoint, choices)
    elif checkpoint.startswith((HUB, LOCAL)) or Path(checkpoint).is_dir():
        found = find_pretrained(checkpoint, None, choices)
    elif choices != Choices():
        raise UserError("--pixels and --interpolate-positions go with --model; a file of ours has its own settings.")
    else:
        return None
    if weights.settings_in(found.file) is not None:
        raise UserError(f"{checkpoint} is a file of ours, which says its model; leave out --model.")
    return Checkpoint(found.create(), found.sha256(), f"{found.identity()} {found.name}")
