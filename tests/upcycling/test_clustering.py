"""Spherical k-means of tokens (arXiv:2604.13508, Eq. 6): planted directions, all the data, lengths do not matter.

Shape suffixes: E clusters, P dimensions of the PCA.
"""

import sys

import faiss
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from tests.helpers import cones, orthonormal
from tests.literal import cluster_aware as literal
from upcycle_bench.upcycling.clustering import principal_directions, spherical_kmeans
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.rng import Stream

STREAM = Stream(("test", 0))


def cluster(
    sample_TD: Tensor, number: int, pca_dim: int, rng: Stream = STREAM, niter: int = 25, nredo: int = 1
) -> Tensor:
    clusters = spherical_kmeans(sample_TD, number, pca_dim, rng, niter=niter, nredo=nredo)
    assert clusters.agreement > 0.999  # an uncentred PCA loses no assignment (centroids mapped back by the same basis)
    return clusters.centroid_ED


def labels(x_TD: Tensor, centroid_ED: Tensor) -> Tensor:
    return (x_TD.double() @ centroid_ED.double().T).argmax(1)


def same_partition(a_T: Tensor, b_T: Tensor) -> bool:
    """Equal up to the clusters' names."""
    pairs = set(zip(a_T.tolist(), b_T.tolist(), strict=True))
    return len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


def unstructured(count: int = 800, width: int = 12, seed: int = 0) -> Tensor:
    """Tokens with a mean and no clusters, where every detail of k-means shows."""
    generator = torch.Generator().manual_seed(seed)
    scale_D = 0.8 ** torch.arange(width)
    return torch.randn(count, width, generator=generator) * scale_D + torch.randn(width, generator=generator)


@pytest.mark.parametrize("pca_dim", [4, 8, 32])
def test_recovers_separated_directions(pca_dim: int) -> None:
    directions_ED = orthonormal(4, 32)
    x_TD, planted_T = cones(2000, directions_ED, seed=1, noise=0.05)
    centroid_ED = cluster(x_TD, 4, pca_dim, nredo=3)
    assert (centroid_ED.shape, centroid_ED.dtype) == ((4, 32), torch.float32)
    assert_close(centroid_ED.norm(dim=1), torch.ones(4), rtol=0, atol=1e-6)
    assert ((centroid_ED.double() @ directions_ED.T).amax(0) > 0.999).all()
    assert same_partition(labels(x_TD, centroid_ED), planted_T)


def test_same_stream_same_centroids_to_the_bit() -> None:
    x_TD = unstructured()
    first_ED = cluster(x_TD, 5, 6)
    assert torch.equal(first_ED, cluster(x_TD, 5, 6))
    assert torch.equal(first_ED, cluster(x_TD.clone(), 5, 6, Stream(("test", 0))))
    other_ED = cluster(x_TD, 5, 6, Stream(("test", 1)))
    assert (first_ED @ other_ED.T).amax(1).min() < 0.999  # other starting points, other local optimum


def test_neither_draws_from_nor_seeds_global_generators() -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    cluster(unstructured(), 5, 6)
    assert torch.equal(torch_state, torch.get_rng_state())
    assert np.array_equal(numpy_state, np.random.get_state()[1])


def test_threads_of_faiss_do_not_matter() -> None:
    x_TD = unstructured()
    one_ED = cluster(x_TD, 5, 6)
    faiss.omp_set_num_threads(2)
    try:
        assert torch.equal(one_ED, cluster(x_TD, 5, 6))
    finally:
        faiss.omp_set_num_threads(1)


def test_length_of_a_token_does_not_matter() -> None:
    x_TD = unstructured()
    generator = torch.Generator().manual_seed(3)
    power_T1 = 2.0 ** torch.randint(-6, 7, (len(x_TD), 1), generator=generator)  # exact, so equal to the bit
    assert torch.equal(cluster(x_TD, 5, 6), cluster(x_TD * power_T1, 5, 6))
    factor_T1 = 0.1 + 10 * torch.rand(len(x_TD), 1, generator=generator)
    assert_close(cluster(x_TD * factor_T1, 5, 6), cluster(x_TD, 5, 6), rtol=0, atol=1e-5)


def test_all_the_data_is_used() -> None:
    # A centroid is the direction of the mean over *all* its members (Eq. 6). Faiss's default takes 256 points per
    # centroid, 512 of these 20,000: its mean is off by noise / sqrt(256), 40 times our tolerance.
    x_TD, _ = cones(20000, orthonormal(2, 16), seed=2, noise=0.3)
    unit_TD = F.normalize(x_TD.double(), dim=1)

    def distance_to_mean(centroid_ED: Tensor) -> float:
        label_T = labels(x_TD, centroid_ED)
        mean_ED = torch.stack([F.normalize(unit_TD[label_T == i].sum(0), dim=0) for i in range(2)])
        return float((centroid_ED.double() - mean_ED).norm(dim=1).min())

    assert distance_to_mean(cluster(x_TD, 2, 16, niter=50)) < 5e-4
    default = faiss.Kmeans(16, 2, niter=50, spherical=True, seed=STREAM.child("kmeans").seed(bits=31))
    default.train(unit_TD.float().numpy())
    assert distance_to_mean(torch.from_numpy(default.centroids.copy())) > 0.02


