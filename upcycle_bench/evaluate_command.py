"""`upcycle-bench evaluate`: any checkpoint through the suites.

A checkpoint is a file of ours (upcycled, trained or dense: it says what it is), the record of a run, whose weights are
in the cache, or weights of an open_clip model, with its name. Scored are the sets of a protocol, as a run would, or
every valid set in a folder of one's own, each apart. Heavy imports stand inside the functions, since `--help` imports
this module.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from upcycle_bench import display
from upcycle_bench.command import (
    interruptible,
    names_of,
    refuse_existing,
    terminal_reporter,
    warn_broken,
    writable_file,
)
from upcycle_bench.errors import UserError, first_problem
from upcycle_bench.options import Json, Suites

if TYPE_CHECKING:
    from upcycle_bench.dense import Clip
    from upcycle_bench.progress import Reporter
    from upcycle_bench.registry import Registry
    from upcycle_bench.suite import Suite


def evaluate(
    checkpoint: Annotated[str, typer.Argument(help="A file or a record of ours, or an open_clip model's file or tag.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="open_clip's name of the model, for what is not ours.")
    ] = None,
    protocol: Annotated[
        str | None, typer.Option("--protocol", "-p", help="Whose suites; else the record's protocol, or lab.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Your evaluation sets, a folder: every valid one, or those of --protocol.")
    ] = None,
    suite: Suites = None,
    output: Annotated[Path | None, typer.Option(metavar="FILE.json", help="Where the scores go.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    as_json: Json = False,
) -> None:
    """Score any checkpoint, dense or upcycled, by a protocol's suites or on your own data."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("evaluate is the work of one process; start it without torchrun.")
    if output is not None:
        writable_file(output)
        refuse_existing(output, force)
    with interruptible("nothing was written"):
        facts = _execute(checkpoint, model, protocol, data, names_of(suite, "--suite"), terminal_reporter())
    text = json.dumps(facts, indent=2, allow_nan=False)
    if output is not None:
        from upcycle_bench.files import write_atomically

        write_atomically(output, f"{text}\n".encode())
    if as_json:
        print(text)
    else:
        _show(facts, output)


def _show(facts: Mapping[str, Any], output: Path | None) -> None:
    from upcycle_bench.suite import AVERAGE

    scored = f"protocol {facts['protocol']}" if facts["protocol"] else facts["data"]
    display.show_scores(f"{facts['checkpoint']} ({facts['model']}), {scored}", facts["scores"])
    display.show_skipped(facts["skipped"])
    if any(score["dataset"] == AVERAGE for score in facts["scores"]):
        print(f"all {len(facts['scores'])} scores, of each set and stratum, are what --output or --json has")
    total, active = facts["parameters_total"], facts["parameters_active"]
    print(f"{total:,} parameters, {active:,} active; {facts['seconds']:.1f} s; sha256 {facts['sha256']}")
    display.show_certificate(facts["certificate"])
    if output is not None:
        print(f"scores: {output}")


@dataclass(frozen=True)
class _Model:
    """`identity`: what features are cached under, since a foreign file does not say its model.

    `protocol` with `overrides`: of the run that made it, if a record says so; else None.
    """

    clip: Clip
    sha256: str
    identity: str
    protocol: str | None = None
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Suites:
    """Suites by name, where their sets are, and why others do not run. `threads` of the CPU; None: as they are."""

    protocol: str | None
    root: Path
    suites: dict[str, Suite]
    skipped: dict[str, str] = field(default_factory=dict)
    threads: int | None = None


def _execute(
    checkpoint: str, name: str | None, protocol: str | None, data: Path | None, names: list[str], reporter: Reporter
) -> dict[str, Any]:
    """Find suites (which may build a world) and model, score; what is shown."""
    import torch

    from upcycle_bench import engine, environment
    from upcycle_bench.costs import Meter, parameter_counts
    from upcycle_bench.planning.fingerprint import suite_fingerprints
    from upcycle_bench.registry import load_registry
    from upcycle_bench.run import score, scores_of, skips_of

    registry = load_registry()
    warn_broken(registry.broken)
    for suite in names:
        if suite != "all":
            registry.get("suite", suite)  # a typo is said before anything is loaded
    with reporter.task(f"loading {checkpoint}"):
        model = _load_open_clip(checkpoint, name) if name else _load(Path(checkpoint))
    model.clip.model.float()  # suites ask for it; files may have half of it
    if protocol is not None:
        found = _of_protocol(registry, protocol, (), data, names, reporter)
    elif data is not None:
        found = _of_folder(registry, data, names)
    else:
        found = _of_protocol(registry, _usual_protocol(checkpoint, model), model.overrides, None, names, reporter)
    fingerprints, missing = suite_fingerprints(found.suites, found.root)
    with engine.session(found.threads or torch.get_num_threads()) as device:
        meter = Meter(device)
        suites = {key: suite for key, suite in found.suites.items() if key not in missing}
        try:
            outcome, certificate = score(suites, found.root, model.clip, meter, reporter, model.identity)
        except UserError:
            raise
        except Exception as error:  # what a suite may raise skips it; here no other one is left
            raise UserError(f"no suite could run: {type(error).__name__}: {' '.join(str(error).split())}") from error
        surroundings = environment.capture(device.type)
    scores, failed = scores_of(outcome), skips_of(outcome)
    if found.protocol is None:  # SUITE/SET; none of a user's sets is the primary one
        scores = [score | {"suite": score["suite"].partition("/")[0], "primary": False} for score in scores]
    total, active = parameter_counts(model.clip.model)
    return {
        "checkpoint": checkpoint,
        "model": model.clip.name,
        "sha256": model.sha256,
        "parameters_total": total,
        "parameters_active": active,
        "protocol": found.protocol,
        "data": str(data) if data else None,
        "suite_fingerprints": {key: value for key, value in fingerprints.items() if key not in failed},
        "scores": scores,
        "skipped": found.skipped | missing | failed,
        "suite_notes": {key: result.notes for key, result in outcome.items() if result.notes},
        "certificate": certificate.model_dump(mode="json") if certificate else None,
        "seconds": meter.phases["evaluate"].seconds,
        "environment": surroundings,
    }


