"""Drop-Upcycling of one expert, number by number; the random draws are arguments.

A reference for tests, written from arXiv:2502.19261: the paper's version, and that of its code. Torch is used only so
that autograd gives the gradients.

Shape suffixes: S re-initialised neurons.
"""

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]
Expert = tuple[Array, Array, Array, Array]  # w1_HD, b1_H, w2_DH, b2_D
Bias = Literal["keep", "reinit", "zero"]


def mean_and_std(numbers: list[float]) -> tuple[float, float]:
    """Mean, and standard deviation over n - 1; that of a single number is 0."""
    mean = math.fsum(numbers) / len(numbers)
    if len(numbers) == 1:
        return mean, 0.0
    return mean, math.sqrt(math.fsum((number - mean) ** 2 for number in numbers) / (len(numbers) - 1))


def redraw_rows(w_HD: Array, chosen_S: list[int], normal_SD: Array) -> Array:
    """Rows S become mu + sigma z, where mu and sigma are scalars of the block of these rows; z ~ N(0, 1) is given."""
    new_HD = np.array(w_HD, dtype=np.float64)
    if not chosen_S:
        return new_HD
    mu, sigma = mean_and_std([float(w_HD[j, d]) for j in chosen_S for d in range(w_HD.shape[1])])
    for s, j in enumerate(chosen_S):
        for d in range(w_HD.shape[1]):
            new_HD[j, d] = mu + sigma * normal_SD[s, d]
    return new_HD


def redraw_columns(w_DH: Array, chosen_S: list[int], normal_DS: Array) -> Array:
    """The same for columns S."""
    return redraw_rows(w_DH.T, chosen_S, normal_DS.T).T


def first_bias(b1_H: Array, chosen_S: list[int], bias: Bias, normal_S: Array | None) -> Array:
    """b1 as it is, or drawn anew where S selects (then `normal_S` is needed), or zero there."""
    if bias == "reinit":
        assert normal_S is not None
        return redraw_rows(b1_H[:, None], chosen_S, normal_S[:, None])[:, 0]
    new_H = np.array(b1_H, dtype=np.float64)
    for j in chosen_S if bias == "zero" else []:
        new_H[j] = 0.0
    return new_H


def paper_version(
    dense: Expert,
    chosen_S: list[int],
    w1_normal_SD: Array,
    w2_normal_DS: Array,
    *,
    bias: Bias = "keep",
    b1_normal_S: Array | None = None,
) -> Expert:
    """One index set for all matrices of the expert."""
    w1_HD, b1_H, w2_DH, b2_D = dense
    return (
        redraw_rows(w1_HD, chosen_S, w1_normal_SD),
        first_bias(b1_H, chosen_S, bias, b1_normal_S),
        redraw_columns(w2_DH, chosen_S, w2_normal_DS),
        np.array(b2_D, dtype=np.float64),
    )


def code_version(
    dense: Expert,
    permutation_H: list[int],
    w1_chosen_S: list[int],
    w2_chosen_S: list[int],
    w1_normal_SD: Array,
    w2_normal_DS: Array,
    *,
    bias: Bias = "keep",
    b1_normal_S: Array | None = None,
) -> Expert:
    """First the neurons change places, then every matrix has an index set of its own; b1 goes with the rows of W1."""
    w1_HD, b1_H, w2_DH, b2_D = dense
    shuffled1_HD, shuffled_H, shuffled2_DH = np.empty_like(w1_HD), np.empty_like(b1_H), np.empty_like(w2_DH)
    for place, neuron in enumerate(permutation_H):
        shuffled1_HD[place] = w1_HD[neuron]
        shuffled_H[place] = b1_H[neuron]
        shuffled2_DH[:, place] = w2_DH[:, neuron]
    return (
        redraw_rows(shuffled1_HD, w1_chosen_S, w1_normal_SD),
        first_bias(shuffled_H, w1_chosen_S, bias, b1_normal_S),
        redraw_columns(shuffled2_DH, w2_chosen_S, w2_normal_DS),
        np.array(b2_D, dtype=np.float64),
    )


def forward(x_TD: Tensor, expert: tuple[Tensor, ...], act: Callable[[Tensor], Tensor]) -> Tensor:
    """b2 + sum over neurons j of W2[:, j] act(W1[j] x + b1[j]), token by token, [T, D]."""
    w1_HD, b1_H, w2_DH, b2_D = expert
    rows = []
    for x_D in x_TD:
        y_D = b2_D
        for j in range(len(b1_H)):
            y_D = y_D + w2_DH[:, j] * act(torch.dot(w1_HD[j], x_D) + b1_H[j])
        rows.append(y_D)
    return torch.stack(rows)
