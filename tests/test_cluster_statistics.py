"""What streams past a cluster-aware calibrator: clusters, second moments and the router (METHODS 6.5, K7 and K9).

Shape suffixes: B batch, L sequence, T tokens, D width, N experts.
"""

import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from tests.cluster_data import STREAM, ClusterAware, fast, layer_of, make, relative, tokens, two_paddings, w1
from tests.helpers import (
    Initialised,
    TinyPairs,
    cones,
    initialise,
    moe_layer,
    orthonormal,
    random_ffn,
    threads,
    tiny_clip,
    tiny_moe,
)
from tests.literal import cluster_aware as literal
from upcycle_bench import threads as threads_module
from upcycle_bench.calibration import calibrate
from upcycle_bench.errors import UserError
from upcycle_bench.flops import counted_flops
from upcycle_bench.moe import MoEFFN, moe_layers
from upcycle_bench.rng import Stream
from upcycle_bench.strategy import FFN
from upcycle_bench.surgery import find_layers, upcycle
from upcycle_bench.threads import SHARE


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    with threads(1):
        yield


# ---- K7: the router -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pca_divisor", [1, 3, 8])
def test_k7_router_rows_are_unit_and_choose_the_cluster(pca_divisor: int) -> None:
    ffn = random_ffn(32, 24, dtype=torch.float32)
    x_TD, _ = cones(1200, orthonormal(4, 24), seed=7, noise=0.5)
    x_TD = x_TD + 5 * torch.randn(24, generator=torch.Generator().manual_seed(0))  # a mean, which PCA must not lose
    init, calibrator = make(ClusterAware(pca_divisor=pca_divisor, cluster_tokens=300), ffn, x_TD, 6, chunk=100)
    assert_close(init.router_ND.norm(dim=1), torch.ones(6), rtol=0, atol=1e-6)
    layer = moe_layer(init).eval()
    with torch.no_grad():
        first_T = layer.gate(x_TD)[3][0]  # DeepSpeed's index_KT
    label_T = torch.from_numpy(literal.assign(x_TD.numpy(), init.router_ND.double().numpy()))
    assert torch.equal(first_T.long(), label_T)
    assert torch.equal(torch.bincount(label_T, minlength=6), calibrator.count_N)
    moment_NDD = torch.zeros_like(moments(calibrator))
    for x_D, label in zip(x_TD.double(), label_T, strict=True):
        moment_NDD[label] += torch.outer(x_D, x_D)  # tokens as they are, not normalised
    assert relative(moments(calibrator), moment_NDD) < 1e-12


def test_k7_router_scale_multiplies_and_changes_nothing_else() -> None:
    ffn = random_ffn(32, 24)
    x_TD, _ = cones(500, orthonormal(4, 24), seed=7)
    one, four = (make(ClusterAware(pca_divisor=4, router_scale=scale), ffn, x_TD, 4)[0] for scale in (1, 4))
    assert torch.equal(four.router_ND, 4 * one.router_ND)
    assert all(torch.equal(w1(a), w1(b)) for a, b in zip(one.experts, four.experts, strict=True))
    assert one.notes == four.notes


def test_k7_on_the_calibration_tokens_of_a_clip() -> None:
    clip = tiny_clip()
    strategy = ClusterAware()
    made = initialise(strategy, clip, seed=0)
    model = upcycle(clip.model, made.inits, tiny_moe()).eval()
    for name, layer in moe_layers(model).items():
        # The same tokens go once more through the dense model, and to this layer's gate.
        counts_N = torch.zeros(4, dtype=torch.long)

        def count(x_TD: Tensor, layer: MoEFFN = layer, counts_N: Tensor = counts_N) -> None:
            counts_N.add_(torch.bincount(layer.gate(x_TD)[3][0].long(), minlength=4))

        collectors = {n: SimpleNamespace(update=count if n == name else lambda x_TD: None) for n in made.inits}
        recalibrate(clip, made, collectors, strategy.calibration_pairs)
        assert torch.equal(counts_N, made.calibrators[name].count_N), name
        assert counts_N.sum() == made.inits[name].notes["calibration_tokens"]


def recalibrate(clip: Any, made: Initialised, collectors: dict[str, Any], pairs: int) -> None:
    """Stream the data of `initialise(..., seed=0)` past other collectors."""
    batches = TinyPairs(clip).calibration(Stream(("calibration", 0)), pairs, 256)
    calibrate(clip.model, made.layers, collectors, [(clip.normalise(batch.images), batch.texts) for batch in batches])


