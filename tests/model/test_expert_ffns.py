"""All experts as one operation: the numbers of experts called one by one, to the bit, in every case of autograd."""

import copy
import weakref

import pytest
import torch
from open_clip.transformer import QuickGELU
from torch import Tensor, nn

from upcycle_bench.model.backends import as_one, loop
from upcycle_bench.model.expert_ffns import expert_ffns
from upcycle_bench.model.ffn import FFN
from upcycle_bench.util.flops import FlopCounter

WIDTH, HIDDEN = 16, 24
BLOCK_SIZES = [7, 0, 20, 5]


def experts_of(act: nn.Module) -> nn.ModuleList:
    torch.manual_seed(0)
    shapes = ((HIDDEN, WIDTH), (HIDDEN,), (WIDTH, HIDDEN), (WIDTH,))
    return nn.ModuleList(FFN(*map(torch.randn, shapes), act).expert() for _ in BLOCK_SIZES)


def rows_of(dtype: torch.dtype = torch.float32) -> Tensor:
    rows_RD = torch.randn(sum(BLOCK_SIZES), WIDTH, generator=torch.Generator().manual_seed(1))
    return rows_RD.to(dtype).requires_grad_()


def one_by_one(rows_RD: Tensor, block_sizes: list[int], experts: nn.ModuleList) -> Tensor:
    return torch.cat([expert(rows) for expert, rows in zip(experts, rows_RD.split(block_sizes), strict=True)])


