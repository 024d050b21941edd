"""Clusters of the tokens that reach one layer, and each cluster's second moment, in one pass over the stream.

    statistics = ClusterStatistics(768, 8, 96, 32768, rng, niter=25, nredo=1)
    for x_TD in stream:
        statistics.update(x_TD)
    statistics.finish()
    statistics.centroid_ED, statistics.moment(0)

The clusters are those of arXiv:2604.13508, Eq. 6; the second moment C_i is the X_i X_i^T of its Eq. 8.
Shape suffixes: E clusters, one an expert.
"""

from __future__ import annotations

import torch
from torch import Tensor

from upcycle_bench.upcycling.clustering import spherical_kmeans
from upcycle_bench.upcycling.symmetric import add_second_moment, symmetric
from upcycle_bench.util.rng import Stream


class ClusterStatistics:
    """Clusters of a layer's FFN inputs, and each cluster's second moment C_i = sum x x^T (x not normalised), float64.

    The first `fit_tokens` tokens are held in a buffer, to which `spherical_kmeans` fits the clusters. From then on each
    token is assigned to a cluster and added to its moment as it comes. Memory is E D^2 numbers and the buffer, however
    long the stream.

    centroid_ED: unit rows, float32, no rows before clusters are fitted; count_E: tokens of each cluster, int64 on the
    CPU; agreement: that of `Clusters`. `update` and `finish` raise UserError for fewer tokens than clusters.
    """

    def __init__(
        self, width: int, num_clusters: int, pca_dim: int, fit_tokens: int, rng: Stream, *, niter: int, nredo: int
    ) -> None:
        self.width, self.num_clusters, self.pca_dim, self.fit_tokens = width, num_clusters, pca_dim, fit_tokens
        self.rng, self.niter, self.nredo = rng, niter, nredo
        self.buffer: list[Tensor] = []
        self.centroid_ED = torch.empty(0, width)
        self.agreement = 0.0
        self.count_E = torch.zeros(num_clusters, dtype=torch.long)
        self._lower_EDD = torch.zeros(num_clusters, width, width, dtype=torch.float64)  # lower triangles

    def moment(self, cluster: int) -> Tensor:
        """C_i [D, D], symmetric to the bit."""
        return symmetric(self._lower_EDD[cluster])

    def notes(self) -> dict[str, float]:
        """Numbers for the step-0 receipt."""
        share_E = self.count_E / self.count_E.sum()
        return {
            "router_agreement": self.agreement,
            "calibration_tokens": int(self.count_E.sum()),
            "empty_clusters": int((self.count_E == 0).sum()),
            "largest_cluster_share": float(share_E.max()),
            "smallest_cluster_share": float(share_E.min()),
        }

    def update(self, x_TD: Tensor) -> None:
        """See a batch of tokens [T, D]: hold them until the clusters are fitted, afterwards assign and add them."""
        if len(self.centroid_ED):
            self._add(x_TD)
            return
        self.buffer.append(x_TD.clone())
        if sum(map(len, self.buffer)) >= self.fit_tokens:
            self.finish()

    def finish(self) -> None:
        """Fit the clusters (Eq. 6) and add the held tokens, unless `update` has done so."""
        if len(self.centroid_ED):
            return
        sample_TD = torch.cat(self.buffer) if self.buffer else torch.empty(0, self.width)
        self.buffer.clear()
        fitted_TD = sample_TD[: self.fit_tokens]
        clusters = spherical_kmeans(
            fitted_TD, self.num_clusters, self.pca_dim, self.rng, niter=self.niter, nredo=self.nredo
        )
        self.agreement = clusters.agreement
        self.centroid_ED = clusters.centroid_ED.to(sample_TD.device)
        self._lower_EDD = self._lower_EDD.to(sample_TD.device)
        self._add(sample_TD)

    def _add(self, x_TD: Tensor) -> None:
        label_T = (x_TD @ self.centroid_ED.T).argmax(1)  # Eq. 6: the length of x does not matter
        self.count_E += label_T.bincount(minlength=self.num_clusters).cpu()
        for cluster in range(self.num_clusters):
            add_second_moment(self._lower_EDD[cluster], x_TD[label_T == cluster].double())  # C_i of Eq. 8
