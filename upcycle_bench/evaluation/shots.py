"""The samples of a few-shot probe. Dataset, shots and draw alone choose them, so every model sees the same ones.

    manifest = choose("digits", label_N, classnames, shots=5, draw=0, sizes=Sizes(largest=16, validation=10))
    manifest.train_S, manifest.validation_V, manifest.sha256

For each draw, the samples of each class get a random order. The first `shots` samples are for training, so 1, 2 and 5
shots are nested. Validation begins after the `largest` number of shots, and is the same for all of them. The samples
behind it are the test set of a dataset that has none of its own.

Shape suffixes: N samples of the pool, S for training, V for validation, U for neither.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from upcycle_bench.util import strict_json
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.rng import Stream


@dataclass(frozen=True)
class Sizes:
    """Samples of each class: the largest number of shots, and those for validation; `test`: one more must be left."""

    largest: int
    validation: int
    test: bool = False

    @property
    def needed(self) -> int:
        """How many samples a class must have at least."""
        return self.largest + self.validation + self.test


@dataclass(frozen=True)
class Manifest:
    """The chosen samples as positions in the pool, ascending; the three parts are disjoint."""

    dataset: str
    shots: int
    draw: int
    train_S: np.ndarray
    validation_V: np.ndarray
    test_U: np.ndarray

    @property
    def sha256(self) -> str:
        """Hash of dataset, shots, draw and all positions."""
        parts = [part.tolist() for part in (self.train_S, self.validation_V, self.test_U)]
        return hashlib.sha256(strict_json.dumps([self.dataset, self.shots, self.draw, *parts]).encode()).hexdigest()


def choose(
    dataset: str, label_N: np.ndarray, classnames: Sequence[str], *, shots: int, draw: int, sizes: Sizes
) -> Manifest:
    """The manifest of one draw; `label_N` are places in `classnames`. UserError where a class has too few samples."""
    train, validation, test = [], [], []
    for label, name in enumerate(classnames):
        rows = np.flatnonzero(label_N == label)
        if len(rows) < sizes.needed:
            raise UserError(
                f"few-shot dataset {dataset}: class {name!r} has {len(rows)} samples, but {sizes.largest} shots, "
                f"{sizes.validation} for validation{' and 1 for the test' if sizes.test else ''} are wanted; lower "
                f"them, or set at_least = {sizes.needed} to leave such classes out."
            )
        generator = Stream(("shots", dataset, draw)).child(label).generator()
        rows = rows[torch.randperm(len(rows), generator=generator).numpy()]
        train.append(rows[:shots])
        validation.append(rows[sizes.largest : sizes.largest + sizes.validation])
        test.append(rows[sizes.largest + sizes.validation :])
    chosen = (np.sort(np.concatenate(part)) for part in (train, validation, test))
    return Manifest(dataset, shots, draw, *chosen)
