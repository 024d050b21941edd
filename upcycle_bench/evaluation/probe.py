"""A linear probe on frozen features by CLIP_benchmark's protocol, with many weight decays trained at once.

    fitted = fit(train, validation, classes=10)                          # Examples: features [N, C], labels [N]
    predicted_N = fitted.logits(test.features_NC).argmax(dim=1)

Solver `adamw`: 10 epochs in batches of 64 on the cross-entropy, from the initial weights of `nn.Linear`. The learning
rate falls from 0.1 to zero on a cosine, without warm-up. The weight decay, on weights and bias, is one of 97 from 1e-6
to 100. `find_peak` searches it: 7 of them first, then the neighbours of the best at half the distance each time.

CLIP_benchmark trains one probe after the other, 20 in all. Here the probes of a round are one matrix, without autograd
and with a fused optimiser; the weights are the same to rounding. A GPU trains all 97 in one round. On a CPU, where
arithmetic costs more, five rounds train the 15 that the search asks for.

Solver `lbfgs`: scikit-learn's logistic regression, with an L2 penalty of weight_decay / 2, which is searched likewise.

Source: clip_benchmark.metrics.linear_probe (1.6.2), which follows A.3 of Radford et al. 2021, arXiv:2103.00020.
Shape suffixes: N samples, I = C + 1 inputs, Y classes, W weight decays, Z = W * Y.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

Solver = Literal["adamw", "lbfgs"]
WEIGHT_DECAYS: tuple[float, ...] = tuple(np.logspace(-6, 2, num=97).tolist())
FIRST, SPANS = range(0, 97, 16), (8, 4, 2, 1)  # find_peak's first indices, then its distances from the best


@dataclass(frozen=True)
class Examples:
    """Features [N, C] float32 and their labels [N] int64, on one device."""

    features_NC: Tensor
    label_N: Tensor

    def __len__(self) -> int:
        return len(self.label_N)

    def take(self, rows: np.ndarray) -> Examples:
        """The examples of these rows."""
        chosen = torch.as_tensor(rows, device=self.label_N.device)
        return Examples(self.features_NC[chosen], self.label_N[chosen])

    def and_also(self, other: Examples) -> Examples:
        """These examples, then the other ones."""
        return Examples(torch.cat([self.features_NC, other.features_NC]), torch.cat([self.label_N, other.label_N]))


@dataclass(frozen=True)
class Recipe:
    """How a probe is trained; the defaults are CLIP_benchmark's."""

    lr: float = 0.1
    epochs: int = 10
    batch_size: int = 64
    seed: int = 0
    solver: Solver = "adamw"


@dataclass(frozen=True)
class Probe:
    """Linear classifiers, one for each weight decay: weights [W, C, Y], biases [W, Y]."""

    weight_WCY: Tensor
    bias_WY: Tensor

    def logits(self, features_NC: Tensor) -> Tensor:
        """Logits of every classifier, [W, N, Y]."""
        x_WNC = features_NC.expand(len(self.bias_WY), -1, -1)
        return torch.baddbmm(self.bias_WY[:, None], x_WNC, self.weight_WCY)

    def each(self) -> list[Probe]:
        """One probe for each weight decay."""
        return [Probe(*pair) for pair in zip(self.weight_WCY.split(1), self.bias_WY.split(1), strict=True)]


@dataclass(frozen=True)
class Fitted:
    """One classifier, and the weight decay that validation chose for it."""

    probe: Probe
    weight_decay: float

    def logits(self, features_NC: Tensor) -> Tensor:
        """Logits, [N, Y]."""
        return self.probe.logits(features_NC)[0]


def fit(
    train: Examples, validation: Examples, classes: int, recipe: Recipe | None = None, *, refit: bool = False
) -> Fitted:
    """The classifier with the weight decay that does best on `validation`; `refit` trains it again on both sets."""
    recipe = recipe or Recipe()
    solve = train_all if recipe.solver == "adamw" else _lbfgs
    known: dict[int, tuple[float, Probe]] = {}
    at_once = train.features_NC.is_cuda and recipe.solver == "adamw"

    def accuracies(indices: Sequence[int]) -> list[float]:
        if missing := [i for i in (range(len(WEIGHT_DECAYS)) if at_once else indices) if i not in known]:
            probes = solve(train, classes, [WEIGHT_DECAYS[i] for i in missing], recipe)
            for index, accuracy, probe in zip(missing, _accuracies(probes, validation), probes.each(), strict=True):
                known[index] = accuracy, probe
        return [known[i][0] for i in indices]

    best = find_peak(accuracies)
    decay = WEIGHT_DECAYS[best]
    probe = solve(train.and_also(validation), classes, [decay], recipe) if refit else known[best][1]
    return Fitted(probe, decay)


def find_peak(accuracies: Callable[[Sequence[int]], list[float]]) -> int:
    """The index of the weight decay that CLIP_benchmark's search ends at; `accuracies` is called once a round."""
    peak = _first_best(FIRST, accuracies)
    for span in SPANS:
        peak = _first_best((max(peak - span, 0), peak, min(peak + span, len(WEIGHT_DECAYS) - 1)), accuracies)
    return peak


