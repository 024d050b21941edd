"""Drop-SVD, a baseline of cluster-aware upcycling (Chu et al., CVPR 2026, supplement A, https://arxiv.org/abs/2604.13508).

Every expert keeps the strong part of each weight matrix's spectrum and gets new singular vectors for the weak part.
With W = U diag(s) V^T, of whose M components c are kept and t = M - c are drawn anew,

    W_e = U_c diag(s_c) V_c^T + U'_t diag(s_t) V'_t^T

where U'_t and V'_t are random, orthonormal and orthogonal to what is kept. Biases are copied, the router is random.

Where we differ: the paper gives one sentence ("reinitializes only the singular vectors corresponding to the lowest 25%
of the spectrum") and no code. The rest is our choice, listed in `info.reconstructed`. In a tall matrix the dropped
right vectors span all that the kept ones leave, so V'_t is V_t turned, while U'_t is mostly new. In a wide one it is
the other way round.

Shape suffixes: O outputs, I inputs, M = min(O, I) components, t those of them that are drawn anew, c those kept.
"""

from __future__ import annotations

from dataclasses import dataclass as plain_dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from upcycle_bench.hookspecs import hookimpl
from upcycle_bench.strategy import (
    FFN,
    Layer,
    LayerInit,
    RouterInit,
    Strategy,
    StrategyInfo,
    Stream,
    UserError,
    random_router,
)
from upcycle_bench.upcycling import draws

DEFAULT_FRACTION = 0.25


@dataclass(frozen=True, kw_only=True)
class DropSVD(Strategy):
    """Experts are copies of the FFN whose weakest singular vectors are drawn anew, the router is random."""

    info: ClassVar[StrategyInfo] = StrategyInfo(
        name="drop-svd",
        summary="copies of the FFN with the weakest quarter of the singular vectors drawn anew (reconstructed)",
        paper="baseline of Chu et al., Cluster-aware Upcycling, CVPR 2026, arXiv:2604.13508, supplement A",
        url="https://arxiv.org/abs/2604.13508",
        status="reconstructed",
        reconstructed=(
            "the lowest 25% of the spectrum: a quarter of the singular values by number (option `energy_fraction`: "
            "by energy)",
            "new vectors: random, orthonormal, at right angles to the kept ones, singular values kept "
            "(option `vectors`)",
            "both linears, each expert and matrix with draws of its own; biases copied; router random",
        ),
    )

    fraction: float = Field(
        default=DEFAULT_FRACTION,
        ge=0,
        le=1,
        description="share of the singular values, by number, whose vectors are drawn anew",
    )
    energy_fraction: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="in place of `fraction`: draw anew the longest tail that holds at most this share of sum s^2",
    )
    vectors: Literal["orthonormal", "gaussian"] = Field(
        default="orthonormal",
        description="gaussian: normal numbers with the mean and standard deviation of the dropped vectors' numbers",
    )
    router_init: RouterInit = "deepspeed"

    def __post_init__(self) -> None:
        if self.energy_fraction is not None and self.fraction != DEFAULT_FRACTION:
            raise UserError("drop-svd: fraction and energy_fraction exclude each other; give one of them.")

    def init_layer(self, ffn: FFN, layer: Layer, calibration: Any, rng: Stream) -> LayerInit:
        first, second = self._split(ffn.w1_HD), self._split(ffn.w2_DH)
        experts = []
        for number in range(layer.num_experts):
            stream = rng.child("expert", number)
            w1_HD = self._with_new_vectors(first, stream.child("w1"))
            w2_DH = self._with_new_vectors(second, stream.child("w2"))
            experts.append(ffn.expert(w1_HD=w1_HD, w2_DH=w2_DH))
        notes = {
            "redrawn_vectors_w1": len(first.s_t),
            "redrawn_vectors_w2": len(second.s_t),
            "redrawn_energy_w1": first.energy,
            "redrawn_energy_w2": second.energy,
        }
        return LayerInit(experts, random_router(ffn, layer, rng, self.router_init), notes)

    def _split(self, weight_OI: Tensor) -> Split:
        """The matrix in two parts, kept and drawn anew; the same for all experts."""
        weight_OI = weight_OI.double().cpu()
        u_OM, s_M, vt_MI = draws.svd(weight_OI)
        v_IM = vt_MI.T
        tail_M = np.cumsum(s_M.numpy()[::-1] ** 2)  # weakest first; PyTorch's sums depend on the number of threads
        if self.energy_fraction is None:
            dropped = int(self.fraction * len(s_M))
        else:
            dropped = int((tail_M <= self.energy_fraction * tail_M[-1]).sum())
        kept = len(s_M) - dropped
        u_Ot, s_t, v_It = u_OM[:, kept:], s_M[kept:], v_IM[:, kept:]
        energy = float(tail_M[dropped - 1] / tail_M[-1]) if dropped and tail_M[-1] > 0 else 0.0
        base_OI = weight_OI - (u_Ot * s_t) @ v_It.T  # exactly W where nothing is dropped
        return Split(base_OI, u_OM[:, :kept], v_IM[:, :kept], u_Ot, s_t, v_It, energy)

    def _with_new_vectors(self, split: Split, rng: Stream) -> Tensor:
        """W_e [O, I] of one expert."""
        left, right = rng.child("left"), rng.child("right")
        if self.vectors == "orthonormal":
            u_Ot = orthonormal(split.u_Oc, len(split.s_t), left)
            v_It = orthonormal(split.v_Ic, len(split.s_t), right)
        else:
            u_Ot, v_It = draws.redrawn(split.u_Ot, left), draws.redrawn(split.v_It, right)
        return split.base_OI + (u_Ot * split.s_t) @ v_It.T


@plain_dataclass(frozen=True)
class Split:
    """A matrix without its weakest components, and these components; float64 on the CPU."""

    base_OI: Tensor  # U_c diag(s_c) V_c^T
    u_Oc: Tensor
    v_Ic: Tensor
    u_Ot: Tensor
    s_t: Tensor
    v_It: Tensor
    energy: float  # share of sum s^2 in s_t


def orthonormal(kept_Oc: Tensor, count: int, rng: Stream) -> Tensor:
    """Random orthonormal columns [O, count], orthogonal to the orthonormal `kept_Oc` and uniformly distributed.

    Normal numbers lose their projection on `kept_Oc` and are orthonormalised by a QR. The signs are those of a positive
    diagonal of R, because LAPACK's are arbitrary. A second pass removes what rounding left along `kept_Oc`.
    """
    z_Ot = draws.normal((len(kept_Oc), count), rng)
    for _ in range(2):
        z_Ot = z_Ot - kept_Oc @ (kept_Oc.T @ z_Ot)
        q_Ot, r_tt = torch.linalg.qr(z_Ot)
        z_Ot = q_Ot * torch.sign(r_tt.diagonal())
    return z_Ot


@hookimpl
def register_strategies() -> list[type[Strategy]]:
    return [DropSVD]
