"""Sparse upcycling of one layer, number by number; the random draws are arguments.

A reference for tests, written from arXiv:2212.05055.
"""

import math

Matrix = list[list[float]]
Expert = tuple[Matrix, list[float], Matrix, list[float]]  # w1_HD, b1_H, w2_DH, b2_D


def deviation(matrix: Matrix) -> float:
    """Over n - 1."""
    numbers = [x for row in matrix for x in row]
    mean = math.fsum(numbers) / len(numbers)
    return math.sqrt(math.fsum((x - mean) ** 2 for x in numbers) / (len(numbers) - 1))


def noisy(matrix: Matrix, std: float, normal: Matrix) -> Matrix:
    return [[matrix[i][j] + std * normal[i][j] for j in range(len(matrix[0]))] for i in range(len(matrix))]


def expert(dense: Expert, w1_normal: Matrix, w2_normal: Matrix, absolute: float, relative: float) -> Expert:
    """A copy; both noises are independent, so their variances add up; biases stay."""
    w1_HD, b1_H, w2_DH, b2_D = dense
    std1 = math.sqrt(absolute**2 + (relative * deviation(w1_HD)) ** 2)
    std2 = math.sqrt(absolute**2 + (relative * deviation(w2_DH)) ** 2)
    return noisy(w1_HD, std1, w1_normal), list(b1_H), noisy(w2_DH, std2, w2_normal), list(b2_D)


def router(uniform_ED: Matrix, std: float, normal_ED: Matrix) -> Matrix:
    """U(-1/sqrt(D), 1/sqrt(D)) from U(0, 1), plus noise."""
    width = len(uniform_ED[0])
    return noisy([[(2 * u - 1) / math.sqrt(width) for u in row] for row in uniform_ED], std, normal_ED)
