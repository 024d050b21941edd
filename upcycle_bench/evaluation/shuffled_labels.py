"""Two controls: a suite must score wrong labels at chance, or labels leak into its answers.

    controls, without = score_shuffled(suites, context, weights)

A small set is made of a real one (small_sets.py), in the same format. The suite scores the model on it as on any set of
a user's: it reads, encodes, ranks and computes its metrics.

1. **Labels** (or captions) are dealt out anew, DRAWS times. Whatever a model answers, 1 / classes of the new labels
   are right on average, and the draws are independent. So the sum of their z, standard errors better than chance, over
   the root of their number is as normal as one of them. No score may reach LIMIT, whose odds are 1 in 3 million: a
   record with a hundred scores is a false alarm less often than 1 in 30,000. For a share of right answers, z is that of
   the binomial test with the same odds; for other metrics it counts the score's own standard errors.

2. **The class list** of a classification set is permuted, and its labels stay. No class has one name in two of the
   lists. An answer from names is then right in one of the lists at most, so that the mean of acc1 over the lists is at
   most 1 / lists, for every model. A suite that knows the label by another way than the name exceeds that.

The weights seed all draws. So every record draws its own, and a repetition of the record draws the same.

One set of each kind is enough: the first one that the suite reads and that has 64 samples. A suite without a control is
named, with the reason.
"""

from __future__ import annotations

import hashlib
import math
import re
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from upcycle_bench.data import evalset
from upcycle_bench.evaluation import small_sets
from upcycle_bench.evaluation.small_sets import SmallSet
from upcycle_bench.record import ControlPart
from upcycle_bench.suite import EvalContext, OnlyNamed, Score, Suite
from upcycle_bench.util.errors import Unsound, UserError
from upcycle_bench.util.rng import Stream

DRAWS = 4  # of labels; and lists of classes, where there are as many classes
LIMIT = 5.0  # of z, of all draws together
LOWEST = -8.0  # z of a single draw: one of no right answer at all must not outweigh the others
ROUNDED = 0.01  # of acc1: answers that rounding may turn from one list of classes to the next


def score_shuffled(
    suites: Mapping[str, Suite], context: EvalContext, weights: str
) -> tuple[list[ControlPart], str | None]:
    """The controls of each suite and each kind of set it reads; the suites without one, and why. Raises Unsound.

    `weights`: the hash of the model's tensors.
    """
    controls, without = [], []
    for name, suite in suites.items():
        # Draws differ in labels alone, so each input is prepared and encoded once.
        own = replace(context, encoded={}, transform=_once(context.transform))
        found: set[str] = set()
        reasons: dict[str, dict[str, None]] = defaultdict(dict)  # kind of set, or kind and control -> why it has none
        for dataset in suite.datasets():
            folder = context.root / dataset
            if ":" in dataset or not folder.is_dir():  # a training split, or a set of another world
                continue
            kind = evalset.kind_of(folder)
            rng = Stream(("certificate", "labels", folder.name, weights))
            for what, control in (("labels", _of_labels), ("classes", _of_classes)):
                if (wanted := f"{kind} {what}") in found or (what == "classes" and not _by_names(suite, kind)):
                    continue
                try:
                    small = small_sets.take(folder, rng.child("samples"))
                    stream = rng if what == "labels" else rng.child("classes")
                    controls.append(control(name, suite, folder.name, small, own, stream))
                    found.add(wanted)
                except Unsound:
                    raise
                except OnlyNamed:
                    why = "it scores only what a protocol names, and no protocol names shuffled labels."
                    reasons[wanted][why] = None
                except Exception as error:  # a suite may fail on a small set, and its own scores stand nevertheless
                    why = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
                    reasons[wanted][re.sub("^it ", "the shuffled set ", why)] = None
        missing = dict.fromkeys(why for wanted, each in reasons.items() if wanted not in found for why in each)
        if missing or not found:
            without.append(f"{name}: {' '.join(missing) or 'it reads no test set of this world.'}")
    return controls, " ".join(without) or None


def _by_names(suite: Suite, kind: str) -> bool:
    """Whether the suite answers with names of classes, so that the second control holds for it."""
    return kind == "classification" and not suite.info.learns


