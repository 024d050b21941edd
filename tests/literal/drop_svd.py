"""Drop-SVD of one matrix, number by number; the random draws are arguments.

A reference for tests. The singular value decomposition is Jacobi's: pairs of columns of W, or of W^T if W is wide, are
turned until all columns are orthogonal; their lengths are the singular values.

Shape suffixes: O outputs, I inputs, M = min(O, I) components, t those that are drawn anew, c those that are kept.
"""

import math

Vector = list[float]
Columns = list[Vector]  # a matrix as the list of its columns


def dot(a: Vector, b: Vector) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def transposed(rows: list[Vector]) -> list[Vector]:
    return [list(column) for column in zip(*rows, strict=True)]


def jacobi_svd(w_OI: list[Vector]) -> tuple[Columns, Vector, Columns]:
    """Columns of U (M of length O), s descending, columns of V (M of length I). Full rank is assumed."""
    if len(w_OI) < len(w_OI[0]):
        v, s, u = jacobi_svd(transposed(w_OI))
        return u, s, v
    a = transposed(w_OI)  # columns of W, which become u_j s_j
    n = len(a)
    v = [[1.0 if i == j else 0.0 for i in range(n)] for j in range(n)]
    for _ in range(30):
        for p in range(n - 1):
            for q in range(p + 1, n):
                pp, qq, pq = dot(a[p], a[p]), dot(a[q], a[q]), dot(a[p], a[q])
                angle = 0.5 * math.atan2(2 * pq, pp - qq)
                cos, sin = math.cos(angle), math.sin(angle)
                for m in (a, v):
                    both = list(zip(m[p], m[q], strict=True))
                    m[p] = [cos * x + sin * y for x, y in both]
                    m[q] = [cos * y - sin * x for x, y in both]
    order = sorted(range(n), key=lambda j: -dot(a[j], a[j]))
    s = [math.sqrt(dot(a[j], a[j])) for j in order]
    u = [[x / s[place] for x in a[j]] for place, j in enumerate(order)]
    return u, s, [v[j] for j in order]


def number_dropped(s: Vector, fraction: float, energy_fraction: float | None) -> int:
    """floor(fraction M), or the longest tail with at most that share of the sum of squares."""
    if energy_fraction is None:
        return math.floor(fraction * len(s))
    count, tail = 0, 0.0
    for value in reversed(s):
        tail += value**2
        if tail > energy_fraction * math.fsum(x**2 for x in s):
            break
        count += 1
    return count


def gram_schmidt(kept: Columns, normal: Columns) -> Columns:
    """Each normal vector less its part along the kept ones and along its predecessors (twice), at length 1."""
    made: Columns = []
    for vector in normal:
        for _ in range(2):
            for other in [*kept, *made]:
                along = dot(other, vector)
                vector = [x - along * y for x, y in zip(vector, other, strict=True)]
        length = math.sqrt(dot(vector, vector))
        made.append([x / length for x in vector])
    return made


def alike(dropped: Columns, normal: Columns) -> Columns:
    """mu + sigma z, the moments (n - 1) of all numbers of the dropped vectors."""
    numbers = [x for vector in dropped for x in vector]
    if len(numbers) < 2:
        return dropped
    mu = math.fsum(numbers) / len(numbers)
    sigma = math.sqrt(math.fsum((x - mu) ** 2 for x in numbers) / (len(numbers) - 1))
    return [[mu + sigma * z for z in vector] for vector in normal]


def expert_matrix(
    w_OI: list[Vector],
    normal_u: Columns,
    normal_v: Columns,
    *,
    fraction: float = 0.25,
    energy_fraction: float | None = None,
    gaussian: bool = False,
) -> list[Vector]:
    """W_e [O, I]; the first t columns of the given normal numbers are used."""
    u, s, v = jacobi_svd(w_OI)
    for j in range(len(s)):  # the largest entry of each left vector is positive
        if max(u[j], key=abs) < 0:
            u[j], v[j] = [-x for x in u[j]], [-x for x in v[j]]
    t = number_dropped(s, fraction, energy_fraction)
    c = len(s) - t
    if gaussian:
        new_u, new_v = alike(u[c:], normal_u[:t]), alike(v[c:], normal_v[:t])
    else:
        new_u, new_v = gram_schmidt(u[:c], normal_u[:t]), gram_schmidt(v[:c], normal_v[:t])
    all_u, all_v = [*u[:c], *new_u], [*v[:c], *new_v]
    return [
        [math.fsum(all_u[j][o] * s[j] * all_v[j][i] for j in range(len(s))) for i in range(len(w_OI[0]))]
        for o in range(len(w_OI))
    ]
