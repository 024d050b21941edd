"""What a cluster-aware calibrator makes of the tokens: clusters, second moments, router (K7), without padding (K9).

Shape suffixes: P dimensions of the PCA.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from tests.cluster_data import STREAM, ClusterAware, layer_of, make, relative, tokens, two_paddings, w1
from tests.helpers import (
    Initialised,
    TinyPairs,
    cones,
    initialise,
    moe_layer,
    orthonormal,
    random_ffn,
    tiny_clip,
    tiny_moe,
)
from tests.literal import cluster_aware as literal
from upcycle_bench.model.ffn import FFN
from upcycle_bench.model.moe import MoEFFN, moe_layers
from upcycle_bench.model.surgery import find_layers, put_experts
from upcycle_bench.upcycling.calibration import calibrate
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.flops import counted_flops
from upcycle_bench.util.rng import Stream

# ---- K7: the router -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pca_divisor", [1, 3, 8])
def test_k7_router_rows_are_unit_and_choose_the_cluster(pca_divisor: int) -> None:
    ffn = random_ffn(32, 24, dtype=torch.float32)
    x_TD, _ = cones(1200, orthonormal(4, 24), seed=7, noise=0.5)
    x_TD = x_TD + 5 * torch.randn(24, generator=torch.Generator().manual_seed(0))  # a mean, which PCA must not lose
    init, calibrator = make(ClusterAware(pca_divisor=pca_divisor, cluster_tokens=300), ffn, x_TD, 6, chunk=100)
    assert_close(init.router_ED.norm(dim=1), torch.ones(6), rtol=0, atol=1e-6)
    layer = moe_layer(init).eval()
    with torch.no_grad():
        first_T = layer.gate(x_TD)[3][0]  # DeepSpeed's index_KT
    label_T = torch.from_numpy(literal.assign(x_TD.numpy(), init.router_ED.double().numpy()))
    assert torch.equal(first_T.long(), label_T)
    assert torch.equal(torch.bincount(label_T, minlength=6), calibrator.count_E)
    moment_EDD = torch.zeros_like(moments(calibrator))
    for x_D, label in zip(x_TD.double(), label_T, strict=True):
        moment_EDD[label] += torch.outer(x_D, x_D)  # tokens as they are, not normalised
    assert relative(moments(calibrator), moment_EDD) < 1e-12


def test_k7_router_scale_multiplies_and_changes_nothing_else() -> None:
    ffn = random_ffn(32, 24)
    x_TD, _ = cones(500, orthonormal(4, 24), seed=7)
    one, four = (make(ClusterAware(pca_divisor=4, router_scale=scale), ffn, x_TD, 4)[0] for scale in (1, 4))
    assert torch.equal(four.router_ED, 4 * one.router_ED)
    assert all(torch.equal(w1(a), w1(b)) for a, b in zip(one.experts, four.experts, strict=True))
    assert one.notes == four.notes


def test_k7_on_the_calibration_tokens_of_a_clip() -> None:
    clip = tiny_clip()
    strategy = ClusterAware()
    made = initialise(strategy, clip, seed=0)
    model = put_experts(clip.model, made.inits, tiny_moe()).eval()
    for name, layer in moe_layers(model).items():
        # The same tokens go once more through the dense model, and to this layer's gate.
        counts_E = torch.zeros(4, dtype=torch.long)

        def count(x_TD: Tensor, layer: MoEFFN = layer, counts_E: Tensor = counts_E) -> None:
            counts_E.add_(torch.bincount(layer.gate(x_TD)[3][0].long(), minlength=4))

        collectors = {n: SimpleNamespace(update=count if n == name else lambda x_TD: None) for n in made.inits}
        recalibrate(clip, made, collectors, strategy.calibration_pairs)
        assert torch.equal(counts_E, made.calibrators[name].count_E), name
        assert counts_E.sum() == made.inits[name].notes["calibration_tokens"]


def recalibrate(clip: Any, made: Initialised, collectors: dict[str, Any], pairs: int) -> None:
    """Show the data of `initialise(..., seed=0)` to other collectors."""
    batches = TinyPairs(clip).calibration(Stream(("calibration", 0)), pairs, 256)
    calibrate(clip.model, made.layers, collectors, [(clip.normalise(batch.images), batch.texts) for batch in batches])


@pytest.mark.parametrize("options", [{"pca": False}, {"pca_divisor": 1}, {"pca": False, "pca_divisor": 4}])
def test_k7_without_pca_the_router_is_exact(options: dict[str, Any]) -> None:
    ffn, x_TD = random_ffn(32, 24), loose_tokens()
    init, _ = make(ClusterAware(**options), ffn, x_TD, 6)
    assert init.notes["router_agreement"] == 1
    plain, _ = make(ClusterAware(pca_divisor=1), ffn, x_TD, 6)
    assert torch.equal(init.router_ED, plain.router_ED)
    other, _ = make(ClusterAware(pca_divisor=4), ffn, x_TD, 6)
    assert not torch.equal(other.router_ED, plain.router_ED)


def loose_tokens() -> Tensor:
    """Wide cones with a mean, so that neither a centred PCA nor member means give the clusters exactly."""
    x_TD, _ = cones(3000, orthonormal(6, 24), seed=7, noise=0.4)
    unit_TD = F.normalize(x_TD, dim=1)
    return unit_TD + 0.5 * F.normalize(torch.randn(24, generator=torch.Generator().manual_seed(1)), dim=0)


def test_k7_the_agreement_is_the_share_of_tokens_that_the_router_sends_to_their_cluster() -> None:
    ffn, x_TD = random_ffn(32, 24), loose_tokens()
    init, calibrator = make(ClusterAware(pca_divisor=4), ffn, x_TD, 6)
    axes_PD = torch.linalg.svd(F.normalize(x_TD.double(), dim=1), full_matrices=False).Vh[:6]
    centroid_ED = calibrator.centroid_ED.double()
    label_T = (F.normalize(x_TD.double() @ axes_PD.T, dim=1) @ (centroid_ED @ axes_PD.T).T).argmax(1)
    share = float(((x_TD.double() @ init.router_ED.T).argmax(1) == label_T).double().mean())
    assert init.notes["router_agreement"] == pytest.approx(share, abs=1e-3)
    assert share > 0.999  # no mean is subtracted: nothing is lost that a router without bias could not express
    assert torch.equal(torch.bincount(label_T, minlength=6), calibrator.count_E)


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
        assert a.count_E.sum() == (sum(lengths) if layer.tower == "text" else 48 * patches)
        assert torch.equal(a.count_E, b.count_E)
        # Attention at the padding is masked, so only the order of sums in another block of memory could differ.
        assert_close(a.centroid_ED, b.centroid_ED, rtol=0, atol=1e-6)
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
    assert torch.equal(one.centroid_ED, many.centroid_ED)
    assert torch.equal(one.count_E, many.count_E)
    assert one.count_E.sum() == 4000
    assert relative(moments(many), moments(one)) < 1e-10


def test_only_the_buffer_decides_the_clusters() -> None:
    x_TD, _ = cones(4000, orthonormal(4, 16), seed=8, noise=0.8)
    first = statistics(x_TD, chunked(4000, 300), cluster_tokens=1000)
    altered_TD = x_TD.clone()
    altered_TD[1000:] = altered_TD[1000:].flip(1)
    assert torch.equal(statistics(altered_TD, chunked(4000, 300), cluster_tokens=1000).centroid_ED, first.centroid_ED)
    assert not torch.equal(statistics(x_TD, chunked(4000, 300), cluster_tokens=500).centroid_ED, first.centroid_ED)


def test_a_stream_shorter_than_the_buffer_is_fitted_at_its_end() -> None:
    x_TD, _ = cones(400, orthonormal(4, 16), seed=8)
    calibrator = statistics(x_TD, chunked(400, 64), cluster_tokens=100_000)
    exact = statistics(x_TD, [400], cluster_tokens=400)
    assert torch.equal(calibrator.centroid_ED, exact.centroid_ED)
    assert torch.equal(calibrator.count_E, exact.count_E)
    before = moments(calibrator).clone()
    calibrator.finish()  # again: nothing is counted twice
    assert torch.equal(moments(calibrator), before)


def test_moments_are_symmetric_to_the_bit() -> None:
    x_TD, _ = cones(700, orthonormal(4, 200), seed=8)  # a width of three whole strips and a shorter one
    with counted_flops() as counter:
        moment_EDD = moments(statistics(x_TD, [300, 400], cluster_tokens=300))
    assert torch.equal(moment_EDD, moment_EDD.mT)
    assert relative(moment_EDD.sum(0), x_TD.double().T @ x_TD.double()) < 1e-13
    triangle = 64 * 64 + 64 * 128 + 64 * 192 + 8 * 200
    assert counter.get_total_flops() > 2 * 700 * triangle  # and the PCA's


def test_tokens_are_held_by_value() -> None:
    x_TD, _ = cones(400, orthonormal(4, 16), seed=8)
    calibrator = ClusterAware(pca_divisor=4).calibrator(random_ffn(8, 16), layer_of(4), STREAM)
    reused_TD = torch.empty(100, 16)
    for part in x_TD.split(100):
        calibrator.update(reused_TD.copy_(part))
    calibrator.finish()
    assert torch.equal(calibrator.centroid_ED, statistics(x_TD, [400]).centroid_ED)


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
    assert set(sizes[3:]) == {moments + centroids + counts}  # the fourth fits and releases it
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
