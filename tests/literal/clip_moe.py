"""CLIP-MoE's labels and batches, sample by sample; the random orders are arguments.

A reference for tests, written from arXiv:2409.19291 and its code.

Shape suffixes: S samples.
"""


def stage_label(text_cluster: int, image_cluster: int, clusters: int) -> int:
    """c = M c_text + c_image, one of M^2, with M clusters of a modality."""
    return clusters * text_cluster + image_cluster


def accumulated_label(stage_labels: list[int], clusters: int, max_stages: int) -> int:
    """a_s of one sample's labels c_1 ... c_s: a <- M^2 a + c from a = 0, over the last `max_stages` of them."""
    label = 0
    for stage in range(max(0, len(stage_labels) - max_stages), len(stage_labels)):
        label = clusters * clusters * label + stage_labels[stage]
    return label


def batches(label_S: list[int], order_S: list[int], batch_size: int) -> list[list[int]]:
    """One epoch: every batch from one cluster, clusters in turn, those smaller than a batch skipped."""
    queues = []
    for label in sorted(set(label_S)):
        members = []
        for sample in order_S:
            if label_S[sample] == label:
                members.append(sample)
        if len(members) >= batch_size:
            queues.append(members)
    made: list[list[int]] = []
    while any(len(members) >= batch_size for members in queues):
        for members in queues:
            if len(members) >= batch_size:
                made.append([members.pop(0) for _ in range(batch_size)])
    return made


def share_in_skipped_clusters(label_S: list[int], batch_size: int) -> float:
    """Of all samples, those whose cluster is smaller than a batch."""
    lost = 0
    for label in label_S:
        if label_S.count(label) < batch_size:
            lost += 1
    return lost / len(label_S)