@pytest.mark.parametrize("options", [{"pca": False}, {"pca_divisor": 1}, {"pca": False, "pca_center": True}])
def test_k7_without_pca_the_router_is_exact(options: dict[str, Any]) -> None:
    ffn, x_TD = random_ffn(32, 24), loose_tokens()
    init, calibrator = make(ClusterAware(**options), ffn, x_TD, 6)
    assert init.notes["router_agreement"] == 1
    plain, _ = make(ClusterAware(pca_divisor=1), ffn, x_TD, 6)
    assert torch.equal(init.router_ND, plain.router_ND)
    assert calibrator.offset_N is None


def loose_tokens() -> Tensor:
    """Wide cones with a mean, so that neither a centred PCA nor member means give the clusters exactly."""
    x_TD, _ = cones(3000, orthonormal(6, 24), seed=7, noise=0.4)
    unit_TD = F.normalize(x_TD, dim=1)
    return unit_TD + 0.5 * F.normalize(torch.randn(24, generator=torch.Generator().manual_seed(1)), dim=0)


@pytest.mark.parametrize("center", [False, True])
def test_k7_recomputed_rows_are_unit_means_of_members_and_their_agreement_is_noted(center: bool) -> None:
    ffn, x_TD = random_ffn(32, 24), loose_tokens()
    options = {"pca_divisor": 4, "pca_center": center}
    init, calibrator = make(ClusterAware(centroid_map="recompute", **options), ffn, x_TD, 6, chunk=500)
    by_hand_N = torch.zeros(6, 24, dtype=torch.float64)
    label_T = assigned(calibrator, x_TD)
    for unit_D, label in zip(F.normalize(x_TD.double(), dim=1), label_T, strict=True):
        by_hand_N[label] += unit_D
    assert_close(init.router_ND, F.normalize(by_hand_N, dim=1), rtol=0, atol=1e-4)
    assert_close(init.router_ND.norm(dim=1), torch.ones(6, dtype=torch.float64), rtol=0, atol=1e-6)
    # The note is the share of tokens that the router sends to their cluster; clusters are those of `backproject`.
    routed_T = (x_TD.double() @ init.router_ND.T).argmax(1)
    share = float((routed_T == label_T).double().mean())
    assert init.notes["router_agreement"] == pytest.approx(share, abs=2e-3)
    assert 0.5 < share < 1
    mapped, other = make(ClusterAware(**options), ffn, x_TD, 6)
    assert torch.equal(other.count_N, calibrator.count_N)
    assert all(torch.equal(w1(a), w1(b)) for a, b in zip(init.experts, mapped.experts, strict=True))
    assert torch.equal(torch.bincount(label_T, minlength=6), calibrator.count_N)


def assigned(calibrator: Any, x_TD: Tensor) -> Tensor:
    """The cluster of each token, in float64 from the calibrator's centroids and offsets."""
    offset_N = torch.zeros(1) if calibrator.offset_N is None else calibrator.offset_N
    return (F.normalize(x_TD.double(), dim=1) @ calibrator.centroid_ND.double().T - offset_N.double()).argmax(1)


def test_k7_a_centred_pca_is_worse_and_recomputing_helps_it() -> None:
    ffn, x_TD = random_ffn(32, 24), loose_tokens()
    agreement = {
        (center, how): make(ClusterAware(pca_divisor=4, pca_center=center, centroid_map=how), ffn, x_TD, 6)[0].notes[
            "router_agreement"
        ]
        for center in (False, True)
        for how in ("backproject", "recompute")
    }
    assert agreement[False, "backproject"] > 0.999
    assert agreement[True, "backproject"] < 0.95
    assert agreement[True, "recompute"] > agreement[True, "backproject"]


def test_a_centred_pca_is_that_of_the_literal_formula() -> None:
    """Axes from an SVD of unit tokens less their mean; each token belongs to the most similar centroid there."""
    ffn, x_TD = random_ffn(32, 24), loose_tokens()
    _, calibrator = make(ClusterAware(pca_divisor=4, pca_center=True), ffn, x_TD, 6)
    unit_TD = F.normalize(x_TD.double(), dim=1)
    mean_D = unit_TD.mean(0)
    axes_PD = torch.linalg.svd(unit_TD - mean_D, full_matrices=False).Vh[:6]
    centroid_NP = calibrator.centroid_ND.double() @ axes_PD.T
    assert_close(centroid_NP @ axes_PD, calibrator.centroid_ND.double(), rtol=0, atol=1e-5)  # rows lie in the plane
    points_TP = F.normalize((unit_TD - mean_D) @ axes_PD.T, dim=1)
    label_T = (points_TP @ centroid_NP.T).argmax(1)
    assert float((label_T == assigned(calibrator, x_TD)).double().mean()) > 0.999  # but for rounding to float32
    for number in range(6):  # a fixed point of spherical k-means there, up to its last iterations
        mean_P = F.normalize(points_TP[label_T == number].sum(0), dim=0)
        assert float(mean_P @ centroid_NP[number]) > 0.999


