"""The routers' numbers against plain loops and formulas; watching them changes nothing."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.moe_helpers import create_layer, settings_of
from upcycle_bench.model.measure import relative_compactness
from upcycle_bench.training.router_log import watch
from upcycle_bench.util.flops import FlopCounter

WIDTH, EXPERTS, TOP_K, TOKENS = 6, 4, 2, 40


@pytest.fixture
def layer() -> Any:
    torch.manual_seed(0)
    return create_layer(WIDTH, settings_of(EXPERTS, TOP_K, 4.0)).train()


def tokens() -> Tensor:
    return torch.randn(2, TOKENS // 2, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_numbers_of_a_layer_by_loops(layer: Any) -> None:
    x_BLD = tokens()
    with watch({"vision.1": layer}) as seen:
        layer(x_BLD)
    (name, found), *others = seen.summary().items()
    assert name == "vision.1" and not others

    chosen: list[list[float]] = [[] for _ in range(EXPERTS)]
    outputs: list[list[Tensor]] = [[] for _ in range(EXPERTS)]
    entropies = []
    for x_D in x_BLD.reshape(-1, WIDTH):
        logits = [float(row_D @ x_D) for row_D in layer.router_weight.detach()]
        total = sum(math.exp(logit) for logit in logits)
        probs = [math.exp(logit) / total for logit in logits]
        entropies.append(-sum(p * math.log(p) for p in probs))
        for expert in sorted(range(EXPERTS), key=lambda e: -probs[e])[:TOP_K]:
            chosen[expert].append(probs[expert])
            outputs[expert].append(layer.experts[expert](x_D).detach())
    assert found["load"] == pytest.approx([len(p) / (TOKENS * TOP_K) for p in chosen], abs=1e-5)
    assert found["router_entropy"] == pytest.approx(sum(entropies) / TOKENS, abs=1e-5)
    assert found["routing_probability"] == pytest.approx([sum(p) / len(p) for p in chosen], abs=1e-5)
    assert found["relative_compactness"] == pytest.approx(by_formula([torch.stack(o) for o in outputs]), rel=1e-4)
    assert -1 < found["expert_cosine"] < 1


def by_formula(out_RD: list[Tensor]) -> float:
    """Tr(S_W pinv(S_B)) / E with the matrices written out."""
    width, number = out_RD[0].shape[1], len(out_RD)
    inner_DD, between_DD = torch.zeros(width, width).double(), torch.zeros(width, width).double()
    means = [rows_RD.mean(0) for rows_RD in out_RD]
    centre_D = torch.stack(means).mean(0)
    for rows_RD, mean_D in zip(out_RD, means, strict=True):
        between_DD += torch.outer(mean_D - centre_D, mean_D - centre_D) / number
        for row_D in rows_RD:
            inner_DD += torch.outer(row_D - mean_D, row_D - mean_D) / sum(map(len, out_RD))
    return float(torch.trace(inner_DD @ torch.linalg.pinv(between_DD, rtol=1e-9, hermitian=True)) / number)


def test_compactness_by_formula_and_where_it_is_none() -> None:
    generator = torch.Generator().manual_seed(3)
    out_RD = [torch.randn(n, 9, dtype=torch.float64, generator=generator) + place for place, n in enumerate((5, 8, 30))]
    found = relative_compactness(out_RD)
    assert found == pytest.approx(by_formula(out_RD), rel=1e-8)
    assert relative_compactness([*out_RD, torch.empty(0, 9)]) == pytest.approx(found, rel=1e-12)
    spread = [mean_RD.mean(0) + 3 * (mean_RD - mean_RD.mean(0)) for mean_RD in out_RD]
    assert relative_compactness(spread) == pytest.approx(9 * by_formula(out_RD), rel=1e-8)  # it grows with the variance
    assert relative_compactness([out_RD[0], out_RD[0]]) is None


def test_an_expert_that_nobody_chose_has_no_probability(layer: Any) -> None:
    x_BLD = tokens().abs()
    with torch.no_grad():
        layer.router_weight[0] = -100.0
    with watch({"vision.1": layer}) as seen:
        layer(x_BLD)
    found = seen.summary()["vision.1"]
    assert found["load"][0] == 0 and found["routing_probability"][0] is None
    assert all(p is not None and p > 0 for p in found["routing_probability"][1:])


def test_watching_changes_nothing_and_leaves_nothing_behind(layer: Any) -> None:
    results, flops = [], []
    for watched in ({}, {"vision.1": layer}, {}):
        layer.zero_grad()
        with FlopCounter() as counter, watch(watched):
            y_BLD = layer(tokens())
            (y_BLD.square().sum() + layer.l_aux).backward()
        flops.append(counter.get_total_flops())
        results.append([y_BLD.detach().clone(), *(p.grad.clone() for p in layer.parameters())])
    assert flops[0] == flops[1] == flops[2] > 0  # what is watched is not charged
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    assert not layer.moe._forward_hooks and not layer.moe._forward_pre_hooks
    assert not any(expert._forward_hooks for expert in layer.experts)


def test_experts_called_outside_the_layer_are_not_counted(layer: Any) -> None:
    with watch({"vision.1": layer}) as seen:
        layer(tokens())
        layer.experts[0](tokens()[0])  # as a strategy's loss may
    with watch({"vision.1": layer}) as again:
        layer(tokens())
    assert seen.summary() == again.summary()
