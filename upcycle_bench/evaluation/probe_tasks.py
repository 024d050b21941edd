"""The data of probes and fine-tuning: evaluation sets in a pool, with labels of one of three kinds.

    [suites.NAME.tasks.concepts]
    pool = ["test-carbon", "photos:train"]     # SET or SET:SPLIT (else its test split), for training and validation
    test = []                                  # likewise; []: what shots and validation leave of the pool
    label = "class"                            # "class", "set" (which set an image is from) or "category" (lab)
    at_least = 10                              # classes with fewer samples in the pool are left out; 0: none is
    world = ""                                 # "digits", "fashion-mnist": sets of that world, not of the run's

`category` is the category of an icon within its family, from the lab's index; icons without one are left out.

Shape suffixes: N samples.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass as plain_dataclass
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from upcycle_bench.data import evalset, labelled
from upcycle_bench.data.evalset import EvalSet
from upcycle_bench.data.labelled import Labelled
from upcycle_bench.data.worlds import lab, load_world
from upcycle_bench.evaluation.features import image_features
from upcycle_bench.evaluation.probe import Examples
from upcycle_bench.evaluation.sampled import of_draws
from upcycle_bench.suite import EvalContext, Sampled, Suite, SuiteResult
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.files import file_sha256


@dataclass(frozen=True, kw_only=True)
class ProbeTask:
    """The sets that a probe learns from and is tested on; the module docstring describes the fields."""

    pool: tuple[str, ...] = Field(min_length=1)
    test: tuple[str, ...] = ()
    label: Literal["class", "set", "category"] = "class"
    at_least: int = Field(default=0, ge=0)
    world: Literal["", "digits", "fashion-mnist"] = ""

    def root(self, root: Path) -> Path:
        """The folder of its sets. Raises UserError, the reason to skip the task, for a world that cannot be had."""
        return load_world(self.world, 0).eval_root if self.world else root

    def sources(self, root: Path) -> dict[str, str]:
        """Content hashes of all that it reads; UserError for a set that is missing."""
        found = {}
        for text in (*self.pool, *self.test):
            name, split = _split(text)
            evalset.require(self.root(root), [name], split)
            found[f"{self.world}/{text}"] = evalset.digest(self.root(root) / name, split)
        if self.label == "category":
            found["index"] = file_sha256(_index(root))
        return found


class ProbeSuite(Suite):
    """Base of suites whose settings are tasks."""

    tasks: Mapping[str, ProbeTask]

    def datasets(self) -> list[str]:
        """Sets below `root`, with the split where it is not `test`. Tasks of other worlds have their own sets."""
        texts = (text for task in self.tasks.values() if not task.world for text in (*task.pool, *task.test))
        return list(dict.fromkeys(texts))

    def sources(self, root: Path) -> dict[str, str]:
        """Content hashes of all tasks that can run here; UserError, the reasons, if none can."""
        found: dict[str, str] = {}
        for task in runnable(self.tasks, root, {}).values():
            found |= task.sources(root)
        return found

    def sampled(self, dataset: str, metric: str, outcomes: Mapping[str, np.ndarray]) -> Sampled | None:
        """Draw by draw, where a number of shots is drawn several times."""
        draws = getattr(self, "draws", 1) if dataset.endswith("-shot") else 1
        return of_draws(dataset, metric, outcomes, draws)

    def without(self, sets: Collection[str]) -> ProbeSuite:
        """The tasks that read none of them; UserError if there is no such task."""
        kept = {name: task for name, task in self.tasks.items() if task.world or not {*task.pool, *task.test} & {*sets}}
        if not kept:
            raise UserError(f"{self.info.name}: no task is left.")
        return replace(self, tasks=kept)  # type: ignore[type-var]


def of_set(folder: Path) -> dict[str, Any]:
    """Settings of the task from a set's train split to its test split; UserError, the reason, where it has none."""
    if (kind := evalset.kind_of(folder)) != "classification":
        what = "captions, not labels" if kind == "retrieval" else "several labels an image; a probe needs one"
        raise UserError(f"it has {what}.")
    if not (folder / "train" / "nshards.txt").is_file():
        raise UserError("it has no train split.")
    return {"pool": (f"{folder.name}:train",), "test": (folder.name,)}


Task = TypeVar("Task", bound=ProbeTask)


def runnable(tasks: Mapping[str, Task], root: Path, skipped: dict[str, str]) -> dict[str, Task]:
    """The tasks whose data are here; the reasons of the others go into `skipped`. UserError if no task can run."""
    found = {}
    for name, task in tasks.items():
        try:
            task.sources(root)
            found[name] = task
        except UserError as error:
            skipped[name] = str(error)
    if not found:
        raise UserError(" ".join(skipped.values()))
    return found


Samples = TypeVar("Samples", Examples, Labelled)


@plain_dataclass(frozen=True)
class Data(Generic[Samples]):
    """Pool and test set of a task, whose labels are places in `classnames`; `test` is None where the pool holds it.

    `left_out`: classes with too few samples.
    """

    pool: Samples
    test: Samples | None
    classnames: tuple[str, ...]
    left_out: int


