"""Experts as a dense FFN, the base, plus a small trained difference to each of its two matrices (DeRS, SPRI).

    expert = DeltaExpert(ffn.expert(), LowRank(ffn.w1_HD, a_OP=..., b_PI=...), LowRank(ffn.w2_DH, a_OP=..., b_PI=...))
    plain = expert.merged()                # the same function as a plain FFN

A difference is a module with two functions: `forward` applies the matrix W + Delta, `added` returns it.

Shape suffixes: O outputs and I inputs of a matrix, P rank of its difference.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upcycle_bench.model.ffn import FFN


class LowRank(nn.Module):
    """Delta = A B [O, I], of rank P at most; P may be 0."""

    a_OP: nn.Parameter
    b_PI: nn.Parameter

    def __init__(self, weight_OI: Tensor, **factors: Tensor) -> None:
        """`factors` are a_OP and b_PI; the optimiser sees them in this order. They get the dtype of `weight_OI`."""
        super().__init__()
        for name, factor in factors.items():
            trained = factor.numel() > 0  # a difference of rank 0 has nothing to train
            self.register_parameter(name, nn.Parameter(factor.to(weight_OI), requires_grad=trained))

    def forward(self, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor) -> Tensor:
        """x (W + A B)^T + b [T, O], computed from the factors."""
        return F.linear(x_TI, weight_OI, bias_O) + F.linear(F.linear(x_TI, self.b_PI), self.a_OP)

    def added(self, weight_OI: Tensor) -> Tensor:
        """W + A B [O, I], in float64 and rounded once."""
        return (weight_OI.double() + self.a_OP.double() @ self.b_PI.double()).to(weight_OI)


class DeltaExpert(nn.Module):
    """The base with this expert's differences added to its matrices, [T, D] -> [T, D]; experts may share a base."""

    def __init__(self, base: nn.Module, delta1: nn.Module, delta2: nn.Module, bias_deltas: bool = False) -> None:
        """`base` is made by `FFN.expert`; `bias_deltas` adds trained differences to its biases, zero at first."""
        super().__init__()
        plain: Any = base
        self.base: Any = plain
        self.delta1: Any = delta1
        self.delta2: Any = delta2
        self.bias1_H, self.bias2_D = (
            nn.Parameter(torch.zeros_like(linear.bias)) if bias_deltas else None
            for linear in (plain.c_fc, plain.c_proj)
        )

    def forward(self, x_TD: Tensor) -> Tensor:
        b1_H, b2_D = self._biases()
        hidden_TH = self.base.gelu(self.delta1(x_TD, self.base.c_fc.weight, b1_H))
        return self.delta2(hidden_TH, self.base.c_proj.weight, b2_D)

    def _biases(self) -> tuple[Tensor, Tensor]:
        b1_H, b2_D = self.base.c_fc.bias, self.base.c_proj.bias
        if self.bias1_H is None or self.bias2_D is None:
            return b1_H, b2_D
        return b1_H + self.bias1_H, b2_D + self.bias2_D

    @torch.no_grad()
    def merged(self) -> nn.Sequential:
        """A plain FFN that computes the same function, with storage of its own."""
        ffn, (b1_H, b2_D) = FFN.of(self.base), self._biases()
        return ffn.expert(w1_HD=self.delta1.added(ffn.w1_HD), b1_H=b1_H, w2_DH=self.delta2.added(ffn.w2_DH), b2_D=b2_D)