def results(compute: object, experts: nn.ModuleList, rows_RD: Tensor, bf16: bool) -> list[Tensor | None]:
    """The output, then the gradients of rows and parameters; None where there is none."""
    assert callable(compute)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        y_RD = compute(rows_RD, BLOCK_SIZES, experts)
    (y_RD.float() * torch.randn(y_RD.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    return [y_RD, rows_RD.grad, *(parameter.grad for parameter in experts.parameters())]


def same(one: list[Tensor | None], other: list[Tensor | None]) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all((a is None) == (b is None) for a, b in pairs) and all(
        a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs if a is not None and b is not None
    )


ACTS = [nn.GELU(), nn.GELU(approximate="tanh"), QuickGELU(), nn.ReLU()]


@pytest.mark.parametrize("act", ACTS, ids=str)
@pytest.mark.parametrize("bf16", [False, True])
def test_numbers_are_those_of_experts_one_by_one(act: nn.Module, bf16: bool) -> None:
    experts = experts_of(act)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        assert as_one(experts, rows_of()) is bf16
    other = copy.deepcopy(experts)
    found, expected = results(expert_ffns, experts, rows_of(), bf16), results(one_by_one, other, rows_of(), bf16)
    assert same(found, expected)
    idle = found[2 + 4 : 2 + 8]  # the gradients of the expert without rows
    assert all(grad is not None and not grad.any() for grad in idle)
    assert all(grad is not None and grad.any() for grad in found[2:6])


@pytest.mark.parametrize("frozen", ["rows", "all but rows", "an expert", "biases"])
def test_what_does_not_train_gets_no_gradient(frozen: str) -> None:
    experts, rows_RD = experts_of(nn.GELU()), rows_of()
    for name, parameter in experts.named_parameters():
        parameter.requires_grad_(
            not (
                frozen == "all but rows"
                or (frozen == "an expert" and name.startswith("2."))
                or (frozen == "biases" and name.endswith("bias"))
            )
        )
    rows_RD.requires_grad_(frozen != "rows")
    other, other_rows = copy.deepcopy(experts), rows_RD.detach().clone().requires_grad_(frozen != "rows")
    found = results(expert_ffns, experts, rows_RD, True)
    assert same(found, results(one_by_one, other, other_rows, True))
    assert any(grad is None for grad in found)


class Noisy(nn.GELU):
    """A subclass of a known activation, which draws."""

    def forward(self, hidden_RH: Tensor) -> Tensor:
        return super().forward(hidden_RH) * torch.rand(1)


class Scaled(nn.Module):
    """An activation with a tensor that is no parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale_H = torch.linspace(0, 1, HIDDEN)

    def forward(self, hidden_RH: Tensor) -> Tensor:
        return hidden_RH * self.scale_H


OTHERS = [nn.RReLU(), nn.Dropout(0.5), nn.PReLU(), nn.ReLU(inplace=True), nn.SiLU(inplace=True), Noisy(), Scaled()]


@pytest.mark.parametrize("act", OTHERS, ids=str)
def test_an_activation_that_draws_learns_or_overwrites_is_left_to_its_module(act: nn.Module) -> None:
    """But for GELU, the backward pass computes the activation again."""
    experts = experts_of(act).train()
    with torch.autocast("cpu", torch.bfloat16):
        assert not as_one(experts, rows_of())
    other = copy.deepcopy(experts)
    torch.manual_seed(5)
    found = results(lambda rows_RD, block_sizes, own: loop(own, rows_RD, block_sizes), experts, rows_of(), True)
    torch.manual_seed(5)
    assert same(found, results(one_by_one, other, rows_of(), True))


def test_a_second_backward_pass_adds_the_same_again() -> None:
    experts, rows_RD = experts_of(QuickGELU()), rows_of()
    loss = expert_ffns(rows_RD, BLOCK_SIZES, experts).square().sum()
    loss.backward(retain_graph=True)
    once = [parameter.grad.clone() for parameter in experts.parameters() if parameter.grad is not None]
    loss.backward()
    twice = [parameter.grad for parameter in experts.parameters()]
    assert len(once) == len(twice) and all(
        b is not None and torch.equal(2 * a, b) for a, b in zip(once, twice, strict=True)
    )


def test_experts_that_share_a_weight_are_computed_one_by_one() -> None:
    """Autocast would cast the weight once, and add its gradients in bf16."""
    experts = experts_of(nn.GELU())
    experts[3].c_fc.weight = experts[0].c_fc.weight
    other = copy.deepcopy(experts)
    assert other[3].c_fc.weight is other[0].c_fc.weight
    with torch.autocast("cpu", torch.bfloat16):
        assert not as_one(experts, rows_of())
    found = results(lambda rows_RD, block_sizes, own: loop(own, rows_RD, block_sizes), experts, rows_of(), True)
    assert same(found, results(one_by_one, other, rows_of(), True))


class Watched(QuickGELU):
    """Counts the tensors of hidden rows that are alive when the next expert's is made."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[weakref.ref[Tensor]] = []
        self.most = 0

    def forward(self, hidden_RH: Tensor) -> Tensor:
        self.made.append(weakref.ref(hidden_RH))
        self.most = max(self.most, sum(one() is not None for one in self.made))
        made: Tensor = super().forward(hidden_RH)
        return made


@pytest.mark.parametrize("grad", [False, True])
def test_without_gradients_nothing_is_kept(grad: bool) -> None:
    experts, watched = experts_of(nn.GELU()), Watched()
    experts[0].gelu = watched
    with torch.set_grad_enabled(grad):
        y_RD = expert_ffns(rows_of(), BLOCK_SIZES, experts)
    assert y_RD.requires_grad is grad and watched.most == (len(BLOCK_SIZES) if grad else 1)


def test_precisions_that_do_not_match_are_refused_as_ever() -> None:
    experts = experts_of(nn.GELU())
    with pytest.raises(RuntimeError, match="dtype"):
        expert_ffns(rows_of(torch.bfloat16), BLOCK_SIZES, experts)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(RuntimeError, match="dtype"):
            expert_ffns(rows_of(torch.float64), BLOCK_SIZES, experts)
        assert expert_ffns(rows_of(torch.float64), BLOCK_SIZES, experts.double()).dtype == torch.float64


def test_flops_are_those_of_experts_one_by_one() -> None:
    counts = []
    for compute in (expert_ffns, one_by_one):
        with FlopCounter() as counter:
            results(compute, experts_of(nn.GELU()), rows_of(), True)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == sum(BLOCK_SIZES) * WIDTH * HIDDEN * 2 * 2 * 3
