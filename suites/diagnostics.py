"""What routers and experts of the final model do, and whether they specialise. The numbers describe; none judges.

Settings, scores, notes and outcomes are described in docs/suites.md; routes.py watches the layers.
Sources: section 4.5 of arXiv:2604.13508; Vinh et al., JMLR 11, 2010 (adjusted mutual information).
Shape suffixes: I images or texts.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from upcycle_bench.data import evalset
from upcycle_bench.evaluation.agreement import agreements, main_expert
from upcycle_bench.evaluation.routes import LayerRoutes, Routed, route_images, route_texts
from upcycle_bench.hookspecs import hookimpl
from upcycle_bench.model.moe import moe_layers
from upcycle_bench.suite import EvalContext, Score, Suite, SuiteInfo, SuiteResult, UserError


@dataclass(frozen=True, kw_only=True)
class Diagnostics(Suite):
    """Its settings; see docs/suites.md."""

    info: ClassVar[SuiteInfo] = SuiteInfo(
        name="diagnostics",
        summary="What routers and experts do: entropy, load, similarity, agreement with classes and styles",
        paper="section 4.5 of Chu et al. 2026, arXiv:2604.13508",
        version=1,
        headline=False,
    )

    images: tuple[str, ...] = Field(min_length=1)
    texts: tuple[str, ...] = ()

    def datasets(self) -> list[str]:
        """The sets, each once."""
        return list(dict.fromkeys(self.images + self.texts))

    def without(self, sets: Collection[str]) -> Diagnostics:
        """The other sets; UserError if none is left for the images."""
        images, texts = (tuple(name for name in names if name not in sets) for names in (self.images, self.texts))
        if not images:
            raise UserError("diagnostics: no set of images is left.")
        return replace(self, images=images, texts=texts)

    def evaluate(self, context: EvalContext) -> SuiteResult:
        """Route all images, then all texts; a dense model is skipped."""
        result = SuiteResult([], {})
        if not moe_layers(context.model):
            result.skipped["experts"] = "a dense model has no experts and no routers"
            return result
        images, texts = (
            [evalset.read(context.root / name, transform, context.batch_size) for name in names]
            for names, transform in ((self.images, context.transform), (self.texts, _no_pixels))
        )
        _add("vision", route_images(images, context), result)
        if texts:
            _add("text", route_texts(texts, context), result)
        return result


def _no_pixels(_image: Any) -> int:
    """A transform for sets of which only the captions are wanted."""
    return 0


def _add(tower: str, routed: Routed, result: SuiteResult) -> None:
    """Add the scores, notes and outcomes of one tower to `result`."""
    scores = [score for name, layer in routed.layers.items() for score in _scores(name, layer, routed.labels)]
    result.scores.extend([*scores, *_means(tower, scores, len(routed.layers))])
    result.notes[tower] = {
        "items": len(routed.labels["set"]),
        "classes": int(routed.labels["class"].max(initial=-1)) + 1,
    }
    for name, layer in routed.layers.items():
        result.notes[name] = {"load": layer.load_E.tolist(), "routing_probability": layer.routing_probability}
        result.outcomes[f"{name}/main_expert"] = main_expert(layer.first_IE).astype(np.int16)


def _scores(name: str, layer: LayerRoutes, labels: Mapping[str, np.ndarray]) -> Iterable[Score]:
    """The numbers of one layer, and how far its experts agree with the labels."""
    for metric, value in layer.numbers().items():
        yield _score(name, metric, value, None, layer.tokens)
    for metric, found in agreements(layer.first_IE, labels).items():
        yield _score(name, metric, found.value, found.chance, found.samples)


def _means(tower: str, scores: Iterable[Score], layers: int) -> Iterable[Score]:
    """The mean over the tower's layers of each metric that all of them have."""
    of_metric: dict[str, list[Score]] = {}
    for score in scores:
        of_metric.setdefault(score.metric, []).append(score)
    for metric, parts in of_metric.items():
        if len(parts) == layers:
            chances = [part.chance for part in parts if part.chance is not None]
            mean = statistics.fmean(part.value for part in parts)
            yield _score(tower, metric, mean, statistics.fmean(chances) if chances else None, parts[0].samples)


def _score(dataset: str, metric: str, value: float, chance: float | None, samples: int) -> Score:
    return Score(
        dataset=dataset, metric=metric, value=value, higher_is_better=None, chance=chance, samples=samples
    )  # fmt: skip


@hookimpl
def register_suites() -> Iterable[type[Suite]]:
    """This file's suite."""
    return [Diagnostics]
