"""The transcription of CLIP-MoE's labels and batches: by hand, and the fast strategy agrees with it."""

import pytest
import torch

from tests.literal import clip_moe as literal
from upcycle_bench.strategies import clip_moe
from upcycle_bench.util.rng import Stream


def test_labels_by_hand() -> None:
    assert literal.stage_label(2, 1, 3) == 7
    # c = 7, 4, 8: 7 -> 9 * 7 + 4 = 67 -> 9 * 67 + 8 = 611; of the last two 9 * 4 + 8 = 44, of the last one 8
    assert [literal.accumulated_label([7, 4, 8], 3, stages) for stages in (3, 2, 1)] == [611, 44, 8]


def test_batches_by_hand() -> None:
    # label 1: samples 5, 2, 0 in this order, one batch of two; label 4: 3, 1; label 6: only sample 4, skipped
    label_S, order_S = [1, 4, 1, 4, 6, 1], [5, 3, 2, 4, 0, 1]
    assert literal.batches(label_S, order_S, 2) == [[5, 2], [3, 1]]
    assert literal.share_in_skipped_clusters(label_S, 2) == pytest.approx(1 / 6)


@pytest.mark.parametrize("clusters", [2, 3])
def test_fast_labels_and_batches_equal_the_literal_ones(clusters: int) -> None:
    for max_stages in (1, 2, 3, 5):
        compare(clusters, max_stages)


def compare(clusters: int, max_stages: int) -> None:
    generator = torch.Generator().manual_seed(clusters)
    label_S = torch.zeros(200, dtype=torch.long)
    history: list[list[int]] = [[] for _ in range(200)]
    for stage in range(4):
        stage_S = torch.randint(0, clusters**2, (200,), generator=generator) // 2  # clusters of unequal size
        label_S = clip_moe.accumulate(label_S, stage_S, clusters, max_stages)
        for labels, label in zip(history, stage_S.tolist(), strict=True):
            labels.append(label)
        expected = [literal.accumulated_label(labels, clusters, max_stages) for labels in history]
        assert label_S.tolist() == expected
        rng = Stream(("batches", stage))
        rows_SB, lost = clip_moe.cluster_batches(label_S, 6, rng)
        order_S = torch.randperm(200, generator=rng.generator()).tolist()
        assert rows_SB.tolist() == literal.batches(expected, order_S, 6)
        assert lost == pytest.approx(literal.share_in_skipped_clusters(expected, 6))
