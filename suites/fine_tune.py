"""End-to-end fine-tuning of the image tower from the zero-shot classifier: on k shots, or on a whole pool.

Settings, scores, notes and outcomes are described in docs/suites.md; fine_tuning.py has the recipe.
Source: M. Wortsman et al., Robust fine-tuning of zero-shot models, arXiv:2109.01903. Shots are those of few_shot.py.
Shape suffixes: N samples, Y classes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass as plain_dataclass
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from upcycle_bench.data.labelled import Labelled
from upcycle_bench.evaluation import probe_tasks
from upcycle_bench.evaluation.features import finite
from upcycle_bench.evaluation.fine_tuning import Recipe, predict, tune
from upcycle_bench.evaluation.probe_scores import add_scores, classified
from upcycle_bench.evaluation.probe_tasks import Data, ProbeSuite, ProbeTask, load_images, open_tasks
from upcycle_bench.evaluation.shots import Sizes, choose
from upcycle_bench.evaluation.texts import class_embeddings
from upcycle_bench.hookspecs import hookimpl
from upcycle_bench.suite import EvalContext, Suite, SuiteInfo, SuiteResult
from upcycle_bench.training import session
from upcycle_bench.util.flops import counted_flops
from upcycle_bench.util.rng import Stream


@dataclass(frozen=True, kw_only=True)
class TuneTask(ProbeTask):
    """A task, and the numbers of training and of validation samples of each class.

    `all`: also on the whole pool, the validation samples apart.
    """

    shots: tuple[int, ...] = ()
    all: bool = False
    validation: int = Field(ge=1)

    @model_validator(mode="after")
    def _possible(self) -> TuneTask:
        if self.label != "class":
            raise ValueError(f'label = "{self.label}" has no prompts, and the head begins as the zero-shot classifier')
        if any(shots < 1 for shots in self.shots) or len(set(self.shots)) < len(self.shots):
            raise ValueError("shots are different numbers from 1 on")
        if not self.shots and not self.all:
            raise ValueError("give shots, or all = true")
        if self.all and not self.test:
            raise ValueError("all = true leaves nothing of the pool; give a test set")
        return self


@dataclass(frozen=True, kw_only=True)
class FineTune(ProbeSuite):
    """Its settings; see docs/suites.md."""

    info: ClassVar[SuiteInfo] = SuiteInfo(
        name="fine-tune",
        summary="End-to-end fine-tuning of the image tower from the zero-shot classifier, on k shots or a whole pool",
        paper="Wortsman et al. 2022, arXiv:2109.01903",
        version=1,
        tunes=True,
    )

    tasks: dict[str, TuneTask] = Field(min_length=1)
    rates: tuple[float, ...] = Field(min_length=3)
    steps: int = Field(ge=1)
    batch_size: int = Field(default=64, ge=2)
    weight_decay: float = Field(default=0.1, ge=0)
    load_balance: float = Field(default=0.001, ge=0)
    precision: Literal["fp32", "bf16"] = "fp32"
    draws: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _ascending(self) -> FineTune:
        if min(self.rates) <= 0 or list(self.rates) != sorted(set(self.rates)):
            raise ValueError("rates are different positive numbers, in ascending order")
        return self

    def evaluate(self, context: EvalContext) -> SuiteResult:
        """Tune and score for every task, number of shots and draw. The text tower only makes the heads."""
        result = SuiteResult([], {})
        context.model.eval()
        known: dict[str, Tensor] = {}
        for name, task, data in open_tasks(self.tasks, load_images, context, result):
            prompted = replace(probe_tasks.first_set(task, context.root), classnames=data.classnames)
            classes_YC = class_embeddings(prompted, context, known)
            splits = {
                f"{name}/{shots}-shot": [split_of_shots(name, task, data, shots, draw) for draw in range(self.draws)]
                for shots in task.shots
            }
            if task.all:
                splits[f"{name}/all"] = [split_of_pool(name, task, data)]
            with session.open_session(torch.get_num_threads()):
                for title, draws in splits.items():
                    self._score(title, draws, classes_YC, context, result)
        return result

    def _score(
        self, title: str, splits: Sequence[Split], classes_YC: Tensor, context: EvalContext, result: SuiteResult
    ) -> None:
        recipe = Recipe(
            rates=self.rates,
            steps=self.steps,
            batch_size=self.batch_size,
            weight_decay=self.weight_decay,
            load_balance=self.load_balance,
            precision=self.precision,
        )
        rows, chosen = [], []
        began = time.perf_counter()
        with counted_flops() as counter:
            for draw, split in enumerate(splits):
                rng = Stream(("fine-tune", title, draw))
                tuned = tune(context.model, classes_YC, split.train, split.validation, recipe, rng, context, title)
                logits_NY, label_N = predict(tuned.classifier, split.test, context)
                rows.append(classified(finite(logits_NY, f"{title}, fine-tuned"), label_N))
                chosen.append(tuned)
        edges = [tuned.rate for tuned in chosen if tuned.at_the_edge]
        result.notes[title] = {
            "manifests": [split.sha256 for split in splits],
            "test_samples": len(splits[0].test),
            "rates": [tuned.rate for tuned in chosen],
            "validation_acc1": [{str(rate): value for rate, value in tuned.accuracies.items()} for tuned in chosen],
            "validation_acc1_before": [tuned.accuracy_before for tuned in chosen],
            "rates_at_the_edge": len(edges),
            "trainings": len(self.rates) * len(splits),
            "seconds": time.perf_counter() - began,
            "flops": counter.get_total_flops(),
        }
        if edges:
            print(
                f"warning: fine-tune, {title}: the best learning rate, {edges[0]:g}, is at the edge of the grid "
                f"({', '.join(f'{rate:g}' for rate in self.rates)}) in {len(edges)} of {len(splits)} draws.",
                file=sys.stderr,
            )
        add_scores(title, rows, len(classes_YC), self.info.name, result)


@plain_dataclass(frozen=True)
class Split:
    """The samples for training, for the choice of the learning rate and for the test; `sha256`: of their manifest."""

    train: Labelled
    validation: Labelled
    test: Labelled
    sha256: str


def split_of_shots(name: str, task: TuneTask, data: Data[Labelled], shots: int, draw: int) -> Split:
    """k samples of each class for training, the same ones as in few-shot."""
    sizes = Sizes(max(task.shots), task.validation, test=data.test is None)
    manifest = choose(name, data.pool.label_N, data.classnames, shots=shots, draw=draw, sizes=sizes)
    pool = data.pool
    test = pool.take(manifest.test_U) if data.test is None else data.test
    return Split(pool.take(manifest.train_S), pool.take(manifest.validation_V), test, manifest.sha256)


def split_of_pool(name: str, task: TuneTask, data: Data[Labelled]) -> Split:
    """All of the pool but the validation samples for training: what a manifest without shots leaves for a test."""
    assert data.test is not None
    manifest = choose(name, data.pool.label_N, data.classnames, shots=0, draw=0, sizes=Sizes(0, task.validation, True))
    return Split(data.pool.take(manifest.test_U), data.pool.take(manifest.validation_V), data.test, manifest.sha256)


@hookimpl
def register_suites() -> Iterable[type[Suite]]:
    """This file's suite."""
    return [FineTune]
