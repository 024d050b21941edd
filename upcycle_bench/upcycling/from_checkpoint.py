"""From the weights of an open_clip CLIP to a model with experts, in one process: the work of `upcycle-bench upcycle`.

    strategy = choose_strategy("sparse-upcycling", {})
    request = Request(source=find_pretrained("ViT-B-32", "laion2b_s34b_b79k"), strategy=strategy,
                      moe=resolve_moe(strategy, moe_settings(experts=4)), shards=(), seed=0)
    made = upcycle_checkpoint(request, reporter)        # made.model, made.facts

The model is the one that `run` with the same weights, data, options and seed would start to train. Experts of other
forms (DeRS, SPRI) are merged into plain FFNs of the same function.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from upcycle_bench.data.pairs import PairDataset
from upcycle_bench.model import surgery
from upcycle_bench.model.clip import Clip
from upcycle_bench.model.measure import diagnose
from upcycle_bench.model.moe import parameter_counts
from upcycle_bench.model.pretrained import Pretrained
from upcycle_bench.model.towers import context_length, image_size, vocab_size
from upcycle_bench.planning.registry import load_registry
from upcycle_bench.protocol import PUBLISHED_MOE, Captions, MoE
from upcycle_bench.strategy import Strategy, configure
from upcycle_bench.upcycling.calibration_pairs import CalibrationPairs
from upcycle_bench.upcycling.initialise import make_experts
from upcycle_bench.upcycling.starting_model import CALIBRATION_BATCH
from upcycle_bench.util import distributed
from upcycle_bench.util.errors import UserError, first_problem
from upcycle_bench.util.meter import Meter, Phase
from upcycle_bench.util.progress import Reporter
from upcycle_bench.util.rng import Stream

PHASES = ("load", "calibrate", "experts", "compare", "write")
COMPARED_PAIRS = 64  # about 3,000 tokens of images and 1,000 of text a layer


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to make.

    source: the dense model's weights; moe: the strategy's settings; shards: image-text pairs to calibrate on, or none;
    captions: what a .txt in them is; seed: of the strategy's own randomness and of the calibration sample.
    """

    source: Pretrained
    strategy: Strategy
    moe: MoE
    shards: tuple[Path | str, ...]
    seed: int
    captions: Captions = "text"


@dataclass(frozen=True, kw_only=True)
class Made:
    """A model with plain experts, as files have them, and facts about it. The caller measures the phase `write`."""

    model: Any
    facts: dict[str, Any]
    meter: Meter

    @property
    def phases(self) -> dict[str, dict[str, Any]]:
        """What each phase cost, in the order of `PHASES`."""
        return {name: asdict(self.meter.phases[name]) for name in PHASES if name in self.meter.phases}


def choose_strategy(name: str, options: Mapping[str, Any]) -> Strategy:
    """The strategy of that name with those options.

    UserError for one that makes no experts, that trains before it makes them, or that cannot run on this machine.
    """
    strategy = configure(load_registry().get("strategy", name).target, options)
    if not strategy.replaces_ffn:
        raise UserError(f"{name} leaves the model dense; choose a strategy that makes experts.")
    if type(strategy).prepare is not Strategy.prepare:
        raise UserError(f"{name} trains before it upcycles, which takes a protocol: use `upcycle-bench run`.")
    strategy.check()
    return strategy


def moe_settings(**values: Any) -> MoE:
    """The published MoE settings, with `values` in place of theirs. UserError for values that cannot be."""
    try:
        return MoE(**PUBLISHED_MOE.model_dump() | values)
    except ValidationError as error:
        where, what = first_problem(error)
        raise UserError(f"{where or 'MoE settings'}: {what}.") from None


def upcycle_checkpoint(request: Request, reporter: Reporter) -> Made:
    """Load, calibrate, make experts, compare with the dense model. UserError for weights or data that do not do."""
    device, strategy = distributed.choose_device(), request.strategy
    meter = Meter(device)
    with meter.phase("load"), reporter.task(f"loading {request.source.name}"):
        dense = request.source.create()
        dense.model.to(device).eval()
        pairs = _pairs(request, dense) if request.shards else None

    def calibration(wanted: int) -> Iterable[tuple[Tensor, Tensor]]:
        assert pairs is not None
        return reporter.track(_Calibration(request, dense, pairs, wanted), "calibrating")

    @contextlib.contextmanager
    def phase(part: str) -> Iterator[Phase]:
        if part == "calibrate":  # shows its own progress
            with meter.phase("calibrate") as cost:
                yield cost
        else:
            with meter.phase("experts") as cost, reporter.task(f"making experts, {strategy.info.name}"):
                yield cost

    inits = make_experts(strategy, dense.model, request.moe, request.seed, calibration, phase=phase)
    with meter.phase("compare"), reporter.task("comparing with the dense model"):
        model = surgery.put_experts(dense.model, inits, request.moe)
        found = diagnose(model, dense.model, _sample(dense, pairs, device))
    surgery.merge(model)
    total, active = parameter_counts(model)
    facts = {
        "model": dense.name,
        "pretrained": request.source.source,
        "pixels": dense.pixels,
        "interpolated": dict(dense.interpolated),
        "strategy": strategy.info.name,
        "options": strategy.config(),
        "seed": request.seed,
        "moe": request.moe.model_dump(),
        "layers": {name: layer | dict(inits[name].notes) for name, layer in found["layers"].items()},
        "feature_cosine_with_dense": found["feature_cosine_with_dense"],
        "compared_on": "calibration pairs" if pairs else "random inputs",
        **({"calibration_samples": asdict(pairs.counts)} if pairs else {}),
        "parameters_dense": sum(parameter.numel() for parameter in dense.model.parameters()),
        "parameters_total": total,
        "parameters_active": active,
    }
    return Made(model=model, facts=facts, meter=meter)


def _pairs(request: Request, clip: Clip) -> PairDataset:
    """The calibration pairs; it is said what is left out."""
    pairs = PairDataset(request.shards, clip, captions=request.captions, option="--calibration", keep_decoded=False)
    pairs.say_left_out()
    return pairs


@dataclass(frozen=True)
class _Calibration:
    """The calibration sample of `run` with that seed, in batches; its length is their number."""

    request: Request
    clip: Clip
    pairs: PairDataset
    wanted: int

    def __len__(self) -> int:
        return -(-min(self.wanted, len(self.pairs)) // CALIBRATION_BATCH)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        sample = Stream(("calibration", self.request.seed))
        read = self.pairs.calibration(sample, self.wanted, CALIBRATION_BATCH)
        batches = ((self.clip.normalise(batch.images), batch.texts) for batch in read)
        yield from CalibrationPairs(self.request.strategy.info.name, self.clip.model, batches)(self.wanted)


def _sample(clip: Clip, pairs: PairDataset | None, device: torch.device) -> Iterable[tuple[Tensor, Tensor]]:
    """Inputs to compare on: some of the calibration pairs, or noise and random captions where there are none."""
    if pairs is not None:
        for batch in pairs.calibration(Stream(("diagnostics", 0)), COMPARED_PAIRS, COMPARED_PAIRS):
            yield clip.normalise(batch.images.to(device)), batch.texts.to(device)
        return
    generator = Stream(("diagnostics", "random")).generator()
    model = clip.model
    images = torch.randn(COMPARED_PAIRS, 3, *image_size(model), generator=generator)
    texts = torch.randint(1, vocab_size(model), (COMPARED_PAIRS, context_length(model)), generator=generator)
    yield images.to(device), texts.to(device)