def test_pca_over_the_whole_width_is_no_pca() -> None:
    x_TD = unstructured(width=12)
    assert torch.equal(principal_directions(F.normalize(x_TD, dim=1), 12), torch.eye(12))
    kmeans = faiss.Kmeans(
        12,
        5,
        niter=25,
        spherical=True,
        seed=STREAM.child("kmeans").seed(bits=31),
        max_points_per_centroid=len(x_TD),
        min_points_per_centroid=1,
    )
    kmeans.train(F.normalize(x_TD, dim=1).numpy())
    full_ED = cluster(x_TD, 5, 12)
    assert_close(full_ED, torch.from_numpy(kmeans.centroids), rtol=0, atol=1e-6)
    assert torch.equal(full_ED, cluster(x_TD, 5, 100))  # more dimensions than there are: no PCA either
    assert not torch.allclose(full_ED, cluster(x_TD, 5, 3), atol=1e-2)


@pytest.mark.parametrize("pca_dim", [1, 5, 11])
def test_principal_directions_are_the_right_singular_vectors(pca_dim: int) -> None:
    unit_TD = F.normalize(unstructured(), dim=1)
    basis_PD = principal_directions(unit_TD, pca_dim)
    assert basis_PD.shape == (pca_dim, 12)
    assert_close(basis_PD @ basis_PD.T, torch.eye(pca_dim), rtol=0, atol=1e-6)
    _, _, v_DD = torch.linalg.svd(unit_TD.double(), full_matrices=False)  # no mean is subtracted
    cosine_P = (basis_PD.double() * v_DD[:pca_dim]).sum(1)
    assert_close(cosine_P.abs(), torch.ones(pca_dim).double(), rtol=0, atol=1e-6)


def test_cluster_in_the_pca_plane_is_the_largest_product_in_full_width() -> None:
    x_TD = unstructured(width=16) + 3 * torch.randn(16, generator=torch.Generator().manual_seed(9))  # a strong mean
    centroid_ED = cluster(x_TD, 6, 4)
    basis_PD = principal_directions(F.normalize(x_TD, dim=1), 4)
    assert_close(centroid_ED @ basis_PD.T @ basis_PD, centroid_ED, rtol=0, atol=1e-6)  # rows lie in the plane
    in_plane_TE = F.normalize(x_TD @ basis_PD.T, dim=1) @ (centroid_ED @ basis_PD.T).T
    assert torch.equal(in_plane_TE.argmax(1), (x_TD @ centroid_ED.T).argmax(1))


@pytest.mark.parametrize("pca_dim", [None, 5])
def test_equals_the_literal_transcription(pca_dim: int | None) -> None:
    x_TD = unstructured()
    expected_ED = literal.spherical_clusters(
        x_TD.numpy(), 5, pca_dim, niter=25, nredo=2, seed=STREAM.child("kmeans").seed(bits=31)
    )
    # float32 points on both sides, normalised in another precision and seen in a basis of other signs.
    actual_ED = cluster(x_TD, 5, pca_dim or 12, nredo=2)
    np.testing.assert_allclose(actual_ED.numpy(), expected_ED, rtol=0, atol=1e-5)


def test_restarts_never_lose_and_can_win() -> None:
    x_TD = unstructured()
    unit_TD = F.normalize(x_TD, dim=1)

    def objective(seed: int, nredo: int) -> float:  # Eq. 6
        centroid_ED = cluster(x_TD, 7, 12, Stream(("test", seed)), nredo=nredo)
        return float((unit_TD @ centroid_ED.T).amax(1).sum())

    gains = [objective(seed, 6) - objective(seed, 1) for seed in range(4)]
    assert min(gains) > -1e-3  # of about 600: the first of six starts is the single start
    assert max(gains) > 0.1


def test_fewer_tokens_than_clusters_is_one_line() -> None:
    with pytest.raises(UserError, match="3 tokens for 4 clusters") as error:
        cluster(torch.randn(3, 8), 4, 2)
    assert "\n" not in str(error.value)
    assert cluster(orthonormal(4, 8).float(), 4, 8).shape == (4, 8)  # as many is enough


def test_missing_faiss_is_one_line_that_names_the_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match="faiss is not installed") as error:
        cluster(unstructured(), 4, 2)
    message = str(error.value)
    assert "upcycle-bench[cpu]" in message
    assert "[gpu]" in message
    assert "\n" not in message
