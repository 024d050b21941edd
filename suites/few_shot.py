"""Few-shot classification: a linear probe on frozen image features, trained on k samples of each class.

Settings, scores, notes and outcomes are described in docs/suites.md; probe_tasks.py describes the tasks.
Sources: A. Radford et al., arXiv:2103.00020, A.3; clip_benchmark.metrics.linear_probe (1.6.2).
Shape suffixes: N samples.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from upcycle_bench.evaluation import probe_tasks
from upcycle_bench.evaluation.probe import Examples, Recipe, Solver, fit
from upcycle_bench.evaluation.probe_scores import add_scores, classified
from upcycle_bench.evaluation.probe_tasks import Data, ProbeSuite, ProbeTask, load_features, open_tasks
from upcycle_bench.evaluation.shots import Sizes, choose
from upcycle_bench.hookspecs import hookimpl
from upcycle_bench.suite import EvalContext, Suite, SuiteInfo, SuiteResult


@dataclass(frozen=True, kw_only=True)
class ShotTask(ProbeTask):
    """A probe's task, and the numbers of training and of validation samples of each class."""

    shots: tuple[int, ...] = Field(min_length=1)
    validation: int = Field(ge=1)

    @model_validator(mode="after")
    def _positive(self) -> ShotTask:
        if min(self.shots) < 1 or len(set(self.shots)) < len(self.shots):
            raise ValueError("shots are different numbers from 1 on")
        return self


@dataclass(frozen=True, kw_only=True)
class FewShot(ProbeSuite):
    """Its settings; see docs/suites.md."""

    info: ClassVar[SuiteInfo] = SuiteInfo(
        name="few-shot",
        summary="Few-shot linear probe on frozen image features: accuracy over several draws of the shots",
        paper="Radford et al. 2021, arXiv:2103.00020; protocol of CLIP_benchmark",
        version=1,
    )

    tasks: dict[str, ShotTask] = Field(min_length=1)
    draws: int = Field(default=5, ge=1)
    solver: Solver = "adamw"

    @classmethod
    def of_set(cls, folder: Path) -> FewShot:
        """1 and 5 shots of the train split; 5 samples of each class choose the weight decay."""
        return cls(tasks={folder.name: ShotTask(**probe_tasks.of_set(folder), shots=(1, 5), validation=5)})

    def evaluate(self, context: EvalContext) -> SuiteResult:
        """Train and score a probe for every task, number of shots and draw."""
        result = SuiteResult([], {})
        for name, task, data in open_tasks(self.tasks, load_features, context, result):
            for shots in task.shots:
                self._score(f"{name}/{shots}-shot", name, task, shots, data, context, result)
        return result

    def _score(
        self,
        title: str,
        name: str,
        task: ShotTask,
        shots: int,
        data: Data[Examples],
        context: EvalContext,
        result: SuiteResult,
    ) -> None:
        sizes = Sizes(max(task.shots), task.validation, test=data.test is None)
        label_N, classes = data.pool.label_N.cpu().numpy(), len(data.classnames)
        rows, hashes = [], []
        for draw in context.track(range(self.draws), f"few-shot, {title}"):
            manifest = choose(name, label_N, data.classnames, shots=shots, draw=draw, sizes=sizes)
            train, validation = data.pool.take(manifest.train_S), data.pool.take(manifest.validation_V)
            test: Examples = data.pool.take(manifest.test_U) if data.test is None else data.test
            fitted = fit(train, validation, classes, Recipe(solver=self.solver, seed=draw))
            rows.append(classified(fitted.logits(test.features_NC), test.label_N))
            hashes.append([manifest.sha256, fitted.weight_decay])
        result.notes[title] = {
            "manifests": [digest for digest, _ in hashes],
            "weight_decays": [decay for _, decay in hashes],
            "test_samples": len(rows[0].label_N),
        }
        add_scores(title, rows, classes, self.info.name, result)


@hookimpl
def register_suites() -> Iterable[type[Suite]]:
    """This file's suite."""
    return [FewShot]
