"""`upcycle-bench upcycle`: from the weights of an open_clip CLIP to one safetensors file, in one process.

What it makes is what `run` with the same model, data, options and seed would start to train, experts of other forms
(DeRS, SPRI) as the plain FFNs of the same function. Heavy imports stand inside
the functions, since `--help` imports this module.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from upcycle_bench import display
from upcycle_bench.command import (
    check_output,
    interruptible,
    key_value,
    refuse_existing,
    terminal_reporter,
    warn_broken,
)
from upcycle_bench.errors import UserError
from upcycle_bench.options import Json, Options

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from upcycle_bench.data import PairDataset
    from upcycle_bench.dense import Clip
    from upcycle_bench.progress import Reporter
    from upcycle_bench.protocol import MoE
    from upcycle_bench.strategy import Strategy

PHASES = ("load", "calibrate", "experts", "compare", "write")
COMPARED_PAIRS = 64  # some 3,000 tokens of images and a thousand of text a layer


def upcycle(
    model: Annotated[str, typer.Option("--model", "-m", help="open_clip's name of the dense model, ViT-B-32.")],
    pretrained: Annotated[
        str, typer.Option(metavar="FILE|TAG", help="Its weights: a file, or an open_clip tag, laion2b_s34b_b79k.")
    ],
    output: Annotated[Path, typer.Option(metavar="FILE.safetensors", help="Where the upcycled model goes.")],
    strategy: Annotated[
        str, typer.Option("--strategy", "-s", help="Which strategy; see `list strategies`.")
    ] = "cluster-aware",
    calibration: Annotated[
        str | None,
        typer.Option(help="Shards for strategies that calibrate: a folder, or shards-{000..003}.tar."),
    ] = None,
    option: Options = None,
    seed: Annotated[int, typer.Option(min=0, help="The strategy's own randomness and the calibration sample.")] = 0,
    experts: Annotated[int, typer.Option(help="Experts in a layer.")] = 8,
    top_k: Annotated[int, typer.Option(help="Experts that a token uses.")] = 2,
    every: Annotated[int, typer.Option(help="Every how many blocks one is replaced.")] = 2,
    offset: Annotated[int, typer.Option(help="The first block that is replaced.")] = 1,
    capacity_factor: Annotated[float, typer.Option(help="Room of an expert in training.")] = 2.0,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    as_json: Json = False,
) -> None:
    """Turn a dense open_clip model into one with experts: one file that loads and serves."""
    from upcycle_bench import api
    from upcycle_bench.data import expand_shards
    from upcycle_bench.registry import load_registry
    from upcycle_bench.strategy import resolve_moe

    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("upcycle is the work of one process; start it without torchrun.")
    warn_broken(load_registry().broken)
    check_output(output)
    refuse_existing(output, force)
    chosen = api.choose(strategy, dict(key_value(text) for text in option or []))
    settings = api.settings(experts=experts, top_k=top_k, every=every, offset=offset, capacity_factor=capacity_factor)
    moe = resolve_moe(chosen, settings)
    shards = expand_shards(calibration, "--calibration") if calibration else ()
    if chosen.calibration_pairs and not shards:
        raise UserError(
            f"{strategy} calibrates on {chosen.calibration_pairs:,} image-text pairs: give --calibration, webdataset "
            "shards, for example 'train/{000..127}.tar'."
        )
    job = _Job(model, pretrained, output, chosen, moe, shards, seed, force)
    with interruptible("nothing was written"):
        facts = _execute(job, terminal_reporter())
    _show(facts, as_json)


@dataclass(frozen=True)
class _Job:
    model: str
    pretrained: str
    output: Path
    strategy: Strategy
    moe: MoE
    shards: tuple[Path, ...]
    seed: int
    force: bool


def _execute(job: _Job, reporter: Reporter) -> dict[str, Any]:
    """Load, calibrate, make experts, compare with the dense model, write; the facts that are shown."""
    from upcycle_bench import api, engine, surgery
    from upcycle_bench.costs import Meter, parameter_counts
    from upcycle_bench.data import PairDataset
    from upcycle_bench.dense import create_clip, find_pretrained
    from upcycle_bench.diagnostics import diagnose
    from upcycle_bench.initialise import make_experts

    device = engine.choose_device()
    meter = Meter(device)
    with meter.phase("load"), reporter.task(f"loading {job.model}"):
        checkpoint, preprocess = find_pretrained(job.model, job.pretrained)
        dense = create_clip(job.model, checkpoint, preprocess=preprocess)
        dense.model.to(device).eval()
        pairs = PairDataset(job.shards, dense, keep_decoded=False) if job.shards else None
    with _warnings_as_lines(), contextlib.ExitStack() as after_calibration:

        def calibration(wanted: int) -> Iterator[tuple[Tensor, Tensor]]:
            assert pairs is not None
            with meter.phase("calibrate"):
                yield from reporter.track(_Calibration(job, dense, pairs, wanted), "calibrating")
            after_calibration.enter_context(reporter.task(what))  # one progress display at a time

        what = f"making experts, {job.strategy.info.name}"
        with meter.phase("experts") as phase:
            if not job.strategy.calibration_pairs:
                after_calibration.enter_context(reporter.task(what))
            inits = make_experts(job.strategy, dense.model, job.moe, job.seed, calibration)
            model = surgery.upcycle(dense.model, inits, job.moe)
    if "calibrate" in meter.phases:  # it happened within
        phase.seconds -= meter.phases["calibrate"].seconds
    with meter.phase("compare"), reporter.task("comparing with the dense model"):
        found = diagnose(model, dense.model, _sample(dense, pairs, device))
    with meter.phase("write"), reporter.task(f"writing {job.output}"):
        refuse_existing(job.output, job.force)
        digest = api.save(model, job.output, job.model)
    surgery.merge(model)  # as in the file
    total, active = parameter_counts(model)
    return {
        "model": job.model,
        "pretrained": job.pretrained,
        "strategy": job.strategy.info.name,
        "options": job.strategy.config(),
        "seed": job.seed,
        "moe": job.moe.model_dump(),
        "layers": {name: layer | dict(inits[name].notes) for name, layer in found["layers"].items()},
        "feature_cosine_with_dense": found["feature_cosine_with_dense"],
        "compared_on": "calibration pairs" if pairs else "random inputs",
        "parameters_dense": sum(parameter.numel() for parameter in dense.model.parameters()),
        "parameters_total": total,
        "parameters_active": active,
        "phases": {name: asdict(meter.phases[name]) for name in PHASES if name in meter.phases},
        "output": str(job.output),
        "bytes": job.output.stat().st_size,
        "sha256": digest,
    }


@dataclass(frozen=True)
class _Calibration:
    """The calibration sample of `run` with that seed, batch by batch; it knows how many batches it has."""

    job: _Job
    clip: Clip
    pairs: PairDataset
    wanted: int

    def __len__(self) -> int:
        from upcycle_bench.step0 import CALIBRATION_BATCH

        return -(-min(self.wanted, len(self.pairs)) // CALIBRATION_BATCH)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        from upcycle_bench.api import CalibrationPairs
        from upcycle_bench.rng import Stream
        from upcycle_bench.step0 import CALIBRATION_BATCH

        sample = Stream(("calibration", self.job.seed))
        read = self.pairs.calibration(sample, self.wanted, CALIBRATION_BATCH)
        batches = ((self.clip.normalise(batch.images), batch.texts) for batch in read)
        yield from CalibrationPairs(self.job.strategy.info.name, self.clip.model, batches)(self.wanted)


def _sample(clip: Clip, pairs: PairDataset | None, device: torch.device) -> Iterable[tuple[Tensor, Tensor]]:
    """Inputs for the comparison: a few of the calibration pairs, else noise and random captions."""
    import torch

    from upcycle_bench.rng import Stream

    if pairs is not None:
        for batch in pairs.calibration(Stream(("diagnostics", 0)), COMPARED_PAIRS, COMPARED_PAIRS):
            yield clip.normalise(batch.images.to(device)), batch.texts.to(device)
        return
    generator = Stream(("diagnostics", "random")).generator()
    model = clip.model
    size = model.visual.image_size
    images = torch.randn(COMPARED_PAIRS, 3, *size, generator=generator)
    texts = torch.randint(1, model.vocab_size, (COMPARED_PAIRS, model.context_length), generator=generator)
    yield images.to(device), texts.to(device)


@contextlib.contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """What strategies warn of, without Python's file names."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
        yield


def _show(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    rows = [
        {
            "layer": name,
            "function drift": f"{layer['function_drift']:.4f}",
            "expert cosine": f"{layer['expert_cosine']:.4f}",
            "router entropy": f"{layer['router_entropy']:.4f}",
        }
        for name, layer in facts["layers"].items()
    ]
    display.table(f"{facts['strategy']}, {facts['model']}, seed {facts['seed']}", rows)
    cosine = facts["feature_cosine_with_dense"]
    print(
        f"features' cosine with the dense model's: image {cosine['vision']:.4f}, text {cosine['text']:.4f} "
        f"(as all of the above, on {facts['compared_on']})"
    )
    print(
        f"{facts['parameters_total']:,} parameters, {facts['parameters_active']:,} active; "
        f"dense: {facts['parameters_dense']:,}"
    )
    phases = facts["phases"]
    peak = max(phase["peak_memory_bytes"] for phase in phases.values())
    parts = [f"{name} {phase['seconds']:.1f} s" for name, phase in phases.items()]
    print("; ".join(parts) + f"; peak memory {peak / 2**30:.2f} GiB")
    print(f"{facts['output']}: {facts['bytes'] / 2**20:,.0f} MiB, sha256 {facts['sha256']}")
