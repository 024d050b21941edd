"""Hard negatives: pairs of images whose captions differ by one word, as "arrow left" and "arrow right" do.

Settings, scores, notes and outcomes are described in docs/suites.md; word_pairs.py chooses the pairs.
Source: T. Thrush et al., Winoground, arXiv:2204.03162.
Shape suffixes: P pairs, I images and S captions of a pair, N images of the set.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from dataclasses import dataclass as plain_dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from upcycle_bench.data import evalset as evalsets
from upcycle_bench.data.evalset import EvalSet
from upcycle_bench.evaluation.features import encode_images
from upcycle_bench.evaluation.texts import encode_texts
from upcycle_bench.evaluation.word_pairs import Chosen, choose, most_frequent
from upcycle_bench.hookspecs import hookimpl
from upcycle_bench.suite import AVERAGE, EvalContext, Sampled, Score, Suite, SuiteInfo, SuiteResult, UserError
from upcycle_bench.util import uncertainty

CHANCE = {"text_score": 1 / 4, "image_score": 1 / 4, "group_score": 1 / 6, "pairwise_accuracy": 1 / 2}
FREQUENT = 20  # how many word pairs the notes name


@plain_dataclass(frozen=True)
class Scored:
    """The pairs of a set, and their scores: metric -> [P]."""

    chosen: Chosen
    values: dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Compositional(Suite):
    """Its settings; see docs/suites.md."""

    info: ClassVar[SuiteInfo] = SuiteInfo(
        name="compositional",
        summary="Pairs of images whose captions differ by one word: text, image and group score",
        paper="metrics of Thrush et al., Winoground, CVPR 2022, arXiv:2204.03162",
        version=1,
    )

    sets: tuple[str, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> Compositional:
        if len(set(self.sets)) < len(self.sets) or AVERAGE in self.sets:
            raise ValueError(f"sets are different, and none is called {AVERAGE}")
        return self

    def datasets(self) -> list[str]:
        """The sets."""
        return list(self.sets)

    def without(self, sets: Collection[str]) -> Compositional:
        """The other sets; UserError if there is none."""
        if not (kept := tuple(name for name in self.sets if name not in sets)):
            raise UserError("compositional: no set is left.")
        return replace(self, sets=kept)

    def evaluate(self, context: EvalContext) -> SuiteResult:
        """Score every set with a pair; the others are skipped. UserError if no set has one, or for one of labels."""
        evalsets.require(context.root, self.sets)
        opened = [evalsets.read(context.root / name, context.transform, context.batch_size) for name in self.sets]
        if labelled := [evalset.name for evalset in opened if evalset.kind != "retrieval"]:
            raise UserError(f"compositional: {', '.join(labelled)}: labels, not captions; name retrieval sets.")
        result, scored, known = SuiteResult([], {}), {}, {}  # type: ignore[var-annotated]
        context.model.eval()
        for evalset in opened:
            if one := _score(evalset, context, known, result):
                scored[evalset.name] = one
            else:
                result.skipped[evalset.name] = "no two of its captions differ by exactly one word."
        if not scored:
            raise UserError(f"compositional: {', '.join(self.sets)}: no two captions differ by exactly one word.")
        for name, one in scored.items():
            result.scores.extend(scores(name, [one], headline="compositional"))
        if len(scored) > 1:
            result.scores.extend(scores(AVERAGE, list(scored.values()), headline=""))
        result.notes["words"] = frequent_words(list(scored.values()))
        return result

    def sampled(self, dataset: str, metric: str, outcomes: Mapping[str, np.ndarray]) -> Sampled | None:
        """Of pairs of images; several may share a word pair."""
        of_set = {name.removeprefix(f"{dataset}/"): values for name, values in outcomes.items()}
        if metric == "pairwise_accuracy" and "comparisons" in of_set:
            return Sampled(of_set["comparisons"] / 4, "query")
        right_P = of_set.get(metric.removesuffix("_score"))
        return Sampled(right_P, "query") if metric in CHANCE and right_P is not None else None


def _score(evalset: EvalSet, context: EvalContext, known: dict[str, Tensor], result: SuiteResult) -> Scored | None:
    """The scored pairs of a set, or None without pairs; outcomes and notes go into `result`."""
    images_NC, captions = encode_images(evalset, context)
    chosen = choose(captions)
    result.notes[evalset.name] = {
        "images": len(captions),
        "candidates": chosen.candidates,
        "pairs": len(chosen.pairs),
        "manifest": chosen.sha256,
    }
    if not chosen.pairs:
        return None
    images_PIC = images_NC[torch.tensor([pair.images for pair in chosen.pairs])]
    texts = [text for pair in chosen.pairs for text in pair.captions]
    texts_PSC = encode_texts(texts, evalset.name, context, known).unflatten(0, (-1, 2))
    judged = judge_pairs(images_PIC, texts_PSC)
    for metric in ("text", "image", "group"):
        result.outcomes[f"{evalset.name}/{metric}"] = judged[f"{metric}_score"]
    result.outcomes[f"{evalset.name}/comparisons"] = (4 * judged["pairwise_accuracy"]).astype(np.int8)
    return Scored(chosen, judged)


def judge_pairs(images_PIC: Tensor, texts_PSC: Tensor) -> dict[str, np.ndarray]:
    """The scores of each pair, metric -> [P]; the right text of an image is the one at the same place.

    Winoground's: text score, the right text is nearer for both images; image score, likewise; group score, both.
    """
    # Summed along C alone, and not as a matrix product, so that equal embeddings always tie.
    s_PIS = (images_PIC[:, :, None].double() * texts_PSC[:, None].double()).sum(dim=3).numpy()
    ia, ib, ja, jb = s_PIS[:, 0, 0], s_PIS[:, 0, 1], s_PIS[:, 1, 0], s_PIS[:, 1, 1]
    right_P4 = np.stack([ia > ib, jb > ja, ia > ja, jb > ib], axis=1)
    text_P, image_P = right_P4[:, :2].all(axis=1), right_P4[:, 2:].all(axis=1)
    return {
        "text_score": text_P,
        "image_score": image_P,
        "group_score": text_P & image_P,
        "pairwise_accuracy": right_P4.mean(axis=1),
    }


def scores(dataset: str, sets: Sequence[Scored], headline: str) -> Iterable[Score]:
    """The scores of one set, or the unweighted means over several: of all pairs, and of the pairs of either kind.

    The kinds are words that replace each other, "[swapped]", and words that one caption adds, "[added]".
    """
    words = [np.array([pair.swapped for pair in one.chosen.pairs]) for one in sets]
    added = [np.array([pair.added for pair in one.chosen.pairs]) for one in sets]
    every = [np.ones(len(one), dtype=bool) for one in added]
    parts = {"": every, "[swapped]": [~one for one in added], "[added]": added}
    for suffix, masks in parts.items():
        if suffix and not (all(mask.any() for mask in masks) and all(not mask.all() for mask in masks)):
            continue  # with pairs of one kind only, that kind would repeat the whole
        for metric, chance in CHANCE.items():
            values = [one.values[metric][mask].astype(float) for one, mask in zip(sets, masks, strict=True)]
            mean = sum(float(each.mean()) for each in values) / len(values)
            sure = uncertainty.of_shares(values, [w[mask] for w, mask in zip(words, masks, strict=True)])
            yield Score(
                dataset=dataset, metric=f"{metric}{suffix}", value=mean, higher_is_better=True, chance=chance,
                samples=sum(map(len, values)), **asdict(sure),
                headline=headline if metric == "group_score" and not suffix else "",
            )  # fmt: skip


def frequent_words(sets: Sequence[Scored]) -> list[dict[str, Any]]:
    """The most frequent word pairs of all sets: how often they occur, and their scores."""
    pairs = [pair for one in sets for pair in one.chosen.pairs]
    swapped = np.array([pair.swapped for pair in pairs])
    values = {metric: np.concatenate([one.values[metric] for one in sets]) for metric in CHANCE}
    return [
        {
            "words": name,
            "pairs": int((swapped == name).sum()),
            **{metric: float(each[swapped == name].mean()) for metric, each in values.items()},
        }
        for name in most_frequent(pairs, FREQUENT)
    ]


@hookimpl
def register_suites() -> Iterable[type[Suite]]:
    """This file's suite."""
    return [Compositional]
