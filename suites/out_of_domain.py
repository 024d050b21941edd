"""Zero-shot classification of a world that the model was not trained on, such as handwritten digits after the lab.

Settings, scores and outcomes are described in docs/suites.md.
Source: A. Radford et al., arXiv:2103.00020 (MNIST is out of the training distribution).
Shape suffixes: Q queries.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from upcycle_bench.data import evalset as evalsets
from upcycle_bench.data.worlds import load_world
from upcycle_bench.evaluation.ranking import Task, fit_scale, judge
from upcycle_bench.evaluation.sampled import of_ranks
from upcycle_bench.evaluation.texts import classification_task
from upcycle_bench.hookspecs import hookimpl
from upcycle_bench.suite import EvalContext, Sampled, Score, Suite, SuiteInfo, SuiteResult, UserError
from upcycle_bench.util import uncertainty


@dataclass(frozen=True, kw_only=True)
class OutOfDomain(Suite):
    """Its settings; see docs/suites.md."""

    info: ClassVar[SuiteInfo] = SuiteInfo(
        name="out-of-domain",
        summary="Zero-shot classification of another world, such as digits by a model of icons",
        paper="Radford et al. 2021, arXiv:2103.00020",
        version=2,
    )

    world: Literal["digits", "fashion-mnist"]
    sets: tuple[str, ...] = Field(min_length=1)
    templates: tuple[str, ...] = Field(min_length=1)
    temperature_set: str = ""

    @model_validator(mode="after")
    def _consistent(self) -> OutOfDomain:
        if len(set(self.sets)) < len(self.sets) or self.temperature_set in self.sets:
            raise ValueError("sets are different, and the temperature set is none of them")
        if not all("{c}" in template for template in self.templates):
            raise ValueError("every template holds {c}, where the class stands")
        return self

    def datasets(self) -> list[str]:
        """None: its sets are not below the root of the run."""
        return []

    def sources(self, root: Path) -> dict[str, str]:
        """Hashes of the other world's sets; UserError, the reason to skip, if it is the run's world or is not here."""
        found = self._root(root)
        names = [*self.sets, *filter(None, [self.temperature_set])]
        evalsets.require(found, names)
        return {f"{self.world}/{name}": evalsets.digest(found / name) for name in names}

    def evaluate(self, context: EvalContext) -> SuiteResult:
        """Score every set with the templates of the protocol."""
        root = self._root(context.root)
        known: dict[str, Tensor] = {}  # text -> its embedding: the sets share their prompts
        context.model.eval()

        def task_of(name: str) -> Task:
            evalset = evalsets.read(root / name, context.transform, context.batch_size)
            if evalset.kind != "classification":
                raise UserError(f"out-of-domain: {name} has captions, not labels; name classification sets.")
            return classification_task(replace(evalset, templates=self.templates), context, known)

        scale = math.exp(float(context.model.logit_scale.detach()))  # type: ignore[operator]
        if self.temperature_set:
            scale = fit_scale([task_of(self.temperature_set)], self.temperature_set)
        result = SuiteResult([], {"temperature/logit_scale": np.array([scale])})
        for name in self.sets:
            _add(name, task_of(name), scale, result)
        return result

    def sampled(self, dataset: str, metric: str, outcomes: Mapping[str, np.ndarray]) -> Sampled | None:
        """Of ranks."""
        return of_ranks(dataset, metric, outcomes)

    def _root(self, root: Path) -> Path:
        """The folder of the other world's sets, which may be built now."""
        other = load_world(self.world, 0).eval_root
        if root.resolve() == other.resolve():
            raise UserError(f"out-of-domain: {self.world} is the world of this run, so nothing here is out of domain.")
        return other


def _add(name: str, task: Task, scale: float, result: SuiteResult) -> None:
    """Add the scores and outcomes of one set to `result`."""
    judged, classes = judge(task, scale, name), len(task.gallery_GC)
    rows = [("acc1", judged.rank_Q < 1, 1 / classes)]
    if classes >= 5:
        rows.append(("acc5", judged.rank_Q < 5, 5 / classes))
    rows.append(("log_likelihood", judged.log_likelihood_Q, -math.log(classes)))
    for metric, value_Q, chance in rows:
        samples = len(value_Q)
        result.scores.append(
            Score(
                dataset=name, metric=metric, value=float(value_Q.mean()), higher_is_better=True, chance=chance,
                samples=samples, headline="out-of-domain" if metric == "acc1" else "",
                **asdict(uncertainty.of_outcomes(value_Q)),
            )
        )  # fmt: skip
    result.outcomes.update({f"{name}/{key}": value_Q for key, value_Q in judged.outcomes([1]).items()})


@hookimpl
def register_suites() -> Iterable[type[Suite]]:
    """This file's suite."""
    return [OutOfDomain]
