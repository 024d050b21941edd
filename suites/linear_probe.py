"""A linear probe on frozen image features, trained on the whole pool.

Settings, scores, notes and outcomes are described in docs/suites.md; probe_tasks.py describes the tasks.
Sources: A. Radford et al., arXiv:2103.00020, A.3; clip_benchmark.metrics.linear_probe (1.6.2).
Shape suffixes: N samples.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from upcycle_bench.evaluation import probe_tasks
from upcycle_bench.evaluation.probe import Recipe, Solver, fit
from upcycle_bench.evaluation.probe_scores import add_scores, classified
from upcycle_bench.evaluation.probe_tasks import ProbeSuite, ProbeTask, load_features, open_tasks
from upcycle_bench.hookspecs import hookimpl
from upcycle_bench.suite import EvalContext, Suite, SuiteInfo, SuiteResult, UserError
from upcycle_bench.util.rng import Stream


@dataclass(frozen=True, kw_only=True)
class LinearProbe(ProbeSuite):
    """Its settings; see docs/suites.md."""

    info: ClassVar[SuiteInfo] = SuiteInfo(
        name="linear-probe",
        summary="Linear probe on frozen image features, trained on the whole training split",
        paper="Radford et al. 2021, arXiv:2103.00020; protocol of CLIP_benchmark",
        version=1,
    )

    tasks: dict[str, ProbeTask] = Field(min_length=1)
    validation: float = Field(default=0.2, gt=0, lt=1)
    solver: Solver = "adamw"

    @model_validator(mode="after")
    def _tested(self) -> LinearProbe:
        if without := [name for name, task in self.tasks.items() if not task.test]:
            raise ValueError(f"a task needs a test set of its own: {', '.join(without)}")
        return self

    @classmethod
    def of_set(cls, folder: Path) -> LinearProbe:
        """Trained on the train split, tested on the test split."""
        return cls(tasks={folder.name: ProbeTask(**probe_tasks.of_set(folder))})

    def evaluate(self, context: EvalContext) -> SuiteResult:
        """Train and score a probe for every task."""
        result = SuiteResult([], {})
        for name, _, data in open_tasks(self.tasks, load_features, context, result):
            samples, classes = len(data.pool), len(data.classnames)
            held = round(self.validation * samples)
            if not 0 < held < samples:
                raise UserError(f"linear-probe: {name}: {samples} samples cannot be split; raise or lower validation.")
            order_N = torch.randperm(samples, generator=Stream(("linear-probe", name)).generator()).numpy()
            train, validation = data.pool.take(order_N[held:]), data.pool.take(order_N[:held])
            for _ in context.track(range(1), f"linear-probe, {name}"):
                fitted = fit(train, validation, classes, Recipe(solver=self.solver), refit=True)
            assert data.test is not None
            result.notes[name] |= {"training_samples": samples, "weight_decay": fitted.weight_decay}
            answers = classified(fitted.logits(data.test.features_NC), data.test.label_N)
            add_scores(name, [answers], classes, self.info.name, result)
        return result


@hookimpl
def register_suites() -> Iterable[type[Suite]]:
    """This file's suite."""
    return [LinearProbe]
