"""Cluster-aware initialisation of a layer as one would first write it: keep all activations, then decompose W1 S.

The same result as `upcycle_bench.strategies.cluster_aware` with the same tokens in its first `cluster_tokens`, to
rounding. Memory grows with the data, and each expert takes a float64 SVD of an H x D matrix and an inverse.

Shape suffixes: T tokens, D width, H hidden, E experts, R singular values.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from upcycle_bench.model.ffn import FFN
from upcycle_bench.upcycling.clustering import spherical_kmeans
from upcycle_bench.util.rng import Stream


class StoredActivations:
    """A calibrator that forgets nothing."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []

    def update(self, x_TD: Tensor) -> None:
        """See one batch of FFN inputs."""
        self.kept.append(x_TD.clone())


def naive_experts(
    ffn: FFN, stored: StoredActivations, num_clusters: int, rng: Stream, *, cluster_tokens: int, tau: float = 0.9
) -> tuple[list[Tensor], Tensor]:
    """(W1 of every expert, router [E, D]) by SVD_r(W1 S) S^-1 with S S^T the cluster's second moment."""
    x_TD = torch.cat(stored.kept)
    width = ffn.width
    clusters = spherical_kmeans(x_TD[:cluster_tokens], num_clusters, max(1, width // 8), rng, niter=25, nredo=1)
    label_T = (x_TD @ clusters.centroid_ED.T.to(x_TD)).argmax(1)
    experts = []
    for cluster in range(num_clusters):
        member_TD = x_TD[label_T == cluster].double()
        root_DD = torch.linalg.cholesky(member_TD.T @ member_TD)
        u_HR, sigma_R, vt_RD = torch.linalg.svd(ffn.w1_HD.double() @ root_DD, full_matrices=False)
        energy_R = sigma_R.square().cumsum(0) / sigma_R.square().sum()
        rank = max(int((energy_R < tau).sum()) + 1, math.floor(len(sigma_R) * 0.5) + 1)
        kept_HD = (u_HR[:, :rank] * sigma_R[:rank]) @ vt_RD[:rank]
        experts.append((kept_HD @ torch.linalg.inv(root_DD)).to(ffn.w1_HD.dtype))
    return experts, clusters.centroid_ED