def _usual_protocol(checkpoint: str, model: _Model) -> str:
    """Where none was given; says which and why before its data are built, which may take a download."""
    name = model.protocol or "lab"
    why = "the record's" if model.protocol else f"the default, since {checkpoint} does not say how it was trained"
    print(f"protocol {name}: {why}; --protocol names another, --data scores your own sets", file=sys.stderr)
    return name


def _of_protocol(
    registry: Registry,
    name: str,
    overrides: Sequence[str],
    data: Path | None,
    names: list[str],
    reporter: Reporter,
) -> _Suites:
    """As a run would: the protocol's suites on its own world, or on sets of the same names in `data`."""
    from upcycle_bench.planning.plan import Paths, find_world, make_suites
    from upcycle_bench.protocol import load_protocol

    settings = load_protocol(registry.get("protocol", name).target, list(overrides))
    suites = make_suites(registry, settings, names)
    if data is None and settings.data.world == "local":
        raise UserError(f"protocol {name} has no data of its own; give --data, the folder with its evaluation sets.")
    root = data if data is not None else find_world(settings, Paths(), reporter).eval_root
    return _Suites(name, root, suites, threads=settings.threads)


def _of_folder(registry: Registry, folder: Path, names: list[str]) -> _Suites:
    """Each suite on each valid set apart, so that none takes another down; UserError if there is nothing to score."""
    from pydantic import ValidationError

    from upcycle_bench import evalcheck

    chosen = list(registry.suites) if names == ["all"] else names or ["zero-shot"]
    targets = {name: registry.get("suite", name).target for name in chosen}
    suites: dict[str, Suite] = {}
    skipped: dict[str, str] = {}
    paths = evalcheck.find(folder)
    for path in paths:
        for name, target in targets.items():
            key = f"{name}/{path.name}"
            try:
                suites[key] = _of_set(target, path)
                splits = {text.partition(":")[2] or "test" for text in suites[key].datasets()}
                evalcheck.require_valid(path, splits)
            except (UserError, ValidationError) as error:  # the latter: a name that the suite keeps for itself
                suites.pop(key, None)
                skipped[key] = str(error) if isinstance(error, UserError) else f"{first_problem(error)[1]}."
    if not suites:
        reasons = " ".join(f"{name}: {why}" for name, why in skipped.items())
        raise UserError(f"--data {folder}: nothing can be scored. {reasons}")
    return _Suites(None, paths[0].parent, suites, skipped)


def _of_set(target: type[Suite], path: Path) -> Suite:
    from upcycle_bench.suite import OnlyNamed

    try:
        return target.of_set(path)
    except OnlyNamed as error:
        raise UserError(f"{str(error).removesuffix('.')}; give --protocol.") from None


def _load(path: Path) -> _Model:
    """A file of ours, or the weights of a record, which are in the cache."""
    from upcycle_bench import weights
    from upcycle_bench.files import file_sha256
    from upcycle_bench.record import read

    if path.suffix != ".json":
        if not path.is_file():
            raise UserError(f"{path}: no such file; a tag or a file of open_clip's goes with --model.")
        if not weights.is_ours(path):
            raise UserError(f"{path}: not written by upcycle-bench; say with --model which open_clip model it is.")
        digest = file_sha256(path)
        return _Model(weights.load(path), digest, digest)
    made = read(path)
    kept = weights.of_record(path, made.hashes.weights)
    return _Model(weights.load(kept), kept.stem, kept.stem, made.protocol.name, made.protocol.overrides)


def _load_open_clip(checkpoint: str, name: str) -> _Model:
    """Weights of the open_clip model `name`: a file or a tag."""
    from upcycle_bench import weights
    from upcycle_bench.dense import create_clip, find_pretrained
    from upcycle_bench.files import file_sha256

    path, preprocess = find_pretrained(name, checkpoint)
    if weights.is_ours(path):
        raise UserError(f"{checkpoint} is a file of ours, which says its model; leave out --model.")
    digest = file_sha256(path)
    identity = f"{digest} {name} {json.dumps(dict(preprocess), sort_keys=True)}"
    return _Model(create_clip(name, path, preprocess=preprocess), digest, identity)
