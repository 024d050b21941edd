"""How far experts agree with the classes or sets of items: normalised mutual information and its chance level.

    agreements(routed.layers["vision.3"].first_IE, routed.labels)["nmi_class"].value

NMI = I(label; expert) / ((H(label) + H(expert)) / 2), as in scikit-learn. It is 1 where each determines the other, 0
where they are independent. With many labels and few items it is far above 0 by chance alone. That chance level is
measured: 20 fixed permutations deal the labels out to the items anew. Whole items get another label, not single
tokens, since the tokens of an item depend on each other.

Sources: Strehl and Ghosh, JMLR 3, 2002; Vinh et al., JMLR 11, 2010. Shape suffixes: I items, Y labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from upcycle_bench.util.rng import Stream

SHUFFLES = 20


@dataclass(frozen=True)
class Agreement:
    """A value, its chance level, and the number of items or tokens behind it."""

    value: float
    chance: float
    samples: int


def agreements(first_IE: np.ndarray, labels: Mapping[str, np.ndarray]) -> dict[str, Agreement]:
    """nmi_WHAT, ami_WHAT and token_nmi_WHAT of one layer, for each WHAT in `labels` with at least two labels.

    `first_IE`: how many tokens of an item have an expert as their most probable one. `labels`: WHAT -> [I], -1 for no
    label. nmi and ami compare labels with the items' main experts; ami is scikit-learn's, adjusted for chance.
    token_nmi counts every token.
    """
    from sklearn.metrics import adjusted_mutual_info_score

    found = {}
    for what, label_I in labels.items():
        known_I = label_I >= 0
        if len(np.unique(label_I[known_I])) < 2:
            continue
        weight_IE, label_I = first_IE[known_I], label_I[known_I]
        main_I = main_expert(weight_IE)
        found[f"nmi_{what}"] = agreement(np.eye(weight_IE.shape[1])[main_I], label_I)
        found[f"ami_{what}"] = Agreement(float(adjusted_mutual_info_score(label_I, main_I)), 0.0, len(label_I))
        found[f"token_nmi_{what}"] = agreement(weight_IE, label_I)
    return found


def main_expert(first_IE: np.ndarray) -> np.ndarray:
    """[I]: the expert that is the most probable one for most tokens of the item; the first of equals."""
    return first_IE.argmax(axis=1)


def agreement(weight_IE: np.ndarray, label_I: np.ndarray) -> Agreement:
    """NMI and its chance level; `weight_IE`: how often each item goes to each expert."""
    import torch

    generator = Stream(("routing agreement",)).generator()
    orders = [torch.randperm(len(label_I), generator=generator).numpy() for _ in range(SHUFFLES)]
    by_chance = [mutual_information(contingency(weight_IE, label_I[order])) for order in orders]
    value = mutual_information(contingency(weight_IE, label_I))
    return Agreement(value, float(np.mean(by_chance)), int(weight_IE.sum()))


def contingency(weight_IE: np.ndarray, label_I: np.ndarray) -> np.ndarray:
    """[Y, E]: how often items of a label go to an expert."""
    table_YE = np.zeros((label_I.max() + 1, weight_IE.shape[1]))
    np.add.at(table_YE, label_I, weight_IE)
    return table_YE


def mutual_information(table_YE: np.ndarray) -> float:
    """Normalised mutual information of a contingency table; 0 where one side is always the same."""
    joint_YE = table_YE / table_YE.sum()
    label_Y, expert_E = joint_YE.sum(1), joint_YE.sum(0)
    labels, experts = _entropy(label_Y), _entropy(expert_E)
    information = labels + experts - _entropy(joint_YE.ravel())
    return max(0.0, float(information / ((labels + experts) / 2))) if labels and experts else 0.0


def _entropy(share: np.ndarray) -> float:
    positive = share[share > 0]
    return float(-(positive * np.log(positive)).sum())
