"""Drop-SVD: its invariants V1 to V5, its options, and the transcription.

Shape suffixes: O outputs, I inputs, M components, c of them kept, t drawn anew.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests.helpers import dense_forward, moe_layer, orthonormal, random_ffn, tiny_clip, tiny_moe
from tests.literal import drop_svd as literal
from upcycle_bench.model.ffn import FFN, Layer, LayerInit
from upcycle_bench.model.surgery import find_layers
from upcycle_bench.planning.registry import load_registry
from upcycle_bench.strategy import configure
from upcycle_bench.upcycling.initialise import make_experts
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.rng import Stream

DropSVD = load_registry().strategies["drop-svd"].target
HIDDEN, WIDTH = 64, 16
SIGMAS = 5
STREAM = Stream(("test", 0))
TOLERANCE = {"rtol": 1e-10, "atol": 1e-12}
FRACTIONS = pytest.mark.parametrize("fraction", [0.25, 0.6, 1.0])


def make(ffn: FFN, num_experts: int = 4, **options: Any) -> LayerInit:
    return DropSVD(**options).init_layer(ffn, Layer("vision", 1, 2, num_experts, 2), None, STREAM)


def matrices(init: LayerInit, ffn: FFN) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """A dense matrix and what the experts have in its place, W1 and then W2."""
    yield ffn.w1_HD, [expert.c_fc.weight.detach() for expert in init.experts]
    yield ffn.w2_DH, [expert.c_proj.weight.detach() for expert in init.experts]


def with_spectrum(*s: float) -> FFN:
    """An FFN both of whose matrices have these singular values."""
    ffn, count = random_ffn(12, len(s)), len(s)
    u_RH, v_RD = orthonormal(count, 12), orthonormal(count, count, seed=1)
    w1_HD = u_RH.T @ torch.diag(torch.tensor(s, dtype=torch.float64)) @ v_RD
    return replace(ffn, w1_HD=w1_HD, w2_DH=w1_HD.T.contiguous())


# ---- V1 to V5 -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"fraction": 0.0}, {"fraction": 0.9 / WIDTH}, {"energy_fraction": 0.0}])
def test_v1_without_new_vectors_it_is_sparse_upcycling(options: dict[str, float]) -> None:
    for dtype, vectors in itertools.product([torch.float32, torch.float64], ["orthonormal", "gaussian"]):
        ffn = random_ffn(HIDDEN, WIDTH, dtype=dtype)
        init = make(ffn, vectors=vectors, **options)
        assert init.notes == dict.fromkeys(init.notes, 0)
        for weight, made in matrices(init, ffn):
            assert all(torch.equal(weight, other) for other in made)
        if dtype == torch.float64:
            x_TD = torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(1), dtype=dtype)
            assert_close(moe_layer(init).eval()(x_TD), dense_forward(ffn, x_TD), **TOLERANCE)


@FRACTIONS
def test_v2_singular_values_are_the_dense_ones(fraction: float) -> None:
    ffn = random_ffn(HIDDEN, WIDTH)
    for weight, made in matrices(make(ffn, fraction=fraction), ffn):
        for other in made:
            assert_close(torch.linalg.svdvals(other), torch.linalg.svdvals(weight), **TOLERANCE)


@FRACTIONS
def test_v3_what_is_kept_acts_as_before(fraction: float) -> None:
    ffn = random_ffn(HIDDEN, WIDTH)
    kept = WIDTH - math.floor(fraction * WIDTH)
    for weight, made in matrices(make(ffn, fraction=fraction), ffn):
        u_OM, _, vt_MI = torch.linalg.svd(weight, full_matrices=False)
        u_Oc, v_Ic = u_OM[:, :kept], vt_MI[:kept].T
        for other in made:
            assert_close(other @ v_Ic, weight @ v_Ic, **TOLERANCE)
            assert_close(u_Oc.T @ other, u_Oc.T @ weight, **TOLERANCE)


def test_v4_distance_is_bounded_and_on_average_twice_the_dropped_energy() -> None:
    experts = 200
    ffn = random_ffn(HIDDEN, WIDTH)
    for weight, made in matrices(make(ffn, experts), ffn):
        tail = float(torch.linalg.svdvals(weight)[12:].square().sum())
        ratio = torch.stack([(other - weight).square().sum() for other in made]) / tail
        assert float(ratio.max()) <= 4
        # ||A' - A||^2 = 2 ||A||^2 - 2 <A', A>. A' is a matrix in the (64 - 12) x (16 - 12) dimensions that the kept
        # vectors leave; turning either side changes nothing, so E <A', A>^2 = ||A'||^2 ||A||^2 / (52 * 4).
        deviation = 2 / math.sqrt(52 * 4)
        assert abs(float(ratio.mean()) - 2) < SIGMAS * deviation / math.sqrt(experts)
        # The sample's variance; <A', A> is close to normal, whose squares have a relative deviation of sqrt(2 / n).
        assert abs(float(ratio.var()) / deviation**2 - 1) < SIGMAS * math.sqrt(2 / experts)


@FRACTIONS
def test_v5_experts_differ_and_have_the_dense_norm(fraction: float) -> None:
    ffn = random_ffn(HIDDEN, WIDTH)
    init = make(ffn, fraction=fraction)
    for weight, made in matrices(init, ffn):
        for one, other in itertools.combinations([weight, *made], 2):
            # 10 % of the dropped energy's root at least, where the average is sqrt(2) of it.
            tail = torch.linalg.svdvals(weight)[WIDTH - math.floor(fraction * WIDTH) :].norm()
            assert float((one - other).norm()) > 0.1 * float(tail)
            assert float(one.norm()) == pytest.approx(float(other.norm()), rel=1e-12)
    for expert in init.experts:
        assert torch.equal(expert.c_fc.bias, ffn.b1_H)
        assert torch.equal(expert.c_proj.bias, ffn.b2_D)


def test_an_expert_does_not_depend_on_how_many_there_are() -> None:
    ffn = random_ffn(24, 8)
    few, many = (make(ffn, number).experts for number in (2, 6))
    for one, other in zip(few, many[:2], strict=True):
        assert all(map(torch.equal, one.parameters(), other.parameters()))


def test_the_number_of_threads_does_not_matter() -> None:
    """As a run makes them: the decompositions themselves round differently with two threads."""
    model, moe = tiny_clip().model, tiny_moe(every=4)
    for layer in find_layers(model, moe):  # large enough that LAPACK and matrix products use threads
        random_ffn(2048, 64).put_into(model.get_submodule(layer.mlp_path))
    made = []
    for number in (1, 2):
        torch.set_num_threads(number)  # not `threads`: faiss, which that quiets, may share torch's OpenMP
        try:
            made.append(make_experts(DropSVD(), model, moe, 0, lambda pairs: []))
            assert torch.get_num_threads() == number
        finally:
            torch.set_num_threads(1)
    for name, init in made[0].items():
        for one, other in zip(init.experts, made[1][name].experts, strict=True):
            assert all(map(torch.equal, one.parameters(), other.parameters()))


# ---- Options --------------------------------------------------------------------------------------------------------


def test_energy_fraction_counts_the_tail() -> None:
    # Squares 16, 4, 1, 1 (sum 22), tails 1, 2, 6, 22 of it: shares 0.045, 0.091, 0.273, 1.
    for energy_fraction, dropped in ((0.04, 0), (0.05, 1), (0.1, 2), (0.25, 2), (0.28, 3), (1.0, 4)):
        notes = make(with_spectrum(4, 2, 1, 1 - 1e-9), energy_fraction=energy_fraction).notes
        assert notes["redrawn_vectors_w1"] == notes["redrawn_vectors_w2"] == dropped
        share = {0: 0, 1: 1 / 22, 2: 2 / 22, 3: 6 / 22, 4: 1}[dropped]
        assert notes["redrawn_energy_w1"] == pytest.approx(share, rel=1e-6)


def test_gaussian_vectors_replace_the_tail_and_are_not_orthonormal() -> None:
    """Their moments are those of the transcription, below."""
    ffn = random_ffn(HIDDEN, WIDTH)
    for weight, made in matrices(make(ffn, vectors="gaussian"), ffn):
        u_OM, s_M, vt_MI = torch.linalg.svd(weight, full_matrices=False)
        base_OI = u_OM[:, :12] * s_M[:12] @ vt_MI[:12]
        for other in made:
            new_M = torch.linalg.svdvals(other - base_OI)
            assert (new_M[:4] > 1e-3).all() and (new_M[4:] < 1e-12).all()  # a quarter of 16
            assert float((torch.linalg.svdvals(other) - s_M).abs().max()) > 1e-3


def test_fraction_and_energy_fraction_exclude_each_other() -> None:
    with pytest.raises(
        UserError, match=r"^drop-svd: fraction and energy_fraction exclude each other; give one of them\.$"
    ):
        configure(DropSVD, {"fraction": "0.5", "energy_fraction": "0.1"})
    assert configure(DropSVD, {"energy_fraction": "0.1"}).energy_fraction == 0.1


# ---- The transcription ----------------------------------------------------------------------------------------------


def test_transcription_by_hand() -> None:
    # W = diag(3, 2) over a row of zeros. t = 1 of 2: kept u = v = e1, s = 3. The normal vectors (5, 0, -2) and (7, -1)
    # lose their first entry: u' = (0, 0, -1), v' = (0, -1), so W_e = 3 e1 e1^T + 2 u' v'^T.
    w_OI = [[3.0, 0.0], [0.0, 2.0], [0.0, 0.0]]
    made = literal.expert_matrix(w_OI, [[5.0, 0.0, -2.0]], [[7.0, -1.0]], fraction=0.5)
    assert_close(torch.tensor(made), torch.tensor([[3.0, 0.0], [0.0, 0.0], [0.0, 2.0]]))
    # Gaussian: u = (0, 1, 0), mean 1/3, std sqrt(1/3); v = (0, 1), mean 1/2, std sqrt(1/2). z = 0 gives the means.
    made = literal.expert_matrix(w_OI, [[0.0] * 3], [[0.0] * 2], fraction=0.5, gaussian=True)
    third = 2 * (1 / 3) * (1 / 2)
    assert_close(torch.tensor(made), torch.tensor([[3 + third, third], [third, third], [third, third]]))


@pytest.mark.parametrize("cut", [{"fraction": 0.0}, {}, {"fraction": 1.0}, {"energy_fraction": 0.4}])
def test_fast_strategy_equals_the_literal_one(cut: dict[str, float]) -> None:
    for vectors, dtype in itertools.product(["orthonormal", "gaussian"], [torch.float64, torch.float32]):
        compare(cut, vectors, dtype)


def compare(cut: dict[str, float], vectors: str, dtype: torch.dtype) -> None:
    ffn = random_ffn(10, 5, dtype=dtype)
    init = make(ffn, 2, vectors=vectors, **cut)
    for (weight, made), name in zip(matrices(init, ffn), ("w1", "w2"), strict=True):
        count = int(init.notes[f"redrawn_vectors_{name}"])
        for number, other in enumerate(made):
            normals = [
                torch.randn(
                    (size, count),
                    generator=STREAM.child("expert", number, name, side).generator(),
                    dtype=torch.float64,
                ).T.tolist()
                for size, side in zip(weight.shape, ("left", "right"), strict=True)
            ]
            expected = literal.expert_matrix(weight.double().tolist(), *normals, gaussian=vectors == "gaussian", **cut)
            tolerance = {"rtol": 1e-8, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
            assert other.dtype == dtype
            assert_close(other.double(), torch.tensor(expected, dtype=torch.float64), **tolerance)