def _of_labels(
    name: str, suite: Suite, dataset: str, small: SmallSet, context: EvalContext, rng: Stream
) -> ControlPart:
    """The metric farthest better than chance over all draws of labels; Unsound where it is too far."""
    seen: dict[tuple[str, str], list[tuple[float, Score]]] = defaultdict(list)  # draws of one score are independent
    for draw in range(DRAWS):
        order = torch.randperm(len(small.values), generator=rng.child(draw).generator()).tolist()
        for score in _scored(suite, dataset, small, [small.values[place] for place in order], small.classes, context):
            if score.higher_is_better is not None and (z := z_of(score)) is not None:
                seen[score.dataset, score.metric].append((z, score))
    if not seen:
        raise UserError(f"suite {name} gives no score with a chance level and a standard error on {dataset}.")
    key = max(seen, key=lambda key: together([z for z, _ in seen[key]]))
    z_D, scores, metric = [z for z, _ in seen[key]], [score for _, score in seen[key]], key[1]
    value, chance, z = statistics.fmean(score.value for score in scores), scores[0].chance, together(z_D)
    assert chance is not None
    if z >= LIMIT:
        raise Unsound(
            f"with shuffled labels {name} gives {metric} {value:.4f} on {len(small.values)} samples of {dataset}, "
            f"where chance is {chance:.4f} ({z:,.0f} standard errors better); labels leak into the answers."
        )
    return ControlPart(
        suite=name.partition("/")[0], dataset=dataset, samples=len(small.values), metric=metric, draws=len(z_D),
        value=value, chance=chance, z=z, z_of_draws=tuple(z_D),
    )  # fmt: skip


def _of_classes(
    name: str, suite: Suite, dataset: str, small: SmallSet, context: EvalContext, rng: Stream
) -> ControlPart:
    """The mean of acc1 over permuted lists of classes; Unsound where no answers from names can be so often right."""
    scores = []
    for classes in permuted(small.classes, rng):
        found = _scored(suite, dataset, small, small.values, classes, context)
        scores += [score for score in found if score.metric == "acc1" and score.chance is not None]
    if not scores:
        raise UserError(f"suite {name} gives no acc1 on {dataset}.")
    value, bound = statistics.fmean(score.value for score in scores), 1 / len(scores)
    if value > bound + ROUNDED:
        raise Unsound(
            f"with the list of classes permuted in {len(scores)} ways {name} gives acc1 {value:.4f} on "
            f"{len(small.values)} samples of {dataset}, where answers from class names reach {bound:.4f} at most; it "
            "knows the labels by another way."
        )
    return ControlPart(
        suite=name.partition("/")[0], dataset=dataset, samples=len(small.values), metric="acc1", permuted="classes",
        draws=len(scores), value=value, chance=scores[0].chance or 0.0, bound=bound,
    )  # fmt: skip


def permuted(classes: Sequence[str], rng: Stream) -> list[list[str]]:
    """DRAWS orders of the classes, or as many as there are classes; at each place every order has another class.

    The order as it is is one of them only where there are no more than DRAWS classes.
    """
    number = len(classes)
    ring = torch.randperm(number, generator=rng.generator()).tolist()
    place_of = {label: place for place, label in enumerate(ring)}
    steps = [1 + step for step in torch.randperm(number - 1, generator=rng.child("steps").generator()).tolist()]
    return [
        [classes[ring[(place_of[label] + step) % number]] for label in range(number)] for step in [*steps, 0][:DRAWS]
    ]


def _scored(
    suite: Suite, dataset: str, small: SmallSet, values: Sequence[bytes], classes: Sequence[str], context: EvalContext
) -> list[Score]:
    """What the suite gives for the small set with these labels and classes."""
    with tempfile.TemporaryDirectory() as temporary:
        target = Path(temporary) / dataset
        small.write(target, values, classes)
        return type(suite).of_set(target).evaluate(replace(context, root=target.parent)).scores


def together(z_D: Sequence[float]) -> float:
    """The z of independent draws together: normal if each of them is."""
    return sum(z_D) / math.sqrt(len(z_D))


def z_of(score: Score) -> float | None:
    """How many standard errors a score is better than chance; None for one without a standard error or a chance.

    For a share of right answers: the normal deviate whose odds are those of so many right answers or more by chance
    (binomial). For other metrics the score's own standard error counts. It is 0 where all samples are alike; 1e-6 then
    allows for rounding. At least LOWEST.
    """
    if score.chance is None or score.standard_error is None:
        return None
    if re.fullmatch(r"acc\d+", score.metric):
        from scipy.stats import binom, norm

        odds = binom.sf(round(score.value * score.samples) - 1, score.samples, score.chance)
        return max(LOWEST, float(norm.isf(max(odds, 1e-300))))
    above = (score.value - score.chance) / max(score.standard_error, 1e-6)
    return max(LOWEST, above if score.higher_is_better else -above)


def _once(transform: Callable[[Any], torch.Tensor]) -> Callable[[Any], torch.Tensor]:
    """The transform, which prepares equal pictures once."""
    known: dict[bytes, torch.Tensor] = {}

    def prepare(image: Any) -> torch.Tensor:
        key = hashlib.sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).digest()
        if key not in known:
            known[key] = transform(image)
        return known[key]

    return prepare
