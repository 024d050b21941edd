"""From the weights of an open_clip CLIP to a model with experts, in one process.

    job = Job(model="ViT-B-32", pretrained="laion2b_s34b_b79k", strategy=choose_strategy("sparse-upcycling", {}),
              moe=resolve_moe(strategy, moe_settings(experts=4)), shards=(), seed=0)
    made = upcycle_checkpoint(job, reporter)        # made.model, made.facts

What it makes is what `run` with the same model, data, options and seed would start to train, experts of other forms
(DeRS, SPRI) as the plain FFNs of the same function.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from upcycle_bench.data.pairs import PairDataset
from upcycle_bench.model import surgery
from upcycle_bench.model.clip import Clip, create_clip, find_pretrained
from upcycle_bench.model.measure import diagnose
from upcycle_bench.model.moe import parameter_counts
from upcycle_bench.planning.registry import load_registry
from upcycle_bench.protocol import PUBLISHED_MOE, MoE
from upcycle_bench.strategy import Strategy, configure
from upcycle_bench.upcycling.initialise import make_experts
from upcycle_bench.upcycling.starting_model import CALIBRATION_BATCH
from upcycle_bench.util import distributed
from upcycle_bench.util.errors import UserError, first_problem
from upcycle_bench.util.meter import Meter
from upcycle_bench.util.progress import Reporter
from upcycle_bench.util.rng import Stream

PHASES = ("load", "calibrate", "experts", "compare", "write")
COMPARED_PAIRS = 64  # some 3,000 tokens of images and a thousand of text a layer


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to make: `model` is open_clip's name, `pretrained` a file or a tag, `shards` for strategies that calibrate.

    `seed` is the strategy's own randomness and the calibration sample.
    """

    model: str
    pretrained: str
    strategy: Strategy
    moe: MoE
    shards: tuple[Path, ...]
    seed: int


@dataclass(frozen=True, kw_only=True)
class Made:
    """A model with plain experts, as files have them, and what is known of it; whoever writes it measures `write`."""

    model: Any
    facts: dict[str, Any]
    meter: Meter

    @property
    def phases(self) -> dict[str, dict[str, Any]]:
        """What each phase cost, in their order."""
        return {name: asdict(self.meter.phases[name]) for name in PHASES if name in self.meter.phases}


def choose_strategy(name: str, options: Mapping[str, Any]) -> Strategy:
    """The strategy of that name with those options, able to run here; UserError otherwise."""
    strategy = configure(load_registry().get("strategy", name).target, options)
    if not strategy.replaces_ffn:
        raise UserError(f"{name} leaves the model dense; choose a strategy that makes experts.")
    if type(strategy).prepare is not Strategy.prepare:
        raise UserError(f"{name} trains before it upcycles, which takes a protocol: use `upcycle-bench run`.")
    strategy.check()
    return strategy


def moe_settings(**values: Any) -> MoE:
    """The published MoE settings with `values` instead; UserError for bad ones."""
    try:
        return MoE(**PUBLISHED_MOE.model_dump() | values)
    except ValidationError as error:
        where, what = first_problem(error)
        raise UserError(f"{where or 'MoE settings'}: {what}.") from None


def upcycle_checkpoint(job: Job, reporter: Reporter) -> Made:
    """Load, calibrate, make experts, compare with the dense model. UserError for weights or data that do not do."""
    device = distributed.choose_device()
    meter = Meter(device)
    with meter.phase("load"), reporter.task(f"loading {job.model}"):
        checkpoint, preprocess = find_pretrained(job.model, job.pretrained)
        dense = create_clip(job.model, checkpoint, preprocess=preprocess)
        dense.model.to(device).eval()
        pairs = PairDataset(job.shards, dense, keep_decoded=False) if job.shards else None
    with contextlib.ExitStack() as after_calibration:

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
            model = surgery.put_experts(dense.model, inits, job.moe)
    if "calibrate" in meter.phases:  # it happened within
        phase.seconds -= meter.phases["calibrate"].seconds
    with meter.phase("compare"), reporter.task("comparing with the dense model"):
        found = diagnose(model, dense.model, _sample(dense, pairs, device))
    surgery.merge(model)
    total, active = parameter_counts(model)
    facts = {
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
    }
    return Made(model=model, facts=facts, meter=meter)


@dataclass(frozen=True)
class _Calibration:
    """The calibration sample of `run` with that seed, batch by batch; it knows how many batches it has."""

    job: Job
    clip: Clip
    pairs: PairDataset
    wanted: int

    def __len__(self) -> int:
        return -(-min(self.wanted, len(self.pairs)) // CALIBRATION_BATCH)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        sample = Stream(("calibration", self.job.seed))
        read = self.pairs.calibration(sample, self.wanted, CALIBRATION_BATCH)
        batches = ((self.clip.normalise(batch.images), batch.texts) for batch in read)
        yield from CalibrationPairs(self.job.strategy.info.name, self.clip.model, batches)(self.wanted)


def _sample(clip: Clip, pairs: PairDataset | None, device: torch.device) -> Iterable[tuple[Tensor, Tensor]]:
    """Inputs for the comparison: a few of the calibration pairs, else noise and random captions."""
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


class CalibrationPairs:
    """A loader as `make_experts` wants it: as many pairs as asked for, on the model's device, images in its dtype."""

    def __init__(self, strategy: str, model: Any, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        self.strategy, self.model, self.batches = strategy, model, batches
        self.seen = 0

    def __call__(self, pairs: int) -> Iterator[tuple[Tensor, Tensor]]:
        weight = self.model.visual.conv1.weight
        for batch in self.batches:
            images, texts = _checked(batch)
            images, texts = images[: pairs - self.seen], texts[: pairs - self.seen]
            self.seen += len(images)
            yield images.to(weight), texts.to(weight.device)
            if self.seen >= pairs:
                return
        if not self.seen:
            raise UserError(f"{self.strategy}: the calibration data are empty; it asks for {pairs:,} image-text pairs.")
        warnings.warn(
            f"{self.strategy} asks for {pairs:,} calibration pairs and saw {self.seen:,}; its statistics rest on "
            "these.",
            stacklevel=2,
        )


def _checked(batch: Any) -> tuple[Tensor, Tensor]:
    if not (isinstance(batch, tuple | list) and len(batch) == 2 and all(isinstance(x, Tensor) for x in batch)):
        raise UserError("calibration: a batch must be two tensors, images [B, 3, H, W] and tokenised texts [B, L].")
    images, texts = batch
    if images.dim() != 4 or texts.dim() != 2 or len(images) != len(texts):
        shapes = f"{tuple(images.shape)} and {tuple(texts.shape)}"
        raise UserError(f"calibration: images [B, 3, H, W] and texts [B, L] are wanted, but their shapes are {shapes}.")
    if not images.is_floating_point() or texts.is_floating_point():
        raise UserError(
            f"calibration: images are {images.dtype} and texts {texts.dtype}; give images as the model takes them "
            "(floats, after its transform) and token numbers."
        )
    return images, texts