# ---- K9: padding ----------------------------------------------------------------------------------------------------


def test_k9_padding_does_not_influence_clusters_or_moments() -> None:
    clip = tiny_clip()
    *texts, lengths = two_paddings(clip)
    images = torch.randn(48, 3, *clip.model.visual.image_size, generator=torch.Generator().manual_seed(0))
    layers = find_layers(clip.model, tiny_moe())
    seen = []
    for text_BL in texts:
        calibrators = {
            layer.name: ClusterAware().calibrator(
                FFN.of(clip.model.get_submodule(layer.mlp_path)), layer, STREAM.child(layer.name)
            )
            for layer in layers
        }
        calibrate(clip.model, layers, calibrators, [(images[:20], text_BL[:20]), (images[20:], text_BL[20:])])
        for calibrator in calibrators.values():
            calibrator.finish()
        seen.append(calibrators)
    first, second = seen
    for layer in layers:
        a, b = first[layer.name], second[layer.name]
        patches = len(clip.model.visual.positional_embedding)
        assert a.count_N.sum() == (sum(lengths) if layer.tower == "text" else 48 * patches)
        assert torch.equal(a.count_N, b.count_N)
        # Attention at the padding is masked, so only the order of sums in another block of memory could differ.
        assert_close(a.centroid_ND, b.centroid_ND, rtol=0, atol=1e-6)
        assert_close(moments(a), moments(b), rtol=1e-6, atol=1e-6)


# ---- Streaming ------------------------------------------------------------------------------------------------------


def statistics(x_TD: Tensor, chunks: list[int], number: int = 4, **options: Any) -> Any:
    strategy = ClusterAware(pca_divisor=4, **options)
    calibrator = strategy.calibrator(random_ffn(8, x_TD.shape[1]), layer_of(number), STREAM)
    for part in x_TD.split(chunks):
        calibrator.update(part)
    calibrator.finish()
    return calibrator


def moments(calibrator: Any) -> Tensor:
    return torch.stack([calibrator.moment(i) for i in range(calibrator.num_clusters)])


