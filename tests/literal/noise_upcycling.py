"""Random-noise upcycling of one expert, number by number; the random draws are arguments.

A reference for tests, written from the code of arXiv:2502.19261 (its baseline RNU).

Shape suffixes: S neurons that get noise.
"""

Matrix = list[list[float]]
Expert = tuple[Matrix, list[float], Matrix, list[float]]  # w1_HD, b1_H, w2_DH, b2_D


def expert(
    dense: Expert,
    permutation_H: list[int],
    w1_chosen_S: list[int],
    w2_chosen_S: list[int],
    w1_normal_SD: Matrix,
    w2_normal_DS: Matrix,
    std: float,
) -> Expert:
    """First the neurons change places, then each matrix gets std * z where its own index set says."""
    w1_HD, b1_H, w2_DH, b2_D = dense
    new1_HD, new_H = [], []
    new2_DH: Matrix = [[] for _ in b2_D]
    for neuron in permutation_H:
        new1_HD.append(list(w1_HD[neuron]))
        new_H.append(b1_H[neuron])
        for d in range(len(b2_D)):
            new2_DH[d].append(w2_DH[d][neuron])
    for s, place in enumerate(w1_chosen_S):
        for d in range(len(b2_D)):
            new1_HD[place][d] = new1_HD[place][d] + std * w1_normal_SD[s][d]
    for s, place in enumerate(w2_chosen_S):
        for d in range(len(b2_D)):
            new2_DH[d][place] = new2_DH[d][place] + std * w2_normal_DS[d][s]
    return new1_HD, new_H, new2_DH, list(b2_D)
