"""Branch-Train-MiX of trained branches, number by number: which FFN becomes which expert, and the average of the rest.

A reference for tests, written from arXiv:2403.07816. A model is a dict of flat lists of numbers by name.
"""

import math

Model = dict[str, list[float]]


def expert_source(expert: int, branches: int, experts: int) -> int:
    """Expert e of E comes from branch floor(e * branches / E): of 4 branches and 8 experts, each twice in a row."""
    source = 0
    while (source + 1) * experts <= expert * branches:
        source += 1
    return source


def averaged(models: list[Model]) -> Model:
    """Every number is the mean over the branches."""
    result: Model = {}
    for name in models[0]:
        result[name] = []
        for place in range(len(models[0][name])):
            result[name].append(math.fsum(model[name][place] for model in models) / len(models))
    return result


def gathered(sizes: list[int], domains: int) -> list[list[int]]:
    """Groups by domain: the largest group left goes to the domain with the fewest samples, the first of equals."""
    left = list(range(len(sizes)))
    members: list[list[int]] = [[] for _ in range(domains)]
    while left:
        largest = left[0]
        for group in left:
            if sizes[group] > sizes[largest]:
                largest = group
        left.remove(largest)
        target = 0
        for domain in range(domains):
            if sum(sizes[g] for g in members[domain]) < sum(sizes[g] for g in members[target]):
                target = domain
        members[target].append(largest)
    return members