def train_all(train: Examples, classes: int, weight_decays: Sequence[float], recipe: Recipe) -> Probe:
    """One AdamW training for each weight decay, all in the same tensors.

    Each has its own loss, and AdamW works element by element, so no probe depends on the others. Those with
    lr * weight_decay above 2 diverge, as they do in CLIP_benchmark.
    """
    device, number = train.features_NC.device, len(weight_decays)
    x_NI = F.pad(train.features_NC, (0, 1), value=1.0)  # the bias is the weight of a feature that is always 1
    onehot_NY = F.one_hot(train.label_N, classes).to(x_NI)
    with torch.random.fork_rng(devices=[]):  # drawn on the CPU, so that every device has the same weights and batches
        torch.manual_seed(recipe.seed)
        linear = nn.Linear(train.features_NC.shape[1], classes)
        start_IY = torch.cat([linear.weight.detach().T, linear.bias.detach()[None]])
        batches = [index_B.to(device) for index_B in _batches(len(train), recipe)]
    weight_IZ = nn.Parameter(start_IY.to(device).repeat(1, number))  # a step is one product forwards, one backwards
    optimizer = torch.optim.Adam([weight_IZ], lr=recipe.lr, fused=True)
    decay_Z = torch.tensor(weight_decays, dtype=torch.float64, device=device).repeat_interleave(classes)
    for step, index_B in enumerate(batches):
        lr = 0.5 * (1 + math.cos(math.pi * step / len(batches))) * recipe.lr
        optimizer.param_groups[0]["lr"] = lr
        x_BI, onehot_BY = x_NI[index_B], onehot_NY[index_B]
        with torch.no_grad():
            # The gradient of the mean cross-entropy is x^T (softmax - onehot) / B, [I, Z].
            probability_BWY = (x_BI @ weight_IZ).unflatten(1, (number, classes)).softmax(dim=2)
            weight_IZ.grad = x_BI.T @ probability_BWY.sub_(onehot_BY[:, None]).div_(len(index_B)).flatten(1)
            weight_IZ.mul_((1 - lr * decay_Z).float())  # AdamW is this, then Adam
        optimizer.step()
    weight_WIY = weight_IZ.detach().unflatten(1, (number, classes)).permute(1, 0, 2)
    return Probe(weight_WIY[:, :-1].contiguous(), weight_WIY[:, -1].contiguous())


def _batches(samples: int, recipe: Recipe) -> Iterator[Tensor]:
    """The indices of every batch of every epoch, as a shuffling DataLoader of CLIP_benchmark draws them."""
    order: Any = range(samples)  # anything with a length and items is a data set
    loader = DataLoader(order, batch_size=samples, shuffle=True, collate_fn=torch.tensor)
    for _ in range(recipe.epochs):
        for order_N in loader:
            yield from order_N.split(recipe.batch_size)


def _lbfgs(train: Examples, classes: int, weight_decays: Sequence[float], recipe: Recipe) -> Probe:
    """scikit-learn's solver, one weight decay after the other; a class without training samples is never predicted."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    x_NC, y_N = train.features_NC.cpu().numpy(), train.label_N.cpu().numpy()
    weight_WCY = torch.zeros(len(weight_decays), x_NC.shape[1], classes)
    bias_WY = torch.full((len(weight_decays), classes), -torch.inf)
    for row, decay in enumerate(weight_decays):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # with next to no penalty there may be no optimum
            found = LogisticRegression(C=1 / decay, max_iter=1000).fit(x_NC, y_N)
        weight_YC, bias_Y = torch.tensor(found.coef_).float(), torch.tensor(found.intercept_).float()
        if len(found.classes_) == 2:  # scikit-learn then gives one row, that of the second class
            weight_YC, bias_Y = torch.cat([-weight_YC, weight_YC]) / 2, torch.cat([-bias_Y, bias_Y]) / 2
        weight_WCY[row, :, found.classes_] = weight_YC.T
        bias_WY[row, found.classes_] = bias_Y
    return Probe(weight_WCY.to(train.label_N.device), bias_WY.to(train.label_N.device))


def _accuracies(probes: Probe, examples: Examples) -> list[float]:
    """The accuracy of each classifier, [W]."""
    right_WN = probes.logits(examples.features_NC).argmax(dim=2) == examples.label_N
    accuracies: list[float] = right_WN.double().mean(dim=1).tolist()
    return accuracies


def _first_best(indices: Sequence[int], accuracies: Callable[[Sequence[int]], list[float]]) -> int:
    """The first index with the greatest accuracy; 0 where all accuracies are zero, as in CLIP_benchmark."""
    best, most = 0, 0.0
    for index, accuracy in zip(indices, accuracies(indices), strict=True):
        if accuracy > most:
            best, most = index, accuracy
    return best