def chunked(total: int, size: int) -> list[int]:
    return [size] * (total // size) + ([total % size] if total % size else [])


@pytest.mark.parametrize("size", [1, 7, 300, 1000, 3999])
def test_many_small_updates_equal_one(size: int) -> None:
    # 1,000 tokens are fitted whatever the chunks; 7, 300 and 3,999 run over that boundary, 1 and 1,000 meet it.
    x_TD, _ = cones(4000, orthonormal(4, 16), seed=8, noise=0.4)
    one = statistics(x_TD, [4000], cluster_tokens=1000)
    many = statistics(x_TD, chunked(4000, size), cluster_tokens=1000)
    assert torch.equal(one.centroid_ND, many.centroid_ND)
    assert torch.equal(one.count_N, many.count_N)
    assert one.count_N.sum() == 4000
    assert relative(moments(many), moments(one)) < 1e-10


def test_only_the_buffer_decides_the_clusters() -> None:
    x_TD, _ = cones(4000, orthonormal(4, 16), seed=8, noise=0.8)
    first = statistics(x_TD, chunked(4000, 300), cluster_tokens=1000)
    altered_TD = x_TD.clone()
    altered_TD[1000:] = altered_TD[1000:].flip(1)
    assert torch.equal(statistics(altered_TD, chunked(4000, 300), cluster_tokens=1000).centroid_ND, first.centroid_ND)
    assert not torch.equal(statistics(x_TD, chunked(4000, 300), cluster_tokens=500).centroid_ND, first.centroid_ND)


def test_a_stream_shorter_than_the_buffer_is_fitted_at_its_end() -> None:
    x_TD, _ = cones(400, orthonormal(4, 16), seed=8)
    calibrator = statistics(x_TD, chunked(400, 64), cluster_tokens=100_000)
    exact = statistics(x_TD, [400], cluster_tokens=400)
    assert torch.equal(calibrator.centroid_ND, exact.centroid_ND)
    assert torch.equal(calibrator.count_N, exact.count_N)
    before = moments(calibrator).clone()
    calibrator.finish()  # again: nothing is counted twice
    assert torch.equal(moments(calibrator), before)


def test_cores_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """A core that is free takes clusters of its own; every sum is one thread's, so its bits stay."""
    ffn = random_ffn(512, 256, dtype=torch.float32)
    x_TD, _ = cones(12000, orthonormal(4, 256), seed=8, noise=0.3)
    monkeypatch.setattr(threads_module, "cores", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv(SHARE, "1")
    with counted_flops() as flops_alone:
        alone, one = make(ClusterAware(cluster_tokens=3000), ffn, x_TD, 4, chunk=3000)
    monkeypatch.setenv(SHARE, "2")
    both = threading.Barrier(2)  # passed by two threads at the same time only

    def watched(work: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            both.wait(timeout=60)
            return work(*args, **more)

        return call

    monkeypatch.setattr(fast.ClusterStatistics, "_add", watched(fast.ClusterStatistics._add))
    monkeypatch.setattr(fast, "truncate", watched(fast.truncate))
    with counted_flops() as flops_together:  # as `run` does
        together, two = make(ClusterAware(cluster_tokens=3000), ffn, x_TD, 4, chunk=3000)
    assert flops_together.get_total_flops() == flops_alone.get_total_flops()
    assert torch.equal(moments(one), moments(two))
    assert torch.equal(one.count_N, two.count_N)
    assert alone.notes == together.notes
    for a, b in zip(alone.experts, together.experts, strict=True):
        assert torch.equal(w1(a), w1(b))


def test_moments_are_symmetric_to_the_bit() -> None:
    x_TD, _ = cones(700, orthonormal(4, 200), seed=8)  # a width of three whole strips and a shorter one
    with counted_flops() as counter:
        moment_NDD = moments(statistics(x_TD, [300, 400], cluster_tokens=300))
    assert torch.equal(moment_NDD, moment_NDD.mT)
    assert relative(moment_NDD.sum(0), x_TD.double().T @ x_TD.double()) < 1e-13
    triangle = 64 * 64 + 64 * 128 + 64 * 192 + 8 * 200
    assert counter.get_total_flops() > 2 * 700 * triangle  # and the PCA's


def test_tokens_are_held_by_value() -> None:
    x_TD, _ = cones(400, orthonormal(4, 16), seed=8)
    calibrator = ClusterAware(pca_divisor=4).calibrator(random_ffn(8, 16), layer_of(4), STREAM)
    reused_TD = torch.empty(100, 16)
    for part in x_TD.split(100):
        calibrator.update(reused_TD.copy_(part))
    calibrator.finish()
    assert torch.equal(calibrator.centroid_ND, statistics(x_TD, [400]).centroid_ND)


def held(calibrator: Any) -> int:
    """Bytes of all tensors that a calibrator holds."""
    tensors = [value for value in vars(calibrator).values() if isinstance(value, Tensor)] + calibrator.buffer
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def test_memory_does_not_grow_with_the_stream() -> None:
    x_TD, _ = cones(8000, orthonormal(4, 16), seed=8)
    calibrator = ClusterAware(pca_divisor=4, cluster_tokens=1000).calibrator(random_ffn(8, 16), layer_of(4), STREAM)
    sizes = []
    for part in x_TD.split(250):
        calibrator.update(part)
        sizes.append(held(calibrator))
    moments, centroids, counts = 4 * 16 * 16 * 8, 4 * 16 * 4, 4 * 8
    assert sizes[2] == moments + counts + 750 * 16 * 4  # three updates: the buffer
    # The fourth fits and releases it; the router's rows are the centroids, counted twice.
    assert set(sizes[3:]) == {moments + 2 * centroids + counts}
    assert calibrator.buffer == []


@pytest.mark.parametrize(("number", "cluster_tokens"), [(8, 1000), (8, 5)])
def test_fewer_tokens_than_clusters_is_one_line(number: int, cluster_tokens: int) -> None:
    x_TD = tokens(5, width=16).float()
    with pytest.raises(UserError, match="5 tokens for 8 clusters") as error:
        statistics(x_TD, [5], number, cluster_tokens=cluster_tokens)
    assert "\n" not in str(error.value)
    for option in ("pairs", "cluster_tokens"):  # what to do, by the options' own names
        assert option in str(error.value)


def test_a_stream_without_tokens_is_one_line() -> None:
    with pytest.raises(UserError, match="0 tokens for 4 clusters"):
        ClusterAware().calibrator(random_ffn(8, 16), layer_of(4), STREAM).finish()