def open_tasks(
    tasks: Mapping[str, Task],
    load: Callable[[ProbeTask, EvalContext], Data[Samples]],
    context: EvalContext,
    result: SuiteResult,
) -> Iterator[tuple[str, Task, Data[Samples]]]:
    """Name, task and data of each task that can run here, one after the other.

    `result` gets a note of each task's classes, and the reasons of the tasks that cannot run.
    """
    for name, task in runnable(tasks, context.root, result.skipped).items():
        data = load(task, context)
        result.notes[name] = {"classes": len(data.classnames), "classes_left_out": data.left_out}
        yield name, task, data


def load_features(task: ProbeTask, context: EvalContext) -> Data[Examples]:
    """Features and labels, without the classes that have too few samples; new labels count from 0.

    Raises UserError for sets that are missing, of another kind, or with other classes than each other.
    """
    root = task.root(context.root)
    parts = {text: image_features(root / _split(text)[0], _split(text)[1], context) for text in task.pool + task.test}
    kept = _kept(task, root, {text: part.label_N.numpy() for text, part in parts.items()})

    def joined(sets: Sequence[str]) -> Examples:
        label_N = torch.from_numpy(kept.labels(sets))
        features_NC = torch.cat([parts[text].features_NC for text in sets])
        chosen_N = label_N >= 0
        return Examples(features_NC[chosen_N].to(context.device), label_N[chosen_N].to(context.device))

    return _data(task, kept, joined)


def load_images(task: ProbeTask, context: EvalContext) -> Data[Labelled]:
    """The same samples in the same order as `load_features`, but as images on disk, which no model has encoded."""
    root = task.root(context.root)
    parts = {text: labelled.index(root / _split(text)[0], _split(text)[1]) for text in task.pool + task.test}
    kept = _kept(task, root, {text: part.label_N for text, part in parts.items()})

    def joined(sets: Sequence[str]) -> Labelled:
        label_N = kept.labels(sets)
        return labelled.joined([parts[text] for text in sets], label_N).take(np.flatnonzero(label_N >= 0))

    return _data(task, kept, joined)


def first_set(task: ProbeTask, root: Path) -> EvalSet:
    """The pool's first set, whose templates are the task's prompts; its images are not decoded."""
    name, split = _split(task.pool[0])
    return evalset.read(task.root(root) / name, lambda image: image, 1, split)


@plain_dataclass(frozen=True)
class _Kept:
    """The classes that a task keeps, how many it leaves out, and the new labels of each set; -1 for no label."""

    names: tuple[str, ...]
    left_out: int
    label_of: dict[str, np.ndarray]

    def labels(self, sets: Sequence[str]) -> np.ndarray:
        """The labels of these sets, one set after the other."""
        return np.concatenate([self.label_of[text] for text in sets])


def _data(task: ProbeTask, kept: _Kept, joined: Callable[[Sequence[str]], Samples]) -> Data[Samples]:
    return Data(joined(task.pool), joined(task.test) if task.test else None, kept.names, kept.left_out)


def _kept(task: ProbeTask, root: Path, raw: Mapping[str, np.ndarray]) -> _Kept:
    """The classes with enough samples in the pool, from the labels `raw` of the sets; UserError for fewer than two."""
    names, label_of = _labels(task, root, raw)
    pool_label_N = np.concatenate([label_of[text] for text in task.pool])
    samples = np.bincount(pool_label_N[pool_label_N >= 0], minlength=len(names))
    kept = np.flatnonzero(samples >= task.at_least)
    if len(kept) < 2:
        raise UserError(f"{', '.join(task.pool)}: fewer than two classes have {task.at_least} samples; lower at_least.")
    renumbered = np.full(len(names) + 1, -1)  # the last entry serves label -1
    renumbered[kept] = np.arange(len(kept))
    return _Kept(
        tuple(names[label] for label in kept),
        len(names) - len(kept),
        {text: renumbered[label_N] for text, label_N in label_of.items()},
    )


def _labels(task: ProbeTask, root: Path, raw: Mapping[str, np.ndarray]) -> tuple[list[str], Mapping[str, np.ndarray]]:
    """The classes, and for each set the labels of its samples; -1 where a sample has none."""
    if task.label == "class":
        names = {text: evalset.classnames(root / _split(text)[0]) for text in raw}
        first = task.pool[0]
        if other := [text for text in names if names[text] != names[first]]:
            raise UserError(f"{first} and {other[0]} do not have the same classes; a task needs sets that do.")
        return list(names[first]), raw
    if task.label == "set":
        if task.test:
            raise UserError('label = "set" asks which set of the pool an image is from; leave `test` empty.')
        return list(raw), {text: np.full(len(label_N), row) for row, (text, label_N) in enumerate(raw.items())}
    of_set = {text: lab.categories(_index(root).parent, text) for text in raw}
    classes = sorted({name for names in of_set.values() for name in names if name})
    place = {name: row for row, name in enumerate(classes)} | {"": -1}
    return classes, {text: np.array([place[name] for name in names]) for text, names in of_set.items()}


def _split(text: str) -> tuple[str, str]:
    """Set and split of "SET" or "SET:SPLIT"."""
    name, _, split = text.partition(":")
    return name, split or "test"


def _index(root: Path) -> Path:
    path = root.parent / "index.tsv"
    if not path.is_file():
        raise UserError(f'label = "category": {path} is missing; only the lab knows categories.')
    return path
